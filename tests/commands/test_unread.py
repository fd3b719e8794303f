"""A key on the command line that the command never reads is refused: every command, every group."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from tiny import CONF

from swd import config
from swd.commands import cli
from swd.types import UserError

NEEDED = {
    "train": ["folder=run"],
    "demo": ["folder=run"],
    "sample": ["folder=run"],
    "export": ["to=out"],
    "generate": ["out=out", "prompts=list.txt"],
    "encode": ["out=out", "limit=2"],
    "plan": [],
    "import": ["out=out", "source=list.csv"],
    "evaluate": ["models=[teacher]", "prompts=shapes", "metrics=[shapes_accuracy]"],
    "report": ["folders=[run]"],
    "compare": ["paths=[a,b]"],
    "spectra": ["folder=run", "cache=cache"],
    "dashboard": [],
}
KEYS = {
    "model": "model.rank=3",
    "schedule": "schedule.process=flow",
    "loss": "loss.mmd.weight=2",
    "task": "task.clip=2",
    "data": "data.workers=1",
    "trainer": "trainer.max_steps=3",
    "callbacks": "callbacks.samples.every=3",
    "logger": "logger.name=x",
    "recipe": "recipe.lr=1e-4",
    "sheet": "sample_prompts=[a]",
}
"""One key of every group, by the group."""
TRAINING = frozenset(KEYS)
READ = {
    "train": TRAINING,
    "demo": TRAINING,
    "sample": {"model", "schedule"},
    "export": {"model", "schedule"},
    "generate": {"model"},
    "encode": {"model", "schedule", "data"},
    "plan": {"model", "schedule", "loss", "task", "recipe"},
    "import": set(),
    "evaluate": {"model", "schedule"},
    "report": set(),
    "compare": set(),
    "spectra": {"model", "schedule"},
    "dashboard": set(),
}
"""Groups that a command reads; of the others it must refuse the keys."""


def launch(command: str, given: Sequence[str], run: Callable[[DictConfig], None]) -> None:
    """Start a command from its command line, with `run` in its place; input that it refuses ends with status 2."""
    GlobalHydra.instance().clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[cli.COMMANDS[command][0]], "run", run)
        patch.setattr(sys, "argv", [command, *NEEDED[command], *given])
        try:
            cli.launch(command)
        except SystemExit as error:
            assert error.code == 2
        finally:
            HydraConfig.instance().cfg = None


def refusal(capfd: pytest.CaptureFixture[str], command: str, *given: str) -> str:
    """The message that a command line ends with; the command itself is replaced by its checks."""
    capfd.readouterr()
    module = sys.modules[cli.COMMANDS[command][0]]
    launch(command, given, lambda cfg: module.check(cfg, module.ROOT))
    return capfd.readouterr().err


def refusals(command: str) -> dict[str, str]:
    """The message for the key of each group, empty where it is accepted; the command is composed once for all.

    As Hydra does for `++KEY=VALUE`, the value is set in the composed configuration whether it has the key or not.
    """
    module = sys.modules[cli.COMMANDS[command][0]]
    found: dict[str, str] = {}

    def check_each(cfg: DictConfig) -> None:
        for group, argument in KEYS.items():
            override = OverridesParser.create().parse_override(f"++{argument}")
            changed = copy.deepcopy(cfg)
            OmegaConf.update(changed, override.key_or_group, override.value(), force_add=True)
            found[group] = ""
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(config, "overrides", lambda argument=argument: [f"++{argument}"])
                try:
                    module.check(changed, module.ROOT)
                except UserError as error:
                    found[group] = str(error)

    launch(command, [], check_each)
    return found


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for module, _ in cli.COMMANDS.values():
        __import__(module)


def test_every_group_has_a_key_here() -> None:
    groups = {folder.name for folder in CONF.iterdir() if folder.is_dir()}
    # An experiment overrides the others, a metric has its place in what asks for it, and hydra is not read by commands.
    assert groups - {"experiment", "metric", "hydra"} == set(KEYS) and set(NEEDED) == set(READ) == set(cli.COMMANDS)


@pytest.mark.parametrize("command", list(NEEDED))
def test_keys_of_groups(command: str) -> None:
    messages = refusals(command)
    assert set(messages) == set(KEYS)
    assert {group for group, message in messages.items() if message == ""} == READ[command]
    for message in filter(None, messages.values()):
        assert "\n" not in message and ("unknown key" in message or "is read by nothing here" in message)


@pytest.mark.parametrize("command", list(NEEDED))
def test_the_command_line_ends_so(capfd: pytest.CaptureFixture[str], command: str) -> None:
    assert refusal(capfd, command, *(f"++{KEYS[group]}" for group in READ[command])) == ""
    for group in sorted(set(KEYS) - set(READ[command]))[:1]:
        message = refusal(capfd, command, f"++{KEYS[group]}")
        assert message.startswith("error: ") and message.count("\n") == 1
        assert "unknown key" in message or "is read by nothing here" in message


@pytest.mark.parametrize(
    ("command", "given", "refused"),
    [
        ("encode", ["recipe.lr=1"], "recipe.lr"),
        ("encode", ["recipe.iterations=1"], "recipe.iterations"),
        ("encode", ["recipe.checkpointing=true"], "recipe.checkpointing"),
        ("train", ["task=flow", "task.out=x", "recipe.lr=1"], "recipe.lr"),
        ("train", ["task=flow", "task.out=x", "recipe.iterations=1"], None),
        ("train", ["task=flow", "task.out=x", "loss.mmd.weight=2"], "loss.mmd.weight"),
        ("train", ["task=flow", "task.out=x", "schedule.sizes=[8]"], None),
        ("train", ["task=flow", "task.out=x", "schedule.sigmas=[1]"], "schedule.sigmas"),
        ("train", ["task=vae", "model.rank=3"], "model.rank"),
        ("train", ["task=vae", "++model.rank=3"], "model.rank"),
        ("train", ["task=vae", "model=shapes"], None),
        ("train", ["task.lr=1e-3", "recipe.lr=1e-4"], "recipe.lr"),
        ("train", ["experiment=paper_sdxl", "recipe.lr=1e-4"], "recipe.lr"),
        ("train", ["callbacks=none", "sample_prompts=[a]"], "sample_prompts"),
        ("train", ["~loss.gan"], None),
    ],
)
def test_a_key_is_read_where_something_refers_to_it(
    capfd: pytest.CaptureFixture[str],
    command: str,
    given: list[str],
    refused: str | None,
) -> None:
    message = refusal(capfd, command, *given)
    assert message.startswith(f"error: {refused} is read by nothing here") if refused else message == ""


@pytest.mark.parametrize(
    ("command", "given", "words"),
    [
        ("encode", ["data=webdataset", "data.path=x", "data.max_bad=0.5"], "data.max_bad is of a training; here it is"),
        ("encode", ["data=webdataset", "data.path=x", "data.window=2"], "data.window is of a training; remove it"),
        ("encode", ["data.endless=false"], "data.endless is of a training; remove it"),
        ("encode", ["data.seed=2"], "data.seed is of a training; here it is seed=VALUE"),
        ("sample", ["adapter=null", "schedule.sigmas=[1]"], "schedule.sigmas is of a student"),
    ],
)
def test_keys_of_a_part_that_is_not_read(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], command: str, given: list[str], words: str
) -> None:
    monkeypatch.setattr(sys, "argv", [command, *NEEDED[command], *given])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit):
        cli.launch(command)
    assert words in capfd.readouterr().err
    HydraConfig.instance().cfg = None
