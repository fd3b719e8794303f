"""LoRA on a linear layer as one node of the autograd graph, and the role that all layers of a network play."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from swd.modules.autocast import autocast_dtype
from swd.types import Role


@dataclass
class PlayedRole:
    """The role that a network plays; its layers share one object, so that switching it is one assignment.

    Attributes:
        role: the current role.
    """

    role: Role = "teacher"


class RoleLinear(Linear):
    """peft's LoRA linear layer, in the role that its network plays; `install` makes these of peft's own.

    Parameters and their names stay peft's. Where the layer is plain, `lora_linear` computes it; anything else goes
    through peft's own forward pass: a base in 8 bits, dropout, a variant such as DoRA, hooks on an inner layer, dtypes
    that differ without autocast.

    Attributes:
        played: the role, shared by all layers of the network.
    """

    played: PlayedRole

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        role = self.played.role
        base = self.base_layer
        output: Tensor
        if role == "teacher":
            output = base(x, *args, **kwargs)
            return output
        if not args and not kwargs and self._is_plain(role):
            down = self.lora_A[role].weight
            up = self.lora_B[role].weight
            if autocast_dtype(x.device.type) is not None or x.dtype == base.weight.dtype == down.dtype == up.dtype:
                return lora_linear(x, base.weight, base.bias, down, up, self.scaling[role])
        follow(self, role)
        output = super().forward(x, *args, **kwargs)
        return output

    def _is_plain(self, role: str) -> bool:
        """Whether the layer is `x W' + b + scale (x A') B'` in this role, and nothing listens to its parts."""
        down = self.lora_A[role]
        up = self.lora_B[role]
        return (
            _is_bare(self.base_layer)
            and _is_bare(down)
            and _is_bare(up)
            and down.bias is None
            and up.bias is None
            and type(self.lora_dropout[role]) is nn.Identity
            and not self.lora_variant
            and not self.merged_adapters
            and not self.fan_in_fan_out
        )


def install(network: nn.Module, played: PlayedRole) -> list[LoraLayer]:
    """Turn the LoRA linear layers that peft put into a network into `RoleLinear`, in place.

    Args:
        network: with all its adapters.
        played: the role that the layers follow from now on.

    Returns:
        The LoRA layers of other kinds, which need `follow` at each change of the role.
    """
    others: list[LoraLayer] = []
    for layer in network.modules():
        if isinstance(layer, Linear):
            layer.__class__ = RoleLinear
            assert isinstance(layer, RoleLinear)  # for the type checker
            layer.played = played
        elif isinstance(layer, LoraLayer):
            others.append(layer)
    return others


def follow(layer: LoraLayer, role: Role) -> None:
    """Set the state of peft's own that its forward pass reads, so that a layer plays `role`."""
    layer._disable_adapters = role == "teacher"
    if role != "teacher":
        layer._active_adapter = [role]


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """`x W' + b + scale (x A') B'` (LoRA, arXiv 2106.09685, eq. 3) `[..., out]`; W and b get no gradient.

    Under autocast it is computed in its dtype, as `F.linear` is.

    Args:
        x: `[..., in]`.
        weight: W `[out, in]`, frozen.
        bias: b `[out]`, frozen, or None.
        down: A `[r, in]`.
        up: B `[out, r]`.
        scale: alpha / r.
    """
    if torch.is_grad_enabled():
        return _node(x, down, up, weight, bias, scale)
    return _product(x, down, up, weight, bias, scale)[0]


def _is_bare(layer: nn.Module) -> bool:
    """Whether a layer is a linear one of torch's own class without hooks."""
    return type(layer) is nn.Linear and not (
        layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    )


def _product(
    x: Tensor, down: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output `[..., out]`; and x, `x A'` `[N, r]`, A, B and W in the dtype that they were computed in.

    Products stand in peft's order, so that a stock pipeline draws the same bits.
    """
    dtype = autocast_dtype(x.device.type)
    if dtype is not None:
        x, down, up, weight = (tensor.to(dtype) for tensor in (x, down, up, weight))
        bias = None if bias is None else bias.to(dtype)
    x = x.contiguous()
    output = F.linear(x, weight, bias)
    inner = x.view(-1, x.shape[-1]) @ down.t()
    flat = output.view(-1, len(up))
    if output.dtype in (torch.float16, torch.bfloat16):
        # Rounded where peft rounds, so that a student predicts in a stock pipeline what it predicts in training.
        flat += _scaled(inner @ up.t(), scale)
    else:
        flat.addmm_(inner, up.t(), alpha=scale)
    return output, (x, inner, down, up, weight)


class _Context(Protocol):
    """Store between the forward and the backward pass of `_LoraLinear`."""

    saved_tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    needs_input_grad: tuple[bool, ...]
    next_functions: tuple[tuple[Any, int], ...]
    scale: float

    def save_for_backward(self, *tensors: Tensor) -> None:
        """Keep tensors for the backward pass."""


class _LoraLinear(torch.autograd.Function):
    """`lora_linear`; A and B get a gradient only where the backward pass goes on to them."""

    @staticmethod
    def forward(
        ctx: _Context, x: Tensor, down: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, scale: float
    ) -> Tensor:
        output, computed = _product(x, down, up, weight, bias, scale)
        ctx.save_for_backward(*computed)
        ctx.scale = scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, down, up, weight = ctx.saved_tensors
        grad = grad.reshape(-1, len(up))
        # The short side of a product comes first: on the CPU the other order takes up to four times as long.
        grad_inner = up.t() @ grad.t()
        grad_x = grad_down = grad_up = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_inner.t(), down, alpha=ctx.scale).view(x.shape)
        if _goes_on(ctx, 1):
            grad_down = _scaled(grad_inner @ x.view(-1, x.shape[-1]), ctx.scale)
        if _goes_on(ctx, 2):
            grad_up = _scaled((inner.t() @ grad).t(), ctx.scale)
        return grad_x, grad_down, grad_up, None, None, None


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    """A tensor times a number, in place."""
    return tensor if scale == 1 else tensor.mul_(scale)


_node: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, float], Tensor] = _LoraLinear.apply
"""`_LoraLinear` of its arguments."""


def _goes_on(ctx: _Context, number: int) -> bool:
    """Whether the running backward pass asks for the gradient of input `number`.

    `torch.autograd.grad` with respect to the network's input does not ask for those of the weights, but
    `needs_input_grad` says only whether an input ever requires one.
    """
    if not ctx.needs_input_grad[number]:
        return False
    if torch.compiler.is_compiling():
        return True
    try:
        return torch._C._will_engine_execute_node(ctx.next_functions[number][0])
    except RuntimeError:  # it does not tell for a weight whose gradient `torch.autograd.grad` was asked for by name
        return True
