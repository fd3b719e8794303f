"""Shared by commands: quiet libraries, a GPU for each process."""

from __future__ import annotations

import sys

from swd.io.masking import mask_text
from swd.io.ranks import ranks


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
