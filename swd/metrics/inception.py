"""The Inception network of FID, with the parameter names of the common file `pt_inception-2015-12-05-6726825d.pth`.

That network is Inception v3 (arXiv 1512.00567) as TensorFlow's release of 2015-12-05 computed it: average pools leave
the padding out of their mean, and the pool of the last block is a maximum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from swd.io.files import file_hash, write_aside
from swd.metrics.base import Extractor
from swd.metrics.preparation import CentreCrop, ShortSide, Transform, apply_transforms, names
from swd.metrics.weights import cached_file_hash
from swd.modules.model_folders import is_whole_file
from swd.types import UserError

WIDTH = 2048
SIDE = 299
"""Side of the network's input, in pixels."""
KNOWN = "6726825d"
"""How the SHA-256 of the common file begins; it is also in the file's name."""
DROPPED = ("fc.", "AuxLogits.")
"""Beginnings of the names of weights that no feature depends on: both classifiers."""
PAPER: tuple[Transform, ...] = (ShortSide(512, "bicubic"), ShortSide(256, "lanczos"), CentreCrop(256))
"""Preparation of the released code: Pillow's resize to 512, then Lanczos to 256 and a crop around the middle. That code
squashes to 512 x 512, which is the same for square pictures; the others keep their aspect ratio here."""


@dataclass(frozen=True)
class Layer:
    """A convolution of a block: its name, number of outputs, and kernel (height, width).

    With stride 1 it keeps the size; with stride 2 it has no padding.
    """

    name: str
    width: int
    kernel: tuple[int, int]
    stride: int = 1


Branch = Sequence[Layer | tuple[Layer, ...] | str]
"""Operations one after another: a convolution; several on one input, whose outputs are concatenated; or a pool."""


def average_pool(x: Tensor) -> Tensor:
    """Means over 3 x 3 pixels, of those that exist."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


POOLS = {
    "average": average_pool,
    "max": lambda x: F.max_pool2d(x, 3, stride=1, padding=1),
    "halve": lambda x: F.max_pool2d(x, 3, stride=2),
}


class Conv(nn.Module):
    """Convolution without bias, batch norm (eps 1e-3), ReLU."""

    def __init__(
        self, width_in: int, width: int, kernel: tuple[int, int], stride: int = 1, padding: tuple[int, int] = (0, 0)
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Block(nn.Module):
    """Branches side by side on one input; their outputs are concatenated in order."""

    def __init__(self, width_in: int, branches: Sequence[Branch]) -> None:
        super().__init__()
        self.branches = branches
        self.width = 0
        for branch in branches:
            width = width_in
            for item in branch:
                if not isinstance(item, str):
                    layers = item if isinstance(item, tuple) else (item,)
                    for layer in layers:
                        self.add_module(layer.name, _conv(width, layer))
                    width = sum(layer.width for layer in layers)
            self.width += width

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._walk(branch, x) for branch in self.branches], dim=1)

    def _walk(self, branch: Branch, x: Tensor) -> Tensor:
        for item in branch:
            if isinstance(item, str):
                x = POOLS[item](x)
            elif isinstance(item, tuple):
                x = torch.cat([self.get_submodule(layer.name)(x) for layer in item], dim=1)
            else:
                x = self.get_submodule(item.name)(x)
        return x


def _conv(width_in: int, layer: Layer) -> Conv:
    height, width = layer.kernel
    padding = (height // 2, width // 2) if layer.stride == 1 else (0, 0)
    return Conv(width_in, layer.width, layer.kernel, layer.stride, padding)


def _chain(name: str, *steps: tuple[int, int, int], stride: int = 1) -> list[Layer]:
    """Layers `name_1`, `name_2`, ... of (width, kernel height, kernel width); `stride` is the last one's."""
    return [
        Layer(f"{name}_{i}", width, (height, wide), stride if i == len(steps) else 1)
        for i, (width, height, wide) in enumerate(steps, 1)
    ]


def _pooled(pool: str, width: int) -> Branch:
    return [pool, Layer("branch_pool", width, (1, 1))]


def block_a(width_in: int, pooled: int) -> Block:
    """At 35 x 35: 1 x 1, 5 x 5, twice 3 x 3, and a pool."""
    return Block(
        width_in,
        [
            [Layer("branch1x1", 64, (1, 1))],
            _chain("branch5x5", (48, 1, 1), (64, 5, 5)),
            _chain("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3)),
            _pooled("average", pooled),
        ],
    )


def block_b(width_in: int) -> Block:
    """From 35 x 35 to 17 x 17."""
    return Block(
        width_in,
        [
            [Layer("branch3x3", 384, (3, 3), stride=2)],
            _chain("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3), stride=2),
            ["halve"],
        ],
    )


def block_c(width_in: int, inner: int) -> Block:
    """At 17 x 17: 1 x 1, 7 x 7 in two parts, the same twice, and a pool."""
    return Block(
        width_in,
        [
            [Layer("branch1x1", 192, (1, 1))],
            _chain("branch7x7", (inner, 1, 1), (inner, 1, 7), (192, 7, 1)),
            _chain("branch7x7dbl", (inner, 1, 1), (inner, 7, 1), (inner, 1, 7), (inner, 7, 1), (192, 1, 7)),
            _pooled("average", 192),
        ],
    )


def block_d(width_in: int) -> Block:
    """From 17 x 17 to 8 x 8."""
    return Block(
        width_in,
        [
            _chain("branch3x3", (192, 1, 1), (320, 3, 3), stride=2),
            _chain("branch7x7x3", (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3), stride=2),
            ["halve"],
        ],
    )


def block_e(width_in: int, pool: str) -> Block:
    """At 8 x 8: branches that end in a 1 x 3 beside a 3 x 1."""

    def ends(name: str) -> tuple[Layer, Layer]:
        return Layer(f"{name}a", 384, (1, 3)), Layer(f"{name}b", 384, (3, 1))

    return Block(
        width_in,
        [
            [Layer("branch1x1", 320, (1, 1))],
            [Layer("branch3x3_1", 384, (1, 1)), ends("branch3x3_2")],
            [*_chain("branch3x3dbl", (448, 1, 1), (384, 3, 3)), ends("branch3x3dbl_3")],
            _pooled(pool, 192),
        ],
    )


class Inception(nn.Module):
    """Pictures `[B, 3, 299, 299]` in [-1, 1] to the 2048 features before the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, (3, 3), stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, (3, 3))
        self.Conv2d_2b_3x3 = Conv(32, 64, (3, 3), padding=(1, 1))
        self.Conv2d_3b_1x1 = Conv(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = Conv(80, 192, (3, 3))
        self.Mixed_5b = block_a(192, pooled=32)
        self.Mixed_5c = block_a(256, pooled=64)
        self.Mixed_5d = block_a(288, pooled=64)
        self.Mixed_6a = block_b(288)
        self.Mixed_6b = block_c(768, inner=128)
        self.Mixed_6c = block_c(768, inner=160)
        self.Mixed_6d = block_c(768, inner=160)
        self.Mixed_6e = block_c(768, inner=192)
        self.Mixed_7a = block_d(768)
        self.Mixed_7b = block_e(1280, "average")
        self.Mixed_7c = block_e(2048, "max")

    def forward(self, x: Tensor) -> Tensor:
        for name, layer in self.named_children():
            x = layer(x)
            if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                x = POOLS["halve"](x)
        return x.mean((2, 3))


class InceptionFeatures(Extractor):
    """The 2048 features of FID and KID.

    Args:
        path: a `.safetensors` file, as `convert` writes it.
        steps: preparation before the network's own resize to 299 x 299 (bilinear, not widened where it shrinks, as in
            the common implementation); the default is the released code's.
    """

    def __init__(self, path: str | None, steps: Sequence[Transform] = PAPER) -> None:
        super().__init__()
        self.path = path
        self.steps = tuple(steps)
        self.name = f"inception-{names(steps)}"

    @property
    def width(self) -> int:
        return WIDTH

    def check(self) -> None:
        file = self._file()
        if file.suffix != ".safetensors":
            raise UserError(
                f"{file} is not a .safetensors file; convert it once: "
                f'from swd.metrics.inception import convert; convert("{file}", "inception.safetensors")'
            )
        if not file.is_file():
            raise UserError(
                f"there is no Inception network at {file}; download pt_inception-2015-12-05-6726825d.pth from "
                "github.com/mseitzer/pytorch-fid/releases/tag/fid_weights and convert it (docs/metrics.md)"
            )
        if not is_whole_file(file):
            raise UserError(f"{file} is damaged; convert it again (docs/metrics.md)")

    def _file(self) -> Path:
        if self.path is None:
            raise UserError(
                f"{self.name} needs the Inception network of FID and has no path; convert "
                "pt_inception-2015-12-05-6726825d.pth (docs/metrics.md) and give it as extractor.path of the metric"
            )
        return Path(self.path)

    def weights_id(self) -> str:
        return cached_file_hash(self._file())

    def prepare(self, picture: Tensor) -> Tensor:
        pixels = apply_transforms(picture, self.steps).float() / 255
        return F.interpolate(pixels[None], (SIDE, SIDE), mode="bilinear", align_corners=False)[0]

    def build(self) -> nn.Module:
        network = Inception()
        load_weights(network, load_file(self._file()), str(self.path))
        return network

    def embed(self, network: nn.Module, prepared: Tensor) -> Tensor:
        features: Tensor = network(2 * prepared - 1)
        return features


def load_weights(network: Inception, weights: dict[str, Tensor], where: str) -> None:
    """Load weights by name; those of the classifiers are left out, and every other one must fit.

    Raises:
        UserError: for a weight that is missing, unknown or of another shape; `where` is what the user calls the file.
    """
    kept = {
        name: value
        for name, value in weights.items()
        if not name.startswith(DROPPED) and not name.endswith("num_batches_tracked")
    }
    own = {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    for name in sorted(own.keys() | kept.keys()):
        if name not in kept or name not in own or kept[name].shape != own[name].shape:
            fault = "lacks" if name not in kept else "has an unknown" if name not in own else "has another shape of"
            raise UserError(f"{where} is not the Inception network of FID: it {fault} {name}; see docs/metrics.md")
    network.load_state_dict(kept, strict=False)


def convert(source: str | Path, target: str | Path, sha256: str = KNOWN) -> Path:
    """Write the network's weights from a `.pth` file to a `.safetensors` file, which can run no code when read.

    The SHA-256 of the source is recorded in the target's metadata as `source_sha256`.

    Args:
        source: `pt_inception-2015-12-05-6726825d.pth`.
        target: the file to write.
        sha256: how the source's SHA-256 begins, at least 8 digits; to convert another file, name its own.

    Raises:
        UserError: if there is no such file, it is another one, or its weights do not fit.
    """
    source = Path(source)
    if not source.is_file():
        raise UserError(f"there is no file {source}; give the path of pt_inception-2015-12-05-6726825d.pth")
    found = file_hash(source)
    if len(sha256) < 8 or not found.startswith(sha256):
        raise UserError(
            f"{source} has SHA-256 {found}, which does not begin with {sha256!r}; download it again, or give sha256="
            f'"{found}" if you mean this file'
        )
    network = Inception()
    try:
        weights = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # of many types
        raise UserError(f"{source} is no file of weights ({type(error).__name__}); download it again") from None
    load_weights(network, {name: value.float() for name, value in weights.items()}, str(source))
    kept = {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    return write_aside(Path(target), lambda new: save_file(kept, new, {"source_sha256": found, "format": "pt"}))
