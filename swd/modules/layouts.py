"""Tensors on every layout of weights: whole on each process, or a part of each on every process (DTensors of FSDP2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(module: nn.Module) -> bool:
    """Whether any parameter of a module is divided over processes."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def local_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, without a copy; all of it where it is not divided."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor on every process. A divided one is gathered, so all processes call this at the same time."""
    if isinstance(tensor, DTensor):
        full: Tensor = tensor.full_tensor()
        return full
    return tensor


def gathered(value: Any) -> Any:
    """Whole tensors in the place of divided ones in nested dicts and lists, on the CPU of the first process.

    All processes call it at the same time. Divided tensors are gathered one after the other, so that no device ever
    holds more than one of them whole; other processes get empty ones. What is not divided stays as it is.
    """
    if isinstance(value, DTensor):
        full = whole_tensor(value.detach())
        return full.cpu() if dist.get_rank() == 0 else torch.empty(0, dtype=value.dtype)
    if isinstance(value, Mapping):
        return {key: gathered(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(gathered(each) for each in value)
    return value


def divided_like(value: Tensor, target: Tensor) -> Tensor:
    """A whole tensor, the same on all processes, divided over them as `target` is; itself where that is not divided."""
    if not isinstance(target, DTensor) or isinstance(value, DTensor):
        return value
    placed = value.to(target.device)
    return distribute_tensor(placed, target.device_mesh, target.placements, src_data_rank=None)


@torch.no_grad()
def swap(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Exchange the values of the tensors of each pair; without a copy where they are not divided."""
    for a, b in pairs:
        if isinstance(a, DTensor):  # FSDP computes with the memory that it took at first, so that is what must change
            here, there = local_part(a), local_part(b)
            kept = here.clone()
            here.copy_(there)
            there.copy_(kept)
        else:
            a.data, b.data = b.data, a.data


def reshard(module: nn.Module) -> None:
    """Divide weights again that a forward pass has left whole, so that every parameter is the divided one."""
    for each in module.modules():
        if isinstance(each, FSDPModule):
            each.reshard()
