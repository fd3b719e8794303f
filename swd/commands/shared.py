"""Shared by commands: the keys at the root of a configuration, quiet libraries, a GPU for each process."""

from __future__ import annotations

import sys
from typing import Any

from swd.config import GROUP
from swd.io.masking import mask_text
from swd.io.ranks import ranks

ROOT: dict[str, Any] = {"model": GROUP, "schedule": GROUP, "allow": list[str]}
"""Keys at the root of the configuration of every command on a model, and their types."""
RECIPE = {"batch_size": int, "lr": float, "iterations": int, "checkpointing": bool}
"""Values that suit a model, and their types; `data`, `task` and `trainer` use them unless they are given others."""


def given_command(command: str) -> str:
    """A command as it was given, without secrets.

    Args:
        command: its name.
    """
    return mask_text(" ".join(["swd", command, *sys.argv[1:]]))


def use_own_gpu() -> None:
    """Under a launcher, give each process of a machine a GPU of its own."""
    import torch

    here = ranks()
    if here.launched and torch.cuda.is_available():
        torch.cuda.set_device(here.local_rank % torch.cuda.device_count())


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
