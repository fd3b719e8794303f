"""Checks of commands that run before a command, and all that it needs, is imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from omegaconf import DictConfig, OmegaConf

from swd.commands.gpus import checked_gpu
from swd.commands.group_options import check_metrics
from swd.commands.numbers import check_given, check_numbers
from swd.commands.training_keys import check_unread
from swd.config import to_plain
from swd.evaluation.entries import check_row_names, entry_of
from swd.modules.family_names import known_families, unknown_family


def check_entries(cfg: DictConfig) -> None:
    """Raise UserError for an entry of `models` or `metrics` of an evaluation that is none."""
    check_row_names([entry_of(entry)["name"] for entry in to_plain(cfg.models)])
    check_metrics(cfg)


FIRST: Mapping[str, Callable[[DictConfig], object]] = {"encode": check_unread}
"""Checks of a command that come before those of keys and types: of values that others refer to."""
CHECKS: Mapping[str, Callable[[DictConfig], object]] = {"plan": checked_gpu, "evaluate": check_entries}
"""Checks of a command beside those of its numbers. The command repeats them, for those who call it from Python."""


def check_presence(command: str, cfg: DictConfig) -> None:
    """Check that required keys are given, and what the command checks before keys and types.

    Raises:
        UserError: naming the key and the fix.
    """
    check_given(cfg, command)
    if command in FIRST and not any(OmegaConf.is_missing(cfg, key) for key in cfg):
        FIRST[command](cfg)


def check_named_values(command: str, cfg: DictConfig) -> None:
    """Check the values at the root that only this command has, and the model's family.

    Raises:
        UserError: naming the value and the fix.
    """
    check_numbers(cfg, command)
    family = OmegaConf.select(cfg, "model.family")
    if isinstance(family, str) and "." not in family and family not in known_families():
        raise unknown_family(family)
    if command in CHECKS:
        CHECKS[command](cfg)
