"""A progress bar that counts iterations and names each loss."""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer
from rich import progress as bars
from rich.console import Console

SHOWN = ("dmd", "mmd", "gan", "fake_score", "discriminator", "x0_mse", "loss")


class Progress(Callback):
    """Live bar on standard error: iteration, time left, each loss. Without a terminal, a line every so often.

    Args:
        description: what the bar is called.
        lines: how many lines are printed where there is no terminal.
    """

    def __init__(self, description: str = "iteration", lines: int = 10) -> None:
        self.description, self.lines = description, lines
        self.console = Console(stderr=True)
        self.bar: bars.Progress | None = None
        self._shown = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._shown = trainer.global_step  # of a resumed run: known, without losses
        if not trainer.is_global_zero or not self.console.is_terminal:
            return
        self.bar = bars.Progress(
            bars.TextColumn(self.description),
            bars.MofNCompleteColumn(),
            bars.BarColumn(bar_width=20),
            bars.TimeElapsedColumn(),
            bars.TextColumn("left"),
            bars.TimeRemainingColumn(),
            bars.TextColumn("{task.fields[losses]}"),
            console=self.console,
            transient=False,
        )
        self.bar.start()
        self.task = self.bar.add_task("train", total=trainer.max_steps, completed=trainer.global_step, losses="")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if not trainer.is_global_zero or step in (0, self._shown):
            return
        self._shown = step
        if self.bar is not None:
            self.bar.update(self.task, completed=step, losses=losses_text(pl_module))
        elif step % max(1, trainer.max_steps // self.lines) == 0:
            print(f"{self.description} {step}/{trainer.max_steps}  {losses_text(pl_module)}", flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.bar is not None:
            self.bar.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.bar is not None:
            self.bar.stop()


def losses_text(module: LightningModule) -> str:
    """The latest losses in one short line."""
    metrics = getattr(module, "last_metrics", {})
    shown = [name for name in SHOWN if name in metrics] or [name for name in metrics if name != "step"]
    return "  ".join(f"{name} {float(metrics[name]):.4g}" for name in shown)
