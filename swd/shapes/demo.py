"""The parts of `swd demo`: compare student and teacher, and report."""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor

from swd.config import stored
from swd.evaluation.candidates import DrawingModel
from swd.evaluation.timing import Timing
from swd.io.files import finite, write_json, write_text
from swd.io.job_log import JobLog, print_line
from swd.metrics.features import read_pictures
from swd.metrics.fid import frechet_distance
from swd.modules.distiller import Distiller
from swd.shapes import contest, report
from swd.shapes.contest import Judged, ResultRow, StoredStatistics
from swd.shapes.distances import distances
from swd.shapes.judge import Judge
from swd.shapes.rendered import FLOOR_SEED, REFERENCE_SEED, prompts_of
from swd.types import UserError

STORE_COMMAND = "swd demo store_teacher=true"
"""The command that makes the stored statistics of the teacher."""
TIMED_BATCH = 8
"""Pictures drawn in one batch for timing."""


# Measuring


@dataclass(frozen=True)
class DemoMeasurements:
    """Results of the comparison.

    Attributes:
        rows: rows of the table, the student last.
        pictures: `[N, 3, H, W]` in [-1, 1] of the first prompts, of each row.
        prompts: prompts of the evaluation.
        fid_floor: FID between two sets of rendered pictures, the lowest that can be expected.
        full_size_gflop: cost of the student's number of steps if all were at full size.
    """

    rows: list[ResultRow]
    pictures: list[Tensor]
    prompts: list[str]
    fid_floor: float
    full_size_gflop: float

    @property
    def names(self) -> list[str]:
        """Names of the rows."""
        return [row.name for row in self.rows]


def compare(cfg: DictConfig, task: Distiller, judge: Judge, judge_folder: Path, clock: Clock) -> DemoMeasurements:
    """Draw, time and judge the pictures of every row, on the same prompts and seeds."""
    n, device, run = cfg.n_pictures, task.device, Path(cfg.folder)
    with clock.phase("reference"), bar("render reference pictures", 2 * n) as advance:
        reference = contest.reference_features(judge, n, REFERENCE_SEED, device)
        advance(n)
        floor = contest.reference_features(judge, n, FLOOR_SEED, device)
        advance(n)
    prompts = prompts_of(n)
    rows, pictures, features = [], [], []
    stores = contest.teacher_stores(task, judge_folder)
    contenders = contest.teachers(task) | contest.student(task, run)
    for name, candidate in contenders.items():
        with clock.phase(name):
            stored = stored_statistics(cfg, stores[name], name) if name in stores else None
            # With stored statistics only the pictures that the report shows are drawn.
            plan = contest.plan_of(run / "evaluation", candidate, n if stored is None else cfg.shown)
            # Pictures of the same model were drawn just before, so nothing is to be warmed up.
            costs = contest.draw_pictures(plan, Timing(TIMED_BATCH, timed_batches(cfg, task, candidate), warmup=0))
            judged = contest.judged_pictures(plan, str(judge_folder)) if stored is None else stored
            source = "live" if stored is None else f"stored: {STORE_COMMAND}"
            rows.append(contest.make_row(name, costs, judged, reference, source))
            features.append(judged.features)
            pictures.append(torch.stack([*read_pictures(plan.pictures(candidate).files[: cfg.shown])]) / 127.5 - 1)
    found = distances(features, torch.cat([reference, floor]), prompts)
    rows = [replace(row, distances=each) for row, each in zip(rows, found, strict=True)]
    return DemoMeasurements(rows, pictures, prompts, frechet_distance(reference, floor), contest.full_size_gflop(task))


def pictures_drawn(cfg: DictConfig, task: Distiller, judge_folder: Path) -> list[tuple[int, float]]:
    """For each row the pictures that `compare` will draw, and network evaluations of each, as full-size ones."""
    sizes = [math.prod(size) for size in task.schedule.sizes]
    drawn = [(cfg.n_pictures + TIMED_BATCH * cfg.timing_batches, sum(sizes) / sizes[-1])]
    stores = contest.teacher_stores(task, judge_folder)
    for name, candidate in contest.teachers(task).items():
        stored = not cfg.recompute and stores[name].why_not(cfg.n_pictures) is None
        timed = TIMED_BATCH * timed_batches(cfg, task, candidate)
        drawn.append(((cfg.shown if stored else cfg.n_pictures) + timed, candidate.evaluations))
    return drawn


def timed_batches(cfg: DictConfig, task: Distiller, candidate: DrawingModel) -> int:
    """Batches of a row that are timed: fewer of one that takes more steps than the student, at least one."""
    few = len(task.schedule)
    return max(1, cfg.timing_batches * few // max(few, candidate.steps))


def stored_statistics(cfg: DictConfig, store: StoredStatistics, name: str) -> Judged | None:
    """The stored statistics of a teacher; None if they are not wanted, or are of something else."""
    if cfg.recompute:
        return None
    reason = store.why_not(cfg.n_pictures)
    if reason is not None:
        print_line(f"{name}: drawing every picture now, because {reason}")
        return None
    return store.load().first(cfg.n_pictures)


def ratios_of(measured: DemoMeasurements) -> dict[str, dict[str, Any]]:
    """Ratios of the student to the teacher and to full-size sampling, each with its expected range."""
    teacher = measured.rows[0]
    student = measured.rows[-1]
    return {
        "gflop_of_full_size_steps": ratio(student.gflop, measured.full_size_gflop, at_most=0.56),
        "accuracy_of_teacher": ratio(student.prompt_accuracy, teacher.prompt_accuracy, at_least=0.95),
        "fid_of_teacher": ratio(student.fid, teacher.fid, at_most=1.5),
        "speedup_over_teacher": ratio(teacher.ms_per_image, student.ms_per_image),
    }


def ratio(
    a: float, b: float, at_most: float | None = None, at_least: float | None = None
) -> dict[str, float | str | bool | None]:
    """`a / b` with its expected range and whether it lies in there; value and verdict are None if b is 0."""
    value = a / b if b else None
    expected = f"<= {at_most:g}" if at_most is not None else f">= {at_least:g}" if at_least is not None else None
    met = None
    if value is not None and expected is not None:
        met = (at_most is None or value <= at_most) and (at_least is None or value >= at_least)
    return {"value": value, "expected": expected, "met": met}


# Losses of the run


def read_losses(path: Path) -> dict[str, list[float]]:
    """The curve of every loss in a run's `metrics.csv`, one value per iteration; version 0.1.0 called them `train/`."""
    curves: dict[str, list[float]] = {}
    if not path.is_file():
        return curves
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            for key, value in line.items():
                group, _, name = key.partition("/")
                if group in ("loss", "train") and name != "interval" and value:
                    curves.setdefault(name, []).append(float(value))
    return curves


def first_and_last(curve: Sequence[float], cycle: int) -> list[float]:
    """Means over the beginning and the end of a curve: at most a fifth of it, and whole cycles of the schedule.

    A loss depends on the step of the schedule, so means over parts of a cycle would not be comparable.
    """
    cycles = max(1, len(curve) // cycle)
    window = cycle * max(1, min(10, cycles // 5))
    first = curve[:window]
    last = curve[-window:]
    return [sum(first) / len(first), sum(last) / len(last)]


# Results


def results_and_page(
    cfg: DictConfig, task: Distiller, judge: Judge, measured: DemoMeasurements
) -> tuple[dict[str, Any], report.Page]:
    """All measurements, as plain values for `results.json` and as the data of the report."""
    # The run's own records.
    folder = Path(cfg.folder)
    curves = read_losses(folder / "metrics.csv")
    made = json.loads((folder / "run.json").read_text())

    # Plain values.
    results = {
        "rows": [row.as_dict() for row in measured.rows],
        "ratios": ratios_of(measured),
        "fid_floor": measured.fid_floor,
        "full_size_gflop": measured.full_size_gflop,
        "n_pictures": cfg.n_pictures,
        "losses": {name: first_and_last(curve, len(task.schedule)) for name, curve in curves.items()},
        "iterations": int(cfg.trainer.max_steps),
        "terms": list(task.terms),
        "schedule": {
            "sigmas": list(task.schedule.sigmas),
            "sizes": [list(size) for size in task.schedule.sizes],
            "pixels": [list(task.encoders.pixel_size(size)) for size in task.schedule.sizes],
        },
        "machine": machine(task),
        "command": made["command"],
        "versions": {"python": made["python"]} | made["versions"],
        "folder": short(Path(stored(cfg)["folder"])),  # no value of the environment
    }

    # The page shows pictures too.
    page = report.Page(
        results=results,
        comparisons=comparisons_of(cfg, judge, measured),
        progressions=progressions_of(task, measured.prompts[: min(4, cfg.shown)]),
        curves=curves,
        cycle=len(task.schedule),
        config=(folder / "config.yaml").read_text().replace(f"{Path.cwd()}{os.sep}", ""),
    )
    return results, page


def comparisons_of(cfg: DictConfig, judge: Judge, measured: DemoMeasurements) -> list[report.Comparison]:
    """The first prompts of the evaluation, with the picture of every contender and the judge's score."""
    prompts = measured.prompts[: cfg.shown]
    pictures = dict(zip(measured.names, measured.pictures, strict=True))
    marks = {}
    for name, drawn in pictures.items():
        scores = contest.judge_pictures(judge, drawn.to(next(judge.parameters()).device), prompts).scores.sum(1)
        marks[name] = [f"{hits}/{count}" for hits, count in scores.tolist()]
    return [
        report.Comparison(prompt, {name: pictures[name][i] for name in pictures}, {n: marks[n][i] for n in marks})
        for i, prompt in enumerate(prompts)
    ]


def progressions_of(task: Distiller, prompts: Sequence[str]) -> list[report.Progression]:
    """The student's prediction at every step of its schedule."""
    _, steps = task.sample(list(prompts), list(range(len(prompts))), keep_x0=True)
    labels = [
        f"σ {sigma:.2f}, {'×'.join(map(str, task.encoders.pixel_size(size)))}"
        for sigma, size in zip(task.schedule.sigmas, task.schedule.sizes, strict=True)
    ]
    return [
        report.Progression(prompt, [(label, drawn[i].cpu()) for label, drawn in zip(labels, steps, strict=True)])
        for i, prompt in enumerate(prompts)
    ]


def machine(task: Distiller) -> dict[str, Any]:
    """The machine that the times were measured on."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(task.device) if task.device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "precision": str(task.networks.backbone.dtype).removeprefix("torch."),
    }


def write_and_print(cfg: DictConfig, results: dict[str, Any], page: report.Page) -> None:
    """Write results and report into the run's folder and into its parent folder, and print the table."""
    html = report.render_page(page)
    latest = Path(cfg.output) / cfg.name
    for folder in (Path(cfg.folder), latest):
        write_json(folder / "results.json", finite(results))
        write_text(folder / "report.html", html)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(terminal_table(results["rows"]))
    for line in report.ratio_lines(results) + report.difference_lines(results):
        console.print(line, markup=False, highlight=False)
    print(f"{results['wall_seconds']['total'] / 60:.1f} minutes")
    print(latest / "report.html")


def terminal_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The table for the terminal."""
    table = Table()
    for i, column in enumerate(report.COLUMNS):
        table.add_column(column.title, justify="right" if i else "left")
    for row in rows:
        table.add_row(*(column.text(row) for column in report.COLUMNS))
    return table


# Time and progress


class Clock:
    """Wall time by phase.

    Args:
        setup: seconds spent on installation before this process began, None if unknown.
    """

    def __init__(self, setup: float | None = None) -> None:
        self.began = time.monotonic()
        self.phases: dict[str, float] = {} if setup is None else {"setup": setup}
        self.phases["import"] = _process_seconds()
        self.before = sum(self.phases.values())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time that the context takes to a phase."""
        start = time.monotonic()
        yield
        self.phases[name] = self.phases.get(name, 0.0) + time.monotonic() - start

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase, and in total until now."""
        total = self.before + time.monotonic() - self.began
        return {name: round(value, 2) for name, value in (self.phases | {"total": total}).items()}


def setup_seconds() -> float | None:
    """Seconds that `make` spent on installation, from the environment; None if they are not given."""
    text = os.environ.get("SWD_SETUP_SECONDS", "")
    try:
        return max(0.0, float(text)) if text else None
    except ValueError:
        raise UserError(f"SWD_SETUP_SECONDS={text!r} is not a number of seconds; unset it") from None


def _process_seconds() -> float:
    """Seconds since this process began; 0 if the system does not report them."""
    try:
        ticks = float(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return max(0.0, uptime - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return 0.0


@contextmanager
def bar(title: str, total: int) -> Iterator[Callable[[int], object]]:
    """Report the progress of a part of the demo, in pictures; see `JobLog`."""
    with JobLog(title, total, "picture") as log:
        yield log.advance


def short(path: Path) -> str:
    """A path relative to the working directory if it lies inside it, else as it is."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
