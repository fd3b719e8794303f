"""Small data classes and protocols that the rest of the package shares."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, cast

# torch takes over a second to import; help and messages about wrong keys need this module and not torch.
if TYPE_CHECKING:
    import torch
    from torch import Tensor

Size = tuple[int, ...]
"""Latent side lengths: (H, W) for images, (F, H, W) for video."""

Role = Literal["student", "fake", "teacher"]
"""A part that the network plays: the few-step student, the fake score (fake network), the frozen teacher."""

Checks: TypeAlias = "dict[str, Tensor]"
"""Boolean scalars: whether a value is finite, by the value's name in messages; a cause stands before its effects."""


class UserError(ValueError):
    """Wrong input. The message is one line with the mistake, the value and the fix; the exit code is 2."""


class WrongProcess(UserError):
    """A schedule's noise levels are of another process than the model's.

    Args:
        process: of the schedule.
        needed: of the model.
        full_size: whether all steps of the schedule have one size.
    """

    def __init__(self, process: str, needed: str, full_size: bool) -> None:
        super().__init__(
            f"schedule.process={process}, but this model's noise levels are of the process {needed}; give sigmas of "
            f"that process and schedule.process={needed}"
        )
        self.needed = needed
        self.full_size = full_size


@dataclass(frozen=True)
class Conditioning:
    """Input of a network besides the noised latent and its level: the encoded text and what goes with it.

    Attributes:
        embeds: text token embeddings `[B, L, D]`.
        pooled: pooled text embedding `[B, P]`, or None for families without one.
        time_ids: SDXL's micro-conditioning in pixels `[B, 6]`: original size, crop, target size; None elsewhere.
        mask: 1 for text tokens that the network attends to, 0 for padding `[B, L]`; None where it attends to all.
    """

    embeds: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    mask: Tensor | None = None

    def __len__(self) -> int:
        return self.embeds.shape[0]

    def map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        """Apply `function` to every tensor."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: function(v) for k, v in values.items() if v is not None})

    def rows(self, index: slice | list[int]) -> Conditioning:
        """Some of the B rows: a view of them for a slice, a copy for a list of their numbers."""
        return self.map(lambda tensor: tensor[index])

    def to(self, *args: Any) -> Conditioning:
        """Move or cast every tensor, as `Tensor.to` does."""
        return self.map(lambda tensor: tensor.to(*args))

    def unpadded(self) -> Conditioning:
        """A single row without the tokens at its end that are masked and zero: padding to others' length."""
        if self.mask is None:
            return self
        kept = ((self.mask[0] != 0) | self.embeds[0].any(1)).nonzero()
        length = int(kept.max()) + 1 if len(kept) else 1
        return replace(self, embeds=self.embeds[:, :length], mask=self.mask[:, :length])

    def expand(self, batch: int) -> Conditioning:
        """Repeat a single row (the empty prompt) to `batch` rows without copying memory."""
        return self.map(lambda tensor: tensor.expand(batch, *tensor.shape[1:]))

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Stack several conditionings along the batch axis; shorter texts are padded with masked tokens.

        Raises:
            UserError: if only some of them have a pooled text or sizes, or texts of several lengths have no mask, so
                that the network would attend to padding.
        """
        import torch

        parts = _of_one_length(parts)
        first = parts[0]
        values = {}
        for name in (f.name for f in fields(first)):
            tensors = [tensor for part in parts if (tensor := getattr(part, name)) is not None]
            if len(tensors) not in (0, len(parts)):
                raise UserError(f"encoded texts cannot be stacked: only some of them have {name}; encode them alike")
            if tensors:
                values[name] = torch.cat(tensors)
        return replace(first, **values)


def _of_one_length(parts: Sequence[Conditioning]) -> Sequence[Conditioning]:
    """The conditionings, padded to the length of the longest text, and all with a mask if any has one."""
    import torch.nn.functional as F

    lengths = [part.embeds.shape[1] for part in parts]
    masks = [part.mask for part in parts if part.mask is not None]
    if len(set(lengths)) == 1 and len(masks) in (0, len(parts)):
        return parts
    if not masks:
        found = " and ".join(map(str, sorted(set(lengths))))
        raise UserError(f"encoded texts of {found} tokens without a mask cannot be stacked; encode them to one length")
    padded = []
    for part, length in zip(parts, lengths, strict=True):
        mask = part.embeds.new_ones(part.embeds.shape[:2]).to(masks[0].dtype) if part.mask is None else part.mask
        missing = max(lengths) - length
        embeds = F.pad(part.embeds, (0, 0, 0, missing))
        padded.append(replace(part, embeds=embeds, mask=F.pad(mask, (0, missing))))
    return padded


@dataclass(frozen=True)
class Cached:
    """Outputs of the encoders for a batch, read back from a cache.

    Attributes:
        conditioning: B rows.
        posteriors: mean and standard deviation `[B, C, *size]` of the network's latents, by latent size; only the sizes
            that the iteration needs.
    """

    conditioning: Conditioning
    posteriors: dict[Size, tuple[Tensor, Tensor]]

    def to(self, *args: Any) -> Cached:
        """Move or cast every tensor, as `Tensor.to` does."""
        return self.map(lambda tensor: moved(tensor, *args))

    def map(self, function: Callable[[Tensor], Tensor]) -> Cached:
        """Apply `function` to every tensor."""
        changed = {size: (function(mean), function(std)) for size, (mean, std) in self.posteriors.items()}
        return Cached(self.conditioning.map(function), changed)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Base of the two kinds of training batches, `PictureBatch` and `CachedBatch`.

    Attributes:
        prompts: B captions.
        bucket: size in pixels (H, W) of finished pictures where data come in several aspect ratios; None: the
            schedule's own.
        skipped: names of samples that could not be read and were replaced by others.
    """

    prompts: list[str]
    bucket: Size | None = None
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.prompts)

    def to(self, *args: Any) -> Batch:
        """Move or cast every tensor, as `Tensor.to` does."""
        raise NotImplementedError

    def pin_memory(self) -> Batch:
        """The same batch in memory from which a GPU copies while this process goes on; loaders call it."""
        raise NotImplementedError


@dataclass(frozen=True)
class PictureBatch(Batch):
    """A batch whose pictures and prompts have yet to be encoded.

    Attributes:
        pixels: full-resolution images `[B, 3, H, W]` or videos `[B, 3, F, H, W]`: in [-1, 1], or bytes as a loader
            gives them, a quarter of the memory. `to` makes the former of the latter.
    """

    pixels: Tensor

    def to(self, *args: Any) -> PictureBatch:
        """Move or cast the pixels, as `Tensor.to` does; bytes are moved as they are, and then put into [-1, 1]."""
        import torch

        if self.pixels.dtype != torch.uint8:
            return replace(self, pixels=moved(self.pixels, *args))
        like = torch.empty(0, device=self.pixels.device).to(*args)  # where pixels are to be, and in which dtype
        return replace(self, pixels=in_unit_range(moved(self.pixels, like.device)).to(like.dtype))

    def pin_memory(self) -> PictureBatch:
        return replace(self, pixels=self.pixels.pin_memory())


@dataclass(frozen=True)
class CachedBatch(Batch):
    """A batch that was encoded before.

    Attributes:
        cached: conditioning and latents.
    """

    cached: Cached

    def to(self, *args: Any) -> CachedBatch:
        """Move or cast every tensor, as `Tensor.to` does."""
        return replace(self, cached=self.cached.to(*args))

    def pin_memory(self) -> CachedBatch:
        return replace(self, cached=self.cached.map(lambda tensor: tensor.pin_memory()))


def moved(tensor: Tensor, *args: Any) -> Tensor:
    """`tensor.to(*args)`; a copy from the CPU to a device does not wait for what the device still does."""
    found: Tensor = cast(Any, tensor).to(*args, non_blocking=tensor.device.type == "cpu")
    return found


def in_unit_range(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1], float32: of bytes `value / 127.5 - 1`, on their device; others are returned as they are."""
    import torch

    if pixels.dtype != torch.uint8:
        return pixels
    # As a tensor: a GPU multiplies by the inverse of a plain number, which rounds in another way than the CPU divides.
    half = torch.full((), 127.5, device=pixels.device)
    return pixels.float().div_(half).sub_(1)


def stacked(pictures: Sequence[Tensor]) -> Tensor:
    """Pictures as one tensor: of bytes if all are, else in [-1, 1]."""
    import torch

    kinds = {picture.dtype for picture in pictures}
    return torch.stack([*pictures] if len(kinds) == 1 else [in_unit_range(picture) for picture in pictures])


@dataclass(frozen=True)
class Noised:
    """A latent after noising: `x_t` `[B, C, *size]` at noise level `sigma` `[B]`."""

    x_t: Tensor
    sigma: Tensor


class Draws(Protocol):
    """Source of every random number that an update needs; tests feed stored numbers through it."""

    def noise(self, purpose: str, like: Tensor) -> Tensor:
        """Standard Gaussian noise, float32, of the shape and on the device of `like` `[B, ...]`."""
        ...

    def index(self, purpose: str, low: int, high: int, batch: int) -> Tensor:
        """One integer per sample, uniform on low..high, both included: `[B]` int64 on the CPU."""
        ...


class NoiseStore(Protocol):
    """Noise that was drawn before it is asked for."""

    def take(self, draws: SeededDraws, purpose: str, shape: tuple[int, ...]) -> Tensor | None:
        """Noise on the CPU, which is then no longer here; None if it is not."""
        ...


@dataclass(frozen=True)
class SeededDraws:
    """Draws that depend only on (seed, iteration, update, purpose, position in the global batch).

    Neither resuming nor another number of processes or workers changes them. They are made on the CPU, so that the
    device does not change them either.

    Attributes:
        seed: the run's seed.
        iteration: generator update counter k, from 0.
        update: 0..n_fake - 1 for critic updates, n_fake for the generator update.
        first: position of this process's first sample in the global batch.
        ahead: holds noise that was drawn before it is asked for; None: none was.
    """

    seed: int
    iteration: int = 0
    update: int = 0
    first: int = 0
    ahead: NoiseStore | None = field(default=None, compare=False, repr=False)

    def noise(self, purpose: str, like: Tensor) -> Tensor:
        shape = tuple(like.shape)
        found = None if self.ahead is None else self.ahead.take(self, purpose, shape)
        found = self.drawn(purpose, shape, like.is_cuda) if found is None else found
        return found.to(like.device, non_blocking=True)

    def drawn(self, purpose: str, shape: tuple[int, ...], pinned: bool = False) -> Tensor:
        """The noise of `noise`, on the CPU; `pinned` memory is copied to a GPU without waiting."""
        import torch

        drawn = torch.empty(shape, dtype=torch.float32, device="cpu", pin_memory=pinned)
        for row, generator in zip(drawn, self._generators(purpose, shape[0]), strict=True):
            row.normal_(generator=generator)
        return drawn

    def index(self, purpose: str, low: int, high: int, batch: int) -> Tensor:
        import torch

        drawn = torch.empty(batch, dtype=torch.int64, device="cpu")
        for row, generator in zip(drawn, self._generators(purpose, batch), strict=True):
            row.random_(low, high + 1, generator=generator)
        return drawn

    def _generators(self, purpose: str, batch: int) -> Iterator[torch.Generator]:
        """For each sample in turn, one generator seeded anew: making one costs more than the draw of a small latent."""
        import torch

        generator = torch.Generator()
        for row in range(batch):
            key = f"{self.seed}/{purpose}/{self.iteration}/{self.update}/{self.first + row}"
            yield generator.manual_seed(stable_hash(key.encode()))


def stable_hash(data: bytes) -> int:
    """A 63-bit hash that is the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


def check_shape(name: str, tensor: Tensor, expected: Sequence[int | None]) -> None:
    """Raise ValueError that states the expected and the actual shape; None in `expected` matches anything."""
    actual = tuple(tensor.shape)
    if len(actual) != len(expected) or any(e is not None and a != e for a, e in zip(actual, expected, strict=True)):
        raise ValueError(f"{name} has shape {actual}, expected {tuple(expected)} (None: any)")
