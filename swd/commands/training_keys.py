"""Keys of a training that `swd encode`, whose configuration holds them too, does not read; imports nothing large."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from swd.commands.keys import ENCODE
from swd.config import fits, given_keys
from swd.io import limits
from swd.types import UserError

UNREAD = ("endless", "prefetch", "window", "max_bad", "seed")
"""Keys of `data` that say how a training goes through samples."""


def check_unread(cfg: DictConfig) -> None:
    """Raise UserError for keys that only a training reads, such as its batch size."""
    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    for group, taken in (("data", "${recipe.batch_size}"), ("recipe", "${batch_size}")):
        given = (plain.get(group) or {}).get("batch_size", taken)
        if given != taken:
            raise UserError(f"{group}.batch_size={given} is of a training; here it is batch_size=NUMBER")
    for key in given_keys():
        group, _, name = key.partition(".")
        if group == "data" and name in UNREAD:
            here = f"; here it is {name}=VALUE" if name in ENCODE else "; remove it"
            raise UserError(f"{key} is of a training{here}")
    if not fits(cfg.batch_size, int):  # before values that refer to it are reported in its place
        raise UserError(f"batch_size={cfg.batch_size!r} is not valid; expected an integer")
    limits.whole("batch_size", cfg.batch_size, 1, limits.AT_ONCE, "no device encodes more at once")
