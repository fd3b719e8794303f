"""The chart of spectra: its lines are where the numbers are."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

from swd.report.spectrum_chart import SpectrumCurve, spectrum_chart

NAMESPACE = "{http://www.w3.org/2000/svg}"


def points(svg: str) -> list[list[tuple[float, float]]]:
    lines = [line.get("points", "") for line in ElementTree.fromstring(svg).iter(f"{NAMESPACE}polyline")]
    return [[(float(a), float(b)) for a, b in (pair.split(",") for pair in line.split())] for line in lines]


def test_a_power_law_is_a_straight_line_with_its_slope() -> None:
    power = [100.0 / k**2 for k in range(1, 65)]
    svg = spectrum_chart(
        [SpectrumCurve("a", power, 0), SpectrumCurve("noise", [0.1] * 64, 0, dashed=True)], "t", "side"
    )
    law, flat = points(svg)
    assert len({y for _, y in flat}) == 1 and len(law) == len(flat) == 64
    rows = {int(text): float(y) - 4 for y, text in re.findall(r'y="([\d.]+)" text-anchor="end"[^>]*>1e(-?\d+)<', svg)}
    decade = rows[0] - rows[1]
    assert sorted(rows) == list(range(min(rows), max(rows) + 1)) and abs(law[0][1] - rows[2]) < 0.1
    assert abs(flat[0][1] - rows[-1]) < 0.1
    # Ten times the frequency, a hundredth of the power.
    octave = law[1][0] - law[0][0]
    for x, y in law:
        assert abs(y - law[0][1] - 2 * decade * math.log10(2) * (x - law[0][0]) / octave) < 0.3


def test_names_are_escaped_and_what_is_far_below_stays_inside() -> None:
    svg = spectrum_chart([SpectrumCurve("<b>", [1.0, 0.0, 1e-30], 0)], "a & b", "side")
    root = ElementTree.fromstring(svg)
    assert {"<b>", "a & b"} <= {text.text for text in root.iter(f"{NAMESPACE}text")}
    (line,) = points(svg)
    bottom = max(float(each.get("y1", 0)) for each in root.iter(f"{NAMESPACE}line"))
    assert len(line) == 2 and line[1][1] <= bottom
