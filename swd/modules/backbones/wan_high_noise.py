"""Wan2.2 T2V-A14B, the expert for high noise levels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from swd.diffusion import Process, RectifiedFlow
from swd.modules.backbones.wan import WanBackbone

BOUNDARY = 0.875
"""Noise level from which this expert draws; the other one draws below it (`model_index.json`)."""
LOW_SHARE = 0.75
"""Guidance of the expert for low levels by that of this one: the vendor's configuration has 3.0 and 4.0."""


class WanHighNoiseBackbone(WanBackbone):
    """`transformer` of two networks of Wan2.1's class, on latents of its VAE: levels from `BOUNDARY`."""

    process: ClassVar[Process] = RectifiedFlow(least=BOUNDARY)
    unknown_settings: ClassVar[tuple[str, ...]] = ("expand_timesteps",)
    known_settings: ClassVar[Mapping[str, Any]] = {"boundary_ratio": BOUNDARY}
    other_experts: ClassVar[Mapping[str, str]] = {"transformer_2": "wan_low_noise"}
    poor_at_low_resolution: ClassVar[bool] = False  # not known of it

    @staticmethod
    def guidance_arguments(scale: float) -> dict[str, Any]:
        return {"guidance_scale": scale, "guidance_scale_2": max(1.0, LOW_SHARE * scale)}
