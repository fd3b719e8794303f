"""Kernels that compute attention: PyTorch's own choice, or another one that is checked against it on the device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from swd.types import UserError

Attention = Literal["native", "cudnn", "flash", "flash3", "sage"]
"""PyTorch's choice; cuDNN's kernel, of PyTorch too; the packages flash-attn, its version for Hopper, sageattention."""

BACKENDS = {"flash": "flash", "flash3": "_flash_3", "sage": "sage"}
"""Names that diffusers has for the packages' kernels."""
TOLERANCES = {"cudnn": 0.01, "flash": 0.01, "flash3": 0.01, "sage": 0.1}
"""Largest root mean square of the difference to attention in float32, as a share of the values'. Ours: kernels that
compute in bf16 round to 1 in 256, and sage multiplies in 8 bits (its paper, arXiv 2410.02367, table 9, has 2 to 5%)."""
LENGTH = 256
"""Tokens of the check: more than one tile of any of these kernels has."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of query, key and value `[B, heads, L, D]`."""

_process = ExitStack()


def use_attention(network: Any, kind: Attention, device: torch.device) -> None:
    """Let a network compute attention by a kernel, after it was compared with attention in float32 on the device.

    Args:
        network: the denoising network, of diffusers.
        kind: "native" changes nothing. "cudnn" holds for the process, since a backward pass may compute blocks again;
            where cuDNN has no kernel for a mask, PyTorch chooses another.
        device: where the network will compute; on the CPU, where exports are compared, PyTorch chooses.

    Raises:
        UserError: without the package, for a network that does not take other kernels, or where
            the kernel's values differ.
    """
    if kind == "native" or device.type != "cuda":
        return
    if kind == "cudnn":
        check_kernel(kind, cudnn_alone, head_width(network), device)
        prefer_cudnn()
        return
    if not takes_kernels(network):
        raise UserError(
            f"model.attention={kind}: {type(network).__name__} of diffusers computes attention by PyTorch alone; use "
            "model.attention=cudnn, or leave it out"
        )
    try:
        network.set_attention_backend(BACKENDS[kind])
    except (RuntimeError, ImportError, ValueError) as error:
        raise UserError(f"model.attention={kind} is not usable here ({str(error).splitlines()[0][:160]})") from None
    check_kernel(kind, by_diffusers(BACKENDS[kind]), head_width(network), device)


def check_gpu(kind: Attention) -> None:
    """Raise UserError for a kernel that needs an NVIDIA GPU on a machine without one."""
    if kind != "native" and not torch.cuda.is_available():
        raise UserError(f"model.attention={kind} needs an NVIDIA GPU, and this machine has none; leave it out")


def takes_kernels(network: nn.Module) -> bool:
    """Whether some layer of a network asks diffusers for a kernel by name; `set_attention_backend` changes no other."""
    return any(hasattr(getattr(module, "processor", None), "_attention_backend") for module in network.modules())


def head_width(network: Any) -> int:
    """Channels of an attention head; 64 where the configuration does not say."""
    width = network.config.get("attention_head_dim")
    return width if isinstance(width, int) else 64


def cudnn_alone(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention by cuDNN; RuntimeError where it has no kernel."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(query, key, value)


def by_diffusers(name: str) -> Attend:
    """Attention by a kernel of diffusers' names."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        swapped = (tensor.transpose(1, 2) for tensor in (query, key, value))
        found: Tensor = dispatch_attention_fn(*swapped, backend=AttentionBackendName(name))
        return found.transpose(1, 2)

    return attend


def prefer_cudnn() -> None:
    """Let PyTorch choose cuDNN's kernel first, in this process from now on."""
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    _process.close()
    _process.enter_context(sdpa_kernel(order, set_priority=True))


def check_kernel(kind: str, attend: Attend, width: int, device: torch.device) -> None:
    """Compare a kernel's values, and but for sage its gradients, with attention in float32.

    Raises:
        UserError: if they differ by more than `TOLERANCES`, or the kernel does not run.
    """
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(2, 4, LENGTH, width, generator=generator).to(device, torch.bfloat16) for _ in range(3)]
    backward = kind != "sage"
    try:
        found = _values(attend, given, backward)
    except (RuntimeError, ImportError, ValueError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise UserError(f"model.attention={kind} does not run on this device ({reason}); leave it out") from None
    expected = _values(F.scaled_dot_product_attention, [tensor.float() for tensor in given], backward)
    for one, other in zip(found, expected, strict=True):
        apart = float((one.float() - other).square().mean().sqrt() / other.square().mean().sqrt())
        if not apart <= TOLERANCES[kind]:
            raise UserError(
                f"model.attention={kind} differs from PyTorch's own attention by {apart:.2g} of its values on this "
                f"device, and {TOLERANCES[kind]:g} is what rounding explains; leave it out"
            )


def _values(attend: Attend, given: list[Tensor], backward: bool) -> list[Tensor]:
    """The output, and on request the gradients of its squares' sum with respect to query, key and value."""
    leaves = [tensor.detach().requires_grad_(backward) for tensor in given]
    with torch.set_grad_enabled(backward):
        out = attend(*leaves)
        gradients = torch.autograd.grad(out.float().square().sum(), leaves) if backward else ()
    return [out.detach(), *gradients]
