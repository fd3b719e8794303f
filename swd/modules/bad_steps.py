"""Updates that must not reach the weights: how they are recognised, what is done about them, and their number."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from lightning import Trainer
from torch import Tensor

from swd.io import limits
from swd.modules.finite import Stepped, failed_checks, last_checkpoint, stop_text
from swd.types import Checks, UserError

Action = Literal["skip", "stop"]

HISTORY = 64
"""Gradient norms of one optimizer that the running median is taken over: many times through a schedule."""
ENOUGH = 16
"""Norms after which the median counts: every step of a schedule was there more than twice."""


@dataclass(frozen=True)
class BadStepRule:
    """Rule for an update whose loss, gradient or data are not finite, or whose gradient explodes.

    Attributes:
        action: "skip" changes no weight and goes on; "stop" ends the run.
        in_a_row: skipped updates of one optimizer in a row after which the run ends.
        in_all: skipped updates of a run after which it ends.
        exploding: a gradient norm above this many times its running median counts as bad too; None: none does.

    Raises:
        UserError: for an action that there is not, or a number out of range.
    """

    action: Action = "skip"
    in_a_row: int = 5
    in_all: int = 100
    exploding: float | None = 100.0

    def __post_init__(self) -> None:
        if self.action not in get_args(Action):
            raise UserError(f"task.on_bad_step={self.action}; use skip or stop")
        for key, value in {"skips_in_a_row": self.in_a_row, "skips_in_all": self.in_all}.items():
            limits.number(f"task.{key}", value, least=1)
        if self.exploding is not None:
            limits.number("task.exploding", self.exploding, above=1)


@dataclass
class _Role:
    """Record of one optimizer's updates.

    Attributes:
        in_a_row: skipped updates since the last good one.
        good: number of good updates.
        norms: gradient norms of the last good updates, in a ring of `HISTORY`; NaN where there is none yet.
    """

    in_a_row: int = 0
    good: int = 0
    norms: Tensor = field(default_factory=lambda: torch.full((HISTORY,), float("nan")))


class BadSteps:
    """Looks at every update before its optimizer steps. The same on all processes, since they decide together.

    Args:
        rule: what is bad, and what is done about it.

    Attributes:
        total: updates skipped so far, over the whole run.
    """

    def __init__(self, rule: BadStepRule) -> None:
        self.rule = rule
        self.total = 0
        self._roles: dict[str, _Role] = {}

    def good(
        self, trainer: Trainer, role: str, norm: Tensor, checks: Checks, place: str, before: Stepped | None = None
    ) -> bool:
        """Whether an update may be made; if not, it is counted.

        Args:
            trainer: of the run.
            role: whose optimizer would step.
            norm: norm of its gradient before clipping, the same on all processes.
            checks: by name whether a value of the update is finite; the same names on all processes.
            place: iteration, step of the schedule and update, for messages.
            before: the last step, if its weights were not looked at; they are, together with the checks.

        Raises:
            UserError: if the rule says that the run ends here, or if the weights of the last step are not finite.
        """
        record = self._roles.setdefault(role, _Role())
        record.norms = record.norms.to(norm.device)
        explosion = self._explosion(record, role, norm)
        failed = failed_checks(trainer, checks | explosion | (before.checks if before else {}))
        if before:
            before.stop_if(trainer, failed)
        if not failed:
            record.norms[record.good % HISTORY] = norm.detach()
            record.good += 1
            record.in_a_row = 0
            return True
        reason = _reason([name for name in failed if name not in explosion], [n for n in failed if n in explosion])
        self._skip(trainer, record, reason, place)
        return False

    def _explosion(self, record: _Role, role: str, norm: Tensor) -> Checks:
        """Whether the norm is not beyond its running median times the rule's factor; empty while there is no median."""
        if self.rule.exploding is None or record.good < ENOUGH:
            return {}
        median = record.norms.nanmedian()
        beyond = norm.isfinite() & (norm > self.rule.exploding * median) & (median > 0)
        return {f"gradient norm of {owner_of(role)} over {self.rule.exploding:g} times its median": ~beyond}

    def _skip(self, trainer: Trainer, record: _Role, reason: str, place: str) -> None:
        """Count a bad update, and end the run where the rule says so."""
        state = "no weight was changed by it"
        if self.rule.action == "stop":
            raise UserError(stop_text(trainer, place, reason, state))
        self.total += 1
        record.in_a_row += 1
        rule = self.rule
        limits = {f"task.skips_in_a_row={rule.in_a_row}": record.in_a_row >= rule.in_a_row}
        limits[f"task.skips_in_all={rule.in_all}"] = self.total >= rule.in_all
        reached = [limit for limit, there in limits.items() if there]
        if reached:
            raise UserError(stop_text(trainer, place, reason, f"{state}, nor by those skipped before ({reached[0]})"))
        if trainer.is_global_zero:
            kept = last_checkpoint(trainer) or "none"
            warnings.warn(
                f"{place} was skipped: {reason}; {state}; skipped so far: {self.total}; last good checkpoint: {kept}; "
                "look for broken data, or try a lower task.lr",
                stacklevel=2,
            )

    # Checkpoints: a resumed run decides as the straight one

    def state_dict(self) -> dict[str, Any]:
        """Counts and running statistics, as plain values and tensors on the CPU."""
        roles = {name: vars(role) | {"norms": role.norms.cpu().clone()} for name, role in self._roles.items()}
        return {"total": self.total, "roles": roles}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take on what `state_dict` gave; an empty one, of a run of version 0.1, starts afresh."""
        self.total = int(state.get("total", 0))
        self._roles = {name: _Role(**values) for name, values in state.get("roles", {}).items()}


def owner_of(role: str) -> str:
    """What an update trains, for messages: `role` is "student" or "fake"."""
    return "the student" if role == "student" else "the critic"


def _reason(broken: list[str], exploding: list[str]) -> str:
    parts = [f"not finite: {', '.join(broken)}"] if broken else []
    return "; ".join([*parts, *(f"exploding: {name}" for name in exploding)])
