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
from swd.commands.plan import GPUS
from swd.modules.dry_run import UpdateCost
from swd.modules.iteration_cost import IterationCost
from swd.modules.published import published
from swd.types import UserError

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
    assert suite.choice(70e9, plain, recomputed, 80e9, (8, 4, 2)) == Choice(4, True)
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
    assert text.count("\n| ") == 3 and "twice as fast" in text
    svg = (tmp_path / "out" / "results.svg").read_text()
    widths = [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', svg)]
    assert widths == [135.0, 300.0] and "full &lt;4&gt;" in svg and "45% of the peak" in svg
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["results.csv", "results.md", "results.svg"]
    assert "full <4>" in capsys.readouterr().out


def test_a_job_that_fails_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def training(job: Job, machine: Machine, folder: Path) -> Any:
        yield row(model=job.model)
        if job.model == "a":
            raise UserError("too large")

    monkeypatch.setattr(suite, "training_rows", training)
    results = Results(tmp_path, Machine("cpu", "x"))
    suite.run([Job("training", "a"), Job("training", "b")], results.machine, results, 1)
    assert [r.model for r in results.rows] == ["a", "b"]
    suite.run([Job("training", "c")], results.machine, results, -1)
    out = capsys.readouterr().out
    assert "training a: UserError: too large" in out and "training of c and what follows is left out" in out


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
    found = list(suite.training_rows(Job("training", name, losses), cpu, tmp_path / "a"))
    assert len(found) == 2 and found[0].tflop > found[1].tflop > 0
    assert all(0 < r.parts["generator"] < r.seconds and r.parts["optimizer"] > 0 for r in found)
    drawn = list(suite.sampling_rows(Job("sampling", name), cpu, tmp_path / "b"))
    assert [r.setting.split(" (")[0] for r in drawn] == ["scale by scale", "full size, 4 steps", "full size, 2 steps"]
    assert drawn[1].tflop == pytest.approx(2 * drawn[2].tflop)


def test_sizes_on_the_cpu_grow_as_the_models_do() -> None:
    assert suite.small_sizes([32, 64, 128], 2) == [4, 6, 8]
    assert suite.small_sizes([[6, 20, 34], [11, 30, 52], [11, 30, 52]], 2) == [[1, 4, 4], [1, 6, 6], [1, 6, 6]]


def test_the_makefile_runs_the_suite() -> None:
    assert "benchmarks/suite.py $(ARGS)" in (Path(suite.__file__).parents[1] / "Makefile").read_text()
