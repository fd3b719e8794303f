"""Whether networks compute as diffusers' stock pipelines do, bit for bit, or in the fastest order of operations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_as_in_pipelines: ContextVar[bool] = ContextVar("as_in_pipelines", default=False)


@contextmanager
def as_in_pipelines() -> Iterator[None]:
    """Context in which networks compute as diffusers does, bit for bit, so that stock pipelines draw the same."""
    token = _as_in_pipelines.set(True)
    try:
        yield
    finally:
        _as_in_pipelines.reset(token)


def computes_as_in_pipelines() -> bool:
    """Whether `as_in_pipelines` holds; never in compiled code, which rounds otherwise anyway."""
    return not torch.compiler.is_compiling() and _as_in_pipelines.get()
