"""The values of each metric on stored features, and its refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from extractors import TinyExtractor, drawn_of, pictures
from torch import Tensor

from swd.metrics import functional
from swd.metrics.base import Drawn, Gaussian, PictureMetric, Reference
from swd.metrics.cmmd import Cmmd
from swd.metrics.fid import Frechet
from swd.metrics.kid import Kid
from swd.metrics.patch_fid import patch_fid
from swd.metrics.precision_recall import Precision, Recall
from swd.types import UserError

EXTRACTOR = TinyExtractor()
REAL = Reference({"tiny": EXTRACTOR(pictures(60, 0, brightness=200))})
DRAWN = drawn_of(EXTRACTOR, pictures(50, 1))
METRICS = [Frechet(EXTRACTOR), Kid(EXTRACTOR), Cmmd(EXTRACTOR), Precision(EXTRACTOR), Recall(EXTRACTOR)]


def statistics(features: Tensor) -> Gaussian:
    array = features.double().numpy()
    return Gaussian(torch.from_numpy(array.mean(0)), torch.from_numpy(np.cov(array, rowvar=False)))


def test_fid_carries_its_floor_and_its_extrapolated_value() -> None:
    few = drawn_of(EXTRACTOR, pictures(20, 1))
    score = Frechet(EXTRACTOR, seed=2).score(few, REAL)
    real, drawn = REAL.features["tiny"].double(), few.features["tiny"].double()
    assert list(score.values) == ["fid", "fid_inf", "fid_floor"]
    assert score.values["fid"] == pytest.approx(functional.frechet_distance(real, drawn))
    assert score.values["fid_floor"] == pytest.approx(functional.frechet_floor(real, 20, seed=2))
    assert score.values["fid_inf"] == pytest.approx(functional.frechet_infinity(statistics(real), drawn, seed=2))
    assert score.values["fid_inf"] < score.values["fid"]


def test_fid_with_published_statistics_equals_that_with_the_pictures() -> None:
    metric = Frechet(EXTRACTOR, "fd")
    known = Reference(gaussians={"tiny": statistics(REAL.features["tiny"])})
    metric.check(known)
    found = metric.score(DRAWN, known).values
    assert list(found) == ["fd", "fd_inf"]
    assert found["fd"] == pytest.approx(metric.score(DRAWN, REAL).values["fd"])


def test_fid_of_few_pictures_is_not_extrapolated() -> None:
    score = Frechet(EXTRACTOR).score(drawn_of(EXTRACTOR, pictures(11, 1)), REAL)
    assert list(score.values) == ["fid", "fid_floor"]
    assert score.parts is None


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_parts_are_per_picture_and_have_the_value_as_their_mean(metric: PictureMetric) -> None:
    score = metric.score(DRAWN, REAL)
    if metric.name == "recall":
        assert score.parts is None
        return
    assert score.parts is not None and score.parts.shape == (50,) and score.per == "picture"
    assert float(score.parts.mean()) == pytest.approx(score.values[metric.name])
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    shuffled = metric.score(Drawn({"tiny": DRAWN.features["tiny"][order]}), REAL)
    torch.testing.assert_close(shuffled.parts, score.parts[order])


def test_kid_equals_its_published_form_in_expectation() -> None:
    everything = Kid(EXTRACTOR).score(DRAWN, REAL).values["kid"]
    subsets = Kid(EXTRACTOR, subsets=300, size=25).score(DRAWN, REAL).values
    assert list(subsets) == ["kid", "kid_std"]
    assert subsets["kid"] == pytest.approx(everything, abs=4 * subsets["kid_std"] / 300**0.5)
    seeded = Kid(EXTRACTOR, subsets=3, size=25, seed=7).score(DRAWN, REAL).values["kid"]
    values = functional.kernel_distances(DRAWN.features["tiny"], REAL.features["tiny"], 3, 25, seed=7)
    assert seeded == pytest.approx(float(values.mean()))


def test_cmmd_is_a_thousand_discrepancies_of_kernel_width_ten() -> None:
    x, y = DRAWN.features["tiny"].double(), REAL.features["tiny"].double()

    def mean(a: Tensor, b: Tensor) -> float:
        return float(torch.exp(-(torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") ** 2) / 200).mean())

    expected = 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    assert Cmmd(EXTRACTOR).score(DRAWN, REAL).values["cmmd"] == pytest.approx(expected, rel=1e-8)


def test_precision_and_recall_tell_poor_pictures_from_poor_variety() -> None:
    same = drawn_of(EXTRACTOR, pictures(60, 0, brightness=200))
    narrow = Drawn({"tiny": same.features["tiny"][:5].repeat(10, 1) + 1e-4 * torch.randn(50, 6)})
    apart = Drawn({"tiny": same.features["tiny"] + 100})
    precision, recall = Precision(EXTRACTOR), Recall(EXTRACTOR)
    for drawn, expected in ((same, (1, 1)), (apart, (0, 0))):
        assert precision.score(drawn, REAL).values["precision"] == expected[0]
        assert recall.score(drawn, REAL).values["recall"] == expected[1]
    assert precision.score(narrow, REAL).values["precision"] == 1
    assert recall.score(narrow, REAL).values["recall"] <= 0.2


def test_patch_fid_looks_at_the_middle_at_full_resolution() -> None:
    metric = patch_fid("inception.safetensors")
    (extractor,) = metric.extractors
    assert (metric.name, extractor.name) == ("patch_fid", "inception-crop299")
    picture = pictures(1, 0, side=320)[0]
    torch.testing.assert_close(extractor.prepare(picture), picture[:, 10:309, 10:309].float() / 255)


def test_what_could_not_be_scored_is_refused_before_anything_is_drawn() -> None:
    known = Reference(gaussians={"tiny": statistics(REAL.features["tiny"])})
    for metric in METRICS:
        metric.check(REAL)
        with pytest.raises(UserError, match="compares with real pictures and has none; give a reference"):
            metric.check()
        with pytest.raises(UserError, match="the reference has no features of tiny; give it a folder"):
            metric.check(Reference())
        if metric.name != "fid":
            with pytest.raises(UserError, match="the reference has only their mean and covariance"):
                metric.check(known)
    with pytest.raises(FileNotFoundError):
        Kid(TinyExtractor(present=False)).check(REAL)


def test_features_of_another_width_are_refused() -> None:
    wrong = Drawn({"tiny": torch.zeros(4, 5)})
    for metric in METRICS:
        with pytest.raises(UserError, match=r"features of tiny are \[N, 6\], those of the drawn pictures \[4, 5\]"):
            metric.score(wrong, REAL)
        with pytest.raises(UserError, match="the drawn pictures have no features of tiny"):
            metric.score(Drawn({}), REAL)
    with pytest.raises(UserError, match="statistics of tiny are 6 wide, those of the reference 2"):
        Frechet(EXTRACTOR).score(DRAWN, Reference(gaussians={"tiny": Gaussian(torch.zeros(2), torch.eye(2))}))


def test_pictures_of_one_prompt_are_a_group() -> None:
    drawn = drawn_of(EXTRACTOR, pictures(5, 0), ["a", "b", "a", "c", "b"])
    assert drawn.groups() == [[0, 2], [1, 4], [3]]
    assert len(drawn) == 5
