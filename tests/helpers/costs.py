"""Costs of real models: text tokens, and TFLOP a sample by latent size.

Those of the paper's models were counted on the released training code, Qwen-Image's on the diffusers class.
"""

from __future__ import annotations

from typing import Any

TEXT = {"sd35_medium": 589, "sd35_large": 589, "flux_dev": 512, "sdxl": 77, "wan21_1_3b": 512, "qwen_image": 128}
TEXT["qwen_image_2512"] = TEXT["qwen_image"]  # a prompt of usual length: it is not padded
SIDES = (32, 48, 64, 80, 96, 128)
TFLOP: dict[str, dict[Any, str]] = {
    "sd35_medium": dict(zip(SIDES, ("1.31", "1.94", "2.90", "4.26", "6.14", "11.93"), strict=True)),
    "sd35_large": dict(zip(SIDES, ("4.78", "6.74", "9.62", "13.53", "18.65", "33.34"), strict=True)),
    "flux_dev": dict(zip(SIDES, ("10.35", "14.90", "21.50", "30.41", "41.93", "74.38"), strict=True)),
    "sdxl": dict(zip(SIDES, (".4278", ".9051", "1.5888", "2.4942", "3.6412", "6.7612"), strict=True)),
    "wan21_1_3b": {
        (6, 20, 34): "2.993",
        (11, 30, 52): "14.681",
        (16, 40, 70): "52.346",
        (21, 60, 104): "283.00",
    },
    "qwen_image": dict(zip(SIDES[2:], ("16.7", "25.7", "37.4", "70.6"), strict=True)),
}
TFLOP["qwen_image_2512"] = TFLOP["qwen_image"]
