"""Queries, keys and values of tokens, with the norms of their heads, as one node of the autograd graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from swd.modules import rms_norm
from swd.modules.lora_linear import (
    Factors,
    Product,
    asked_adapters,
    has_hooks,
    plain_layers,
    products,
    trained_factors,
)
from swd.modules.rms_norm import FrozenRMSNorm


def heads_of(x: Tensor, layers: Sequence[nn.Module], norms: Sequence[nn.Module | None], heads: int) -> Sequence[Tensor]:
    """Heads `[B, L, heads, D]` that layers, each followed by its norm, make of tokens.

    Frozen layers of torch's own class, all with LoRA or none, are computed as one node; others one after the other.

    Args:
        x: tokens `[B, L, W]`.
        layers: linear ones to `heads x D` channels.
        norms: over the channels of a head, one a layer; None: none.
        heads: number of heads.
    """
    plain = plain_layers(x, layers) if all(map(_is_plain, norms)) else None
    if plain is None:
        found = [layer(x).view(*x.shape[:2], heads, -1) for layer in layers]
        return [each if norm is None else norm(each) for each, norm in zip(found, norms, strict=True)]
    if torch.is_grad_enabled():
        outputs: tuple[Tensor, ...] = _Heads.apply(x, *trained_factors(plain), plain, norms, heads)
        return outputs
    return _heads(x, plain, norms, heads)[0]


def _is_plain(norm: nn.Module | None) -> bool:
    """Whether there is no norm, or one of ours with a weight that is not trained, no bias and no hooks."""
    return norm is None or (type(norm) is FrozenRMSNorm and norm.is_plain and not has_hooks(norm))


def _heads(
    x: Tensor, layers: Sequence[Factors], norms: Sequence[Any], heads: int
) -> tuple[list[Tensor], Product, list[Tensor]]:
    """The heads, and what their gradient needs: of the layers, and of the norms."""
    outputs, product = products(x, layers)
    found = [output.view(*x.shape[:2], heads, output.shape[-1] // heads) for output in outputs]
    of_norms: list[Tensor] = []
    for number, norm in enumerate(norms):
        if norm is not None:
            before = found[number]
            found[number], inverse = rms_norm.product(before, norm.weight, norm.eps)
            of_norms += [before, inverse, norm.weight]
    return found, product, of_norms


class _Heads(torch.autograd.Function):
    """`heads_of` x, adapters, layers, norms, number of heads."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *given: Any) -> tuple[Tensor, ...]:
        *_, layers, ctx.norms, heads = given
        found, product, of_norms = _heads(x, layers, ctx.norms, heads)
        ctx.save_for_backward(*product.kept(), *of_norms)
        ctx.scales = [layer.scale for layer in layers]
        ctx.shape = x.shape
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        product = Product.again(saved, ctx.scales)
        grads = list(given)
        for number, norm in enumerate(ctx.norms):
            if norm is not None:
                before, inverse, weight = next(saved), next(saved), next(saved)
                grads[number] = rms_norm.gradient(grads[number], before, weight, inverse)
        flat = [grad.reshape(-1, grad.shape[-1] * grad.shape[-2]) for grad in grads]
        asked = asked_adapters(ctx, 1, product.adapters)
        grad_rows, others = product.gradients(flat, ctx.needs_input_grad[0], asked)
        return None if grad_rows is None else grad_rows.view(ctx.shape), *others, None, None, None
