"""Random command lines: each ends in a run or in one clear line, never in a traceback, never without end."""

from __future__ import annotations

import random
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from swd.commands import cli
from swd.modules.adapters import save_adapter
from swd.modules.pretrained import Pretrained

SECONDS = 60
"""After so many a case counts as one that never ends."""


class Accepted(Exception):
    """Everything was checked, and weights would be loaded now."""


class Endless(Exception):
    """A case took too long."""


VALUES = (
    *(
        "null",
        "true",
        "0",
        "1",
        "2",
        "-1",
        "0.5",
        "1e30",
        "-1e-9",
        "inf",
        "-inf",
        "nan",
        "99999999999999999999",
        "1e400",
    ),
    *("''", "x", "auto", "a/b", "../x", "/nowhere/x", "swd://assets/nope", "someone/nothing", "'a b'", "a b", "'1:1'"),
    *("[]", "[1]", "[1,2]", "[a]", "[null]", "[[1,2],[3]]", "[0.1,0.9]", "[1.0,0.5,0.1]", "{}", "{a:1}", "{a:{b:[c]}}"),
    *(
        "${seed}",
        "${nope}",
        "${oc.env:NOT_THERE}",
        "${oc.env:HOME}",
        "???",
        "os.system",
        "builtins.dict",
        "étoile",
        "a=b",
    ),
    *("[a", "it's", "a!", "(", "1e5", "int8", "bf16", "full", "fake", "cpu", "tpu", "16-mixed"),
)
GROUPS = ("task", "model", "schedule", "loss", "data", "trainer", "callbacks", "logger", "experiment")
OPTIONS = (
    "null",
    "none",
    "default",
    "nope",
    "shapes",
    "judge",
    "images",
    "mmd",
    "vae",
    "flow",
    "shapes_vae",
    "csv",
    "[]",
    "5",
)
ADDED = ("trainer.precision", "trainer.limit_train_batches", "trainer.max_epochs", "trainer.fast_dev_run")
ADDED += ("trainer.max_time", "trainer.profiler", "trainer.gradient_clip_val", "trainer.overfit_batches", "nothing")
ADDED += ("model._args_", "task._partial_", "callbacks.mine._target_", "logger.api_key", "callbacks.samples.seed")
COMMANDS = ("sample", "generate", "encode", "import", "export", "evaluate")


def argument(dice: random.Random, keys: list[str]) -> str:
    """One random argument of a command line."""
    kind = dice.random()
    if kind < 0.7:
        return f"{dice.choice(keys)}={dice.choice(VALUES)}"
    if kind < 0.8:
        return f"{dice.choice(GROUPS)}={dice.choice(OPTIONS)}"
    if kind < 0.9:
        return f"{dice.choice(['+', '++'])}{dice.choice(ADDED)}={dice.choice(VALUES)}"
    if kind < 0.95:
        return f"~{dice.choice(keys)}"
    return dice.choice(["=", "x", "+", "~", "a b=c", "-x", "+experiment=x", "loss=mmd,dmd", "name='a", "{}", "--nope"])


@pytest.fixture
def run_case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path, capfd: Any) -> Iterator[Any]:
    def accepted(*args: object, **kwargs: object) -> None:
        raise Accepted

    def endless(*args: object) -> None:
        raise Endless(f"no end after {SECONDS} s")

    model = Pretrained("sd3", str(tiny_model), rank=4, precision="fp32", feature_blocks=[1], max_text_tokens=12)
    state = model.networks(["student"]).adapter_state("student")
    save_adapter(tmp_path / "adapter", state, 4, 4, tiny.build_schedule().scheduler(2), "tiny", "transformer")
    for name in ("networks", "network", "encoders", "pipeline", "fetch"):
        monkeypatch.setattr(Pretrained, name, accepted)
    monkeypatch.setattr("lightning.Trainer.fit", accepted)
    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGALRM, endless)
    Path("p.txt").write_text("a red star\n")
    base = {
        "train": tiny.overrides(tiny_model, Path("run"), callbacks="default"),
        "sample": ["adapter=null", "folder=run"],
        "export": ["run=adapter", "to=out", f"model.path={tiny_model}", "model.size=8"],
        "generate": ["prompts=p.txt", "out=out"],
        "encode": ["limit=2", "out=out"],
        "import": ["source=.", "out=out"],
        "evaluate": [f"model.path={tiny_model}", "models=[teacher]", "prompts=shapes", "n=2", "metrics=[shapes_exact]"],
    }

    def run(command: str, arguments: list[str]) -> None:
        for folder in ("run", "out"):
            shutil.rmtree(folder, ignore_errors=True)
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = None
        monkeypatch.delenv("SWD_COMMAND", raising=False)
        monkeypatch.setattr(sys, "argv", [f"{command}.py", *base[command], *arguments])
        capfd.readouterr()
        code: Any = 0
        signal.alarm(SECONDS)
        try:
            cli.launch(command)
        except Accepted:
            pass
        except SystemExit as stop:
            code = stop.code
        finally:
            signal.alarm(0)
        if code:
            # A list is read, which says so, before it can be refused.
            told = ("warning: ", "list the files below ", "list the pictures of ", "list the samples of ", "done: ")
            lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith(told)]
            assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (code, lines[-5:])

    yield run
    signal.signal(signal.SIGALRM, before)
    HydraConfig.instance().cfg = None


def cases(command: str, first: int, count: int) -> Iterator[list[str]]:
    """Argument lists, each from a seed of its own: a failure is repeated by its number."""
    keys = tiny.keys_of(OmegaConf.to_container(tiny.composed([], command), resolve=False))
    for number in range(first, first + count):
        dice = random.Random(f"{command}/{number}")
        yield [argument(dice, keys) for _ in range(dice.choice((1, 1, 1, 2, 3)))]


def try_all(run: Any, command: str, first: int, count: int) -> None:
    failures = []
    for arguments in cases(command, first, count):
        try:
            run(command, arguments)
        except BaseException as error:  # every failure is wanted, not the first one
            if isinstance(error, KeyboardInterrupt):
                raise
            failures.append(f"swd {command} {arguments}: {type(error).__name__}: {str(error)[:300]}")
    assert not failures, "\n" + "\n".join(failures)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("command", ["train", *COMMANDS])
def test_a_few_random_command_lines(run_case: Any, command: str) -> None:
    try_all(run_case, command, 0, 8 if command == "train" else 3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(6))
def test_300_random_command_lines_of_train(run_case: Any, part: int) -> None:
    try_all(run_case, "train", 50 * part, 50)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("command", COMMANDS)
def test_100_random_command_lines_of_the_others(run_case: Any, command: str) -> None:
    try_all(run_case, command, 0, 100)
