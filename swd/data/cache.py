"""Stored form of an encoded sample: text conditioning without its zeros, and VAE posteriors.

Values are stored in float32, bf16, or 8 bits with one scale per row (per channel for latents).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from swd.data.shards import CorruptSample
from swd.types import Conditioning, Size

Precision = Literal["fp32", "bf16", "int8"]

TEXT = "text.safetensors"
MOST_VALUES = 2**27
"""Values of one text at most: 64 times those of FLUX.1, 512 tokens of width 4096. A file with more is damaged."""
_INFINITE = {
    "F32": (np.int32, np.uint32, 0x7F800000, 0xFF800000),
    "BF16": (np.int16, np.uint16, 0x7F80, 0xFF80),
    "F16": (np.int16, np.uint16, 0x7C00, 0xFC00),
}
"""For each floating-point type: integer types of its width, and infinity and minus infinity as such integers."""
_MOST_SCALE = torch.finfo(torch.float32).max / 128
"""With a larger scale, 8-bit values would leave the range of float32."""
_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}


def latents_name(size: Size) -> str:
    """Ending of the file that holds the posterior at a latent size.

    >>> latents_name((64, 80))
    '64x80.safetensors'
    """
    return f"{'x'.join(map(str, size))}.safetensors"


# Precision


def store(name: str, values: Tensor, precision: Precision) -> dict[str, Tensor]:
    """Tensors to write for `values` `[rows, ...]`; in 8 bits with one scale for each row."""
    if precision != "int8":
        return {name: values.to(torch.float32 if precision == "fp32" else torch.bfloat16).contiguous()}
    flat = values.float().flatten(1)
    scale = (flat.abs().amax(1) / 127).clamp(min=1e-30) if flat.numel() else torch.ones(len(flat))
    small = (flat / scale[:, None]).round().clamp(-127, 127).to(torch.int8).view_as(values)
    return {name: small.contiguous(), f"{name}_scale": scale}


def restore(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """The inverse of `store`, in the stored dtype; in float32 if that is 8 bits."""
    values = tensors[name]
    scale = tensors.get(f"{name}_scale")
    return values if scale is None else values.float() * scale.view(-1, *([1] * (values.ndim - 1)))


# Text


def pack_text(conditioning: Conditioning, precision: Precision) -> bytes:
    """One prompt's conditioning without zeros and masked rows, such as columns that CLIP does not fill, and padding.

    Each row of `embeds` is kept up to its last value that is not zero; neighbouring rows of equal width are stored
    together. This removes the padding of every family and loses nothing else.

    Args:
        conditioning: conditioning of one prompt, one row.
        precision: precision of the embeddings; masks and time ids are exact.

    Raises:
        CorruptSample: if a value is not finite.
    """
    embeds = conditioning.embeds[0].cpu()
    mask = None if conditioning.mask is None else conditioning.mask[0].cpu()
    if mask is not None:
        embeds = embeds * mask[:, None].to(embeds)
    widths = ((embeds != 0) * torch.arange(1, embeds.shape[1] + 1)).amax(1)
    runs, counts = torch.unique_consecutive(widths, return_counts=True)
    tensors = {"shape": torch.tensor(embeds.shape), "runs": torch.stack([counts, runs], 1)}
    for i, part in enumerate(embeds.split(counts.tolist())):
        tensors |= store(f"embeds{i}", part[:, : runs[i]], precision)
    if conditioning.pooled is not None:
        tensors |= store("pooled", conditioning.pooled.cpu(), precision)
    if conditioning.time_ids is not None:
        tensors["time_ids"] = conditioning.time_ids.cpu().float()
    if mask is not None:
        tensors["mask"] = mask.to(torch.uint8)
    return _packed(tensors, "text")


# Latents


def pack_latents(mean: Tensor, std: Tensor | None, precision: Precision) -> bytes:
    """Mean and standard deviation `[C, *size]` of one sample as bytes; `std` is None for a deterministic encoder.

    Raises:
        CorruptSample: if a value is not finite.
    """
    tensors = store("mean", mean.cpu(), precision)
    if std is not None:
        tensors |= store("std", std.cpu(), precision)
    return _packed(tensors, f"latents of {'x'.join(map(str, mean.shape[1:]))}")


def _packed(tensors: dict[str, Tensor], kind: str) -> bytes:
    """The bytes of a safetensors file; values that are not finite are refused, since they would ruin a training."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CorruptSample(f"{kind}: {name} has values that are not finite")
    return bytes(save(tensors))


def relative_error(values: Tensor, precision: Precision) -> tuple[float, float]:
    """Squared error of storing `values` in a precision, and their squared norm; to be summed over samples."""
    back = restore("v", store("v", values, precision)).float()
    return (back - values.float()).square().sum().item(), values.float().square().sum().item()


# Batches


class Assembler:
    """Writes packed samples directly into the tensors of one batch, so that each value is copied only once.

    Args:
        rows: number of samples in the batch.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._text: dict[str, Tensor] = {}
        self._latents: dict[Size, tuple[Tensor, Tensor]] = {}

    def text(self, row: int, data: NDArray[np.uint8]) -> None:
        """Put a packed text into a row.

        Raises:
            CorruptSample: if it is damaged, or has another shape than the other rows; texts with a mask may have
                other numbers of tokens.
        """
        tensors = view(data)
        try:
            shape = tensors["shape"].tolist()
            first = tensors["embeds0"].dtype
            runs = tensors["runs"].tolist()
            whole = all(count >= 0 and 0 <= columns <= shape[1] for count, columns in runs)
            if not whole or sum(count for count, _ in runs) != shape[0] or not 0 < math.prod(shape) <= MOST_VALUES:
                raise CorruptSample(f"a text of shape {shape} with rows {runs[:3]} is none")
            dtype = torch.bfloat16 if first == torch.int8 else first
            tokens = self._room(shape[0]) if "mask" in tensors else shape[0]
            embeds = self._row("embeds", [tokens, shape[1]], dtype, row)
            start = 0
            for i, (count, columns) in enumerate(runs):
                copy(embeds[start : start + count, :columns], restore(f"embeds{i}", tensors))
                embeds[start : start + count, columns:] = 0
                start += count
            embeds[start:] = 0
            if "pooled" in tensors:
                pooled = restore("pooled", tensors)[0]
                self._row("pooled", pooled.shape, dtype, row).copy_(pooled)
            if "time_ids" in tensors:
                value = tensors["time_ids"].squeeze(0)
                self._row("time_ids", value.shape, torch.float32, row).copy_(value)
            if "mask" in tensors:
                mask = self._row("mask", [tokens], torch.int64, row)
                mask[: shape[0]] = tensors["mask"].squeeze(0)
                mask[shape[0] :] = 0
        except (KeyError, RuntimeError, ValueError, TypeError, IndexError) as error:
            raise CorruptSample(f"texts do not belong to one cache ({str(error)[:80]})") from None

    def _room(self, tokens: int) -> int:
        """Number of tokens that the batch's texts have room for, at least so many; new ones are masked."""
        found = {name: self._text[name] for name in ("embeds", "mask") if name in self._text}
        if len(found) < 2:
            return tokens
        missing = tokens - found["mask"].shape[1]
        if missing > 0:
            self._text["embeds"] = F.pad(found["embeds"], (0, 0, 0, missing))
            self._text["mask"] = F.pad(found["mask"], (0, missing))
        return self._text["mask"].shape[1]

    def _row(self, name: str, shape: Sequence[int], dtype: torch.dtype, row: int) -> Tensor:
        if name not in self._text:
            self._text[name] = memory((self.rows, *shape), dtype)
        whole = self._text[name]
        if tuple(whole.shape[1:]) != tuple(shape) or whole.dtype != dtype:
            raise CorruptSample(f"texts do not belong to one cache ({tuple(shape)} beside {tuple(whole.shape[1:])})")
        return whole[row]

    def latents(self, row: int, size: Size, data: NDArray[np.uint8]) -> None:
        """Put packed latents of a size into a row; the deviation is zero if none is stored.

        Raises:
            CorruptSample: if they are damaged, or have another shape than the other rows.
        """
        tensors = view(data)
        try:
            mean = restore("mean", tensors)
            std = restore("std", tensors) if "std" in tensors else None
        except KeyError as error:
            raise CorruptSample(f"latents lack {error}") from None
        if size not in self._latents:
            shape = (self.rows, *mean.shape)
            zero = torch.zeros((), dtype=mean.dtype).expand(shape)
            std_memory = zero if std is None else memory(shape, mean.dtype)
            self._latents[size] = memory(shape, mean.dtype), std_memory
        means, stds = self._latents[size]
        if mean.shape != means.shape[1:] or (std is not None and std.shape != mean.shape):
            raise CorruptSample(f"latents of {tuple(mean.shape)} beside {tuple(means.shape[1:])}")
        copy(means[row], mean)
        if std is not None:
            copy(stds[row], std)

    def conditioning(self) -> Conditioning:
        """The texts, B rows."""
        return Conditioning(**self._text)

    def posteriors(self) -> dict[Size, tuple[Tensor, Tensor]]:
        """Mean and standard deviation `[B, C, *size]` by size."""
        return self._latents


def memory(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor in NumPy's memory, whose large arrays get huge pages: their first use is much faster."""
    count = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.empty(count, np.uint8)).view(dtype).view(*shape)


def copy(target: Tensor, values: Tensor) -> None:
    """Copy in the calling thread; torch would use its thread pool, which training needs."""
    if target.dtype != values.dtype:
        target.copy_(values)
        return
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[target.itemsize]
    if target.shape != values.shape:
        raise RuntimeError(f"{tuple(values.shape)} beside {tuple(target.shape)}")
    np.copyto(target.view(whole).numpy(), values.view(whole).numpy())


def view(data: NDArray[np.uint8]) -> dict[str, Tensor]:
    """Tensors of a safetensors file in memory, without a copy.

    Raises:
        CorruptSample: if it is no safetensors file, or has values that are not finite.
    """
    try:
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        header: dict[str, Any] = json.loads(data[8:start].tobytes())
        header.pop("__metadata__", None)
        found = {}
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            part = data[start + first : start + last]
            if entry["dtype"] in _INFINITE and not _is_finite(part, entry["dtype"]):
                raise CorruptSample(f"{name} has values that are not finite")
            found[name] = torch.from_numpy(part).view(_DTYPES[entry["dtype"]]).view(entry["shape"])
            if name.endswith("_scale") and found[name].abs().max() > _MOST_SCALE:
                raise CorruptSample(f"{name} makes values that are not finite")
        return found
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError, OverflowError) as error:
        raise CorruptSample(f"no safetensors file ({str(error)[:80]})") from None


def _is_finite(data: NDArray[np.uint8], dtype: str) -> bool:
    """Whether all floating-point values in memory are finite; takes no longer than reading them.

    Read as integers of the same width, infinity and NaN are larger than all finite values of the same sign.
    """
    signed, unsigned, infinity, negative = _INFINITE[dtype]
    if not len(data):
        return True
    return int(data.view(signed).max()) < infinity and int(data.view(unsigned).max()) < negative
