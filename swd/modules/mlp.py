"""A frozen feed-forward layer with GELU, with or without LoRA, as one node of the autograd graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from swd.modules.in_pipelines import computes_as_in_pipelines
from swd.modules.lora_linear import (
    Factors,
    Product,
    asked_adapters,
    has_hooks,
    plain_layers,
    products,
    trained_factors,
)

SLOPE = 2 * math.sqrt(2 / math.pi)
CUBE = 0.044715
"""GELU's tanh form is `u sigmoid(SLOPE (u + CUBE u^3))` (arXiv 1606.08415, section 2)."""
SLOPES = {dtype: torch.tensor(SLOPE, dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64)}
"""`SLOPE` as tensors on the CPU. In 16 bits torch's own GELU is more exact, since it computes in float32, and in
float16 the gradient would be NaN from 500 on. They are made on import, because a first call may run within
`torch.device` or a mode of fake tensors, and what is made there is of that kind."""


class TanhGELU(GELU):
    """Diffusers' layer with GELU in its tanh form, whose values it gives but for rounding."""

    def gelu(self, gate: Tensor) -> Tensor:
        if gate.device.type != "cpu" or torch.compiler.is_compiling() or computes_as_in_pipelines():
            output: Tensor = super().gelu(gate)
            return output
        if torch.is_grad_enabled():
            return _gelu_node(gate)
        return _gelu(gate)[0]


class GELUFeedForward(FeedForward):
    """Diffusers' feed-forward layer with `TanhGELU`: where all is plain and frozen, one node of the graph.

    Layers that are trained, of another kind or have hooks go through diffusers' own forward pass, and so does compiled
    code.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layers = None if args or kwargs else self._plain(hidden_states)
        if layers is None:
            output: Tensor = super().forward(hidden_states, *args, **kwargs)
            return output
        if torch.is_grad_enabled():
            return _node(hidden_states, *trained_factors(layers), layers)
        return _product(hidden_states, layers)[0]

    def _plain(self, x: Tensor) -> list[Factors] | None:
        """The weights of both layers, if they are plain and nothing else happens between them."""
        gelu, dropout, last = self.net
        if has_hooks(gelu) or has_hooks(dropout) or (dropout.p and self.training):
            return None
        return plain_layers(x, (gelu.proj, last))


def install_mlps(network: nn.Module) -> None:
    """Turn diffusers' feed-forward layers with GELU in its tanh form in a network into ours, in place."""
    for module in network.modules():
        if type(module) is FeedForward:
            layers: Any = module.net
            if len(layers) == 3 and type(layers[0]) is GELU and layers[0].approximate == "tanh":
                layers[0].__class__ = TanhGELU
                module.__class__ = GELUFeedForward


def _gelu(u: Tensor) -> tuple[Tensor, Tensor | None]:
    """GELU's tanh form, and on the CPU its sigmoid, with which torch takes half the time that its own GELU takes."""
    slope = SLOPES.get(u.dtype)
    if slope is None or not u.is_cpu or type(u) is not Tensor:
        return F.gelu(u, approximate="tanh"), None
    gate = torch.addcmul(slope, u, u, value=SLOPE * CUBE).mul_(u).sigmoid_()
    return u * gate, gate


def _gelu_gradient(grad: Tensor, u: Tensor, gate: Tensor | None) -> Tensor:
    """Gradient of u."""
    if gate is None:
        found: Tensor = torch.ops.aten.gelu_backward(grad, u, approximate="tanh")
        return found
    # The derivative is g + g (1 - g) u d with the sigmoid g and the derivative d of its argument.
    rise = torch.addcmul(SLOPES[u.dtype], u, u, value=3 * SLOPE * CUBE).mul_(u).mul_(gate)
    return rise.addcmul_(rise, gate, value=-1).add_(gate).mul_(grad)


class _MLP(NamedTuple):
    """What the gradient of a feed-forward layer needs: both products, GELU's argument and its sigmoid."""

    wide: Product
    narrow: Product
    before: Tensor
    gate: Tensor | None


def _product(x: Tensor, layers: Sequence[Factors]) -> tuple[Tensor, _MLP]:
    """The output, and what its gradient needs."""
    wide, narrow = layers
    (before,), of_wide = products(x, [wide])
    after, gate = _gelu(before)
    (output,), of_narrow = products(after, [narrow])
    return output, _MLP(of_wide, of_narrow, before, gate)


class _GELU(torch.autograd.Function):
    """GELU's tanh form on the CPU."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        output, gate = _gelu(u)
        ctx.save_for_backward(u, gate)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _gelu_gradient(grad, *ctx.saved_tensors)


class _FeedForward(torch.autograd.Function):
    """The feed-forward layer of x, adapters, layers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *given: Any) -> Tensor:
        layers = given[-1]
        output, (wide, narrow, before, gate) = _product(x, layers)
        ctx.save_for_backward(before, gate, *wide.kept(), *narrow.kept())
        ctx.scales = [layer.scale for layer in layers]
        ctx.shape = x.shape
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        before, gate = next(saved), next(saved)
        wide, narrow = (Product.again(saved, [scale]) for scale in ctx.scales)
        of_wide = asked_adapters(ctx, 1, wide.adapters)
        of_narrow = asked_adapters(ctx, 1 + 2 * len(of_wide), narrow.adapters)
        grad_after, grads_narrow = narrow.gradients([grad.reshape(-1, grad.shape[-1])], True, of_narrow)
        assert grad_after is not None
        grad_before = _gelu_gradient(grad_after.view(before.shape), before, gate).view(grad_after.shape)
        grad_x, grads_wide = wide.gradients([grad_before], ctx.needs_input_grad[0], of_wide)
        return None if grad_x is None else grad_x.view(ctx.shape), *grads_wide, *grads_narrow, None


_gelu_node: Callable[[Tensor], Tensor] = _GELU.apply
_node: Callable[..., Tensor] = _FeedForward.apply
"""The two nodes, of their arguments."""
