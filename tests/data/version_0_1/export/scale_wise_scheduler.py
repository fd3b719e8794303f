"""A diffusers scheduler that makes stock pipelines sample scale-wise.

This file stands alone: it needs torch and diffusers only, so that an exported model can carry it along.

    scheduler = ScaleWiseScheduler.from_pretrained(folder)
    scheduler.attach(pipe)
    latents = scheduler.initial_latents(1, channels=16, height=128, width=128, generator=generator)
    pipe(prompt, latents=latents, height=1024, width=1024, num_inference_steps=4, guidance_scale=1.0)

Stable Diffusion 3, SDXL and Wan pipelines also start from `height` and `width` (`num_frames`) of the first size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor

INTERPOLATION = "bicubic"


def upsample(x0: Tensor, size: Sequence[int]) -> Tensor:
    """Resize a clean latent to a larger size (SwD paper, section 3.1).

    Space: bicubic, `align_corners=False`, no antialias. Time (video): linear blending of neighbouring frames with
    the first and the last frame fixed. Equal sizes return the input itself.

    Args:
        x0: clean latent `[B, C, H, W]` or `[B, C, F, H, W]`.
        size: target (H, W) or (F, H, W).
    """
    size = tuple(size)
    if tuple(x0.shape[2:]) == size:
        return x0
    if x0.ndim == 4:
        return F.interpolate(x0, size=size, mode=INTERPOLATION, align_corners=False)
    batch, _, frames = x0.shape[:3]
    flat = x0.transpose(1, 2).flatten(0, 1)
    flat = F.interpolate(flat, size=size[1:], mode=INTERPOLATION, align_corners=False)
    return blend_frames(flat.unflatten(0, (batch, frames)).transpose(1, 2), size[0])


def blend_frames(video: Tensor, frames: int) -> Tensor:
    """Another number of frames, each blended linearly from its neighbours; the first and the last stay.

    Args:
        video: `[B, C, F, H, W]`.
        frames: how many are wanted.
    """
    count = video.shape[2]
    if count == frames:
        return video
    place = torch.linspace(0, count - 1, frames, dtype=torch.float64)
    left = place.floor().long().clamp(max=max(count - 2, 0))
    share = (place - left).to(torch.float32).to(video.device).view(1, 1, -1, 1, 1)
    right = (left + 1).clamp(max=count - 1)
    left, right = left.to(video.device), right.to(video.device)
    return ((1 - share) * video.index_select(2, left) + share * video.index_select(2, right)).to(video.dtype)


@cache
def signal_levels() -> Tensor:
    """`abar` of Stable Diffusion's 1000 steps, float32: betas between 0.00085 and 0.012, linear in their roots."""
    roots = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32)
    return torch.cumprod(1 - roots.square(), 0)


def vp_timestep(sigma: Tensor) -> Tensor:
    """The step of a variance-preserving network at level `sigma`: `min(round(1000 sigma), 999)`, int64."""
    return (1000 * sigma.float()).round().long().clamp(0, 999)


def pack(latents: Tensor) -> Tensor:
    """2x2 patches as tokens, `[B, C, H, W]` to `[B, H/2 * W/2, 4 C]`: how FLUX carries latents."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, height // 2 * (width // 2), 4 * channels)


def unpack(tokens: Tensor, size: Sequence[int]) -> Tensor:
    """The inverse of `pack`, to (H, W)."""
    batch, _, width = tokens.shape
    grid = tokens.view(batch, size[0] // 2, size[1] // 2, width // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(batch, width // 4, size[0], size[1])


def position_ids(size: Sequence[int], device: Any = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """FLUX's position ids `[H/2 * W/2, 3]` of a latent size: zero, row, column."""
    rows, columns = (torch.arange(side // 2, device=device, dtype=dtype) for side in size)
    places = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([torch.zeros_like(places[0]), *places], -1).flatten(0, 1)


@dataclass
class ScaleWiseSchedulerOutput(BaseOutput):
    """Result of one step: the next, possibly larger, noised latent and this step's clean prediction."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class ScaleWiseScheduler(SchedulerMixin, ConfigMixin):
    """Sampler of scale-wise distilled models: predict clean, upsample, noise afresh (SwD paper, section 3.1).

    `step` may return a *larger* sample than it was given. Re-noising draws come from a hash of the signs of each
    sample's own initial latent, so a picture is the same alone or in a batch and follows the caller's generator.

    Args:
        sigmas: noise level of every step, strictly decreasing, the first at most 1.
        sizes: latent side length, (H, W) or (F, H, W) of every step, never decreasing.
        num_train_timesteps: what the network's timestep is at sigma 1.
        divisor: latent side lengths are rounded to a multiple of this when the call's aspect ratio differs.
        interpolation: how clean predictions are upsampled; only "bicubic" is known.
        prediction_type: what the network predicts: "flow", the velocity of rectified flow, or "epsilon", the noise of
            the variance-preserving process (SDXL).

    Raises:
        ValueError: if the schedule is inconsistent, or a pipeline asks for something else than this schedule.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        sigmas: Sequence[float] = (1.0, 0.895900309085846, 0.7370558381080627, 0.602150559425354),
        sizes: Sequence[int | Sequence[int]] = (64, 80, 96, 128),
        num_train_timesteps: int = 1000,
        divisor: int = 1,
        interpolation: str = INTERPOLATION,
        prediction_type: str = "flow",
    ) -> None:
        if prediction_type not in ("flow", "epsilon"):
            raise ValueError(f"prediction_type {prediction_type!r} is not known; use 'flow' or 'epsilon'")
        if interpolation != INTERPOLATION:
            raise ValueError(f"interpolation {interpolation!r} is not known; models are trained with {INTERPOLATION!r}")
        if len(sigmas) != len(sizes):
            raise ValueError(f"{len(sigmas)} sigmas but {len(sizes)} sizes; give one size per sigma")
        self.base_sizes = [(s, s) if isinstance(s, int) else tuple(s) for s in sizes]
        self.keep_x0 = False
        self._planned: list[tuple[int, ...]] = list(self.base_sizes)
        self.set_timesteps(len(sigmas))

    # What pipelines call before the loop

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Start a new sample.

        Args:
            num_inference_steps: must be the schedule's number of steps.
            device: where the timesteps go.
            sigmas: accepted when they are this schedule's, or evenly spaced ones that a pipeline fills in by itself.
            mu: ignored (resolution-dependent shift of other schedulers).
        """
        own = list(self.config.sigmas)
        steps = len(sigmas) if sigmas is not None else num_inference_steps
        if steps is not None and steps != len(own):
            raise ValueError(
                f"num_inference_steps={steps}, but this model was distilled for {len(own)} steps; "
                f"pass num_inference_steps={len(own)}"
            )
        if sigmas is not None and not self._known(sigmas):
            raise ValueError(f"sigmas={list(sigmas)} differ from this model's schedule {own}; leave sigmas out")
        self.sigmas = torch.tensor([*own, 0.0], dtype=torch.float32, device=device)
        self.timesteps = self.config.num_train_timesteps * self.sigmas[:-1]
        if self.config.prediction_type == "epsilon":
            self.timesteps = vp_timestep(self.sigmas[:-1])
        self.num_inference_steps = len(own)
        self.sizes = list(self.base_sizes)
        self.x0_predictions: list[Tensor] = []
        self._step_index = 0
        self._seeds: list[int] = []

    def _known(self, sigmas: Sequence[float]) -> bool:
        given = torch.as_tensor(list(sigmas), dtype=torch.float64)
        n = len(given)
        own = torch.tensor(list(self.config.sigmas), dtype=torch.float64)
        return torch.allclose(given, own, atol=1e-3) or torch.allclose(
            given, torch.linspace(1.0, 1.0 / n, n, dtype=torch.float64), atol=1e-6
        )

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Only 0 is possible: img2img `strength` below 1 would start in the middle of the schedule."""
        if begin_index:
            raise ValueError(f"strength below 1 (begin_index={begin_index}) is not supported: start from pure noise")

    def scale_noise(self, *args: Any, **kwargs: Any) -> Tensor:
        """Image-to-image pipelines call this; a scale-wise model starts from pure noise only."""
        raise ValueError("a scale-wise model starts from pure noise: use the text-to-image pipeline, without strength")

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """Identity: the network takes the noised latent as it is."""
        return sample

    @property
    def step_index(self) -> int:
        """Number of steps done."""
        return self._step_index

    def initial_latents(
        self,
        batch: int,
        channels: int,
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        packed: bool = False,
    ) -> Tensor:
        """Pure noise at the first size, for a pipeline's `latents=`.

        Args:
            batch: number of samples.
            channels: latent channels.
            height, width, frames: *final* latent size; the schedule's own by default. The first size follows.
            generator: one, or one a sample.
            packed: as FLUX's tokens `[B, L, 4 C]`.

        Returns:
            `[B, C, *first_size]` float32, or tokens.

        Raises:
            ValueError: if there are not as many generators as samples.
        """
        final = self.base_sizes[-1]
        sides = (height or final[-2], width or final[-1])
        wanted: tuple[int, ...] = sides if len(final) == 2 else (frames or final[0], *sides)
        first = self._plan(wanted)[0]
        if isinstance(generator, Sequence):
            if len(generator) != batch:
                raise ValueError(f"{len(generator)} generators for {batch} samples; give one each")
            rows = [torch.randn(1, channels, *first, generator=g) for g in generator]
            noise = torch.cat(rows)
        else:
            noise = torch.randn(batch, channels, *first, generator=generator)
        return pack(noise) if packed else noise

    def attach(self, pipe: Any) -> Any:
        """Make a diffusers pipeline sample with this schedule; returns the pipeline.

        FLUX's position ids are made once for the final size; its transformer gets those of each step's own size.
        """
        pipe.scheduler = self
        network = getattr(pipe, "transformer", None)
        if network is not None and hasattr(network.config, "axes_dims_rope"):
            for handle in getattr(network, "_scale_wise_hooks", []):
                handle.remove()  # an earlier schedule's
            hook = network.register_forward_pre_hook(self._refresh_ids, with_kwargs=True)
            network._scale_wise_hooks = [hook]
        return pipe

    def _refresh_ids(self, network: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        ids = kwargs["img_ids"]
        size = self._token_size(kwargs["hidden_states"])
        return args, kwargs | {"img_ids": position_ids(size, ids.device, ids.dtype)}

    def _token_size(self, tokens: Tensor) -> tuple[int, ...]:
        """Latent size of packed tokens at the current step."""
        size = self.sizes[self._step_index] if self._step_index else self._planned[0]
        if size[0] * size[1] != 4 * tokens.shape[1]:
            raise ValueError(
                f"{tokens.shape[1]} tokens are no latent of size {size}: pass latents=initial_latents(...)"
            )
        return size

    # The loop

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        return_dict: bool = True,
        noise: Tensor | None = None,
        **kwargs: Any,
    ) -> ScaleWiseSchedulerOutput | tuple[Tensor, Tensor]:
        """One step: clean prediction at this size, upsampled, noised to the next level.

        Args:
            model_output: what the network predicts, of the shape of `sample`.
            timestep: ignored; steps are counted.
            sample: noised latent `[B, C, *size]`, or FLUX's tokens `[B, L, 4 C]`.
            return_dict: an output object instead of a tuple.
            noise: fresh noise for the next step `[B, C, *next_size]` instead of the one derived from the first latent.

        Returns:
            The next noised latent (the clean prediction after the last step), and this step's clean prediction.
        """
        i = self._step_index
        if i >= self.num_inference_steps:
            raise ValueError(f"step called more than {self.num_inference_steps} times; call set_timesteps first")
        packed, dtype = sample.ndim == 3, sample.dtype
        if packed:
            size = self._token_size(sample)
            sample, model_output = unpack(sample, size), unpack(model_output, size)
        if i == 0:
            self.sizes = self._sizes_for(tuple(sample.shape[2:]))
            self._seeds = [_latent_seed(row) for row in sample]
        x0 = self._to_x0(sample.float(), model_output.float(), i)
        if self.keep_x0:
            self.x0_predictions.append(x0.to(dtype))
        self._step_index = i + 1
        prev = x0 if i + 1 == self.num_inference_steps else self._renoise(x0, i + 1, noise)
        if packed:
            prev, x0 = pack(prev), pack(x0)
        prev, x0 = prev.to(dtype), x0.to(dtype)
        return ScaleWiseSchedulerOutput(prev_sample=prev, pred_original_sample=x0) if return_dict else (prev, x0)

    def _scales(self, i: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """What signal and noise are multiplied by at step `i`."""
        sigma = self.sigmas[i]
        if self.config.prediction_type == "flow":
            return (1 - sigma).to(like.device), sigma.to(like.device)
        abar = signal_levels()[vp_timestep(sigma.cpu())]
        return abar.sqrt().to(like.device), (1 - abar).sqrt().to(like.device)

    def _to_x0(self, sample: Tensor, model_output: Tensor, i: int) -> Tensor:
        signal, noise = self._scales(i, sample)
        if self.config.prediction_type == "flow":
            return sample - noise * model_output
        return (sample - noise * model_output) / signal

    def _renoise(self, x0: Tensor, i: int, noise: Tensor | None) -> Tensor:
        z = upsample(x0, self.sizes[i])
        if noise is None:
            rows = [
                torch.randn(z.shape[1:], generator=torch.Generator().manual_seed((seed + i) % 2**63))
                for seed in self._seeds
            ]
            noise = torch.stack(rows)
        signal, level = self._scales(i, z)
        return signal * z + level * noise.to(z)

    def sizes_ending_at(self, final: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The schedule's sizes, stretched so that they end at exactly `final`.

        Raises:
            ValueError: if a side is no multiple of `divisor`.
        """
        base = self.base_sizes
        if any(side % self.config.divisor for side in final[-2:]):
            raise ValueError(f"size {final}: sides must be multiples of {self.config.divisor}")
        return [*(self._stretched(size, final, base[-1]) for size in base[:-1]), final]

    def _plan(self, final: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Remember the sizes of a call that ends at exactly `final`."""
        self._planned = self.sizes_ending_at(final)
        return self._planned

    def _stretched(self, size: tuple[int, ...], wanted: tuple[int, ...], base: tuple[int, ...]) -> tuple[int, ...]:
        """`size` times wanted / base along each axis, rounded to what the network takes."""
        stretched = []
        for axis, (side, new, old) in enumerate(zip(size, wanted, base, strict=True)):
            unit = 1 if len(size) == 3 and axis == 0 else self.config.divisor
            stretched.append(max(unit, round(new * side / old / unit) * unit))
        return tuple(stretched)

    def _sizes_for(self, first: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The schedule's sizes, stretched to the aspect ratio of the initial latent."""
        base = self.base_sizes
        for known in (self._planned, base):
            if first == known[0]:
                return list(known)
        if len(first) != len(base[0]):
            raise ValueError(f"initial latent has size {first}, the schedule's first size is {base[0]}")
        sizes = [self._stretched(size, first, base[0]) for size in base]
        sizes[0] = first
        return sizes


def _latent_seed(row: Tensor) -> int:
    """A seed from the signs of a latent: they survive rounding, so that half precision draws the same noise."""
    bits = (row.detach().float() > 0).flatten().to(device="cpu", dtype=torch.uint8)
    return int.from_bytes(hashlib.blake2b(bits.numpy().tobytes(), digest_size=8).digest(), "little") >> 1
