"""Diffusers' RMS norm with a frozen weight as one node of the autograd graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class FrozenRMSNorm(RMSNorm):
    """Diffusers' RMS norm, whose values it gives bit for bit; `install_norms` makes these of diffusers' own.

    A weight that is trained, none, or a bias go through diffusers' own forward pass.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self.weight
        if not self.is_plain:
            output: Tensor = super().forward(hidden_states)
            return output
        if hidden_states.requires_grad and torch.is_grad_enabled():
            return _node(hidden_states, weight, self.eps)
        return product(hidden_states, weight, self.eps)[0]

    @property
    def is_plain(self) -> bool:
        """Whether there is a weight, which is not trained, and no bias."""
        return self.weight is not None and not self.weight.requires_grad and self.bias is None


def install_norms(network: nn.Module) -> None:
    """Turn diffusers' RMS norms in a network into `FrozenRMSNorm`, in place."""
    for module in network.modules():
        if type(module) is RMSNorm:
            module.__class__ = FrozenRMSNorm


def product(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`x r w` with `r = 1 / sqrt(mean(x^2) + eps)` (arXiv 1910.07467, eq. 4), in diffusers' order, and r."""
    exact = x if x.dtype == torch.float64 else x.float()
    r = torch.rsqrt(exact.square().mean(-1, keepdim=True).add_(eps))
    normed = x * r
    if weight.dtype in (torch.float16, torch.bfloat16):
        normed = normed.to(weight.dtype)
    return normed * weight, r


class _Context(Protocol):
    """Store between the forward and the backward pass of `_FrozenRMSNorm`."""

    saved_tensors: tuple[Tensor, Tensor, Tensor]

    def save_for_backward(self, *tensors: Tensor) -> None:
        """Keep tensors for the backward pass."""


class _FrozenRMSNorm(torch.autograd.Function):
    """`product`; only the input gets a gradient, and only it and r are kept."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        output, r = product(x, weight, eps)
        ctx.save_for_backward(x, weight, r)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        return gradient(grad, *ctx.saved_tensors), None, None


def gradient(grad: Tensor, x: Tensor, weight: Tensor, r: Tensor) -> Tensor:
    """Gradient of x, given that of `product`'s output, and its r."""
    normed = x * r
    grad = (grad * weight).to(normed.dtype)
    along = (grad * normed).mean(-1, keepdim=True)
    return grad.sub_(normed.mul_(along)).mul_(r).to(x.dtype)


_node: Callable[[Tensor, Tensor, float], Tensor] = _FrozenRMSNorm.apply
"""`_FrozenRMSNorm` of its arguments."""
