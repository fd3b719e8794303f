"""Features of DINOv2 (arXiv 2304.07193), of which FD-DINOv2 is made (arXiv 2306.04675)."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from transformers import Dinov2Model

from swd.metrics.base import Extractor
from swd.metrics.preparation import Squash, Transform, apply_transforms, names, normalise
from swd.metrics.weights import find_model, load_network, weights_hash
from swd.modules.model_folders import read_json

STEPS: tuple[Transform, ...] = (Squash(224, "bicubic"),)
"""The source's preparation: Pillow's bicubic resize to 224 x 224, whatever the aspect ratio."""
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""Mean and deviation of ImageNet's pictures, which the network was trained with."""


class Dinov2Features(Extractor):
    """The normalised class token of DINOv2.

    Args:
        path: a folder, or a hub id; the source uses the large network.
        revision: of the hub's repository; None is the newest.
    """

    def __init__(self, path: str = "facebook/dinov2-large", revision: str | None = None) -> None:
        super().__init__()
        self.path = path
        self.revision = revision
        self.name = f"{Path(path).name}-{names(STEPS)}"

    @property
    def width(self) -> int:
        return int(read_json(self.folder() / "config.json")["hidden_size"])

    def folder(self) -> Path:
        """The network's folder; from the hub it is downloaded once."""
        return find_model(self.path, "extractor.path", "dinov2", self.revision)

    def check(self) -> None:
        self.folder()

    def weights_id(self) -> str:
        return weights_hash(self.folder())

    def prepare(self, picture: Tensor) -> Tensor:
        return normalise(apply_transforms(picture, STEPS), MEAN, STD)

    def build(self) -> nn.Module:
        return load_network(Dinov2Model, self.folder())

    def embed(self, network: nn.Module, prepared: Tensor) -> Tensor:
        features: Tensor = network(pixel_values=prepared).pooler_output
        return features
