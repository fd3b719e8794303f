"""Watches a distillation for the faults that ruin most of them; one sentence says what is wrong and what to try."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from swd.io import limits
from swd.losses.base import Metrics
from swd.modules.checkpoint_files import damage, iterations
from swd.modules.distiller import Distiller, Observer
from swd.modules.inputs import Inputs
from swd.modules.layouts import local_part
from swd.types import Role, UserError

WINDOW = 10
"""Iterations that the speed of weights is a median of."""
TOO_FAST = 0.02
"""Relative change of the student's weights in one iteration: a fiftieth. AdamW moves each weight by about the learning
rate, and LoRA's first weights are about 1/rank: 0.0003 at the paper's values (5e-6, rank 64), 0.006 on shapes (2e-4,
rank 32), 0.03 and 0.6 with a hundred times the rate."""
FROZEN = 1e-3
"""Change of the critic's weights over that of the student's below which the critic stands still; a healthy one changes
as much or more, having more updates."""
VISITS = 5
"""Iterations at each step of the schedule that the spread of predictions is a median of."""
COLLAPSED = 0.6
"""Share of the spread at the start of a run below which the student has collapsed; healthy trainings on shapes stay
above 0.8 of it."""
ALIKE = 0.99
"""Similarity over seeds above which drawings are the same picture; in healthy trainings on shapes 0.55 to 0.95."""
SAMPLE = 2**16
"""Weights of each role that are looked at."""
NAMES: Mapping[Role, str] = {"student": "monitor/weight_change_student", "fake": "monitor/weight_change_critic"}


class Sentinel(Callback):
    """Warns of a frozen critic, a learning rate that is far too high, broken data and a collapsed student.

    Each is noticed within so many iterations of its beginning, N being the number of steps of the schedule:

    * an update that was skipped, as one on data with NaN is: 1;
    * weights that move too fast, as with a hundred times the learning rate: 10;
    * a critic that does not learn beside its student: 10;
    * predictions that spread less than 0.6 of what they did at first: 5 N after they fell that far;
    * drawings of one prompt that are all alike: 3 probes of `Monitor`, if that runs.

    A warning is repeated after a hundred iterations if its reason is still there. All processes see the same numbers
    and decide alike. It logs `monitor/weight_change_student` and `monitor/weight_change_critic`.

    Args:
        rollback: go back to the last good checkpoint when weights move too fast or the student collapses: weights and
            optimizers are those of the checkpoint, learning rates are lowered, and iterations go on counting, so that
            data and draws are new ones.
        rollbacks: how often a run may do so; the next time it ends.
        lower_lr: factor on all learning rates at each.

    Raises:
        UserError: for numbers out of range.
    """

    def __init__(self, rollback: bool = False, rollbacks: int = 3, lower_lr: float = 0.1) -> None:
        limits.number("callbacks.sentinel.rollbacks", rollbacks, least=1)
        limits.number("callbacks.sentinel.lower_lr", lower_lr, above=0)
        if lower_lr > 1:
            raise UserError(f"callbacks.sentinel.lower_lr={lower_lr}; use a number above 0 and at most 1")
        self.rollback = rollback
        self.rollbacks = rollbacks
        self.lower_lr = lower_lr
        self._done = 0
        self._skipped = 0.0
        self._start: dict[int, list[float]] = {}
        self._warned: dict[str, int] = {}
        self._observer: Observer | None = None
        self._forget()

    def _forget(self) -> None:
        """Forget what is known of weights and predictions as they were, at the start and after going back."""
        self._weights: dict[Role, Tensor] = {}
        self._moves: dict[Role, deque[float]] = {}
        self._recent: dict[int, deque[float]] = {}
        self._alike: deque[float] = deque(maxlen=3)

    # Checkpoints: a resumed run compares with the start of the whole one

    def state_dict(self) -> dict[str, Any]:
        """State that a resumed run cannot observe again."""
        return {
            "moves": {role: list(values) for role, values in self._moves.items()},
            "recent": {step: list(values) for step, values in self._recent.items()},
            "start": {step: list(values) for step, values in self._start.items()},
            "alike": list(self._alike),
            "warned": dict(self._warned),
            "skipped": self._skipped,
            "rollbacks": self._done,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._moves = {role: deque(values, maxlen=WINDOW) for role, values in state_dict["moves"].items()}
        self._recent = {step: deque(values, maxlen=VISITS) for step, values in state_dict["recent"].items()}
        self._start = {step: list(values) for step, values in state_dict["start"].items()}
        self._alike = deque(state_dict["alike"], maxlen=3)
        self._warned = dict(state_dict["warned"])
        self._skipped = state_dict["skipped"]
        self._done = state_dict["rollbacks"]

    # Looking

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(pl_module, Distiller):
            self._look_at_weights(pl_module)
            self._observer = partial(self._changes, pl_module)
            pl_module.observers.append(self._observer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(pl_module, Distiller) and self._observer in pl_module.observers:
            pl_module.observers.remove(self._observer)

    def _look_at_weights(self, task: Distiller) -> None:
        self._weights = {role: sampled_weights(role, task) for role in task.roles}

    def _changes(self, task: Distiller, inputs: Inputs) -> Metrics:
        """Relative change of the weights of both roles in the iteration that ends."""
        before = self._weights
        self._look_at_weights(task)
        change = {role: (self._weights[role] - before[role]).norm() for role in task.roles}
        return {NAMES[role]: change[role] / before[role].norm().clamp(min=1e-30) for role in task.roles}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if not isinstance(pl_module, Distiller):
            return
        found = [
            self._skips(pl_module),
            *self._speeds(pl_module),
            self._spread(pl_module),
            self._seeds(pl_module),
        ]
        for finding in found:
            if finding is not None and self._act(trainer, pl_module, *finding):
                return  # what else was found is of weights that are gone

    def _skips(self, task: Distiller) -> tuple[str, str] | None:
        """A finding is its name and the sentence that says what it is and what to try."""
        total = task.bad_steps.total
        fresh = total - self._skipped
        self._skipped = total
        if fresh < 1:
            return None
        return "skipped", (
            f"{fresh:g} update(s) of this iteration were skipped ({total} in all), since their data, loss or gradient "
            "were not finite or exploded: look for broken data at the place that the warning before names"
        )

    def _speeds(self, task: Distiller) -> list[tuple[str, str] | None]:
        """How fast the weights of both roles move."""
        for role in task.roles:
            self._moves.setdefault(role, deque(maxlen=WINDOW)).append(float(task.last_metrics[NAMES[role]]))
        student = median(self._moves["student"])
        if len(self._moves["student"]) < WINDOW:
            return []
        return [self._too_fast(student, task), self._frozen(student, task)]

    def _too_fast(self, student: float, task: Distiller) -> tuple[str, str] | None:
        if student <= TOO_FAST:
            return None
        return "fast", (
            f"the student's weights change by {student:.1%} in each iteration, so the learning rate is far too high: "
            f"try task.lr={task.lr * TOO_FAST / 10 / student:.1g}"
        )

    def _frozen(self, student: float, task: Distiller) -> tuple[str, str] | None:
        if "fake" not in task.roles or student == 0:
            return None
        critic = median(self._moves["fake"])
        if critic >= FROZEN * student:
            return None
        return "frozen", (
            f"the critic's weights change by {critic / student:.1e} of what the student's do, so it does not follow "
            f"the student and the loss leads nowhere: try task.critic_lr={task.lr:.3g} (it is {task.critic_lr:.3g}), "
            "and look at what is frozen"
        )

    def _spread(self, task: Distiller) -> tuple[str, str] | None:
        metrics = task.last_metrics
        value = metrics.get("monitor/x0_spread", metrics.get("monitor/x0_std"))
        if value is None:  # the update was skipped
            return None
        step = task.steps[(task.global_step - 1) % len(task.steps)]
        recent = self._recent.setdefault(step, deque(maxlen=VISITS))
        recent.append(float(value))
        start = self._start.setdefault(step, [])
        if len(start) < VISITS:
            start.append(float(value))
            return None
        share = median(recent) / max(median(start), 1e-12)
        if len(recent) < VISITS or share >= COLLAPSED:
            return None
        return "collapsed", (
            f"the student's predictions at step {step + 1} of the schedule spread {share:.2f} of what they did at the "
            "start of the run, so it collapses to one picture: try more task.critic_updates, a lower task.lr, or a "
            "term that compares with data (loss=dmd_mmd)"
        )

    def _seeds(self, task: Distiller) -> tuple[str, str] | None:
        value = task.last_metrics.get("monitor/similarity")
        if value is not None:
            self._alike.append(float(value))
        if value is None or len(self._alike) < 3 or min(self._alike) <= ALIKE:
            return None
        return "alike", (
            f"drawings of one prompt with several seeds are alike (similarity {float(value):.3f}), so the student "
            "ignores its noise: try a lower loss.dmd.guidance_scale, or a term that compares with data (loss=dmd_mmd)"
        )

    # Acting

    def _act(self, trainer: Trainer, task: Distiller, name: str, sentence: str) -> bool:
        """Warn, and go back where that is asked for; whether it went back."""
        iteration = trainer.global_step
        back = self.rollback and name in ("fast", "collapsed", "alike")
        if not back and iteration - self._warned.get(name, -100) < 100:
            return False
        self._warned[name] = iteration
        if trainer.is_global_zero:
            warnings.warn(f"iteration {iteration}: {sentence}", stacklevel=2)
        if back:
            self._go_back(trainer, task, sentence)
        return back

    def _go_back(self, trainer: Trainer, task: Distiller, sentence: str) -> None:
        """Load weights and optimizers of the newest good checkpoint that is older than the fault, with lower rates.

        Raises:
            UserError: if there is none, or the run has gone back often enough.
        """
        ended = f"training stopped at iteration {trainer.global_step}: {sentence}; "
        if self._done >= self.rollbacks:
            raise UserError(f"{ended}it went back {self._done} times already (callbacks.sentinel.rollbacks)")
        before = trainer.global_step - max(WINDOW, VISITS * len(task.steps))
        path = trainer.strategy.broadcast(good_checkpoint(trainer, task, before))
        if path is None:
            raise UserError(f"{ended}no checkpoint of iteration {before} or before is there to go back to; see above")
        self._done += 1
        restore_task(task, trainer.strategy.load_checkpoint(path), self.lower_lr**self._done)
        self._forget()
        self._look_at_weights(task)
        if trainer.is_global_zero:
            warnings.warn(
                f"went back to the weights and optimizers of {path}, with learning rates times "
                f"{self.lower_lr**self._done:g}; iterations go on from {trainer.global_step} ({self._done} of "
                f"{self.rollbacks})",
                stacklevel=2,
            )


def sampled_weights(role: Role, task: Distiller) -> Tensor:
    """A copy of up to `SAMPLE` weights of a role, spread over its layers; on each process those that it holds."""
    parameters = task.networks.role_parameters(role)
    each = max(SAMPLE // max(len(parameters), 1), 1)
    return torch.cat([local_part(p).detach().flatten()[:each].float() for p in parameters])


def good_checkpoint(trainer: Trainer, task: Distiller, before: int) -> str | None:
    """The newest checkpoint of this run, or the one that it goes on from, of iteration `before` or earlier; checked."""
    written = (Path(trainer.default_root_dir) / "checkpoints").glob("iteration-*.ckpt")
    known: Iterable[Path] = [*written, *([Path(trainer.ckpt_path)] if trainer.ckpt_path else [])]
    fitting = sorted((iterations(path), path) for path in known if damage(path, task) is None)
    return next((str(path) for done, path in reversed(fitting) if done <= before), None)


def restore_task(task: Distiller, checkpoint: Mapping[str, Any], factor: float) -> None:
    """Give a task that trains the weights and optimizers of a checkpoint; its counts stay.

    Args:
        task: the distillation.
        checkpoint: of the same configuration, as `Checkpoint` writes it.
        factor: on the configured learning rates.
    """
    strategy = task.trainer.strategy  # which knows how weights lie on processes
    strategy.load_model_state_dict(checkpoint, strict=False)
    strategy.load_optimizer_state_dict(checkpoint)
    rates = (task.lr, task.critic_lr)
    for optimizer, rate in zip(task.trainer.optimizers, rates, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
