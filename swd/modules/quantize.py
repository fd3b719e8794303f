"""A frozen base in 8 bits: weights are stored small and widened layer by layer, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from swd.modules.targets import is_target

Quantization = Literal["int8", "fp8"]

_RANGE = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}


class _Widened(torch.autograd.Function):
    """`x @ W.T` with W kept in 8 bits for the backward pass too; W gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return x @ (weight.to(x.dtype) * scale.to(x.dtype)).t()

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        grad = grads[0]
        return grad @ (weight.to(grad.dtype) * scale.to(grad.dtype)), None, None


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose weight is 8-bit with one scale per output channel.

    The largest weight of a channel maps to the largest number of the format, so that int8's error is at most 1/254 of
    it.
    """

    def __init__(self, layer: nn.Linear, kind: Quantization) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        dtype, largest = _RANGE[kind]
        weight = layer.weight.detach().float()
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / largest
        small = weight / scale
        small = small.round() if kind == "int8" else small
        self.weight = nn.Parameter(small.clamp(-largest, largest).to(dtype), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)  # type: ignore[assignment]

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_autocast_enabled(input.device.type):
            input = input.to(torch.get_autocast_dtype(input.device.type))
        output: Tensor = _Widened.apply(input, self.weight, self.scale)  # type: ignore[no-untyped-call]
        return output if self.bias is None else output + self.bias.to(output.dtype)


@torch.no_grad()
def quantize(network: nn.Module, targets: Sequence[str], kind: Quantization) -> int:
    """Replace a network's linear layers named by `targets` in place; modulations and embeddings stay as they are.

    Args:
        network: the base, before adapters are added.
        targets: names as in `Pretrained.targets`.
        kind: the format.

    Returns:
        How many layers were replaced.
    """
    found = [
        name for name, module in network.named_modules() if isinstance(module, nn.Linear) and is_target(name, targets)
    ]
    for name in found:
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, QuantizedLinear(network.get_submodule(name), kind))  # type: ignore[arg-type]
    return len(found)
