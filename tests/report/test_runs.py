"""Curves, sheets and configurations as they lie in a run; damaged parts become notes."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import DATA
from report_folders import write_evaluation, write_picture, write_run

from swd.report.evaluations import bars_of, read_evaluation
from swd.report.folders import evenly_spread, names_of, read_picture_folder
from swd.report.overview import PageLimits, columns_of, curves_of, fitting, read_folders
from swd.report.runs import MOST_POINTS, Sheet, differences, read_curves, read_run
from swd.types import UserError


def test_curves_have_the_values_of_the_table(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", ["1,0.5,2,", "2,0.25,nan,", "4,0.125,1,7.5"], [2, 4]), "a")
    assert run.curves["train/mmd"].iterations == [1, 2, 4]
    assert run.curves["train/mmd"].values == [0.5, 0.25, 0.125]
    assert run.curves["train/loss"].values == [2.0, None, 1.0]
    assert (run.curves["metrics/fid/128"].iterations, run.curves["metrics/fid/128"].values) == ([4], [7.5])
    assert (run.iterations, run.cycle, run.notes) == (4, 2, [])
    assert [sheet.iteration for sheet in run.sheets] == [2, 4]
    assert list(curves_of([run])) == ["Losses", "Metrics over time"]
    assert [chart["name"] for chart in curves_of([run])["Losses"]] == ["loss", "mmd"]


def test_a_run_of_version_0_1_is_read() -> None:
    run = read_run(DATA / "version_0_1" / "run", "old")
    assert run.iterations == 4 and run.cycle == 4 and run.notes == []
    assert run.curves["train/mmd"].values[0] == pytest.approx(0.500417172908783)


def test_later_lines_count_and_order_does_not(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    file.write_text("step,train/mmd\n3,3\n1,1\n2,2\n2,20\n")
    notes: list[str] = []
    curve = read_curves(file, notes)["train/mmd"]
    assert (curve.iterations, curve.values, notes) == ([1, 2, 3], [1.0, 20.0, 3.0], [])


@pytest.mark.parametrize(
    ("text", "note", "left"),
    [
        ("", "metrics.csv is empty", 0),
        ("step,train/mmd\n", "holds no values yet", 0),
        ("step,train/mmd\n1,0.5\n2,0.2,3\n3,1\n", "line 3: 3 columns, the header has 2", 2),
        ("step,train/mmd\n1,0.5\n2,half\n3\n", "line 3: 'half' is no number, and 1 more; these lines", 1),
        ("step,train/mmd\n1.5,0.5\n2,1\n", "line 2: step 1.5 is no iteration", 1),
        ("iteration,mmd\n1,2\n", "one must be called step", 0),
    ],
)
def test_damage_is_a_note_and_the_rest_is_shown(tmp_path: Path, text: str, note: str, left: int) -> None:
    (tmp_path / "metrics.csv").write_text(text)
    notes: list[str] = []
    curves = read_curves(tmp_path / "metrics.csv", notes)
    assert len(notes) == 1 and note in notes[0]
    assert sum(len(curve.values) for curve in curves.values()) == left


def test_a_run_without_losses_or_with_a_damaged_configuration_says_so(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", [])
    (folder / "metrics.csv").unlink()
    (folder / "config.yaml").write_text("a: [1")
    notes = read_run(folder, "a").notes
    assert len(notes) == 2 and "config.yaml is damaged" in notes[0] and "logger=none" in notes[1]


def test_a_long_curve_becomes_means_of_neighbours(tmp_path: Path) -> None:
    rows = 3 * MOST_POINTS
    (tmp_path / "metrics.csv").write_text("step,train/mmd\n" + "".join(f"{i},{i}\n" for i in range(1, rows + 1)))
    curve = read_curves(tmp_path / "metrics.csv", [])["train/mmd"]
    assert len(curve.values) == MOST_POINTS
    assert curve.values[:2] == [2.0, 5.0] and curve.iterations[:2] == [2, 5] and curve.values[-1] == rows - 1


def test_only_keys_that_differ_are_compared(tmp_path: Path) -> None:
    a = read_run(write_run(tmp_path / "a", [], seed=0, task={"lr": 0.1, "seed": 0}, logger={"save_dir": "a"}), "a")
    b = read_run(write_run(tmp_path / "b", [], seed=1, task={"lr": 0.2, "seed": 1}, api_key="hf_abcdefgh"), "b")
    found = differences([a, b])
    assert found == {"name": ["a", "b"], "seed": ["0", "1"], "task.lr": ["0.1", "0.2"], "api_key": ["–", "***"]}
    (tmp_path / "b" / "config.yaml").unlink()
    assert differences([a, read_run(tmp_path / "b", "b")]) == {}


def test_columns_of_a_sheet_are_named_only_where_the_schedule_fits(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", ["1,1,1,"], [1]), "a")
    assert columns_of(run, run.sheets[0]) == [("16×16", 16), ("32×32", 32)]
    other = Sheet(2, write_picture(tmp_path / "b.png", "red", 51, 10))
    assert columns_of(run, other) == []


def test_sheets_are_left_out_evenly_until_they_fit(tmp_path: Path) -> None:
    sheets = [Sheet(i, write_picture(tmp_path / f"{i}.png", "red", 40, 40)) for i in range(1, 10)]
    all_kept, pictures = fitting(sheets, PageLimits(20, 64, 85, 6), 1e6)
    assert all_kept == sheets and len(pictures) == 9
    one = len(pictures[0]) * 0.75
    kept, pictures = fitting(sheets, PageLimits(20, 64, 85, 6), 3.5 * one)
    assert [sheet.iteration for sheet in kept] == [1, 5, 9] and sum(map(len, pictures)) * 0.75 <= 3.5 * one


def test_positions_are_spread_evenly() -> None:
    assert (
        evenly_spread(9, 3) == [0, 4, 8]
        and evenly_spread(3, 9) == [0, 1, 2]
        and evenly_spread(5, 1) == [4]
        and evenly_spread(0, 1) == []
    )


def test_names_are_what_folders_do_not_have_in_common(tmp_path: Path) -> None:
    assert names_of([tmp_path / "x" / "2026" / "a", tmp_path / "y" / "2026" / "a"]) == ["x/2026/a", "y/2026/a"]
    assert names_of([tmp_path / "x" / "1", tmp_path / "x" / "2"]) == ["1", "2"]
    assert names_of([tmp_path / "x" / "2026-01-31"]) == ["x/2026-01-31"] and names_of([tmp_path / "x"]) == ["x"]
    with pytest.raises(UserError, match="is given twice"):
        names_of([tmp_path, tmp_path])


# Evaluations


def test_tables_of_an_evaluation(tmp_path: Path) -> None:
    found = read_evaluation(write_evaluation(tmp_path / "e"), "e")
    models, pairs = found.grids
    assert models.title == "Models, 1,000 pictures each" and models.columns[:2] == ["model", "fid ↓"]
    assert models.rows[1] == [
        *("student", "3.000 [2.500, 3.500], floor 0.2500", "4", "8", "0.007945", "0.3000", "2.500"),
    ]
    assert pairs.rows == [["student", "fid", "1.000 [0.5000, 1.500]", "yes"]]
    assert [(bar.low, bar.value, bar.high) for bar in found.bars["fid"]] == [(0, 0.25, 0.5), (0.5, 0.75, 1)]
    assert list(found.pictures) == ["teacher", "student"] and len(found.pictures["teacher"].pictures) == 2


def test_a_model_without_a_value_has_no_bar() -> None:
    nothing = {"name": "x", "metrics": {"fid": {"value": None}}}
    assert bars_of({"models": [nothing]}, "fid") == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"format": 2}, "has format 2, this program reads 1"),
        ({"models": [{"name": "x"}]}, "is damaged"),
        ({"models": 3}, "is damaged"),
        ({"prompts": None}, "is damaged"),
    ],
)
def test_damaged_results_are_refused(tmp_path: Path, more: dict[str, object], message: str) -> None:
    folder = write_evaluation(tmp_path / "e", **more)
    with pytest.raises(UserError, match=message):
        read_evaluation(folder, "e")


def test_folders_that_are_neither_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder, message in ((tmp_path / "none", "does not exist"), (tmp_path / "empty", "is neither a run")):
        with pytest.raises(UserError, match=message):
            read_folders([folder])
    with pytest.raises(UserError, match="0 folders"):
        read_folders([])
    (tmp_path / "empty" / "results.json").write_text("[1")
    with pytest.raises(UserError, match=r"results\.json cannot be read"):
        read_folders([tmp_path / "empty"])


def test_an_index_that_is_damaged_is_refused(tmp_path: Path) -> None:
    for line in ("{", '{"index": 0}', '{"index": "a", "file": "x.png"}'):
        (tmp_path / "index.jsonl").write_text(line + "\n")
        with pytest.raises(UserError, match=r"index\.jsonl, line 1: no index and file"):
            read_picture_folder(tmp_path)
