"""Checkpoints that hold only what is trained, and finding the one to resume from."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig

from swd.adapters import save_adapter, save_student
from swd.config import first_difference, read_recorded, stored
from swd.modules.distiller import Distiller
from swd.modules.networks import SharedBase
from swd.types import UserError

COMPARED = ("seed", "model", "schedule", "loss", "data", "task")  # the task repeats the groups that it is built from
NO_MATTER = ("workers", "prefetch", "max_bad")
"""Keys of the data that change neither a sample nor its turn."""


class Checkpoint(ModelCheckpoint):
    """Save every so many iterations, and at the end, into `checkpoints/` of the run folder.

    Args:
        every: iterations between checkpoints.
        keep: how many are kept.
    """

    def __init__(self, every: int = 100, keep: int = 2) -> None:
        if every < 1 or keep < 1:
            raise UserError(f"callbacks.checkpoint: every={every}, keep={keep}; use at least 1 of each")
        super().__init__(
            filename="iteration-{step}",
            auto_insert_metric_name=False,
            every_n_train_steps=every,
            save_top_k=keep,
            monitor="step",
            mode="max",
            save_last=False,
            save_on_train_epoch_end=False,
        )
        self.every = every

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # Where a resumed run starts there is a checkpoint already; another would lie between two iterations.
        self._last_global_step_saved = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if trainer.global_step != self._last_global_step_saved:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))


class SaveAdapter(Callback):
    """Write the student and its schedule into the run folder when training ends.

    An adapter goes to `adapter/`; a student that was trained whole to `student/`, as a diffusers model.
    """

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Without a single iteration there is no student, only fresh weights.
        if not (isinstance(pl_module, Distiller) and trainer.is_global_zero and trainer.global_step):
            return
        model, networks = pl_module.model, pl_module.networks
        if isinstance(networks, SharedBase):
            save_adapter(
                Path(trainer.default_root_dir) / "adapter",
                networks.adapter_state("student"),
                model.rank,
                model.rank if model.alpha is None else model.alpha,
                pl_module.scheduler(),
                base=model.name,
                part=model.backbone_class.subfolder,
            )
        else:
            network: Any = networks.backbone_of("student").network
            save_student(Path(trainer.default_root_dir) / "student", network, pl_module.scheduler())


def find_checkpoint(resume: str | None, runs: Path, cfg: DictConfig) -> str | None:
    """The checkpoint to continue from.

    Args:
        resume: None: start afresh; "auto": the newest valid one under `runs`, if any; else a file or a run folder.
        runs: where runs of this name live.
        cfg: the configuration of this run, which must agree with the checkpoint's.

    Raises:
        UserError: if a named checkpoint is missing or unreadable, or belongs to another configuration.
    """
    if resume is None:
        return None
    root = runs if resume == "auto" else Path(resume)
    if root.is_file():
        candidates = [root]
    else:
        candidates = sorted(root.glob("**/checkpoints/*.ckpt"), key=lambda p: p.stat().st_mtime, reverse=True)
    passed: list[str] = []
    for path in candidates:
        difference = config_difference(path, cfg)
        if difference is not None:
            if resume != "auto":
                raise UserError(f"resume={resume} was made with another configuration: {difference}")
            passed.append(f"{path.parent.parent}: {difference}")
            continue
        if readable(path):
            return str(path)
        warnings.warn(f"{path} is damaged and was passed over", stacklevel=2)
    if resume == "auto":
        if passed:
            warnings.warn(f"resume=auto starts afresh: no run has this configuration ({passed[0]})", stacklevel=2)
        return None
    raise UserError(f"resume={resume} holds no valid checkpoint; give a .ckpt file, a run folder, or auto")


def readable(path: Path) -> bool:
    """Whether a checkpoint loads and holds what is needed."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # truncated, not a checkpoint, unsafe: none of them can be resumed from
        return False
    return {"state_dict", "optimizer_states", "global_step"} <= set(checkpoint)


def config_difference(path: Path, cfg: DictConfig) -> str | None:
    """The first difference between this configuration and the one beside a checkpoint, None where they agree."""
    file = path.parent.parent / "config.yaml"
    if not file.is_file():
        return None
    old, new = read_recorded(file), stored(cfg)
    for plain in (old, new):
        for key in NO_MATTER:
            plain.setdefault("data", {}).pop(key, None)
    for section in COMPARED:
        difference = first_difference(old.get(section), new.get(section), section)
        if difference:
            return difference
    return None
