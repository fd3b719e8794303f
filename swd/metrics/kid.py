"""KID: the squared maximum mean discrepancy of Inception features with a polynomial kernel (arXiv 1801.01401)."""

from __future__ import annotations

from swd.metrics.base import Drawn, Extractor, PictureMetric, Reference, Score, features_of, real_features
from swd.metrics.functional import kernel_distances, mmd_parts, polynomial_kernel


class Kid(PictureMetric):
    """The unbiased estimate, whose expectation does not depend on the number of pictures; it may be slightly negative.

    Args:
        extractor: whose features are compared.
        subsets: None: one estimate of all pictures, with values per picture for intervals. Published numbers are the
            mean over 100 random subsets of 1,000; it estimates the same quantity with more noise, and `NAME_std` is the
            deviation between subsets.
        size: pictures a side in each subset; the common 1,000.
        seed: of the subsets.
        name: key in configurations and tables; KID is the distance of Inception's features.
    """

    needs_reference = True
    fewest_real = 2  # a pair

    def __init__(
        self, extractor: Extractor, subsets: int | None = None, size: int = 1000, seed: int = 0, name: str = "kid"
    ) -> None:
        self.extractors = (extractor,)
        self.name = name
        self.subsets = subsets
        self.size = size
        self.seed = seed

    def score(self, drawn: Drawn, reference: Reference | None = None) -> Score:
        x = features_of(drawn.features, self.extractors[0], "drawn pictures")
        y = real_features(reference, self.extractors[0])
        if self.subsets is None:
            parts = mmd_parts(x, y, polynomial_kernel, unbiased=True)
            return Score({self.name: float(parts.mean())}, parts)
        values = kernel_distances(x, y, self.subsets, self.size, self.seed)
        return Score({self.name: float(values.mean()), f"{self.name}_std": float(values.std(correction=0))})
