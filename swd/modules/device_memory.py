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
