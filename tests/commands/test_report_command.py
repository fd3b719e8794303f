"""`swd report` from the command line: paths without a key, one line for wrong input, nothing of others overwritten."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from report_folders import write_evaluation, write_run

from swd.commands import cli


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    GlobalHydra.instance().clear()


def launch(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["swd", *arguments])
    cli.launch("report")


def refused(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        launch(monkeypatch, *arguments)
    output = capfd.readouterr()
    assert caught.value.code == 2 and output.err.count("\n") == 1 and output.out == "", output.err
    return output.err


def test_a_page_is_written_and_written_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "lr=1 'a'", ["1,1,1,"], [1])
    write_evaluation(tmp_path / "evaluation")
    for _ in range(2):
        launch(monkeypatch, "lr=1 'a'", "evaluation", "out=page.html", "title=T")
        assert capfd.readouterr().out == "page.html\n"
        html = (tmp_path / "page.html").read_text()
        assert "<title>T</title>" in html and "3.000 [2.500, 3.500]" in html and "lr=1 &#39;a&#39;" in html


def test_wrong_input_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", ["1,1,1,"])
    (tmp_path / "mine.html").write_text("<p>of somebody else</p>")
    (tmp_path / "nothing").mkdir()
    write_run(tmp_path / "demo" / "2026", ["1,1,1,"])
    (tmp_path / "demo" / "results.json").write_text('{"rows": []}')
    for arguments, message in (
        ([], "no folder is given"),
        (["none"], "none does not exist"),
        (["nothing"], "nothing is neither a run"),
        (["demo"], "swd evaluate); give those inside it: demo/*/"),
        (["demo/2026", "demo/results.json"], "demo/results.json is no folder; give folders alone, e.g. demo/*/"),
        (["run", "run"], "run is given twice"),
        (["run", "out=mine.html"], "out=mine.html is there already and no page of swd"),
        (["run", "out=nothing"], "out=nothing is a folder"),
        (["run", "quality=0"], "quality=0; use at least 1"),
        (["run", "megabytes=0"], "megabytes=0"),
        (["run", "output=x"], "here it is out=FILE"),
    ):
        assert message in refused(monkeypatch, capfd, *arguments)
    assert (tmp_path / "mine.html").read_text() == "<p>of somebody else</p>"
    assert not (tmp_path / "report.html").exists()


def test_paths_are_told_from_keys_and_flags(tmp_path: Path) -> None:
    (tmp_path / "a=b").mkdir()
    given = ["--cfg", "job", "out=x", "runs/1", "a=b", "--resolve"]
    assert cli.with_paths(given, "folders") == ["--cfg", "job", "out=x", "--resolve", 'folders=["runs/1","a=b"]']
    assert cli.with_paths(["out=x"], "folders") == ["out=x"]
