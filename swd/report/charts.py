"""Curves as inline SVG, and numbers as short texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from swd.report.page import templates

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 210, 56, 12, 10, 30
"""Outer size and margins of a chart, in its own units."""

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
"""Losses in words."""


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
    low, high = min(*ticks, *known), max(*ticks, *known)
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
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def tick_text(tick: float, ticks: Sequence[float]) -> str:
    """A tick with as many decimals as it needs to differ from its neighbours."""
    step = abs(ticks[1] - ticks[0])
    if step < 1e-4 or abs(tick) >= 1e5:
        return f"{tick:.1e}" if tick else "0"
    return f"{tick:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"
