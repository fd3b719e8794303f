"""How a pretrained network is trained: adapters on a frozen base, or whole copies of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from swd.io import limits
from swd.modules.backbones.base import TARGETS, Backbone
from swd.modules.networks import Networks, SeparateCopies, SharedBase
from swd.modules.quantize import Quantization, quantize
from swd.types import Role, UserError

LARGEST_RANK = 256
"""LoRA ranks up to this are always allowed, larger ones up to the network's width; the SwD paper has up to 128
(appendix A)."""


@dataclass(frozen=True)
class Tuning:
    """How a network is trained: with adapters or whole. The defaults are those of `Pretrained`.

    Attributes:
        tuning: "lora" trains adapters on one frozen base; "full" trains whole copies of it.
        rank: LoRA rank.
        alpha: LoRA alpha; None: alpha = rank.
        targets: names of the linear layers that get LoRA.
        init_adapter: the adapter that the student starts from; None: a fresh one.
        quantization: 8-bit format of the linear layers in the frozen base's blocks; None: the base's dtype.

    Raises:
        UserError: for values that contradict each other or are out of range.
    """

    tuning: Literal["lora", "full"] = "lora"
    rank: int = 64
    alpha: float | None = None
    targets: tuple[str, ...] = TARGETS
    init_adapter: str | None = None
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        if self.tuning == "full" and (self.quantization or self.init_adapter):
            given = "quantization" if self.quantization else "init_adapter"
            raise UserError(f"model.tuning=full trains every weight, so model.{given} cannot be set; use tuning=lora")
        if self.rank < 1:
            raise UserError(f"model.rank={self.rank}; a LoRA rank is at least 1")
        limits.number("model.alpha", self.alpha, *limits.ALPHAS, limits.RANGES["alpha"].why)
        if self.init_adapter is not None and not self.init_adapter.strip():
            raise UserError(
                "model.init_adapter is empty; name a run, an adapter's folder or file, or use null for a fresh start"
            )
        kinds = get_args(Quantization)
        if self.quantization not in (None, *kinds):
            raise UserError(f"model.quantization={self.quantization}; use {', '.join(kinds)} or null")

    def check_width(self, width: int) -> None:
        """Raise UserError if the rank is too large for a network with features of `width`."""
        most = max(LARGEST_RANK, width)
        if self.rank > most:
            raise UserError(
                f"model.rank={self.rank} is more than this network's width, {width}, so that it is no low rank "
                f"any more; use at most {most}, or model.tuning=full"
            )

    def networks(self, backbone: Backbone, roles: Sequence[Role], seed: int = 0, stored: bool = True) -> Networks:
        """Give a base its trainable roles.

        Args:
            backbone: the base, which is changed.
            roles: the trainable roles.
            seed: of the adapters' initial weights.
            stored: whether the base has weights; without them it cannot be quantized.
        """
        if self.tuning == "full":
            return SeparateCopies(backbone, roles)
        if self.quantization and stored:
            quantize(backbone.network, self.targets, self.quantization, backbone.repeated_blocks)
        return SharedBase(backbone, self.rank, self.alpha, self.targets, roles, seed)
