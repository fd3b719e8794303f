"""Metrics of shapes against the judge's own functions and against counts written out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from swd.metrics.base import Drawn, Reference
from swd.metrics.bootstrap import Resamples, interval, mean_of
from swd.metrics.fid import Frechet, frechet_distance
from swd.shapes.dataset import ShapesDataset
from swd.shapes.judge import ATTRIBUTES, Judge, prompt_accuracy, reading_of
from swd.shapes.metrics import JudgeFeatures, JudgeReadings, ShapesAccuracy, accuracy_of
from swd.types import UserError


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.from_pretrained(JudgeFeatures().folder())


@pytest.fixture(scope="module")
def shapes() -> tuple[Tensor, list[str]]:
    """24 rendered pictures, uint8, the last eight with the captions of others."""
    dataset = ShapesDataset("heldout", 5, length=24)
    pixels = torch.stack([torch.as_tensor(dataset[i]["pixels"]) for i in range(24)])
    prompts = [dataset.draw(i)[1].caption() for i in range(24)]
    prompts[16:] = reversed(prompts[16:])
    return ((pixels / 2 + 0.5) * 255).round().byte(), prompts


def test_accuracy_is_that_of_the_judge(judge: Judge, shapes: tuple[Tensor, list[str]]) -> None:
    pictures, prompts = shapes
    metric = ShapesAccuracy()
    extractor = metric.extractors[0]
    drawn = Drawn({extractor.name: extractor(pictures)}, prompts)
    found = metric.score(drawn)
    expected = prompt_accuracy(judge, pictures.float() / 127.5 - 1, prompts)
    assert found.values["shapes_accuracy"] == pytest.approx(expected["mean"])
    assert {name: found.values[name] for name in ATTRIBUTES if name in expected} == pytest.approx(
        {name: expected[name] for name in ATTRIBUTES if name in expected}
    )
    assert 0.5 < expected["mean"] < 0.95
    exact = ShapesAccuracy(exact=True, name="shapes_exact").score(drawn)
    assert exact.values["shapes_exact"] == found.values["exact_match"] == pytest.approx(expected["exact_match"])
    assert exact.parts is not None and set(exact.parts.tolist()) == {0.0, 1.0}


def test_readings_survive_as_features(judge: Judge, shapes: tuple[Tensor, list[str]]) -> None:
    rows = JudgeReadings()(shapes[0])
    assert [reading_of(row) for row in rows.long().tolist()] == judge.read(shapes[0].float() / 127.5 - 1)


def test_shares_and_their_parts_by_hand() -> None:
    # Shape, colour, size, relation, background, count.
    statements = torch.tensor(
        [
            [[1, 1], [0, 1], [0, 0], [0, 0], [1, 1], [1, 1]],
            [[1, 2], [2, 2], [0, 0], [0, 1], [0, 0], [1, 1]],
            [[3, 3], [1, 1], [0, 0], [2, 2], [0, 1], [1, 1]],
        ]
    )
    found = accuracy_of(statements)
    shares = {"shape": 5 / 6, "colour": 3 / 4, "relation": 2 / 3, "background": 1 / 2, "count": 1}
    assert found.values == pytest.approx({"shapes_accuracy": sum(shares.values()) / 5, "exact_match": 0} | shares)
    # A part is the derivative of the value when its picture counts for more.
    parts, step = found.parts, 1e-6
    assert parts is not None
    for i in range(3):
        weights = torch.ones(3, dtype=torch.float64)
        weights[i] += step
        hits, made = torch.einsum("n,nak->ka", weights, statements.double())
        heavier = (hits / made)[made > 0].mean().item()
        slope = (heavier - found.values["shapes_accuracy"]) / step
        assert (parts[i] - parts.mean()).item() / 3 == pytest.approx(slope, abs=1e-5)


def test_the_interval_of_accuracy_is_that_of_recounted_statements() -> None:
    generator = torch.Generator().manual_seed(0)
    made = torch.randint(0, 3, (200, 6), generator=generator)
    hits = (torch.rand(200, 6, generator=generator) * (made + 1)).long().clamp(max=2).minimum(made)
    found = accuracy_of(torch.stack([hits, made], 2))
    resamples = Resamples(range(200), draws=2000)
    assert found.parts is not None
    linear = interval(mean_of(found.parts), resamples)
    recounted = interval(lambda counts: ((counts @ hits.double()) / (counts @ made.double())).mean(1), resamples)
    width = recounted.high - recounted.low
    assert linear.value == pytest.approx(recounted.value)
    assert (linear.low, linear.high) == pytest.approx((recounted.low, recounted.high), abs=0.05 * width)


def test_the_judges_distance_is_a_metric_like_any_other(judge: Judge, shapes: tuple[Tensor, list[str]]) -> None:
    pictures = shapes[0]
    extractor = JudgeFeatures()
    real, drawn = extractor(pictures[:12]), extractor(pictures[12:])
    assert (extractor.width, extractor.name) == (64, "judge-128bicubic-crop128")
    torch.testing.assert_close(real, judge.features(pictures[:12].float() / 127.5 - 1))
    metric = Frechet(extractor, "judge_fid")
    found = metric.score(Drawn({extractor.name: drawn}), Reference({extractor.name: real}))
    assert found.values["judge_fid"] == pytest.approx(frechet_distance(real, drawn))


def test_what_cannot_be_judged_is_one_line_before_anything_is_drawn(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"no judge in {tmp_path}: it needs config.json"):
        ShapesAccuracy(str(tmp_path)).check()
    with pytest.raises(UserError, match=r"^shapes_accuracy: cannot read the caption 'a dog'"):
        ShapesAccuracy().check_prompts(["a red circle", "a dog"])
    ShapesAccuracy().check()
    rows = torch.zeros(2, 28)
    with pytest.raises(UserError, match="2 pictures but 1 prompts; give one each"):
        ShapesAccuracy().score(Drawn({JudgeReadings().name: rows}, ["a red circle"]))
