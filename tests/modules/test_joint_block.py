"""Blocks of Stable Diffusion 3: diffusers' values and gradients in fewer operations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers.models.attention import FeedForward, JointTransformerBlock
from peft import LoraConfig, inject_adapter_in_model
from tiny import build_networks
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from swd.modules.in_pipelines import as_in_pipelines
from swd.modules.joint_attention import install_attention
from swd.modules.joint_block import JointBlock, install_blocks
from swd.modules.lora_linear import PlayedRole, RoleLinear, install
from swd.modules.mlp import GELUFeedForward, install_mlps
from swd.modules.rms_norm import install_norms

WIDTH, BATCH, IMAGE, TEXT = 16, 2, 9, 5
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "add_q_proj", "add_k_proj", "to_add_out"]
KINDS = {"plain": {}, "last": {"context_pre_only": True}, "dual": {"use_dual_attention": True}}


def blocks(lora: list[str] | None = None, trained: bool = False, **options: Any) -> tuple[nn.Module, nn.Module]:
    """Diffusers' block and ours with the same weights in float64, and the same adapters of rank 3.

    Norms of heads are ours in both: in float64 diffusers computes its own in float32.
    """
    torch.manual_seed(0)
    block: Any = JointTransformerBlock(WIDTH, 2, 8, qk_norm="rms_norm", **options)
    if lora:
        config = LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, target_modules=lora)
        inject_adapter_in_model(config, block, "student")
    block = block.double().requires_grad_(trained)
    for name, weight in block.named_parameters():
        weight.requires_grad_(trained or "lora_" in name)
    install_norms(block)
    theirs, ours = block, copy.deepcopy(block)
    install_attention(ours)
    install_blocks(ours)
    install_mlps(ours)
    install(ours, PlayedRole("student"))
    return theirs, ours


def results(block: nn.Module, grad: bool = True) -> list[Tensor]:
    """What a block gives, and gradients of inputs and trained weights; zeros where there is none."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((BATCH, IMAGE, WIDTH), (BATCH, TEXT, WIDTH), (BATCH, WIDTH))
    image, text, temb = (torch.randn(*shape, generator=generator).double() for shape in shapes)
    inputs = [image.requires_grad_(grad), text.requires_grad_(grad)]
    found = block(hidden_states=image, encoder_hidden_states=text, temb=temb)
    outputs = [output for output in found if output is not None]
    if not grad:
        return outputs
    asked = [*inputs, *(weight for weight in block.parameters() if weight.requires_grad)]
    loss = torch.stack([output.pow(3).sum() for output in outputs]).sum()
    gradients = torch.autograd.grad(loss, asked, allow_unused=True, materialize_grads=True)
    return [*outputs, *gradients]


def assert_same(block: nn.Module, other: nn.Module) -> None:
    expected, actual = results(other), results(block)
    assert sum(bool(value.any()) for value in actual) > 0.8 * len(actual)  # the last block's text has no queries
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [None, TARGETS, ["to_q", "net.2", "to_add_out"]])
def test_values_and_gradients_are_those_of_diffusers(kind: str, lora: list[str] | None) -> None:
    theirs, ours = blocks(lora, **KINDS[kind])
    assert type(ours) is JointBlock and type(theirs) is JointTransformerBlock
    assert_same(ours, theirs)
    with torch.no_grad():
        for a, b in zip(results(ours, grad=False), results(theirs, grad=False), strict=True):
            assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_block_is_that_of_diffusers(kind: str) -> None:
    theirs, ours = blocks(trained=True, **KINDS[kind])
    assert_same(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_in_pipelines_it_computes_diffusers_bits(kind: str) -> None:
    theirs, ours = (block.float() for block in blocks(TARGETS, **KINDS[kind]))
    for block in (theirs, ours):
        for module in block.modules():
            if isinstance(module, RoleLinear):
                module._active_adapter = ["student"]
    inputs = [torch.randn(BATCH, n, WIDTH) for n in (IMAGE, TEXT)]
    temb = torch.randn(BATCH, WIDTH)
    with torch.no_grad():
        expected = theirs(*inputs, temb)
        close = ours(*inputs, temb)
        with as_in_pipelines():
            exact = ours(*inputs, temb)
    for a, b, c in zip(expected, exact, close, strict=True):
        if a is not None:
            assert torch.equal(a, b)
            assert_close(c, a, rtol=1e-4, atol=1e-5)


class Operations(TorchDispatchMode):
    """Counts operations that are no views."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_it_takes_fewer_operations() -> None:
    counts = []
    for block in blocks(TARGETS):
        with Operations() as operations:
            results(block)
        counts.append(operations.count)
    assert counts[1] < 0.9 * counts[0]


@pytest.mark.parametrize(
    "heard",
    [
        "norm1",
        "norm1_context",
        "attn.to_q",
        "attn.to_q.base_layer",
        "attn.norm_k",
        "ff.net.0",
        "ff.net.1",
        "ff_context.net.2",
    ],
)
def test_whoever_listens_to_a_layer_hears_it(heard: str) -> None:
    theirs, ours = blocks(TARGETS)
    results(ours)  # once without, so that what is kept of the layers is there
    seen: list[int] = []
    handle = ours.get_submodule(heard).register_forward_hook(lambda *_: seen.append(1))
    assert_same(ours, theirs)
    assert seen == [1]
    handle.remove()
    results(ours)
    assert seen == [1]


def test_layers_in_chunks_are_left_to_diffusers() -> None:
    theirs, ours = blocks()
    for block in (theirs, ours):
        block.set_chunk_feed_forward(1, dim=1)
        block.ff.forward, chunks = counted(block.ff.forward)
        results(block, grad=False)
        assert len(chunks) == IMAGE


def counted(call: Any) -> tuple[Any, list[int]]:
    """A call that notes each time that it is made."""
    made: list[int] = []

    def again(*args: Any) -> Any:
        made.append(1)
        return call(*args)

    return again, made


def test_networks_have_it_in_every_block() -> None:
    network: Any = build_networks().backbone.network
    assert len(network.transformer_blocks) >= 3
    assert all(type(block) is JointBlock for block in network.transformer_blocks)
    assert not any(type(module) is FeedForward for module in network.modules())
    assert any(type(module) is GELUFeedForward for module in network.modules())
