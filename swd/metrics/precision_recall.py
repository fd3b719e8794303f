"""Improved precision and recall (arXiv 1904.06991)."""

from __future__ import annotations

from collections.abc import Sequence

from swd.metrics.base import Drawn, Extractor, PictureMetric, Reference, Score, features_of, real_features
from swd.metrics.functional import within_neighbourhoods
from swd.types import UserError


class Precision(PictureMetric):
    """Share of drawn pictures that lie in the manifold of real ones: how good pictures are.

    Both depend on the number of pictures, so compare only values of equally many, drawn and real.

    Args:
        extractor: whose features are compared. The source's network is VGG-16; Inception and DINOv2 are common.
        neighbours: the source's k, 3.
    """

    name = "precision"
    needs_reference = True
    higher_is_better = True

    def __init__(self, extractor: Extractor, neighbours: int = 3) -> None:
        self.extractors = (extractor,)
        self.neighbours = neighbours
        self.fewest_real = neighbours + 1  # of which each has so many others

    def score(self, drawn: Drawn, reference: Reference | None = None) -> Score:
        x = features_of(drawn.features, self.extractors[0], "drawn pictures")
        inside = within_neighbourhoods(x, real_features(reference, self.extractors[0]), self.neighbours).double()
        return Score({"precision": float(inside.mean())}, inside)


class Recall(Precision):
    """Share of real pictures that lie in the manifold of drawn ones: how much of the variety is drawn.

    It has no values per drawn picture, because it is a mean over the real ones.
    """

    name = "recall"

    def check_prompts(self, prompts: Sequence[str]) -> None:
        if len(prompts) <= self.neighbours:
            raise UserError(f"{self.name} needs {self.neighbours + 1} drawn pictures, got {len(prompts)}; draw more")

    def score(self, drawn: Drawn, reference: Reference | None = None) -> Score:
        x = features_of(drawn.features, self.extractors[0], "drawn pictures")
        inside = within_neighbourhoods(real_features(reference, self.extractors[0]), x, self.neighbours).double()
        return Score({"recall": float(inside.mean())})
