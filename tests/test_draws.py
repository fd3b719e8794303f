"""Random draws depend on (seed, iteration, update, purpose, global position) and on nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from swd.types import SeededDraws, stable_hash

BASE = SeededDraws(seed=3, iteration=7, update=2)


def like(batch: int = 4, side: int = 8) -> torch.Tensor:
    return torch.zeros(batch, 4, side, side)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_global_batch_is_the_same_for_any_number_of_processes(processes: int) -> None:
    local = 4 // processes
    parts = [replace(BASE, first=rank * local) for rank in range(processes)]
    assert torch.equal(torch.cat([d.noise("a", like(local)) for d in parts]), BASE.noise("a", like()))
    assert torch.equal(torch.cat([d.index("a", 0, 27, local) for d in parts]), BASE.index("a", 0, 27, 4))


def test_neither_order_nor_earlier_draws_nor_global_state_matter() -> None:
    expected = BASE.noise("a", like())
    BASE.index("b", 0, 27, 4)
    torch.manual_seed(99)
    torch.randn(10)
    assert torch.equal(SeededDraws(3, 7, 2).noise("a", like()), expected)
    state = torch.get_rng_state()
    BASE.noise("a", like())
    assert torch.equal(torch.get_rng_state(), state)


def test_every_part_of_the_key_gives_other_numbers() -> None:
    others = [
        BASE.noise("a", like()),
        BASE.noise("b", like()),
        replace(BASE, seed=4).noise("a", like()),
        replace(BASE, iteration=8).noise("a", like()),
        replace(BASE, update=3).noise("a", like()),
        replace(BASE, first=4).noise("a", like()),
    ]
    rows = torch.cat(others).flatten(1)
    table = torch.corrcoef(rows)
    assert (table - torch.eye(len(rows))).abs().max() < 0.35  # 256 numbers a row: 5.6 standard errors


def test_keys_of_several_digits_do_not_run_into_each_other() -> None:
    a, b = SeededDraws(1, 1, 11, 0), SeededDraws(1, 11, 1, 0)
    assert not torch.equal(a.noise("x", like(1)), b.noise("x", like(1)))
    assert not torch.equal(SeededDraws(11, 1).noise("x", like(1)), SeededDraws(1, 11).noise("x", like(1)))


def test_noise_is_standard_normal() -> None:
    values = BASE.noise("a", like(8, 64)).flatten()
    assert values.dtype == torch.float32
    assert abs(values.mean()) < 0.01 and abs(values.std() - 1) < 0.01
    quantiles = torch.quantile(values[:10000], torch.tensor([0.0228, 0.5, 0.9772]))
    assert torch.allclose(quantiles, torch.tensor([-2.0, 0.0, 2.0]), atol=0.1)


def test_noise_of_a_low_precision_latent_is_float32() -> None:
    assert torch.equal(BASE.noise("a", like().bfloat16()), BASE.noise("a", like()))


@pytest.mark.parametrize(("low", "high"), [(0, 27), (12, 27), (18, 27), (5, 5)])
def test_indices_are_uniform_with_both_ends(low: int, high: int) -> None:
    draws = BASE.index("mmd/index", low, high, 3000)
    assert draws.dtype == torch.int64 and draws.min() == low and draws.max() == high
    counts = torch.bincount(draws - low).double()
    n = high - low + 1
    expected = 3000 / n
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < n - 1 + 5 * (2 * n) ** 0.5


def test_hashes_are_the_same_everywhere() -> None:
    assert stable_hash(b"swd") == 3897029751569831211
    assert 0 <= stable_hash(b"") < 2**63


@pytest.mark.parametrize("shape", [(2, 1, 3), (3, 4, 5, 5), (2, 4, 8, 8), (2, 16, 3, 4, 6)])
def test_numbers_are_those_of_a_fresh_generator_for_each_sample(shape: tuple[int, ...]) -> None:
    """Bit by bit, whether a draw has fewer than 16 numbers, a multiple of 16, or neither: each is drawn its own way."""

    def generator(purpose: str, row: int) -> torch.Generator:
        return torch.Generator().manual_seed(stable_hash(f"3/{purpose}/7/2/{row}".encode()))

    noise = BASE.noise("a", torch.zeros(shape))
    index = BASE.index("b", 12, 27, shape[0])
    for row in range(shape[0]):
        assert torch.equal(noise[row], torch.randn(shape[1:], generator=generator("a", row)))
        assert index[row] == torch.randint(12, 28, (), generator=generator("b", row))
