"""Model folders are checked before anything is loaded from them."""

from __future__ import annotations

import errno
import importlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import families
import pytest
import torch
from huggingface_hub import errors
from torch import nn

from swd.modules import hub
from swd.modules.backbones import load_family
from swd.modules.backbones.base import TARGETS, NetworkLimits
from swd.modules.backbones.sd3 import SD3Encoders
from swd.modules.backbones.sdxl import SDXLEncoders
from swd.modules.family_folder import resolve_asset
from swd.modules.model_folders import is_whole_file
from swd.modules.pretrained import Pretrained
from swd.modules.targets import covered_share, is_target, names_for_peft
from swd.types import UserError


def pretrained(folder: Path | str, **more: Any) -> Pretrained:
    return Pretrained("sd3", str(folder), **({"rank": 4, "precision": "fp32", "feature_blocks": (1,)} | more))


def test_limits_come_from_configuration_files(tiny_model: Path) -> None:
    model = pretrained(tiny_model)
    limits = model.limits
    assert (limits.divisor, limits.max_side, limits.blocks, limits.width) == (2, 12, 3, 16)
    assert model.channels == 4
    model.check_targets()


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((4, 7), ["7", "not divisible by 2", "use 6 or 8"]),
        ((1, 4), ["1", "use 2"]),
        ((4, 14), ["14", "positional limit 12"]),
        ((2, 4, 4), ["(2, 4, 4)", "3 axes", "(H, W)"]),
        ((0, 4), ["0 is no side", "1 to 16384"]),
        ((4, -2), ["-2 is no side", "1 to 16384"]),
    ],
)
def test_sizes_that_the_network_cannot_take_are_refused(
    tiny_model: Path, size: tuple[int, ...], words: list[str]
) -> None:
    limits = pretrained(tiny_model).limits
    limits.check_size((4, 12))
    with pytest.raises(UserError) as caught:
        limits.check_size(size)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("size", [(10**9, 128), (128, 0), (0, 128, 128), (10**6, 128, 128)])
def test_no_side_is_zero_or_huge_where_positions_are_computed(size: tuple[int, ...]) -> None:
    limits = NetworkLimits(divisor=2, max_side=None, blocks=3, width=8, channels=4, native=(128,) * len(size))
    limits.check_size((128,) * len(size))
    with pytest.raises(UserError, match="is no side of a latent; use 1 to 16384"):
        limits.check_size(size)


@pytest.mark.parametrize("block", [-1, 3, 77])
def test_blocks_that_do_not_exist_are_refused(tiny_model: Path, block: int) -> None:
    limits = pretrained(tiny_model).limits
    limits.check_block(0), limits.check_block(2)
    with pytest.raises(UserError, match=f"block {block} does not exist; this model has blocks 0 to 2"):
        limits.check_block(block)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def rename_network(file: Path) -> None:
    index = json.loads(file.read_text())
    index["transformer"] = ["diffusers", "FluxTransformer2DModel"]
    file.write_text(json.dumps(index))


def shard(file: Path) -> None:
    index = {"weight_map": {"a": file.name, "b": "part-2-of-2.safetensors"}}
    (file.parent / f"{file.name}.index.json").write_text(json.dumps(index))


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
DAMAGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "no index": ("model_index.json", Path.unlink, "has no model_index.json"),
    "broken index": ("model_index.json", lambda f: f.write_text("{"), "model_index.json is damaged"),
    "no tokenizer": ("tokenizer_3", shutil.rmtree, "'tokenizer_3' is missing"),
    "empty tokenizer": ("tokenizer_3", lambda f: [p.unlink() for p in f.iterdir()], "'tokenizer_3' is missing"),
    "no weights": (WEIGHTS, Path.unlink, "'transformer' has no .safetensors"),
    "no vae weights": ("vae/diffusion_pytorch_model.safetensors", Path.unlink, "'vae' has no .safetensors"),
    "no text encoder": ("text_encoder_2/config.json", Path.unlink, "'text_encoder_2' has no config.json"),
    "no network configuration": ("transformer/config.json", Path.unlink, "'transformer' has no config.json"),
    "broken configuration": ("transformer/config.json", lambda f: f.write_text("no"), "config.json is damaged"),
    "truncated weights": (WEIGHTS, truncate, "'transformer' has a damaged diffusion_pytorch_model.safetensors"),
    "empty weights": (WEIGHTS, lambda f: f.write_bytes(b""), "damaged"),
    "page instead of weights": (WEIGHTS, lambda f: f.write_text("<html>not found</html>"), "damaged"),
    "missing shard": (WEIGHTS, shard, "has no part-2-of-2.safetensors"),
    "no vae configuration": ("vae/config.json", Path.unlink, "'vae' has no config.json"),
    "empty configuration": ("transformer/config.json", lambda f: f.write_text("{}"), "config.json is damaged.*missing"),
    "another family": ("model_index.json", rename_network, "FluxTransformer2DModel.*model.family=sd3"),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_an_incomplete_model_folder_is_refused_in_one_line(tiny_model: Path, tmp_path: Path, damage: str) -> None:
    name, break_it, message = DAMAGES[damage]
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    pretrained(folder)
    break_it(folder / name)
    with pytest.raises(UserError, match=message) as caught:
        pretrained(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def swap_tokenizers(folder: Path) -> None:
    """CLIP's files where T5's belong."""
    shutil.rmtree(folder / "tokenizer_3")
    shutil.copytree(folder / "tokenizer", folder / "tokenizer_3")


def more_entries(folder: Path) -> None:
    edit(folder, "text_encoder_3/config.json", vocab_size=3)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [(swap_tokenizers, "'tokenizer_3' cannot be read as T5"), (more_entries, "'tokenizer_3' has .* encoder knows 3")],
)
def test_another_model_s_tokenizer_is_refused_before_weights(
    tiny_model: Path, tmp_path: Path, break_it: Callable[[Path], None], message: str
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    break_it(folder)
    model = pretrained(folder)
    with pytest.raises(UserError, match=message) as caught:
        model.network()
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def edit(folder: Path, file: str, **values: Any) -> Path:
    """Change entries of a JSON file of a pipeline."""
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    names = ("sd3", "flux", "sdxl", "wan", "sana", "qwen_image", "flux2_klein", "z_image", "chroma")
    return {n: families.save(n, tmp_path_factory.mktemp(n) / n) for n in names}


INDEX = "model_index.json"
VARIANTS: dict[str, tuple[str, str, dict[str, Any], list[str]]] = {
    "SD 1.5": ("sdxl", INDEX, {"_class_name": "StableDiffusionPipeline"}, ["StableDiffusionXLPipeline"]),
    "SDXL refiner": ("sdxl", INDEX, {"_class_name": "StableDiffusionXLImg2ImgPipeline"}, ["XLImg2ImgPipeline"]),
    "SDXL inpainting": ("sdxl", INDEX, {"_class_name": "StableDiffusionXLInpaintPipeline"}, ["XLInpaintPipeline"]),
    "SDXL inpainting network": ("sdxl", "unet/config.json", {"in_channels": 9}, ["9 channels", "makes 4"]),
    "SD3 ControlNet": ("sd3", INDEX, {"_class_name": "StableDiffusion3ControlNetPipeline"}, ["3ControlNetPipeline"]),
    "SD3 with a ControlNet": ("sd3", INDEX, {"controlnet": ["diffusers", "SD3ControlNetModel"]}, ["controlnet"]),
    "FLUX Fill": ("flux", INDEX, {"_class_name": "FluxFillPipeline"}, ["FluxFillPipeline"]),
    "FLUX Fill network": ("flux", "transformer/config.json", {"in_channels": 96}, ["24 channels", "makes 4"]),
    "FLUX Kontext": ("flux", INDEX, {"_class_name": "FluxKontextPipeline"}, ["FluxKontextPipeline"]),
    "Wan I2V": ("wan", INDEX, {"_class_name": "WanImageToVideoPipeline"}, ["WanImageToVideoPipeline"]),
    "Wan I2V network": ("wan", "transformer/config.json", {"in_channels": 36}, ["36 channels", "makes 16"]),
    "Wan2.2": ("wan", INDEX, {"transformer_2": ["diffusers", "WanTransformer3DModel"]}, ["transformer_2"]),
    "Wan2.2 without its second expert": ("wan", INDEX, {"boundary_ratio": 0.875}, ["boundary_ratio"]),
    "SANA Sprint": ("sana", INDEX, {"_class_name": "SanaSprintPipeline"}, ["SanaSprintPipeline"]),
    "Qwen-Image-Edit": ("qwen_image", INDEX, {"_class_name": "QwenImageEditPipeline"}, ["QwenImageEditPipeline"]),
    "Qwen-Image-Edit-2511": ("qwen_image", "transformer/config.json", {"zero_cond_t": True}, ["zero_cond_t"]),
    "Qwen-Image-Layered": ("qwen_image", "transformer/config.json", {"use_layer3d_rope": True}, ["use_layer3d_rope"]),
    "Qwen-Image with another time": (
        "qwen_image",
        "transformer/config.json",
        {"use_additional_t_cond": True},
        ["use_additional_t_cond"],
    ),
    "Qwen-Image that is fed guidance": (
        "qwen_image",
        "transformer/config.json",
        {"guidance_embeds": True},
        ["guidance_e"],
    ),
    "Qwen-Image-2.1": (
        "qwen_image",
        INDEX,
        {"transformer": ("diffusers", "QwenImage21Transformer2DModel")},
        ["QwenImage21Transformer2DModel", "QwenImageTransformer2DModel"],
    ),
    "FLUX.2 klein for few steps": ("flux2_klein", INDEX, {"is_distilled": True}, ["distilled to few steps already"]),
    "Z-Image Omni": ("z_image", INDEX, {"_class_name": "ZImageOmniPipeline"}, ["ZImageOmniPipeline"]),
    "no class": ("sana", INDEX, {"_class_name": None}, ["SanaPipeline"]),
}


if not hasattr(diffusers, "QwenImage21Transformer2DModel"):  # older diffusers refuse it as a class they do not have
    del VARIANTS["Qwen-Image-2.1"]


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_variants_for_other_tasks_are_refused(pipelines: dict[str, Path], tmp_path: Path, variant: str) -> None:
    family, file, values, words = VARIANTS[variant]
    folder = shutil.copytree(pipelines[family], tmp_path / "copy")
    for name, entry in values.items():
        if isinstance(entry, list):
            shutil.copytree(folder / "transformer", folder / name)
    edit(folder, file, **values)
    with pytest.raises(UserError) as caught:
        families.pretrained(family, folder)
    for word in (*words, f"model.family={family}", str(folder)):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "pipeline"),
    [
        ("sd3", "StableDiffusion3Img2ImgPipeline"),
        ("flux", "FluxImg2ImgPipeline"),
        ("sdxl", "StableDiffusionXLPAGPipeline"),
        ("wan", "WanVideoToVideoPipeline"),
        ("sana", "SanaPAGPipeline"),
        ("qwen_image", "QwenImageImg2ImgPipeline"),
        ("flux2_klein", "Flux2KleinInpaintPipeline"),
        ("z_image", "ZImageImg2ImgPipeline"),
        ("chroma", "ChromaInpaintPipeline"),
    ],
)
def test_other_pipelines_of_the_same_weights_are_taken(
    pipelines: dict[str, Path], tmp_path: Path, family: str, pipeline: str
) -> None:
    folder = edit(shutil.copytree(pipelines[family], tmp_path / "copy"), INDEX, _class_name=pipeline)
    model = families.pretrained(family, folder)
    assert type(model.pipeline()).__name__ == model.backbone_class.pipeline_type


def test_flux_without_embedded_guidance_needs_no_scale(pipelines: dict[str, Path], tmp_path: Path) -> None:
    """FLUX.1-schnell: the setting is not asked for, and ignored where it is given."""
    with pytest.raises(UserError, match=r"model\.embedded_guidance is null"):
        families.pretrained("flux", pipelines["flux"], embedded_guidance=None)
    folder = edit(
        shutil.copytree(pipelines["flux"], tmp_path / "copy"), "transformer/config.json", guidance_embeds=False
    )
    for scale in (None, 4.5):
        assert families.pretrained("flux", folder, embedded_guidance=scale).limits.channels == 4


def test_a_scale_that_is_not_fed_is_said(pipelines: dict[str, Path]) -> None:
    """A network that could be fed one says in its configuration that it is not; others never are."""
    with pytest.warns(UserWarning, match=r"model\.embedded_guidance=4\.0 has no effect: .*guidance_embeds"):
        families.pretrained("flux2_klein", pipelines["flux2_klein"], embedded_guidance=4.0)
    with pytest.raises(UserError, match=r"model\.embedded_guidance=4\.0 has no effect: .*; make it null") as caught:
        families.pretrained("sd3", pipelines["sd3"], embedded_guidance=4.0)
    assert "\n" not in str(caught.value)


def test_a_negative_prompt_is_refused_where_the_pipeline_takes_none(pipelines: dict[str, Path]) -> None:
    with pytest.raises(
        UserError, match="Flux2KleinPipeline takes none, and guides away from the empty prompt"
    ) as caught:
        families.pretrained("flux2_klein", pipelines["flux2_klein"], negative_prompt="a blue ring")
    assert "\n" not in str(caught.value)
    assert families.pretrained("sana", pipelines["sana"], negative_prompt="a blue ring").negative_prompt


def test_one_rule_gives_sizes_in_pixels_before_and_after_loading(pipelines: dict[str, Path]) -> None:
    """Against the stock pipelines' own factors."""
    for family, folder in pipelines.items():
        model = families.pretrained(family, folder)
        encoders = model.encoders()
        video = family == "wan"
        side = getattr(encoders.pipeline, "vae_scale_factor_spatial" if video else "vae_scale_factor")
        size = (3, 4, 6) if video else (4, 6)
        frames = (2 * encoders.pipeline.vae_scale_factor_temporal + 1,) if video else ()
        expected = (*frames, 4 * side, 6 * side)
        assert model.factor == side and model.pixel_size(size) == encoders.pixel_size(size) == expected, family


def test_the_meta_network_is_built_once_and_has_the_shapes_of_the_real_one(tiny_model: Path) -> None:
    model = pretrained(tiny_model)
    meta = dict(model.meta_network.named_parameters())
    assert model.meta_network is model.meta_network and all(p.is_meta for p in meta.values())
    real = dict(model.network().network.named_parameters())
    assert {k: p.shape for k, p in meta.items()} == {k: p.shape for k, p in real.items()}


@pytest.mark.parametrize("values", [{"quantization": "int4"}, {"quantization": "fp8", "tuning": "full"}])
def test_impossible_quantization_is_refused(tiny_model: Path, values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"model\.quantization.*use (int8, fp8 or null|tuning=lora)"):
        pretrained(tiny_model, **values)


HTTP: Any = importlib.import_module(
    next(name for c in errors.HfHubHTTPError.__mro__ if (name := c.__module__.partition(".")[0]) in hub.HTTP_LIBRARIES)
)
"""The HTTP library of the installed huggingface_hub; should a release change it, its errors would be tracebacks."""


def answer(monkeypatch: pytest.MonkeyPatch, error: Exception) -> str:
    """The message that a user reads when the hub's client raises `error`."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(UserError) as caught:
        pretrained("some/model")
    assert "\n" not in str(caught.value) and "model.path=some/model" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT])
def test_a_full_disk_is_told_as_what_it_is(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    message = answer(monkeypatch, OSError(number, os.strerror(number), "/cache/blob"))
    assert f"/cache/blob: {os.strerror(number)}" in message and "HF_HOME" in message
    assert "cannot be reached" not in message


@pytest.mark.parametrize(
    "error",
    [
        HTTP.ConnectError("no route\nto host"),
        HTTP.ProxyError("proxy"),
        HTTP.ReadTimeout("slow"),
        ConnectionResetError(errno.ECONNRESET, "reset"),
        TimeoutError(errno.ETIMEDOUT, "slow"),
        OSError(errno.ENETUNREACH, "unreachable"),
        errors.OfflineModeIsEnabled("offline"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_connections_that_fail_are_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    assert "the hub cannot be reached; download it" in answer(monkeypatch, error)


def test_a_name_that_the_hub_does_not_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no name that the hub allows" in answer(monkeypatch, errors.HFValidationError("a--b"))


def test_errors_of_the_program_itself_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(hub, "snapshot_download", broken)
    with pytest.raises(ZeroDivisionError):
        pretrained("some/model")


def test_whole_weights_are_whole(tiny_model: Path) -> None:
    files = list(tiny_model.glob("*/*.safetensors"))
    assert len(files) == 5 and all(map(is_whole_file, files))


def test_missing_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        pretrained(tmp_path / "nowhere")
    with pytest.raises(UserError, match="does not ship"):
        resolve_asset("swd://assets/nothing")


@pytest.mark.parametrize(
    "values", [{"rank": 0}, {"rank": -4}, {"alpha": 0.0}, {"alpha": -1.0}, {"alpha": float("nan")}]
)
def test_impossible_adapters_are_refused(tiny_model: Path, values: dict[str, Any]) -> None:
    key = next(iter(values))
    with pytest.raises(UserError, match=rf"model\.{key}="):
        pretrained(tiny_model, **values)


def test_targets_are_the_familys_unless_they_are_named(tiny_model: Path) -> None:
    assert pretrained(tiny_model).targets == TARGETS
    assert pretrained(tiny_model, targets=["to_q"]).targets == ("to_q",)
    assert load_family("sana").targets == ("to_q", "to_k", "to_v", "to_out.0")
    assert load_family("z_image").targets == ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3")


def test_targets_that_adapt_little_are_said(tiny_model: Path) -> None:
    model = pretrained(tiny_model)
    weights = {k: m.weight.numel() for k, m in model.meta_network.named_modules() if isinstance(m, torch.nn.Linear)}
    assert covered_share(model.meta_network, ["proj_out"]) == weights["proj_out"] / sum(weights.values())
    assert covered_share(model.meta_network, list(weights)) == 1.0
    few = pretrained(tiny_model, targets=("proj_out",))
    with pytest.warns(UserWarning, match=r"^model\.targets=\['proj_out'\] adapt \d\.\d% of the weights in this"):
        few.check_targets()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pretrained(tiny_model).check_targets()
        pretrained(tiny_model, targets=("proj_out",), tuning="full").check_targets()


def test_unknown_targets_are_refused_without_loading(tiny_model: Path) -> None:
    with pytest.raises(UserError, match="to_qq"):
        pretrained(tiny_model, targets=("to_q", "to_qq")).check_targets()


def test_a_name_that_is_a_list_of_modules_elsewhere_becomes_the_paths_of_the_layers() -> None:
    """Peft adapts the last layers of FLUX.2's single-stream blocks so, `to_out`, and refuses that name."""
    block = nn.ModuleDict({"to_q": nn.Linear(2, 2), "to_out": nn.ModuleList([nn.Linear(2, 2), nn.Dropout()])})
    single = nn.ModuleDict({"to_q": nn.Linear(2, 2), "to_out": nn.Linear(2, 2)})
    network = nn.ModuleDict({"blocks": nn.ModuleList([block]), "singles": nn.ModuleList([single])})
    assert names_for_peft(network, ["to_q", "to_out.0", "to_out"]) == ["to_q", "to_out.0", "singles.0.to_out"]


@pytest.mark.parametrize(
    ("layer", "target", "expected"),
    [
        ("a.to_q", "to_q", True),
        ("a.to_q", "a.to_q", True),
        ("to_q", "to_q", True),
        ("a.add_to_q", "to_q", False),
        ("a.to_q.b", "to_q", False),
        ("a.b.to_out.0", "to_out.0", True),
        ("a.b.to_out.0", "a.b", False),
    ],
)
def test_targets_are_paths_or_their_ends(layer: str, target: str, expected: bool) -> None:
    assert is_target(layer, [target]) is is_target(layer, ("x", target)) is expected
    assert not is_target(layer, [])


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("upcast", [True, False])
def test_the_vae_s_precision(base: torch.dtype, kept: bool, upcast: bool) -> None:
    config = {"force_upcast": upcast}
    assert SD3Encoders.vae_precision(config, base, kept) == (torch.float32 if kept and upcast else base)
    assert SD3Encoders.vae_precision({}, base, kept) == base
    assert SDXLEncoders.vae_precision(config, base, kept) == torch.float32


@pytest.mark.parametrize("given", [None, "fp32", "bf16"])
def test_the_vae_s_precision_may_be_set(tiny_model: Path, given: Any) -> None:
    model = Pretrained("sd3", str(tiny_model), size=8, precision="bf16", vae_precision=given)
    expected = torch.bfloat16 if given == "bf16" else torch.float32  # this VAE's configuration asks for float32
    encoders = model.encoders()
    assert encoders.vae.dtype == expected and model.vae_dtype(torch.bfloat16, kept=True) == expected
    assert all(part.dtype == torch.bfloat16 for part in encoders.text_models)
    assert encoders.distribution(torch.zeros(1, 3, 64, 64))[0].dtype == torch.float32


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_base_has_the_precision_asked_for(tiny_model: Path, precision: str, dtype: torch.dtype) -> None:
    networks = pretrained(tiny_model, precision=precision).networks(("student",))
    assert networks.backbone.dtype == dtype


def test_prompts_are_encoded_as_the_stock_pipeline_does(tiny_model: Path) -> None:
    model = pretrained(tiny_model, max_text_tokens=12)
    encoders, pipe = model.encoders(), model.pipeline()
    prompts = ["a red star", "a green heart", "a red star"]
    with torch.no_grad():
        embeds, empty, pooled, empty_pooled = pipe.encode_prompt(prompts[:2], None, None, max_sequence_length=12)
    actual = encoders.encode_prompts(prompts)
    assert torch.equal(actual.embeds, embeds[[0, 1, 0]]) and torch.equal(actual.pooled, pooled[[0, 1, 0]])
    assert actual.embeds.shape[1] == 24 + 12, "CLIP's tokens and T5's"
    nothing = encoders.encode_prompts([""])
    torch.testing.assert_close(nothing.embeds, empty[:1])
    torch.testing.assert_close(nothing.pooled, empty_pooled[:1])


def test_encoding_does_not_depend_on_what_was_encoded_before(tiny_model: Path) -> None:
    a, b = pretrained(tiny_model).encoders(), pretrained(tiny_model).encoders()
    prompts = [f"a {colour} star" for colour in ("red", "green", "blue", "pink", "cyan")]
    for prompt in prompts[:4]:
        a.encode_prompts([prompt])
    for field in ("embeds", "pooled"):
        assert torch.equal(getattr(a.encode_prompts(prompts), field), getattr(b.encode_prompts(prompts), field))


def test_latents_are_a_shifted_and_scaled_draw_of_the_posterior(tiny_model: Path) -> None:
    encoders = pretrained(tiny_model).encoders()
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    eps = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))

    class Stored:
        def noise(self, purpose: str, like: torch.Tensor) -> torch.Tensor:
            assert purpose == "posterior/(4, 4)" and like.shape == eps.shape
            return eps

    with torch.no_grad():
        posterior = encoders.vae.encode(pixels).latent_dist
        expected = (posterior.mean + posterior.std * eps - 0.1) * 1.7
        torch.testing.assert_close(encoders.encode(pixels, Stored()), expected)
        decoded = encoders.vae.decode(expected / 1.7 + 0.1).sample.clamp(-1, 1)
        torch.testing.assert_close(encoders.decode(expected), decoded)
    assert encoders.pixel_size((4, 6)) == (32, 48)
    assert not any(p.requires_grad for p in encoders.parameters())


def test_weights_of_another_configuration_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "copy")
    file = folder / "transformer" / "config.json"
    config = json.loads(file.read_text())
    for key, value, message in (
        ("num_layers", config["num_layers"] + 1, "transformer_blocks"),
        ("joint_attention_dim", config["joint_attention_dim"] + 8, r"\(\d+, \d+\) against \(\d+, \d+\)"),
    ):
        file.write_text(json.dumps(config | {key: value}))
        with pytest.raises(UserError, match=rf"'transformer' has weights of another configuration: .*{message}"):
            pretrained(folder).network()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (7.0, 4.5)),
        ({"dmd_guidance_scale": 2.0}, (2.0, 4.5)),
        ({"drawing_guidance_scale": 2}, (7.0, 2.0)),
        ({"guidance_scale": 3.0}, (3.0, 3.0)),  # of a run of an earlier version
        ({"guidance_scale": 3.0, "drawing_guidance_scale": 5.0}, (3.0, 5.0)),
        ({"guidance_scale": 3.0, "dmd_guidance_scale": 5.0}, (5.0, 3.0)),
        ({"guidance_scale": 0.5}, (0.5, 1.0)),
    ],
)
def test_two_guidance_scales_or_one_for_both(given: dict[str, float], expected: tuple[float, float]) -> None:
    model = Pretrained("sd3", "swd://assets/shapes-sd3", **given)  # type: ignore[arg-type]
    assert (model.dmd_guidance_scale, model.drawing_guidance_scale) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dmd_guidance_scale": -1.0}, r"model\.dmd_guidance_scale=-1\.0"),
        ({"dmd_guidance_scale": float("nan")}, r"model\.dmd_guidance_scale=nan"),
        ({"drawing_guidance_scale": 0.5}, r"model\.drawing_guidance_scale=0\.5; use 1 to 100, 1 for none"),
        ({"drawing_guidance_scale": float("inf")}, r"model\.drawing_guidance_scale=inf"),
        ({"guidance_scale": float("nan")}, r"model\.guidance_scale=nan"),
        ({"embedded_guidance": float("inf")}, r"model\.embedded_guidance=inf"),
        (
            {"guidance_scale": 3.0, "dmd_guidance_scale": 7.0, "drawing_guidance_scale": 4.5},
            r"model\.guidance_scale=3\.0 is two keys now",
        ),
    ],
)
def test_a_guidance_that_means_nothing_is_refused(given: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Pretrained("sd3", "swd://assets/shapes-sd3", **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["swd://../../x", "swd:///etc", "swd://assets/../../x"])
def test_an_asset_that_leads_out_of_the_installation_is_refused(path: str) -> None:
    with pytest.raises(UserError, match="leads out of the installation"):
        resolve_asset(path)
