"""The contract of metrics: extractors turn pictures into features, metrics turn stored features into numbers.

The two halves are apart so that features can be computed by several processes, stored, and read back: a metric is a
pure function of features in the order of the pictures, and equal features give equal numbers.

    extractor.check()                                 before anything is drawn: are weights and packages there
    features = extractor(pictures)                    uint8 [B, 3, H, W] -> float32 [B, D]
    metric.check(reference)
    score = metric.score(Drawn({extractor.name: features}, prompts), reference)
    score.values["fid"]
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from swd.types import UserError


class Extractor(nn.Module, ABC):
    """Features of pictures by a network whose weights are read when they are first needed.

    A subclass gives `name`, `width`, `check`, `prepare`, `build` and `embed`. It must keep a picture's features
    independent of the other pictures of its batch, up to rounding: no statistics of a batch, no random number.

    Attributes:
        name: the network and the whole preparation of a picture, in letters, digits, "-" and "." (it names files):
            "inception-512-256lanczos". Extractors with equal names and `weights_id` give equal features.
    """

    name: str

    def __init__(self) -> None:
        super().__init__()
        # In a list, so that it is no part of a state dict and DDP does not see it.
        self._loaded: list[nn.Module] = []

    @property
    @abstractmethod
    def width(self) -> int:
        """Number of features D."""

    @property
    def num_features(self) -> int:
        """`width`, by the name that torchmetrics reads."""
        return self.width

    @abstractmethod
    def check(self) -> None:
        """Find weights and packages, fetching files from the hub if need be, without reading weights.

        Raises:
            UserError: for an absent file or package, in one line that names it and says what to do.
        """

    @abstractmethod
    def weights_id(self) -> str:
        """SHA-256 of the weights, for telling whether stored features are still valid."""

    @abstractmethod
    def prepare(self, picture: Tensor) -> Tensor:
        """One picture, uint8 `[3, H, W]` on any device, as one input of the network `[3, S, S]`, on the same device.

        S must not depend on H and W, so that pictures of any sizes make a batch.
        """

    @abstractmethod
    def build(self) -> nn.Module:
        """The network with its weights in float32, on the CPU."""

    @abstractmethod
    def embed(self, network: nn.Module, prepared: Tensor) -> Tensor:
        """Features `[B, D]` of `prepared` `[B, 3, S, S]`."""

    def load(self, device: torch.device | str = "cpu") -> nn.Module:
        """The frozen network on `device`; its weights are read at the first call, and moved at later ones."""
        if not self._loaded:
            self.check()
            self._loaded.append(self.build().eval().requires_grad_(False))
        return self._loaded[0].to(device)

    def unload(self) -> None:
        """Free the network; the next use reads its weights again."""
        self._loaded.clear()

    @torch.no_grad()
    def forward(self, pictures: Tensor | Sequence[Tensor]) -> Tensor:
        """Features `[B, D]` in float32, on the pictures' device, whatever autocast or TF32 settings are in force.

        Args:
            pictures: uint8 `[B, 3, H, W]`, or B pictures `[3, H, W]` of any sizes.
        """
        for picture in pictures:
            assert picture.dtype == torch.uint8 and picture.shape[0] == 3, (
                f"expected uint8 [3, H, W], got {picture.dtype} {tuple(picture.shape)}"
            )
        prepared = torch.stack([self.prepare(picture) for picture in pictures])
        network = self.load(prepared.device)
        with full_precision(prepared.device):
            features = self.embed(network, prepared).float()
        assert features.shape == (len(prepared), self.width), f"{self.name}: got {tuple(features.shape)}"
        return features


class TextExtractor(Extractor):
    """An extractor that also gives features of prompts, to compare with those of pictures."""

    @abstractmethod
    def embed_prompts(self, network: nn.Module, prompts: Sequence[str]) -> Tensor:
        """Features `[B, D]` of B prompts, on the network's device."""

    @torch.no_grad()
    def prompt_features(self, prompts: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
        """Features `[B, D]` of B prompts in float32, on `device`."""
        network = self.load(device)
        with full_precision(torch.device(device)):
            return self.embed_prompts(network, prompts).float()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast, no TF32, and cuDNN's choices fixed, so that a batch's size changes only the last digits."""
    matmul = torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with torch.autocast(device.type, enabled=False), cudnn:
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(matmul)


@dataclass(frozen=True)
class Drawn:
    """Stored features of N drawn pictures, in the order of the pictures.

    Attributes:
        features: by the name of the extractor, `[N, D]` each.
        prompts: the prompt of each picture; several pictures of one prompt (other seeds) have equal prompts. Empty if
            unknown.
        prompt_features: by the name of the text extractor, features of each picture's prompt `[N, D]`.
    """

    features: Mapping[str, Tensor]
    prompts: Sequence[str] = ()
    prompt_features: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.features.values())))

    def groups(self) -> list[list[int]]:
        """Indices of the pictures of each prompt, in the order in which prompts first appear."""
        found: dict[str, list[int]] = {}
        for i, prompt in enumerate(self.prompts):
            found.setdefault(prompt, []).append(i)
        return list(found.values())


@dataclass(frozen=True)
class Gaussian:
    """Mean `mu` `[D]` and covariance `sigma` `[D, D]` (divided by N - 1) of features, in float64."""

    mu: Tensor
    sigma: Tensor


@dataclass(frozen=True)
class Reference:
    """Real pictures that drawn ones are compared with.

    Attributes:
        features: by the name of the extractor, `[R, D]` each; empty where only statistics are published.
        gaussians: by the name of the extractor, statistics of pictures that are not at hand.
    """

    features: Mapping[str, Tensor] = field(default_factory=dict)
    gaussians: Mapping[str, Gaussian] = field(default_factory=dict)

    def to(self, device: torch.device) -> Reference:
        """The same on another device."""
        features = {name: each.to(device) for name, each in self.features.items()}
        known = {name: Gaussian(each.mu.to(device), each.sigma.to(device)) for name, each in self.gaussians.items()}
        return Reference(features, known)


@dataclass(frozen=True)
class Score:
    """Numbers of one metric for one set of pictures.

    Attributes:
        values: by name; the first is the metric's own, the others stand beside it (a floor, an extrapolated value).
        parts: `[G]` values whose mean is the first of `values` and of which a bootstrap may draw, for intervals and for
            paired differences between sets with the same prompts and seeds. None where there are none.
        per: whether `parts` are of the pictures, in their order, or of the prompts, in the order of `Drawn.groups`.
        bounds: lowest and highest number that the first value can be; resampled values, which are exact to first order
            alone, are cut off there.
    """

    values: dict[str, float]
    parts: Tensor | None = None
    per: Literal["picture", "prompt"] = "picture"
    bounds: tuple[float, float] = (-math.inf, math.inf)


class PictureMetric(ABC):
    """A pure function of stored features.

    Attributes:
        name: key in configurations and tables: "fid".
        extractors: whose features of the drawn pictures it needs; of a `TextExtractor` also those of the prompts if
            `needs_prompts`. Metrics may share an extractor, which then runs once.
        needs_prompts: whether the pictures' prompts are needed.
        needs_reference: whether real pictures are needed.
        takes_statistics: whether mean and covariance of the real pictures' features are enough.
        fewest_real: number of real pictures below which there is no value, where their features are needed.
        higher_is_better: the direction of its first value.
    """

    name: str
    extractors: tuple[Extractor, ...]
    needs_prompts: bool = False
    needs_reference: bool = False
    takes_statistics: bool = False
    fewest_real: int = 1
    higher_is_better: bool = False

    def check(self, reference: Reference | None = None) -> None:
        """Refuse, before anything is drawn, what could not be scored.

        Args:
            reference: real pictures, with their features where they are at hand.

        Raises:
            UserError: for absent weights or packages, or a reference that is too small or lacks what is needed.
        """
        for extractor in self.extractors:
            extractor.check()
        if not self.needs_reference:
            return
        if reference is None:
            raise UserError(f"{self.name} compares with real pictures and has none; give a reference")
        for name in (extractor.name for extractor in self.extractors):
            known = name in reference.gaussians
            if name not in reference.features and not (known and self.takes_statistics):
                fault = "only their mean and covariance" if known else f"no features of {name}"
                raise UserError(f"{self.name} needs real pictures, and the reference has {fault}; give it a folder")
            count = len(reference.features[name]) if name in reference.features else self.fewest_real
            if count < self.fewest_real:
                raise UserError(f"{self.name} needs {self.fewest_real} real pictures, got {count}; give more")

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse, before anything is drawn, prompts that could not be scored.

        Args:
            prompts: of the pictures that are about to be drawn, one each.

        Raises:
            UserError: for prompts that the metric cannot use; most can use all.
        """
        return None

    @abstractmethod
    def score(self, drawn: Drawn, reference: Reference | None = None) -> Score:
        """The metric's numbers; equal arguments give equal numbers, and pictures' order matters only where it says so.

        Raises:
            UserError: for too few pictures, or features that do not fit each other.
        """


def real_features(reference: Reference | None, extractor: Extractor) -> Tensor:
    """`features_of` the reference."""
    return features_of(reference.features if reference else {}, extractor, "reference")


def features_of(features: Mapping[str, Tensor], extractor: Extractor, whose: str) -> Tensor:
    """Stored features `[N, D]` of one extractor in float64.

    Args:
        features: by the name of the extractor.
        extractor: the one in question.
        whose: "drawn pictures" or "reference", for the message.

    Raises:
        UserError: if they are absent or their width is another.
    """
    if extractor.name not in features:
        raise UserError(f"the {whose} have no features of {extractor.name}; extract them first")
    found = features[extractor.name]
    if found.ndim != 2 or found.shape[1] != extractor.width:
        raise UserError(
            f"features of {extractor.name} are [N, {extractor.width}], those of the {whose} {list(found.shape)}; "
            "extract them again"
        )
    return found.double()
