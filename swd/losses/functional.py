"""The losses as pure functions: tensors in, tensors out, float32 inside (SwD paper, sections 4.1, 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kernel = Literal["linear", "rbf"]
Distance = Literal["pseudo_huber", "squared"]
Reduce = Literal["image", "batch"]


def dmd_direction(x0_hat: Tensor, x0_real: Tensor, x0_fake: Tensor) -> Tensor:
    """Gradient of the reverse KL with respect to the student's output (DMD, eq. 7; normalised per sample, eq. 8).

    Args:
        x0_hat: student's prediction `[B, ...]`.
        x0_real: teacher's clean prediction on the noised `x0_hat`.
        x0_fake: fake-score network's clean prediction on the same.

    Returns:
        `(fake - real) / mean|x0_hat - real|`, the mean per sample; 0 where the denominator is exactly 0. Values that
        are not finite are passed on, so that the caller can notice them.
    """
    x0_hat = x0_hat.float()
    x0_real = x0_real.float()
    x0_fake = x0_fake.float()
    scale = (x0_hat - x0_real).abs().flatten(1).mean(1).reshape(-1, *[1] * (x0_hat.ndim - 1))
    undefined = scale == 0
    # Multiplied by 0 rather than set to 0, so that NaN and infinity in a prediction remain.
    return (x0_fake - x0_real) / scale.masked_fill(undefined, 1.0) * (~undefined)


def dmd_loss(x0_hat: Tensor, direction: Tensor) -> Tensor:
    """A scalar whose gradient with respect to `x0_hat` is `direction / numel`."""
    target = (x0_hat.float() - direction).detach()
    return 0.5 * F.mse_loss(x0_hat.float(), target)


def snr_weighted_mse(x0: Tensor, target: Tensor, snr: Tensor, most: float) -> Tensor:
    """Squared error of clean predictions, each sample's times `min(SNR, most)` (min-SNR weighting, arXiv 2303.09556).

    A network that predicts the noise errs in x0 by `eps error / sqrt(SNR)`. Where the ratio is below `most`, this is
    the squared error of the noise.

    Args:
        x0, target: `[B, ...]`.
        snr: signal-to-noise ratios `[B]`.
        most: the largest weight; without a limit this is the squared error of the noise at every level.
    """
    errors = (x0.float() - target.float()).square().flatten(1).mean(1)
    return (snr.to(errors.device).clamp(max=most) * errors).mean()


def mmd_loss(
    real: Tensor,
    fake: Tensor,
    kernel: Kernel = "linear",
    distance: Distance = "pseudo_huber",
    c: float = 0.001,
    bandwidth: float = 100.0,
    reduce: Reduce = "image",
) -> Tensor:
    """Maximum mean discrepancy between the tokens of two feature maps (SwD paper, section 4.2, eq. 2).

    Args:
        real, fake: features `[B, L, D]`.
        kernel: "linear" compares token means, "rbf" all pairs of tokens (unbiased estimate).
        distance: for the linear kernel, per channel `sqrt(d^2 + c^2) - c` averaged, or the squared error summed over
            channels and images.
        c: pseudo-Huber constant, 0 or more.
        bandwidth: sigma of the rbf kernel.
        reduce: compare each image with its own counterpart, or the whole batch as one set of tokens.
    """
    real = real.float()
    fake = fake.float()
    if reduce == "batch":
        real = real.flatten(0, 1).unsqueeze(0)
        fake = fake.flatten(0, 1).unsqueeze(0)
    if kernel == "rbf":
        return _rbf_mmd(real, fake, bandwidth)
    difference = real.mean(1) - fake.mean(1)
    return difference.square().sum() if distance == "squared" else pseudo_huber(difference, c).mean()


def pseudo_huber(d: Tensor, c: float) -> Tensor:
    """`max(sqrt(d^2 + c^2), 1e-5) - c`, elementwise, with a finite gradient at 0 for c = 0 as well."""
    # The clamp sits under the root, so that c = 0 and d = 0 do not give 0 * inf.
    return (d.square() + c * c).clamp(min=1e-10).sqrt() - c


def _gaussian_complement(a: Tensor, b: Tensor, bandwidth: float) -> Tensor:
    """`1 - exp(-|a_i - b_j|^2 / (2 bandwidth^2))` `[B, L, M]` of tokens `[B, L, D]` and `[B, M, D]`."""
    squares = a.square().sum(-1).unsqueeze(2) + b.square().sum(-1).unsqueeze(1)
    squared = (squares - 2 * a @ b.transpose(1, 2)).clamp(min=0)
    return -torch.expm1(-squared / (2 * bandwidth**2))


def _rbf_mmd(real: Tensor, fake: Tensor, bandwidth: float) -> Tensor:
    """Unbiased squared MMD with a Gaussian kernel: per set `[B, L, D]`, then the mean over B."""
    n = real.shape[1]
    if n < 2:
        raise ValueError(f"the unbiased rbf kernel needs at least 2 tokens per set, got {n}")

    # Distances do not change under a shift, and centred features lose fewer digits to cancellation.
    centre = torch.cat([real, fake], 1).mean(1, keepdim=True).detach()
    real = real - centre
    fake = fake - centre

    # With 1 - k instead of k the ones cancel in xx + yy - 2 xy, and float32 keeps the small numbers that remain.
    def within(a: Tensor) -> Tensor:
        pairs = _gaussian_complement(a, a, bandwidth)
        return (pairs.sum((1, 2)) - pairs.diagonal(dim1=1, dim2=2).sum(1)) / (n * (n - 1))

    between = _gaussian_complement(real, fake, bandwidth).mean((1, 2))
    return (2 * between - within(real) - within(fake)).mean()


def discriminator_logits(head: nn.Module, *features: Sequence[Tensor]) -> Tensor:
    """Logits `[B]`: one shared head on each block's token mean (float32), averaged over blocks.

    Args:
        head: makes `[B, 1]` of token means `[B, D]`, each row by itself.
        features: of one batch, `[B, L, D]` by block; of several batches, whose logits then follow each other.
    """
    means = [torch.cat([block.float().mean(1) for block in batches]) for batches in zip(*features, strict=True)]
    return torch.stack([head(mean) for mean in means]).mean(0).squeeze(-1)


def gan_generator_loss(fake_logits: Tensor) -> Tensor:
    """Non-saturating generator loss `softplus(-D(fake))`."""
    return F.softplus(-fake_logits).mean()


def gan_discriminator_loss(fake_logits: Tensor, real_logits: Tensor) -> Tensor:
    """Discriminator loss `softplus(D(fake)) + softplus(-D(real))`."""
    return F.softplus(fake_logits).mean() + F.softplus(-real_logits).mean()
