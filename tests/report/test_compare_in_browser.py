"""`swd compare` in a browser: keys vote, undo takes back, the saved file counts as it was voted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from browser import WIDTHS, visit
from report_folders import EVIL, write_evaluation

from swd.report.pairs import Layout, read_study, render_pairs, unscramble
from swd.report.votes import read_ballot, win_rates


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """Two pairs, two criteria; the teacher's pictures are red, the student's blue."""
    drawn = write_evaluation(tmp_path / "evaluation") / "pictures"
    study = read_study(drawn / "teacher", drawn / "student", ["relevance", EVIL])
    file = tmp_path / "compare.html"
    file.write_text(render_pairs(study, Layout(EVIL, 0, 64, 80, 10)), encoding="utf-8")
    return file


RED = """id => {
  const image = document.getElementById(id), canvas = document.createElement('canvas');
  const context = canvas.getContext('2d');
  context.drawImage(image, 0, 0);
  return context.getImageData(5, 5, 1, 1).data[0] > 128;
}"""
"""Whether a picture of the page is red."""


def shows_red(page: Any, side: str) -> bool:
    page.wait_for_function("id => document.getElementById(id).complete", arg=side)
    return bool(page.evaluate(RED, side))


@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_and_everything_in_it_is_text(browser: Any, page: Path, width: int) -> None:
    with visit(browser, page, width) as opened:
        assert opened.overflow() <= 0
        assert opened.page.title() == EVIL and opened.page.text_content("#prompt") == EVIL
        assert opened.page.text_content("#question") == "Which is better: relevance (1 of 2)"
        # All that is needed for a vote is on the screen at once.
        bottom = opened.page.evaluate("document.getElementById('choose2').getBoundingClientRect().bottom")
        assert bottom <= opened.page.viewport_size["height"]
        for _ in range(4):
            opened.page.click("#choose0")
        assert opened.page.is_visible("#end") and not opened.page.is_visible("#vote") and opened.overflow() <= 0


def test_keys_vote_and_the_file_says_who_won(browser: Any, page: Path, tmp_path: Path) -> None:
    with visit(browser, page) as opened:
        keys = opened.page.keyboard
        assert opened.page.is_disabled("#undo") and opened.page.text_content("#place") == "pair 1 of 2"
        keys.press("0")
        assert EVIL in opened.page.text_content("#question") and opened.page.text_content("#place") == "pair 1 of 2"
        keys.press("1")
        assert opened.page.text_content("#place") == "pair 2 of 2"
        keys.press("u")  # back to the second criterion of the first pair
        assert opened.page.text_content("#place") == "pair 1 of 2" and EVIL in opened.page.text_content("#question")
        keys.press("x")
        keys.press("Control+1")
        assert opened.page.evaluate("document.getElementById('bar').value") == 1
        # The teacher's picture wins in the second criterion of both pairs, the student's in the first of the second.
        keys.press("1" if shows_red(opened.page, "left") else "2")
        keys.press("2" if shows_red(opened.page, "left") else "1")
        keys.press("1" if shows_red(opened.page, "left") else "2")
        assert opened.page.is_visible("#end") and "stay in this browser" in opened.page.text_content("#kept")
        # A name with digits is no vote.
        opened.page.focus("#voter")
        keys.type("Ann 120")
        with opened.page.expect_download() as download:
            opened.page.click("#save")
        assert download.value.suggested_filename == "votes.json" and opened.page.text_content("#kept") == ""
        download.value.save_as(tmp_path / "votes.json")
        assert not opened.page.is_visible("#result")
        opened.page.click("#reveal")
        rows = [row.text_content() for row in opened.page.locator("#result tr").all()]
        assert rows == ["criterionteachertiestudent", "relevance011", f"{EVIL}200"]
    saved = json.loads((tmp_path / "votes.json").read_text())
    assert saved["voter"] == "Ann 120" and len(saved["votes"]) == 4
    relevance, other = win_rates([read_ballot(tmp_path / "votes.json")])
    assert (relevance.rate, other.rate) == (0.25, 1.0)


def test_votes_outlive_a_reload_until_one_starts_over(browser: Any, page: Path, tmp_path: Path) -> None:
    with visit(browser, page) as opened:
        sessions = []
        for _ in range(2):
            opened.page.keyboard.press("1")
            opened.page.keyboard.press("2")
            opened.page.reload()
            assert opened.page.text_content("#place") == "pair 2 of 2"
            with opened.page.expect_download() as download:
                opened.page.click("#save")
            download.value.save_as(tmp_path / "votes.json")
            saved = json.loads((tmp_path / "votes.json").read_text())
            assert [vote["choice"] for vote in saved["votes"]] == ["left", "right"]
            sessions.append(saved["session"])
            opened.page.once("dialog", lambda dialog: dialog.accept())
            opened.page.click("#restart")
            assert opened.page.text_content("#place") == "pair 1 of 2"
        assert len(set(sessions)) == 2 and all(len(session) == 32 for session in sessions)
        assert unscramble(saved["sealed"], saved["study"])["names"] == ["teacher", "student"]
