"""The RMS norm as one node: diffusers' values, and gradients of what it computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from tiny import build_networks
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close

from swd.modules.rms_norm import FrozenRMSNorm, install_norms


def norms(kind: torch.dtype = torch.float32, frozen: bool = True, **options: Any) -> tuple[nn.Module, nn.Module]:
    """Diffusers' norm of 8 channels and ours with the same weight."""
    theirs, ours = (RMSNorm(8, 1e-3, **options).to(kind).requires_grad_(not frozen) for _ in range(2))
    for norm in (theirs, ours):
        for parameter in norm.parameters():
            parameter.data.copy_(torch.randn(8, generator=torch.Generator().manual_seed(1)))
    install_norms(ours)
    assert type(ours) is FrozenRMSNorm and type(theirs) is RMSNorm
    return theirs, ours


def tokens(kind: torch.dtype = torch.float32) -> Tensor:
    """Channels of heads `[2, 3, 5, 8]`, whose memory is laid out as `[2, 5, 3, 8]`."""
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0))
    return x.to(kind).transpose(1, 2).requires_grad_()


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_values_are_those_of_diffusers_bit_for_bit_and_gradients_up_to_rounding(
    kind: torch.dtype, autocast: bool
) -> None:
    found = []
    for norm in norms(kind):
        x = tokens(kind)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = norm(x)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert torch.equal(norm(x), output)
        found.append((output, torch.autograd.grad(output.float().pow(3).sum(), x)[0]))
    (expected, theirs), (actual, ours) = found
    assert actual.dtype == expected.dtype and torch.equal(actual, expected)
    assert ours.dtype == kind and (ours - theirs).norm() < (1e-6 if kind == torch.float32 else 1e-2) * theirs.norm()


def test_gradients_by_finite_differences() -> None:
    _, norm = norms(torch.float64)
    torch.autograd.gradcheck(norm, tokens(torch.float64))
    assert norm(tokens(torch.float64)).grad_fn.name() == "_FrozenRMSNormBackward"
    assert norm(tokens().detach().double()).grad_fn is None


@pytest.mark.parametrize("options", [{"frozen": False}, {"bias": True}, {"elementwise_affine": False}])
def test_a_norm_that_is_trained_or_of_another_kind_is_diffusers_own(options: dict[str, Any]) -> None:
    theirs, ours = norms(**options)
    output = ours(tokens())
    assert torch.equal(output, theirs(tokens())) and "RMSNorm" not in output.grad_fn.name()
    if options == {"frozen": False}:
        grads = [torch.autograd.grad(norm(tokens()).pow(3).sum(), norm.weight)[0] for norm in (theirs, ours)]
        assert_close(*grads, rtol=0, atol=0)


def test_it_keeps_less_memory_for_the_backward_pass() -> None:
    kept: list[int] = []
    for norm in norms(torch.bfloat16):
        kept.append(0)

        def pack(tensor: Tensor) -> Tensor:
            kept[-1] += tensor.numel() * tensor.element_size()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            norm(tokens(torch.bfloat16))
    elements = tokens().numel()
    assert kept[1] < 2.8 * elements, "the input in bf16, one number of four bytes in eight, the weight"
    assert kept[0] > 6 * elements


def test_networks_have_it_in_every_block() -> None:
    network = build_networks().backbone.network
    assert sum(type(module) is FrozenRMSNorm for module in network.modules()) > 6
    assert not any(type(module) is RMSNorm for module in network.modules())
