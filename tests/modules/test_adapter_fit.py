"""Which adapters fit a network, and how the message names both."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from swd.modules.adapters import Adapter, check_model, with_model_names
from swd.modules.backbones import load_family
from swd.types import UserError

MODEL: Any = SimpleNamespace(
    name="tiny",
    backbone_class=load_family("sd3"),
    meta_network=nn.ModuleDict({"a": nn.Linear(6, 5), "b": nn.Conv2d(3, 4, 2), "norm": nn.LayerNorm(6)}),
)


def adapter(module: str, inner: tuple[int, ...], outer: int, base: str | None = "other") -> Adapter:
    ones = (1,) * (len(inner) - 1)
    state = {
        f"{module}.lora_A.weight": torch.zeros(2, *inner),
        f"{module}.lora_B.weight": torch.zeros(outer, 2, *ones),
    }
    return Adapter(state, Path("runs/x/adapter.safetensors"), base)


def test_an_adapter_fits_layers_of_its_shape() -> None:
    check_model(adapter("a", (6,), 5), MODEL)
    check_model(adapter("b", (3, 2, 2), 4), MODEL)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (adapter("a", (5,), 6), "runs/x (made for other) does not fit model tiny: a, (6, 5) against (5, 6)"),
        (adapter("a", (6,), 4), "runs/x (made for other) does not fit model tiny: a, (4, 6) against (5, 6)"),
        (
            adapter("b", (3, 2, 3), 4),
            "runs/x (made for other) does not fit model tiny: b, (4, 3, 2, 3) against (4, 3, 2, 2)",
        ),
        (adapter("c", (6,), 5), "runs/x (made for other) does not fit model tiny: c, which this model does not have"),
        (
            adapter("norm", (6,), 6, None),
            "runs/x (made for a model that it does not name) does not fit model tiny: norm, which this model does not "
            "have",
        ),
    ],
)
def test_an_adapter_of_another_network_is_refused_with_both_names(made: Adapter, message: str) -> None:
    with pytest.raises(UserError, match=f"^adapter {re.escape(message)}$"):
        check_model(made, MODEL)


def test_a_file_with_comfyuis_names_fits_under_the_network_s_own() -> None:
    """Most LoRAs of Wan have the names of its original weights, of which diffusers has others."""
    layer = nn.ModuleDict({"attn1": nn.ModuleDict({"to_q": nn.Linear(6, 6)})})
    wan: Any = SimpleNamespace(
        name="tiny", backbone_class=load_family("wan"), meta_network=nn.ModuleDict({"blocks": nn.ModuleList([layer])})
    )
    check_model(adapter("blocks.0.attn1.to_q", (6,), 6), wan)
    found = with_model_names(adapter("blocks.0.self_attn.q", (6,), 6), wan)
    assert found.modules == ["blocks.0.attn1.to_q"]
    check_model(found, wan)
