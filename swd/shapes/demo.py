"""The parts of `swd demo`: compare student and teacher, and report."""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from swd.config import stored
from swd.io.files import write_json, write_text
from swd.io.job_log import JobLog, say
from swd.metrics.fid import frechet_distance
from swd.modules.distiller import Distiller
from swd.shapes import contest, report
from swd.shapes.contest import Advance, Contender, Judged, ResultRow, Timing
from swd.shapes.distances import distances
from swd.shapes.judge import Judge
from swd.types import UserError

STORE_COMMAND = "swd demo store_teacher=true"
"""The command that makes the stored statistics of the teacher."""
BATCH = 16
"""Pictures drawn in one batch for judging."""
TIMED_BATCH = 8
"""Pictures drawn in one batch for timing."""


# Measuring


@dataclass(frozen=True)
class Study:
    """Results of the comparison.

    Attributes:
        rows: rows of the table, the student last.
        timings: timing of each row, with pictures of the first prompts.
        prompts: prompts of the evaluation.
        fid_floor: FID between two sets of rendered pictures, the lowest that can be expected.
        full_size_gflop: cost of the student's number of steps if all were at full size.
    """

    rows: list[ResultRow]
    timings: list[Timing]
    prompts: list[str]
    fid_floor: float
    full_size_gflop: float

    @property
    def names(self) -> list[str]:
        """Names of the rows."""
        return [row.name for row in self.rows]


def compare(cfg: DictConfig, task: Distiller, judge: Judge, judge_folder: Path, clock: Clock) -> Study:
    """Time and judge every contender on the same prompts."""
    n = cfg.n_pictures
    device = task.device
    prompts = contest.prompts_of(n)
    with clock.phase("reference"), bar("render reference pictures", 2 * n) as advance:
        reference = contest.reference_features(judge, n, contest.REFERENCE_SEED, device)
        advance(n)
        floor = contest.reference_features(judge, n, contest.FLOOR_SEED, device)
        advance(n)
    store = contest.teacher_store(task, judge_folder)
    rows = []
    timings = []
    features = []
    for number, contender in enumerate(contest.contenders(task)):
        with clock.phase(contender.name):
            with contender.ready():
                timing = measure_speed(cfg, contender, prompts)
                judged, source = measure_quality(cfg, contender, judge, prompts, store if number == 0 else None)
            rows.append(contest.make_row(contender, judged, reference, timing.ms_per_image, source))
            timings.append(timing)
            features.append(judged.features)
    found = distances(features, torch.cat([reference, floor]), prompts)
    rows = [replace(row, distances=each) for row, each in zip(rows, found, strict=True)]
    return Study(rows, timings, prompts, frechet_distance(reference, floor), contest.full_size_gflop(task))


def measure_speed(cfg: DictConfig, contender: Contender, prompts: Sequence[str]) -> Timing:
    """Time per picture; draws at least as many pictures as the report shows."""
    size = min(TIMED_BATCH, len(prompts))
    least = max(min(3, cfg.timing_batches), -(-cfg.shown // size))
    with bar(f"{contender.name}: time", max(cfg.timing_batches, least) * size) as advance:
        return contest.time_contender(contender, prompts, TIMED_BATCH, cfg.timing_batches, least=least, advance=advance)


def measure_quality(
    cfg: DictConfig, contender: Contender, judge: Judge, prompts: Sequence[str], store: contest.Store | None
) -> tuple[Judged, str]:
    """Judged pictures of a contender, and their source: "live" or the command that stored them."""
    if store is not None and not cfg.recompute:
        reason = store.why_not(len(prompts))
        if reason is None:
            return store.load().first(len(prompts)), f"stored: {STORE_COMMAND}"
        say(f"{contender.name}: drawing every picture now, because {reason}")
    with bar(f"{contender.name}: judge {len(prompts)} pictures", len(prompts)) as advance:
        return contest.run_contender(contender, judge, prompts, BATCH, advance), "live"


def ratios_of(study: Study) -> dict[str, dict[str, Any]]:
    """Ratios of the student to the teacher and to full-size sampling, each with its expected range."""
    teacher = study.rows[0]
    student = study.rows[-1]
    return {
        "gflop_of_full_size_steps": ratio(student.gflop, study.full_size_gflop, at_most=0.56),
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
    """The curve of every loss in a run's `metrics.csv`, one value per iteration."""
    curves: dict[str, list[float]] = {}
    if not path.is_file():
        return curves
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            for key, value in line.items():
                if key.startswith("train/") and key != "train/interval" and value:
                    curves.setdefault(key.removeprefix("train/"), []).append(float(value))
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


def describe(cfg: DictConfig, task: Distiller, judge: Judge, study: Study) -> tuple[dict[str, Any], report.Page]:
    """All measurements, as plain values for `results.json` and as the data of the report."""
    # The run's own records.
    folder = Path(cfg.folder)
    curves = read_losses(folder / "metrics.csv")
    made = json.loads((folder / "run.json").read_text())

    # Plain values.
    results = {
        "rows": [row.as_dict() for row in study.rows],
        "ratios": ratios_of(study),
        "fid_floor": study.fid_floor,
        "full_size_gflop": study.full_size_gflop,
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
        comparisons=comparisons_of(cfg, judge, study),
        progressions=progressions_of(task, study.prompts[: min(4, cfg.shown)]),
        curves=curves,
        cycle=len(task.schedule),
        config=(folder / "config.yaml").read_text().replace(f"{Path.cwd()}{os.sep}", ""),
    )
    return results, page


def comparisons_of(cfg: DictConfig, judge: Judge, study: Study) -> list[report.Comparison]:
    """The first prompts of the evaluation, with the picture of every contender and the judge's score."""
    prompts = study.prompts[: cfg.shown]
    pictures = {name: t.pictures[: cfg.shown] for name, t in zip(study.names, study.timings, strict=True)}
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


def finish(cfg: DictConfig, results: dict[str, Any], page: report.Page) -> None:
    """Write results and report into the run's folder and into its parent folder, and print the table."""
    html = report.render(page)
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


def finite(value: Any) -> Any:
    """A copy in which numbers that JSON cannot hold are None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
def bar(title: str, total: int) -> Iterator[Advance]:
    """Report the progress of a part of the demo, in pictures; see `JobLog`."""
    with JobLog(title, total, "picture") as log:
        yield log.advance


def short(path: Path) -> str:
    """A path relative to the working directory if it lies inside it, else as it is."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
