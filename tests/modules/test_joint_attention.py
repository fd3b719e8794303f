"""Attention of Stable Diffusion 3's blocks: diffusers' values and gradients, and no work on what nobody reads."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, JointAttnProcessor2_0
from tiny import build_networks
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from swd.modules.joint_attention import JointAttention, install_attention

BATCH, IMAGE, TEXT, WIDTH = 2, 9, 5, 16


def layers(pre_only: bool = False, norm: str | None = "rms_norm", processor: Any = None) -> tuple[nn.Module, nn.Module]:
    """Diffusers' attention layer and ours with the same weights, in float64."""
    torch.manual_seed(0)
    theirs = Attention(
        query_dim=WIDTH,
        added_kv_proj_dim=WIDTH,
        dim_head=8,
        heads=2,
        out_dim=WIDTH,
        context_pre_only=pre_only,
        processor=processor or JointAttnProcessor2_0(),
        qk_norm=norm,
        eps=1e-6,
    ).double()
    ours = copy.deepcopy(theirs)
    install_attention(ours)
    return theirs, ours


def tokens(length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, length, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()


def results(layer: nn.Module, with_text: bool) -> list[Tensor]:
    """Outputs, and gradients of the inputs and of all weights; zeros where there is none."""
    image = tokens(IMAGE, 1)
    text = tokens(TEXT, 2) if with_text else None
    found = layer(image, encoder_hidden_states=text)
    pre_only = with_text and layer.context_pre_only
    outputs = [found] if text is None else [found[0]] if pre_only else list(found)
    asked = [image, *([] if text is None else [text]), *layer.parameters()]
    loss = torch.stack([output.pow(3).sum() for output in outputs]).sum()
    gradients = torch.autograd.grad(loss, asked, allow_unused=True, materialize_grads=True)
    return [*outputs, *gradients]


@pytest.mark.parametrize("norm", ["rms_norm", None])
@pytest.mark.parametrize(("with_text", "pre_only"), [(True, False), (True, True), (False, False)])
def test_values_and_gradients_are_those_of_diffusers(norm: str | None, with_text: bool, pre_only: bool) -> None:
    theirs, ours = layers(pre_only, norm)
    assert type(ours) is JointAttention and type(theirs) is Attention
    expected, actual = results(theirs, with_text), results(ours, with_text)
    assert sum(bool(value.any()) for value in actual) > 6
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, rtol=1e-6 if norm else 1e-12, atol=1e-12)  # diffusers' norm computes in float32


def test_the_last_block_makes_no_queries_of_the_text() -> None:
    work = []
    for layer in layers(pre_only=True):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            layer(tokens(IMAGE, 1), encoder_hidden_states=tokens(TEXT, 2))
        work.append(counter.get_total_flops())
    queries = 2 * BATCH * TEXT * WIDTH * WIDTH
    products = 2 * 2 * BATCH * TEXT * (IMAGE + TEXT) * WIDTH
    assert work[0] - work[1] == queries + products


def test_what_sd3_does_not_do_is_left_to_diffusers() -> None:
    other = Attention(query_dim=WIDTH, heads=2, dim_head=8, processor=AttnProcessor2_0())
    install_attention(other)
    assert type(other) is Attention
    theirs, ours = layers()
    for layer in (theirs, ours):
        layer.set_processor(AttnProcessor2_0())
    assert torch.equal(ours(tokens(IMAGE, 1)), theirs(tokens(IMAGE, 1)))


def test_networks_have_it_in_every_block() -> None:
    network = build_networks().backbone.network
    assert isinstance(network, SD3Transformer2DModel)
    attentions = [module for module in network.modules() if isinstance(module, Attention)]
    assert len(attentions) >= 3 and all(type(module) is JointAttention for module in attentions)
