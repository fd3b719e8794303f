"""Small extractors and metrics for tests of evaluations: no weights, no files."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from swd.metrics.base import Drawn, Extractor, PictureMetric, Reference, Score, TextExtractor, features_of


class Colours(Extractor):
    """Means of the channels in each quarter of the picture, times `scale`.

    Args:
        scale: stands for the weights.
    """

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.name = "colours-plain"

    @property
    def width(self) -> int:
        return 12

    def check(self) -> None:
        pass

    def weights_id(self) -> str:
        return str(self.scale)

    def prepare(self, picture: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(picture.float() / 255, 2)

    def build(self) -> nn.Module:
        return nn.Identity()

    def embed(self, network: nn.Module, prepared: Tensor) -> Tensor:
        return self.scale * prepared.flatten(1)


class Words(TextExtractor, Colours):
    """Colours of pictures, and of prompts the lengths of their words."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "words-plain"

    def embed_prompts(self, network: nn.Module, prompts: Sequence[str]) -> Tensor:
        rows = [[len(word) for word in prompt.split()][:12] for prompt in prompts]
        return torch.tensor([row + [0] * (12 - len(row)) for row in rows]).float()


class Brightness(PictureMetric):
    """The mean of all features."""

    higher_is_better = True

    def __init__(self, extractor: Extractor, name: str = "brightness") -> None:
        self.extractors = (extractor,)
        self.name = name

    def score(self, drawn: Drawn, reference: Reference | None = None) -> Score:
        parts = features_of(drawn.features, self.extractors[0], "drawn pictures").mean(1)
        return Score({self.name: float(parts.mean()), f"{self.name}_floor": 0.25}, parts)


class Agreement(PictureMetric):
    """Features of pictures times those of their prompts."""

    name = "agreement"
    needs_prompts = True
    higher_is_better = True

    def __init__(self, extractor: Extractor) -> None:
        self.extractors = (extractor,)

    def score(self, drawn: Drawn, reference: Reference | None = None) -> Score:
        extractor = self.extractors[0]
        texts = features_of(drawn.prompt_features, extractor, "prompts")
        parts = (features_of(drawn.features, extractor, "drawn pictures") * texts).sum(1)
        return Score({self.name: float(parts.mean())}, parts)
