"""The report: whole, offline, escaped; its numbers; and the demo's own arithmetic."""

from __future__ import annotations

import base64
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from swd.io.pictures import to_pil
from swd.shapes import demo, report
from swd.types import UserError

NAMES = ("teacher, 28 steps", "teacher, 4 steps", "student, 4 steps, scale-wise")
EVIL = "a <script>alert('&')</script> \"star\""


def row(name: str, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "steps": 4,
        "nfe": 8,
        "gflop": 7.944,
        "ms_per_image": 82.66,
        "fid": 0.02861,
        "prompt_accuracy": 0.9312,
        "exact_match": 0.5,
        "attributes": {"shape": 0.25, "colour": 0.75},
        "n_pictures": 8,
        "source": "live",
    } | more


def ratio(value: float | None, expected: str | None = None, met: bool | None = None) -> dict[str, Any]:
    return {"value": value, "expected": expected, "met": met}


def build_page(**more: Any) -> report.Page:
    results = {
        "rows": [row(name) for name in NAMES],
        "ratios": {
            "gflop_of_full_size_steps": ratio(0.517, "<= 0.56", True),
            "accuracy_of_teacher": ratio(0.912, ">= 0.95", False),
            "fid_of_teacher": ratio(None, "<= 1.5"),
            "speedup_over_teacher": ratio(23.46),
        },
        "fid_floor": 0.0042,
        "n_pictures": 8,
        "iterations": 160,
        "terms": ["dmd", "mmd", "gan"],
        "schedule": {"pixels": [[48, 48], [64, 64], [96, 96], [128, 128]]},
        "wall_seconds": {"distil": 14.73, "total": 46.97},
        "machine": {"device": "CPU"},
        "versions": {"torch": "2.13.0"},
        "command": "swd demo experiment=demo_ci",
        "folder": "outputs/demo/x",
    }
    picture = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    parts = {
        "results": results,
        "comparisons": [report.Comparison(EVIL, dict.fromkeys(NAMES, picture), dict.fromkeys(NAMES, "7/8"))],
        "progressions": [report.Progression(EVIL, [("σ 1.00, 6×6", picture[:, :6, :6]), ("σ 0.60, 16×16", picture)])],
        "curves": {"x0_mse": [2.0, 1.0, 1.5, 0.5], "odd<name": [1.0, math.nan, 3.0]},
        "cycle": 2,
        "config": "prompts: ['<b>']\nseed: 0\n",
    }
    return report.Page(**(parts | more))


class Reader(HTMLParser):
    """Text, images and everything that closes wrongly."""

    VOID = {"meta", "img", "br", "hr", "link"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.text: list[str] = []
        self.tags: set[str] = set()
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_page_is_whole_and_loads_nothing() -> None:
    html = report.render(build_page())
    reader = Reader(html)
    assert html.startswith("<!doctype html>") and reader.open == []
    assert not re.search(r"https?:|//[a-z]|@import|url\(", html)
    assert not reader.tags & {"script", "link", "iframe", "object"}
    text = " ".join(" ".join(reader.text).split())
    for wanted in (*NAMES, "0.931", "0.0286", "82.7", "7.94", "swd demo experiment=demo_ci", "14.7", "0.00420"):
        assert wanted in text


def test_pictures_are_embedded_unchanged() -> None:
    page = build_page()
    reader = Reader(report.render(page))
    assert len(reader.images) == 5
    for image, pixels in zip(reader.images, [*page.comparisons[0].pictures.values()], strict=False):
        kind, data = str(image["src"]).split(",", 1)
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as found:
            assert found.tobytes() == to_pil(pixels).tobytes()
    assert (reader.images[3]["width"], reader.images[3]["height"]) == ("6", "6")


def test_everything_from_outside_is_escaped() -> None:
    html = report.render(build_page())
    assert "<script" not in html and "<b>'" not in html and "odd<name" not in html
    reader = Reader(html)
    assert any(EVIL in text for text in reader.text) and any("odd<name" in text for text in reader.text)
    assert EVIL in str(reader.images[0]["alt"])


def test_ratios_say_what_was_expected() -> None:
    lines = report.ratio_lines(build_page().results)
    assert lines == [
        "student: 23.46 x the teacher's speed",
        "student: 0.52 x the network cost of as many full-size steps  (expected <= 0.56: met)",
        "student: 0.91 x the teacher's prompt accuracy  (expected >= 0.95: missed)",
        "student: undefined x the teacher's FID",
    ]


def test_a_stored_row_is_named_as_such_and_a_run_without_losses_says_so() -> None:
    page = build_page(curves={})
    page.results["rows"][0]["source"] = "stored: swd demo store_teacher=true"
    html = report.render(page)
    assert "recompute=true" in html and "kept no losses" in html
    assert "recompute=true" not in report.render(build_page())


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0.0, 1.0, [0.0, 0.5, 1.0]), (0.03, 0.29, [0.0, 0.1, 0.2, 0.3]), (1, 160, [0, 50, 100, 150, 200])],
)
def test_ticks_are_round_and_span_the_values(low: float, high: float, ticks: list[float]) -> None:
    assert report.nice_ticks(low, high) == pytest.approx(ticks)


def test_ticks_of_a_constant_and_of_negative_values() -> None:
    for low, high in ((0.0, 0.0), (5.0, 5.0), (-3.0, -3.0), (-0.4, 0.3), (1e-9, 3e-9), (0, 1e7)):
        ticks = report.nice_ticks(low, high)
        assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 8
        assert len({report.tick_text(t, ticks) for t in ticks}) == len(ticks)


def test_rolling_mean_takes_whole_cycles() -> None:
    assert report.rolling_mean([1.0, 3.0, 5.0, 7.0], 2) == [(1.5, 2.0), (2.5, 4.0), (3.5, 6.0)]
    assert report.rolling_mean([1.0, 2.0], 4) == [(1.5, 1.5)]


def test_curve_is_drawn_where_its_values_are() -> None:
    svg = report.chart([0.0, 1.0], 1, "loss")
    points = re.search(r'class="raw" points="([^"]+)"', svg)
    assert points is not None
    first, last = (tuple(map(float, point.split(","))) for point in points.group(1).split())
    assert first == (report.LEFT, report.HEIGHT - report.BOTTOM)
    assert last == (report.WIDTH - report.RIGHT, report.TOP)


@pytest.mark.parametrize(
    ("value", "text"), [(0.02861, "0.0286"), (12.345, "12.3"), (1234.5, "1234"), (0, "0"), (math.nan, "nan")]
)
def test_significant_digits(value: float, text: str) -> None:
    assert report.significant(value) == text


# The demo's arithmetic


def test_losses_are_compared_over_whole_cycles() -> None:
    flat = [1.0, 2.0, 3.0, 4.0] * 20  # only the schedule's step makes a difference
    first, last = demo.first_and_last(flat, 4)
    assert first == last == 2.5
    assert demo.first_and_last([8.0, 6.0, 4.0, 2.0], 2) == [7.0, 3.0]
    assert demo.first_and_last([8.0, 6.0], 4) == [7.0, 7.0]
    assert demo.first_and_last([float(i) for i in range(20)], 2) == [1.5, 17.5]  # two cycles of ten


def test_losses_are_read_from_the_runs_table(tmp_path: Path) -> None:
    table = tmp_path / "metrics.csv"
    table.write_text("epoch,step,train/interval,train/mmd,train/gan\n0,1,0.0,0.5,\n0,2,1.0,0.25,0.75\n")
    assert demo.read_losses(table) == {"mmd": [0.5, 0.25], "gan": [0.75]}
    assert demo.read_losses(tmp_path / "none.csv") == {}


def test_ratio_knows_whether_it_is_as_expected() -> None:
    assert demo.ratio(1.0, 2.0, at_most=0.5) == ratio(0.5, "<= 0.5", True)
    assert demo.ratio(1.0, 2.0, at_least=0.95) == ratio(0.5, ">= 0.95", False)
    assert demo.ratio(3.0, 2.0) == ratio(1.5)
    assert demo.ratio(1.0, 0.0, at_most=1.5) == ratio(None, "<= 1.5")


def test_results_hold_no_number_that_json_lacks() -> None:
    assert demo.finite({"a": [1.0, math.nan], "b": {"c": math.inf, "d": "x"}}) == {
        "a": [1.0, None],
        "b": {"c": None, "d": "x"},
    }


def test_clock_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(demo.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(demo, "_process_seconds", lambda: 2.0)
    clock = demo.Clock(setup=30.0)
    for _ in range(2):
        with clock.phase("distil"):
            now[0] += 5
    now[0] += 1
    assert clock.seconds() == {"setup": 30.0, "import": 2.0, "distil": 10.0, "total": 43.0}


def testsetup_seconds_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SWD_SETUP_SECONDS", raising=False)
    assert demo.setup_seconds() is None
    monkeypatch.setenv("SWD_SETUP_SECONDS", "12")
    assert demo.setup_seconds() == 12.0
    monkeypatch.setenv("SWD_SETUP_SECONDS", "soon")
    with pytest.raises(UserError, match="not a number"):
        demo.setup_seconds()


def test_a_distance_stands_with_its_interval_and_says_what_it_settles() -> None:
    def kid(value: float, half: float) -> dict[str, float]:
        return {"value": value, "low": value - half, "high": value + half, "level": 0.95}

    overs = (None, kid(0.05, 0.02), kid(-0.004, 0.02))
    rows = [
        row(name, distances={"kid": kid(0.1, 0.031), "kid_over_first": over, "fid_inf": None})
        for name, over in zip(NAMES, overs, strict=True)
    ]
    assert report.kid_text(rows[0]) == "0.100 ± 0.031"
    assert report.kid_text(row("old")) == report.kid_text(row("few", distances=None)) == "–"
    lines = report.difference_lines({"rows": rows})
    assert lines == [
        "teacher, 4 steps: KID +0.050 [+0.030, +0.070] over teacher, 28 steps (worse)",
        "student, 4 steps, scale-wise: KID -0.004 [-0.024, +0.016] over teacher, 28 steps (not told apart)",
    ]
    text = "".join(Reader(report.render(build_page(results=dict(build_page().results) | {"rows": rows}))).text)
    assert all(line in text for line in lines)


def test_terminal_table_has_the_reports_columns() -> None:
    table = demo.terminal_table([row(name) for name in NAMES])
    assert [column.header for column in table.columns] == [column.title for column in report.COLUMNS]
    assert table.row_count == 3
