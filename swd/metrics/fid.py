"""Fréchet distance between two sets of features, by torchmetrics."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from swd.types import UserError, check_shape


class _Given(nn.Module):
    """Takes the place of torchmetrics' feature extractor and returns its input, which already holds features.

    Args:
        width: feature width D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(real: Tensor, drawn: Tensor) -> float:
    """`|mu_r - mu_d|^2 + tr(S_r + S_d - 2 (S_r S_d)^1/2)` of Gaussians fitted to two sets of features, in float64.

    It falls with the number of samples even for two draws of one distribution, so compare only values that come from
    the same number of samples.

    Args:
        real: features `[N, D]` of the reference.
        drawn: features `[M, D]` of the pictures that are judged.

    Raises:
        UserError: with fewer than two samples on a side, which have no covariance.
    """
    if len(real) < 2 or len(drawn) < 2:
        raise UserError(f"a Fréchet distance needs at least 2 pictures a side, got {len(real)} and {len(drawn)}")
    check_shape("drawn", drawn, (None, real.shape[1]))
    metric = FrechetInceptionDistance(feature=_Given(real.shape[1]))
    metric.update(real.to(torch.float64), real=True)
    metric.update(drawn.to(torch.float64), real=False)
    return float(metric.compute())
