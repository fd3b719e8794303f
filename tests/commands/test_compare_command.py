"""`swd compare` from the command line: the page, the win rate of votes, one line for wrong input."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from report_folders import write_picture

from swd.commands import cli
from swd.report.pairs import unscramble


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name, colour in (("ours", "red"), ("theirs", "blue")):
        for i in range(4):
            write_picture(tmp_path / name / f"{i}.png", colour)


def launch(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", ["swd", *arguments])
    cli.launch("compare")


def vote_for_ours(page: Path, file: Path, session: str, ties: int = 0) -> None:
    """The file that the page would save if ours were chosen in each pair but the first `ties`."""
    found = re.search(r'id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found is not None
    data = json.loads(found[1])
    flips = [flipped for *_, flipped in unscramble(data["sealed"], data["study"])["pairs"]]
    choices = ["tie" if i < ties else "right" if flipped else "left" for i, flipped in enumerate(flips)]
    votes = [{"pair": i, "criterion": "overall", "choice": choice} for i, choice in enumerate(choices)]
    kept = {key: data[key] for key in ("format", "study", "criteria", "sealed")}
    file.write_text(json.dumps(kept | {"session": session, "voter": "", "votes": votes}))


def test_votes_of_two_people_become_a_win_rate(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_picture(tmp_path / "theirs" / "9.png", "blue")
    for seed in (0, 1):  # pages that differ in nothing but the seed are one study
        launch(monkeypatch, "ours", "theirs", f"seed={seed}", f"out=page{seed}.html")
        output = capfd.readouterr()
        assert output.out == f"page{seed}.html\n" and "0 of ours, 1 of theirs" in output.err and "4 pairs" in output.err
        vote_for_ours(tmp_path / f"page{seed}.html", tmp_path / f"v{seed}.json", str(seed), ties=2 * seed)
    launch(monkeypatch, "v0.json", "v1.json", "out=result.json")
    text = capfd.readouterr().out
    assert "ours against theirs: votes of 2 people, 95% intervals" in text and "0.875 [" in text
    assert "all people agree: 50%" in text
    result = json.loads((tmp_path / "result.json").read_text())
    overall = result["criteria"]["overall"]
    assert (result["a"], result["b"], overall["rate"], overall["wins"], overall["votes"]) == (
        "ours",
        "theirs",
        0.875,
        4,
        8,
    )


def test_wrong_input_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    launch(monkeypatch, "ours", "theirs")
    vote_for_ours(tmp_path / "compare.html", tmp_path / "v.json", "1")
    launch(monkeypatch, "theirs", "ours", "out=other.html")
    vote_for_ours(tmp_path / "other.html", tmp_path / "w.json", "2")
    (tmp_path / "empty").mkdir()
    shutil.copytree(tmp_path / "ours", tmp_path / "run" / "evaluation" / "pictures" / "student")
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "mine.html").write_text("<p>")
    capfd.readouterr()
    for arguments, message in (
        ([], "nothing is given"),
        (["ours"], "1 folders are given; give two"),
        (["ours", "v.json"], "both folders and files of votes"),
        (["ours", "none"], "none does not exist"),
        (["ours", "empty"], "empty holds no pictures (.png, .jpg, .jpeg, .webp); give a folder of pictures"),
        (["ours", "run"], "run holds no pictures (.png, .jpg, .jpeg, .webp); those of student are in run/evaluation/"),
        (["ours", "ours"], "is given twice"),
        (["ours", "theirs", "criteria=[]"], "criteria=[]; give 1 to 10"),
        (["ours", "theirs", "criteria=[a,a]"], "give each a name of its own"),
        (["ours", "theirs", "out=mine.html"], "out=mine.html is there already"),
        (["ours", "theirs", "n=0"], "n=0; use at least 1"),
        (["v.json", "w.json"], "w.json compares theirs and ours, v.json ours and theirs"),
        (["v.json", "v.json"], "are of one person"),
        (["v.json", "out=w.json"], "out=w.json exists already"),
        (["v.json", "level=1"], "level=1"),
        (["none.json"], "none.json does not exist"),
    ):
        with pytest.raises(SystemExit) as caught:
            launch(monkeypatch, *arguments)
        output = capfd.readouterr()
        assert caught.value.code == 2 and output.err.count("\n") == 1 and output.out == "", output.err
        assert message in output.err
