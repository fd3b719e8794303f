"""LoRAs under the names that other programs use for a network's layers, read as the network's own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import families
import pytest
import torch
from safetensors.torch import save_file
from tiny import composed
from torch import Tensor
from torch.testing import assert_close

from swd.commands import export
from swd.export import student_folder, verification
from swd.modules.adapters import DIFFUSERS_WEIGHTS, PEFT_WEIGHTS, adaptable, check_start, load, locate
from swd.modules.backbones import load_family
from swd.modules.base_adapters import content_hash
from swd.modules.lora_names import kohya, with_own_names
from swd.modules.pretrained import Pretrained
from swd.modules.targets import is_target
from swd.types import UserError

State = dict[str, Tensor]


@pytest.fixture(scope="module", params=[*families.FAMILIES, "wan22_5b", "wan22_a14b"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    folder = families.save(request.param, tmp_path_factory.mktemp("names") / request.param)
    return families.pretrained(request.param, folder)


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    return families.pretrained("wan", families.save("wan", tmp_path_factory.mktemp("names") / "pipeline"))


def random_lora(model: Pretrained, seed: int = 0, every: bool = False) -> State:
    """Random weights for the layers that the family trains, or for all of its linear layers."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}
    for name, layer in adaptable(model).items():
        if isinstance(layer, torch.nn.Linear) and (every or is_target(name, model.targets)):
            state[f"{name}.lora_A.weight"] = 0.3 * torch.randn(4, layer.in_features, generator=generator)
            state[f"{name}.lora_B.weight"] = 0.3 * torch.randn(layer.out_features, 4, generator=generator)
    return state


def as_kohya(state: State, alpha: float, rename: Any = kohya) -> State:
    """Weights whose scale is alpha over rank, so that they are larger by the inverse of that."""
    made: State = {}
    for key, value in state.items():
        module, _, kind = key.removesuffix(".weight").rpartition(".lora_")
        name = rename(module)
        scale = alpha / len(state[f"{module}.lora_A.weight"])
        made[f"{name}.lora_{'down' if kind == 'A' else 'up'}.weight"] = (
            value if kind == "A" else value / scale
        ).clone()
        made[f"{name}.alpha"] = torch.tensor(alpha)
    return made


def test_what_is_exported_is_read_again_in_every_layout(model: Pretrained, tmp_path: Path) -> None:
    state = random_lora(model)
    (tmp_path / "given").mkdir()
    save_file(
        {f"{model.backbone_class.lora_prefix()}.{k}": v for k, v in state.items()}, tmp_path / "given/a.safetensors"
    )
    adapter = load(tmp_path / "given" / "a.safetensors").fitted(model)
    scheduler = families.scheduler(next(n for n in families.SIZES if families.FAMILY[n] == model.family), model)
    made = student_folder.export(adapter, model, scheduler, tmp_path / "made", verify=False)
    files = [made / name for name in (PEFT_WEIGHTS, DIFFUSERS_WEIGHTS, verification.COMFY_WEIGHTS)]
    assert files[2].is_file() == (
        model.backbone_class.network_type in ("WanTransformer3DModel", "UNet2DConditionModel")
    )
    save_file(student_folder.comfy_state(model.backbone_class, state), tmp_path / "comfyui.safetensors")
    for path in (*filter(Path.is_file, files), tmp_path / "comfyui.safetensors", made):
        found = load(path).fitted(model).state
        assert found.keys() == state.keys(), path
        assert all(torch.equal(found[key], value) for key, value in state.items()), path


def test_names_of_other_programs_stand_for_the_same_layers(model: Pretrained, tmp_path: Path) -> None:
    """Both names of every linear layer, the network's and ComfyUI's, behind each beginning and in kohya's layout."""
    state = random_lora(model, every=True)
    comfy = model.backbone_class.comfy_key
    bare = lambda name: comfy(name).removeprefix("diffusion_model.").removeprefix("transformer.")  # noqa: E731
    layouts = [
        as_kohya(state, 2.0),
        as_kohya(state, 2.0, lambda name: kohya(bare(name))),
        as_kohya(state, 2.0, bare),
        as_kohya(state, 2.0, lambda name: f"diffusion_model.{bare(name)}"),
        as_kohya(state, 2.0, lambda name: f"diffusion_model.{name}"),
    ]
    hashes = set()
    for number, tensors in enumerate(layouts):
        save_file(tensors, tmp_path / f"{number}.safetensors")
        found = load(tmp_path / f"{number}.safetensors").fitted(model)
        assert found.state.keys() == state.keys()
        hashes.add(content_hash(found))
    assert len(hashes) == 1 and all(torch.equal(found.state[key], value) for key, value in state.items())


def predicted(network: Any, model: Pretrained) -> Tensor:
    return verification.predict(network, model, model.size)


@torch.no_grad()
def test_a_wan_lora_with_original_names_changes_the_base_as_diffusers_does(wan: Pretrained, tmp_path: Path) -> None:
    """diffusers has a table of its own; embeddings and the head are in neither the default targets nor its table."""
    state = random_lora(wan)
    file = tmp_path / "style.safetensors"
    save_file(as_kohya(state, 1.0, wan.backbone_class.comfy_key), file)
    assert "diffusion_model.blocks.1.cross_attn.o.lora_up.weight" in as_kohya(state, 1.0, wan.backbone_class.comfy_key)
    pipe = wan.pipeline(transformer=wan.network().network)
    pipe.load_lora_weights(str(file))
    styled = families.pretrained("wan", wan.folder, adapters=[str(file)])
    ours = predicted(styled.network().network, styled)
    assert_close(ours, predicted(pipe.transformer, wan), rtol=1e-4, atol=1e-5)
    assert (ours - predicted(wan.network().network, wan)).abs().max() > 0.01


@pytest.mark.filterwarnings("ignore:no scheduler_config.json beside")
def test_a_published_student_of_wan_is_exported_and_started_from(wan: Pretrained, tmp_path: Path) -> None:
    """Loaded back, it is compared with what diffusers makes of the original file."""
    state = random_lora(wan, 3)
    for number, rename in enumerate((wan.backbone_class.comfy_key, lambda n: wan.backbone_class.comfy_key(n)[16:])):
        file = tmp_path / f"{number}.safetensors"
        save_file(as_kohya(state, 8.0, rename), file)
        common = ["model=wan21_1_3b", f"model.path={wan.folder}", "model.size=[3,8,8]", "model.rank=4"]
        common += ["model.feature_blocks=[0]", "model.max_text_tokens=24", "model.precision=fp32"]
        common += ["schedule.sizes=[[1,4,4],[2,6,6],[3,8,8]]", "schedule.sigmas=[1.0,0.8,0.6]"]
        export.run(composed([*common, f"run={file}", f"to={tmp_path / f'made{number}'}"], "export"))
        assert_close(load(tmp_path / f"made{number}").state, state)
        start = families.pretrained("wan", wan.folder, init_adapter=str(file))
        check_start(start)
        assert start.initial is not None and start.initial.keys() == state.keys()


# Layouts that hold several layers as one


def real(family: str, network: str, **config: Any) -> Any:
    """A network with few layers of real width, without weights; its LoRA is small."""
    with torch.device("meta"):
        built = getattr(diffusers, network)(**config)
    return SimpleNamespace(backbone_class=load_family(family), meta_network=built, name="real")


def fused(**sizes: tuple[int, int]) -> State:
    generator = torch.Generator().manual_seed(5)
    made: State = {}
    for module, (outer, inner) in sizes.items():
        made[f"{module}.lora_A.weight"] = torch.randn(2, inner, generator=generator)
        made[f"{module}.lora_B.weight"] = torch.randn(outer, 2, generator=generator)
    return made


FLUX = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 24, "attention_head_dim": 128}
CASES: dict[str, tuple[Any, dict[str, tuple[int, int]], dict[str, list[str]]]] = {
    "flux": (
        ("flux", "FluxTransformer2DModel", FLUX),
        {"double_blocks_0_txt_attn_qkv": (9216, 3072), "single_blocks_0_linear1": (21504, 3072)},
        {
            "double_blocks_0_txt_attn_qkv": [f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"],
            "single_blocks_0_linear1": [
                *(f"single_transformer_blocks.0.attn.to_{x}" for x in "qkv"),
                "single_transformer_blocks.0.proj_mlp",
            ],
        },
    ),
    "chroma": (
        ("chroma", "ChromaTransformer2DModel", FLUX),
        {"double_blocks_0_img_attn_qkv": (9216, 3072)},
        {"double_blocks_0_img_attn_qkv": [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]},
    ),
    "flux2": (
        ("flux2", "Flux2Transformer2DModel", {"num_layers": 1, "num_single_layers": 1}),
        {"double_blocks_0_img_attn_qkv": (18432, 6144), "single_blocks_0_linear2": (6144, 24576)},
        {
            "double_blocks_0_img_attn_qkv": [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
            "single_blocks_0_linear2": ["single_transformer_blocks.0.attn.to_out"],
        },
    ),
    "z_image": (
        ("z_image", "ZImageTransformer2DModel", {"n_layers": 1}),
        {"layers_0_attention_qkv": (11520, 3840), "layers_0_feed_forward_w1": (10240, 3840)},
        {
            "layers_0_attention_qkv": [f"layers.0.attention.to_{x}" for x in "qkv"],
            "layers_0_feed_forward_w1": ["layers.0.feed_forward.w1"],
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_q_k_and_v_in_one_are_divided(name: str) -> None:
    arguments, sizes, expected = CASES[name]
    model = real(*arguments[:2], **arguments[2])
    state = fused(**sizes)
    for given in (state, {f"lora_unet_{key}": value for key, value in state.items()}):
        found = with_own_names(given, adaptable(model), model)
        assert {key.rpartition(".lora_")[0] for key in found} == {m for parts in expected.values() for m in parts}
        for module, parts in expected.items():
            x = torch.randn(sizes[module][1], generator=torch.Generator().manual_seed(0))
            whole = state[f"{module}.lora_B.weight"] @ (state[f"{module}.lora_A.weight"] @ x)
            divided = [found[f"{part}.lora_B.weight"] @ (found[f"{part}.lora_A.weight"] @ x) for part in parts]
            assert_close(torch.cat(divided), whole)


def test_sdxls_original_names_are_read(tmp_path: Path) -> None:
    """By its published configuration: the second block down, and the first one up, of the vendor's numbering."""
    config = diffusers.UNet2DConditionModel.load_config(
        Path(__file__).parents[2] / "assets" / "published" / "networks" / "sdxl.json"
    )
    model = real("sdxl", "UNet2DConditionModel", **{k: v for k, v in config.items() if not k.startswith("_")})
    state = fused(
        input_blocks_4_1_transformer_blocks_1_attn2_to_out_0=(640, 640),
        output_blocks_0_1_transformer_blocks_9_ff_net_0_proj=(10240, 1280),
        middle_block_1_transformer_blocks_3_attn1_to_k=(1280, 1280),
    )
    found = with_own_names(state, adaptable(model), model)
    assert {key.rpartition(".lora_")[0] for key in found} == {
        "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_out.0",
        "up_blocks.0.attentions.0.transformer_blocks.9.ff.net.0.proj",
        "mid_block.attentions.0.transformer_blocks.3.attn1.to_k",
    }
    assert all(any(torch.equal(value, each) for each in state.values()) for value in found.values())


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("flux2", {"double_blocks_0_norm_of_our_own": (6144, 6144)}),  # diffusers warns and leaves it out
        ("z_image", {"layers_0_attention_to_q": (3840, 3840)}),  # and here it prefers this to the fused one
    ],
)
def test_nothing_is_left_out_by_a_converter(name: str, more: dict[str, tuple[int, int]]) -> None:
    arguments, sizes, _ = CASES[name]
    model = real(*arguments[:2], **arguments[2])
    state = fused(**sizes, **more)
    assert with_own_names(state, adaptable(model), model) == state


def test_unknown_and_doubled_names_are_one_line(wan: Pretrained, tmp_path: Path) -> None:
    state = random_lora(wan)
    key = "blocks.0.attn1.to_q"
    double = {f"blocks.0.self_attn.q.lora_{kind}.weight": state[f"{key}.lora_{kind}.weight"].clone() for kind in "AB"}
    unknown = {k.replace("self_attn", "own_attn"): v for k, v in double.items()}
    for tensors, message in (
        (state | double, f"two names for the layer {key}"),
        (unknown, "blocks.0.own_attn.q, which"),
    ):
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(UserError, match=message) as caught:
            families.pretrained("wan", wan.folder, adapters=[str(locate(str(tmp_path / "x.safetensors"), tmp_path))])
        assert "\n" not in str(caught.value)
