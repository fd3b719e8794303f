"""What commands share: the keys at the root of a configuration, quiet libraries, a GPU for each process."""

from __future__ import annotations

import os

import torch

RECIPE = {"batch_size": int, "lr": float, "iterations": int, "checkpointing": bool}
"""Values that suit a model, which `data`, `task` and `trainer` take over unless they are given others."""

ROOT = {
    "recipe": RECIPE,
    "seed": int,
    "name": str,
    "output": str,
    "folder": str,
    "resume": str | None,
    "sample_prompts": list[str],
    "allow": list[str],
}
"""Keys at the root of every command's configuration, and their types."""


def use_own_gpu() -> None:
    """Under a launcher, give each process of a machine a GPU of its own."""
    local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID"))
    if local is not None and torch.cuda.is_available():
        torch.cuda.set_device(int(local) % torch.cuda.device_count())


def quiet() -> None:
    """Silence notices that a user cannot act on."""
    import logging

    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
