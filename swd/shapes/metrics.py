"""Metrics of pictures of shapes, which the judge reads: how well they follow their prompts, and its features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from swd.metrics.base import Drawn, Extractor, PictureMetric, Reference, Score, features_of, real_features
from swd.metrics.bootstrap import ratio_parts
from swd.metrics.preparation import CentreCrop, ShortSide, Transform, apply_transforms, names
from swd.metrics.weights import weights_hash
from swd.modules.family_folder import resolve_asset
from swd.shapes.dataset import PLACES, RESOLUTION, parse_caption
from swd.shapes.distances import mmd_to_rendered
from swd.shapes.judge import ATTRIBUTES, Judge, pack_score, reading_of, score_reading
from swd.types import UserError

JUDGE = "swd://assets/shapes-judge"
STEPS: tuple[Transform, ...] = (ShortSide(RESOLUTION, "bicubic"), CentreCrop(RESOLUTION))
"""Pictures of the judge's own size stay as they are."""
EXACT = "exact_match"


class _JudgeExtractor(Extractor):
    """Common part of both extractors: the judge, its folder and its preparation.

    Args:
        path: folder of the judge; the default ships with the package.
    """

    kind: str

    def __init__(self, path: str = JUDGE) -> None:
        super().__init__()
        self.path = path
        self.name = f"{self.kind}-{names(STEPS)}"

    def folder(self) -> Path:
        """The judge's folder."""
        return resolve_asset(self.path)

    def check(self) -> None:
        try:
            Judge.check_folder(self.folder())
        except ValueError as error:
            raise UserError(str(error)) from None

    def weights_id(self) -> str:
        return weights_hash(self.folder())

    def prepare(self, picture: Tensor) -> Tensor:
        return apply_transforms(picture, STEPS).float() / 127.5 - 1

    def build(self) -> nn.Module:
        return Judge.from_pretrained(self.folder())


class JudgeFeatures(_JudgeExtractor):
    """Means of the judge's last layer over the picture, of which its Fréchet and kernel distances are made."""

    kind = "judge"

    @property
    def width(self) -> int:
        return Judge.width_of(self.folder())

    def embed(self, network: nn.Module, prepared: Tensor) -> Tensor:
        assert isinstance(network, Judge)
        return network.features(prepared)


class JudgeReadings(_JudgeExtractor):
    """The judge's choices for each place and the background, as `Judge.choices` gives them."""

    kind = "judge.choices"

    @property
    def width(self) -> int:
        return 3 * PLACES**2 + 1

    def embed(self, network: nn.Module, prepared: Tensor) -> Tensor:
        assert isinstance(network, Judge)
        return network.choices(prepared).float()


class JudgeMmd(PictureMetric):
    """The distance that tells models of shapes apart: `mmd_to_rendered`. The reference are rendered pictures.

    Args:
        path: folder of the judge; the default ships with the package.
        name: key in configurations and tables.
    """

    needs_reference = True

    def __init__(self, path: str = JUDGE, name: str = "judge_mmd") -> None:
        self.extractors = (JudgeFeatures(path),)
        self.name = name

    def check(self, reference: Reference | None = None) -> None:
        super().check(reference)
        count, width = real_features(reference, self.extractors[0]).shape
        if count < 2 * width:  # as whitening wants
            raise UserError(f"{self.name} needs {2 * width} real pictures, got {count}; give more")

    def score(self, drawn: Drawn, reference: Reference | None = None) -> Score:
        features = features_of(drawn.features, self.extractors[0], "drawn pictures")
        parts = mmd_to_rendered(features, real_features(reference, self.extractors[0]))
        return Score({self.name: float(parts.mean())}, parts)


class ShapesAccuracy(PictureMetric):
    """How well pictures of shapes follow their prompts, as the judge reads them.

    The first value is the mean over attributes (shape, colour, size, relation, background, count) of the share of the
    prompts' statements that hold, each in [0, 1]; beside it the share of each attribute, and `exact_match`, the share
    of pictures for which every statement holds. With `exact`, `exact_match` comes first and has the values per picture.

    Args:
        path: folder of the judge; the default ships with the package.
        exact: whether `exact_match` is the metric's value.
        name: key in configurations and tables.
    """

    needs_prompts = True
    higher_is_better = True

    def __init__(self, path: str = JUDGE, exact: bool = False, name: str = "shapes_accuracy") -> None:
        self.extractors = (JudgeReadings(path),)
        self.exact = exact
        self.name = name

    def check_prompts(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            try:
                parse_caption(prompt)
            except ValueError as error:
                raise UserError(f"{self.name}: {error}") from None

    def score(self, drawn: Drawn, reference: Reference | None = None) -> Score:
        choices = features_of(drawn.features, self.extractors[0], "drawn pictures").long().tolist()
        if not choices or len(choices) != len(drawn.prompts):
            raise UserError(f"{self.name}: {len(choices)} pictures but {len(drawn.prompts)} prompts; give one each")
        self.check_prompts(drawn.prompts)
        return accuracy_of(statements_of(choices, drawn.prompts), self.name, self.exact)


def statements_of(choices: Sequence[Sequence[int]], prompts: Sequence[str]) -> Tensor:
    """For each picture and attribute, how many of its prompt's statements hold and how many it makes, `[N, A, 2]`.

    Args:
        choices: of the judge, as `JudgeReadings` gives them, a row a picture.
        prompts: captions, one a picture.
    """
    pairs = [
        score_reading(parse_caption(prompt), reading_of(row)) for prompt, row in zip(prompts, choices, strict=True)
    ]
    return torch.stack([pack_score(each) for each in pairs])


def accuracy_of(statements: Tensor, name: str = "shapes_accuracy", exact: bool = False) -> Score:
    """Shares of statements that hold.

    Args:
        statements: `[N, A, 2]` int64: for each attribute, how many of the caption's statements hold, and how many it
            makes.
        name: of the first value.
        exact: whether the share of pictures for which all hold is the first value.
    """
    hits, made = statements.double().unbind(2)
    said = made.sum(0) > 0
    shares = hits.sum(0)[said] / made.sum(0)[said]
    right = (hits == made).all(1).double()
    parts = right if exact else ratio_parts(hits[:, said], made[:, said]).mean(1)
    labels = [attribute for attribute, is_said in zip(ATTRIBUTES, said.tolist(), strict=True) if is_said]
    others = {"mean": float(shares.mean())} if exact else {EXACT: float(right.mean())}
    return Score({name: float(parts.mean())} | others | dict(zip(labels, shares.tolist(), strict=True)), parts)
