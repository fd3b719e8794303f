"""Rows of an evaluation table: a judge reads pictures batch by batch, and their features and scores are summarised.

contender -> batches of pictures -> Judged (features and scores of each picture) -> ResultRow
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from peft.tuners.lora import LoraLayer
from torch import Tensor

from swd.io.files import blocks, joint_hash, write_aside, write_json
from swd.metrics.fid import frechet_distance
from swd.metrics.flops import forward_gflop
from swd.modules.distiller import Distiller
from swd.modules.networks import Networks, SharedBase
from swd.modules.sampling import initial_latents, sample_latents
from swd.shapes.dataset import ShapesDataset
from swd.shapes.distances import Distances
from swd.shapes.judge import ATTRIBUTES, Judge, Score, pack_score, score_pictures, summarise
from swd.types import UserError

SPLIT = "heldout"
"""Captions with combinations of colour and shape that training never drew."""
PROMPT_SEED = 0
"""Seed of the prompts' data set."""
REFERENCE_SEED = 1
"""Seed of the rendered pictures that FID compares with."""
FLOOR_SEED = 2
"""Seed of a second set of rendered pictures, whose FID is the lowest that can be expected."""

Draw = Callable[[list[str], list[int]], Tensor]
"""Draws pictures `[B, 3, H, W]` in [-1, 1] from B prompts and B seeds."""
Advance = Callable[[int], object]
"""Called with the number of pictures that were done since the last call."""


@dataclass(frozen=True)
class Contender:
    """A model with a way of sampling it; it becomes one row of the table.

    Attributes:
        name: name of the row.
        steps: generation steps.
        nfe: network evaluations per picture; guidance takes two in each step.
        gflop: cost of the network per picture.
        draw: draws a batch of pictures.
        ready: makes a context in which the model is ready to be timed and judged, e.g. with its LoRA merged.
    """

    name: str
    steps: int
    nfe: int
    gflop: float
    draw: Draw
    ready: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass(frozen=True)
class Judged:
    """Features and scores of N pictures; the pictures themselves are not kept.

    Attributes:
        features: features of the judge `[N, D]`, float32.
        scores: `[N, A, 2]` int64: for each attribute, how many statements of the caption hold and how many it makes.
    """

    features: Tensor
    scores: Tensor

    def __len__(self) -> int:
        return len(self.features)

    def first(self, n: int) -> Judged:
        """The first `n` pictures."""
        return Judged(self.features[:n], self.scores[:n])

    def accuracy(self) -> dict[str, float]:
        """Accuracy in [0, 1] per attribute, their `mean`, and `exact_match`."""
        return summarise([unpack_score(row) for row in self.scores])

    @staticmethod
    def cat(parts: Sequence[Judged]) -> Judged:
        """Records of several batches as one."""
        return Judged(torch.cat([p.features for p in parts]), torch.cat([p.scores for p in parts]))


@dataclass(frozen=True)
class ResultRow:
    """One row of the table.

    Attributes:
        name: see `Contender`.
        steps: see `Contender`.
        nfe: see `Contender`.
        gflop: see `Contender`.
        ms_per_image: time of network and VAE per picture, median over batches.
        fid: Fréchet distance of the judge's features to those of rendered pictures.
        prompt_accuracy: mean over attributes, in [0, 1].
        exact_match: share of pictures for which every statement of the caption holds.
        attributes: accuracy of each attribute.
        n_pictures: number of pictures behind fid and accuracies.
        source: "live", or the origin of stored statistics.
        distances: with intervals; None where there are too few pictures for them.
    """

    name: str
    steps: int
    nfe: int
    gflop: float
    ms_per_image: float
    fid: float
    prompt_accuracy: float
    exact_match: float
    attributes: dict[str, float] = field(default_factory=dict)
    n_pictures: int = 0
    source: str = "live"
    distances: Distances | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Timing:
    """Speed of a contender, and the pictures drawn while it was measured.

    Attributes:
        ms_per_image: median over batches, milliseconds.
        pictures: `[N, 3, H, W]` in [-1, 1] for the first N prompts.
    """

    ms_per_image: float
    pictures: Tensor


# Prompts and references


def prompts_of(n: int) -> list[str]:
    """The first `n` captions of the held-out split."""
    dataset = ShapesDataset(SPLIT, PROMPT_SEED, length=n)
    return [dataset.draw(i)[1].caption() for i in range(n)]


def reference_features(judge: Judge, n: int, seed: int, device: torch.device, batch: int = 32) -> Tensor:
    """Features `[n, D]` of `n` rendered pictures of the held-out split."""
    dataset = ShapesDataset(SPLIT, seed, length=n)
    parts = []
    for chunk in batches(n, batch):
        pixels = torch.stack([dataset[i]["pixels"] for i in chunk])
        parts.append(judge.features(pixels.to(device)).cpu())
    return torch.cat(parts)


def batches(n: int, size: int) -> Iterator[range]:
    """0..n-1 in ranges of `size`, the last one shorter."""
    return (range(start, min(start + size, n)) for start in range(0, n, size))


# Contenders


class _Euler(FlowMatchEulerDiscreteScheduler):
    """Euler steps in float32, whatever dtype the network computes in, at given noise levels or the scheduler's own.

    Args:
        levels: noise levels of the steps; None: the scheduler's own.
        **config: configuration of the diffusers scheduler.
    """

    def __init__(self, levels: Sequence[float] | None = None, **config: Any) -> None:
        super().__init__(**config)
        self.levels = levels

    def set_timesteps(self, num_inference_steps: int | None = None, device: Any = None, **kwargs: Any) -> None:
        if self.levels is None:
            super().set_timesteps(num_inference_steps, device=device, **kwargs)
        else:
            super().set_timesteps(sigmas=list(self.levels), device=device)

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
        return super().step(model_output.float(), timestep, sample, **kwargs)


def contenders(task: Distiller) -> tuple[Contender, Contender, Contender]:
    """The rows of the demo: the teacher with all its steps, the teacher with as many steps as the student, the student.

    The teacher draws at the schedule's last size with classifier-free guidance; the student needs no guidance.
    """
    # Costs of the steps.
    model = task.model
    schedule = task.schedule
    row = task.encode_prompts([""])
    costs = {size: forward_gflop(model, size, row) for size in set(schedule.sizes)}
    full = costs[schedule.sizes[-1]]
    few = len(schedule)
    many = model.teacher_steps
    passes = 2 if model.drawing_guidance_scale > 1 else 1

    # One row for each way of drawing.
    def teacher(scheduler: Any, steps: int) -> Draw:
        return lambda prompts, seeds: teacher_pictures(task, scheduler, steps, prompts, seeds)

    return (
        Contender(
            f"teacher, {many} steps", many, passes * many, passes * many * full, teacher(_Euler(shift=3.0), many)
        ),
        Contender(
            f"teacher, {few} steps",
            few,
            passes * few,
            passes * few * full,
            teacher(_Euler(schedule.sigmas, shift=1.0), few),
        ),
        Contender(
            f"student, {few} steps, scale-wise",
            few,
            few,
            sum(costs[size] for size in schedule.sizes),
            lambda prompts, seeds: task.sample(prompts, seeds)[0],
            lambda: merged_student(task.networks),
        ),
    )


def full_size_gflop(task: Distiller) -> float:
    """GFLOP of as many steps as the schedule has, all at the last size and without guidance."""
    row = task.encode_prompts([""])
    return len(task.schedule) * forward_gflop(task.model, task.schedule.sizes[-1], row)


@torch.no_grad()
def teacher_pictures(task: Distiller, scheduler: Any, steps: int, prompts: list[str], seeds: list[int]) -> Tensor:
    """Pictures `[B, 3, H, W]` of the frozen teacher at the schedule's last size, with the model's guidance scale."""
    latents = initial_latents(seeds, task.model.channels, task.schedule.sizes[-1]).to(task.device)
    conditioning = task.encode_prompts(prompts)
    latents = sample_latents(
        task.networks, scheduler, latents, conditioning, task.empty, task.model.drawing_guidance_scale, "teacher", steps
    )
    return task.encoders.decode(latents)


@contextmanager
def merged_student(networks: Networks) -> Iterator[None]:
    """Context in which the student's LoRA is merged into the weights, as in use; afterwards the weights are restored.

    Does nothing for a network that was trained whole, which has no LoRA, and for 8-bit weights, which cannot be merged.
    """
    if not isinstance(networks, SharedBase) or networks.quantized:
        yield
        return
    modules = networks.backbone.network.modules()
    layers: list[LoraLayer] = [module for module in modules if isinstance(module, LoraLayer)]
    kept = [layer.get_base_layer().weight.detach().clone() for layer in layers]
    try:
        for layer in layers:
            layer.merge(adapter_names=["student"])
        yield
    finally:
        for layer, weight in zip(layers, kept, strict=True):
            layer.merged_adapters.clear()
            layer.get_base_layer().weight.data.copy_(weight)  # unmerging would leave rounding errors behind


# Measuring


def judge_pictures(judge: Judge, pixels: Tensor, prompts: Sequence[str]) -> Judged:
    """Features and scores of pictures `[B, 3, 128, 128]` of B prompts."""
    scores = score_pictures(judge, pixels, prompts)
    return Judged(judge.features(pixels).cpu(), torch.stack([pack_score(s) for s in scores]))


def unpack_score(row: Tensor) -> Score:
    """Inverse of `pack_score`."""
    pairs = zip(ATTRIBUTES, row.tolist(), strict=True)
    return {name: (int(hits), int(count)) for name, (hits, count) in pairs if count}


def judged_batches(
    contender: Contender, judge: Judge, prompts: Sequence[str], start: int = 0, batch: int = 32
) -> Iterator[Judged]:
    """Draw and judge pictures from number `start` on, batch by batch; picture i has prompt i and seed i."""
    for chunk in batches(len(prompts) - start, batch):
        wanted = [start + i for i in chunk]
        texts = [prompts[i] for i in wanted]
        yield judge_pictures(judge, contender.draw(texts, wanted), texts)


def run_contender(
    contender: Contender, judge: Judge, prompts: Sequence[str], batch: int = 32, advance: Advance = lambda n: None
) -> Judged:
    """Draw and judge all pictures of a contender."""
    parts = []
    for part in judged_batches(contender, judge, prompts, batch=batch):
        parts.append(part)
        advance(len(part))
    return Judged.cat(parts)


def time_contender(
    contender: Contender,
    prompts: Sequence[str],
    batch: int = 8,
    repeats: int = 5,
    seconds: float = 20.0,
    least: int = 3,
    advance: Advance = lambda n: None,
) -> Timing:
    """Milliseconds per picture for network and VAE, after the prompts are encoded and a first picture was drawn.

    Args:
        contender: the model to time.
        prompts: prompts in order; after the last one it starts again.
        batch: pictures drawn together.
        repeats: largest number of batches; the result is their median.
        seconds: after this time no further batch begins, unless `least` is not reached.
        least: smallest number of batches.
        advance: called after every batch.
    """
    # Warm up, which also encodes the prompts.
    size = min(batch, len(prompts))
    contender.draw(list(prompts[:1]), [0])

    # Time batches, and keep the first picture of every prompt.
    times: list[float] = []
    pictures: list[Tensor] = []
    began = time.perf_counter()
    while len(times) < least or (len(times) < repeats and time.perf_counter() - began < seconds):
        first = len(times) * size
        wanted = [(first + i) % len(prompts) for i in range(size)]
        texts = [prompts[i] for i in wanted]
        start = time.perf_counter()
        drawn = contender.draw(texts, wanted).cpu()  # the copy waits for the device
        times.append((time.perf_counter() - start) / size)
        if first < len(prompts):
            pictures.append(drawn[: len(prompts) - first])
        advance(size)
    return Timing(1000 * statistics.median(times), torch.cat(pictures))


def make_row(
    contender: Contender, judged: Judged, reference: Tensor, ms_per_image: float, source: str = "live"
) -> ResultRow:
    """The row of a contender from its measurements; `reference`: features of rendered pictures `[N, D]`."""
    accuracy = judged.accuracy()
    return ResultRow(
        name=contender.name,
        steps=contender.steps,
        nfe=contender.nfe,
        gflop=contender.gflop,
        ms_per_image=ms_per_image,
        fid=frechet_distance(reference, judged.features),
        prompt_accuracy=accuracy["mean"],
        exact_match=accuracy["exact_match"],
        attributes={k: v for k, v in accuracy.items() if k not in ("mean", "exact_match")},
        n_pictures=len(judged),
        source=source,
    )


# Stored statistics


@dataclass(frozen=True)
class Store:
    """Stored features and scores of a contender that does not change, such as the teacher.

    A JSON file beside the arrays records the weights, prompts and settings that they were made with. Statistics that
    were made with others are not used.

    Attributes:
        path: the `.npz` file.
        facts: the hashes and settings that the statistics depend on.
    """

    path: Path
    facts: dict[str, Any]

    @property
    def about(self) -> Path:
        """The JSON file beside the arrays."""
        return self.path.with_suffix(".json")

    def why_not(self, n: int) -> str | None:
        """Reason why the statistics of the first `n` pictures cannot be taken from here; None if they can."""
        if not self.path.is_file() or not self.about.is_file():
            return f"{self.path.name} is not there"
        known = json.loads(self.about.read_text())
        for key, value in self.facts.items():
            if known.get(key) != value:
                return f"{self.path.name} was made with another {key.replace('_', ' ')}"
        if known["n_pictures"] < n:
            return f"{self.path.name} holds {known['n_pictures']} pictures, {n} are asked for"
        return None

    def load(self) -> Judged:
        """The stored features and scores."""
        with np.load(self.path) as arrays:
            return Judged(torch.from_numpy(arrays["features"]), torch.from_numpy(arrays["scores"]).long())

    def save(self, judged: Judged, command: str) -> None:
        """Write the arrays, then their description; both under temporary names that are renamed."""

        def write(path: Path) -> None:
            np.savez_compressed(path, features=judged.features.numpy(), scores=judged.scores.to(torch.uint8).numpy())

        self.about.unlink(missing_ok=True)  # an interruption must not leave a description of other arrays
        write_aside(self.path, write)
        write_json(self.about, self.facts | {"n_pictures": len(judged), "command": command})


def store_statistics(
    store: Store,
    contender: Contender,
    judge: Judge,
    prompts: Sequence[str],
    command: str,
    batch: int = 32,
    advance: Advance = lambda n: None,
) -> Judged:
    """Judge all pictures of a contender and store the result; goes on where an interrupted call stopped."""
    begun = Store(store.path.with_name(f"{store.path.stem}.partial.npz"), store.facts)
    parts = [begun.load()] if begun.why_not(1) is None else []
    done = sum(map(len, parts))
    advance(done)
    for part in judged_batches(contender, judge, prompts, done, batch):
        parts.append(part)
        begun.save(Judged.cat(parts), command)
        advance(len(part))
    judged = Judged.cat(parts)
    store.save(judged, command)
    for path in (begun.path, begun.about):
        path.unlink(missing_ok=True)
    return judged


def teacher_store(task: Distiller, judge_folder: Path) -> Store:
    """The store of the statistics of the teacher with all its steps."""
    model = task.model
    facts = {
        "model_sha256": sha256_of(model.folder),
        "judge_sha256": sha256_of(judge_folder),
        "prompts_sha256": hashlib.sha256("\n".join(prompts_of(64)).encode()).hexdigest(),
        "guidance_scale": float(model.drawing_guidance_scale),
        "steps": model.teacher_steps,
        "size": list(task.schedule.sizes[-1]),
        "scheduler": "FlowMatchEulerDiscreteScheduler(shift=3)",
    }
    return Store(judge_folder / f"teacher_{model.teacher_steps}steps.npz", facts)


def sha256_of(folder: Path) -> str:
    """Hash of all weights in a folder: names and bytes of its `.safetensors` files, in order of name."""
    files = sorted(folder.glob("**/*.safetensors"))
    if not files:
        raise UserError(f"{folder} holds no .safetensors weights")
    return joint_hash(part for path in files for part in _name_and_content(folder, path))


def _name_and_content(folder: Path, path: Path) -> Iterator[bytes]:
    yield path.relative_to(folder).as_posix().encode()
    with open(path, "rb") as stream:
        yield from blocks(stream, path.stat().st_size)
