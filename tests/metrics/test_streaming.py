"""Metrics in their form for training: one, two and four processes give the numbers of the stored features."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from extractors import TinyExtractor, drawn_of, pictures, streamed_scores
from processes import prepare_forks

from swd.metrics.base import Drawn, PictureMetric, Reference, Score
from swd.metrics.fid import Frechet
from swd.metrics.kid import Kid
from swd.metrics.streaming import StreamedMetrics


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, float]]:
    """The numbers of features that were stored in order."""
    extractor = TinyExtractor()
    reference = Reference({"tiny": extractor(pictures(40, 1, brightness=200))})
    drawn, few = drawn_of(extractor, pictures(30, 0)), drawn_of(extractor, pictures(30, 0)[:9])
    fid = Frechet(extractor).score(drawn, reference).values
    return {
        "every": fid | Kid(extractor).score(drawn, reference).values,
        "few": Kid(extractor).score(few, reference).values,
        "sums": {"fid": fid["fid"]},
    }


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_change_nothing(world: int, expected: dict[str, dict[str, float]], tmp_path: Path) -> None:
    if world == 1:
        streamed_scores(0, 1, tmp_path)
    else:
        prepare_forks()
        torch.multiprocessing.start_processes(streamed_scores, (world, tmp_path), world, start_method="forkserver")
    for rank in range(world):
        found = torch.load(tmp_path / f"scores{world}_{rank}.pt", weights_only=True)
        for name in ("every", "few"):
            assert {key: float(value) for key, value in found[name].items()} == pytest.approx(expected[name], rel=1e-6)
        assert float(found["sums"]) == pytest.approx(expected["sums"]["fid"], rel=1e-4)  # sums in float32 at the end


class Prompted(PictureMetric):
    """Keeps what it was given."""

    name = "prompted"
    needs_prompts = True

    def __init__(self, extractor: TinyExtractor) -> None:
        self.extractors = (extractor,)

    def score(self, drawn: Drawn, reference: Reference | None = None) -> Score:
        self.drawn = drawn
        return Score({"prompted": 1.0})


def test_prompts_follow_their_pictures() -> None:
    extractor = TinyExtractor()
    metric = Prompted(extractor)
    prompts = [f"p{i}" for i in range(6)]
    streamed = StreamedMetrics([metric], prompts)
    for places in ([4, 1], [0, 5, 1], [2, 3]):
        streamed.update(pictures(6, 0)[places], torch.tensor(places))
    assert {name: float(value) for name, value in streamed.compute().items()} == {"prompted": 1}
    assert list(metric.drawn.prompts) == prompts
    torch.testing.assert_close(metric.drawn.features["tiny"], extractor(pictures(6, 0)))
    assert torch.equal(metric.drawn.prompt_features["tiny"], extractor.prompt_features(prompts))


def test_a_metric_can_be_used_again_and_runs_each_extractor_once() -> None:
    extractor = TinyExtractor()
    calls: list[int] = []
    extractor.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    reference = Reference({"tiny": torch.randn(20, 6, generator=torch.Generator().manual_seed(0))})
    streamed = StreamedMetrics([Kid(extractor), Frechet(extractor)], reference=reference)
    streamed.update(pictures(8, 0), torch.arange(8))
    first = streamed.compute()
    streamed.reset()
    streamed.update(pictures(8, 3), torch.arange(8))
    assert streamed.compute() != first
    streamed.reset()
    streamed.update(pictures(8, 0), torch.arange(8))
    assert streamed.compute() == first
    assert calls == [8, 8, 8]
