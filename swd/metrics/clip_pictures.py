"""Picture features of CLIP (arXiv 2103.00020), of which CMMD is made (arXiv 2401.09603)."""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPVisionModelWithProjection

from swd.metrics.base import Extractor
from swd.metrics.preparation import CentreCrop, Squash, Transform, apply_transforms, names, normalise
from swd.metrics.weights import find_model, load_network, weights_hash
from swd.modules.model_folders import read_json

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and deviation that CLIP was trained with."""


class ClipPictureFeatures(Extractor):
    """CLIP's picture embedding, of length 1.

    The preparation is that of CMMD's code: the largest square in the middle, resized by Pillow's bicubic filter.

    Args:
        path: a folder, or a hub id; CMMD uses ViT-L/14 at 336 pixels.
        revision: of the hub's repository; None is the newest.
        side: pictures' side in pixels, the network's own; 336 is CMMD's.
    """

    def __init__(
        self, path: str = "openai/clip-vit-large-patch14-336", revision: str | None = None, side: int = 336
    ) -> None:
        super().__init__()
        self.path = path
        self.revision = revision
        self.steps: tuple[Transform, ...] = (CentreCrop(), Squash(side, "bicubic"))
        self.name = f"{Path(path).name}-{names(self.steps)}"

    @property
    def width(self) -> int:
        return int(read_json(self.folder() / "config.json")["projection_dim"])

    def folder(self) -> Path:
        """The network's folder; from the hub it is downloaded once."""
        return find_model(self.path, "extractor.path", "clip", self.revision)

    def check(self) -> None:
        self.folder()

    def weights_id(self) -> str:
        return weights_hash(self.folder())

    def prepare(self, picture: Tensor) -> Tensor:
        return normalise(apply_transforms(picture, self.steps), MEAN, STD)

    def build(self) -> nn.Module:
        folder = self.folder()
        whole = CLIPConfig.from_pretrained(folder, local_files_only=True)
        config = whole.vision_config
        config.projection_dim = whole.projection_dim  # that of the picture half may be left at its default
        return load_network(CLIPVisionModelWithProjection, folder, config)

    def embed(self, network: nn.Module, prepared: Tensor) -> Tensor:
        return F.normalize(network(pixel_values=prepared).image_embeds)
