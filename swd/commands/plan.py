"""`swd plan`: memory, largest batch, time and disk of a training, before anything is downloaded."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig

from swd.commands import keys, shared
from swd.commands.cli import config_folder
from swd.commands.encode import BYTES
from swd.commands.gpus import GB, Gpu, checked_gpu
from swd.config import build, check
from swd.modules.device_memory import cache_bytes, encoder_bytes, permanent_parts, usable
from swd.modules.distiller import Distiller
from swd.modules.dry_run import trained_on_meta
from swd.modules.family_folder import resolve_asset
from swd.modules.hub import is_hub_id
from swd.modules.iteration_cost import IterationCost, iteration_costs
from swd.modules.published import copied_folder, published, published_folder
from swd.types import Size, UserError

ROOT = keys.PLAN


@dataclass(frozen=True)
class Planned:
    """A training's needs.

    Attributes:
        parts: bytes on each GPU for as long as the training runs, by what they are for.
        encoders: bytes of text encoders and VAE, which a training on cached data does without.
        sizes: latent sizes of the steps that are trained.
        plain: cost of an iteration at each step, for a sample, with all activations kept.
        recomputed: the same with activation checkpointing.
        cached: bytes of an encoded sample on disk.
    """

    parts: dict[str, int]
    encoders: dict[str, int]
    sizes: tuple[Size, ...]
    plain: list[IterationCost]
    recomputed: list[IterationCost]
    cached: int

    def free(self, memory: float, cache: bool) -> float:
        """Bytes that are left for activations."""
        return memory - sum(self.parts.values()) - (0 if cache else sum(self.encoders.values()))

    def largest_batch(self, memory: float, recomputed: bool, cache: bool = True) -> list[int]:
        """Largest number of samples that a GPU takes at once at each step; 0 where it takes none."""
        costs = self.recomputed if recomputed else self.plain
        return [max(0, int(self.free(memory, cache) // cost.peak)) for cost in costs]


def run(cfg: DictConfig) -> None:
    """Print the plan of the configuration's training."""
    shared.quiet()
    check(cfg, ROOT)
    gpu = checked_gpu(cfg)
    for line in described(planned(cfg), cfg, gpu):
        print(line)


# Counting


def planned(cfg: DictConfig) -> Planned:
    """The needs of the configuration's training, counted without weights.

    Raises:
        UserError: if model, schedule and loss do not fit together, or the model's configuration is not at hand.
    """
    with tempfile.TemporaryDirectory() as folder:
        cfg = cfg.copy()
        cfg.model.path = str(model_configuration(cfg, Path(folder) / "model"))
        task: Any = build(cfg, "task")
        if not isinstance(task, Distiller):
            raise UserError(f"task={type(task).__name__}, but a plan is of a distillation; leave out task=")
        model, terms, updates = task.model, dict(task.terms.items()), max(task.critic_updates, 1)
        # One of several experts trains only the steps at its own levels.
        plain, recomputed = (
            [costs[step] for step in task.steps]
            for costs in (iteration_costs(model, task.schedule, terms, updates, each) for each in (False, True))
        )
        return Planned(
            memory_parts(task, cfg.n_gpus, cfg.divided),
            encoder_bytes(model),
            tuple(task.schedule.sizes[step] for step in task.steps),
            plain,
            recomputed,
            cache_bytes(model, task.schedule.sizes, BYTES[cfg.precision]),
        )


def model_configuration(cfg: DictConfig, folder: Path) -> Path:
    """Write the model's configuration into `folder`: the published one of a model on the hub, else the user's own.

    Raises:
        UserError: if there is none here; nothing is downloaded.
    """
    path: str = cfg.model.path
    if not is_hub_id(path):
        return copied_folder(resolve_asset(path), cfg.model.family, folder)
    for name in published():
        file = config_folder() / "model" / f"{name}.yaml"
        if file.is_file() and yaml.safe_load(file.read_text(encoding="utf-8")).get("path") == path:
            return published_folder(name, cfg.model.family, folder)
    raise UserError(
        f"model.path={path} has no configuration here, and nothing is downloaded for a plan; fetch it alone "
        f"(hf download {path} --include '*.json' --local-dir FOLDER) and give model.path=FOLDER"
    )


def memory_parts(task: Distiller, n_gpus: int, divided: bool) -> dict[str, int]:
    """Bytes on each GPU for as long as a training runs, by what they are for."""
    networks, heads = trained_on_meta(task.model, dict(task.terms.items()))
    shards = n_gpus if divided and n_gpus > 1 else None
    return permanent_parts(networks, heads, n_gpus, shards, average=task.ema is not None)


# Printing


def described(plan: Planned, cfg: DictConfig, gpu: Gpu) -> Iterator[str]:
    """The plan in lines of text."""
    memory = usable(gpu.memory, cfg.spare)
    share = cfg.batch_size // cfg.n_gpus
    yield f"{cfg.model.path} on {cfg.n_gpus} x {gpu.memory / GB:g} GB; counted from shapes, nothing was measured"
    yield ""
    yield f"{'memory on each GPU, GB':58}{gigabytes(sum(plan.parts.values())):>8}"
    for name, count in plan.parts.items():
        yield f"  {name:56}{gigabytes(count):>8}"
    beside = ", ".join(f"{name} {gigabytes(count)}" for name, count in plan.encoders.items()) or "unknown here"
    yield f"{'encoders, which cached data do without':58}{gigabytes(sum(plan.encoders.values())):>8}  ({beside})"
    yield ""
    yield from steps_table(plan, memory)
    yield ""
    yield from time_lines(plan, cfg, gpu, memory, share)
    disk = gigabytes(plan.cached * cfg.samples)
    yield f"cache of {cfg.samples} samples in {cfg.precision}: {disk} GB ({plan.cached / 1e6:.2f} MB each)"


def steps_table(plan: Planned, memory: float) -> Iterator[str]:
    """For every step: activations and work of a sample, and the largest batch that fits `memory` beside the rest."""
    yield "for each step, kept / recomputed (task.checkpointing=true):"
    columns = "activations of a sample, GB", "TFLOP of a sample", "largest batch on a GPU", "with encoders on it"
    yield f"  {'size':>12}" + "".join(f"{column:>30}" for column in columns)
    batches = [plan.largest_batch(memory, again, cache) for cache in (True, False) for again in (False, True)]
    for i, size in enumerate(plan.sizes):
        a, b = plan.plain[i], plan.recomputed[i]
        cells = (
            f"{gigabytes(a.peak)} / {gigabytes(b.peak)}",
            f"{a.flop / 1e12:.3g} / {b.flop / 1e12:.3g}",
            f"{batches[0][i]} / {batches[1][i]}",
            f"{batches[2][i]} / {batches[3][i]}",
        )
        yield f"  {'x'.join(map(str, size)):>12}" + "".join(f"{cell:>30}" for cell in cells)


def time_lines(plan: Planned, cfg: DictConfig, gpu: Gpu, memory: float, share: int) -> Iterator[str]:
    """Whether each GPU's share of the batch fits, and the time of an iteration."""
    for name, recomputed, costs in (("kept", False, plan.plain), ("recomputed", True, plan.recomputed)):
        most = min(plan.largest_batch(memory, recomputed))
        parts = parts_needed(share, most)
        seconds = share * mean([cost.flop for cost in costs]) / (gpu.peak * 1e12 * cfg.utilisation)
        fit = "it fits" if parts == 1 else f"with task.accumulate={parts}" if parts else "it does not fit"
        yield (
            f"batch {cfg.batch_size}, {share} on each GPU, activations {name}: {fit}; {seconds:.3g} s an iteration on "
            f"cached data at {cfg.utilisation:.0%} of {gpu.peak:g} TFLOP/s, "
            f"{seconds * cfg.recipe.iterations / 3600:.3g} h for {cfg.recipe.iterations}"
        )


def parts_needed(share: int, most: int) -> int:
    """Least number of equal parts of `share` samples of which none has more than `most`; 0 if there is none."""
    return next((parts for parts in range(1, share + 1) if share % parts == 0 and share // parts <= most), 0)


def gigabytes(count: float) -> str:
    """Bytes as GB of 10^9, to a tenth or to two digits."""
    return f"{count / GB:.1f}" if count >= GB else f"{count / GB:.2g}"


def mean(values: Sequence[float]) -> float:
    """Their mean."""
    return sum(values) / len(values)
