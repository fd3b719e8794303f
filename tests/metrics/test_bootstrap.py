"""Bootstrap intervals against closed forms and plain numpy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from swd.metrics import bootstrap
from swd.metrics.bootstrap import Resamples
from swd.metrics.functional import frechet_of_gaussians, frechet_parts, gaussian, mmd_parts, polynomial_kernel
from swd.types import UserError


def test_counts_are_whole_prompts_with_replacement() -> None:
    counts = Resamples(["b", "b", "a", "c", "a"], draws=2000, seed=3).counts()
    assert counts.shape == (2000, 5)
    assert torch.equal(counts[:, 0], counts[:, 1]) and torch.equal(counts[:, 2], counts[:, 4])
    assert torch.equal(counts[:, 0] + counts[:, 2] + counts[:, 3], torch.full((2000,), 3.0, dtype=torch.float64))
    # A prompt's count is binomial(3, 1/3): mean 1, variance 2/3.
    assert counts[:, 0].mean().item() == pytest.approx(1, abs=0.06)
    assert counts[:, 0].var().item() == pytest.approx(2 / 3, abs=0.06)


def test_a_seed_gives_one_interval() -> None:
    values = torch.randn(30, generator=torch.Generator().manual_seed(0))
    first, again, other = (
        bootstrap.interval(bootstrap.mean_of(values), Resamples(range(30), seed=seed)) for seed in (0, 0, 1)
    )
    assert first == again != other


def test_the_interval_of_a_mean_is_the_normal_one() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).double()
    found = bootstrap.interval(bootstrap.mean_of(values), Resamples(range(400), draws=4000))
    mean, error = values.mean().item(), values.std(correction=0).item() / math.sqrt(400)
    assert found.value == pytest.approx(mean)
    assert found.low == pytest.approx(mean - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(mean + 1.96 * error, abs=0.1 * error)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(1)
    held = 0
    for trial in range(300):
        # Four pictures a prompt that share most of their value: an interval over pictures would be half as wide.
        prompt = torch.randn(50, 1, generator=generator)
        values = (prompt + 0.1 * torch.randn(50, 4, generator=generator)).flatten()
        resamples = Resamples([i // 4 for i in range(200)], draws=200, seed=trial)
        found = bootstrap.interval(bootstrap.mean_of(values), resamples)
        held += found.low <= 0 <= found.high
    assert 0.90 <= held / 300 <= 0.98


def test_pairing_takes_out_what_prompts_do_to_both_models() -> None:
    generator = torch.Generator().manual_seed(2)
    prompt = 10 * torch.randn(100, generator=generator)
    a = prompt + 0.1 * torch.randn(100, generator=generator) + 0.2
    b = prompt + 0.1 * torch.randn(100, generator=generator)
    resamples = Resamples(range(100))
    difference = bootstrap.paired(bootstrap.mean_of(a), bootstrap.mean_of(b), resamples)
    alone = bootstrap.interval(bootstrap.mean_of(a), resamples)
    assert difference.settles and not alone.settles
    assert difference.value == pytest.approx((a - b).mean().item(), abs=1e-6)
    assert difference.high - difference.low < (alone.high - alone.low) / 20
    reverse = bootstrap.paired(bootstrap.mean_of(b), bootstrap.mean_of(a), resamples)
    assert (reverse.low, reverse.high) == pytest.approx((-difference.high, -difference.low), abs=1e-6)


def test_values_that_are_not_there_do_not_count() -> None:
    statistic = bootstrap.mean_of(torch.tensor([1.0, math.nan, 4.0]))
    counts = torch.tensor([[1.0, 1, 1], [2, 5, 1]], dtype=torch.float64)
    assert statistic(counts).tolist() == [2.5, 2.0]


def test_rows_are_repeated_as_often_as_they_were_drawn() -> None:
    rows = torch.tensor([[1.0], [10.0], [100.0]])
    statistic = bootstrap.of_rows(lambda each: float(each.sum()), rows)
    counts = torch.tensor([[1, 1, 1], [0, 3, 1]], dtype=torch.float64)
    assert statistic(counts).tolist() == [111.0, 130.0]


def kernel_distance(drawn: np.ndarray, real: np.ndarray) -> float:
    """KID by its definition, one pair at a time."""

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / len(x) + 1) ** 3)

    xx = [kernel(x, y) for i, x in enumerate(drawn) for j, y in enumerate(drawn) if i != j]
    yy = [kernel(x, y) for i, x in enumerate(real) for j, y in enumerate(real) if i != j]
    xy = [kernel(x, y) for x, y in itertools.product(drawn, real)]
    return float(np.mean(xx) + np.mean(yy) - 2 * np.mean(xy))


def test_the_kernel_distance_is_the_definition() -> None:
    rng = np.random.default_rng(0)
    drawn, real = rng.normal(size=(12, 5)), rng.normal(size=(9, 5))
    statistic = bootstrap.kernel_distance_of(torch.tensor(drawn), torch.tensor(real), range(12))
    ones = torch.ones(1, 12, dtype=torch.float64)
    assert statistic(ones).item() == pytest.approx(kernel_distance(drawn, real), rel=1e-12)
    # Dropping a prompt is a count of 0.
    without = ones.clone()
    without[0, 3] = 0
    assert statistic(without).item() == pytest.approx(kernel_distance(np.delete(drawn, 3, 0), real), rel=1e-12)


def test_a_picture_is_no_pair_with_itself() -> None:
    rng = np.random.default_rng(1)
    drawn, real = torch.tensor(rng.normal(size=(60, 4))), torch.tensor(rng.normal(size=(200, 4)))
    clusters = [i // 3 for i in range(60)]
    counts = Resamples(clusters, draws=4000).counts()
    ones = torch.ones(1, 60, dtype=torch.float64)
    exact = bootstrap.kernel_distance_of(drawn, real, clusters)
    # Repeated rows count a picture's pair with its copy.
    repeated = bootstrap.of_rows(lambda rows: float(mmd_parts(rows, real, polynomial_kernel, True).mean()), drawn)
    values = exact(counts)
    error = values.std().item() / math.sqrt(4000)
    assert exact(ones).item() == pytest.approx(repeated(ones).item())
    assert abs(values.mean().item() - exact(ones).item()) < 4 * error
    assert (repeated(counts[:400]) - exact(counts[:400])).mean().item() > 40 * error


def test_parts_give_the_interval_of_recomputed_distances() -> None:
    rng = np.random.default_rng(4)
    real = torch.tensor(rng.normal(size=(1000, 3)))
    drawn = torch.tensor(rng.normal([0.5, 0, 0], [1, 1.5, 1], size=(300, 3)))
    clusters = [i // 2 for i in range(300)]
    resamples = Resamples(clusters, draws=1000)
    kernel = (
        bootstrap.mean_of(mmd_parts(drawn, real, polynomial_kernel, unbiased=True)),
        bootstrap.kernel_distance_of(drawn, real, clusters),
    )
    reference = gaussian(real)
    frechet = (
        bootstrap.mean_of(frechet_parts(reference, drawn)),
        bootstrap.of_rows(lambda rows: frechet_of_gaussians(reference, gaussian(rows)), drawn),
    )
    for linear, recomputed in (kernel, frechet):
        a, b = bootstrap.interval(linear, resamples), bootstrap.interval(recomputed, resamples, centred=True)
        assert a.value == pytest.approx(b.value, rel=1e-9)
        width = b.high - b.low
        assert (a.low, a.high) == pytest.approx((b.low, b.high), abs=0.1 * width)


def test_blocks_estimate_the_same_distance() -> None:
    rng = np.random.default_rng(2)
    drawn, real = torch.tensor(rng.normal(1, 1, size=(600, 8))), torch.tensor(rng.normal(size=(300, 8)))
    clusters = [i // 2 for i in range(600)]
    ones = torch.ones(1, 600, dtype=torch.float64)
    whole = bootstrap.kernel_distance_of(drawn, real, clusters)(ones).item()
    parts = bootstrap.kernel_distance_of(drawn, real, clusters, block=101)(ones).item()
    assert parts == pytest.approx(whole, rel=0.05) and parts != whole
    half = bootstrap.kernel_distance_of(drawn[:300], real, clusters[:300])(ones[:, :300])
    assert half.item() == pytest.approx(whole, rel=0.2)


def test_centring_takes_the_second_bias_out() -> None:
    rng = np.random.default_rng(3)
    rows = torch.tensor(rng.normal(size=(60, 1)))
    largest = bootstrap.of_rows(lambda each: float(each.std()), rows)
    raw = bootstrap.interval(largest, Resamples(range(60), draws=500))
    centred = bootstrap.interval(largest, Resamples(range(60), draws=500), centred=True)
    assert centred.high - centred.low == pytest.approx(raw.high - raw.low)
    assert centred.low > raw.low  # a resample's deviation is too small by a factor sqrt(1 - 1/N)


@pytest.mark.parametrize("clusters, draws", [(["a", "a"], 10), ([], 10), (["a", "b"], 1)])
def test_too_few_prompts_or_resamples_are_refused(clusters: list[str], draws: int) -> None:
    with pytest.raises(UserError, match="at least 2"):
        Resamples(clusters, draws)


def test_a_level_outside_of_0_and_1_is_refused() -> None:
    with pytest.raises(UserError, match=r"level=95 is not valid"):
        bootstrap.interval(bootstrap.mean_of(torch.ones(3)), Resamples(range(3)), level=95)
