"""Latents to start from, against closed forms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from swd.diffusion import RectifiedFlow, VariancePreserving, rectified_flow_levels, rectified_flow_table
from swd.modules.starting import NoisedStart, encode_start


def latents(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def enlarged(x: Tensor) -> Tensor:
    return F.interpolate(x, size=(8, 8), mode="bicubic", align_corners=False)


def test_the_clean_latent_is_enlarged_then_noised() -> None:
    x0, eps = latents(2, 3, 4, 4), latents(2, 3, 8, 8, seed=1)
    x_t = NoisedStart(0.6, (4, 4), (8, 8)).noised(x0, RectifiedFlow(), lambda like: eps)
    torch.testing.assert_close(x_t, 0.4 * enlarged(x0) + 0.6 * eps)


def test_the_noisy_latent_is_noised_then_enlarged() -> None:
    x0, eps = latents(2, 3, 4, 4), latents(2, 3, 4, 4, seed=1)
    x_t = NoisedStart(0.6, (4, 4), (8, 8), "noisy").noised(x0, RectifiedFlow(), lambda like: eps)
    torch.testing.assert_close(x_t, enlarged(0.4 * x0 + 0.6 * eps))


@pytest.mark.parametrize("process", [RectifiedFlow(), VariancePreserving()], ids=["flow", "epsilon"])
def test_at_equal_sizes_both_are_the_same(process: RectifiedFlow | VariancePreserving) -> None:
    x0, eps = latents(2, 3, 8, 8), latents(2, 3, 8, 8, seed=1)
    clean, noisy = (
        NoisedStart(0.6, (8, 8), (8, 8), how).noised(x0, process, lambda like: eps) for how in ("clean", "noisy")
    )
    assert torch.equal(clean, noisy)
    torch.testing.assert_close(clean, process.add_noise(x0, eps, torch.tensor(0.6)))


def test_enlarged_noise_has_lost_its_variance() -> None:
    """Why the noisy one is out of distribution: the network expects noise of variance sigma^2, white."""
    zero = torch.zeros(64, 3, 4, 4)
    noise = {
        how: NoisedStart(0.5, (4, 4), (8, 8), how).noised(
            zero, RectifiedFlow(), lambda like: latents(*like.shape, seed=2)
        )
        for how in ("clean", "noisy")
    }
    assert noise["clean"].var().item() == pytest.approx(0.25, rel=0.05)
    assert noise["noisy"].var().item() < 0.2


class Halving:
    """Encoders whose latents are pictures of half the side, with a deviation of 0.1."""

    device = torch.device("cpu")

    def pixel_size(self, size: tuple[int, int]) -> tuple[int, int]:
        return size[0] * 2, size[1] * 2

    def distribution(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean = F.avg_pool2d(pixels, 2)
        return mean, torch.full_like(mean, 0.1)


def test_a_picture_is_shrunk_encoded_and_noised_by_its_own_seed() -> None:
    pixels = latents(2, 3, 16, 16)
    start = NoisedStart(0.3, (4, 4), (8, 8))
    both = encode_start(Halving(), RectifiedFlow(), pixels, [7, 8], start)
    assert torch.equal(encode_start(Halving(), RectifiedFlow(), pixels[1:], [8], start), both[1:])

    generator = torch.Generator().manual_seed(7)
    posterior, eps = torch.randn(3, 4, 4, generator=generator), torch.randn(3, 8, 8, generator=generator)
    x0 = F.avg_pool2d(pixels[:1], 4) + 0.1 * posterior
    torch.testing.assert_close(both[:1], 0.7 * enlarged(x0) + 0.3 * eps)


def test_levels_of_other_numbers_of_steps() -> None:
    assert torch.equal(rectified_flow_levels(28), rectified_flow_table())
    levels = rectified_flow_levels(4)
    assert len(levels) == 5 and levels[0] == 1 and levels[-1] == 0
