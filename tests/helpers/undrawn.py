"""Weights on the meta device are not drawn: they hold no values, and drawing takes a third of the time of building."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from diffusers.models import modeling_utils
from torch import nn

DRAWING = ("uniform_", "normal_", "trunc_normal_", "xavier_uniform_", "xavier_normal_", "kaiming_uniform_", "zeros_")


def draw_nothing_on_meta(patch: pytest.MonkeyPatch) -> None:
    """Let the functions of `torch.nn.init` return tensors of the meta device as they are."""
    for name in DRAWING:
        undrawn = _undrawn(getattr(nn.init, name))
        patch.setattr(nn.init, name, undrawn)
        if name in modeling_utils.TORCH_INIT_FUNCTIONS:  # which diffusers puts back after each loading
            patch.setitem(modeling_utils.TORCH_INIT_FUNCTIONS, name, undrawn)


def _undrawn(original: Any) -> Any:
    @functools.wraps(original)
    def draw(tensor: Any, *args: Any, **options: Any) -> Any:
        return tensor if tensor.is_meta else original(tensor, *args, **options)

    return draw
