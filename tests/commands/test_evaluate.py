"""`swd evaluate`: equal pictures and numbers whoever draws them, nothing computed twice, wrong input refused early."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image
from processes import HELPERS, Fork

from swd.commands import evaluate, sample
from swd.evaluation import timing
from swd.evaluation.candidate_pictures import CandidatePainter
from swd.evaluation.feature_files import FeatureFiles
from swd.evaluation.plan import Plan
from swd.io.files import only_one
from swd.metrics.flops import forward_gflop
from swd.modules.pretrained import Pretrained
from swd.types import Conditioning, Size, UserError

PROMPTS = ["a red star above a blue ring", "a green circle", "a small cross", "two rings", "a heart, left of a ring"]
SEEDS = [7, 8, 3, 10, 11]
BRIGHT = "{_target_: toy_metrics.Brightness, name: bright, extractor: {_target_: toy_metrics.Colours}}"
AGREE = "{_target_: toy_metrics.Agreement, extractor: {_target_: toy_metrics.Words}}"
FID = "{_target_: swd.metrics.fid.Frechet, name: fid, extractor: {_target_: toy_metrics.Colours}}"
KID = "{_target_: swd.metrics.kid.Kid, name: kid, extractor: {_target_: toy_metrics.Colours}}"
RECALL = "{_target_: swd.metrics.precision_recall.Recall, extractor: {_target_: toy_metrics.Colours}}"
TOYS = ("Brightness", "Agreement", "Colours", "Words")
OURS = ("fid.Frechet", "kid.Kid", "precision_recall.Recall")
ALLOWED = f"[{','.join([*(f'toy_metrics.{toy}' for toy in TOYS), *(f'swd.metrics.{ours}' for ours in OURS)])}]"

Arguments = Callable[..., list[str]]


KNOWN: dict[tuple[Any, ...], float] = {}
"""GFLOP by model, size and text, counted once for all tests; `test_timing.py` compares such counts."""


@pytest.fixture(autouse=True)
def _counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def once(model: Any, size: Size, row: Conditioning) -> float:
        key = (model.folder, size, row.embeds.shape)
        if key not in KNOWN:
            KNOWN[key] = forward_gflop(model, size, row)
        return KNOWN[key]

    monkeypatch.setattr(timing, "forward_gflop", once)


@pytest.fixture(scope="module")
def student(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an adapter that is not zero."""
    folder = tmp_path_factory.mktemp("run") / "mine"
    tiny.save_trained_student(tiny_model, folder / "adapter")
    return folder


@pytest.fixture
def arguments(tiny_model: Path, student: Path, tmp_path: Path) -> Arguments:
    """The command line of an evaluation of the tiny teacher and its student; `__` in a keyword stands for a dot."""
    file = tmp_path / "prompts.csv"
    rows = [f'"{prompt}",{3 if i == 2 else ""}' for i, prompt in enumerate(PROMPTS)]
    file.write_text("\n".join(["prompt,seed", *rows]) + "\n")

    def make(folder: Path, **more: Any) -> list[str]:
        values = {
            "models": f"[{{name: teacher_3, model: teacher, steps: 3, guidance_scale: 2.0}}, {student}]",
            "prompts": file,
            "metrics": f"[{BRIGHT}, {AGREE}]",
            "allow": ALLOWED,
            "seed": 7,
            "batch_size": 2,
            "chunk_size": 2,
            "model__max_text_tokens": 12,
        } | more
        if not any(key.startswith("timing") for key in values):
            values["timing"] = None
        return tiny.drawing(tiny_model, folder, **values)

    return make


@pytest.fixture
def config(arguments: Arguments) -> Callable[..., Any]:
    return lambda folder, **more: tiny.composed(arguments(folder, **more), "evaluate")


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def values(folder: Path) -> dict[tuple[str, str, str], float]:
    """All numbers of the metrics, by model, metric and kind."""
    return {
        (row["name"], metric, key): value
        for row in results(folder)["models"]
        for metric, numbers in row["metrics"].items()
        for key, value in numbers.items()
        if isinstance(value, float)
    }


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image).astype(int)


def assert_same(a: Path, b: Path) -> None:
    """Pictures equal to one of 256 levels, numbers near rounding."""
    files = sorted(file.relative_to(a) for file in a.glob("pictures/*/*.png"))
    assert files and files == sorted(file.relative_to(b) for file in b.glob("pictures/*/*.png"))
    for file in files:
        assert np.abs(pixels(a / file) - pixels(b / file)).max() <= 1, file
    assert values(a) == pytest.approx(values(b), rel=1e-5, abs=1e-5)


def launch(arguments: list[str], folder: Path, rank: int = 0, world: int = 1) -> Fork:
    environment = {key: value for key, value in os.environ.items() if key != "SWD_COMMAND"}
    environment |= {"PYTHONPATH": str(HELPERS), "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    command = [sys.executable, "-c", "from swd.commands.cli import launch; launch('evaluate')", *arguments]
    return Fork(command, environment, folder, folder / f"out{rank}.txt", folder / f"err{rank}.txt")


# Results


def test_pictures_are_those_of_sample_and_the_table_holds_what_was_computed(
    config: Callable[..., Any], student: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    evaluate.run(config(folder))
    assert str(folder / "report.html") in capsys.readouterr().out
    for name, adapter, more in (
        ("mine", student, {}),
        ("teacher_3", None, {"model__teacher_steps": 3, "model__drawing_guidance_scale": 2.0}),
    ):
        pictures = tmp_path / name
        cfg = tiny.composed(
            tiny.drawing(
                tiny_model, pictures, model__max_text_tokens=12, adapter=adapter, batch_size=2,
                prompts_file=tmp_path / "prompts.csv", seed=7, **more,
            ),
            "sample",
        )  # fmt: skip
        sample.run(cfg)
        index = [json.loads(line) for line in (folder / "pictures" / name / "index.jsonl").read_text().splitlines()]
        assert [line["index"] for line in index] == [0, 1, 2, 3, 4]
        assert [(line["prompt"], line["seed"]) for line in index] == list(zip(PROMPTS, SEEDS, strict=True))
        for line in index:
            (expected,) = pictures.glob(f"*_seed{line['seed']}.png")
            assert np.array_equal(pixels(folder / "pictures" / name / line["file"]), pixels(expected))

    # Numbers, from the files by hand.
    found = results(folder)
    assert [(row["name"], row["steps"], row["evaluations"]) for row in found["models"]] == [
        ("teacher_3", 3, 6),
        ("mine", 3, 3),
    ]
    means = {}
    for row in found["models"]:
        each = [pixels(file).mean() / 255 for file in sorted((folder / "pictures" / row["name"]).glob("*.png"))]
        means[row["name"]] = np.mean(each)
        bright = row["metrics"]["bright"]
        assert bright["value"] == pytest.approx(np.mean(each), abs=1e-6)
        assert bright["low"] < bright["value"] < bright["high"] and bright["floor"] == 0.25
        assert bright["better"] == "higher"
        assert min(each) <= bright["low"] and bright["high"] <= max(each)
    (pair,) = [pair for pair in found["pairs"] if pair["metric"] == "bright"]
    assert (pair["a"], pair["b"]) == ("teacher_3", "mine")
    assert pair["difference"] == pytest.approx(means["mine"] - means["teacher_3"], abs=1e-6)
    assert pair["low"] <= pair["difference"] <= pair["high"]
    assert found["prompts"]["n"] == 5 and found["seeds"] == {"first": 7, "own": True}
    assert found["published"] == [] and found["models"][0]["latency"] is None


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_any_number_of_processes_and_any_batch_give_the_same(
    config: Callable[..., Any], arguments: Arguments, tmp_path: Path, world: int
) -> None:
    evaluate.run(config(tmp_path / "one", batch_size=5, chunk_size=5))
    # In chunks of 1 each of 4 processes has some.
    many = tmp_path / "many"
    started = [launch(arguments(many, chunk_size=1), tmp_path, rank, world) for rank in range(world)]
    said = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0] * world, said
    assert_same(tmp_path / "one", many)
    assert (
        sum("report.html" in out for out, _ in said) == 1
    )  # one of them scores, also where several are through at once
    assert not list(many.rglob(".*"))
    assert len(list((many / "features" / "mine" / "colours-plain").iterdir())) == 5


def test_the_share_of_a_process_is_its_chunks_alone(
    config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "out"
    evaluate.run(config(folder))
    assert sorted(int(file.stem) for file in folder.glob("pictures/mine/*.png")) == [2, 3]
    assert not (folder / "results.json").exists()
    assert "process 2 of 2 is through" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "0")
    evaluate.run(config(folder))
    assert (folder / "results.json").is_file()


def test_of_processes_that_are_through_at_once_one_scores(
    config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    evaluate.prepare(config(folder)).plan.claim()
    with only_one(folder / evaluate.LOCK) as is_mine:
        assert is_mine
        evaluate.run(config(folder))
    assert "another one scores" in capsys.readouterr().out and not (folder / "results.json").exists()
    # Its lock ended; now the other one is quicker, and through before this one looks.
    original = evaluate.is_complete

    def quicker(evaluation: Any) -> bool:
        monkeypatch.setattr(evaluate, "is_complete", original)
        evaluate.run(config(folder))
        return original(evaluation)

    monkeypatch.setattr(evaluate, "is_complete", quicker)
    evaluate.run(config(folder))
    out = capsys.readouterr().out
    assert out.count("report.html") == 1 and out.endswith("process 1 of 1 is through; another one scores\n")
    evaluate.run(config(folder))  # a new command prints the table again
    assert capsys.readouterr().out.count("report.html") == 1


def test_published_numbers_are_those_of_the_models_in_the_table(config: Callable[..., Any], tmp_path: Path) -> None:
    candidates = evaluate.prepare(config(tmp_path / "out")).plan.candidates
    named, copied = "stabilityai/stable-diffusion-3.5-large", "FLUX.1-dev"  # on the hub, and in a folder
    found = []
    for names in ((named,), (copied,), (named, copied)):
        given = tuple(replace(candidates[0], model=SimpleNamespace(name=name)) for name in names)  # type: ignore[type-var]
        rows = evaluate.published_of(config(tmp_path / "out", published=True), given)
        found.append(({row["model"] for row in rows}, len(rows)))
    assert found == [({"sd35_large"}, 6), ({"flux_dev"}, 6), ({"sd35_large", "flux_dev"}, 12)]
    rows = evaluate.published_of(config(tmp_path / "out", published="all"), candidates)
    assert {row["model"] for row in rows} == {"sdxl", "sd35_medium", "sd35_large", "flux_dev"} and len(rows) == 21
    assert evaluate.published_of(config(tmp_path / "out"), candidates) == []


def test_models_of_several_bases_are_drawn_with_their_own(
    config: Callable[..., Any], student: Path, tmp_path: Path
) -> None:
    two = f"[{student}, {{name: other, model: teacher, base: shapes}}, teacher]"
    plan = evaluate.prepare(config(tmp_path / "out", models=two, height=64, width=64)).plan
    found: Any = plan.candidates
    mine, other, same = (each.model for each in found)
    assert other.name == "shapes-sd3" != mine.name == same.name
    assert [each.teacher_steps for each in (other, same)] == [28, 28] and other.max_text_tokens == 24
    with pytest.raises(UserError, match="mine"):  # the adapter is of the tiny base
        evaluate.prepare(config(tmp_path / "out", models=f"[{{model: {student}, base: shapes}}]", height=64, width=64))
    # Its students have its own schedule by default.
    base = evaluate.base_of({"name": "flux", "base": "flux_dev"})
    moved = evaluate.on_base(config(tmp_path / "out"), base)
    assert moved.model.path == "black-forest-labs/FLUX.1-dev" and list(moved.schedule.sizes) == [64, 80, 96, 128]


def test_a_second_run_computes_nothing_again(
    config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    evaluate.run(config(folder))
    before = results(folder)
    changed = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
    for target, name in ((Pretrained, "pipeline"), (FeatureFiles, "write"), (evaluate.Scoring, "score")):
        monkeypatch.setattr(target, name, None)
    evaluate.run(config(folder))
    assert results(folder) == before
    tables = {"results.json", "table.md", "table.csv", "report.html"}
    assert {file.name for file, when in changed.items() if file.stat().st_mtime_ns != when} == tables


def test_a_killed_evaluation_goes_on_with_the_batch_it_was_at(
    config: Callable[..., Any], arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, more = tmp_path / "out", {"images_per_prompt": 12, "batch_size": 3, "chunk_size": 30}
    process = launch(arguments(folder, **more), tmp_path)
    pictures = folder / "pictures" / "teacher_3"
    while process.poll() is None and len(list(pictures.glob("[0-9]*.png"))) < 7:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = {int(file.stem) for file in pictures.glob("[0-9]*.png")}
    assert 7 <= len(there) < 60, "it was through before the kill"

    drawn: list[int] = []
    original = CandidatePainter.draw

    def draw(self: CandidatePainter, rows: range) -> Any:
        drawn.extend(rows if self.candidate.name == "teacher_3" else [])
        return original(self, rows)

    monkeypatch.setattr(CandidatePainter, "draw", draw)
    evaluate.run(config(folder, **more))
    assert sorted({*drawn, *there}) == list(range(60))
    assert len(set(drawn) & there) < 3, "more than a batch was drawn again"
    assert not list(folder.rglob(".*"))


def test_models_and_metrics_may_be_added_and_the_rest_is_kept(
    config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    teacher = "{name: teacher_3, model: teacher, steps: 3, guidance_scale: 2.0}"
    evaluate.run(config(folder, models=f"[{teacher}]", metrics=f"[{BRIGHT}]"))
    drawn: list[str] = []
    original = CandidatePainter.paint
    monkeypatch.setattr(
        CandidatePainter, "paint", lambda self, rows: (drawn.append(self.candidate.name), original(self, rows))
    )
    evaluate.run(config(folder))
    assert set(drawn) == {"mine"}
    assert [row["name"] for row in results(folder)["models"]] == ["teacher_3", "mine"]
    whole = tmp_path / "whole"
    evaluate.run(config(whole))
    assert values(folder) == pytest.approx(values(whole))


@pytest.mark.parametrize(
    ("more", "difference"),
    [
        ({"seed": 8}, "seed was 7, now 8"),
        ({"n": 4}, "prompts.count was 5, now 4"),
        ({"images_per_prompt": 2}, "images_per_prompt was 1, now 2"),
        ({"chunk_size": 3}, "chunk_size was 2, now 3"),
        (
            {"models": "[{name: teacher_3, model: teacher, steps: 2, guidance_scale: 2.0}]"},
            "models.teacher_3.steps was 3, now 2",
        ),
    ],
)
def test_another_evaluation_in_the_folder_is_refused(
    config: Callable[..., Any], tmp_path: Path, more: dict[str, Any], difference: str
) -> None:
    folder = tmp_path / "out"
    evaluate.prepare(config(folder)).plan.claim()
    evaluate.prepare(config(folder)).plan.claim()
    with pytest.raises(UserError, match=difference):
        evaluate.prepare(config(folder, **more)).plan.claim()


def test_other_weights_pictures_or_reference_do_not_reuse_features(config: Callable[..., Any], tmp_path: Path) -> None:
    folder, real = tmp_path / "out", tmp_path / "real"
    dice = np.random.default_rng(0)
    real.mkdir()
    for i in range(30):
        Image.fromarray(dice.integers(0, 255, (16, 16, 3), np.uint8)).save(real / f"{i}.png")
    more = {"metrics": f"[{FID}]", "reference": real, "models": "[{name: t, model: teacher, steps: 1}]"}
    evaluate.run(config(folder, **more))
    first = values(folder)["t", "fid", "value"]
    more["metrics"] = f"[{FID.replace('toy_metrics.Colours', 'toy_metrics.Colours, scale: 3.0')}]"
    evaluate.run(config(folder, **more))
    assert values(folder)["t", "fid", "value"] == pytest.approx(9 * first, rel=1e-4)
    Image.new("RGB", (16, 16), "white").save(real / "0.png")
    evaluate.run(config(folder, **more))
    assert abs(values(folder)["t", "fid", "value"] / (9 * first) - 1) > 1e-3


def test_pictures_of_somebody_else_are_scored_as_our_own(
    config: Callable[..., Any], student: Path, tmp_path: Path
) -> None:
    evaluate.run(config(tmp_path / "a"))
    theirs = tmp_path / "theirs"
    shutil.copytree(tmp_path / "a" / "pictures" / "mine", theirs)  # with our index
    bare = tmp_path / "bare"
    bare.mkdir()
    for i in range(5):
        shutil.copy(theirs / f"{i:08d}.png", bare / f"{i}.png")
    evaluate.run(config(tmp_path / "b", models=f"[{student}, {theirs}, {bare}]"))
    rows = {row["name"]: row for row in results(tmp_path / "b")["models"]}
    assert rows["theirs"]["metrics"] == rows["bare"]["metrics"] == rows["mine"]["metrics"]
    assert rows["theirs"]["steps"] is None and rows["theirs"]["tflop"] is None
    assert all(pair["difference"] == pair["low"] == pair["high"] == 0 for pair in results(tmp_path / "b")["pairs"])


def test_the_released_list_of_captions_is_read_as_it_is(config: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "coco.csv"
    file.write_text(',file_name,caption\n132871,a.jpg,A red star.\n31526,b.jpg,"Two, rings\n"\n7,a.jpg,A heart\n')
    requests = evaluate.prepare(config(tmp_path / "out", prompts=file, n=2)).plan.requests
    assert [(request.prompt, request.seed) for request in requests[:]] == [("A red star.", 7), ("Two, rings", 8)]


# Refusals


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"models": "[]"}, "models is empty"),
        ({"models": "teacher"}, r"models='teacher' is not valid; expected a list of .*: models='\[teacher\]'$"),
        ({"models": "[nowhere]"}, "models=nowhere does not exist"),
        ({"models": "[{name: a}]"}, "is no model"),
        ({"models": "[{model: teacher, stepz: 4}]"}, "unknown key stepz"),
        ({"models": "[{model: teacher, steps: many}]"}, "steps='many' is not valid"),
        ({"models": "[{model: teacher, steps: 0}]"}, "steps of teacher=0; use at least 1"),
        ({"models": "[{model: teacher, steps: 2, sigmas: [1.0, 0.5]}]"}, "both steps and sigmas"),
        ({"models": "[{model: teacher, sigmas: [0.5, 1.0]}]"}, "use falling numbers"),
        ({"models": "[{model: teacher, schedule: shapes_4step}]"}, "has schedule, but a teacher has no"),
        ({"models": "[teacher, teacher]"}, "two are called teacher"),
        ({"models": "[teacher, {name: Teacher, model: teacher}]"}, "two are called"),
        ({"models": "[{name: ../x, model: teacher}]"}, "is no name of a row"),
        ({"n": 6}, "n=6, but .* has 5 prompts"),
        ({"n": 1}, "n=1; use at least 2"),
        ({"prompts": "none.csv"}, "prompts=none.csv does not exist"),
        ({"metrics": "[]"}, "metrics is empty"),
        ({"metrics": "[nothing]"}, "there is no metric 'nothing'; choose from"),
        ({"metrics": f"[{BRIGHT}, {BRIGHT}]"}, "two are called bright"),
        (
            {"metrics": f"[{BRIGHT}, {BRIGHT.replace('Colours', 'Colours, scale: 2.0').replace('bright,', 'b,')}]"},
            "b has other weights of colours-plain",
        ),
        ({"metrics": f"[{FID}]"}, "fid compares with real pictures; give reference"),
        ({"metrics": f"[{FID}]", "reference": "none"}, "reference=none does not exist"),
        ({"height": 100}, "height=100 is not a multiple of 16"),
        ({"timing__runs": "many"}, "timing.*runs.*many"),
        ({"timing__runs": 0}, "timing.runs=0; use at least 1"),
        ({"timing__runs": 1, "+timing__run": 3}, r"unknown key timing\.run; did you mean 'runs'"),
        ({"timing__precision": "fp8"}, r"timing\.precision='fp8' is not valid; expected .*fp16"),
        ({"timing__compile": "all"}, r"timing\.compile='all' is not valid; expected .*blocks"),
        (
            {"timing__compile_coders": True},
            r"^timing\.compile_coders=true compiles more .*; give timing\.compile=blocks",
        ),
        ({"timing__tiny_vae": "none"}, r"^timing\.tiny_vae=none does not exist; give"),
        ({"bootstrap__level": 1.5}, "bootstrap.level=1.5"),
        ({"batch_size": 0}, "batch_size=0; use at least 1"),
        (
            {"models": "[{name: a, model: teacher, base: nothing}]"},
            "base of a: there is no model 'nothing'; choose from",
        ),
        ({"published": "yes please"}, "published=yes please; use true for the models in the table, all, or false"),
        ({"published": True}, "the paper has no numbers of .*; use published=all"),
        ({"reference": "three", "metrics": f"[{FID}]"}, "fid needs 4 real pictures, got 3; give more"),
        ({"reference": "one", "metrics": f"[{KID}]"}, "kid needs 2 real pictures, got 1; give more"),
        ({"reference": "three", "metrics": f"[{RECALL}]"}, "recall needs 4 real pictures, got 3; give more"),
        ({"reference": "four", "n": 3, "metrics": f"[{RECALL}]"}, "recall needs 4 drawn pictures, got 3; draw more"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_made(
    config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for count, name in ((1, "one"), (3, "three"), (4, "four")):
        (tmp_path / name).mkdir()
        for number in range(count):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{number}.png")
    monkeypatch.setattr(Pretrained, "pipeline", None)
    with pytest.raises(UserError, match=message):
        evaluate.run(config(tmp_path / "out", **more))
    assert not (tmp_path / "out").exists()


def test_a_student_has_no_steps_and_must_fit(config: Callable[..., Any], student: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mine has steps, but a student draws as its schedule says"):
        evaluate.prepare(config(tmp_path / "out", models=f"[{{model: {student}, steps: 4}}]"))
    other = f"[teacher, {{model: {student}, schedule: {{sigmas: [1.0, 0.7], sizes: [4, 6]}}}}]"
    with pytest.raises(UserError, match="mine draws 48x48 and teacher 64x64 pixels; give one size to all"):
        evaluate.prepare(config(tmp_path / "out", models=other))
    found = evaluate.prepare(config(tmp_path / "out", models=other, height=64, width=64)).plan.candidates[1]
    assert found.steps == 2 and found.step_sizes == [(6, 6), (8, 8)]  # type: ignore[union-attr]


def test_a_folder_of_pictures_must_hold_one_for_each_row(config: Callable[..., Any], tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for i in (0, 1, 3, 4):
        Image.new("RGB", (8, 8)).save(theirs / f"{i:03d}.png")
    more = {"models": f"[teacher, {theirs}]"}
    with pytest.raises(UserError, match=r"theirs has no picture of row 2 \(of 5\)"):
        evaluate.prepare(config(tmp_path / "out", **more))
    (theirs / "2.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"2\.jpg is missing or no picture"):
        evaluate.prepare(config(tmp_path / "out", **more))
    Image.new("RGB", (8, 8)).save(theirs / "2.jpg")
    assert isinstance(evaluate.prepare(config(tmp_path / "out", **more)).plan, Plan)
    plain = [prompt.replace(",", "") for prompt in PROMPTS]
    lines = [f"{i},{plain[i]},{file.name}" for i, file in enumerate(sorted(theirs.iterdir()))]
    (theirs / "index.csv").write_text("\n".join(["index,prompt,file", *lines]))
    with pytest.raises(UserError, match="row 4 is of 'a heart left of a ring', and here it is 'a heart, left"):
        evaluate.prepare(config(tmp_path / "out", **more))
