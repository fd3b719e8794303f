"""Adapter files, one rule at a time: where they are looked for, what is read of them, how they are written."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from swd.io.files import CHECKSUMS
from swd.modules import adapters, hub
from swd.modules.adapters import (
    DIFFUSERS_WEIGHTS,
    MERGE,
    NETWORK_CONFIG,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    Adapter,
    check_start,
    is_network,
    load,
    locate,
    read_adapter,
    read_lora,
    save_adapter,
    save_student,
)
from swd.modules.backbones import load_family
from swd.scheduler import ScaleWiseScheduler
from swd.types import UserError

SCHEDULER = ScaleWiseScheduler(sigmas=[1.0, 0.5], sizes=[4, 6])
A, B = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.tensor([[1.0, -1.0], [2.0, 0.5], [0.0, 3.0], [1.0, 1.0]])


def says(message: str) -> Any:
    """A UserError with exactly this message."""
    return pytest.raises(UserError, match=f"^{re.escape(message)}$")


def pair(
    module: str = "q", prefix: str = "", a: str = ".lora_A.weight", b: str = ".lora_B.weight"
) -> dict[str, Tensor]:
    return {f"{prefix}{module}{a}": A.clone(), f"{prefix}{module}{b}": B.clone()}


def stored(folder: Path, tensors: dict[str, Tensor], name: str = "a.safetensors", **metadata: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / name, {key: json.dumps(value) for key, value in metadata.items()})
    return folder / name


def peft_folder(folder: Path, tensors: dict[str, Tensor] | None = None, **config: Any) -> Path:
    stored(folder, pair(prefix="base_model.model.") if tensors is None else tensors, PEFT_WEIGHTS)
    (folder / PEFT_CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2} | config))
    return folder


def touched(file: Path, when: int) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"{}")
    os.utime(file, (when, when))
    return file.parent


# Where they are


def test_latest_is_the_newest_student_of_either_kind(tmp_path: Path) -> None:
    with says(f"adapter=latest, but no run under {tmp_path} holds one; train first, or give adapter=FOLDER"):
        locate("latest", tmp_path)
    with says(f"student=latest, but no run under {tmp_path} holds one; train first, or give student=FOLDER"):
        locate("latest", tmp_path, "student")
    first = touched(tmp_path / "2026" / "run1" / "adapter" / PEFT_CONFIG, 100)
    assert locate("latest", tmp_path) == first
    whole = touched(tmp_path / "run2" / "student" / NETWORK_CONFIG, 300)
    touched(tmp_path / "run3" / "adapter" / PEFT_CONFIG, 200)
    touched(tmp_path / "run4" / "other" / PEFT_CONFIG, 400)
    assert locate("latest", tmp_path) == whole


@pytest.mark.parametrize("inside", ["", "adapter", "student"])
@pytest.mark.parametrize("files", [(PEFT_CONFIG,), (DIFFUSERS_WEIGHTS,), (NETWORK_CONFIG, "model.safetensors")])
def test_a_folder_is_found_by_its_files(inside: str, files: tuple[str, ...], tmp_path: Path) -> None:
    for file in files:
        touched(tmp_path / "run" / inside / file, 100)
    assert locate(str(tmp_path / "run"), tmp_path) == tmp_path / "run" / inside
    assert is_network(tmp_path / "run" / inside) is (len(files) == 2)


def test_a_network_has_weights_and_no_file_of_an_adapter(tmp_path: Path) -> None:
    touched(tmp_path / NETWORK_CONFIG, 1)
    assert not is_network(tmp_path)
    touched(tmp_path / "x.safetensors", 1)
    assert is_network(tmp_path)
    for file in (PEFT_CONFIG, DIFFUSERS_WEIGHTS):
        touched(tmp_path / file, 1)
        assert not is_network(tmp_path)
        (tmp_path / file).unlink()
    (tmp_path / NETWORK_CONFIG).unlink()
    assert not is_network(tmp_path)


def test_what_is_no_adapter_is_named_as_it_was_given(tmp_path: Path) -> None:
    fix = f"give a run folder or a folder with {PEFT_CONFIG} and {PEFT_WEIGHTS}"
    with says(f"adapter={tmp_path} holds no adapter; {fix}"):
        locate(str(tmp_path), tmp_path)
    with says(f"x={tmp_path}/nowhere does not exist; {fix}"):
        locate(f"{tmp_path}/nowhere", tmp_path, "x")
    touched(tmp_path / "a.ckpt", 1)
    with says(f"x={tmp_path}/a.ckpt is not a .safetensors file; other formats can run code and are never read"):
        locate(f"{tmp_path}/a.ckpt", tmp_path, "x")
    touched(tmp_path / "a.safetensors", 1)
    assert locate(f"{tmp_path}/a.safetensors", tmp_path) == tmp_path / "a.safetensors"


def test_a_repository_is_fetched_under_the_users_name_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(hub, "adapter", lambda name, key: asked.append((name, key)) or peft_folder(tmp_path / "got"))
    assert locate("owner/name", tmp_path, "student") == tmp_path / "got"
    assert asked == [("owner/name", "student")]


# Files that are read


def test_an_adapter_describes_itself(tmp_path: Path) -> None:
    state = pair("b.q") | {"a.k.lora_A.weight": torch.ones(5, 3), "a.k.lora_B.weight": torch.ones(4, 5)}
    file = stored(tmp_path, state)
    adapter = Adapter(state, file)
    assert adapter.ranks == {2, 5} and adapter.modules == ["a.k", "b.q"] and adapter.base is None
    assert adapter.hash == hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def test_an_adapter_goes_onto_a_pipeline_in_the_network_s_own_dtype(tmp_path: Path) -> None:
    class Kind:
        subfolder = "unet"
        lora_arguments: ClassVar[dict[str, Any]] = {}
        lora_prefix = staticmethod(lambda: "unet")

        def __init__(self, network: Any) -> None:
            assert network == "the network"
            self.dtype = torch.bfloat16

    given: list[dict[str, Tensor]] = []
    pipe = SimpleNamespace(unet="the network", load_lora_weights=given.append)
    model: Any = SimpleNamespace(
        backbone_class=Kind, network=lambda device: SimpleNamespace(network=f"base on {torch.device(device)}")
    )
    adapter = Adapter(pair(), tmp_path)
    adapter.load_into(pipe, model)
    assert given[0].keys() == {"unet.q.lora_A.weight", "unet.q.lora_B.weight"}
    assert torch.equal(given[0]["unet.q.lora_B.weight"], B.bfloat16())
    assert given[0]["unet.q.lora_A.weight"].dtype == torch.bfloat16
    assert adapter.network(model) == "base on cpu" and adapter.network(model, "meta") == "base on meta"


@pytest.mark.parametrize(
    ("names", "alpha", "factor"),
    [
        ((".lora_A.weight", ".lora_B.weight"), None, 1.0),
        ((".lora_down.weight", ".lora_up.weight"), None, 1.0),
        ((".lora.down.weight", ".lora.up.weight"), 1.0, 0.5),
        ((".lora_down.weight", ".lora_up.weight"), 6.0, 3.0),
    ],
)
def test_a_file_without_settings_is_scaled_by_its_alpha_over_rank(
    names: tuple[str, str], alpha: float | None, factor: float, tmp_path: Path
) -> None:
    more = {} if alpha is None else {"unet.q.alpha": torch.tensor(alpha)}
    adapter = load(stored(tmp_path, pair("q", "unet.", *names) | more))
    assert adapter.state.keys() == {"q.lora_A.weight", "q.lora_B.weight"}
    assert torch.equal(adapter.state["q.lora_A.weight"], A)
    assert torch.equal(adapter.state["q.lora_B.weight"], B * factor)
    assert adapter.source == tmp_path / "a.safetensors" and adapter.base is None


def test_a_peft_folder_is_scaled_by_its_settings_and_names_its_base(tmp_path: Path) -> None:
    adapter = load(peft_folder(tmp_path / "a", lora_alpha=6, base_model_name_or_path="the/base"))
    assert torch.equal(adapter.state["q.lora_B.weight"], B * 3) and adapter.base == "the/base"
    assert adapter.source == tmp_path / "a" / PEFT_WEIGHTS
    assert load(peft_folder(tmp_path / "b", peft_type=None, base_model_name_or_path=7)).base is None
    with says(
        f"adapter {tmp_path / 'a' / PEFT_WEIGHTS} has no {PEFT_CONFIG} beside it, which says its scale; give both"
    ):
        (tmp_path / "a" / PEFT_CONFIG).unlink()
        load(tmp_path / "a" / PEFT_WEIGHTS)


def test_metadata_of_diffusers_scale_a_file(tmp_path: Path) -> None:
    for prefix in ("transformer.", "unet.", ""):
        settings = {f"{prefix}r": 2, f"{prefix}lora_alpha": 8}
        file = stored(tmp_path, pair(prefix="transformer."), lora_adapter_metadata=settings)
        assert torch.equal(load(file).state["q.lora_B.weight"], B * 4)
    folder = tmp_path / "folder"
    stored(folder, pair(prefix="transformer."), DIFFUSERS_WEIGHTS, lora_adapter_metadata=settings, other="x")
    assert torch.equal(load(folder).state["q.lora_B.weight"], B * 4)
    assert torch.equal(load(stored(tmp_path, pair(), other="x")).state["q.lora_B.weight"], B)


def test_what_a_folder_lacks_or_contradicts_is_said_in_full(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a", use_dora=True)
    with says(f"adapter {folder} is DoRA; only LoRA is known"):
        load(folder)
    with says(f"adapter {folder} is 'LOHA'; only LoRA is known"):
        load(peft_folder(folder, peft_type="LOHA"))
    weights = pair(prefix="base_model.model.")
    with says(
        f"adapter {folder / PEFT_WEIGHTS} has q.alpha=3, but by {PEFT_CONFIG} its weights are multiplied by 1 "
        "(alpha / rank); leave one of the two out"
    ):
        load(peft_folder(folder, weights | {"q.alpha": torch.tensor(3.0)}))
    assert load(peft_folder(folder, weights | {"q.alpha": torch.tensor(2.001)})), "within a thousandth"
    with pytest.raises(UserError, match=r"has q\.alpha=2\.003"):
        load(peft_folder(folder, weights | {"q.alpha": torch.tensor(2.003)}))
    (folder / PEFT_WEIGHTS).unlink()
    with says(f"adapter {folder} is incomplete: {PEFT_WEIGHTS} is missing"):
        load(folder)
    file = stored(
        tmp_path, pair("z") | pair("y") | {"z.alpha": torch.tensor(1.0), "y.alpha": torch.tensor(1.0)},
        lora_adapter_metadata={"r": 2},
    )  # fmt: skip
    with says(f"adapter {file} says its alpha twice, in lora_adapter_metadata and as y.alpha; leave one out"):
        load(file)
    touched(tmp_path / "net" / NETWORK_CONFIG, 1)
    touched(tmp_path / "net" / "x.safetensors", 1)
    with says(f"{tmp_path / 'net'} holds a network that was trained whole, no adapter; give the folder of a LoRA run"):
        load(tmp_path / "net")


@pytest.mark.parametrize("name", [PEFT_WEIGHTS, PEFT_CONFIG, DIFFUSERS_WEIGHTS])
def test_a_file_that_is_not_the_recorded_one_is_not_read(name: str, tmp_path: Path) -> None:
    folder = peft_folder(tmp_path)
    stored(folder, pair(), DIFFUSERS_WEIGHTS)
    (folder / CHECKSUMS).write_text(json.dumps({"sha256": {name: "0" * 64}}))
    with pytest.raises(UserError, match=f"{name} is not the file that was written"):
        load(folder / DIFFUSERS_WEIGHTS if name == DIFFUSERS_WEIGHTS else folder)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("[]", "has damaged metadata: lora_adapter_metadata is no JSON object; copy it again"),
        ("{", "has damaged metadata: lora_adapter_metadata is no JSON object; copy it again"),
        ('{"transformer.r": 2, "unet.r": 2}', f"has settings for more than the denoising network (unet.r); {MERGE}"),
        ('{"text_encoder.r": 2}', f"has settings for more than the denoising network (text_encoder.r); {MERGE}"),
    ],
)
def test_metadata_that_are_damaged_or_of_more_parts_are_refused(metadata: str, message: str, tmp_path: Path) -> None:
    save_file(pair(), tmp_path / "a.safetensors", {"lora_adapter_metadata": metadata})
    with says(f"adapter {tmp_path / 'a.safetensors'} {message}"):
        load(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("tensors", "native", "prefix"),
    [
        (pair(), True, ""),
        (pair("q", "transformer."), True, "transformer"),
        (pair("q", "unet.") | pair("k", "unet."), True, "unet"),
        (pair("q", "base_model.model.") | pair("k", "transformer."), False, ""),
        (pair("q", "diffusion_model.", ".lora_down.weight", ".lora_up.weight"), False, "diffusion_model"),
        (pair("q", "unet.") | {"unet.q.alpha": torch.tensor(2.0)}, False, "unet"),
    ],
)
def test_a_file_is_diffusers_own_by_its_names(
    tensors: dict[str, Tensor], native: bool, prefix: str, tmp_path: Path
) -> None:
    lora = read_lora(stored(tmp_path, tensors))
    assert lora.as_diffusers is native and lora.prefix == prefix
    modules = {"q", "k"} if len(tensors) == 4 else {"q"}
    assert lora.down.keys() == lora.up.keys() == modules
    assert torch.equal(lora.down["q"], A) and torch.equal(lora.up["q"], B)
    assert lora.alphas == ({"q": 2.0} if len(tensors) == 3 else {})


@pytest.mark.parametrize(
    "key", ["base_model.model.transformer.a.q{}", "base_model.model.a.q{}", "diffusion_model.a.q{}", "unet.a.q{}"]
)
@pytest.mark.parametrize("name", ["", ".default"])
def test_prefixes_and_names_of_adapters_are_no_part_of_a_module(key: str, name: str, tmp_path: Path) -> None:
    tensors = {key.format(f".lora_A{name}.weight"): A, key.format(".lora_B.weight"): B}
    assert list(read_lora(stored(tmp_path, tensors)).down) == ["a.q"]


def test_weights_are_float32_whatever_they_were_stored_in(tmp_path: Path) -> None:
    lora = read_lora(stored(tmp_path, {key: value.bfloat16() for key, value in pair().items()}))
    assert lora.down["q"].dtype == lora.up["q"].dtype == torch.float32 and torch.equal(lora.down["q"], A)


ONLY = f"only plain LoRA is known, so {MERGE}"
NETWORK = f"only LoRA of the denoising network is known, so {MERGE}"
DAMAGED = "is damaged: q has lora_A of shape {} and lora_B of shape {}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unet.k.lokr_w1": A}, f"holds unet.k.lokr_w1, a weight of LoKr; {ONLY}"),
        ({"k.unknown": A}, f"holds k.unknown, no LoRA weight; {ONLY}"),
        ({".lora_A.weight": A}, f"holds .lora_A.weight, a weight that was trained whole, no LoRA weight; {ONLY}"),
        ({"te1.q.alpha": A}, f"holds te1.q.alpha, a weight of a text encoder; {NETWORK}"),
        ({"unet.vae.q.alpha": A}, f"holds unet.vae.q.alpha, a weight of a VAE; {NETWORK}"),
        ({"unet.q.lora_A.weight": A}, "holds two keys for q, the second is unet.q.lora_A.weight; remove one"),
        (
            {"q.lora_A.weight": A.int()},
            "holds q.lora_A.weight as torch.int32; only floating-point weights are known",
        ),
        (
            {"q.lora_B.weight": B / 0},
            "is damaged: q.lora_B.weight is not finite; copy it again, or train it again",
        ),
        ({"q.alpha": torch.tensor(-2.5)}, "is damaged: q.alpha is -2.5, not a finite number above 0; copy it again"),
        ({"q.alpha": torch.tensor(0.0)}, "is damaged: q.alpha is 0, not a finite number above 0; copy it again"),
        (
            {"q.alpha": torch.tensor(math.inf)},
            "is damaged: q.alpha is inf, not a finite number above 0; copy it again",
        ),
        (
            {"q.alpha": torch.ones(3, 1)},
            "is damaged: q.alpha is a tensor of shape (3, 1), not a finite number above 0; copy it again",
        ),
        ({"k.alpha": torch.ones(1)}, "is damaged: k has an alpha, but no LoRA weights"),
        ({"k.lora_A.weight": A}, "is damaged: k has only one of lora_A and lora_B"),
        ({"k.lora_B.weight": A}, "is damaged: k has only one of lora_A and lora_B"),
        ({"q.lora_A.weight": A[0]}, DAMAGED.format("(3,)", "(4, 2)") + "; expected [r, in] and [out, r]"),
        (
            {"q.lora_A.weight": A[None]},
            DAMAGED.format("(1, 2, 3)", "(4, 2)") + "; expected [r, in] and [out, r]",
        ),
        (
            {"q.lora_A.weight": A[:, :0]},
            DAMAGED.format("(2, 0)", "(4, 2)") + "; expected [r, in] and [out, r]",
        ),
        ({"q.lora_B.weight": B[:0]}, DAMAGED.format("(2, 3)", "(0, 2)") + "; expected [r, in] and [out, r]"),
        (
            {"q.lora_A.weight": A[:1]},
            DAMAGED.format("(1, 3)", "(4, 2)") + ", whose ranks differ; expected [r, in] and [out, r]",
        ),
        (
            {"q.lora_A.weight": torch.ones(2, 3, 3), "q.lora_B.weight": torch.ones(4, 2, 3)},
            DAMAGED.format("(2, 3, 3)", "(4, 2, 3)") + ", whose ranks differ; expected [r, in] and [out, r]",
        ),
        (
            {"q.lora_B.weight": B * 1e38, "q.alpha": torch.tensor(40.0)},
            "is damaged: q times its scale 20 is not finite",
        ),
    ],
)
def test_what_a_file_holds_beside_a_plain_lora_is_named(
    changes: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    file = stored(tmp_path, {key: value.contiguous() for key, value in (pair() | changes).items()})
    with says(f"adapter {file} {message}"):
        load(file)


def test_a_file_without_any_lora_names_its_first_key(tmp_path: Path) -> None:
    file = stored(tmp_path, {"z": A, "k.hada_w1": B})
    with says(f"adapter {file} holds no LoRA weights: k.hada_w1 is a weight of LoHa"):
        load(file)
    with says(f"adapter {file} holds no LoRA weights"):
        load(stored(tmp_path, {}, note="empty"))
    file.write_bytes(b"x" * 20)
    with pytest.raises(UserError, match=r"^adapter \S+a\.safetensors cannot be read \(.{5,160}\); copy it again$"):
        load(file)
    with pytest.raises(UserError, match=r"nowhere\.safetensors cannot be read"):
        read_lora(tmp_path / "nowhere.safetensors")


def test_a_convolution_s_lora_has_a_kernel_in_lora_a_alone(tmp_path: Path) -> None:
    weights = {"c.lora_A.weight": torch.ones(2, 3, 3, 3), "c.lora_B.weight": torch.ones(4, 2, 1, 1)}
    assert load(stored(tmp_path, weights)).state.keys() == weights.keys()


# A student's start


def a_model(init: Path, **more: Any) -> Any:
    network = nn.ModuleDict({"q": nn.Linear(3, 4), "k": nn.Linear(3, 4), "norm": nn.LayerNorm(3)})
    options = {"targets": ["q"], "rank": 2, "alpha": None, "initial": None} | more
    return SimpleNamespace(
        name="tiny", backbone_class=load_family("sd3"), meta_network=network, init_adapter=str(init), **options
    )


@pytest.mark.parametrize(("alpha", "factor"), [(None, 1.0), (2.0, 1.0), (4.0, 0.5)])
def test_a_start_stands_for_the_same_update_under_the_students_alpha(
    alpha: float | None, factor: float, tmp_path: Path
) -> None:
    model = a_model(stored(tmp_path, pair()), alpha=alpha)
    check_start(model)
    (tmp_path / "a.safetensors").unlink()
    state = read_adapter(model)
    assert torch.equal(state["q.lora_A.weight"], A) and torch.equal(state["q.lora_B.weight"], B * factor)
    assert len(state) == 2 and model.initial is None
    stored(tmp_path, pair())
    again = read_adapter(model)  # read now, as nothing was kept
    assert torch.equal(again["q.lora_B.weight"], B * factor)


def test_a_start_of_other_ranks_or_layers_is_refused_with_the_fix(tmp_path: Path) -> None:
    file = stored(tmp_path, pair())
    where = f"model.init_adapter={file}"
    with says(f"{where} has rank 2, but model.rank=8; set model.rank=2"):
        check_start(a_model(file, rank=8))
    other = {"k.lora_A.weight": torch.ones(1, 3), "k.lora_B.weight": torch.ones(4, 1)}
    with says(f"{where} has modules of rank 1, 2, but the student's have one rank, model.rank=2; {MERGE}"):
        check_start(a_model(stored(tmp_path, pair() | other)))
    stored(tmp_path, pair())
    with says(
        f"{where} adapts other layers than model.targets=['q', 'k']: 1 only in model.targets (e.g. k); "
        "set 'model.targets=[q]'"
    ):
        check_start(a_model(file, targets=["q", "k"]))
    with says(
        f"{where} adapts other layers than model.targets=['k']: 1 only in the adapter (e.g. q), "
        "1 only in model.targets (e.g. k); set 'model.targets=[q]'"
    ):
        check_start(a_model(file, targets=["k"]))
    with pytest.raises(UserError, match=r"does not fit model tiny: x, which this model does not have"):
        check_start(a_model(stored(tmp_path, pair("x"))))
    with pytest.raises(UserError, match=r"^model\.init_adapter=\S+/nowhere does not exist"):
        check_start(a_model(tmp_path / "nowhere"))


@pytest.mark.parametrize(("count", "named"), [(16, True), (17, False)])
def test_up_to_sixteen_layers_are_named_as_targets(count: int, named: bool, tmp_path: Path) -> None:
    names = [f"l{i:02d}" for i in range(count)]
    file = stored(tmp_path, {key: value for name in names for key, value in pair(name).items()})
    model = a_model(file)
    model.meta_network.update({name: nn.Linear(3, 4) for name in names})
    fix = f"set 'model.targets=[{','.join(names)}]'" if named else MERGE
    with says(
        f"model.init_adapter={file} adapts other layers than model.targets=['q']: {count} only in the adapter "
        f"(e.g. l00), 1 only in model.targets (e.g. q); {fix}"
    ):
        check_start(model)


# How they are written


def test_an_adapter_is_written_for_both_loaders_with_its_scale_folded_in(tmp_path: Path) -> None:
    state = pair("b.q") | {"a.k.lora_A.weight": torch.ones(3, 5).T, "a.k.lora_B.weight": torch.ones(4, 5)}
    folder = save_adapter(tmp_path / "runs" / "adapter", state, 2, 6.0, SCHEDULER, "the/base", "unet")
    assert folder == tmp_path / "runs" / "adapter"
    expected = {key: value * 3 if ".lora_B." in key else value for key, value in state.items()}
    for name, prefix in ((PEFT_WEIGHTS, "base_model.model."), (DIFFUSERS_WEIGHTS, "unet.")):
        found = load_file(folder / name)
        assert found.keys() == {prefix + key for key in state}
        assert all(torch.equal(found[prefix + key], value) for key, value in expected.items())
        with safe_open(folder / name, "pt") as opened:
            assert not opened.metadata()
    assert json.loads((folder / PEFT_CONFIG).read_text()) == {
        "peft_type": "LORA",
        "base_model_name_or_path": "the/base",
        "r": 5,
        "lora_alpha": 5,
        "rank_pattern": {"b.q": 2},
        "alpha_pattern": {"b.q": 2},
        "target_modules": ["a.k", "b.q"],
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": "gaussian",
        "inference_mode": True,
    }
    assert ScaleWiseScheduler.from_pretrained(folder).base_sizes == [(4, 4), (6, 6)]
    again = load(folder)
    assert again.base == "the/base" and all(torch.equal(again.state[key], value) for key, value in expected.items())
    recorded = json.loads((folder / CHECKSUMS).read_text())["sha256"]
    assert recorded.keys() == {file.name for file in folder.iterdir()} - {CHECKSUMS}
    assert recorded[PEFT_WEIGHTS] == hashlib.sha256((folder / PEFT_WEIGHTS).read_bytes()).hexdigest()


def test_a_whole_student_is_written_with_its_schedule_and_record(tmp_path: Path) -> None:
    def save_pretrained(folder: Path) -> None:
        touched(folder / NETWORK_CONFIG, 1)
        stored(folder, {"w": A}, "x.safetensors")

    folder = save_student(tmp_path / "student", SimpleNamespace(save_pretrained=save_pretrained), SCHEDULER)
    assert folder == tmp_path / "student" and is_network(folder)
    assert {file.name for file in folder.iterdir()} == {
        NETWORK_CONFIG, "x.safetensors", adapters.SCHEDULER_CONFIG, CHECKSUMS
    }  # fmt: skip
    recorded = json.loads((folder / CHECKSUMS).read_text())["sha256"]
    assert recorded["x.safetensors"] == hashlib.sha256((folder / "x.safetensors").read_bytes()).hexdigest()


def test_the_name_of_the_default_adapter_in_keys_changes_nothing_but_who_else_reads_them(tmp_path: Path) -> None:
    plain = read_lora(stored(tmp_path, pair(prefix="transformer."), "plain.safetensors"))
    named = pair(prefix="transformer.", a=".lora_A.default.weight", b=".lora_B.default.weight")
    found = read_lora(stored(tmp_path, named, "named.safetensors"))
    assert found.down["q"].equal(plain.down["q"]) and found.up["q"].equal(plain.up["q"])
    assert plain.as_diffusers and not found.as_diffusers
