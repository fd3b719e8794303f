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
CASES = {
    "commands": ["--help"],
    "version": ["--version"],
    "unknown command": ["trian"],
    **{f"{command} help": [command, "--help"] for command in cli.COMMANDS},
    "help with an option": ["train", "model=shapes", "-h"],
    "configuration": ["train", "--cfg", "job"],
    "completion": ["train", "-sc", "install=bash"],
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
}
WRONG = (
    "unknown command",
    "key",
    "key of another program",
    "group",
    "option",
    "no key",
    "key of another command",
    "new key",
    "new key of a group",
    "new key of a callback",
    "value",
    "value of a choice",
    "value of a loss",
    "value at the root",
    "value of a model",
    "name of a GPU",
    "name of a family",
    "name of a metric",
)
"""Cases that end with one line about what is wrong."""
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
