"""Wan2.2 T2V-A14B, the expert for low noise levels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from swd.diffusion import Process, RectifiedFlow
from swd.modules.backbones.wan_high_noise import BOUNDARY, WanHighNoiseBackbone


class WanLowNoiseBackbone(WanHighNoiseBackbone):
    """`transformer_2` of the pipeline: levels below `BOUNDARY`. Its LoRA keys begin as those of `transformer` do."""

    process: ClassVar[Process] = RectifiedFlow(below=BOUNDARY)
    subfolder: ClassVar[str] = "transformer_2"
    lora_arguments: ClassVar[Mapping[str, Any]] = {"load_into_transformer_2": True}
    other_experts: ClassVar[Mapping[str, str]] = {"transformer": "wan_high_noise"}

    @classmethod
    def lora_prefix(cls) -> str:
        return "transformer"
