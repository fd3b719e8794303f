"""The dtype that autocast computes in, on the meta device too, for which torch has no autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_on_meta: ContextVar[torch.dtype | None] = ContextVar("autocast on the meta device", default=None)


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype of autocast on a type of device; None where it is off."""
    if device == "meta":
        return _on_meta.get()
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


@contextmanager
def autocast_on_meta(dtype: torch.dtype) -> Iterator[None]:
    """Context in which `autocast_dtype` of the meta device is `dtype`."""
    token = _on_meta.set(dtype)
    try:
        yield
    finally:
        _on_meta.reset(token)
