"""`make bench`: the order of its jobs, what fits a card, the files it writes, and its calls of a GPU on a fake one."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import suite
from benchmarks.suite import Choice, Job, Machine, Results, Row
from swd.commands.gpus import GPUS
from swd.modules.dry_run import UpdateCost
from swd.modules.iteration_cost import IterationCost
from swd.modules.published import published
from swd.types import UserError

NO_COUNTS = suite.Counts()
GPU = Machine("cuda", "NVIDIA H100 80GB HBM3", 80_000_000_000, 989.0)


def row(**more: Any) -> Row:
    return Row(**{"what": "training", "model": "a", "setting": "mmd", "size": "8x8", "batch": 2, "seconds": 2.0} | more)


def test_models_of_the_released_scripts_come_first() -> None:
    found = suite.jobs(["flux_dev", "sdxl", "sd35_large", "sd35_medium"])
    assert [(job.what, job.model) for job in found[:4]] == [
        ("training", "sd35_medium"),
        ("training", "sd35_large"),
        ("sampling", "sd35_medium"),
        ("sampling", "sd35_large"),
    ]
    assert found[0].losses == ("dmd", "mmd", "gan")
    assert Job("training", "sdxl", ("mmd",)) in found and len(found) == len(set(found))
    assert [job.model for job in found[-3:]] == ["sd35_medium", "sd35_large", "flux_dev"]
    every = suite.jobs(published())
    assert {job.model for job in every} == set(published())
    for name in published():
        given = suite.schedule_of(name)
        assert len(given["sigmas"]) == len(given["sizes"])


def cost(peak: int) -> IterationCost:
    return IterationCost(UpdateCost(1e12, peak), None, 5)


def test_what_fits_a_card() -> None:
    plain, recomputed = cost(10_000_000_000), cost(1_000_000_000)
    assert suite.choice(10e9, plain, recomputed, 80e9, (8, 4)) == Choice(8, True)
    assert suite.choice(10e9, plain, recomputed, 141e9, (8, 4)) == Choice(8, False)
    assert suite.choice(68e9, plain, recomputed, 80e9, (8, 4, 2)) == Choice(4, True)
    assert suite.choice(79e9, plain, recomputed, 80e9, (8, 4, 2, 1)) is None


def test_peaks_by_the_names_of_drivers() -> None:
    assert suite.peak_of("NVIDIA H100 80GB HBM3") == GPUS["h100"].peak == 989
    assert suite.peak_of("NVIDIA A100-SXM4-80GB") == 312 and suite.peak_of("NVIDIA GeForce RTX 4090") == 165
    assert suite.peak_of("NVIDIA H100 PCIe") is None and suite.peak_of("Some card") is None


def test_results_are_written_as_they_are_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = Results(tmp_path / "out", GPU)
    results.add(row(utilisation=0.45, parts={"critic": 1.5, "optimizer": 0.25}, gigabytes=12.345))
    results.add(row(what="sampling", setting="full <4>", note="twice as fast"))
    with (tmp_path / "out" / "results.csv").open() as stream:
        read = list(csv.DictReader(stream))
    assert [r["critic"] for r in read] == ["1.5", ""] and read[0]["gigabytes"] == "12.3"
    text = (tmp_path / "out" / "results.md").read_text()
    assert "H100 80GB HBM3; dense bf16 peak 989 TFLOP/s" in text and f"torch {torch.__version__}" in text
    assert text.count("\n| ") == 3 and "no gradient of a frozen weight" in text and "twice as fast" in text
    svg = (tmp_path / "out" / "results.svg").read_text()
    widths = [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', svg)]
    assert widths == [135.0, 300.0] and "full &lt;4&gt;" in svg and "45% of the peak" in svg
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["results.csv", "results.md", "results.svg"]
    assert "full <4>" in capsys.readouterr().out


def test_a_job_that_fails_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def training(job: Job, machine: Machine, folder: Path, counts: suite.Counts) -> Any:
        yield row(model=job.model)
        if job.model == "a":
            raise UserError("too large")

    monkeypatch.setattr(suite, "training_rows", training)
    results = Results(tmp_path, Machine("cpu", "x"))
    suite.run([Job("training", "a"), Job("training", "b")], results.machine, results, 1, NO_COUNTS)
    assert [r.model for r in results.rows] == ["a", "b"]
    suite.run([Job("training", "c")], results.machine, results, -1, NO_COUNTS)
    out = capsys.readouterr().out
    assert "training a: UserError: too large" in out and "training c and what follows is left out" in out
    assert [(each.label, each.reason) for each in results.failed] == [("training a", "UserError: too large")]
    assert "* training a: UserError: too large" in (tmp_path / "results.md").read_text()


def test_nothing_begins_when_the_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 30.0, 61.0])
    monkeypatch.setattr(suite.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(suite, "training_rows", lambda *_: (row(size=str(side)) for side in (16, 8, 4)))
    results = Results(tmp_path, Machine("cpu", "x"))
    suite.run([Job("training", "a")], results.machine, results, 1, NO_COUNTS)
    assert [r.size for r in results.rows] == ["16", "8"]


def counted(peak: int, again: int) -> suite.Counted:
    return suite.Counted([cost(peak)], [cost(again)], 1_000_000_000)


def test_where_memory_ends_less_is_tried_and_the_next_size_still_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The count lets 8 samples keep their activations; the card takes 4 that recompute theirs, then nothing."""
    tried: list[Choice] = []
    takes = {Choice(4, True)}

    def one_size(job: Job, model: Any, schedule: Any, how: Choice, *_: Any) -> Row:
        tried.append(how)
        if how not in takes:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate")
        return row(batch=how.batch)

    monkeypatch.setattr(suite, "one_size", one_size)
    given = (suite.ScaleSchedule([1.0], [16]), Choice(8, False), counted(1, 1), 0, GPU)
    found = suite.first_that_fits(Job("training", "m", ("mmd",)), Any, *given)  # type: ignore[arg-type]
    assert tried == [Choice(8, False), Choice(8, True), Choice(4, True)]
    assert isinstance(found, Row) and (found.batch, found.note) == (4, "by the count more would fit")
    takes.clear()
    found = suite.first_that_fits(Job("training", "m", ("mmd",)), Any, *given)  # type: ignore[arg-type]
    assert isinstance(found, suite.Missing) and found.failed and found.label == "training m mmd 16x16, batch 4"
    assert found.reason == "OutOfMemoryError: CUDA out of memory. Tried"


def test_a_card_that_is_too_small_by_the_count_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huge = counted(200_000_000_000, 100_000_000_000)
    monkeypatch.setattr(suite.Counts, "training", lambda *_: suite.Counted(huge.plain * 6, huge.recomputed * 6, 1))
    job = Job("training", "sd35_medium", ("mmd",))
    found = list(suite.training_rows(job, GPU, tmp_path / "model", NO_COUNTS))
    assert [each.label.split()[-1] for each in found] == ["128x128", "96x96", "80x80", "64x64", "48x48", "32x32"]
    assert all(each.reason == "more than 80 GB by the count" and not each.failed for each in found)


def test_counts_are_kept_and_those_of_other_code_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, job = tmp_path / "counts.json", Job("training", "sd35_medium", ("mmd",))
    model = suite.random_model("sd35_medium", tmp_path / "m", small=True)
    schedule = suite.schedule_with(model, "sd35_medium", small=True)
    first = suite.Counts(file).training(job, model, schedule)
    passes = suite.Counts(file).sampling(Job("sampling", "sd35_medium"), model, schedule)
    assert len(first.plain) == 6 and first.plain[-1].flop > first.plain[0].flop > 0
    assert passes[schedule.sizes[-1]] > passes[schedule.sizes[0]] > 0

    runs: list[int] = []
    monkeypatch.setattr(suite, "iteration_costs", lambda *_: runs.append(1) or first.plain)
    assert suite.Counts(file).training(job, model, schedule) == first and not runs
    monkeypatch.setattr(suite, "source_digest", lambda: "other")
    suite.Counts(file).training(job, model, schedule)
    assert len(runs) == 2
    file.write_text("a letter")
    with pytest.raises(UserError, match=r"counts\.json is no file of counts"):
        suite.Counts(file)
    assert file.read_text() == "a letter"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--only sd35_medium,sd36", "--only names 'sd36'; models are chroma1, "),
        ("--only=", "--only names ''; models are "),
        ("--minutes 0", "--minutes 0 is no number above 0"),
        ("--minutes nan", "--minutes nan is no number above 0"),
        ("--minutes soon", "argument --minutes: invalid float value: 'soon'"),
        ("--out pyproject.toml", "--out pyproject.toml is no folder"),
        ("--count-only", "--count-only needs --counts FILE"),
        ("--counts nowhere/counts.json", "--counts nowhere/counts.json is no file in a folder that there is"),
    ],
)
def test_wrong_words_end_in_one_line(
    words: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(suite.HERE)
    with pytest.raises(SystemExit, match="2"):
        suite.arguments(words.split())
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}") and said.count("\n") == 1


def test_the_exit_status_says_whether_all_went_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite.sys, "argv", ["suite.py", "--out", str(tmp_path), "--only", "sdxl"])
    monkeypatch.setattr(suite, "sampling_rows", lambda *_: iter(()))

    def status_of(made: list[Any], of_tiny: int) -> int:
        monkeypatch.setattr(suite.subprocess, "call", lambda words: of_tiny)
        monkeypatch.setattr(suite, "training_rows", lambda *_: iter(made))
        return suite.main()

    assert status_of([row()], 0) == 0 and status_of([row()], 3) == 3
    assert status_of([row(), suite.Missing("b", "broken")], 0) == 1
    assert status_of([row(), suite.Missing("b", "too large", failed=False)], 0) == 0
    assert status_of([], 0) == 1


def test_means_over_the_sizes_of_a_model() -> None:
    rows = [row(tflop=400.0, seconds=1.0, size="16"), row(tflop=98.9, seconds=1.0, size="8", setting="mmd, recomputed")]
    assert suite.means_over_sizes([*rows, row(what="sampling")], 989.0) == ["* a, mmd, over 16, 8: 25.2% of the peak"]
    assert suite.means_over_sizes(rows, None) == []


class FakeEvent:
    """Stands for CUDA's: two neighbouring events lie 250 ms apart."""

    count = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        FakeEvent.count += 1
        self.at = FakeEvent.count

    def elapsed_time(self, end: FakeEvent) -> float:
        return 250.0 * (end.at - self.at)


def test_calls_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time by CUDA's events, memory as the most since it was reset, utilisation of the card's peak."""
    calls: list[str] = []
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: calls.append(name))
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 40_000_000_000)
    runs: list[int] = []
    assert suite.timed(lambda: runs.append(1), 3, "cuda") == 0.25
    assert len(runs) == 4 and calls == ["synchronize"] * 3

    # An iteration of 2 s whose 4 samples take 100 TFLOP each.
    calls.clear()
    times = [{"whole": 2.0, "optimizer": 0.1, "critic": 1.5}]
    monkeypatch.setattr(suite, "train", lambda *args: times)
    monkeypatch.setattr(suite, "terms_of", lambda *args: {})
    schedule = suite.ScaleSchedule([1.0], [16])
    found = suite.one_size(
        Job("training", "m", ("mmd",)),
        None,  # type: ignore[arg-type]
        schedule,
        Choice(4, True),
        IterationCost(UpdateCost(100e12, 1), None, 5),
        GPU,
    )
    assert calls == ["empty_cache", "reset_peak_memory_stats"]
    assert found.parts == {"optimizer": 0.1, "critic": 1.5} and found.seconds == 2.0
    assert (found.setting, found.size, found.gigabytes, found.tflop) == ("mmd, recomputed", "16x16", 40.0, 400.0)
    assert found.utilisation == pytest.approx(400 / 2 / 989)


@pytest.mark.slow
@pytest.mark.parametrize("name", published())
def test_a_small_model_of_every_family_on_the_cpu(name: str, tmp_path: Path) -> None:
    cpu = Machine("cpu", "x")
    losses = suite.losses_of(name)
    model = suite.random_model(name, tmp_path / "model", small=True)
    assert sum(p.numel() for p in model.meta_network.parameters()) < 2e8
    found = list(suite.training_rows(Job("training", name, losses), cpu, tmp_path / "a", NO_COUNTS))
    assert len(found) == 2 and found[0].tflop > found[1].tflop > 0
    assert all(0 < r.parts["generator"] < r.seconds and r.parts["optimizer"] > 0 for r in found)
    drawn = list(suite.sampling_rows(Job("sampling", name), cpu, tmp_path / "b", NO_COUNTS))
    assert [r.setting.split(" (")[0] for r in drawn] == ["scale by scale", "full size, 4 steps", "full size, 2 steps"]
    assert drawn[1].tflop == pytest.approx(2 * drawn[2].tflop)


def test_sizes_on_the_cpu_grow_as_the_models_do() -> None:
    assert suite.small_sizes([32, 64, 128], 2) == [4, 6, 8]
    assert suite.small_sizes([[6, 20, 34], [11, 30, 52], [11, 30, 52]], 2) == [[1, 4, 4], [1, 6, 6], [1, 6, 6]]


@pytest.mark.parametrize("name", published())
def test_larger_sizes_on_the_cpu_are_more_work(name: str, tmp_path: Path) -> None:
    model = suite.random_model(name, tmp_path / "model", small=True)
    schedule = suite.schedule_with(model, name, small=True)
    work = NO_COUNTS.sampling(Job("sampling", name), model, schedule)
    assert work[schedule.sizes[-1]] > work[schedule.sizes[0]]


def test_the_makefile_runs_the_suite() -> None:
    assert "benchmarks/suite.py $(ARGS)" in (Path(suite.__file__).parents[1] / "Makefile").read_text()
