"""Wan2.2 TI2V-5B: text to video on the latents of a VAE of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from swd.modules.backbones.base import NetworkLimits
from swd.modules.backbones.wan import WanBackbone


class Wan5BBackbone(WanBackbone):
    """Wan2.1's class on latents of 48 channels, 16x in space.

    Its pipeline (`expand_timesteps`) feeds one timestep a token, for pictures to start from; in text to video all are
    equal, and one a sample gives the same.
    """

    unknown_settings: ClassVar[tuple[str, ...]] = ("boundary_ratio",)  # of two experts, as in Wan2.2 A14B
    known_settings: ClassVar[Mapping[str, Any]] = {"expand_timesteps": True}

    @staticmethod
    def limits_of(config: dict[str, Any]) -> NetworkLimits:
        return replace(WanBackbone.limits_of(config), native=(31, 44, 80))

    @staticmethod
    def frame_rate(config: dict[str, Any]) -> int:
        return 24  # the vendor's configuration
