"""Help, shell completion and messages about wrong keys import neither torch nor what stands on it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra

from swd.commands import cli

LARGE = ("torch", "lightning", "diffusers", "transformers", "torchmetrics", "peft")
"""Packages that take a second or more to import, or stand on one that does."""
RIGHT = {
    "commands": ["--help"],
    "version": ["--version"],
    **{f"{command} help": [command, "--help"] for command in cli.COMMANDS},
    "help with an option": ["train", "model=shapes", "-h"],
    "configuration": ["train", "--cfg", "job"],
    "completion": ["train", "-sc", "install=bash"],
}
EVALUATE = ["evaluate", "prompts=shapes", "metrics=[kid]"]
NAMED = {
    "batch_size=0; use at least 1": ["sample", "batch_size=0"],
    "height=0; use at least 1": ["sample", "height=0"],
    "guidance_scale=0.5; use 1 to 100, 1 for none": ["generate", "out=x", "prompts=y", "guidance_scale=0.5"],
    "max_bad=2.0; use 0 to 1, a share of the samples": ["encode", "out=x", "max_bad=2.0"],
    "batch_size=-1; use at least 1": ["encode", "out=x", "batch_size=-1"],
    "data.max_bad is of a training; here it is max_bad=VALUE": ["encode", "out=x", "data=webdataset", "data.max_bad=1"],
    "levels=[0.5, 1.5]; use numbers between 0 (clean) and 1 (pure noise)": ["spectra", "cache=x", "levels=[0.5,1.5]"],
    "n_pictures=1; use at least 2": ["demo", "n_pictures=1"],
    "timing.runs=0; use at least 1": [*EVALUATE, "models=[teacher]", "timing.runs=0"],
    "models: steps of teacher=0; use at least 1": [*EVALUATE, "models=[{model: teacher, steps: 0}]"],
    "models: two are called teacher": [*EVALUATE, "models=[teacher, teacher]"],
    "model.rank=0; use 1 or more": ["train", "model.rank=0"],
    "model.alpha=-1; use 0.001 to 1e+06, null for alpha = rank": ["sample", "model.alpha=-1"],
    "model.drawing_guidance_scale=0.5; use 1 to 100, 1 for none": [
        "generate",
        "out=x",
        "prompts=y",
        "model.drawing_guidance_scale=0.5",
    ],
    "task.clip=0; use a number above 0": ["train", "task.clip=0"],
    "task.accumulate=0; use 1 or more": ["train", "task.accumulate=0"],
    "loss.mmd.bandwidth=0; use a number above 0": ["train", "loss.mmd.bandwidth=0"],
    "prompts is missing; give prompts=prompts.csv": ["generate", "out=x"],
    "to is missing; give to=FOLDER": ["export"],
}
"""Values that one command alone checks, by the beginning of the line that it says about them."""
WRONG = {
    "unknown command": ["trian"],
    "key": ["train", "model.rnak=3"],
    "key of another program": ["train", "checkpoint=x"],
    "group": ["train", "lsos=mmd"],
    "option": ["sample", "model=shaeps"],
    "no key": ["train", "model"],
    "key of another command": ["report", "steps=3"],
    "new key": ["train", "+key=1"],
    "new key of a group": ["train", "+model.rnak=3"],
    "new key of a callback": ["train", "+callbacks.samples.evry=3"],
    "value": ["train", "trainer.max_steps=abc"],
    "value of a choice": ["demo", "task.on_bad_step=stpo"],
    "value of a loss": ["train", "loss.mmd.weight=heavy"],
    "value at the root": ["sample", "batch_size=eight"],
    "value of a model": ["generate", "model.rank=[1,2]", "out=x", "prompts=y"],
    "name of a GPU": ["plan", "gpu=h10"],
    "name of a family": ["sample", "model.family=sd4"],
    "name of a metric": ["evaluate", "models=[teacher]", "prompts=shapes", "metrics=[fidd]"],
    **NAMED,
}
"""Cases that end with one line about what is wrong."""
CASES = RIGHT | WRONG
WORKER = """
import json, os, sys
cases, large, folder = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
for number, arguments in enumerate(cases):
    child = os.fork()
    if child == 0:
        out = open(f"{folder}/{number}.txt", "w")
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        sys.argv = ["swd", *arguments]
        code = 0
        try:
            from swd.commands.cli import main
            main()
        except SystemExit as end:
            code = end.code or 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
        loaded = [name for name in large if name in sys.modules]
        with open(f"{folder}/{number}.json", "w") as file:
            json.dump({"code": code, "loaded": loaded}, file)
        os._exit(0)
    os.waitpid(child, 0)
"""
"""Runs each command line in a fork of an interpreter that has imported nothing yet."""


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """For each case its exit status, its output, and which large packages it imported."""
    folder = tmp_path_factory.mktemp("launches")
    arguments = [json.dumps(list(CASES.values())), json.dumps(LARGE), str(folder)]
    subprocess.run([sys.executable, "-c", WORKER, *arguments], check=True, cwd=folder)
    return {
        name: json.loads((folder / f"{i}.json").read_text()) | {"text": (folder / f"{i}.txt").read_text()}
        for i, name in enumerate(CASES)
    }


@pytest.mark.parametrize("case", CASES)
def test_nothing_large_is_imported(launches: dict[str, dict[str, Any]], case: str) -> None:
    launch = launches[case]
    assert launch["loaded"] == [], launch["text"]
    assert launch["code"] == (2 if case in WRONG else 0), launch["text"]
    assert launch["text"].startswith("error: ") == (case in WRONG), launch["text"]


@pytest.mark.parametrize("case", NAMED)
def test_a_value_is_named_with_the_way_out(launches: dict[str, dict[str, Any]], case: str) -> None:
    assert launches[case]["text"].startswith(f"error: {case}")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_is_the_text_that_hydra_prints(
    command: str,
    launches: dict[str, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", [command, "--help", "hydra.verbose=false"])  # an override: Hydra composes
    with pytest.raises(SystemExit) as end:
        cli.launch(command)
    assert not end.value.code
    assert capfd.readouterr().out == launches[f"{command} help"]["text"]


def test_an_installed_package_has_its_configuration_beside_its_modules() -> None:
    assert Path(cli.__file__).parents[1] / "conf" == cli.INSTALLED
