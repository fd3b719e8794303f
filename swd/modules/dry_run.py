"""Updates of a distillation on the meta device: what they compute and how much memory they take, without any weights.

The losses run as in training; only their tensors hold no numbers. Matrix products are taken in bf16 and attention by
one fused kernel, as on a GPU.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from swd.losses.base import CriticStep, GeneratorStep, LossTerm
from swd.losses.update import critic_loss, generator_gradient, student_x0, trainers, wanted
from swd.modules.autocast import autocast_on_meta
from swd.modules.networks import Networks
from swd.modules.pretrained import Pretrained
from swd.schedule import ScaleSchedule
from swd.types import Role

Update = Literal["generator", "critic"]
"""The two kinds of updates of an iteration."""


@dataclass(frozen=True)
class UpdateCost:
    """Cost of an update.

    Attributes:
        flop: floating-point operations of matrix products, convolutions and attention that are executed, recomputation
            included; a multiply-add counts as two, and attention's backward pass twice its forward pass. Frozen
            weights have no gradients, so none are counted: a backward pass through a LoRA layer is the gradient of its
            input and of its two small matrices.
        peak: largest number of bytes of tensors at one time, besides weights, their gradients and the moments.
    """

    flop: float
    peak: int


class DryRun:
    """One task's updates on the meta device.

    Args:
        model: the teacher; only its configuration is read.
        terms: the loss, settled and checked.
        schedule: noise levels and sizes.
        checkpointing: recompute activations in the backward pass.

    Attributes:
        networks: student, fake and teacher without weights, the base in bf16.
    """

    def __init__(
        self, model: Pretrained, terms: Mapping[str, LossTerm], schedule: ScaleSchedule, checkpointing: bool = False
    ) -> None:
        self.schedule = schedule
        self._shapes: _ShapesOfResults = {}
        self.networks = networks_on_meta(model, roles_of(terms))
        self.as_on_gpu = _AsOnGpu()
        for role in ("teacher", *self.networks.roles):
            for block in self.networks.backbone_of(role).repeated_blocks:
                _run_in(block, self.as_on_gpu)
        if checkpointing:
            self.networks.enable_checkpointing()
        self.terms = terms_on_meta(terms, model.limits.width)
        self.channels = model.channels
        text = model.backbone_class.random_conditioning(model.network_config, 1, model.text_tokens)
        self.text = text.map(lambda tensor: torch.empty_like(tensor, device="meta"))
        for parameter in (*self.networks.parameters(), *self.terms.parameters()):
            if parameter.requires_grad:  # gradients are counted with the weights
                parameter.grad = torch.empty_like(parameter)

    def update(self, kind: Update, step: int, batch: int = 1) -> UpdateCost:
        """Cost of one update on `batch` samples at a step of the schedule, counted from 0."""
        interval = self.schedule.interval(step)
        text = self.text.map(lambda tensor: tensor.new_empty(batch, *tensor.shape[1:]))
        source, target = (
            torch.empty(batch, self.channels, *size, device="meta") for size in (interval.source, interval.target)
        )
        weights = (
            *self.networks.parameters(),
            *self.networks.buffers(),
            *self.terms.parameters(),
            *self.terms.buffers(),
        )
        gradients = (weight.grad for weight in weights if weight.grad is not None)
        meter = _Meter(self._shapes, (*weights, *gradients))
        self.as_on_gpu.meter = meter
        with meter, self.as_on_gpu:
            draws = _Shapes()
            with torch.set_grad_enabled(kind == "generator"):
                x0_hat = student_x0(self.networks, interval, source, text, draws)
            if kind == "critic":
                passes = wanted(trainers(self.terms), "critic_pass")
                critic = CriticStep(self.networks, text, self.text, x0_hat, target, draws, passes)
                critic_loss(self.terms, critic)[0].backward()
            else:
                leaf = x0_hat.detach().requires_grad_()
                passes = wanted(self.terms, "generator_pass")
                generator = GeneratorStep(self.networks, text, self.text, leaf, target, draws, passes)
                gradient = generator_gradient(self.terms, generator)[1]
                (x0_hat * gradient).sum().backward()
        return UpdateCost(meter.flop, meter.peak)


def roles_of(terms: Mapping[str, LossTerm]) -> tuple[Role, ...]:
    """Trainable roles that a loss needs."""
    return ("student", "fake") if trainers(terms) else ("student",)


def networks_on_meta(model: Pretrained, roles: Sequence[Role], dtype: torch.dtype = torch.bfloat16) -> Networks:
    """The networks of a training without weights: a base in `dtype`, in 8 bits if the model is, and what is trained.

    Bytes of their tensors are those of the real ones.
    """
    network = nn.Module.to(copy.deepcopy(model.meta_network), dtype)
    backbone = model.backbone_class(network, model.embedded_guidance)
    return model.tuned.networks(backbone, roles).to("meta")


def terms_on_meta(terms: Mapping[str, LossTerm], width: int) -> Any:
    """A copy of a loss whose modules are built, without weights."""
    built = nn.ModuleDict(copy.deepcopy(dict(terms)))
    with torch.random.fork_rng(devices=[]):
        for term in built.values():
            cast(LossTerm, term).build(width)
    return built.to("meta")


def trained_on_meta(model: Pretrained, terms: Mapping[str, LossTerm]) -> tuple[Networks, Any]:
    """The networks that a loss trains, and the modules that it owns, without weights."""
    return networks_on_meta(model, roles_of(terms)), terms_on_meta(terms, model.limits.width)


class _Shapes:
    """`Draws` without numbers."""

    def noise(self, purpose: str, like: Tensor) -> Tensor:
        return torch.empty_like(like, dtype=torch.float32)

    def index(self, purpose: str, low: int, high: int, batch: int) -> Tensor:
        return torch.zeros(batch, dtype=torch.int64)


FORMULAS: dict[Any, Any] = flop_registry | {torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm]}
"""Numbers of operations by function: torch's own, and of a product that is added in place."""


class _Described(NamedTuple):
    """Shape of a tensor on the meta device."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


_ShapesOfResults = dict[tuple[Any, ...], _Described]
"""The result's shape by an operation and its arguments."""


def _described(argument: Any) -> Any:
    """A hashable description of an operation's argument."""
    if isinstance(argument, Tensor) and argument.device.type == "meta":
        return _Described(tuple(argument.shape), argument.stride(), argument.dtype)
    if isinstance(argument, Tensor):
        return id(argument), argument
    return tuple(map(_described, argument)) if isinstance(argument, list | tuple) else argument


class _Meter(TorchDispatchMode):
    """Adds up operations, and follows which tensors are alive.

    Args:
        shapes: shapes of results that are known from earlier updates, filled in.
        weights: tensors that are there already, their gradients too; what is written into them takes no memory either.

    Attributes:
        flop: floating-point operations so far.
        peak: largest number of bytes alive at one time, of tensors made since the meter was switched on.
    """

    def __init__(self, shapes: _ShapesOfResults, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self._shapes = shapes
        self.flop = 0.0
        self.peak = 0
        self._alive = 0
        self._makes_one: dict[Any, bool] = {}
        self._known = {tensor.untyped_storage()._cdata for tensor in weights}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = self._shaped(func, args, kwargs)
        formula: Callable[..., int] | None = FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.flop += formula(*args, **kwargs, out_val=out)
        for tensor in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._follow(tensor)
        return out

    def _shaped(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of an operation. Its shape is remembered: blocks are alike, and finding a shape takes time."""
        if func not in self._makes_one:
            plain = not func._schema.is_mutable and len(func._schema.returns) == 1
            self._makes_one[func] = plain and func._schema.returns[0].alias_info is None
        if func is torch.ops.aten._to_copy.default and args[0].is_meta and str(kwargs.get("device")) == "cpu":
            # Noise levels that a table is read with on the CPU; any will do.
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        leaves = [_described(leaf) for leaf in (*args, *kwargs.items())] if self._makes_one[func] else []
        if not leaves or not any(isinstance(leaf, _Described) for leaf in leaves):
            return func(*args, **kwargs)
        key = (func, *leaves)
        known = self._shapes.get(key)
        if known is not None:
            return torch.empty_strided(known.shape, known.stride, dtype=known.dtype, device="meta")
        out = func(*args, **kwargs)
        described = _described(out)
        if isinstance(described, _Described):
            self._shapes[key] = described
        return out

    def _follow(self, tensor: Tensor) -> None:
        """Count a tensor's memory until nothing refers to it; a view has none of its own."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.device.type != "meta" or key in self._known:
            return
        self._known.add(key)
        self._alive += storage.nbytes()
        self.peak = max(self.peak, self._alive)
        weakref.finalize(storage, self._forget, key, storage.nbytes()).atexit = False

    def _forget(self, key: int, count: int) -> None:
        self._known.discard(key)
        self._alive -= count


LOWERED = {
    getattr(module, name)
    for module, names in (
        (torch, ("matmul", "mm", "bmm", "addmm", "baddbmm", "addbmm", "einsum", "conv1d", "conv2d", "conv3d")),
        (Tensor, ("matmul", "mm", "bmm", "addmm", "baddbmm", "__matmul__", "__rmatmul__")),
        (F, ("linear", "conv1d", "conv2d", "conv3d", "scaled_dot_product_attention")),
    )
    for name in names
}
"""Functions that CUDA's autocast runs in bf16, of those that networks call (PyTorch's documentation of torch.amp)."""
RAISED = {F.layer_norm, F.group_norm, F.softmax, F.mse_loss, F.normalize, torch.softmax, torch.pow, Tensor.pow}
"""Functions that it runs in float32."""


class _AsOnGpu(TorchFunctionMode):
    """bf16 autocast as on CUDA, and attention by a kernel that keeps no matrix of weights.

    Attributes:
        meter: told of attention's operations; set before the mode is entered.
        watching: whether calls come here now; they do not while this mode calls a function itself, as it does for a
            whole backward pass.
    """

    meter: _Meter

    def __init__(self) -> None:
        super().__init__()
        self.watching = False

    def __enter__(self) -> _AsOnGpu:
        self.watching = True
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.watching = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.watching = False
        try:
            if func in LOWERED or func in RAISED:
                dtype = torch.bfloat16 if func in LOWERED else torch.float32
                args, kwargs = tree_map_only(
                    Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, (args, kwargs)
                )
            if func is F.scaled_dot_product_attention:
                names = ("query", "key", "value")
                given = dict(zip(names, args, strict=False)) | {name: kwargs[name] for name in names if name in kwargs}
                return _attention(*given.values(), self.meter)
            return func(*args, **kwargs)
        finally:
            self.watching = True


def _run_in(block: nn.Module, mode: _AsOnGpu) -> None:
    """Let a block run in a mode always: in a backward pass, which the mode calls, checkpointing runs it once more."""
    original = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if mode.watching:
            return original(*args, **kwargs)
        with mode, autocast_on_meta(torch.bfloat16):
            return original(*args, **kwargs)

    block.forward = forward  # type: ignore[method-assign]


class _Attention(torch.autograd.Function):
    """Attention by its shapes; keeps its inputs, its output and a number a row, as fused kernels do."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, meter: _Meter) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        ctx.meter = meter
        meter.flop += sdpa_flop_count(query.shape, _heads_of(query, key), _heads_of(query, value))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, *_ = ctx.saved_tensors
        ctx.meter.flop += 2 * sdpa_flop_count(query.shape, _heads_of(query, key), _heads_of(query, value))
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


_attention: Callable[..., Tensor] = _Attention.apply
"""`_Attention` of query, key, value and meter."""


def _heads_of(query: Tensor, other: Tensor) -> tuple[int, ...]:
    """Shape of keys or values with as many heads as the queries, which may share them."""
    return (*query.shape[:-2], *other.shape[-2:])
