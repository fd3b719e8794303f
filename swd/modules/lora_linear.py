"""LoRA on a linear layer as one node of the autograd graph, and the role that all layers of a network play."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from swd.modules.autocast import autocast_dtype
from swd.modules.in_pipelines import computes_as_in_pipelines
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
        known: what the layer consists of in each role in which it was found to be plain.
    """

    played: PlayedRole
    known: dict[Role, PlainParts]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        role = self.played.role
        output: Tensor
        if role == "teacher":
            output = self.base_layer(x, *args, **kwargs)
            return output
        layer = None if args or kwargs else self.factors()
        if layer is not None and (autocast_dtype(x.device.type) is not None or layer.are_of(x.dtype)):
            assert layer.down is not None and layer.up is not None  # in this role
            return lora_linear(x, layer.weight, layer.bias, layer.down, layer.up, layer.scale)
        follow(self, role)
        output = super().forward(x, *args, **kwargs)
        return output

    def factors(self) -> Factors | None:
        """The weights in the role that is played; None unless the layer is plain and nothing listens to its parts."""
        role = self.played.role
        compiling = torch.compiler.is_compiling()  # whose code would be made again when `known` changes
        parts = None if compiling else self.known.get(role)
        if parts is None or not parts.are_of(self):
            if not self._is_plain(role):
                return None
            parts = self._parts(role)
            if not compiling:
                self.known[role] = parts
        return None if any(parts.empty) else parts.factors()

    def _is_plain(self, role: Role) -> bool:
        """Whether the layer is `x W' + b + scale (x A') B'` in this role, of linear layers of torch's own class."""
        if role == "teacher":
            return _is_linear(self.base_layer)
        down = self.lora_A[role]
        up = self.lora_B[role]
        return (
            all(map(_is_linear, (self.base_layer, down, up)))
            and down.bias is None
            and up.bias is None
            and type(self.lora_dropout[role]) is nn.Identity
            and not (self.lora_variant or self.fan_in_fan_out)
        )

    def _parts(self, role: Role) -> PlainParts:
        """The layers that a plain one consists of in a role."""
        base = self.base_layer
        if role == "teacher":
            return PlainParts(role, base, None, None, None, self.scaling, hooks_of(base))
        down = self.lora_A[role]
        up = self.lora_B[role]
        empty = [*hooks_of(base), *hooks_of(down), *hooks_of(up), self.merged_adapters, self.lora_variant]
        return PlainParts(role, base, down, up, self.lora_dropout[role], self.scaling, empty)


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
            layer.known = {}
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
    factors = Factors(weight, bias, down, up, scale).to(autocast_dtype(x.device.type))
    (output,), _ = products(x, [factors])
    return output


def hooks_of(layer: nn.Module) -> list[dict[int, Any]]:
    """The dictionaries of hooks that run with a module's passes; each is empty where nothing listens."""
    return [layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks]


def has_hooks(layer: nn.Module) -> bool:
    """Whether anything listens to a module, or has put another forward pass into it, as offloading does."""
    return any(hooks_of(layer)) or "forward" in layer.__dict__


def _is_linear(layer: nn.Module) -> bool:
    """Whether a layer is a linear one of torch's own class, with the forward pass of that class."""
    return type(layer) is nn.Linear and "forward" not in layer.__dict__


@dataclass(frozen=True, slots=True)
class PlainParts:
    """The layers that a plain LoRA layer consists of in a role; sharding exchanges their weights.

    Attributes:
        role: the role.
        base: the frozen layer.
        down: with A; None in the teacher's role.
        up: with B, likewise.
        dropout: before A, which does nothing; likewise.
        scaling: alpha / r by role.
        empty: what must be empty: the layers' hooks, and peft's lists of adapters that are folded in, and of variants.
    """

    role: Role
    base: nn.Module
    down: nn.Module | None
    up: nn.Module | None
    dropout: nn.Module | None
    scaling: Mapping[str, float]
    empty: list[Any]

    def are_of(self, layer: RoleLinear) -> bool:
        """Whether the layer still consists of these, with their own forward passes."""
        now: dict[str, Any] = layer._modules
        if now["base_layer"] is not self.base or "forward" in self.base.__dict__:
            return False
        if self.down is None:
            return True
        lists = (now["lora_A"], now["lora_B"], now["lora_dropout"])
        down, up, dropout = (each._modules.get(self.role) for each in lists)
        return down is self.down and up is self.up and dropout is self.dropout

    def factors(self) -> Factors:
        """The weights as they are now."""
        weights: dict[str, Any] = self.base._parameters
        if self.down is None or self.up is None:
            return Factors(weights["weight"], weights["bias"])
        down: Any = self.down._parameters["weight"]
        up: Any = self.up._parameters["weight"]
        return Factors(weights["weight"], weights["bias"], down, up, self.scaling[self.role])


class Factors(NamedTuple):
    """Weights of a linear layer in the role that is played: `x W' + b + scale (x A') B'`.

    Attributes:
        weight: W `[out, in]`, frozen.
        bias: b `[out]`, frozen, or None.
        down: A `[r, in]`; None where the layer has no adapter in this role.
        up: B `[out, r]`, likewise.
        scale: alpha / r.
    """

    weight: Tensor
    bias: Tensor | None
    down: Tensor | None = None
    up: Tensor | None = None
    scale: float = 0.0

    def are_of(self, dtype: torch.dtype) -> bool:
        """Whether all weights are of a dtype."""
        down, up = self.down, self.up
        if down is not None and up is not None and not down.dtype == up.dtype == dtype:
            return False
        return self.weight.dtype == dtype

    def to(self, dtype: torch.dtype | None) -> Factors:
        """The same in another dtype; None: as they are."""
        if dtype is None:
            return self
        bias, down, up = (None if each is None else each.to(dtype) for each in self[1:4])
        return Factors(self.weight.to(dtype), bias, down, up, self.scale)


def plain_layers(x: Tensor, layers: Sequence[nn.Module]) -> list[Factors] | None:
    """Weights of frozen linear layers for a node that computes several, in the dtype that x is to be multiplied in.

    Args:
        x: the layers' input.
        layers: that are computed in one node of the graph.

    Returns:
        None in compiled code, in `as_in_pipelines`, or if a layer is trained, of another class than torch's or
        `RoleLinear`, has hooks or other dtypes, or if some have adapters and others none.
    """
    if torch.compiler.is_compiling() or computes_as_in_pipelines():
        return None
    found: list[Factors] = []
    for layer in layers:
        factors = None if has_hooks(layer) else _factors_of(layer)
        if factors is None:
            return None
        found.append(factors)
    if len({factors.down is None for factors in found}) > 1:
        return None
    dtype = autocast_dtype(x.device.type)
    if dtype is None:
        return found if all(factors.are_of(x.dtype) for factors in found) else None
    return [factors.to(dtype) for factors in found]


def _factors_of(layer: nn.Module) -> Factors | None:
    """The weights of a plain layer, with or without LoRA."""
    if type(layer) is RoleLinear:
        return layer.factors()
    if type(layer) is not nn.Linear:
        return None
    weight = layer.weight
    bias = layer.bias
    return None if weight.requires_grad or (bias is not None and bias.requires_grad) else Factors(weight, bias)


class Product(NamedTuple):
    """Frozen linear layers that took the same input, and what their gradient needs.

    Attributes:
        layers: all with an adapter, or none. Behind `again` they have no biases, which have no part in gradients.
        rows: the input `[N, in]`; None without adapters.
        inner: A x' of all adapters `[sum of r, N]`; None without adapters.
    """

    layers: Sequence[Factors]
    rows: Tensor | None = None
    inner: Tensor | None = None

    @property
    def adapters(self) -> int:
        """Number of adapters."""
        return 0 if self.inner is None else len(self.layers)

    def kept(self) -> list[Tensor | None]:
        """What `again` takes, for `save_for_backward`.

        A node that kept weights in another way would hold copies in autocast's dtype in memory, which checkpointing
        frees.
        """
        weights = [weight for layer in self.layers for weight in (layer.weight, layer.down, layer.up)]
        return [self.rows, self.inner, *weights]

    @staticmethod
    def again(saved: Iterator[Any], scales: Sequence[float]) -> Product:
        """What `kept` gave, and the layers' scales."""
        rows, inner = next(saved), next(saved)
        layers = [Factors(next(saved), None, next(saved), next(saved), scale) for scale in scales]
        return Product(layers, rows, inner)

    def gradients(
        self, grads: Sequence[Tensor], of_x: bool, of_adapters: Sequence[tuple[bool, bool]]
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Gradients of `products`, each where it is asked for.

        Args:
            grads: of the outputs, `[N, out]` each.
            of_x: whether the input's gradient is asked for.
            of_adapters: of which A, and of which B of each adapter.

        Returns:
            The gradient of the input; and those of A and B of each adapter in turn.
        """
        layers = self.layers
        grad_x: Tensor | None = None
        if of_x:
            grad_x = grads[0] @ layers[0].weight
            for grad, layer in zip(grads[1:], layers[1:], strict=True):
                grad_x.addmm_(grad, layer.weight)
        if self.inner is None or self.rows is None:
            return grad_x, []
        grad_ups: list[Tensor | None] = []
        grad_inners: list[Tensor] = []
        downs, ups = _adapters(layers)
        parts = _parts(self.inner, downs)
        for grad, layer, up, part, (_, of_up) in zip(grads, layers, ups, parts, of_adapters, strict=True):
            grad_ups.append(_scaled((part @ grad).t(), layer.scale) if of_up else None)
            grad_inners.append(_scaled(up.t() @ grad.t(), layer.scale))
        grad_inner = _stacked(grad_inners)
        if grad_x is not None:
            grad_x.addmm_(grad_inner.t(), _stacked(downs))
        grad_downs: Sequence[Tensor | None] = [None] * len(layers)
        if any(of_down for of_down, _ in of_adapters):
            grad_downs = _parts(grad_inner @ self.rows, downs)
        return grad_x, [each for pair in zip(grad_downs, grad_ups, strict=True) for each in pair]


def products(x: Tensor, layers: Sequence[Factors]) -> tuple[list[Tensor], Product]:
    """Outputs of layers that take the same input.

    In `as_in_pipelines` the products of an adapter stand in peft's order. Elsewhere their short side comes first: on
    the CPU the other order takes twice as long.

    Args:
        x: `[..., in]`.
        layers: all with an adapter, or none, and of one dtype, in which they are computed.

    Returns:
        One output `[..., out]` a layer, and what their gradient needs.
    """
    x = x.to(layers[0].weight.dtype).contiguous()
    outputs = [F.linear(x, layer.weight, layer.bias) for layer in layers]
    downs, ups = _adapters(layers)
    if not downs:
        return outputs, Product(layers)
    rows = x.view(-1, x.shape[-1])
    down = _stacked(downs)
    inner = (rows @ down.t()).t() if computes_as_in_pipelines() else down @ rows.t()
    for output, layer, up, part in zip(outputs, layers, ups, _parts(inner, downs), strict=True):
        added = output.view(-1, output.shape[-1])
        if output.dtype in (torch.float16, torch.bfloat16):
            # Rounded where peft rounds, so that a student predicts in a stock pipeline what it predicts in training.
            added += _scaled(part.t() @ up.t(), layer.scale)
        else:
            added.addmm_(part.t(), up.t(), alpha=layer.scale)
    return outputs, Product(layers, rows, inner)


def trained_factors(layers: Iterable[Factors]) -> list[Tensor]:
    """A and B of each adapter in turn: what a node that computes layers is given, so that they get gradients."""
    return [weight for layer in layers for weight in (layer.down, layer.up) if weight is not None]


def _adapters(layers: Sequence[Factors]) -> tuple[list[Tensor], list[Tensor]]:
    """A of all adapters, and B."""
    downs = [layer.down for layer in layers if layer.down is not None]
    return downs, [layer.up for layer in layers if layer.up is not None]


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Tensors `[r, ...]` under each other; one alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _parts(stacked: Tensor, downs: Sequence[Tensor]) -> Sequence[Tensor]:
    """The rows of each adapter in `[sum of r, ...]`, given the A `[r, in]` of all."""
    return (stacked,) if len(downs) == 1 else torch.split_with_sizes(stacked, [len(down) for down in downs])


class _LoraLinear(torch.autograd.Function):
    """`lora_linear`; A and B get a gradient only where the backward pass goes on to them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, down: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, scale: float
    ) -> Tensor:
        factors = Factors(weight, bias, down, up, scale).to(autocast_dtype(x.device.type))
        (output,), product = products(x, [factors])
        ctx.save_for_backward(*product.kept())
        ctx.scale = scale
        ctx.shape = x.shape
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        product = Product.again(iter(ctx.saved_tensors), [ctx.scale])
        grads = [grad.reshape(-1, grad.shape[-1])]
        grad_x, others = product.gradients(grads, ctx.needs_input_grad[0], asked_adapters(ctx, 1, 1))
        return None if grad_x is None else grad_x.view(ctx.shape), *others, None, None, None


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    """A tensor times a number, in place."""
    return tensor if scale == 1 else tensor.mul_(scale)


_node: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, float], Tensor] = _LoraLinear.apply
"""`_LoraLinear` of its arguments."""


def asked_adapters(ctx: Any, first: int, count: int) -> list[tuple[bool, bool]]:
    """Whether the running backward pass asks for A and for B of each of `count` adapters, from input `first` on."""
    return [(goes_on(ctx, number), goes_on(ctx, number + 1)) for number in range(first, first + 2 * count, 2)]


def goes_on(ctx: Any, number: int) -> bool:
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
