"""Intervals and differences against a bootstrap written out, and features that are stored chunk by chunk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from swd.evaluation.feature_files import FeatureFiles, extract_missing, key_for
from swd.evaluation.score import Bootstrap, Resampled
from swd.metrics.base import Score

PROMPTS = ["a", "a", "b", "c", "c", "d"]


def resampled(parts: list[float]) -> Resampled:
    values = torch.tensor(parts, dtype=torch.float64)
    return Resampled.of(Score({"m": float(values.mean())}, values), PROMPTS, Bootstrap(draws=400, level=0.9, seed=3))


def test_prompts_are_resampled_whole_and_differences_share_the_resamples() -> None:
    a, b = [1.0, 2.0, 5.0, 3.0, 1.0, 9.0], [2.0, 2.0, 4.0, 6.0, 1.0, 9.5]
    groups = np.array([0, 0, 1, 2, 2, 3])
    counts = np.random.default_rng(3).multinomial(4, [0.25] * 4, size=400)[:, groups]
    means = {name: (counts * np.array(each)).sum(1) / counts.sum(1) for name, each in (("a", a), ("b", b))}
    low, high = np.quantile(means["a"], [0.05, 0.95])
    assert resampled(a).interval() == pytest.approx({"value": 3.5, "low": low, "high": high})
    low, high = np.quantile(means["b"] - means["a"], [0.05, 0.95])
    found = resampled(a).compared(resampled(b), "A", "B", "m")
    assert (found["a"], found["b"], found["metric"]) == ("A", "B", "m")
    assert [found[key] for key in ("difference", "low", "high")] == pytest.approx([24.5 / 6 - 3.5, low, high])


def test_a_metric_without_parts_has_no_interval() -> None:
    bare = Resampled.of(Score({"m": 2.0}), PROMPTS, Bootstrap())
    assert bare.interval() == {"value": 2.0, "low": None, "high": None}
    assert bare.compared(resampled([1.0] * 6), "A", "B", "m")["low"] is None


def test_values_by_prompt_are_resampled_one_by_one() -> None:
    score = Score({"m": 2.5}, torch.tensor([1.0, 2.0, 3.0, 4.0]), "prompt")
    found = Resampled.of(score, PROMPTS, Bootstrap(draws=400, level=0.9, seed=3)).interval()
    counts = np.random.default_rng(3).multinomial(4, [0.25] * 4, size=400)
    assert [found["low"], found["high"]] == pytest.approx(np.quantile(counts @ [1, 2, 3, 4] / 4, [0.05, 0.95]))


def test_chunks_of_another_key_are_computed_again_and_others_kept(tmp_path: Path) -> None:
    asked: list[range] = []

    def compute(rows: range) -> torch.Tensor:
        asked.append(rows)
        return torch.arange(rows.start, rows.stop).float()[:, None]

    store = FeatureFiles(tmp_path, 7, 3, "one")
    store.write(1, torch.full((3, 1), 5.0))
    assert not store.is_complete
    extract_missing(store, compute, "task")
    assert asked == [range(3), range(6, 7)] and store.is_complete
    assert store.load().flatten().tolist() == [0, 1, 2, 5, 5, 5, 6]
    (tmp_path / "00002.safetensors").write_bytes(b"cut")
    assert not store.is_done(2)
    other = FeatureFiles(tmp_path, 7, 3, "two")
    assert not any(other.is_done(chunk) for chunk in range(3))
    extract_missing(other, compute, "task")
    assert other.load().flatten().tolist() == [0, 1, 2, 3, 4, 5, 6] and not store.is_done(0)


def test_the_key_of_features_is_of_pictures_weights_and_preparation() -> None:
    keys = {key_for(*each) for each in (("a", "w", "p"), ("b", "w", "p"), ("a", "v", "p"), ("a", "w", "q"))}
    assert len(keys) == 4 and key_for("a", "w", "p") in keys
