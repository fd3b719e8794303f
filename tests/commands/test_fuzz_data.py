"""Random settings of `generate`, `encode` and `sample`: each is taken, or refused in one clear line."""

from __future__ import annotations

import json
import random
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from shards import make_pictures

from swd.commands import cli, generate, sample
from swd.data.job import Job
from swd.modules.pretrained import Pretrained

WHOLE = [-(2**70), -1, 0, 1, 2, 3, 7, 16, 31, 64, 100, 128, 1000, 4096, 100_000, 10**9, 2**63, 10**30, "1.5", "null"]
REAL = [-1, 0, 0.5, 1, 4.5, 7, 100, 1e6, 1e308, "nan", "inf", "-inf", "null", "x", 10**40, 1e-300]
TEXT = ["null", "x", "''", "a/b", "[1]", "{a:1}", "true", "..", "0", "é"]
MODEL = {
    "model.teacher_steps": WHOLE,
    "model.drawing_guidance_scale": REAL,
    "model.max_text_tokens": WHOLE,
    "model.size": [*WHOLE, "[16,16]", "[8,16,16]", "[]", "x"],
    "model.rank": WHOLE,
    "model.alpha": REAL,
    "model.precision": [*TEXT, "fp32", "bf16", "fp16"],
    "model.family": ["x", "sd3", "flux", "sdxl"],
    "++model.embedded_guidance": REAL,
}
DRAWN = {
    "seed": WHOLE,
    "images_per_prompt": WHOLE,
    "batch_size": WHOLE,
    "height": WHOLE,
    "width": WHOLE,
    "aspect": [*TEXT, "16:9", "1:1", "0:1", "1:0", "9:1e9", "999999999:1", "1:64", "1:65", "nan:1", "1" * 400 + ":1"],
    "frames": WHOLE,
    "fps": WHOLE,
}
OVERRIDES: dict[str, dict[str, list[Any]]] = {
    "generate": MODEL
    | DRAWN
    | {
        "steps": WHOLE,
        "guidance_scale": REAL,
        "shard_size": WHOLE,
        "format": [*TEXT, "png", "jpg", "webp", "PNG"],
        "quality": WHOLE,
        "refiner": TEXT,
        "refiner_start": REAL,
    },
    "encode": MODEL
    | {
        "batch_size": WHOLE,
        "shard_size": WHOLE,
        "limit": WHOLE,
        "max_bad": REAL,
        "precision": [*TEXT, "int8", "bf16", "fp32"],
        "posterior": [*TEXT, "draw", "mean"],
        "deduplicate": [*TEXT, "false"],
        "data.workers": WHOLE,
        "data.multiple": WHOLE,
        "data.size": [*WHOLE, "[64,64]", "[128,128]", "x"],
        "data.buckets": ["null", "[]", "['1:1']", "['1:1','4:3']", "[x]", "['1:0']", "['9:1e9']", "['1:99999']"],
        "schedule.sizes": ["[8,16]", "[]", "[16,8]", "[1000000]", "[8.5]", "x"],
    },
    "sample": MODEL
    | DRAWN
    | {
        "prompts": [*TEXT, "[a,b]", "[]", "['']"],
        "compile": [*TEXT, "false"],
        "offload": [*TEXT, "none", "model"],
        "show_sizes": ["true", "x"],
        "tiny_vae": TEXT,
        "other_adapter": TEXT,
    },
}


class Planned(Exception):
    """All has been checked, and weights would be loaded now."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures and prompts."""
    folder = tmp_path_factory.mktemp("fuzz")
    make_pictures(folder / "pictures", 6, [(128, 128)])
    (folder / "prompts.csv").write_text('prompt,seed\n"a red star, small",3\na ring,\n')
    return folder


def given(command: str, place: Path, number: int, rng: random.Random) -> list[str]:
    """A command line that would work, but for one to three random settings."""
    known = OVERRIDES[command]
    chosen = rng.sample(list(known), rng.randint(1, 3))
    out = place / f"{command}{number}"
    base = {
        "generate": [f"prompts={place / 'prompts.csv'}", f"out={out}"],
        "encode": ["data=webdataset", f"data.path={place / 'pictures'}", f"out={out}", "data.workers=0"],
        "sample": ["adapter=null", "prompts=[a red star]", f"folder={out}"],
    }[command]
    return ["model=shapes", *base, *(f"{key}={rng.choice(known[key])}" for key in chosen)]


def outcome(command: str, line: list[str], patch: pytest.MonkeyPatch) -> str:
    """How a command ends: "planned", or the line that refuses it."""

    def planned(*args: Any, **kwargs: Any) -> None:
        raise Planned

    for module, name in ((Pretrained, "encoders"), (Job, "run"), (sample, "build_pipeline")):
        patch.setattr(module, name, planned)
    patch.setattr(sys, "argv", ["swd", *line])
    patch.delenv("SWD_COMMAND", raising=False)
    GlobalHydra.instance().clear()
    try:
        cli.launch(command)
    except Planned:
        return "planned"
    except SystemExit as error:
        assert error.code == 2, line
        return "refused"
    finally:
        HydraConfig.instance().cfg = None
    raise AssertionError(f"{line} did neither")


def fuzz(
    command: str,
    count: int,
    place: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    rng, ends = random.Random(f"{command}/{seed}"), []
    monkeypatch.chdir(place)
    for number in range(count):
        line = given(command, place, number, rng)
        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ends.append(outcome(command, line, patch))
        told = capfd.readouterr().err.splitlines()
        if ends[-1] == "refused":
            assert len(told) == 1 and told[0].startswith("error: ") and len(told[0]) < 600, (line, told)
            assert not re.search(r"Traceback|Error\b.*Error\b|object at 0x", told[0]), (line, told)
    assert {"planned", "refused"} <= set(ends)


@pytest.mark.parametrize("command", list(OVERRIDES))
def test_a_few_random_settings(
    command: str, place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fuzz(command, 12, place, capfd, monkeypatch, 0)


@pytest.mark.slow
@pytest.mark.parametrize("command", list(OVERRIDES))
def test_many_random_settings(
    command: str, place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fuzz(command, 120, place, capfd, monkeypatch, 1)


@pytest.mark.parametrize(
    ("command", "setting", "message"),
    [
        ("generate", "images_per_prompt=1000000000", "of 2 prompts are 2000000000 pictures"),
        ("generate", f"images_per_prompt={10**30}", "use at most 2^63 - 1"),
        ("generate", "guidance_scale=-1", "guidance_scale=-1; use 1 to 100"),
        ("generate", "guidance_scale=inf", "guidance_scale=inf is not a finite number"),
        ("generate", "guidance_scale=nan", "guidance_scale=nan is not a finite number"),
        ("generate", "steps=-5", "steps=-5; use at least 1"),
        ("generate", "steps=100000", "steps=100000; use at most 1000"),
        ("generate", "model.teacher_steps=0", "model.teacher_steps=0; use at least 1"),
        ("generate", "batch_size=1000000000", "batch_size=1000000000; use at most 4096"),
        ("generate", "shard_size=1000000000", "shard_size=1000000000; use at most 1000000"),
        ("generate", f"seed={2**63}", "use at most 2^63 - 1"),
        ("generate", f"seed={2**63 - 2}", "below 2^63"),  # of the second picture
        ("generate", "fps=1000000", "fps=1000000; use at most 240"),
        ("sample", "model.teacher_steps=-3", "model.teacher_steps=-3; use at least 1"),
        ("sample", "model.drawing_guidance_scale=101", "model.drawing_guidance_scale=101; use 1 to 100"),
        ("sample", "aspect=100000:1", "aspect=100000:1; one side is more than 64 times the other"),
        ("sample", "height=1000000000", "height=1000000000; use at most 8192"),
        ("sample", "images_per_prompt=1000000000", "1000000000 files in one folder"),
        ("sample", "model.max_text_tokens=1000000", "model.max_text_tokens=1000000; use at most 512"),
    ],
)
def test_senseless_numbers_are_refused_with_their_range(
    command: str,
    setting: str,
    message: str,
    place: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(place)
    if setting == f"seed={2**63 - 2}":
        (place / "three.txt").write_text("a\nb\nc\n")
    name = "three.txt" if setting == f"seed={2**63 - 2}" else "prompts.csv"
    base = [f"prompts={name}", "out=out"] if command == "generate" else ["adapter=null", "folder=new"]
    assert outcome(command, ["model=shapes", *base, setting], monkeypatch) == "refused"
    told = capfd.readouterr().err
    assert message in told and told.count("\n") == 1


def test_the_prompts_hash_is_that_of_the_whole_list() -> None:
    """Requests are made as they are asked for; jobs that were begun with a list in memory go on."""
    rows = [("a star, ü", None), ("b", 2**40), ("c", None)]
    requests = generate.Requests(rows, 3, 11)
    listed = [[request.prompt, request.seed] for request in requests]
    assert [seed for _, seed in listed] == [11, 12, 13, 2**40, 2**40 + 1, 2**40 + 2, 17, 18, 19]
    import hashlib

    assert requests.hash() == hashlib.sha256(json.dumps(listed, ensure_ascii=False).encode()).hexdigest()
    assert requests[4:6] == [requests[4], requests[5]] and len(requests) == 9
