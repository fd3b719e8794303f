"""Trainings of models that ship as configuration, on tiny pipelines of the same families."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import skeletons
import torch
from lightning import Trainer
from omegaconf import DictConfig

from swd import config
from swd.data.iterations import Iterations
from swd.modules.distiller import Distiller
from swd.types import PictureBatch

FAMILY = {"sd35_medium": "sd35_medium", "sd35_large": "sd3", "flux_dev": "flux", "sdxl": "sdxl", "wan21_1_3b": "wan"}
"""The tiny pipeline for each model."""


def shrunk_sizes(cfg: DictConfig) -> list[Any]:
    """The schedule's sizes with small lengths in place of its own, axis by axis in the same order."""
    sizes = [[size] if isinstance(size, int) else list(size) for size in config.to_plain(cfg.schedule.sizes)]
    axes = [sorted(set(lengths)) for lengths in zip(*sizes, strict=True)]
    shrunk = []
    for size in sizes:
        ranks = [axis.index(length) for axis, length in zip(axes, size, strict=True)]
        shrunk.append([4 + 2 * ranks[0]] if len(ranks) == 1 else [1 + ranks[0], *(4 + 2 * rank for rank in ranks[1:])])
    return [size[0] if len(size) == 1 else size for size in shrunk]


def tiny_task(cfg: DictConfig, pipeline: Callable[[str], Path]) -> Distiller:
    """The task of a configuration, on a tiny pipeline of its family with small sizes and one critic update.

    Args:
        cfg: of a training; it is changed.
        pipeline: folder of the tiny pipeline of a family, by the names of `families`.
    """
    paths = {skeletons.options(model)["path"]: family for model, family in FAMILY.items()}
    family = paths.get(cfg.model.path, "sd3")  # the embedded teacher is an SD3 too
    sizes = shrunk_sizes(cfg)
    tiny = {"path": str(pipeline(family)), "size": sizes[-1], "rank": 4, "precision": "fp32", "feature_blocks": [0]}
    cfg.model.update(tiny | {"max_text_tokens": families.TEXT_TOKENS})
    cfg.schedule.sizes = sizes
    cfg.task.critic_updates = 1
    built = config.build(cfg, "task")
    assert isinstance(built, Distiller)
    return built


def train_two(task: Distiller, folder: Path) -> None:
    """Two iterations on random pictures; every number that is logged must be finite."""
    shape = (2, 3, *task.model.pixel_size(task.schedule.sizes[-1]))
    prompts = ["a red star", "a ring"]
    batches = [
        PictureBatch(pixels=2 * torch.rand(shape, generator=torch.Generator().manual_seed(i)) - 1, prompts=prompts)
        for i in range(2 * task.batches_per_iteration)
    ]
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    trainer = Trainer(max_steps=2, accelerator="cpu", enable_model_summary=False, default_root_dir=folder, **quiet)
    trainer.fit(task, Iterations(batches, task.batches_per_iteration))
    assert trainer.global_step == 2 and set(task.terms) <= set(task.last_metrics)
    assert all(value.isfinite() for value in task.last_metrics.values())
