"""Settings that do not fit are refused before any weight is loaded: loading anything fails these tests."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import families
import pytest
from diffusers import DiffusionPipeline, ModelMixin
from families import random_state, scheduler
from hydra.errors import InstantiationException
from tiny import composed, overrides
from transformers import PreTrainedModel

from swd.commands.train import build_task_and_data
from swd.modules.adapters import load, save_adapter
from swd.modules.pretrained import Pretrained
from swd.types import UserError


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pipelines, and adapters of them: rank 4 on all targets, or as their names say."""
    root = tmp_path_factory.mktemp("stored")
    paths = {name: families.save(name, root / name) for name in ("sd3", "flux", "sdxl", "wan")}
    for key, family, changes in (
        ("adapter", "sd3", {}),
        ("adapter-flux", "flux", {}),
        ("adapter-rank-8", "sd3", {"rank": 8}),
        ("adapter-to_q", "sd3", {"targets": ("to_q", "net.2")}),
    ):
        model = families.pretrained(family, paths[family], **changes)
        state, part = random_state(model), model.backbone_class.subfolder
        rank = model.rank
        paths[key] = save_adapter(root / key, state, rank, rank, scheduler(family, model), f"the-{family}-base", part)
    mixed = load(paths["adapter"]).state
    for key in [k for k in mixed if "net.2" in k]:
        mixed[key] = mixed[key][:2] if "lora_A" in key else mixed[key][:, :2]
    model = families.pretrained("sd3", paths["sd3"])
    paths["adapter-mixed"] = save_adapter(
        root / "mixed", mixed, 4, 4, scheduler("sd3", model), "the-sd3-base", "transformer"
    )
    for part in ("tokenizer_2", "vae"):
        shutil.rmtree(shutil.copytree(paths["sd3"], root / f"no-{part}") / part)
        paths[f"no-{part}"] = root / f"no-{part}"
    shutil.copytree(paths["sd3"], root / "wrong-tokenizer")
    for file in (root / "wrong-tokenizer" / "tokenizer").iterdir():
        file.unlink()
    (root / "wrong-tokenizer" / "tokenizer" / "notes.txt").write_text("x")
    paths["pictures"] = root / "pictures"
    paths["pictures"].mkdir()
    for file in ("a.png", "a.txt"):
        (paths["pictures"] / file).write_text("a red star")
    return paths | {"wrong-tokenizer": root / "wrong-tokenizer"}


@pytest.fixture(autouse=True)
def _nothing_loads(monkeypatch: pytest.MonkeyPatch, stored: dict[str, Path]) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights are loaded")

    for place, name in (
        (Pretrained, "network"),
        (Pretrained, "pipeline"),
        (Pretrained, "fetch"),
        (ModelMixin, "from_pretrained"),
        (DiffusionPipeline, "from_pretrained"),
        (PreTrainedModel, "from_pretrained"),
    ):
        monkeypatch.setattr(place, name, fail)


WRONG: dict[str, tuple[list[str], list[str]]] = {
    "family": (["model.family=flux"], ["SD3Transformer2DModel", "model.family=flux", "FluxTransformer2DModel"]),
    "truncated size": (["schedule.sizes=[4,7,8]"], ["7 is not divisible by 2", "use 6 or 8"]),
    "size beyond the positions": (["model.size=18"], ["18 is beyond the positional limit 16"]),
    "block": (["loss.mmd.blocks=[3]"], ["loss.mmd.blocks", "block 3", "0 to 2"]),
    "unknown target": (["model.targets=[to_q,to_x]"], ["model.targets", "'to_x'"]),
    "no text tokens": (["model.max_text_tokens=0"], ["model.max_text_tokens=0", "at least 1"]),
    "levels, before the model is looked for": (
        ["model.path={sd3}/nowhere", "schedule.sigmas=[0.5,1.0]"],
        ["schedule.sigmas must be strictly decreasing"],
    ),
    "workers": (["data.workers=-1"], ["data.workers=-1", "0 or more"]),
    "no tokenizer": (["model.path={no-tokenizer_2}"], ["'tokenizer_2' is missing"]),
    "wrong tokenizer": (["model.path={wrong-tokenizer}"], ["'tokenizer' holds no tokenizer", "spiece.model"]),
    "no VAE": (["model.path={no-vae}"], ["'vae' is missing"]),
    "another family's adapter": (
        ["model.init_adapter={adapter-flux}"],
        ["made for the-flux-base", "does not fit model sd3", "which this model does not have"],
    ),
    "another rank": (["model.init_adapter={adapter-rank-8}"], ["has rank 8", "model.rank=4", "set model.rank=8"]),
    "several ranks": (["model.init_adapter={adapter-mixed}"], ["rank 2, 4", "model.rank=4", "merge it", "model.path"]),
    "fewer layers in the adapter": (
        ["model.init_adapter={adapter-to_q}"],
        ["only in model.targets (e.g. transformer_blocks.0.attn.to_k)", "'model.targets=[net.2,to_q]'"],
    ),
    "more layers in the adapter": (
        ["model.init_adapter={adapter}", "model.targets=[to_q,to_k,to_v]"],
        ["only in the adapter (e.g. transformer_blocks.0.attn.to_out.0)", "to_out.0", "net.2"],
    ),
    "no adapter": (["model.init_adapter={sd3}"], ["holds no adapter"]),
    "quantization": (["model.quantization=int4"], ["model.quantization='int4'", "int8 | fp8"]),
    "8 bits and whole copies": (["model.quantization=fp8", "model.tuning=full"], ["model.quantization", "tuning=lora"]),
    "adapter and whole copies": (["model.init_adapter={adapter}", "model.tuning=full"], ["model.init_adapter"]),
    "no data": (["data=images", "data.dataset.path={sd3}/nowhere"], ["does not exist"]),
    "data without a path": (["data=images"], ["data.dataset.path is missing"]),
    "small data": (
        ["data=images", "data.dataset.path={pictures}", "data.dataset.size=32"],
        ["data.dataset.size=[32, 32]", "ends at [64, 64] pixels", "set 'data.dataset.size=[64,64]'"],
    ),
    "data of other proportions": (
        ["data=images", "data.dataset.path={pictures}", "data.dataset.size=64", "schedule.sizes=[[4,2],[6,4],[8,4]]"],
        ["data.dataset.size=[64, 64]", "ends at [64, 32] pixels", "squashed", "set 'data.dataset.size=[64,32]'"],
    ),
    "no captions": (["data=images", "data.dataset.path={sd3}"], ["no captioned files"]),
}


def checked(stored: dict[str, Path], folder: Path, *more: str) -> Any:
    """Task and data of a command line; what is refused inside a constructor comes out as the command shows it."""
    given = [argument.format(**stored) for argument in more]
    base = overrides(stored["sd3"], folder)
    if "data=images" in given:
        base = [argument for argument in base if not argument.startswith("data.dataset.resolution")]
    try:
        return build_task_and_data(composed([*base, *given]))[0]
    except InstantiationException as error:
        assert isinstance(error.__cause__, UserError), error
        raise error.__cause__ from None


@pytest.mark.parametrize("case", list(WRONG))
def test_wrong_input_is_refused_before_weights(stored: dict[str, Path], tmp_path: Path, case: str) -> None:
    more, words = WRONG[case]
    with pytest.raises(UserError) as caught:
        checked(stored, tmp_path, *more)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_right_input_loads_nothing_either(stored: dict[str, Path], tmp_path: Path) -> None:
    task = checked(stored, tmp_path, "model.init_adapter={adapter}")
    with pytest.raises(AssertionError, match="weights are loaded"):
        task.configure_model()


def test_names_of_layers_are_checked_for_adapters_alone(stored: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.targets: no linear layer of this model is called 'to_x'"):
        checked(stored, tmp_path, "model.targets=[to_x]")
    assert checked(stored, tmp_path, "model.targets=[to_x]", "model.tuning=full").model.tuning == "full"


@pytest.mark.parametrize("name", ["sdxl", "wan"])
def test_dmd_warns_with_the_paper_s_reason(stored: dict[str, Path], tmp_path: Path, name: str) -> None:
    sizes = families.SIZES[name]
    given = [
        f"model.path={stored[name]}",
        f"model.family={name}",
        f"model.size={sizes[-1]}",
        f"schedule.sizes={sizes}",
        "schedule=sdxl_4step" if name == "sdxl" else "schedule=shapes_4step",
        "model.feature_blocks=[0]",
        "loss=dmd",
    ]
    with pytest.warns(UserWarning, match=rf"DMD is known to fail on {name}.*low resolution.*appendix B.*loss=mmd"):
        checked(stored, tmp_path, *given)
