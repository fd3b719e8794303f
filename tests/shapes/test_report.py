"""The report: whole, offline, escaped; its numbers; and the demo's own arithmetic."""

from __future__ import annotations

import base64
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from demo_page import EVIL, NAMES, build_page, ratio, row
from PIL import Image

from swd.io.files import finite
from swd.io.pictures import to_pil
from swd.shapes import demo, report
from swd.types import UserError


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
    html = report.render_page(build_page())
    reader = Reader(html)
    assert html.startswith("<!doctype html>") and reader.open == []
    assert not re.search(r"https?:|//[a-z]|@import|url\(", html)
    assert not reader.tags & {"script", "link", "iframe", "object"}
    text = " ".join(" ".join(reader.text).split())
    for wanted in (*NAMES, "0.931", "0.0286", "82.7", "7.94", "swd demo experiment=demo_ci", "14.7", "0.00420"):
        assert wanted in text


def test_pictures_are_embedded_unchanged() -> None:
    page = build_page()
    reader = Reader(report.render_page(page))
    assert len(reader.images) == 5
    for image, pixels in zip(reader.images, [*page.comparisons[0].pictures.values()], strict=False):
        kind, data = str(image["src"]).split(",", 1)
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as found:
            assert found.tobytes() == to_pil(pixels).tobytes()
    assert (reader.images[3]["width"], reader.images[3]["height"]) == ("6", "6")


def test_everything_from_outside_is_escaped() -> None:
    html = report.render_page(build_page())
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
    html = report.render_page(page)
    assert "recompute=true" in html and "kept no losses" in html
    assert "recompute=true" not in report.render_page(build_page())


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
    table.write_text("epoch,loss/mmd,monitor/interval,step,time/data\n0,0.5,0.0,1,0.1\n0,0.25,1.0,2,0.1\n")
    assert demo.read_losses(table) == {"mmd": [0.5, 0.25]}
    assert demo.read_losses(tmp_path / "none.csv") == {}


def test_ratio_knows_whether_it_is_as_expected() -> None:
    assert demo.ratio(1.0, 2.0, at_most=0.5) == ratio(0.5, "<= 0.5", True)
    assert demo.ratio(1.0, 2.0, at_least=0.95) == ratio(0.5, ">= 0.95", False)
    assert demo.ratio(3.0, 2.0) == ratio(1.5)
    assert demo.ratio(1.0, 0.0, at_most=1.5) == ratio(None, "<= 1.5")


def test_results_hold_no_number_that_json_lacks() -> None:
    assert finite({"a": [1.0, math.nan], "b": {"c": math.inf, "d": "x"}}) == {
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
    def mmd(value: float, half: float) -> dict[str, float]:
        return {"value": value, "low": value - half, "high": value + half, "level": 0.95}

    overs = (None, mmd(5.04, 2.0), mmd(-0.4, 2.0))
    rows = [
        row(name, distances={"mmd": mmd(10.0, 3.14), "mmd_over_first": over, "fid_inf": None})
        for name, over in zip(NAMES, overs, strict=True)
    ]
    assert report.mmd_text(rows[0]) == "10.0 ± 3.1"
    assert report.mmd_text(row("old")) == report.mmd_text(row("few", distances=None)) == "–"
    lines = report.difference_lines({"rows": rows})
    assert lines == [
        "teacher, 4 steps: MMD +5.0 [+3.0, +7.0] over teacher, 28 steps (worse)",
        "student, 4 steps, scale-wise: MMD -0.4 [-2.4, +1.6] over teacher, 28 steps (not told apart)",
    ]
    text = "".join(Reader(report.render_page(build_page(results=dict(build_page().results) | {"rows": rows}))).text)
    assert all(line in text for line in lines)


def test_terminal_table_has_the_reports_columns() -> None:
    table = demo.terminal_table([row(name) for name in NAMES])
    assert [column.header for column in table.columns] == [column.title for column in report.COLUMNS]
    assert table.row_count == 3
