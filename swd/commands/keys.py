"""Keys at the root of each command's configuration, with their types. Nothing large is imported for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from swd.config import GROUP

Posterior = Literal["keep", "draw", "mean"]
"""What a cache holds of the VAE's distribution: its mean and deviation, a draw from it, or its mean."""

MODEL: dict[str, Any] = {"model": GROUP, "schedule": GROUP, "allow": list[str]}
"""Keys of every command on a model."""
RECIPE = {"batch_size": int, "lr": float, "iterations": int, "checkpointing": bool}
"""Values that suit a model; `data`, `task` and `trainer` use them unless they are given others."""
STARTING_PICTURES: dict[str, Any] = {
    "start": str | None,
    "level": float | int | None,
    "from": int | list[int] | None,
    "upsample": Literal["clean", "noisy"],
    "n": int | None,
}
"""Keys of drawing that starts from pictures."""

# The commands

TRAIN: dict[str, Any] = MODEL | {
    "task": GROUP,
    "loss": GROUP,
    "data": GROUP,
    "trainer": GROUP,
    "callbacks": GROUP,
    "logger": GROUP,
    "recipe": RECIPE,
    "sample_prompts": list[str],
    "seed": int,
    "name": str,
    "output": str,
    "folder": str,
    "resume": str | None,
    "optimized_metric": str | None,
}
SAMPLE: dict[str, Any] = MODEL | {
    "seed": int,
    "name": str,
    "output": str,
    "folder": str,
    "prompts": list[str] | str,
    "prompts_file": str | None,
    "images_per_prompt": int,
    "batch_size": int,
    "adapter": str | None,
    "other_adapter": str | None,
    "ema": bool | None,
    "height": int | None,
    "width": int | None,
    "aspect": str | None,
    "frames": int | None,
    "fold": bool,
    "tiny_vae": str | None,
    "compile": bool | Literal["blocks", "whole"],
    "compile_coders": bool,
    "offload": Literal["none", "model", "sequential"],
    "show_sizes": bool,
    "fps": int | None,
    **STARTING_PICTURES,
}
TIMING: dict[str, Any] = {
    "batch": int,
    "runs": int,
    "warmup": int,
    "precision": Literal["fp32", "bf16", "fp16"] | None,
    "compile": bool | Literal["blocks", "whole"],
    "compile_coders": bool,
    "tiny_vae": str | None,
}
"""How `swd evaluate` measures latency."""
EVALUATE: dict[str, Any] = MODEL | {
    "models": list[str | dict[str, Any]],
    "prompts": str,
    "n": int | None,
    "images_per_prompt": int,
    "seed": int,
    "metrics": list[str | dict[str, Any]],
    "reference": str | None,
    "batch_size": int,
    "chunk_size": int,
    "height": int | None,
    "width": int | None,
    "aspect": str | None,
    "bootstrap": {"draws": int, "level": float, "seed": int},
    "timing": TIMING,
    "published": bool | str,
    "name": str,
    "output": str,
    "folder": str,
}
EXPORT: dict[str, Any] = MODEL | {"run": str, "to": str, "verify": bool, "output": str, "ema": bool | None}
GENERATE: dict[str, Any] = {key: hint for key, hint in MODEL.items() if key != "schedule"} | {
    "seed": int,
    "prompts": str,
    "out": str,
    "images_per_prompt": int,
    "batch_size": int,
    "shard_size": int,
    "steps": int | None,
    "guidance_scale": float | None,
    "height": int | None,
    "width": int | None,
    "aspect": str | None,
    "frames": int | None,
    "fps": int | None,
    "format": Literal["png", "jpg", "webp"],
    "quality": int,
    "refiner": str | None,
    "refiner_start": float,
}
IMPORT: dict[str, Any] = {
    "source": str,
    "out": str,
    "size": int | None,
    "buckets": list[str] | None,
    "multiple": int,
    "resize": bool,
    "format": Literal["png", "jpg", "webp"],
    "strict": bool,
    "shard_size": int,
    "limit": int | None,
    "workers": int,
    "outside": bool,
    "max_pixels": int,
    "max_missing": float,
}
ENCODE: dict[str, Any] = MODEL | {
    "data": GROUP,
    "recipe": RECIPE,
    "seed": int,
    "out": str,
    "precision": Literal["fp32", "bf16", "int8"],
    "posterior": Posterior,
    "deduplicate": bool,
    "batch_size": int,
    "shard_size": int,
    "limit": int | None,
    "max_bad": float,
}
PLAN: dict[str, Any] = MODEL | {
    "task": GROUP,
    "loss": GROUP,
    "recipe": RECIPE,
    "seed": int,
    "gpu": str | float,
    "n_gpus": int,
    "divided": bool,
    "peak": float | None,
    "utilisation": float,
    "spare": float | None,
    "batch_size": int,
    "samples": int,
    "precision": Literal["fp32", "bf16", "int8"],
}
SPECTRA: dict[str, Any] = MODEL | {
    "cache": str,
    "levels": list[float | int],
    "n": int | None,
    "seed": int,
    "batch_size": int,
    "name": str,
    "output": str,
    "folder": str,
}
DASHBOARD: dict[str, Any] = {"project": str, "entity": str | None, "title": str, "output": str, "to": str}
DEMO: dict[str, Any] = TRAIN | {
    "judge": str,
    "encoded": int,
    "n_pictures": int,
    "shown": int,
    "timing_batches": int,
    "minutes": int | None,
    "recompute": bool,
    "store_teacher": bool,
}
REPORT: dict[str, Any] = {
    "folders": list[str],
    "out": str,
    "title": str | None,
    "megabytes": float,
    "side": int,
    "quality": int,
    "shown": int,
}
COMPARE: dict[str, Any] = {
    "paths": list[str],
    "out": str | None,
    "criteria": list[str],
    "n": int | None,
    "seed": int,
    "title": str,
    "side": int,
    "quality": int,
    "megabytes": float,
    "level": float,
}

ROOTS: Mapping[str, Mapping[str, Any]] = {
    "train": TRAIN,
    "sample": SAMPLE,
    "evaluate": EVALUATE,
    "export": EXPORT,
    "generate": GENERATE,
    "import": IMPORT,
    "encode": ENCODE,
    "plan": PLAN,
    "spectra": SPECTRA,
    "dashboard": DASHBOARD,
    "demo": DEMO,
    "report": REPORT,
    "compare": COMPARE,
}
"""The tables of all commands."""
