"""Curves lie where their values are, ticks are round, numbers are short."""

from __future__ import annotations

import math
import re

import pytest

from swd.report import charts
from swd.report.page import significant


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0.0, 1.0, [0.0, 0.5, 1.0]), (0.03, 0.29, [0.0, 0.1, 0.2, 0.3]), (1, 160, [0, 50, 100, 150, 200])],
)
def test_ticks_are_round_and_span_the_values(low: float, high: float, ticks: list[float]) -> None:
    assert charts.nice_ticks(low, high) == pytest.approx(ticks)


def test_ticks_of_a_constant_and_of_negative_values() -> None:
    for low, high in ((0.0, 0.0), (5.0, 5.0), (-3.0, -3.0), (-0.4, 0.3), (1e-9, 3e-9), (0, 1e7)):
        ticks = charts.nice_ticks(low, high)
        assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 8
        assert len({charts.tick_text(t, ticks) for t in ticks}) == len(ticks)


def test_rolling_mean_takes_whole_cycles() -> None:
    assert charts.rolling_mean([1.0, 3.0, 5.0, 7.0], 2) == [(1.5, 2.0), (2.5, 4.0), (3.5, 6.0)]
    assert charts.rolling_mean([1.0, 2.0], 4) == [(1.5, 1.5)]


def test_curve_is_drawn_where_its_values_are() -> None:
    svg = charts.chart([0.0, 1.0], 1, "loss")
    points = re.search(r'class="raw" points="([^"]+)"', svg)
    assert points is not None
    first, last = (tuple(map(float, point.split(","))) for point in points.group(1).split())
    assert first == (charts.LEFT, charts.HEIGHT - charts.BOTTOM)
    assert last == (charts.WIDTH - charts.RIGHT, charts.TOP)


@pytest.mark.parametrize(
    ("value", "text"), [(0.02861, "0.0286"), (12.345, "12.3"), (1234.5, "1234"), (0, "0"), (math.nan, "nan")]
)
def test_significant_digits(value: float, text: str) -> None:
    assert significant(value) == text
