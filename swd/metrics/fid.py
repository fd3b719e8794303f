"""Fréchet distances between features of drawn and of real pictures, FID among them."""

from __future__ import annotations

import math

from swd.metrics.base import Drawn, Extractor, Gaussian, PictureMetric, Reference, Score, features_of, real_features
from swd.metrics.functional import (
    frechet_distance,
    frechet_floor,
    frechet_infinity,
    frechet_of_gaussians,
    frechet_parts,
    gaussian,
)
from swd.types import UserError

__all__ = ["Frechet", "frechet_distance"]


class Frechet(PictureMetric):
    """Fréchet distance, with what it takes to read it.

    A distance of few pictures is too large, by an amount that falls as 1 / N, so distances of different N must not be
    compared. Beside it stand `NAME_inf`, extrapolated to infinitely many pictures, and `NAME_floor`, the distance
    between two sets of real pictures as large as the drawn set (or halves of the reference where it is smaller):
    differences below it mean nothing.

    With 2 D pictures or more, D the width of the features, there are also values per picture for intervals; with fewer,
    neither these nor `NAME_inf` exist, and a kernel distance is the better choice. The floor needs the features of real
    pictures and is left out where only their mean and covariance are known.

    Args:
        extractor: whose features are compared.
        name: key in configurations and tables; FID is the distance of Inception's features.
        seed: of the subsets for `NAME_inf` and `NAME_floor`.
    """

    needs_reference = True
    takes_statistics = True
    fewest_real = 4  # two for each half of the floor

    def __init__(self, extractor: Extractor, name: str = "fid", seed: int = 0) -> None:
        self.extractors = (extractor,)
        self.name = name
        self.seed = seed

    def score(self, drawn: Drawn, reference: Reference | None = None) -> Score:
        extractor = self.extractors[0]
        features = features_of(drawn.features, extractor, "drawn pictures")
        real = reference_gaussian(reference, extractor)
        values = {self.name: frechet_of_gaussians(real, gaussian(features))}
        infinity = frechet_infinity(real, features, seed=self.seed)
        if infinity is not None:
            values[f"{self.name}_inf"] = infinity
        if reference is not None and extractor.name in reference.features:
            floor = frechet_floor(real_features(reference, extractor), len(features), self.seed)
            values[f"{self.name}_floor"] = floor
        parts = None if infinity is None else frechet_parts(real, features)
        return Score(values, parts, bounds=(0, math.inf))


def reference_gaussian(reference: Reference | None, extractor: Extractor) -> Gaussian:
    """Mean and covariance of the real pictures' features, from the features or as published.

    Raises:
        UserError: if there are neither, or they are of another width.
    """
    if reference is not None and extractor.name in reference.features:
        return gaussian(real_features(reference, extractor))
    if reference is None or extractor.name not in reference.gaussians:
        raise UserError(f"the reference has neither features nor statistics of {extractor.name}; extract them first")
    known = reference.gaussians[extractor.name]
    if known.sigma.shape != (extractor.width, extractor.width):
        raise UserError(
            f"statistics of {extractor.name} are {extractor.width} wide, those of the reference {len(known.mu)}; give "
            "statistics of this network"
        )
    return known
