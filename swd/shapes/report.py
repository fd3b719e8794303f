"""A self-contained HTML page about one run, which loads no other file."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import Tensor

from swd.io.pictures import to_pil

# Content of a page


@dataclass(frozen=True)
class Column:
    """A column of the table: its title, its explanation, and a function that formats a row's value."""

    title: str
    help: str
    text: Callable[[Mapping[str, Any]], str]


COLUMNS = (
    Column("model", "who draws", lambda row: str(row["name"])),
    Column("steps", "generation steps", lambda row: str(row["steps"])),
    Column("evaluations", "network evaluations per picture; guidance takes two a step", lambda row: str(row["nfe"])),
    Column("GFLOP", "of the network, per picture", lambda row: f"{row['gflop']:.2f}"),
    Column("ms / image", "network and VAE, per picture, median over batches", lambda row: f"{row['ms_per_image']:.1f}"),
    Column("FID", "Fréchet distance of the judge's features to rendered pictures", lambda row: significant(row["fid"])),
    Column("KID", "kernel distance of the judge's whitened features, and its interval", lambda row: kid_text(row)),
    Column("accuracy", "of the prompt's attributes, mean", lambda row: f"{row['prompt_accuracy']:.3f}"),
    Column("exact", "pictures that keep all of their prompt", lambda row: f"{row['exact_match']:.3f}"),
)

RATIOS = {
    "speedup_over_teacher": "the teacher's speed",
    "gflop_of_full_size_steps": "the network cost of as many full-size steps",
    "accuracy_of_teacher": "the teacher's prompt accuracy",
    "fid_of_teacher": "the teacher's FID",
}
"""Denominators of the student's ratios, in words."""

LOSSES = {
    "loss": "total of the student's losses",
    "x0_mse": "squared distance of the student's prediction to the data",
    "mmd": "distance of feature means (MMD)",
    "dmd": "distribution matching against the teacher (DMD)",
    "dmd_gap": "mean distance between fake score and teacher",
    "gan": "student against the discriminator (GAN)",
    "fake_score": "fake score's error on the student's pictures",
    "discriminator": "discriminator's own loss",
    "discriminator_accuracy": "share that the discriminator gets right",
}


@dataclass(frozen=True)
class Comparison:
    """One prompt with the picture `[3, H, W]` in [-1, 1] and the judge's score of every model, by name of its row."""

    prompt: str
    pictures: Mapping[str, Tensor]
    marks: Mapping[str, str]


@dataclass(frozen=True)
class Progression:
    """One prompt with the student's predictions `[3, H, W]` in [-1, 1] at all steps, each with a label."""

    prompt: str
    steps: Sequence[tuple[str, Tensor]]


@dataclass(frozen=True)
class Page:
    """All data of a report.

    Attributes:
        results: contents of `results.json`.
        comparisons: pictures of all models, prompt by prompt.
        progressions: predictions of the student, step by step.
        curves: every loss, one value per iteration.
        cycle: iterations after which the schedule repeats; curves are averaged over it.
        config: the resolved configuration.
    """

    results: Mapping[str, Any]
    comparisons: Sequence[Comparison]
    progressions: Sequence[Progression]
    curves: Mapping[str, Sequence[float]]
    cycle: int
    config: str


# Numbers as text


def significant(value: float, digits: int = 3) -> str:
    """A number with `digits` significant digits and without an exponent."""
    if not math.isfinite(value) or value == 0:
        return str(value) if value else "0"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def ratio_lines(results: Mapping[str, Any]) -> list[str]:
    """One line for each ratio, with its expected range."""
    lines = []
    for key, text in RATIOS.items():
        ratio = results["ratios"][key]
        value = "undefined" if ratio["value"] is None else f"{ratio['value']:.2f}"
        verdict = (
            "" if ratio["met"] is None else f"  (expected {ratio['expected']}: {'met' if ratio['met'] else 'missed'})"
        )
        lines.append(f"student: {value} x {text}{verdict}")
    return lines


def kid_text(row: Mapping[str, Any]) -> str:
    """A row's kernel distance and half the width of its interval; a dash where there is none."""
    kid = (row.get("distances") or {}).get("kid")
    return f"{kid['value']:.3f} ± {(kid['high'] - kid['low']) / 2:.3f}" if kid else "–"


def difference_lines(results: Mapping[str, Any]) -> list[str]:
    """For every row but the first, whether its kernel distance can be told from the first row's."""
    lines = []
    for row in results["rows"][1:]:
        found = (row.get("distances") or {}).get("kid_over_first")
        if found:
            settled = "worse" if found["low"] > 0 else "better" if found["high"] < 0 else "not told apart"
            numbers = f"{found['value']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"
            lines.append(f"{row['name']}: KID {numbers} over {results['rows'][0]['name']} ({settled})")
    return lines


# The page

WIDTH = 460
"""Outer width of a chart, in the units of its SVG, as all lengths below."""
HEIGHT = 210
"""Outer height of a chart."""
LEFT = 56
"""Left margin of a chart, which holds the numbers of the ticks."""
RIGHT = 12
TOP = 10
BOTTOM = 30


def templates() -> Environment:
    """The templates beside this file. All values are escaped, and an undefined name is an error."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"significant": significant, "png": png}
    return environment


def render(page: Page) -> str:
    """The page as one HTML document."""
    results = page.results
    rows = results["rows"]
    order = [*(name for name in LOSSES if name in page.curves), *(name for name in page.curves if name not in LOSSES)]
    template = templates().get_template("report.html.j2")
    return template.render(
        page=page,
        results=results,
        rows=rows,
        columns=COLUMNS,
        attributes=list(dict.fromkeys(name for row in rows for name in row["attributes"])),
        stored=[row["name"] for row in rows if row["source"] != "live"],
        ratios={text: results["ratios"][key] for key, text in RATIOS.items()},
        differences=difference_lines(results),
        losses={name: LOSSES.get(name, "") for name in order},
        frame=frame(),
        phases=[[name, f"{seconds:.1f}"] for name, seconds in results["wall_seconds"].items()],
        charts={name: plot(page.curves[name], page.cycle, name) for name in order},
    )


def png(pixels: Tensor) -> str:
    """The picture `[3, H, W]` in [-1, 1] as the base64 text of a PNG file."""
    buffer = io.BytesIO()
    to_pil(pixels).save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


# Curves


@dataclass(frozen=True)
class Plot:
    """A curve in the units of its chart: x to the right, y downwards.

    Attributes:
        name: of the loss.
        raw: corners of the line through all values, in SVG's notation.
        mean: corners of the line of the mean over whole cycles.
        rows: height and text of every tick of the values.
        columns: position and text of every tick of the iterations.
    """

    name: str
    raw: str
    mean: str
    rows: Sequence[tuple[float, str]]
    columns: Sequence[tuple[float, str]]


def plot(values: Sequence[float], cycle: int, name: str) -> Plot | None:
    """A curve of all values and of their mean over whole cycles; None if no value is finite."""
    known = [v for v in values if math.isfinite(v)]
    if not known:
        return None
    ticks = nice_ticks(min(known), max(known))
    low = min(*ticks, *known)
    high = max(*ticks, *known)
    last = max(len(values), 2)

    def x(iteration: float) -> float:
        return LEFT + (iteration - 1) / (last - 1) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def corners(points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in points if math.isfinite(v))

    marks = sorted({1, *(int(t) for t in nice_ticks(1, last) if 1 <= t <= last)})
    if len(marks) > 1 and marks[1] - marks[0] < last / 12:
        marks.pop(1)
    return Plot(
        name=name,
        raw=corners(list(enumerate(values, 1))),
        mean=corners(rolling_mean(values, cycle)),
        rows=[(y(t), tick_text(t, ticks)) for t in ticks],
        columns=[(x(i), str(i)) for i in marks],
    )


def chart(values: Sequence[float], cycle: int, name: str) -> str:
    """A curve as inline SVG: all values in a light colour, and their mean over whole cycles on top."""
    macro: Any = templates().get_template("chart.svg.j2").module
    return str(macro.chart(plot(values, cycle, name), frame()))


def frame() -> dict[str, int]:
    """Edges of the area of the curves, and size of the whole chart."""
    return {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": WIDTH - RIGHT, "bottom": HEIGHT - BOTTOM}


def rolling_mean(values: Sequence[float], cycle: int) -> list[tuple[float, float]]:
    """Means over `cycle` neighbouring values, each with the middle of their iterations (counted from 1)."""
    width = max(1, min(cycle, len(values)))
    return [
        (start + (width + 1) / 2, sum(values[start : start + width]) / width)
        for start in range(len(values) - width + 1)
    ]


def nice_ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, that span `low`..`high`."""
    if high <= low:
        low = low - (abs(low) or 1.0) / 2
        high = high + (abs(high) or 1.0) / 2
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def tick_text(tick: float, ticks: Sequence[float]) -> str:
    """A tick with as many decimals as it needs to differ from its neighbours."""
    step = abs(ticks[1] - ticks[0])
    if step < 1e-4 or abs(tick) >= 1e5:
        return f"{tick:.1e}" if tick else "0"
    return f"{tick:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"
