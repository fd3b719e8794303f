"""Evaluations as a report shows them: their tables, and pictures of the same prompt side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swd.report.folders import PictureFolder, read_pictures
from swd.types import UserError

RESULTS = "results.json"
FORMAT = 1
"""The layout of `results.json` that is read here."""
ARROWS = {"higher": "↑", "lower": "↓"}
"""Which way a metric is better."""


@dataclass(frozen=True)
class Grid:
    """A table as text: its title, the titles of its columns, and its rows."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Bar:
    """A model's value of a metric with its interval, as shares of the width of its drawing."""

    name: str
    text: str
    low: float
    value: float
    high: float


@dataclass(frozen=True)
class Evaluation:
    """All that a page shows of one evaluation.

    Attributes:
        name: unlike those of the other folders of the page.
        folder: where it lies.
        command: the command line that made it; empty if it is unknown.
        grids: its tables.
        bars: by metric, the models' values with their intervals.
        pictures: by model, the folder of its pictures; those that have no index are left out.
    """

    name: str
    folder: Path
    command: str
    grids: Sequence[Grid]
    bars: Mapping[str, Sequence[Bar]]
    pictures: Mapping[str, PictureFolder]


def is_evaluation(folder: Path) -> bool:
    """Whether a folder is that of an evaluation: the results of a demo are another table."""
    if not (folder / RESULTS).is_file():
        return False
    return "models" in _read(folder / RESULTS)


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read ({error}); run the evaluation again") from None
    if not isinstance(found, dict):
        raise UserError(f"{file} is damaged (it holds no keys with values); run the evaluation again")
    return found


def read_evaluation(folder: Path, name: str) -> Evaluation:
    """An evaluation as it lies in its folder.

    Raises:
        UserError: if its results are damaged, or of another version.
    """
    file = folder / RESULTS
    results = _read(file)
    if results.get("format") != FORMAT:
        raise UserError(f"{file} has format {results.get('format')!r}, this program reads {FORMAT}; evaluate again")
    try:
        grids = [models_grid(results)]
        grids += [pairs_grid(results)] if results.get("pairs") else []
        grids += [published_grid(results)] if results.get("published") else []
        names = [str(row["name"]) for row in results["models"]]
        bars = {metric: bars_of(results, metric) for metric in metric_names(results)}
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{file} is damaged ({type(error).__name__}: {error}); run the evaluation again") from None
    pictures = {}
    for model in names:
        place = folder / "pictures" / model
        if place.resolve().parent == (folder / "pictures").resolve() and (place / "index.jsonl").is_file():
            pictures[model] = read_pictures(place)
    return Evaluation(name, folder, str(results.get("command", "")), grids, bars, pictures)


# Tables


def metric_names(results: Mapping[str, Any]) -> list[str]:
    """Names of all metrics, in order."""
    return list(dict.fromkeys(str(name) for row in results["models"] for name in row["metrics"]))


def models_grid(results: Mapping[str, Any]) -> Grid:
    """One row a model: metrics with intervals, then costs."""
    names = metric_names(results)
    better = {name: metric.get("better") for row in results["models"] for name, metric in row["metrics"].items()}
    columns = ["model", *(f"{name} {ARROWS.get(better[name], '')}".strip() for name in names)]
    columns += ["steps", "evaluations", "TFLOP", "s / picture", "memory, GB"]
    rows = []
    for row in results["models"]:
        memory = row.get("peak_memory_bytes")
        costs = [
            row.get("steps"),
            row.get("evaluations"),
            row.get("tflop"),
            (row.get("latency") or {}).get("per_picture_s"),
        ]
        metrics = [with_interval(row["metrics"].get(name)) for name in names]
        rows.append([str(row["name"]), *metrics, *map(shown, costs), shown(None if memory is None else memory / 1e9)])
    count = results["prompts"]["n"] * results.get("images_per_prompt", 1)
    return Grid(f"Models, {count:,} pictures each", columns, rows)


def pairs_grid(results: Mapping[str, Any]) -> Grid:
    """Differences to the first model; they are settled where the interval leaves out 0."""
    rows = []
    for pair in results["pairs"]:
        low, high = pair.get("low"), pair.get("high")
        verdict = "–" if low is None else "yes" if low > 0 or high < 0 else "no"
        rows.append(
            [str(pair["b"]), str(pair["metric"]), with_interval({**pair, "value": pair["difference"]}), verdict]
        )
    first = results["pairs"][0]["a"]
    return Grid(f"Differences to {first}", ["model", "metric", f"minus {first}", "settled"], rows)


def published_grid(results: Mapping[str, Any]) -> Grid:
    """Published numbers: measured by others, with other programs, on other machines."""
    rows = results["published"]
    names = list(dict.fromkeys(str(name) for row in rows for name in row.get("metrics", {})))
    cells = [
        [
            str(row["name"]),
            str(row["data"]),
            shown(row.get("steps")),
            *(shown(row.get("metrics", {}).get(name)) for name in names),
        ]
        for row in rows
    ]
    return Grid(f"Published, not measured here ({rows[0]['source']})", ["model", "data", "steps", *names], cells)


def with_interval(metric: Mapping[str, Any] | None) -> str:
    """A value as "2.68 [2.51, 2.90]", with its floor where it has one."""
    if metric is None:
        return shown(None)
    text = shown(metric["value"])
    if metric.get("low") is not None:
        text += f" [{shown(metric['low'])}, {shown(metric['high'])}]"
    return f"{text}, floor {shown(metric['floor'])}" if metric.get("floor") is not None else text


def shown(value: Any) -> str:
    """A number with 4 significant digits, a whole number as it is, and a dash for none."""
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    return f"{value:#.4g}".rstrip(".") if 1e-4 <= abs(value) < 1e4 or value == 0 else f"{value:.3g}"


def bars_of(results: Mapping[str, Any], metric: str) -> list[Bar]:
    """The models' values of a metric on a common scale from 0 (left) to 1 (right); a model without one is left out."""
    found = []
    for row in results["models"]:
        entry = row["metrics"].get(metric)
        if entry and entry["value"] is not None:
            value = float(entry["value"])
            low, high = entry.get("low"), entry.get("high")
            found.append(
                (str(row["name"]), entry, value if low is None else low, value, value if high is None else high)
            )
    if not found:
        return []
    least, most = min(low for _, _, low, _, _ in found), max(high for *_, high in found)
    span = most - least or 1.0
    return [
        Bar(name, with_interval(entry), *((number - least) / span for number in (low, value, high)))
        for name, entry, low, value, high in found
    ]
