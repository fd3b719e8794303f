"""Costs of real models: text tokens, and TFLOP a sample by latent size.

Those of the paper's models were counted on the released training code, the others' on the diffusers classes.
"""

from __future__ import annotations

from typing import Any

TEXT = {
    "sd35_medium": 589,
    "sd35_large": 589,
    "flux_dev": 512,
    "sdxl": 77,
    "wan21_1_3b": 512,
    "wan22_5b": 512,
    "wan22_a14b_high": 512,
    "wan22_a14b_low": 512,
    "flux2_klein_4b": 512,
    "flux2_klein_9b": 512,
    "flux2_dev": 512,
    "chroma1": 512,
    "z_image": 128,  # a prompt of usual length: it is not padded
    "qwen_image": 128,
    "qwen_image_2512": 128,
}
SIDES = (32, 48, 64, 80, 96, 128)
TFLOP: dict[str, dict[Any, str]] = {
    "sd35_medium": dict(zip(SIDES, ("1.31", "1.94", "2.90", "4.26", "6.14", "11.93"), strict=True)),
    "sd35_large": dict(zip(SIDES, ("4.78", "6.74", "9.62", "13.53", "18.65", "33.34"), strict=True)),
    "flux_dev": dict(zip(SIDES, ("10.35", "14.90", "21.50", "30.41", "41.93", "74.38"), strict=True)),
    "flux2_klein_4b": dict(zip(SIDES, ("4.92", "7.06", "10.17", "14.35", "19.74", "34.82"), strict=True)),
    "flux2_klein_9b": dict(zip(SIDES, ("11.08", "15.86", "22.73", "31.87", "43.52", "75.51"), strict=True)),
    "flux2_dev": dict(zip(SIDES, ("43.12", "61.53", "87.77", "122.32", "165.79", "282.60"), strict=True)),
    "sdxl": dict(zip(SIDES, (".4278", ".9051", "1.5888", "2.4942", "3.6412", "6.7612"), strict=True)),
    "z_image": dict(zip((64, 80, 96, 128), ("13.7", "21.0", "30.4", "56.6"), strict=True)),
    "chroma1": dict(zip((64, 80, 96, 128), ("21.7", "30.6", "42.1", "74.6"), strict=True)),
    "wan21_1_3b": {
        (6, 20, 34): "2.993",
        (11, 30, 52): "14.681",
        (16, 40, 70): "52.346",
        (21, 60, 104): "283.00",
    },
    "qwen_image": dict(zip(SIDES[2:], ("16.7", "25.7", "37.4", "70.6"), strict=True)),
    "wan22_5b": {
        (4, 22, 40): "8.70",
        (8, 28, 50): "28.34",
        (16, 34, 60): "97.55",
        (9, 14, 26): "8.12",
        (16, 22, 40): "36.40",
        (24, 30, 54): "121.68",
        (31, 44, 80): "517.01",
    },
}
A14B: dict[Any, str] = {
    (6, 30, 52): "63.61",
    (11, 36, 64): "189.23",
    (16, 44, 78): "490.56",
    (6, 20, 34): "27.86",
    (11, 30, 52): "121.64",
    (16, 40, 70): "377.43",
    (21, 60, 104): "1678.37",
}
TFLOP |= {"wan22_a14b_high": A14B, "wan22_a14b_low": A14B}
TFLOP["qwen_image_2512"] = TFLOP["qwen_image"]
