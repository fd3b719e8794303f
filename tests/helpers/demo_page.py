"""Data of a small page of the demo."""

from __future__ import annotations

import math
from typing import Any

import torch

from swd.shapes import report

NAMES = ("teacher, 28 steps", "teacher, 4 steps", "student, 4 steps, scale-wise")
EVIL = "a <script>alert('&')</script> \"star\""


def row(name: str, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "steps": 4,
        "nfe": 8,
        "gflop": 7.944,
        "ms_per_image": 82.66,
        "fid": 0.02861,
        "prompt_accuracy": 0.9312,
        "exact_match": 0.5,
        "attributes": {"shape": 0.25, "colour": 0.75},
        "n_pictures": 8,
        "source": "live",
    } | more


def ratio(value: float | None, expected: str | None = None, met: bool | None = None) -> dict[str, Any]:
    return {"value": value, "expected": expected, "met": met}


def build_page(**more: Any) -> report.Page:
    results = {
        "rows": [row(name) for name in NAMES],
        "ratios": {
            "gflop_of_full_size_steps": ratio(0.517, "<= 0.56", True),
            "accuracy_of_teacher": ratio(0.912, ">= 0.95", False),
            "fid_of_teacher": ratio(None, "<= 1.5"),
            "speedup_over_teacher": ratio(23.46),
        },
        "fid_floor": 0.0042,
        "n_pictures": 8,
        "iterations": 160,
        "terms": ["dmd", "mmd", "gan"],
        "schedule": {"pixels": [[48, 48], [64, 64], [96, 96], [128, 128]]},
        "wall_seconds": {"distil": 14.73, "total": 46.97},
        "machine": {"device": "CPU"},
        "versions": {"torch": "2.13.0"},
        "command": "swd demo experiment=demo_ci",
        "folder": "outputs/demo/x",
    }
    picture = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    parts = {
        "results": results,
        "comparisons": [report.Comparison(EVIL, dict.fromkeys(NAMES, picture), dict.fromkeys(NAMES, "7/8"))],
        "progressions": [report.Progression(EVIL, [("σ 1.00, 6×6", picture[:, :6, :6]), ("σ 0.60, 16×16", picture)])],
        "curves": {"x0_mse": [2.0, 1.0, 1.5, 0.5], "odd<name": [1.0, math.nan, 3.0]},
        "cycle": 2,
        "config": "prompts: ['<b>']\nseed: 0\n",
    }
    return report.Page(**(parts | more))
