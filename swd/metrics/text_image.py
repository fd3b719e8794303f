"""How well pictures fit their prompts: CLIP score (arXiv 2104.08718) and PickScore (arXiv 2305.01569)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer

from swd.metrics.base import Drawn, PictureMetric, Reference, Score, TextExtractor, features_of
from swd.metrics.clip_pictures import MEAN, STD
from swd.metrics.preparation import CentreCrop, ShortSide, Transform, apply_transforms, names, normalise
from swd.metrics.weights import find_model, load_network, weights_hash
from swd.modules import hub
from swd.modules.model_folders import read_json
from swd.types import UserError

TOKENS = 77
"""Of a prompt, begin and end included: CLIP's length, and PickScore's."""
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
"""A folder with one of them has a tokenizer."""


class ClipFeatures(TextExtractor):
    """CLIP's embeddings of pictures and prompts, of length 1.

    The preparation is that of CLIP's own processor: the shorter side to `side` pixels by Pillow's bicubic filter, then
    a crop around the middle. Of a prompt it sees 77 tokens; the rest is cut off.

    Args:
        path: a folder, or a hub id.
        tokenizer: a folder or hub id with the tokenizer's files; None: that of `path`.
        revision: of the hub's repository of the weights; None is the newest.
        side: pictures' side in pixels, the network's own; 224 for ViT-L/14 and ViT-H/14.
    """

    def __init__(self, path: str, tokenizer: str | None = None, revision: str | None = None, side: int = 224) -> None:
        super().__init__()
        self.path = path
        self.tokenizer = tokenizer
        self.revision = revision
        self.steps: tuple[Transform, ...] = (ShortSide(side, "bicubic"), CentreCrop(side))
        self.name = f"{Path(path).name}-{names(self.steps)}-{TOKENS}tokens"
        self._tokenizer: Any = None

    @property
    def width(self) -> int:
        return int(read_json(self.folder() / "config.json")["projection_dim"])

    def folder(self) -> Path:
        """The network's folder; from the hub it is downloaded once."""
        return find_model(self.path, "extractor.path", "clip", self.revision)

    def tokenizer_folder(self) -> Path:
        """The folder with the tokenizer's files; from the hub it is downloaded once.

        Raises:
            UserError: if it has none of them.
        """
        path, key = self.tokenizer or self.path, "extractor.tokenizer"
        folder = hub.configuration(path, key=key) if hub.is_hub_id(path) else Path(path)
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
            raise UserError(f"{key}={path} has no {' or '.join(TOKENIZER_FILES)}; give a folder or hub id that has one")
        return folder

    def check(self) -> None:
        self.folder()
        self.tokenizer_folder()

    def weights_id(self) -> str:
        return weights_hash(self.folder())

    def prepare(self, picture: Tensor) -> Tensor:
        return normalise(apply_transforms(picture, self.steps), MEAN, STD)

    def build(self) -> nn.Module:
        self._tokenizer = CLIPTokenizer.from_pretrained(self.tokenizer_folder(), local_files_only=True)
        return load_network(CLIPModel, self.folder())

    def embed(self, network: nn.Module, prepared: Tensor) -> Tensor:
        assert isinstance(network, CLIPModel)
        return F.normalize(network.get_image_features(pixel_values=prepared).pooler_output)

    def embed_prompts(self, network: nn.Module, prompts: Sequence[str]) -> Tensor:
        assert isinstance(network, CLIPModel)
        tokens = self._tokenizer(
            list(prompts), padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
        )
        return F.normalize(network.get_text_features(**tokens.to(network.device)).pooler_output)


class ClipScore(PictureMetric):
    """100 times the cosine of a picture's and its prompt's embedding, at least 0: the mean over pictures, in [0, 100].

    The source's factor is 2.5; 100 is that of torchmetrics and of published tables.

    Args:
        extractor: the embeddings.
        name: key in configurations and tables.
    """

    needs_prompts = True
    higher_is_better = True
    least = 0.0

    def __init__(self, extractor: TextExtractor, name: str = "clip") -> None:
        self.extractors = (extractor,)
        self.name = name

    def score(self, drawn: Drawn, reference: Reference | None = None) -> Score:
        parts = (100 * self.cosines(drawn)).clamp_min(self.least)
        return Score({self.name: float(parts.mean())}, parts)

    def cosines(self, drawn: Drawn) -> Tensor:
        """Cosines `[N]` of each picture's and its prompt's embedding, in float64."""
        pictures = features_of(drawn.features, self.extractors[0], "drawn pictures")
        prompts = features_of(drawn.prompt_features, self.extractors[0], "drawn pictures' prompts")
        if len(pictures) != len(prompts):
            raise UserError(f"{self.name}: {len(pictures)} pictures but {len(prompts)} prompts; extract them again")
        return F.cosine_similarity(pictures, prompts)


class PickScore(ClipScore):
    """100 times the cosine in the embedding that was trained on people's choices, as the paper's tables show it.

    Args:
        extractor: the embeddings; the source reads prompts and pictures as CLIP-H does.
        name: key in configurations and tables.
    """

    least = -100.0

    def __init__(self, extractor: TextExtractor, name: str = "pickscore") -> None:
        super().__init__(extractor, name)
