"""A frozen base in 8 bits: each layer widens its weights when it uses them, in the forward and the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from swd.modules.autocast import autocast_dtype
from swd.modules.targets import is_target

Quantization = Literal["int8", "fp8"]

_RANGE = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}


class _Context(Protocol):
    """Store between the forward and the backward pass of `_Widened`."""

    saved_tensors: tuple[Tensor, Tensor]

    def save_for_backward(self, *tensors: Tensor) -> None:
        """Keep tensors for the backward pass."""


class _Widened(torch.autograd.Function):
    """`x @ W.T`; W is kept in 8 bits for the backward pass and gets no gradient."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return x @ (weight.to(x.dtype) * scale.to(x.dtype)).t()

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        grad = grads[0]
        return grad @ (weight.to(grad.dtype) * scale.to(grad.dtype)), None, None


_widened: Callable[[Tensor, Tensor, Tensor], Tensor] = _Widened.apply
"""`_Widened` of input, weight and scale."""


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose weight is 8-bit with one scale per output channel.

    The largest weight of a channel is stored as the largest number of the format, so that the error of int8 is at most
    1/254 of that weight.

    Attributes:
        scale: factors `[out, 1]`, float32, by which the stored weight's rows are multiplied.
    """

    scale: Tensor

    def __init__(self, layer: nn.Linear, kind: Quantization) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        dtype, largest = _RANGE[kind]
        weight = layer.weight.detach().float()
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / largest
        small = weight / scale
        small = small.round() if kind == "int8" else small
        self.weight = nn.Parameter(small.clamp(-largest, largest).to(dtype), requires_grad=False)
        self.register_buffer("scale", scale)
        if layer.bias is not None:
            self.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        dtype = autocast_dtype(input.device.type)
        if dtype is not None:
            input = input.to(dtype)
        output = _widened(input, self.weight, self.scale)
        return output if self.bias is None else output + self.bias.to(output.dtype)


@torch.no_grad()
def quantize(network: nn.Module, targets: Sequence[str], kind: Quantization, blocks: Sequence[nn.Module] = ()) -> int:
    """Replace linear layers by 8-bit ones, in place; other layers stay as they are.

    Args:
        network: the base, before adapters are added.
        targets: names as in `Pretrained.targets`, of layers that are replaced wherever they are.
        kind: the 8-bit format of the stored weights.
        blocks: parts of the network all of whose linear layers are replaced, but for those of an adapter.

    Returns:
        The number of layers replaced.
    """
    # Names, not layers: a list of the layers would keep the weights of those already replaced in memory.
    named = [pair for block in blocks for pair in block.named_modules()]
    inside = {id(module) for name, module in named if "lora_" not in name}
    found = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and (id(module) in inside or is_target(name, targets))
    ]
    for name in found:
        parent, _, child = name.rpartition(".")
        layer = network.get_submodule(name)
        assert isinstance(layer, nn.Linear)  # `found` names nothing else
        setattr(network.get_submodule(parent), child, QuantizedLinear(layer, kind))
    return len(found)
