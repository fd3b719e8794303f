"""CMMD: the squared maximum mean discrepancy of CLIP features with a Gaussian kernel (arXiv 2401.09603)."""

from __future__ import annotations

import math

from swd.metrics.base import Drawn, Extractor, PictureMetric, Reference, Score, features_of, real_features
from swd.metrics.functional import gaussian_kernel, mmd_parts

SIGMA = 10.0
"""Width of the kernel, the source's."""
SCALE = 1000
"""Factor by which the source multiplies the distance, so that it is easy to read."""


class Cmmd(PictureMetric):
    """1,000 times the discrepancy with kernel width 10, pairs of a picture with itself included, as in the source.

    Args:
        extractor: whose features are compared; the source's are CLIP's, of length 1.
    """

    name = "cmmd"
    needs_reference = True
    fewest_real = 2  # a pair

    def __init__(self, extractor: Extractor) -> None:
        self.extractors = (extractor,)

    def score(self, drawn: Drawn, reference: Reference | None = None) -> Score:
        x = features_of(drawn.features, self.extractors[0], "drawn pictures")
        y = real_features(reference, self.extractors[0])
        parts = SCALE * mmd_parts(x, y, gaussian_kernel(SIGMA), unbiased=False)
        return Score({"cmmd": float(parts.mean())}, parts, bounds=(0, math.inf))
