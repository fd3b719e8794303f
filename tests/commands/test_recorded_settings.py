"""Each setting of a job that can go on later is recorded if its results depend on it, so that no two are mixed.

Every key of a command's configuration stands in one of two lists here: of those whose change makes another job, and of
those whose change does not, with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
from PIL import Image
from safetensors.torch import save_file
from tiny import composed

from swd.commands import encode, evaluate, generate
from swd.commands.keys import ENCODE, EVALUATE, GENERATE
from swd.modules.pretrained import Pretrained

OF_TRAINING = "of training alone"
OF_STUDENTS = "of the student's LoRA; what is drawn is recorded by its weights' hash"
NAMES = "names places, whose content is recorded"
TIMES = "how fast, not what"
"""Reasons."""

MODEL: dict[str, Any] = {
    "family": "of the folder, whose content is recorded",
    "revision": "the commit is part of the recorded fingerprint, and folders have none",
    "tuning": OF_TRAINING,
    "rank": OF_STUDENTS,
    "alpha": OF_STUDENTS,
    "dmd_guidance_scale": OF_TRAINING,
    "feature_blocks": OF_TRAINING,
    "init_adapter": OF_TRAINING,
}
"""Keys of a model that change nothing that is drawn or encoded."""
DRAWN_WITH: dict[str, str] = {
    "model.path": "model.path=OTHER",
    "model.precision": "model.precision=bf16",
    "model.vae_precision": "model.vae_precision=bf16",
    "model.quantization": "model.quantization=int8",
    "model.attention": "model.attention=cudnn",
    "model.targets": "model.quantization=int8 | model.targets=[to_q]",
    "model.embedded_guidance": "",
    "model.negative_prompt": "model.negative_prompt=blurred",
    "model.adapters": "model.adapters=[STYLE]",
    "model.max_text_tokens": "model.max_text_tokens=11",
    "model.size": "model.size=6",
    "model.teacher_steps": "model.teacher_steps=4",
    "model.drawing_guidance_scale": "model.drawing_guidance_scale=2.0",
}
"""Settings of a model whose change draws other pictures, as `CHANGED` has them."""
CHANGED: dict[str, dict[str, str]] = {
    "generate": {
        **DRAWN_WITH,
        "seed": "seed=1",
        "prompts": "prompts=MORE",
        "images_per_prompt": "images_per_prompt=2",
        "shard_size": "shard_size=3",
        "steps": "steps=5",
        "guidance_scale": "guidance_scale=3.0",
        "height": "height=48",
        "width": "width=48",
        "aspect": "aspect='1:2'",
        "frames": "",
        "fps": "",
        "format": "format=webp",
        "quality": "format=jpg | quality=50",
        "refiner": "",
        "refiner_start": "",
    },
    "encode": {
        "model.path": "model.path=OTHER",
        "model.precision": "model.precision=bf16",
        "model.vae_precision": "model.vae_precision=bf16",
        "model.max_text_tokens": "model.max_text_tokens=11",
        "schedule.sizes": "schedule.sizes=[4,4,8]",
        "data.dataset.path": "data.dataset.path=OTHER_PICTURES",
        "data.dataset.size": "data.dataset.size=96",
        "data.dataset.outside": "data.dataset.outside=true",
        "data.dataset.max_pixels": "data.dataset.max_pixels=5000",
        "precision": "precision=int8",
        "posterior": "posterior=mean",
        "deduplicate": "deduplicate=false",
        "shard_size": "shard_size=3",
        "limit": "limit=2",
    },
    "encode of shapes": {
        "data.dataset.split": "data.dataset.split=val",
        "data.dataset.seed": "data.dataset.seed=3",
        "data.dataset.resolution": "data.dataset.resolution=96",
        "seed": "seed=1",
    },
    "evaluate": {
        **DRAWN_WITH,
        "models": "models=[{name: teacher, model: teacher, steps: 5}]",
        "prompts": "prompts=MORE",
        "n": "n=2",
        "images_per_prompt": "images_per_prompt=2",
        "seed": "seed=1",
        "chunk_size": "chunk_size=3",
        "metrics": "metrics=[DARK]",
        "reference": "metrics=[FID] | reference=OTHER_PICTURES | reference=PICTURES",
        "height": "height=48",
        "width": "width=48",
        "aspect": "aspect='1:2'",
        "bootstrap.draws": "bootstrap.draws=50",
        "bootstrap.level": "bootstrap.level=0.5",
        "bootstrap.seed": "bootstrap.seed=1",
        "timing.batch": "timing.batch=2",
        "timing.runs": "timing.runs=2",
        "timing.warmup": "timing.warmup=2",
        "timing.precision": "timing.precision=bf16",
        "timing.compile": "",  # these three need a compiler or a decoder: tests/evaluation/test_timing.py
        "timing.compile_coders": "",
        "timing.tiny_vae": "",
    },
}
"""What makes another job: overrides, of which the last one (behind `|`) does it. Empty ones are of other models, which
tests below have."""
SAME: dict[str, dict[str, Any]] = {
    "generate": {
        "batch_size": "documented: a job may go on with another; bits may then differ by rounding",
        "out": NAMES,
    },
    "encode": dict.fromkeys(
        ("quantization", "attention", "targets", "embedded_guidance"), "of the network, which is not run"
    )
    | dict.fromkeys(("negative_prompt", "adapters", "teacher_steps", "drawing_guidance_scale", "size"), "of drawing")
    | {
        "schedule.sigmas": "latents are stored without noise",
        "schedule.process": "latents are stored without noise",
        "data.dataset.max_missing": "only whether a folder is refused",
        "data.endless": OF_TRAINING,
        "data.validation": OF_TRAINING,
        "data.batch_size": "taken from batch_size",
        "data.workers": TIMES,
        "data.seed": "of the order of a training",
        "recipe.batch_size": "taken from batch_size",
        "batch_size": "documented; bits may differ by rounding",
        "max_bad": "only when it stops",
        "data.dataset.kind": "given by the size's axes, which are recorded",
        "recipe.lr": OF_TRAINING,
        "recipe.iterations": OF_TRAINING,
        "recipe.checkpointing": OF_TRAINING,
        "out": NAMES,
    },
    "evaluate": {
        "schedule.sigmas": "of a student's, and recorded with it",
        "schedule.sizes": "of a student's, and recorded with it",
        "schedule.process": "of a student's, and recorded with it",
        "batch_size": "documented; bits may differ by rounding",
        "published": "read from a file when the table is written",
        "name": NAMES,
        "output": NAMES,
        "folder": NAMES,
    },
}


@pytest.fixture(scope="module")
def places(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files and folders that the overrides above name."""
    root = tmp_path_factory.mktemp("places")
    other = families.save("sd35_medium", root / "other")
    model = Pretrained("sd3", str(tiny_model), rank=4, precision="fp32", feature_blocks=[1], max_text_tokens=12)
    state = families.random_state(model)
    save_file({f"transformer.{key}": value for key, value in state.items()}, root / "style.safetensors")
    (root / "prompts.txt").write_text("a red star\na blue ring\na heart\n")
    (root / "more.txt").write_text("a red star\na blue ring\na cross\n")
    for name in ("pictures", "others"):
        (root / name).mkdir()
        for number in range(4):
            Image.new("RGB", (70, 80), (40 * number, 90, 10)).save(root / name / f"{number}.png")
            (root / name / f"{number}.txt").write_text(f"{name} {number}")
    # A link to a file elsewhere counts with outside=true alone.
    (root / "pictures" / "9.png").symlink_to(root / "others" / "0.png")
    (root / "pictures" / "9.txt").write_text("a link")
    return {
        "DARK": metric("toy_metrics.Brightness", "dark"),
        "FID": metric("swd.metrics.fid.Frechet", "fid"),
        "MORE": str(root / "more.txt"),
        "PROMPTS": str(root / "prompts.txt"),
        "OTHER_PICTURES": str(root / "others"),
        "PICTURES": str(root / "pictures"),
        "OTHER": str(other),
        "STYLE": str(root / "style.safetensors"),
        "MODEL": str(tiny_model),
        "ROOT": str(root),
    }


def metric(kind: str, name: str) -> str:
    return f"{{_target_: {kind}, name: {name}, extractor: {{_target_: toy_metrics.Colours}}}}"


def on_tiny_model(places: Mapping[str, str]) -> list[str]:
    given = ["model=sd35_large", f"model.path={places['MODEL']}", "model.size=8", "model.precision=fp32"]
    return [*given, "model.feature_blocks=[1]", "model.max_text_tokens=12", "model.rank=4"]


def generating(places: Mapping[str, str]) -> list[str]:
    return [*on_tiny_model(places), f"prompts={places['PROMPTS']}", f"out={places['ROOT']}/drawn"]


def encoding(places: Mapping[str, str]) -> list[str]:
    given = [*on_tiny_model(places), "schedule.sizes=[4,6,8]", "schedule.sigmas=[1.0,0.8,0.6]", "data=images"]
    given += [f"data.dataset.path={places['PICTURES']}", "data.dataset.size=64", "data.workers=0"]
    return [*given, "data.dataset.max_missing=1", f"out={places['ROOT']}/cache"]


def encoding_shapes(places: Mapping[str, str]) -> list[str]:
    given = [*on_tiny_model(places), "schedule.sizes=[4,6,8]", "schedule.sigmas=[1.0,0.8,0.6]", "data=shapes"]
    return [*given, "limit=4", f"out={places['ROOT']}/cache"]


def evaluating(places: Mapping[str, str]) -> list[str]:
    toys = "[toy_metrics.Brightness,toy_metrics.Colours,swd.metrics.fid.Frechet]"
    bright = metric("toy_metrics.Brightness", "bright")
    given = [*on_tiny_model(places), f"prompts={places['PROMPTS']}", "models=[teacher]", f"metrics=[{bright}]"]
    return [*given, f"allow={toys}", f"folder={places['ROOT']}/evaluation", "timing.warmup=1", "timing.runs=1"]


def of_job(job: Any) -> dict[str, Any]:
    return {"kind": job.kind, "rows": job.rows, "shard_size": job.shard_size, **job.settings}


def of_evaluation(cfg: Any) -> dict[str, Any]:
    from swd.evaluation.timing import Costs

    found = evaluate.prepare(cfg)
    plan, scoring = found.plan, found.scoring
    costs = [Costs(plan, candidate, found.timing).key for candidate in plan.candidates]  # type: ignore[arg-type]
    return {**plan.settings(), "scores": [scoring.key(name) for name in scoring.metrics], "costs": costs}


COMMANDS: dict[str, tuple[str, Callable[[Mapping[str, str]], list[str]], Callable[[Any], dict[str, Any]]]] = {
    "generate": ("generate", generating, lambda cfg: of_job(generate.prepare(cfg).job)),
    "encode": ("encode", encoding, lambda cfg: of_job(encode.prepare(cfg).job)),
    "encode of shapes": ("encode", encoding_shapes, lambda cfg: of_job(encode.prepare(cfg).job)),
    "evaluate": ("evaluate", evaluating, of_evaluation),
}


def recorded(name: str, places: Mapping[str, str], *more: str) -> dict[str, Any]:
    command, arguments, record = COMMANDS[name]
    given = arguments(places)
    for override in more:
        for word, path in places.items():
            override = override.replace(f"={word}", f"={path}").replace(f"[{word}]", f"[{path}]")
        given = [each for each in given if each.partition("=")[0] != override.partition("=")[0]] + [override]
    found: dict[str, Any] = json.loads(json.dumps(record(composed(given, command)), default=str))
    return found


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.filterwarnings("ignore")
def test_what_changes_the_results_is_recorded(name: str, places: dict[str, str]) -> None:
    before = recorded(name, places)
    assert before == recorded(name, places)
    silent = []
    for key, overrides in CHANGED[name].items():
        if overrides:
            *others, last = overrides.split(" | ")
            if recorded(name, places, *others) == recorded(name, places, *others, last):
                silent.append(key)
    assert not silent, f"swd {name} goes on with another value of {silent} and mixes results"


@pytest.mark.parametrize(("name", "roots"), [("generate", GENERATE), ("encode", ENCODE), ("evaluate", EVALUATE)])
def test_every_key_is_in_a_list(name: str, roots: Mapping[str, Any], places: dict[str, str]) -> None:
    command, arguments, _ = COMMANDS[name]
    cfg = composed(arguments(places), command)
    found = {key for key in tiny.keys_of(evaluate.to_plain(cfg)) if key.partition(".")[0] in roots}
    found = {key for key in found if not key.endswith("_target_") and not any(k.startswith(f"{key}.") for k in found)}
    same = {key if "." in key or key in found else f"model.{key}" for key in SAME[name] | MODEL}
    changed = set(CHANGED[name]) | (set(CHANGED["encode of shapes"]) if name == "encode" else set())
    assert not changed & same
    missing = found - changed - same - {"allow"}
    assert not missing, f"say in this file whether {sorted(missing)} change what swd {name} makes"


OF_OTHERS = {
    "flux": ("flux_dev", ["model.embedded_guidance=2.0"]),
    "wan": ("wan21_1_3b", ["frames=5", "fps=8"]),
    "sdxl": ("sdxl", ["refiner=REFINER", "refiner=REFINER | refiner_start=0.5"]),
}


@pytest.mark.parametrize("name", OF_OTHERS)
@pytest.mark.filterwarnings("ignore")
def test_settings_of_single_models_are_recorded(
    name: str, places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    option, cases = OF_OTHERS[name]
    folder = families.save(name, tmp_path / "model")
    monkeypatch.setattr(generate, "load_refiner", lambda path, model: model)
    given = [f"model={option}", f"model.path={folder}", f"model.size={families.SIZES[name][-1]}".replace(" ", "")]
    given += ["model.feature_blocks=[0]", "model.max_text_tokens=24", f"prompts={places['PROMPTS']}", f"out={tmp_path}"]

    def record(*more: str) -> dict[str, Any]:
        return of_job(generate.prepare(composed([*given, *more], "generate")).job)

    for case in cases:
        *others, last = case.split(" | ")
        assert record(*others) != record(*others, last), last


@pytest.mark.filterwarnings("ignore")
def test_fed_guidance_is_part_of_an_evaluation(places: dict[str, str], tmp_path: Path) -> None:
    model = families.pretrained("flux", families.save("flux", tmp_path / "model"))
    given = ["model=flux_dev", f"model.path={model.folder}", "model.size=8", "model.feature_blocks=[0]"]
    given += [each for each in evaluating(places) if not each.startswith("model")]
    given += ["models=[teacher]", "model.max_text_tokens=24"]
    plain, other = (
        of_evaluation(composed([*given, *more], "evaluate")) for more in ((), ("model.embedded_guidance=2",))
    )
    assert plain["models"] != other["models"] and plain["scores"] != other["scores"]
