"""Runs as a report shows them: curves of `metrics.csv`, sample sheets, the recorded configuration.

A damaged or missing part becomes a note of the run, so that one bad line does not keep anybody from the rest.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swd.config import read_recorded, to_yaml
from swd.io.masking import mask, mask_text
from swd.io.tables import Table, read_table
from swd.types import UserError

METRICS, CONFIG, RECORD, SHEETS = "metrics.csv", "config.yaml", "run.json", "samples"
SHEET = re.compile(r"iteration-(\d+)\.png")
MOST_POINTS = 2000
"""Points of a curve at most, about twice the pixels of the widest chart; longer curves become means of neighbours."""


@dataclass(frozen=True)
class Curve:
    """Values of one quantity: iterations rise, and a value is None where it was not finite."""

    iterations: list[int]
    values: list[float | None]


@dataclass(frozen=True)
class Sheet:
    """A picture of all fixed prompts (rows) at all sizes (columns), as the student drew them at an iteration."""

    iteration: int
    file: Path


@dataclass(frozen=True)
class Run:
    """All that a page shows of one run.

    Attributes:
        name: unlike those of the other runs of the page.
        folder: where it lies.
        curves: by column of `metrics.csv`, e.g. "train/mmd".
        sheets: in order of their iterations.
        config: the recorded configuration, without credentials.
        command: the command line that started it; empty if it is unknown.
        notes: what is missing or damaged, a sentence each.
    """

    name: str
    folder: Path
    curves: Mapping[str, Curve] = field(default_factory=dict)
    sheets: Sequence[Sheet] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    notes: Sequence[str] = ()

    @property
    def iterations(self) -> int:
        """The last iteration that left a value or a sheet."""
        ends = [curve.iterations[-1] for curve in self.curves.values()] + [sheet.iteration for sheet in self.sheets]
        return max(ends, default=0)

    @property
    def cycle(self) -> int:
        """Iterations after which the schedule repeats: its number of steps, 1 if that is unknown."""
        return max(1, len(_sizes(self.config)))

    @property
    def sizes(self) -> list[tuple[int, ...]]:
        """Latent sizes of the schedule, (height, width) or (frames, height, width); empty if they are unknown."""
        return _sizes(self.config)

    @property
    def prompts(self) -> list[str]:
        """Prompts of the sample sheets, from the top; empty if they are unknown."""
        callbacks = self.config.get("callbacks")
        samples = callbacks.get("samples") if isinstance(callbacks, dict) else None
        found = samples.get("prompts") if isinstance(samples, dict) else None
        return [str(prompt) for prompt in found] if isinstance(found, list) else []

    @property
    def yaml(self) -> str:
        """The configuration as text; empty if there is none."""
        return to_yaml(dict(self.config)) if self.config else ""


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run."""
    return (folder / CONFIG).is_file() or (folder / METRICS).is_file()


def read_run(folder: Path, name: str) -> Run:
    """A run as it lies in its folder, also while it is still going on."""
    notes: list[str] = []
    config, command = read_record(folder, notes)
    curves = read_curves(folder / METRICS, notes)
    return Run(name, folder, curves, read_sheets(folder / SHEETS), config, command, notes)


def read_record(folder: Path, notes: list[str]) -> tuple[dict[str, Any], str]:
    """Configuration and command line of a run, without credentials; what is wrong with them is added to `notes`."""
    config: dict[str, Any] = {}
    command = ""
    try:
        config = mask(read_recorded(folder / CONFIG))
    except UserError as error:
        notes.append(f"Its configuration is not shown: {error}.")
    with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):  # then it is unknown
        command = mask_text(str(json.loads((folder / RECORD).read_text(encoding="utf-8"))["command"]))
    return config, command


def read_sheets(folder: Path) -> list[Sheet]:
    """The sample sheets of a folder, in order; none if there is no such folder."""
    found = [(SHEET.fullmatch(file.name), file) for file in folder.glob("*.png")]
    return sorted((Sheet(int(match[1]), file) for match, file in found if match), key=lambda sheet: sheet.iteration)


# Curves


def read_curves(file: Path, notes: list[str]) -> dict[str, Curve]:
    """The curves of a `metrics.csv`; what is wrong with it is added to `notes`.

    Lines may be in any order, and of two values of one iteration the later line counts, as after a resumed run.
    """
    if not file.is_file():
        notes.append(f"It kept no {METRICS} (logger=none), so it has no curves.")
        return {}
    try:
        table = read_table(file)
        step = table.needed(("step",))
    except UserError as error:
        empty = file.stat().st_size == 0
        notes.append(f"{METRICS} is empty, so it has no curves." if empty else f"Its curves are not shown: {error}.")
        return {}
    values, faults = _values(table, step)
    if faults:
        more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
        notes.append(f"{METRICS}, {faults[0]}{more}; these lines are left out.")
    if not values:
        notes.append(f"{METRICS} holds no values yet.")
    return {name: _curve(points) for name, points in values.items()}


def _values(table: Table, step: int) -> tuple[dict[str, dict[int, float]], list[str]]:
    """Values by column and iteration, and the faulty lines."""
    values: dict[str, dict[int, float]] = {}
    faults = []
    for row in table.rows:
        try:
            if row.fault:
                raise ValueError(row.fault)
            iteration = _number(row.cells[step])
            found = {name: _number(cell) for name, cell in zip(table.header, row.cells, strict=True) if cell.strip()}
            if not iteration.is_integer() or iteration < 0:
                raise ValueError(f"step {row.cells[step]} is no iteration")
        except ValueError as error:
            faults.append(f"line {row.line}: {error}")
            continue
        for name, value in found.items():
            if name not in (table.header[step], "epoch"):
                values.setdefault(name, {})[int(iteration)] = value
    return values, faults


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        raise ValueError(f"{cell[:40]!r} is no number") from None


def _curve(points: Mapping[int, float]) -> Curve:
    """A curve in order of its iterations, with at most `MOST_POINTS` points."""
    order = sorted(points)
    group = -(-len(order) // MOST_POINTS)
    iterations, values = [], []
    for start in range(0, len(order), group):
        part = order[start : start + group]
        finite = [points[i] for i in part if math.isfinite(points[i])]
        iterations.append(part[len(part) // 2] if group > 1 else part[0])
        values.append(sum(finite) / len(finite) if finite else None)
    return Curve(iterations, values)


# Configurations


def _sizes(config: Mapping[str, Any]) -> list[tuple[int, ...]]:
    schedule = config.get("schedule")
    found = schedule.get("sizes") if isinstance(schedule, dict) else None
    sizes = [(size, size) if isinstance(size, int) else size for size in found] if isinstance(found, list) else []
    usable = all(isinstance(size, list | tuple) and all(isinstance(n, int) for n in size) for size in sizes)
    return [tuple(size) for size in sizes] if usable else []


OWN = ("folder", "task", "logger")
"""Keys that are left out of comparisons: they say where a run lies, or repeat what other keys say."""
MISSING = "–"
"""Text in place of a key that a configuration lacks."""


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Keys whose values differ between the runs that have a configuration, each with one value a run.

    `task` counts only in what is its own: model, schedule and loss stand there once more.
    """
    flat = [_flat(run.config) for run in runs]
    known = [index for index, run in enumerate(runs) if run.config]
    keys = dict.fromkeys(key for values in flat for key in values)
    return {
        key: [values.get(key, MISSING) for values in flat]
        for key in keys
        if len({flat[index].get(key, MISSING) for index in known}) > 1
    }


def _flat(config: Mapping[str, Any]) -> dict[str, str]:
    repeated = {"model", "schedule", "loss", "seed"}
    task = config.get("task")
    own = {key: value for key, value in config.items() if key not in OWN}
    if isinstance(task, dict):
        own["task"] = {key: value for key, value in task.items() if key not in repeated}
    flat: dict[str, str] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(inner, f"{path}.{key}" if path else key)
        else:
            flat[path] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    walk(own, "")
    return flat
