"""What a changed setting means for a run that goes on: one table for all keys of the configuration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig

from swd.config import read_recorded, renamed, setting_differences, stored
from swd.types import UserError

Verdict = Literal["refuse", "say", "free"]


@dataclass(frozen=True)
class Rule:
    """What is done where a key differs from the configuration of the run that goes on.

    Attributes:
        keys: patterns of keys, `*` standing for any text; a key stands for all below it.
        verdict: "refuse" ends the command, "say" tells what the change means, "free" says nothing.
        meaning: of the change.
    """

    keys: tuple[str, ...]
    verdict: Verdict
    meaning: str


SECTIONS = ("seed", "model", "schedule", "loss", "data", "task")
"""Parts of the configuration that say which experiment a run is, in the order in which differences are named."""
RULES = (
    Rule(("data.workers", "data.prefetch"), "free", "who loads data ahead changes neither samples nor their order"),
    Rule(
        ("data.max_bad", "data.dataset.max_missing"),
        "free",
        "a run that stopped for too many unreadable samples may go on with more",
    ),
    Rule(("task.checkpointing",), "free", "activations are computed again instead of kept: the numbers are the same"),
    Rule(
        ("task.accumulate", "task.even_parts"),
        "free",
        "the parts of a batch add up to the same gradient, but for rounding",
    ),
    Rule(("task.compiled",), "free", "compiled code computes the same, but for rounding"),
    Rule(("model.attention",), "free", "another kernel computes the same attention, but for rounding"),
    Rule(
        ("task.on_bad_step", "task.skips_in_a_row", "task.skips_in_all", "task.exploding"),
        "free",
        "a good update does not depend on them; a run that they ended may go on with others",
    ),
    Rule(
        ("model.guidance_scale", "model.dmd_guidance_scale", "model.drawing_guidance_scale"),
        "free",
        "training does not read them, since the loss has its own",
    ),
    Rule(("task.model", "task.schedule", "task.loss"), "free", "version 0.1.0 repeated these groups in the task"),
    Rule(
        SECTIONS,
        "refuse",
        "weights, data or losses from here on would be those of another experiment",
    ),
    Rule(
        ("trainer.accumulate_grad_batches", "trainer.gradient_clip_*"),
        "refuse",
        "updates from here on would be those of another experiment",
    ),
    Rule(("trainer.precision",), "say", "numbers are rounded in another way from here on"),
    Rule(
        ("trainer.max_steps",),
        "say",
        "the run ends at another iteration; learning rates that fall towards the end, as those of task=flow, follow it",
    ),
    Rule(("*",), "free", "it changes what a run writes, draws or measures, and no weight"),
)
"""The first rule that fits a key counts. What computes is no setting: `Checkpoint` says it if processes, devices
or versions differ."""
ADDED = {"task.downscale": "direct", "task.frames": "blend", "task.lora": False}
"""Keys that earlier versions lacked, and the value that says what they did."""


def rule_for(key: str) -> Rule:
    """The rule for a key of the configuration, written with dots."""
    above = [key[:end] for end in (*(i for i, letter in enumerate(key) if letter == "."), len(key))]
    return next(rule for rule in RULES if any(fnmatchcase(name, p) for name in above for p in rule.keys))


@dataclass(frozen=True)
class Change:
    """A setting that differs from that of the run that goes on, and its rule."""

    text: str
    rule: Rule

    def __str__(self) -> str:
        return f"{self.text}: {self.rule.meaning}"


def changes(checkpoint: Path, cfg: DictConfig) -> Iterator[Change]:
    """The differences between a configuration and the one beside a checkpoint.

    Raises:
        UserError: if the one beside the checkpoint is missing or damaged.
    """
    file = checkpoint.parent.parent / "config.yaml"
    if not file.is_file():
        raise UserError(f"{file} is missing, so that the settings of {checkpoint.name} cannot be compared; put it back")
    old, new = (comparable(plain) for plain in (read_recorded(file), stored(cfg)))
    sections = sorted(
        {*old, *new}, key=lambda name: (SECTIONS.index(name) if name in SECTIONS else len(SECTIONS), name)
    )
    for section in sections:
        for key, text in setting_differences(old.get(section), new.get(section), section):
            yield Change(text, rule_for(key))


def comparable(plain: dict[str, Any]) -> dict[str, Any]:
    """A recorded configuration with today's keys, without data of their own to validate on, which change no weight."""
    found: dict[str, Any] = renamed(plain)
    for key, value in ADDED.items():
        section, _, name = key.partition(".")
        if isinstance(found.get(section), dict):
            found[section].setdefault(name, value)
    if isinstance(found.get("data"), dict) and not isinstance(found["data"].get("validation"), int | float):
        found["data"].pop("validation", None)
    return found


def config_difference(checkpoint: Path, cfg: DictConfig) -> str | None:
    """The first difference that keeps a run from going on with this configuration; None if it may.

    Raises:
        UserError: if the configuration beside the checkpoint is missing or damaged.
    """
    return next((change.text for change in changes(checkpoint, cfg) if change.rule.verdict == "refuse"), None)


def sayings(checkpoint: Path, cfg: DictConfig) -> list[str]:
    """One line for each other setting whose change means something."""
    return [f"going on with {change}" for change in changes(checkpoint, cfg) if change.rule.verdict == "say"]
