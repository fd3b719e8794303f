"""Diversity: how alike the pictures of one prompt are that other seeds give. Distilled models lose it first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from swd.metrics.base import Drawn, Extractor, PictureMetric, Reference, Score, features_of
from swd.types import UserError


class Diversity(PictureMetric):
    """Mean cosine of the features of two pictures of one prompt, in [-1, 1]; the lower, the more diverse.

    The mean over a prompt's pairs, then over prompts. Values depend on the network, so compare only those of one.

    Args:
        extractor: whose features are compared; DINOv2 sees objects and layout, CLIP subjects and style.
        name: key in configurations and tables.
    """

    needs_prompts = True

    def __init__(self, extractor: Extractor, name: str = "diversity") -> None:
        self.extractors = (extractor,)
        self.name = name

    def check_prompts(self, prompts: Sequence[str]) -> None:
        counts = Counter(prompts)
        alone = next((prompt for prompt in prompts if counts[prompt] < 2), None)
        if alone is not None or not counts:
            fault = "no prompts are known" if alone is None else f"{alone!r} has one"
            raise UserError(
                f"{self.name} compares pictures of one prompt, and {fault}; draw images_per_prompt=2 or more"
            )

    def score(self, drawn: Drawn, reference: Reference | None = None) -> Score:
        self.check_prompts(drawn.prompts)
        features = F.normalize(features_of(drawn.features, self.extractors[0], "drawn pictures"))
        parts = torch.stack([pairwise_cosine(features[group]) for group in drawn.groups()])
        return Score({self.name: float(parts.mean())}, parts, per="prompt")


def pairwise_cosine(rows: Tensor) -> Tensor:
    """Mean over pairs `i != j` of `x_i . x_j` of rows `[n, D]` of length 1: `(|sum x|^2 - n) / (n (n - 1))`."""
    n = len(rows)
    return (rows.sum(0).square().sum() - n) / (n * (n - 1))
