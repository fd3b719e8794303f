"""`swd report` in a browser: switches, slider and keys do what they say; nothing is loaded, nothing overflows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from browser import WIDTHS, visit
from report_folders import EVIL, write_evaluation, write_run

from swd.report import overview

LIMITS = overview.PageLimits(20, 256, 85, 6)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, one of them with a damaged line, and an evaluation."""
    folder = tmp_path_factory.mktemp("report")
    lines = [f"{i},{1 / i},{2 / i},{10 / i if i % 20 == 0 else ''}" for i in range(1, 61)]
    first = write_run(folder / "first", lines, [20, 40, 60])
    second = write_run(folder / "a-very-long-name-of-a-run-that-does-not-fit-a-phone", [*lines[:30], "x,1,1,"], [30])
    found = overview.read_folders([first, second, write_evaluation(folder / "evaluation")])
    file = folder / "report.html"
    file.write_text(overview.render_overview(*found, LIMITS, EVIL, "swd report"), encoding="utf-8")
    return file


@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_and_everything_in_it_is_text(browser: Any, page: Path, width: int) -> None:
    with visit(browser, page, width) as opened:
        assert opened.overflow() <= 0
        assert opened.page.title() == EVIL and opened.page.text_content("h1") == EVIL
        assert opened.page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        text = opened.page.text_content("main")
        assert text.count(EVIL) >= 5 and "line 32: 'x' is no number" in text and "3.000 [2.500, 3.500]" in text
        assert opened.page.locator(".chart path.mean").count() == 6


def test_smoothing_and_the_logarithm_are_switched(browser: Any, page: Path) -> None:
    with visit(browser, page) as opened:
        chart = opened.page.locator("[data-chart='1']")  # mmd, 1 / iteration

        def heights() -> list[float]:
            path = chart.locator("g[data-run='0'] path.mean").get_attribute("d")
            return [float(point.split(" ")[1]) for point in path[1:].split("L")]

        assert chart.locator("path.raw").count() == 2 and "mean over 2, 4" in opened.page.text_content("#smoothing")
        opened.page.focus("#smooth")
        opened.page.keyboard.press("Space")
        assert chart.locator("path.raw").count() == 0 and "Every value" in opened.page.text_content("#smoothing")
        # From 1 (the top, 10) to 0 (the bottom, 180); after that from 10^0 to 10^-2.
        assert heights()[:2] == [10.0, 95.0]
        opened.page.focus("#log")
        opened.page.keyboard.press("Space")
        assert heights()[0] == 10.0 and heights()[9] == pytest.approx(95.0, abs=0.06)
        ticks = [element.text_content() for element in chart.locator("text[text-anchor='end']").all()]
        assert ticks == ["0.01", "0.1", "1", "iteration"]


def test_a_run_can_be_hidden_and_values_be_read_by_keyboard(browser: Any, page: Path) -> None:
    with visit(browser, page) as opened:
        chart = opened.page.locator("[data-chart='1']")
        readout = opened.page.locator("figure", has=chart).locator(".readout")
        opened.page.focus(".show[value='1']")
        opened.page.keyboard.press("Space")
        assert chart.locator("g").count() == 1
        chart.focus()
        assert opened.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        for key, text in (
            ("ArrowRight", "iteration 1: 1 "),
            ("ArrowRight", "iteration 2: 0.5 "),
            ("Home", "iteration 1:"),
        ):
            opened.page.keyboard.press(key)
            assert readout.text_content().startswith(text)
        opened.page.keyboard.press("End")
        opened.page.keyboard.press("ArrowLeft")
        assert readout.text_content().startswith("iteration 59: 0.01695 (mean 0.01")


def test_the_slider_shows_the_sheets_of_its_iteration(browser: Any, page: Path) -> None:
    with visit(browser, page) as opened:
        sheets = opened.page.locator("img.sheet")

        def shown() -> list[str]:
            return [str(sheet.get_attribute("alt")).rpartition(", ")[2] for sheet in sheets.all()]

        pictures = set()
        opened.page.focus("#iteration")
        for key, at, expected in (
            (None, "60", ["iteration 60", "iteration 30"]),
            ("ArrowLeft", "40", ["iteration 40", "iteration 30"]),
            ("ArrowLeft", "30", ["iteration 20", "iteration 30"]),
            ("Home", "20", ["iteration 20", "iteration 30"]),
            ("End", "60", ["iteration 60", "iteration 30"]),
        ):
            if key:
                opened.page.keyboard.press(key)
            assert opened.page.text_content("#at") == at and shown() == expected
            assert opened.page.get_attribute("#iteration", "aria-valuetext") == f"iteration {at}"
            pictures.add(sheets.first.get_attribute("src"))
        assert len(pictures) == 3


def test_a_page_of_an_evaluation_alone_or_of_an_empty_run(browser: Any, tmp_path: Path) -> None:
    alone = [write_evaluation(tmp_path / "evaluation")]
    empty = [write_run(tmp_path / "run", [])]
    for name, folders in (("a.html", alone), ("b.html", empty)):
        file = tmp_path / name
        file.write_text(
            overview.render_overview(*overview.read_folders(folders), LIMITS, name, "swd report"), encoding="utf-8"
        )
        with visit(browser, file) as opened:
            assert opened.overflow() <= 0
