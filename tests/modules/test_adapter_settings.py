"""Settings and keys of other people's adapters: understood as peft understands them, or refused by name."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import families
import peft
import pytest
import tiny
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from swd.export import student_folder
from swd.io.files import CHECKSUMS
from swd.modules import adapters
from swd.modules.adapter_settings import Pattern, read_settings
from swd.modules.adapters import Adapter, check_model, load
from swd.modules.pretrained import Pretrained
from swd.types import UserError

TARGETS = ["to_q", "to_k", "net.2"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    return families.pretrained("sd3", families.save("sd3", tmp_path_factory.mktemp("base") / "sd3"))


def published(model: Pretrained, folder: Path, **config: Any) -> Path:
    """An adapter that peft itself made, trained a little and wrote."""
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 4, "target_modules": TARGETS} | config
    network = get_peft_model(model.network().network, LoraConfig(**options))
    for key, parameter in network.named_parameters():
        if ".lora_" in key:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    network.save_pretrained(folder)
    return folder


def merged(model: Pretrained, folder: Path) -> dict[str, Tensor]:
    """Weights of the network that peft makes of base and adapter."""
    network: Any = PeftModel.from_pretrained(model.network().network, folder).merge_and_unload()
    return dict(network.named_parameters())


def updates(adapter: Adapter) -> dict[str, Tensor]:
    return {m: adapter.state[f"{m}.lora_B.weight"] @ adapter.state[f"{m}.lora_A.weight"] for m in adapter.modules}


UNDERSTOOD: dict[str, dict[str, Any]] = {
    "plain": {},
    "alpha": {"lora_alpha": 11},
    "rslora": {"lora_alpha": 6, "use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "no initialization": {"init_lora_weights": False},
    "dropout": {"lora_dropout": 0.3},
    "by name": {"alpha_pattern": {"to_q": 2}, "rank_pattern": {"net.2": 2}},
    "by place": {"alpha_pattern": {"^transformer_blocks.1.attn.to_q": 2, r"transformer_blocks\.0\..*": 1}},
    "by alternatives": {"alpha_pattern": {r"attn\.(to_q|to_k)$": 3, r".*\d\.ff.net.2": 9}},
    "the first one counts": {"alpha_pattern": {".*to_q": 3, "transformer_blocks.0.attn.to_q": 9}},
    "targets by a pattern": {"target_modules": r"transformer_blocks\.\d+\.attn\.(to_q|to_v)"},
    "excluded": {"exclude_modules": ["transformer_blocks.0.attn.to_q"]},
    "layers": {"layers_to_transform": [0, 2], "layers_pattern": "transformer_blocks"},
}
if Version(peft.__version__) < Version("0.21"):  # which look for layers below another module alone
    del UNDERSTOOD["layers"]


@pytest.mark.parametrize("case", list(UNDERSTOOD))
def test_what_is_taken_means_what_peft_makes_of_it(case: str, base: Pretrained, tmp_path: Path) -> None:
    folder = published(base, tmp_path / "a", **UNDERSTOOD[case])
    adapter = load(folder)
    check_model(adapter, base)
    before, after = dict(base.network().network.named_parameters()), merged(base, folder)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert sorted(changed) == [f"{module}.weight" for module in adapter.modules]
    for module, update in updates(adapter).items():
        assert_close(before[f"{module}.weight"] + update, after[f"{module}.weight"], rtol=1e-4, atol=1e-5)


REFUSED: dict[str, Any] = {
    "init_lora_weights": ["pissa", "pissa_niter_7", "olora", "loftq", "corda", "eva", "lora_ga", "mica", "future"],
    "use_dora": [True],
    "use_qalora": [True],
    "lora_bias": [True],
    "bias": ["all", "lora_only"],
    "modules_to_save": [["proj_out"]],
    "trainable_token_indices": [[1, 2], {"embed": [3]}],
    "target_parameters": [["proj_out.weight"]],
    "layer_replication": [[[0, 2], [1, 3]]],
    "megatron_config": [{"x": 1}],
    "megatron_core": ["os.path"],
    "fan_in_fan_out": [True],
    "alora_invocation_tokens": [[1]],
    "velora_config": [{"rank": 1}],
    "peft_type": ["LOHA", "ADALORA", "VERA", 3],
    "a_setting_of_next_year": [True, 0.5, "on", {"gain": 2}, 1],
}


@pytest.mark.parametrize("layout", ["peft", "diffusers"])
@pytest.mark.parametrize("key", list(REFUSED))
def test_other_settings_are_refused_by_name_and_value(key: str, layout: str, tmp_path: Path) -> None:
    weights = {"q.lora_A.weight": torch.ones(2, 3), "q.lora_B.weight": torch.ones(3, 2)}
    for number, value in enumerate(REFUSED[key]):
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"], key: value}
        path = write(tmp_path / str(number), layout, weights, config)
        with pytest.raises(UserError) as caught:
            load(path)
        message = str(caught.value)
        assert str(path) in message and "\n" not in message
        assert (key in message and repr(value) in message) or (key in ("use_dora", "peft_type") and "is " in message)


def write(path: Path, layout: str, weights: dict[str, Tensor], config: dict[str, Any]) -> Path:
    path.mkdir(parents=True)
    if layout == "peft":
        save_file({f"base_model.model.{k}": v for k, v in weights.items()}, path / adapters.PEFT_WEIGHTS)
        (path / adapters.PEFT_CONFIG).write_text(json.dumps(config))
        return path
    stored = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in config.items()})}
    save_file({f"transformer.{k}": v for k, v in weights.items()}, path / "lora.safetensors", stored)
    return path / "lora.safetensors"


DAMAGED: dict[str, list[Any]] = {
    "lora_alpha": ["x", None, float("nan"), float("inf"), -1, 0, True, [1], 10**400],
    "r": ["x", None, 0, -4, True, 2.5, 3],
    "alpha_pattern": [[1], "x", {"(": 1}, {"q": "x"}, {"q": None}, {"q": float("nan")}, {"q": -3}, {"q": {}}],
    "rank_pattern": [3, {"q": 1.5}, {"q": True}, {"q": 7}, {"*": 2}, {"[a": 2}],
    "target_modules": [3, {"q": 1}, [1], ["k"], "(", "(a+)+$"],
    "exclude_modules": [3, ["q"], ".*q"],
    "layers_to_transform": ["x", [True], {"a": 1}, [5]],
}


@pytest.mark.parametrize("layout", ["peft", "diffusers"])
@pytest.mark.parametrize("key", list(DAMAGED))
def test_damaged_settings_are_one_line(key: str, layout: str, tmp_path: Path) -> None:
    weights = {"b.0.q.lora_A.weight": torch.ones(2, 3), "b.0.q.lora_B.weight": torch.ones(3, 2)}
    for number, value in enumerate(DAMAGED[key]):
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"], key: value}
        path = write(tmp_path / str(number), layout, weights, config)
        with pytest.raises(UserError) as caught:
            load(path)
        assert key in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_deep_json_is_one_line(tmp_path: Path) -> None:
    weights = {"q.lora_A.weight": torch.ones(2, 3), "q.lora_B.weight": torch.ones(3, 2)}
    folder = write(tmp_path / "a", "peft", weights, {})
    (folder / adapters.PEFT_CONFIG).write_text('{"a":' + "[" * 100_000)
    with pytest.raises(UserError, match=r"adapter_config\.json is damaged"):
        load(folder)
    save_file(
        {f"unet.{k}": v for k, v in weights.items()},
        tmp_path / "b.safetensors",
        {"lora_adapter_metadata": '{"a":' + "[" * 100_000},
    )
    with pytest.raises(UserError, match="damaged metadata"):
        load(tmp_path / "b.safetensors")


# Patterns


NAMES = [
    "proj_out",
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.10.attn.to_q",
    "transformer_blocks.1.attn.to_out.0",
    "transformer_blocks.0.ff.net.0.proj",
    "single_transformer_blocks.7.proj_out",
    "a-b.to_q",
]
PATTERNS = [
    "to_q",
    ".to_q",
    "attn.to_q",
    "attnXto_q",
    "^proj_out",
    "proj_out$",
    "^transformer_blocks.0.attn.to_q$",
    "transformer_blocks.1.attn.to_q",
    r"transformer_blocks\.1.*",
    ".*",
    ".+0.*proj",
    r"blocks\.\d+\.attn\.to_q",
    r"transformer_blocks\.[0-9]+\.attn\.(to_q|to_out\.0)",
    "(?:to_q|proj_out)",
    "to_q|proj_out",
    "^a-b.to_q|^proj_out",
    "((single_)|())transformer_blocks.7.proj_out",
    "to_.?q",
    ".*?to_q",
    "",
]


def test_patterns_fit_the_names_that_peft_fits_and_no_others() -> None:
    for text in PATTERNS:
        pattern = Pattern.read(text)
        assert pattern is not None, text
        for name in NAMES:
            assert pattern.fits_end(name) == (get_pattern_key([text], name) != name or text == name), (text, name)
            assert pattern.fits_whole(name) == bool(re.fullmatch(text, name)), (text, name)


@pytest.mark.parametrize(
    "text",
    [
        "(a+)+!",
        "(([a-z_0-9.]+)+)+!",
        "(.*)*x",
        "(a|a)*b",
        ".*.*.*.*.*.*.*.*x",
        "a{1000}{1000}",
        r"(x)\1",
        "(?=a)",
        "(?P<n>a)",
        "[^a]+",
        r"\w+",
        "a*",
        "a^b",
        "a$b",
        "(",
        ")",
        "*",
        "\\",
        "|".join("(a|b)" * 11 for _ in range(1)),
        "(" * 20 + "a" + ")" * 20,
        "é",
    ],
)
def test_patterns_that_could_run_without_end_or_mean_more_are_never_run(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Pattern.read(text) is None
    weights = {"q.lora_A.weight": torch.ones(2, 3), "q.lora_B.weight": torch.ones(3, 2)}
    compiled: list[Any] = []
    for name in ("match", "fullmatch", "search", "compile", "sub"):
        function = getattr(re, name)
        monkeypatch.setattr(re, name, lambda p, *a, f=function, **k: compiled.append(p) or f(p, *a, **k))
    for number, key in enumerate(("alpha_pattern", "rank_pattern", "target_modules", "exclude_modules")):
        config = {"r": 2, "lora_alpha": 2, key: {text: 2} if "pattern" in key else text}
        for layout in ("peft", "diffusers"):
            with pytest.raises(UserError, match=key):
                load(write(tmp_path / f"{number}{layout}", layout, weights, config))
    assert not any(text in str(pattern) for pattern in compiled if len(text) > 2)


def test_many_patterns_are_bounded() -> None:
    names = {f"block.{i}.to_q": 2 for i in range(1024)}
    settings = read_settings({"r": 4, "alpha_pattern": names}, "adapter x")
    assert settings.scale("block.1023.to_q", 4) == 2 / 4
    for many in ({f"b{i}": 2 for i in range(1025)}, {f".*b{i}": 2 for i in range(65)}):
        with pytest.raises(UserError, match="at most"):
            read_settings({"alpha_pattern": many}, "adapter x")


# Keys and weights


def lora(**more: Tensor) -> dict[str, Tensor]:
    weights = {"transformer.q.lora_A.weight": torch.ones(2, 3), "transformer.q.lora_B.weight": torch.ones(3, 2)}
    return weights | {key.replace("__", "."): value for key, value in more.items()}


KEYS = {
    "transformer.k.lokr_w1": "LoKr",
    "transformer.k.hada_w1_a": "LoHa",
    "transformer.k.dora_scale": "DoRA",
    "transformer.q.lora_magnitude_vector": "DoRA",
    "transformer.q.lora_B.bias": "bias of a LoRA",
    "transformer.q.diff": "trained whole",
    "transformer.q.diff_b": "bias",
    "transformer.norm1.weight": "normalization",
    "transformer.q.lora_mid.weight": "LoCon",
    "transformer.q.oft_blocks": "OFT",
    "transformer.q.lora_embedding_A": "embedding",
    "transformer.proj_out.weight": "trained whole",
    "text_encoder.layers.0.q_proj.lora_A.weight": "text encoder",
    "text_encoder_2.layers.0.q_proj.lora_B.weight": "text encoder",
    "lora_te_text_model_encoder_layers_0_q.lora_down.weight": "text encoder",
    "lora_te2_text_model_encoder_layers_0_q.alpha": "text encoder",
    "something": "no LoRA weight",
    "transformer.v.alpha": "no LoRA weights",
    "transformer.v.lora_A.weight": "only one of lora_A and lora_B",
    "q.lora_A.weight": "two keys",
    "transformer.q.lora_down.weight": "two keys",
}


@pytest.mark.parametrize("key", list(KEYS))
def test_every_key_is_used_or_refused_by_name(key: str, tmp_path: Path) -> None:
    save_file(lora(**{key: torch.tensor(2.0) if "alpha" in key else torch.ones(2, 3)}), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=KEYS[key]) as caught:
        load(tmp_path / "a.safetensors")
    named = key.removeprefix("transformer.").removesuffix(".alpha").removesuffix(".lora_A.weight")
    assert named in str(caught.value) and "a.safetensors" in str(caught.value) and "\n" not in str(caught.value)


WEIGHTS: dict[str, dict[str, Tensor]] = {
    "NaN": {"transformer.q.lora_A.weight": torch.tensor([[1.0, float("nan"), 1], [1, 1, 1]])},
    "infinite in half precision": {"transformer.q.lora_B.weight": torch.full((3, 2), 7e4).half()},
    "too large": {"transformer.q.lora_B.weight": torch.full((3, 2), 3e38), "transformer.q.alpha": torch.tensor(4e8)},
    "vector": {"transformer.q.lora_A.weight": torch.ones(3)},
    "no rank": {"transformer.q.lora_A.weight": torch.ones(0, 3), "transformer.q.lora_B.weight": torch.ones(3, 0)},
    "other ranks": {"transformer.q.lora_A.weight": torch.ones(4, 3)},
    "other axes": {"transformer.q.lora_B.weight": torch.ones(3, 2, 1, 1)},
    "a kernel in lora_B": {
        "transformer.q.lora_A.weight": torch.ones(2, 3, 3, 3),
        "transformer.q.lora_B.weight": torch.ones(3, 2, 3, 3),
    },
    "integers": {"transformer.q.lora_A.weight": torch.ones(2, 3, dtype=torch.int8)},
    "alpha NaN": {"transformer.q.alpha": torch.tensor(float("nan"))},
    "alpha of zero": {"transformer.q.alpha": torch.tensor(0.0)},
    "alpha by channel": {"transformer.q.alpha": torch.ones(3)},
}


@pytest.mark.parametrize("case", list(WEIGHTS))
def test_damaged_weights_are_refused_by_name(case: str, tmp_path: Path) -> None:
    save_file(lora(**WEIGHTS[case]), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"\bq\b") as caught:
        load(tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value)


def test_alpha_said_twice_and_settings_of_other_parts_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file(
        lora(transformer__q__alpha=torch.tensor(4.0)),
        file,
        {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 4})},
    )
    with pytest.raises(UserError, match="alpha twice"):
        load(file)
    save_file(lora(), file, {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "text_encoder.r": 4})})
    with pytest.raises(UserError, match="more than the denoising network"):
        load(file)


def test_peft_s_file_is_read_with_its_settings_or_not_at_all(base: Pretrained, tmp_path: Path) -> None:
    """Named as a file, it would else lose its alpha."""
    folder = published(base, tmp_path / "a", lora_alpha=20)
    named, whole = load(folder / adapters.PEFT_WEIGHTS).state, load(folder).state
    assert all(torch.equal(named[key], value) for key, value in whole.items())
    (folder / adapters.PEFT_CONFIG).unlink()
    with pytest.raises(UserError, match=r"no adapter_config\.json beside it"):
        load(folder / adapters.PEFT_WEIGHTS)


def test_diffusers_metadata_means_what_diffusers_makes_of_it(base: Pretrained, tmp_path: Path) -> None:
    """Scaled by the root of the rank, and by module, in the file that diffusers itself writes."""
    torch.manual_seed(0)
    network: Any = base.network().network
    before = {name: value.clone() for name, value in network.named_parameters()}
    options = {"lora_alpha": 6, "use_rslora": True, "alpha_pattern": {"to_q": 3}}
    network.add_adapter(LoraConfig(r=4, target_modules=TARGETS, **options))
    for key, parameter in network.named_parameters():
        if ".lora_" in key:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape))
    network.save_lora_adapter(tmp_path)
    network.fuse_lora()
    adapter = load(tmp_path / adapters.DIFFUSERS_WEIGHTS)
    for module, update in updates(adapter).items():
        fused = network.get_submodule(module).base_layer.weight
        assert_close(before[f"{module}.weight"] + update, fused, rtol=1e-4, atol=1e-5)
    schedule = tiny.build_schedule().scheduler(2)
    student_folder.export(load(tmp_path / adapters.DIFFUSERS_WEIGHTS), base, schedule, tmp_path / "out")


# Export looks at the file through other loaders


@pytest.mark.parametrize("kind", ["pissa", "olora"])
@pytest.mark.parametrize("layout", ["peft", "diffusers"])
def test_export_notices_a_setting_that_was_misread(
    kind: str, layout: str, base: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters that change the base, read as plain LoRA: peft and diffusers make something else of the file."""
    folder = published(base, tmp_path / "a", init_lora_weights=kind)
    with pytest.raises(UserError, match=f"init_lora_weights='{kind}'"):
        load(folder)
    file = folder / adapters.PEFT_CONFIG
    config = json.loads(file.read_text())
    if layout == "diffusers":
        weights = {k.removeprefix("base_model.model."): v for k, v in load_file(folder / adapters.PEFT_WEIGHTS).items()}
        folder = write(tmp_path / "b", "diffusers", weights, config)
    monkeypatch.setitem(adapters.read_settings.__globals__["ACCEPTED"], "init_lora_weights", (kind,))
    adapter, schedule = load(folder), tiny.build_schedule().scheduler(2)
    message = "peft differs from what peft makes" if layout == "peft" else "diffusers itself cannot load"
    with pytest.raises(UserError, match=f"export refused: .*{message}"):
        student_folder.export(adapter, base, schedule, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_notices_a_misread_scale_however_small_the_update(base: Pretrained, tmp_path: Path) -> None:
    folder = published(base, tmp_path / "a", lora_alpha=0.004)
    adapter, schedule = load(folder), tiny.build_schedule().scheduler(2)
    student_folder.export(adapter, base, schedule, tmp_path / "right")
    for name, factor in (("less", 0.9), ("nothing", 0.0)):
        state = {k: v * (factor if ".lora_B." in k else 1) for k, v in adapter.state.items()}
        with (
            warnings.catch_warnings(action="ignore"),
            pytest.raises(UserError, match="differs from what peft makes of"),
        ):
            student_folder.export(Adapter(state, adapter.source), base, schedule, tmp_path / name)


@pytest.mark.parametrize("family", ["sd3", "sdxl"])
def test_kohya_s_names_are_exported_as_before(family: str, tmp_path: Path) -> None:
    model = families.pretrained(family, families.save(family, tmp_path / "base"))
    part, generator = model.backbone_class.subfolder, torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for number, (name, layer) in enumerate(model.meta_network.named_modules()):
        if isinstance(layer, torch.nn.Linear) and name.endswith(("to_q", "net.2")):
            out, inner = layer.weight.shape
            tensors[f"{part}.{name}.lora_down.weight"] = torch.randn(4, inner, generator=generator)
            tensors[f"{part}.{name}.lora_up.weight"] = torch.randn(out, 4, generator=generator)
            tensors[f"{part}.{name}.alpha"] = torch.tensor(1.0 + number % 3)
    save_file(tensors, tmp_path / "a.safetensors")
    process = model.backbone_class.process.prediction_type
    schedule = tiny.build_schedule().scheduler(2, process)
    made = load(student_folder.export(load(tmp_path / "a.safetensors"), model, schedule, tmp_path / "out"))
    for module, update in updates(made).items():
        a, b = (tensors[f"{part}.{module}.lora_{side}.weight"] for side in ("down", "up"))
        assert_close(update, b @ a * tensors[f"{part}.{module}.alpha"] / 4)


def test_a_file_that_its_own_library_cannot_load_is_one_line(base: Pretrained, tmp_path: Path) -> None:
    folder = published(base, tmp_path / "a")
    file = folder / adapters.PEFT_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {"task_type": "NOT_A_TASK"}))
    with pytest.raises(UserError, match="export refused: peft itself cannot load") as caught:
        student_folder.export(load(folder), base, tiny.build_schedule().scheduler(2), tmp_path / "out")
    assert "\n" not in str(caught.value)


# One flipped byte


def flip(file: Path, at: int = -5) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("kind", ["run", "export"])
@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "pytorch_lora_weights.safetensors", "adapter_config.json"]
)
def test_a_flipped_byte_is_noticed(kind: str, name: str, base: Pretrained, tmp_path: Path) -> None:
    state = base.networks(("student",)).adapter_state("student")  # type: ignore[attr-defined]
    schedule = tiny.build_schedule().scheduler(2)
    folder = adapters.save_adapter(tmp_path / "a", state, 4, 4, schedule, "base", "transformer")
    if kind == "export":
        with pytest.warns(UserWarning, match="update is zero"):
            folder = student_folder.export(load(folder), base, schedule, tmp_path / "out")
    path = folder / name if name == adapters.DIFFUSERS_WEIGHTS else folder
    load(path)
    if name == "adapter_config.json":
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace('"lora_alpha": 4', '"lora_alpha": 5'))
    else:
        flip(folder / name)
    with pytest.raises(UserError, match=f"{name} is not the file that was written"):
        load(path)
    (folder / CHECKSUMS).unlink()
    load(path)  # published and older folders have no record
    (folder / CHECKSUMS).write_text("[]")
    with pytest.raises(UserError, match=f"{CHECKSUMS} is damaged"):
        load(path)
