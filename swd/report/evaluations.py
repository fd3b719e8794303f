"""Evaluations as a report shows them: their tables, and pictures of the same prompt side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swd.evaluation.result_files import RESULTS, Grid, grids, metric_names, with_interval
from swd.report.folders import PictureFolder, read_picture_folder
from swd.types import UserError

FORMAT = 1
"""The layout of `results.json` that is read here."""


@dataclass(frozen=True)
class Bar:
    """A model's value of a metric with its interval, as shares of the width of its drawing."""

    name: str
    text: str
    low: float
    value: float
    high: float


@dataclass(frozen=True)
class EvaluationSection:
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


def read_evaluation(folder: Path, name: str) -> EvaluationSection:
    """An evaluation as it lies in its folder.

    Raises:
        UserError: if its results are damaged, or of another version.
    """
    file = folder / RESULTS
    results = _read(file)
    if results.get("format") != FORMAT:
        raise UserError(f"{file} has format {results.get('format')!r}, this program reads {FORMAT}; evaluate again")
    try:
        tables = grids(results, detailed=False)
        names = [str(row["name"]) for row in results["models"]]
        bars = {metric: bars_of(results, metric) for metric in metric_names(results)}
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{file} is damaged ({type(error).__name__}: {error}); run the evaluation again") from None
    pictures = {}
    for model in names:
        place = folder / "pictures" / model
        if place.resolve().parent == (folder / "pictures").resolve() and (place / "index.jsonl").is_file():
            pictures[model] = read_picture_folder(place)
    return EvaluationSection(name, folder, str(results.get("command", "")), tables, bars, pictures)


# Intervals


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
