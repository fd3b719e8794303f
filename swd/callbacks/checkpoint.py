"""Checkpoints that hold only what is trained, and finding the one to resume from."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig

from swd.config import GIVEN, first_difference, read_recorded, renamed, stored
from swd.io.files import clear_leftovers
from swd.modules.adapters import CHECKPOINTS, STUDENTS
from swd.modules.checkpoints import CheckpointFiles, Resumable, damage, tensors
from swd.modules.distiller import Distiller
from swd.modules.finite import all_finite, stop_unless_finite
from swd.types import UserError

COMPARED = ("seed", "model", "schedule", "loss", "data", "task")
NO_MATTER = ("workers", "prefetch", "max_bad")
"""Keys of `data` that change neither the samples nor their order."""
GUIDANCE = ("guidance_scale", "dmd_guidance_scale", "drawing_guidance_scale")
"""Keys of `model` that training does not read, since the loss has its own; earlier versions had the first alone."""
WATCHING = ("on_bad_step", "skips_in_a_row", "skips_in_all", "exploding", "accumulate")
"""Keys of the task that a good update does not depend on; a run that they ended may go on with others."""
FOLDERS = (".", CHECKPOINTS, "samples", STUDENTS)
"""Folders that a run writes to, relative to its own."""


class Checkpoint(ModelCheckpoint):
    """Save a checkpoint into `checkpoints/` of the run folder, every `every` iterations and at the end.

    A new checkpoint is complete before an old one is deleted, and is not written at all if anything that it would hold,
    or what the networks now predict, is not finite.

    Args:
        every: iterations between checkpoints.
        keep: number of checkpoints kept, the newest.
    """

    def __init__(self, every: int = 100, keep: int = 2) -> None:
        if every < 1 or keep < 1:
            raise UserError(f"callbacks.checkpoint: every={every}, keep={keep}; use at least 1 of each")
        super().__init__(
            filename="iteration-{step}",
            auto_insert_metric_name=False,
            every_n_train_steps=1,  # `on_train_batch_end` decides
            save_top_k=keep,
            monitor="step",
            mode="max",
            save_last=False,
            save_on_train_epoch_end=False,
        )
        self.every = every
        self.keep = keep
        self.files = CheckpointFiles()
        self._first = 0  # iterations done when this run was started

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.dirpath = str(Path(trainer.default_root_dir) / CHECKPOINTS)
        trainer.strategy.checkpoint_io = self.files
        super().setup(trainer, pl_module, stage)

    def state_dict(self) -> dict[str, Any]:
        """Empty: a resumed run has a folder of its own."""
        return {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._first = trainer.global_step
        self._check_space(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step % self.every == 0:
            self._save(trainer, pl_module, *args)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._save(trainer, pl_module, None, None, 0)

    def _save(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Save unless this iteration has a checkpoint already, in this run or in the one that it resumes."""
        if trainer.global_step > self._first:
            super().on_train_batch_end(trainer, pl_module, *args)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        module = trainer.lightning_module
        kept = module.kept_state() if isinstance(module, Distiller) else module.state_dict()
        moments = tensors([optimizer.state_dict() for optimizer in trainer.optimizers])
        checks = {"weights": all_finite(kept.values()), "optimizer moments": all_finite(moments)}
        if isinstance(module, Distiller):
            checks |= module.predictions()
        place = f"iteration {trainer.global_step}, before its checkpoint"
        stop_unless_finite(trainer, checks, place, "no checkpoint was written or deleted")
        with self.files.failures() as failures:
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


def checkpoint_bytes(task: LightningModule) -> int:
    """Approximate bytes of a checkpoint of `task`: the weights that it stores, and two moments of each trained one."""
    trained = sum(p.numel() * p.element_size() for p in task.parameters() if p.requires_grad)
    if isinstance(task, Distiller):
        average = [] if task.average is None else task.average.parameters()
        return 3 * trained + sum(p.numel() * p.element_size() for p in average)
    return 2 * trained + sum(value.numel() * value.element_size() for value in task.state_dict().values())


def find_checkpoint(resume: str | None, runs: Path, cfg: DictConfig, task: Resumable | None = None) -> str | None:
    """The checkpoint to continue from.

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
            warnings.warn(f"{path} is damaged ({reason}) and was passed over", stacklevel=2)

    # There is none.
    if not auto:
        why = f" ({reason})" if reason else ""
        raise UserError(f"resume={resume} holds no valid checkpoint{why}; give a .ckpt file, a run folder, or auto")
    if passed:
        warnings.warn(f"resume=auto starts afresh: no run has this configuration ({passed[0]})", stacklevel=2)
    return None


def _candidates(root: Path) -> list[Path]:
    """`root` if it is a file, else the checkpoints of the runs in it, the newest first."""
    if root.is_file():
        return [root]
    found = []
    for path in root.glob("**/checkpoints/*.ckpt"):
        try:
            found.append((path.stat().st_mtime_ns, path))
        except OSError:  # deleted meanwhile by the run that it belongs to
            continue
    return [path for _, path in sorted(found, reverse=True)]


def readable(path: Path) -> bool:
    """Whether a checkpoint is whole."""
    return damage(path) is None


def config_difference(path: Path, cfg: DictConfig) -> str | None:
    """The first difference between this configuration and the one beside a checkpoint, None where they agree.

    Raises:
        UserError: if the one beside the checkpoint is missing or damaged.
    """
    file = path.parent.parent / "config.yaml"
    if not file.is_file():
        raise UserError(f"{file} is missing, so that the settings of {path.name} cannot be compared; put it back")
    old = renamed(read_recorded(file))
    new = renamed(stored(cfg))
    for plain in (old, new):
        if isinstance(plain.get("data"), dict):
            plain["data"] = {key: value for key, value in plain["data"].items() if key not in NO_MATTER}
            if not isinstance(plain["data"].get("validation"), int | float):  # data of their own change no training
                plain["data"].pop("validation", None)
        for key in GUIDANCE:
            (plain.get("model") or {}).pop(key, None)
        for part in (*GIVEN["task"], *WATCHING):  # version 0.1.0 repeated these groups in the task
            (plain.get("task") or {}).pop(part, None)
    for section in COMPARED:
        difference = first_difference(old.get(section), new.get(section), section)
        if difference:
            return difference
    return None


def clear_runs(resume: Path) -> None:
    """Remove temporary files of killed writes from the runs that `resume`, a folder or a checkpoint, names."""
    found = [resume.parent] if resume.is_file() else list(resume.glob("**/checkpoints"))
    for run in {folder.parent for folder in found}:
        for name in FOLDERS:
            clear_leftovers(run / name)
