"""Rows of the demo's table: an evaluation of the teacher, of the teacher in few steps, and of the student.

candidates -> pictures and features (swd.evaluation) -> Judged (features and statements of each picture) -> ResultRow
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swd.evaluation.candidate_pictures import CandidatePainter, draw_share
from swd.evaluation.candidates import Candidate, DrawingModel
from swd.evaluation.plan import Plan, chunks_of
from swd.evaluation.score import Bootstrap, Scoring
from swd.evaluation.timing import Costs, Timing
from swd.io.files import blocks, joint_hash, write_aside, write_json
from swd.metrics.fid import Frechet, frechet_distance
from swd.metrics.flops import forward_gflop
from swd.modules.adapters import locate
from swd.modules.distiller import Distiller
from swd.modules.requests import Requests
from swd.modules.saved_student import load_student
from swd.shapes.dataset import ShapesDataset
from swd.shapes.distances import Distances
from swd.shapes.judge import ATTRIBUTES, Judge, Score, pack_score, score_pictures, summarise
from swd.shapes.metrics import JudgeFeatures, ShapesAccuracy, statements_of
from swd.shapes.rendered import SPLIT, prompts_of
from swd.types import UserError

BATCH, CHUNK = 16, 64
"""Pictures drawn at once, and pictures whose features are one file."""
ALONE = (0, 1)
"""The demo draws in one process, whatever trained."""


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
        name: who draws.
        steps: generation steps.
        nfe: network evaluations per picture; guidance takes two in each step.
        gflop: cost of the network per picture.
        ms_per_image: time of network and VAE per picture, mean over batches.
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


# Who draws


def teachers(task: Distiller) -> dict[str, DrawingModel]:
    """By name of the row: the teacher with all its steps, and with the student's noise levels.

    Both draw at the schedule's last size with classifier-free guidance.
    """
    schedule, size = task.schedule, task.schedule.sizes[-1]
    few, many = len(schedule), task.model.teacher_steps
    # Steps are set on the model that a row draws with, so each has one of its own.
    quick = copy.copy(task.model)
    quick.teacher_steps = few
    levels = tuple(schedule.sigmas)
    return {
        f"teacher, {many} steps": DrawingModel("teacher", "teacher", copy.copy(task.model), None, None, size, many),
        f"teacher, {few} steps": DrawingModel("teacher_few", "teacher", quick, None, None, size, few, levels),
    }


def student(task: Distiller, run: Path) -> dict[str, DrawingModel]:
    """By name of the row: the student of a run, which needs no guidance."""
    model, schedule = copy.copy(task.model), task.schedule
    sampler = schedule.scheduler(model.limits.divisor, model.backbone_class.process.prediction_type)
    found, few = load_student(locate(str(run), run)), len(schedule)
    name = f"student, {few} steps, scale-wise"
    return {name: DrawingModel("student", str(run), model, found, sampler, schedule.sizes[-1], few)}


def full_size_gflop(task: Distiller) -> float:
    """GFLOP of as many steps as the schedule has, all at the last size and without guidance."""
    row = task.encode_prompts([""])
    return len(task.schedule) * forward_gflop(task.model, task.schedule.sizes[-1], row)


# Measuring


def plan_of(folder: Path, candidate: Candidate, n: int) -> Plan:
    """The pictures of a row: of the first `n` held-out captions, picture i from seed i."""
    requests = Requests([(prompt, None) for prompt in prompts_of(n)], 1, 0)
    return Plan(folder, "shapes", requests, (candidate,), BATCH, CHUNK, ALONE)


def draw_pictures(plan: Plan, timing: Timing | None = None) -> dict[str, Any]:
    """Draw the pictures of a row; returns what they cost."""
    (candidate,) = plan.candidates
    assert isinstance(candidate, DrawingModel)
    painter, costs = CandidatePainter(plan, candidate), Costs(plan, candidate, timing)
    draw_share(painter)
    plan.write_index(candidate)  # for `swd compare`
    costs.measure(painter)
    painter.free()
    return costs.load() or {}


def judged_pictures(plan: Plan, judge_path: str) -> Judged:
    """Features and statements of the drawn pictures of a row, as the judge reads them."""
    (candidate,) = plan.candidates
    features, readings = JudgeFeatures(judge_path), ShapesAccuracy(judge_path)
    scoring = Scoring(plan, {"fid": Frechet(features), "accuracy": readings}, None, Bootstrap())
    scoring.extract_share()
    choices = scoring.stored(readings.extractors[0], candidate.name).long().tolist()
    return Judged(scoring.stored(features, candidate.name), statements_of(choices, scoring.prompts))


def reference_features(judge: Judge, n: int, seed: int, device: torch.device, batch: int = 32) -> Tensor:
    """Features `[n, D]` of `n` rendered pictures of the held-out split."""
    dataset = ShapesDataset(SPLIT, seed, length=n)
    parts = []
    for chunk in chunks_of(n, batch):
        pixels = torch.stack([torch.as_tensor(dataset[i]["pixels"]) for i in chunk])
        parts.append(judge.features(pixels.to(device)).cpu())
    return torch.cat(parts)


def judge_pictures(judge: Judge, pixels: Tensor, prompts: Sequence[str]) -> Judged:
    """Features and scores of pictures `[B, 3, 128, 128]` of B prompts."""
    scores = score_pictures(judge, pixels, prompts)
    return Judged(judge.features(pixels).cpu(), torch.stack([pack_score(s) for s in scores]))


def unpack_score(row: Tensor) -> Score:
    """Inverse of `pack_score`."""
    pairs = zip(ATTRIBUTES, row.tolist(), strict=True)
    return {name: (int(hits), int(count)) for name, (hits, count) in pairs if count}


def make_row(name: str, costs: Mapping[str, Any], judged: Judged, reference: Tensor, source: str = "live") -> ResultRow:
    """A row from its measurements.

    Args:
        name: who draws.
        costs: as `draw_pictures` returns them.
        judged: of the pictures.
        reference: features of rendered pictures `[N, D]`.
        source: see `ResultRow`.
    """
    accuracy, latency = judged.accuracy(), costs["latency"]
    return ResultRow(
        name=name,
        steps=costs["steps"],
        nfe=costs["evaluations"],
        gflop=1000 * costs["tflop"],
        ms_per_image=1000 * (latency["denoise_s"] + latency["decode_s"]),
        fid=frechet_distance(reference, judged.features),
        prompt_accuracy=accuracy["mean"],
        exact_match=accuracy["exact_match"],
        attributes={k: v for k, v in accuracy.items() if k not in ("mean", "exact_match")},
        n_pictures=len(judged),
        source=source,
    )


# Stored statistics


@dataclass(frozen=True)
class StoredStatistics:
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


def teacher_stores(task: Distiller, judge_folder: Path) -> dict[str, StoredStatistics]:
    """The stores of the statistics of the teachers of `teachers`, by name of the row."""
    return {
        name: teacher_store(task, judge_folder, candidate.steps, candidate.sigmas)
        for name, candidate in teachers(task).items()
    }


def teacher_store(
    task: Distiller, judge_folder: Path, steps: int | None = None, sigmas: Sequence[float] | None = None
) -> StoredStatistics:
    """The store of the statistics of the teacher.

    Args:
        task: whose teacher it is.
        judge_folder: where they lie, beside the judge.
        steps: of the teacher; None: all.
        sigmas: noise levels of its steps; None: those of its own sampler.
    """
    model = task.model
    steps = model.teacher_steps if steps is None else steps
    own = "FlowMatchEulerDiscreteScheduler(shift=3)"
    facts = {
        "model_sha256": sha256_of(model.folder),
        "judge_sha256": sha256_of(judge_folder),
        "prompts_sha256": hashlib.sha256("\n".join(prompts_of(64)).encode()).hexdigest(),
        "guidance_scale": float(model.drawing_guidance_scale),
        "steps": steps,
        "size": list(task.schedule.sizes[-1]),
        "scheduler": own if sigmas is None else f"Euler at {', '.join(f'{sigma:.6f}' for sigma in sigmas)}",
    }
    return StoredStatistics(judge_folder / f"teacher_{steps}steps.npz", facts)


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
