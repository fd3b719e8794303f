"""Fréchet distance, rows of the table, timing, merging and stored statistics."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from swd.evaluation.candidate_pictures import CandidatePainter
from swd.evaluation.candidates import DrawingModel, GivenPictures
from swd.evaluation.plan import Plan
from swd.io.pictures import to_pil
from swd.losses import MMD
from swd.metrics.fid import frechet_distance
from swd.modules.adapters import AVERAGE, save_adapter
from swd.modules.distiller import Distiller
from swd.modules.pretrained import Pretrained
from swd.modules.requests import Requests
from swd.modules.training_task import averaged
from swd.shapes import contest
from swd.shapes.contest import Judged, StoredStatistics
from swd.shapes.dataset import ShapesDataset
from swd.shapes.judge import ATTRIBUTES, Judge, prompt_accuracy
from swd.shapes.rendered import FLOOR_SEED, PROMPT_SEED, REFERENCE_SEED, SPLIT, prompts_of
from swd.types import UserError


def normal(n: int, width: int, seed: int) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whitened(n: int, width: int, seed: int) -> Tensor:
    """Samples whose mean is exactly 0 and whose covariance is exactly 1."""
    x = normal(n, width, seed)
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (n - 1))).T


# Fréchet distance


def test_fid_equals_the_closed_form_for_gaussians() -> None:
    scale = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    shift = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)
    a, b = whitened(200, 4, 0), whitened(300, 4, 1) * scale + shift
    expected = shift.square().sum() + (1 - scale).square().sum()  # covariances commute
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-6)


def test_fid_of_covariances_that_do_not_commute() -> None:
    a = whitened(100, 3, 0) @ torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.2], [0.0, 0.0, 0.7]], dtype=torch.float64)
    b = whitened(120, 3, 1) @ torch.tensor([[2.0, 0.0, 0.0], [0.4, 1.0, 0.0], [0.1, 0.3, 0.5]], dtype=torch.float64)
    s, t = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(s)
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ t @ root).clamp(min=0).sqrt().sum()
    assert frechet_distance(a, b) == pytest.approx(float(s.trace() + t.trace() - 2 * cross), rel=1e-6)


def test_fid_of_a_set_with_itself_is_zero_and_small_features_keep_their_digits() -> None:
    a = normal(80, 6, 0)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    b = normal(80, 6, 1)
    assert frechet_distance(1e-3 * a, 1e-3 * b) == pytest.approx(1e-6 * frechet_distance(a, b), rel=1e-4)


def test_fid_needs_two_pictures_a_side() -> None:
    with pytest.raises(UserError, match="at least 2"):
        frechet_distance(normal(1, 4, 0), normal(9, 4, 0))


# Rows


@pytest.fixture(scope="module")
def judge() -> Judge:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Judge(widths=(4, 4, 8), features=8).eval()


def rendered(prompts: list[str], seeds: list[int]) -> Tensor:
    """A model that is always right: the picture that belongs to the prompt."""
    dataset = ShapesDataset(SPLIT, PROMPT_SEED)
    items = [dataset[seed] for seed in seeds]
    assert [item["prompt"] for item in items] == prompts
    return torch.stack([torch.as_tensor(item["pixels"]) for item in items])


def write_pictures(folder: Path, prompts: list[str]) -> GivenPictures:
    """Files of the right pictures, as a row of the table that draws nothing."""
    files = tuple(folder / f"{row}.png" for row in range(len(prompts)))
    folder.mkdir(exist_ok=True)
    for file, pixels in zip(files, rendered(prompts, list(range(len(prompts)))), strict=True):
        to_pil(pixels).save(file)
    return GivenPictures("renderer", str(folder), files)


COSTS = {"steps": 1, "evaluations": 1, "tflop": 5e-4, "latency": {"text_s": 9.0, "denoise_s": 0.002, "decode_s": 5e-4}}


def judge_files(folder: Path, judge: Judge, n: int) -> Judged:
    """The judge's reading of the right pictures, from files."""
    judge.save_pretrained(folder / "judge")
    candidate = write_pictures(folder / "pictures", prompts_of(n))
    return contest.judged_pictures(contest.plan_of(folder / "evaluation", candidate, n), str(folder / "judge"))


def test_pictures_from_files_are_judged_as_those_in_memory(judge: Judge, tmp_path: Path) -> None:
    prompts = prompts_of(10)
    judged = judge_files(tmp_path, judge, 10)
    pixels = rendered(prompts, list(range(10)))
    levels = (127.5 * (pixels + 1)).round() / 127.5 - 1
    assert torch.allclose(judged.features, judge.features(levels), atol=1e-6)
    assert judged.accuracy() == pytest.approx(prompt_accuracy(judge, levels, prompts))
    assert judged.first(3).accuracy() == pytest.approx(prompt_accuracy(judge, levels[:3], prompts[:3]))


def test_scores_pack_and_unpack() -> None:
    score = {"shape": (1, 2), "count": (0, 1)}
    packed = contest.pack_score(score)
    assert packed.shape == (len(ATTRIBUTES), 2) and packed.sum() == 4
    assert contest.unpack_score(packed) == score


def test_prompts_are_a_prefix_and_references_differ(judge: Judge) -> None:
    assert prompts_of(12)[:5] == prompts_of(5)
    device = torch.device("cpu")
    some = contest.reference_features(judge, 6, REFERENCE_SEED, device, batch=4)
    assert torch.allclose(some[:3], contest.reference_features(judge, 3, REFERENCE_SEED, device), atol=1e-6)
    assert not torch.allclose(some, contest.reference_features(judge, 6, FLOOR_SEED, device), atol=1e-4)


def test_row_of_the_reference_itself_has_no_distance(judge: Judge, tmp_path: Path) -> None:
    judged = judge_files(tmp_path, judge, 8)
    row = contest.make_row("renderer", COSTS, judged, judged.features)
    accuracy = judged.accuracy()
    assert row.fid == pytest.approx(0, abs=1e-6)
    assert (row.prompt_accuracy, row.exact_match) == (accuracy["mean"], accuracy["exact_match"])
    assert row.prompt_accuracy == pytest.approx(sum(row.attributes.values()) / len(row.attributes))
    assert json.loads(json.dumps(row.as_dict()))["n_pictures"] == 8
    assert (row.gflop, row.ms_per_image) == (pytest.approx(0.5), pytest.approx(2.5))  # text is not in it


# The demo's models


@pytest.fixture
def task(tiny_model: Path) -> Distiller:
    model = Pretrained(
        "sd3", str(tiny_model), rank=4, precision="fp32", feature_blocks=(1,), max_text_tokens=12, teacher_steps=5
    )
    task = Distiller(model, tiny.build_schedule(), {"mmd": MMD(blocks=(1,))})
    task.configure_model()
    generator = torch.Generator().manual_seed(0)
    for parameter in task.networks.role_parameters("student"):
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return task.eval()


@pytest.fixture
def contenders(task: Distiller, tmp_path: Path) -> list[DrawingModel]:
    """The rows of the demo, with the task's student read from a run's folder."""
    save_task_adapter(task, tmp_path / "run" / "adapter")
    return [*contest.teachers(task).values(), *contest.student(task, tmp_path / "run").values()]


def save_task_adapter(task: Distiller, folder: Path) -> None:
    state = task.networks.adapter_state("student")
    save_adapter(folder, state, 4, 4, task.scheduler(), task.model.name, "transformer")


def drawn_by(candidate: DrawingModel, folder: Path, prompts: list[str], seeds: list[int]) -> Tensor:
    """Pictures of one batch, each with its own seed."""
    requests = Requests(list(zip(prompts, seeds, strict=True)), 1, 0)
    painter = CandidatePainter(Plan(folder, "p", requests, (candidate,), 8, 8), candidate)
    return torch.stack(painter.draw(range(len(prompts))))


def test_costs_of_the_three_models(task: Distiller, contenders: list[DrawingModel], tmp_path: Path) -> None:
    many, few, student = (contest.draw_pictures(contest.plan_of(tmp_path / "out", each, 2)) for each in contenders)
    full = contest.full_size_gflop(task) / 3
    assert [c["steps"] for c in (many, few, student)] == [5, 3, 3]
    assert [c["evaluations"] for c in (many, few, student)] == [10, 6, 3]
    assert 1000 * many["tflop"] == pytest.approx(10 * full) and 1000 * few["tflop"] == pytest.approx(6 * full)
    assert full < 1000 * student["tflop"] < 3 * full
    # The pictures have their prompts beside them, for `swd compare`.
    lists = [(tmp_path / "out" / "pictures" / each.name / "index.jsonl").read_text() for each in contenders]
    assert [json.loads(line)["prompt"] for line in lists[0].splitlines()] == prompts_of(2)
    assert lists == [lists[0]] * 3


def test_teacher_at_the_students_levels_is_plain_guided_euler(
    task: Distiller, contenders: list[DrawingModel], tmp_path: Path
) -> None:
    prompts, seeds = ["a red star", "a blue ring"], [3, 4]
    drawn = drawn_by(contenders[1], tmp_path, prompts, seeds)
    x = torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in seeds])
    text = task.encoders.encode_prompts(prompts)
    levels = [*tiny.SIGMAS, 0.0]
    with torch.no_grad():
        for sigma, below in itertools.pairwise(levels):
            x0 = task.networks.guided_x0(
                x, torch.full((2,), sigma), text, task.empty, task.model.drawing_guidance_scale
            )
            x = x + (below - sigma) * (x - x0) / sigma
    assert torch.allclose(drawn, task.encoders.decode(x), atol=1e-4)


def test_teacher_in_full_follows_the_stock_pipeline(
    task: Distiller, contenders: list[DrawingModel], tmp_path: Path
) -> None:
    pipe = task.model.pipeline()
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler) and pipe.scheduler.config.shift == 3.0
    stock = pipe(
        ["a red star"],
        height=64,
        width=64,
        num_inference_steps=5,
        guidance_scale=task.model.drawing_guidance_scale,
        generator=[torch.Generator().manual_seed(3)],
        max_sequence_length=12,
        output_type="pt",
    ).images
    drawn = drawn_by(contenders[0], tmp_path, ["a red star"], [3])
    assert torch.allclose(drawn / 2 + 0.5, stock, atol=1e-4)


def test_the_student_read_back_draws_what_the_task_draws(
    task: Distiller, contenders: list[DrawingModel], tmp_path: Path
) -> None:
    prompts, seeds = ["a red star", "a blue ring"], [0, 5]
    apart = task.sample(prompts, seeds)[0]
    assert torch.allclose(drawn_by(contenders[2], tmp_path, prompts, seeds), apart, atol=1e-4)
    assert not torch.allclose(apart, drawn_by(contenders[1], tmp_path, prompts, seeds), atol=1e-2)


def test_the_student_is_drawn_with_the_average_of_its_weights(task: Distiller, tmp_path: Path) -> None:
    prompts, seeds, run = ["a red star"], [0], tmp_path / "run"
    trained = task.sample(prompts, seeds)[0]
    try:
        task.average = averaged(task._student_weights(), 0.9)
        for weight in task.average.parameters():
            weight.mul_(0.5)
        save_task_adapter(task, run / "adapter")
        with task.averaged_student():
            save_task_adapter(task, run / "adapter" / AVERAGE)
        (student,) = contest.student(task, run).values()
        drawn = drawn_by(student, tmp_path, prompts, seeds)
        assert torch.allclose(drawn, task.sample(prompts, seeds)[0], atol=1e-4)
    finally:
        task.average = None
    assert not torch.allclose(drawn, trained, atol=1e-2)
    assert torch.equal(task.sample(prompts, seeds)[0], trained)


# Stored statistics


def test_stored_statistics_are_the_prefix_of_what_was_judged(judge: Judge, tmp_path: Path) -> None:
    store = StoredStatistics(tmp_path / "stored" / "teacher.npz", {"weights": "abc"})
    store.path.parent.mkdir()
    assert "not there" in (store.why_not(1) or "")
    judged = judge_files(tmp_path, judge, 9)
    store.save(judged, "make it")
    assert store.why_not(9) is None and "10 are asked for" in (store.why_not(10) or "")
    loaded = store.load()
    assert torch.equal(loaded.features, judged.features) and torch.equal(loaded.scores, judged.scores)
    assert "another weights" in (StoredStatistics(store.path, {"weights": "abd"}).why_not(2) or "")
    assert json.loads(store.about.read_text())["command"] == "make it"
    assert sorted(path.name for path in store.path.parent.iterdir()) == ["teacher.json", "teacher.npz"]


def test_statistics_depend_on_every_weight(task: Distiller, judge: Judge, tmp_path: Path) -> None:
    judge.save_pretrained(tmp_path)
    store = contest.teacher_store(task, tmp_path)
    with torch.no_grad():
        other = Judge(**judge.config)
        other.load_state_dict(judge.state_dict())
        next(other.parameters()).view(-1)[0] += 1e-3
    other.save_pretrained(tmp_path)
    assert contest.teacher_store(task, tmp_path).facts["judge_sha256"] != store.facts["judge_sha256"]
    task.model.drawing_guidance_scale = 2.0
    assert contest.teacher_store(task, tmp_path).facts["guidance_scale"] != store.facts["guidance_scale"]
    with pytest.raises(UserError, match=r"no \.safetensors"):
        contest.sha256_of(tmp_path / "nothing")


def test_records_join() -> None:
    part = Judged(torch.zeros(2, 3), torch.ones(2, len(ATTRIBUTES), 2, dtype=torch.int64))
    assert len(Judged.cat([part, replace(part), part.first(1)])) == 5


ASSETS = Path(__file__).parents[2] / "assets"


@pytest.mark.parametrize("steps", [28, 4])
def test_the_stored_statistics_belong_to_the_weights_that_ship(steps: int) -> None:
    """Else the demo would draw the teacher's pictures again, and miss its ten minutes."""
    about = json.loads((ASSETS / "shapes-judge" / f"teacher_{steps}steps.json").read_text())
    assert about["model_sha256"] == contest.sha256_of(ASSETS / "shapes-sd3")
    assert about["judge_sha256"] == contest.sha256_of(ASSETS / "shapes-judge")
    assert about["n_pictures"] >= (1000 if steps == 28 else 512)  # as many as the demo judges by default


def test_the_stores_are_of_the_teachers_of_the_table(task: Distiller, judge: Judge, tmp_path: Path) -> None:
    judge.save_pretrained(tmp_path)
    many, few = contest.teacher_stores(task, tmp_path).values()
    assert [many.path.name, few.path.name] == ["teacher_5steps.npz", "teacher_3steps.npz"]
    assert many.facts == contest.teacher_store(task, tmp_path).facts
    assert many.facts["scheduler"].startswith("FlowMatch") and few.facts["scheduler"] == (
        "Euler at 1.000000, 0.800000, 0.600000"
    )
    assert (many.facts["steps"], few.facts["steps"]) == (5, 3)


def test_the_embedded_teacher_is_small() -> None:
    assert sum(file.stat().st_size for file in (ASSETS / "shapes-sd3").rglob("*") if file.is_file()) <= 12e6
