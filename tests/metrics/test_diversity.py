"""Diversity against pairs written out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from extractors import TinyExtractor
from torch import Tensor

from swd.metrics.base import Drawn
from swd.metrics.bootstrap import Resamples, mean_of, paired
from swd.metrics.diversity import Diversity
from swd.types import UserError

PROMPTS = ["x", "y", "x", "y", "y", "z", "z"]


def features(seed: int = 0, count: int = len(PROMPTS)) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def mean_cosine(rows: np.ndarray) -> float:
    pairs = itertools.combinations(rows, 2)
    return float(np.mean([a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in pairs]))


def test_diversity_is_the_mean_cosine_of_pairs_of_one_prompt() -> None:
    rows = features()
    found = Diversity(TinyExtractor()).score(Drawn({"tiny": rows}, PROMPTS))
    expected = [mean_cosine(rows.double().numpy()[places]) for places in ([0, 2], [1, 3, 4], [5, 6])]
    assert found.parts is not None and found.per == "prompt"
    assert found.parts.tolist() == pytest.approx(expected)
    assert found.values == {"diversity": pytest.approx(np.mean(expected))}


def test_equal_pictures_give_1_and_opposite_ones_minus_1() -> None:
    row = features()[:1]
    metric = Diversity(TinyExtractor())
    assert metric.score(Drawn({"tiny": row.repeat(4, 1)}, ["x"] * 4)).values["diversity"] == pytest.approx(1)
    opposite = torch.cat([row, -3 * row])
    assert metric.score(Drawn({"tiny": opposite}, ["x"] * 2)).values["diversity"] == pytest.approx(-1)


def test_a_collapsed_model_is_told_from_a_diverse_one() -> None:
    prompts = [f"prompt {i // 4}" for i in range(80)]
    diverse = features(1, 80)
    collapsed = diverse.clone()
    collapsed[1::2] = collapsed[::2] + 0.5 * collapsed[1::2]
    scores = [Diversity(TinyExtractor()).score(Drawn({"tiny": rows}, prompts)) for rows in (collapsed, diverse)]
    a, b = (score.parts for score in scores)
    assert a is not None and b is not None
    difference = paired(mean_of(a), mean_of(b), Resamples(range(20)))
    assert difference.settles and difference.value > 0


@pytest.mark.parametrize(
    "prompts, message",
    [
        (["x", "x", "y"], "and 'y' has one; draw images_per_prompt=2 or more"),
        ([], "and no prompts are known; draw images_per_prompt=2 or more"),
    ],
)
def test_single_pictures_are_refused_before_anything_is_drawn(prompts: Sequence[str], message: str) -> None:
    metric = Diversity(TinyExtractor())
    with pytest.raises(UserError, match=message):
        metric.check_prompts(prompts)
    with pytest.raises(UserError, match=message):
        metric.score(Drawn({"tiny": features()[:3]}, prompts))
