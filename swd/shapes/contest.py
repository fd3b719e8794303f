"""Rows of an evaluation table: pictures are streamed through a judge, kept as small records, and summarised.

contender -> pictures, a batch at a time -> Judged (features and scores per picture) -> ResultRow
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

from swd.io.files import write_aside, write_json
from swd.metrics.fid import frechet_distance
from swd.metrics.flops import forward_gflop
from swd.modules.distiller import Distiller
from swd.modules.networks import Networks, SharedBase
from swd.modules.sampling import initial_latents, sample_latents
from swd.shapes.dataset import ShapesDataset
from swd.shapes.judge import ATTRIBUTES, Judge, Score, score_pictures, summarise
from swd.types import UserError

SPLIT = "heldout"
"""Captions with combinations that training never drew."""
PROMPT_SEED, REFERENCE_SEED, FLOOR_SEED = 0, 1, 2
"""Dataset seeds of the prompts, of the rendered pictures that FID compares with, and of a second such set."""

Draw = Callable[[list[str], list[int]], Tensor]
"""Pictures `[B, 3, H, W]` in [-1, 1] of B prompts, each from its own seed."""
Advance = Callable[[int], object]
"""Told how many more pictures are done."""


@dataclass(frozen=True)
class Contender:
    """A model with a way of sampling it: one row of the table to be.

    Attributes:
        name: of the row.
        steps: generation steps.
        nfe: network evaluations per picture; guidance takes two a step.
        gflop: of the network per picture.
        draw: draws a batch of pictures.
        ready: what it is timed and judged in.
    """

    name: str
    steps: int
    nfe: int
    gflop: float
    draw: Draw
    ready: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass(frozen=True)
class Judged:
    """What is kept of N pictures.

    Attributes:
        features: the judge's `[N, D]` float32.
        scores: `[N, A, 2]` int64: per attribute how many statements of the caption hold, and how many it makes.
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
        name, steps, nfe, gflop: as in `Contender`.
        ms_per_image: median over batches of the time for network and VAE, per picture.
        fid: Fréchet distance of the judge's features to those of rendered pictures.
        prompt_accuracy: mean over attributes, in [0, 1].
        exact_match: share of pictures of which every statement of the caption holds.
        attributes: accuracy per attribute.
        n_pictures: that fid and accuracies were taken over.
        source: "live", or where stored statistics came from.
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

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Timing:
    """Speed of a contender, and the pictures that were drawn to find it.

    Attributes:
        ms_per_image: median over batches, milliseconds.
        pictures: `[N, 3, H, W]` in [-1, 1], of the first N prompts.
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
        pixels = torch.stack([torch.as_tensor(dataset[i]["pixels"]) for i in chunk])
        parts.append(judge.features(pixels.to(device)).cpu())
    return torch.cat(parts)


def batches(n: int, size: int) -> Iterator[range]:
    """0..n-1 in ranges of `size`, the last one shorter."""
    return (range(start, min(start + size, n)) for start in range(0, n, size))


# Contenders


class _Euler(FlowMatchEulerDiscreteScheduler):
    """Euler steps in float32 whatever the network computes in, at given noise levels if there are any.

    Args:
        levels: noise levels of the steps; None: the scheduler's own.
        **config: of the diffusers scheduler.
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
    """The rows of the demo: the teacher as intended, the teacher at the student's steps, the student.

    Both teachers draw at the schedule's last size and with classifier-free guidance; the student needs none.
    """
    model, schedule = task.model, task.schedule
    row = task.encode_prompts([""])
    costs = {size: forward_gflop(model, size, row) for size in set(schedule.sizes)}
    full, few, many = costs[schedule.sizes[-1]], len(schedule), model.teacher_steps
    passes = 2 if model.drawing_guidance_scale > 1 else 1

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
    """Pictures `[B, 3, H, W]` of the frozen teacher at the schedule's last size, guided as the model asks."""
    latents = initial_latents(seeds, task.model.channels, task.schedule.sizes[-1]).to(task.device)
    conditioning = task.encode_prompts(prompts)
    latents = sample_latents(
        task.networks, scheduler, latents, conditioning, task.empty, task.model.drawing_guidance_scale, "teacher", steps
    )
    return task.encoders.decode(latents)


@contextmanager
def merged_student(networks: Networks) -> Iterator[None]:
    """Inside, the student's LoRA is part of the weights, as in a student put to use; after it, all is as before.

    A whole copy has nothing to merge, and 8-bit weights cannot take it.
    """
    if not isinstance(networks, SharedBase) or networks.quantized:
        yield
        return
    layers = [m for m in networks.backbone.network.modules() if isinstance(m, LoraLayer)]
    kept = [layer.get_base_layer().weight.detach().clone() for layer in layers]
    try:
        for layer in layers:
            layer.merge(adapter_names=["student"])  # type: ignore[operator]
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


def pack_score(score: Score) -> Tensor:
    """A score as `[A, 2]` int64; attributes that the caption leaves out are 0 of 0."""
    return torch.tensor([score.get(name, (0, 0)) for name in ATTRIBUTES])


def unpack_score(row: Tensor) -> Score:
    """Inverse of `pack_score`."""
    pairs = zip(ATTRIBUTES, row.tolist(), strict=True)
    return {name: (int(hits), int(count)) for name, (hits, count) in pairs if count}


def judged_batches(
    contender: Contender, judge: Judge, prompts: Sequence[str], start: int = 0, batch: int = 32
) -> Iterator[Judged]:
    """Draw pictures `start`.. of the prompts, picture i from seed i, and judge them a batch at a time."""
    for chunk in batches(len(prompts) - start, batch):
        wanted = [start + i for i in chunk]
        texts = [prompts[i] for i in wanted]
        yield judge_pictures(judge, contender.draw(texts, wanted), texts)


def run_contender(
    contender: Contender, judge: Judge, prompts: Sequence[str], batch: int = 32, advance: Advance = lambda n: None
) -> Judged:
    """All pictures of a contender, judged."""
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
    """Milliseconds per picture, network and VAE, once the prompts are encoded and everything is warm.

    Args:
        contender: what is timed.
        prompts: drawn in order, again from the first one when they run out.
        batch: pictures drawn together.
        repeats: batches timed at most; their median counts.
        seconds: no further batch is begun after this time, but for the `least` ones.
        least: batches timed at least.
        advance: told after every batch.
    """
    size = min(batch, len(prompts))
    contender.draw(list(prompts[:1]), [0])
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
    """The row of a contender from what was measured; `reference`: features of rendered pictures `[N, D]`."""
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
    """Judged pictures of a contender that is always the same, kept beside the judge.

    Beside the arrays lies a JSON file that says which weights, prompts and settings made them; statistics of anything
    else are not used.

    Attributes:
        path: the `.npz` file.
        facts: what the statistics depend on.
    """

    path: Path
    facts: dict[str, Any]

    @property
    def about(self) -> Path:
        """The JSON file beside the arrays."""
        return self.path.with_suffix(".json")

    def why_not(self, n: int) -> str | None:
        """Why the first `n` pictures cannot come from here; None if they can."""
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
        """What is stored."""
        with np.load(self.path) as arrays:
            return Judged(torch.from_numpy(arrays["features"]), torch.from_numpy(arrays["scores"]).long())

    def save(self, judged: Judged, command: str) -> None:
        """Write the arrays, then what they are; both aside."""

        def write(path: Path) -> None:
            np.savez_compressed(path, features=judged.features.numpy(), scores=judged.scores.to(torch.uint8).numpy())

        self.about.unlink(missing_ok=True)  # so that an interruption leaves no description of other arrays
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
    """Judge all pictures of a contender and store the records; continues where an interrupted call stopped."""
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
    """Where the teacher's full-length statistics are kept, and what they depend on."""
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
    """One hash of all weights in a folder: names and bytes of its `.safetensors` files, in order of name."""
    digest = hashlib.sha256()
    files = sorted(folder.glob("**/*.safetensors"))
    if not files:
        raise UserError(f"{folder} holds no .safetensors weights")
    for path in files:
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
