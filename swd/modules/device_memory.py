"""Bytes that a training keeps on each device: weights by role, gradients and moments, encoders; counted from shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from swd.modules.networks import Networks, SeparateCopies
from swd.modules.pretrained import Pretrained

PER_TRAINED = 16
"""Bytes of a trained parameter: float32 weight, gradient and AdamW's two moments."""
SPARE = 0.1
"""Share of a device's memory that no count fills: CUDA's context and its libraries' work space take 1 to 2 GB, and the
allocator leaves gaps between tensors whose sizes change with the step of the schedule. A tenth is ours, nothing was
measured: with too much, activations are recomputed that would have fit; with too little, the run ends."""


@dataclass(frozen=True)
class Kept:
    """Bytes on a device for as long as a training runs.

    Attributes:
        base: the frozen network that plays all roles, with its buffers.
        trained: weights, gradients and moments of what each trained role adds, and of the losses' own heads.
    """

    base: int
    trained: dict[str, int]

    @property
    def total(self) -> int:
        """All of them."""
        return self.base + sum(self.trained.values())

    @property
    def gradients(self) -> int:
        """Gradients alone: what several processes exchange, and hold in buffers once more."""
        return sum(self.trained.values()) // 4


def kept(networks: Networks, heads: nn.Module | None = None) -> Kept:
    """What each device keeps where every device has a whole copy.

    Args:
        networks: with or without weights; their dtypes count.
        heads: modules of the losses.
    """
    frozen = [*(p for p in networks.backbone.parameters() if not p.requires_grad), *networks.backbone.buffers()]
    trained: dict[str, int] = {
        role: PER_TRAINED * sum(p.numel() for p in networks.role_parameters(role)) for role in networks.roles
    }
    own = list(heads.parameters()) if heads is not None else []
    if own:
        trained["heads"] = PER_TRAINED * sum(p.numel() for p in own)
    return Kept(size_of(frozen), trained)


def kept_divided(networks: Networks, shards: int, heads: nn.Module | None = None) -> tuple[int, int]:
    """What each of `shards` devices keeps of networks that are divided over them (`trainer=fsdp`).

    Returns:
        Bytes at the peak, and those of them that are whole: buffers, and for the time that they run two neighbouring
        blocks and what lies outside of blocks.
    """
    backbones = [networks.backbone]
    if isinstance(networks, SeparateCopies):
        backbones += [networks.backbone_of(role) for role in networks.roles]
    buffers = size_of(buffer for backbone in backbones for buffer in backbone.buffers())
    blocks = [size_of(block.parameters()) for block in networks.backbone.repeated_blocks]
    rest = size_of(networks.backbone.parameters()) - sum(blocks)
    pair = max(a + b for a, b in pairwise(blocks)) if len(blocks) > 1 else sum(blocks)
    whole = kept(networks, heads)
    copies = sum(size_of(backbone.buffers()) for backbone in backbones[1:])
    divided = (whole.total - buffers + copies) // shards
    return divided + buffers + pair + rest, buffers + pair + rest


def permanent_parts(
    networks: Networks,
    heads: nn.Module | None = None,
    processes: int = 1,
    shards: int | None = None,
    average: bool = False,
) -> dict[str, int]:
    """Bytes on each device for as long as a training runs, without encoders, by what they are for.

    Args:
        networks: with or without weights; their dtypes count.
        heads: modules of the losses.
        processes: of the training; several exchange gradients, through buffers of their own.
        shards: devices that weights, gradients and moments are divided over; None: each has all of them.
        average: whether there is an average of the student's weights.
    """
    found = kept(networks, heads)
    averaged = found.trained["student"] * 4 // PER_TRAINED if average else 0  # float32, without gradient and moments
    extra = {"average of the student's weights": averaged // (shards or 1)} if average else {}
    if shards is not None:
        total, whole = kept_divided(networks, shards, heads)
        divided = f"a share of 1/{shards} of all weights, gradients, moments"
        return {divided: total - whole, "whole at a time": whole} | extra
    what = "copy" if isinstance(networks, SeparateCopies) else "LoRA"
    named = {"heads": "heads of the loss"} | {str(role): f"{role}: {what}" for role in networks.roles}
    parts = {"base, one for all roles": found.base}
    parts |= {f"{named[part]}, gradients, moments": count for part, count in found.trained.items()}
    return parts | extra | ({"buffers of gradients between GPUs": found.gradients} if processes > 1 else {})


def usable(memory: float, spare: float | None = None) -> float:
    """Bytes of a device with `memory` that may be filled; `spare` is the share that may not, None: `SPARE`."""
    return memory * (1 - (SPARE if spare is None else spare))


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def encoder_bytes(model: Pretrained) -> dict[str, int]:
    """Bytes of the VAE and of each text encoder on a device, by the part's name; from their configurations alone."""
    base = model.dtype() if model.precision != "auto" else torch.bfloat16
    found: dict[str, int] = {}
    for part in ("vae", *model.backbone_class.encoders_type.text_encoders):
        if part not in model.files.parts:
            continue
        module = _without_weights(model.files.class_of(part), model.files.config(part))
        dtype = model.vae_dtype(base, kept=True) if part == "vae" else base
        found[part] = size_of(module.to(dtype).parameters())
    return found


def _without_weights(kind: Any, config: Mapping[str, Any]) -> nn.Module:
    """A model of diffusers or transformers on the meta device."""
    with torch.device("meta"):
        module: nn.Module
        if hasattr(kind, "from_config"):
            module = kind.from_config(dict(config))
        else:
            module = kind(kind.config_class.from_dict(dict(config)))
    return module


def cache_bytes(model: Pretrained, sizes: Iterable[tuple[int, ...]], number: int = 2, posterior: bool = True) -> int:
    """Bytes of one encoded sample on disk: latents at every size, and the text.

    Args:
        model: whose latents and text.
        sizes: latent sizes, each stored once.
        number: bytes of one number.
        posterior: whether mean and deviation are stored, or one of them.
    """
    latents = sum(torch.Size(size).numel() for size in set(sizes)) * model.channels * (2 if posterior else 1)
    text = model.backbone_class.random_conditioning(model.network_config, 1, model.text_tokens)
    values = text.embeds.numel() + (0 if text.pooled is None else text.pooled.numel())
    return number * (latents + values)
