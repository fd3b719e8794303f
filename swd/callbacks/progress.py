"""Shows the progress of a training: its start, the iteration and the losses, its end."""

from __future__ import annotations

from typing import Any, cast

from lightning import Callback, LightningModule, Trainer

from swd.io.job_log import JobLog, print_line

SHOWN = ("dmd", "mmd", "gan", "fake_score", "discriminator", "x0_mse", "loss")


class Progress(Callback):
    """A bar on a terminal, else a line at the start, about every 30 seconds, and at the end; on standard error.

    Each has the iteration, the rate, the time left and the losses. Loading, which comes before, has a line too.

    Args:
        description: what a step of the bar is called.
    """

    def __init__(self, description: str = "iteration") -> None:
        self.description = description
        self.lines: JobLog | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            print_line(f"loading {source(pl_module)} on {trainer.strategy.root_device}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        title = f"{describe_task(pl_module)} into {trainer.default_root_dir}"
        self.lines = JobLog(
            title, trainer.max_steps, self.description, done=trainer.global_step, shown=trainer.is_global_zero
        )
        self.lines.__enter__()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self.lines is not None:
            self.lines.advance(trainer.global_step - self.lines.place, losses_text(pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close(None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close(exception)

    def _close(self, error: BaseException | None) -> None:
        if self.lines is not None:
            self.lines.__exit__(type(error) if error else None, error, None)
            self.lines = None


def source(task: LightningModule) -> str:
    """The things that a task loads, in words: its model, or "data and network" where it has none."""
    model: Any = getattr(task, "model", None)
    return f"model {model.name}" if model is not None else "data and network"


def describe_task(task: LightningModule) -> str:
    """Task, model, losses and schedule in a few words."""
    text = getattr(task, "deed", "training")
    model, terms, schedule = (cast(Any, getattr(task, name, None)) for name in ("model", "terms", "schedule"))
    if model is not None:
        text += f" {model.name}"
    if terms is not None:
        text += f" with {', '.join(terms)}"
    if schedule is not None:
        first, last = ("x".join(map(str, size)) for size in (schedule.sizes[0], schedule.sizes[-1]))
        text += f", {len(schedule)} steps from {first} to {last} latents,"
    return text


def losses_text(module: LightningModule) -> str:
    """The latest losses in one short line."""
    metrics = getattr(module, "last_metrics", {})
    shown = [name for name in SHOWN if name in metrics] or [
        name for name in metrics if name != "step" and "/" not in name
    ]
    return "  ".join(f"{name} {float(metrics[name]):.4g}" for name in shown)
