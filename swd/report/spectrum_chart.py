"""Spectra as an SVG file: power by frequency, both on logarithmic axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from swd.report.page import templates

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 420, 64, 190, 36, 52
"""Outer size and margins of a chart, in its own units; names of curves stand in the right one."""
COLOURS = ("#0b5394", "#b45309", "#1c7a43", "#7c3aed", "#be123c", "#0f766e", "#6b7280")
MOST_DECADES = 8
"""Powers of ten from top to bottom; what lies below is cut off."""


@dataclass(frozen=True)
class SpectrumCurve:
    """A spectrum to draw.

    Attributes:
        name: as it stands beside the chart.
        power: at the frequencies 1, 2, ...; values that are not above zero leave a gap.
        colour: number of its colour.
        dashed: whether the line is.
    """

    name: str
    power: Sequence[float]
    colour: int
    dashed: bool = False


def spectrum_chart(curves: Sequence[SpectrumCurve], title: str, axis: str) -> str:
    """An SVG file of curves over the size of the smallest grid that holds a frequency: twice the frequency.

    Args:
        curves: what to draw; at least one value is above zero.
        title: of the chart.
        axis: name of the horizontal axis.
    """
    # Limits: whole powers of ten, and all sizes.
    logs = [math.log10(value) for curve in curves for value in curve.power if value > 0]
    high = math.ceil(max(logs) + 1e-9)
    low = max(math.floor(min(logs)), high - MOST_DECADES)
    last = max(len(curve.power) for curve in curves)

    def x(frequency: float) -> float:
        return LEFT + math.log2(frequency) / max(math.log2(last), 1e-9) * (WIDTH - LEFT - RIGHT)

    def y(log: float) -> float:
        return TOP + (high - log) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def corners(power: Sequence[float]) -> str:
        points = [(k, math.log10(value)) for k, value in enumerate(power, 1) if value > 0]
        return " ".join(f"{x(k):.1f},{y(max(log, low)):.1f}" for k, log in points)

    # Ticks at sizes that are powers of two, and at the largest.
    octaves = [2**n for n in range(int(math.log2(last)) + 1)]
    ticks = [k for k in octaves if k * 1.2 < last] + [last]
    return (
        templates()
        .get_template("spectrum.svg.j2")
        .render(
            chart={
                "width": WIDTH,
                "height": HEIGHT,
                "left": LEFT,
                "right": WIDTH - RIGHT,
                "top": TOP,
                "bottom": HEIGHT - BOTTOM,
                "title": title,
                "axis": axis,
                "rows": [(y(n), f"1e{n}") for n in range(low, high + 1)],
                "columns": [(x(k), str(2 * k)) for k in ticks],
                "curves": [
                    {
                        "name": curve.name,
                        "corners": corners(curve.power),
                        "colour": COLOURS[curve.colour % len(COLOURS)],
                        "dashed": curve.dashed,
                    }
                    for curve in curves
                ],
            }
        )
    )
