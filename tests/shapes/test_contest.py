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

from swd.losses import MMD
from swd.metrics.fid import frechet_distance
from swd.modules.distiller import Distiller
from swd.modules.pretrained import Pretrained
from swd.modules.training_task import averaged
from swd.shapes import contest
from swd.shapes.contest import Contender, Judged, Store
from swd.shapes.dataset import ShapesDataset
from swd.shapes.judge import ATTRIBUTES, Judge, prompt_accuracy
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
    dataset = ShapesDataset(contest.SPLIT, contest.PROMPT_SEED)
    items = [dataset[seed] for seed in seeds]
    assert [item["prompt"] for item in items] == prompts
    return torch.stack([torch.as_tensor(item["pixels"]) for item in items])


def contender(draw: contest.Draw = rendered) -> Contender:
    return Contender("renderer", steps=1, nfe=1, gflop=0.5, draw=draw)


def test_streaming_in_batches_equals_all_at_once(judge: Judge) -> None:
    prompts = contest.prompts_of(10)
    told: list[int] = []
    judged = contest.run_contender(contender(), judge, prompts, batch=4, advance=told.append)
    pixels = rendered(prompts, list(range(10)))
    assert told == [4, 4, 2]
    assert torch.allclose(judged.features, judge.features(pixels), atol=1e-6)
    assert judged.accuracy() == pytest.approx(prompt_accuracy(judge, pixels, prompts))
    assert judged.first(3).accuracy() == pytest.approx(prompt_accuracy(judge, pixels[:3], prompts[:3]))


def test_scores_pack_and_unpack() -> None:
    score = {"shape": (1, 2), "count": (0, 1)}
    packed = contest.pack_score(score)
    assert packed.shape == (len(ATTRIBUTES), 2) and packed.sum() == 4
    assert contest.unpack_score(packed) == score


def test_prompts_are_a_prefix_and_references_differ(judge: Judge) -> None:
    assert contest.prompts_of(12)[:5] == contest.prompts_of(5)
    device = torch.device("cpu")
    some = contest.reference_features(judge, 6, contest.REFERENCE_SEED, device, batch=4)
    assert torch.allclose(some[:3], contest.reference_features(judge, 3, contest.REFERENCE_SEED, device), atol=1e-6)
    assert not torch.allclose(some, contest.reference_features(judge, 6, contest.FLOOR_SEED, device), atol=1e-4)


def test_row_of_the_reference_itself_has_no_distance(judge: Judge) -> None:
    judged = contest.run_contender(contender(), judge, contest.prompts_of(8))
    row = contest.make_row(contender(), judged, judged.features, ms_per_image=2.5)
    accuracy = judged.accuracy()
    assert row.fid == pytest.approx(0, abs=1e-6)
    assert (row.prompt_accuracy, row.exact_match) == (accuracy["mean"], accuracy["exact_match"])
    assert row.prompt_accuracy == pytest.approx(sum(row.attributes.values()) / len(row.attributes))
    assert json.loads(json.dumps(row.as_dict()))["n_pictures"] == 8


def test_timing_is_a_median_and_keeps_pictures_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    now, costs = [0.0], iter([9.0, 0.8, 0.2, 0.6])  # the first one warms up

    def draw(prompts: list[str], seeds: list[int]) -> Tensor:
        now[0] += next(costs)
        return torch.tensor(seeds)[:, None, None, None].expand(-1, 3, 2, 2).float()

    monkeypatch.setattr(contest.time, "perf_counter", lambda: now[0])
    timing = contest.time_contender(contender(draw), ["a"] * 10, batch=4, repeats=3)
    assert timing.ms_per_image == pytest.approx(1000 * 0.6 / 4)
    assert timing.pictures[:, 0, 0, 0].tolist() == list(range(10))


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


def test_costs_of_the_three_models(task: Distiller) -> None:
    many, few, student = contest.contenders(task)
    full = contest.full_size_gflop(task) / 3
    assert [c.steps for c in (many, few, student)] == [5, 3, 3]
    assert [c.nfe for c in (many, few, student)] == [10, 6, 3]
    assert many.gflop == pytest.approx(10 * full) and few.gflop == pytest.approx(6 * full)
    assert full < student.gflop < 3 * full


def test_teacher_at_the_students_levels_is_plain_guided_euler(task: Distiller) -> None:
    prompts, seeds = ["a red star", "a blue ring"], [3, 4]
    drawn = contest.contenders(task)[1].draw(prompts, seeds)
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


def test_teacher_in_full_follows_the_stock_pipeline(task: Distiller) -> None:
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
    drawn = contest.contenders(task)[0].draw(["a red star"], [3])
    assert torch.allclose(drawn / 2 + 0.5, stock, atol=1e-4)


def test_merged_student_draws_the_same_and_leaves_no_trace(task: Distiller) -> None:
    prompts, seeds = ["a red star"], [0]
    before = {key: value.clone() for key, value in task.networks.state_dict().items()}
    apart = task.sample(prompts, seeds)[0]
    teacher = contest.contenders(task)[1].draw(prompts, seeds)
    assert not torch.allclose(apart, teacher, atol=1e-2)
    with contest.merged_student(task.networks):
        together = task.sample(prompts, seeds)[0]
    assert torch.allclose(apart, together, atol=1e-4)
    after = task.networks.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(task.sample(prompts, seeds)[0], apart)
    assert torch.equal(contest.contenders(task)[1].draw(prompts, seeds), teacher)


def test_the_student_is_drawn_with_the_average_of_its_weights(task: Distiller) -> None:
    prompts, seeds = ["a red star"], [0]
    trained = task.sample(prompts, seeds)[0]
    try:
        task.average = averaged(task._student_weights(), 0.9)
        for weight in task.average.parameters():
            weight.mul_(0.5)
        student = contest.contenders(task)[2]
        with student.ready():
            drawn = student.draw(prompts, seeds)
        assert torch.allclose(drawn, task.sample(prompts, seeds)[0], atol=1e-4)
    finally:
        task.average = None
    assert not torch.allclose(drawn, trained, atol=1e-2)
    assert torch.equal(task.sample(prompts, seeds)[0], trained)


# Stored statistics


def test_stored_statistics_are_the_prefix_of_what_was_judged(judge: Judge, tmp_path: Path) -> None:
    store, prompts = Store(tmp_path / "teacher.npz", {"weights": "abc"}), contest.prompts_of(9)
    assert "not there" in (store.why_not(1) or "")
    judged = contest.store_statistics(store, contender(), judge, prompts, "make it", batch=4)
    assert store.why_not(9) is None and "10 are asked for" in (store.why_not(10) or "")
    loaded = store.load()
    assert torch.equal(loaded.features, judged.features) and torch.equal(loaded.scores, judged.scores)
    assert "another weights" in (Store(store.path, {"weights": "abd"}).why_not(2) or "")
    assert json.loads(store.about.read_text())["command"] == "make it"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["teacher.json", "teacher.npz"]


def test_storing_continues_where_it_was_interrupted(judge: Judge, tmp_path: Path) -> None:
    store, prompts = Store(tmp_path / "teacher.npz", {"weights": "abc"}), contest.prompts_of(9)
    drawn: list[int] = []

    def fragile(prompts: list[str], seeds: list[int]) -> Tensor:
        if len(drawn) == 8:
            raise KeyboardInterrupt
        drawn.extend(seeds)
        return rendered(prompts, seeds)

    with pytest.raises(KeyboardInterrupt):
        contest.store_statistics(store, contender(fragile), judge, prompts, "", batch=4)
    rest: list[int] = []
    patient = contender(lambda texts, seeds: (rest.extend(seeds), rendered(texts, seeds))[1])
    judged = contest.store_statistics(store, patient, judge, prompts, "", batch=4)
    assert (drawn, rest) == ([*range(8)], [8])
    whole = contest.run_contender(contender(), judge, prompts, batch=4)
    assert torch.allclose(judged.features, whole.features, atol=1e-6) and torch.equal(judged.scores, whole.scores)


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


def test_the_stored_statistics_belong_to_the_weights_that_ship() -> None:
    """Else the demo would draw the teacher's full-length pictures again, and miss its ten minutes."""
    about = json.loads((ASSETS / "shapes-judge" / "teacher_28steps.json").read_text())
    assert about["model_sha256"] == contest.sha256_of(ASSETS / "shapes-sd3")
    assert about["judge_sha256"] == contest.sha256_of(ASSETS / "shapes-judge")
    assert about["n_pictures"] >= 1000


def test_the_embedded_teacher_is_small() -> None:
    assert sum(file.stat().st_size for file in (ASSETS / "shapes-sd3").rglob("*") if file.is_file()) <= 12e6
