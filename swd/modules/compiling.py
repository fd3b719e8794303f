"""Regional compilation: a network's repeated blocks, once for each role, gradient mode and kind of block."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable

import torch
from torch import nn
from torch.fx.experimental import _config as fx_config

from swd.modules.networks import Networks
from swd.types import UserError

GRAPHS = 64
"""Graphs that the code of a block may have before torch raises: three roles, with and without gradients, for each kind
of block in a network, of which the first counts as one of its own. Torch's own limit is 8, after which it runs the rest
uncompiled without an error; a tiny SD3 of three blocks has 18."""


def compile_blocks(networks: Networks, backend: str = "inductor") -> None:
    """Let the blocks of all roles of a training run compiled code: `compile_in_place` of each."""
    backbones = [networks.backbone_of(role) for role in ("teacher", *networks.roles)]
    compile_in_place((block for backbone in backbones for block in backbone.repeated_blocks), backend)


def compile_in_place(blocks: Iterable[nn.Module], backend: str = "inductor") -> None:
    """Let blocks run compiled code, for any size; a graph is made when it first runs, once for all that are alike.

    A block's hooks, and the checkpointing that calls it, stay outside.

    Args:
        blocks: the modules; one that is there twice is compiled once.
        backend: of `torch.compile`; "aot_eager" traces the same graphs and compiles nothing.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    fx_config.use_duck_shape = False  # or a graph that is made for squares does not take other proportions
    for block in dict.fromkeys(blocks):
        block.forward = torch.compile(block.forward, dynamic=True, backend=backend)  # type: ignore[method-assign]


def check_compiler(given: str) -> None:
    """Raise UserError for a setting, such as "compile=true", that compiles where there is no compiler."""
    names = compilers(torch.cuda.is_available())
    if not any(map(shutil.which, names)):
        raise UserError(
            f"{given} needs a C compiler, and this machine has no {' or '.join(names)}; install g++, or leave it out"
        )


def compilers(gpu: bool) -> tuple[str, ...]:
    """Programs of which `torch.compile` runs one: Triton a C compiler for the GPU, Inductor a C++ one for the CPU."""
    if gpu:
        return (os.environ["CC"],) if os.environ.get("CC") else ("gcc", "clang")
    return (os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"),)
