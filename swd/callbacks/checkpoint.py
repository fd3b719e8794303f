"""Checkpoints that hold only what is trained, and finding the one to resume from."""

from __future__ import annotations

import os
import shutil
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig

from swd import __version__
from swd.callbacks.resume_rules import config_difference
from swd.io import limits
from swd.io.files import clear_leftovers
from swd.io.job_log import print_line
from swd.io.ranks import is_first
from swd.modules.adapters import CHECKPOINTS, STUDENTS
from swd.modules.checkpoint_files import CheckpointFiles, Resumable, damage, tensors
from swd.modules.distiller import Distiller
from swd.modules.finite import all_finite, stop_unless_finite
from swd.types import UserError

PACKAGES = ("torch", "diffusers", "peft")
"""Packages whose version may change numbers; a checkpoint records them."""
FOLDERS = (".", CHECKPOINTS, "samples", STUDENTS)
"""Folders that a run writes to, relative to its own."""


class Checkpoint(ModelCheckpoint):
    """Save a checkpoint into `checkpoints/` of the run folder, every so often and at the end.

    A new checkpoint is complete before an old one is deleted, and is not written at all if anything that it would hold,
    or what the networks now predict, is not finite.

    Args:
        every: iterations between checkpoints.
        minutes: and at the end of an iteration, so many minutes after the last one; None: `every` alone counts. The
            clock is the first process's.
        keep: number of checkpoints kept, the newest.

    Raises:
        UserError: for numbers out of range.
    """

    def __init__(self, every: int = 100, minutes: float | None = None, keep: int = 2) -> None:
        if every < 1 or keep < 1:
            raise UserError(f"callbacks.checkpoint: every={every}, keep={keep}; use at least 1 of each")
        if minutes is not None:
            limits.number("callbacks.checkpoint.minutes", minutes, above=0)
        super().__init__(
            filename="iteration-{step}",
            auto_insert_metric_name=False,
            every_n_train_steps=1,  # `on_train_batch_end` decides
            save_top_k=keep,
            monitor="step",
            mode="max",
            save_last=False,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        self.every = every
        self.minutes = minutes
        self.keep = keep
        self._first = 0  # iterations done when this run was started
        self._saved_at = 0.0  # seconds of the clock

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.dirpath = str(Path(trainer.default_root_dir) / CHECKPOINTS)
        if not isinstance(trainer.strategy.checkpoint_io, CheckpointFiles):
            trainer.strategy.checkpoint_io = CheckpointFiles(trainer.strategy.root_device)
        super().setup(trainer, pl_module, stage)

    def state_dict(self) -> dict[str, Any]:
        """Empty: a resumed run has a folder of its own."""
        return {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._first = trainer.global_step
        self._saved_at = time.monotonic()
        self._check_space(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step % self.every == 0 or self._is_time(trainer):
            self.save(trainer)

    def _is_time(self, trainer: Trainer) -> bool:
        """Whether the first process finds that `minutes` have passed; all processes get its answer."""
        if self.minutes is None:
            return False
        passed = trainer.is_global_zero and time.monotonic() - self._saved_at >= 60 * self.minutes
        return trainer.strategy.reduce_boolean_decision(passed, all=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Write a checkpoint of the iterations that are done, unless there is one, in this run or the one it resumes.

        For any callback, on every process, between two iterations: in `on_train_batch_end` or after it.

        Raises:
            UserError: on all processes, if something is not finite or the checkpoint cannot be written.
        """
        if trainer.global_step > self._first:
            super().on_train_batch_end(trainer, trainer.lightning_module, None, None, 0)
            self._saved_at = time.monotonic()
            if trainer.is_global_zero:  # Lightning counts only those that this process wrote
                for old in written(Path(trainer.default_root_dir))[: -self.keep]:
                    old.unlink(missing_ok=True)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note what a run that goes on compares itself with, and count each iteration as done or not begun."""
        checkpoint["made_by"] = made_by(trainer)
        done_is_done(checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say in one line which other processes, devices or versions go on; earlier versions noted none."""
        then = checkpoint.get("made_by", {})
        changed = [
            f"{name} {then[name]}, now {now}" for name, now in made_by(trainer).items() if then.get(name, now) != now
        ]
        if changed and trainer.is_global_zero:
            print_line(
                f"going on where others trained: {'; '.join(changed)}: data, their order and all draws stay the same, "
                "numbers differ by rounding"
            )

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        module = trainer.lightning_module
        kept = module.kept_state() if isinstance(module, Distiller) else module.state_dict()
        moments = tensors([optimizer.state_dict() for optimizer in trainer.optimizers])
        checks = {"weights": all_finite(kept.values()), "optimizer moments": all_finite(moments)}
        if isinstance(module, Distiller):
            checks |= module.predictions()
        place = f"iteration {trainer.global_step}, before its checkpoint"
        stop_unless_finite(trainer, checks, place, "no checkpoint was written or deleted")
        files = cast(CheckpointFiles, trainer.strategy.checkpoint_io)
        with files.failures() as failures:
            super()._save_checkpoint(trainer, filepath)
        # Only the first process writes; all of them must stop, or the others would wait for it.
        failure = trainer.strategy.broadcast(failures[0] if failures else "")
        if failure:
            raise UserError(failure)

    def _check_space(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise UserError if the checkpoints that will lie beside each other do not fit on the disk."""
        remaining = trainer.max_steps // self.every - trainer.global_step // self.every
        remaining += trainer.max_steps % self.every != 0
        count = min(self.keep + 1, remaining)
        each = checkpoint_bytes(pl_module)
        free = trainer.strategy.broadcast(shutil.disk_usage(trainer.default_root_dir).free)
        if count * each > free:
            raise UserError(
                f"{count} checkpoints of {each / 1e9:.3g} GB lie beside each other in {self.dirpath} while one is "
                f"written, and {free / 1e9:.3g} GB are free; make room, give another output=, or lower "
                f"callbacks.checkpoint.keep={self.keep}"
            )


def made_by(trainer: Trainer) -> dict[str, str]:
    """What computes a run: processes and devices, and versions of packages, by name."""
    strategy = trainer.strategy
    layout = f"{trainer.world_size} x {strategy.root_device.type}, {getattr(strategy, 'layout', 'one device')}"
    return {"processes": layout, "swd": __version__} | {name: version(name) for name in PACKAGES}


def written(run: Path) -> list[Path]:
    """The checkpoints in a run's folder, the newest last."""
    found = [file for file in (run / CHECKPOINTS).glob("iteration-*.ckpt") if file.stem.split("-")[1].isdecimal()]
    return sorted(found, key=lambda file: int(file.stem.split("-")[1]))


def done_is_done(checkpoint: dict[str, Any]) -> None:
    """Let the loop's progress end with the last iteration that is done, if the next one has begun; changed in place."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        if counts["ready"] > counts["processed"]:
            counts.update(dict.fromkeys(("ready", "started", "processed"), counts["completed"]))


def checkpoint_bytes(task: LightningModule) -> int:
    """Approximate bytes of a checkpoint of `task`: the weights that it stores, and two moments of each trained one."""
    trained = sum(p.numel() * p.element_size() for p in task.parameters() if p.requires_grad)
    if isinstance(task, Distiller):
        average = [] if task.average is None else task.average.parameters()
        return 3 * trained + sum(p.numel() * p.element_size() for p in average)
    return 2 * trained + sum(value.numel() * value.element_size() for value in task.state_dict().values())


def find_checkpoint(resume: str | None, runs: Path, cfg: DictConfig, task: Resumable | None = None) -> str | None:
    """The checkpoint to continue from.

    A damaged one is set aside by the first process, as NAME.damaged, and the one before it is taken; one that was named
    is an error.

    Args:
        resume: None: start afresh; "auto": the newest valid one under `runs`, if any; else a file or a run folder.
        runs: folder of the runs of this name.
        cfg: the configuration of this run, which must agree with the checkpoint's.
        task: the task to resume, which knows the entries of a complete checkpoint.

    Raises:
        UserError: if a named checkpoint is missing or damaged, belongs to another configuration, or cannot be compared.
    """
    # What `resume` asks for.
    if resume is None:
        return None
    if not resume:
        raise UserError("resume= is empty; give a .ckpt file, a run folder, auto, or null to start afresh")
    auto = resume == "auto"
    passed: list[str] = []
    reason = ""

    # The newest checkpoint of this configuration that is whole.
    for path in _candidates(runs if auto else Path(resume)):
        try:
            difference = config_difference(path, cfg)
        except UserError as error:
            if not auto:
                raise UserError(f"resume={resume}: {error}") from None
            warnings.warn(f"{path.parent.parent} was passed over: {error}", stacklevel=2)
            continue
        if difference is not None:
            if not auto:
                raise UserError(f"resume={resume} was made with another configuration: {difference}")
            passed.append(f"{path.parent.parent}: {difference}")
            continue
        reason = damage(path, task) or ""
        if not reason:
            return str(path)
        if path != Path(resume):
            pass_over(path, reason)

    # There is none.
    if not auto:
        why = f" ({reason})" if reason else ""
        raise UserError(f"resume={resume} holds no valid checkpoint{why}; give a .ckpt file, a run folder, or auto")
    if passed:
        warnings.warn(f"resume=auto starts afresh: no run has this configuration ({passed[0]})", stacklevel=2)
    return None


def pass_over(path: Path, reason: str) -> None:
    """Warn of a damaged checkpoint, which is set aside; nothing if its run, which lives, has deleted it meanwhile."""
    if path.exists():
        aside = set_aside(path) if is_first() else ""
        warnings.warn(f"{path} is damaged ({reason}) and was passed over{aside}", stacklevel=3)


def set_aside(path: Path) -> str:
    """Rename a damaged checkpoint, so that nothing takes it again; the new name for a message, empty if it cannot be.

    A file that cannot be opened at all stays: that may be a matter of permissions, or of a disk that will be back.
    """
    taken = (path.with_name(f"{path.name}.damaged{end}") for end in ("", *(f".{n}" for n in range(2, 100))))
    target = next((name for name in taken if not name.exists()), None)
    try:
        with open(path, "rb") as stream:
            stream.read(1)
        if target is not None:
            os.rename(path, target)
            return f"; it is {target.name} now"
    except OSError:
        pass
    return ""


def _candidates(root: Path) -> list[Path]:
    """`root` if it is a file, else the checkpoints of the runs in it, the newest first."""
    if root.is_file():
        return [root]
    found = []
    for path in (file for run in run_folders(root) for file in (run / CHECKPOINTS).glob("*.ckpt")):
        try:
            found.append((path.stat().st_mtime_ns, path))
        except OSError:  # deleted meanwhile by the run that it belongs to
            continue
    return [path for _, path in sorted(found, reverse=True)]


def run_folders(root: Path) -> list[Path]:
    """The folders of runs below `root` or at it, also of those that died as they began.

    What a living run renames or deletes meanwhile is passed over, as `glob` would not.
    """
    return [Path(place) for place, names, files in os.walk(root) if CHECKPOINTS in names or "config.yaml" in files]


def readable(path: Path) -> bool:
    """Whether a checkpoint is whole."""
    return damage(path) is None


def clear_runs(resume: Path) -> None:
    """Remove temporary files of killed writes from the runs that `resume`, a folder or a checkpoint, names."""
    for run in [resume.parent.parent] if resume.is_file() else run_folders(resume):
        for name in FOLDERS:
            clear_leftovers(run / name)
