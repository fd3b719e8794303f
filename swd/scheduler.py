"""A diffusers scheduler that makes stock pipelines sample scale-wise.

This file stands alone: it needs torch and diffusers only, so that an exported model can carry it along.

    pipe.scheduler = ScaleWiseScheduler.from_pretrained(folder)
    pipe(prompt, num_inference_steps=4, guidance_scale=1.0, height=8 * first_size, width=8 * first_size)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
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
    batch, channels, frames = x0.shape[:3]
    flat = x0.transpose(1, 2).flatten(0, 1)
    flat = F.interpolate(flat, size=size[1:], mode=INTERPOLATION, align_corners=False)
    video = flat.unflatten(0, (batch, frames)).transpose(1, 2)
    if frames == size[0]:
        return video
    lines = video.flatten(3).transpose(2, 3).flatten(0, 2).unsqueeze(1)  # [B*C*H*W, 1, F]
    lines = F.interpolate(lines, size=size[0], mode="linear", align_corners=True)
    return lines.unflatten(0, (batch, channels, -1)).squeeze(3).transpose(2, 3).unflatten(3, size[1:])


@dataclass
class ScaleWiseSchedulerOutput(BaseOutput):
    """Result of one step: the next, possibly larger, noised latent and this step's clean prediction."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class ScaleWiseScheduler(SchedulerMixin, ConfigMixin):
    """Sampler of scale-wise distilled models: predict clean, upsample, noise afresh (SwD paper, section 3.1).

    `step` may return a *larger* sample than it was given. Re-noising draws come from a hash of each sample's own
    initial latent, so a picture is the same alone or in a batch and follows the caller's generator.

    Args:
        sigmas: noise level of every step, strictly decreasing, the first at most 1.
        sizes: latent side length, (H, W) or (F, H, W) of every step, never decreasing.
        num_train_timesteps: what the network's timestep is at sigma 1.
        divisor: latent side lengths are rounded to a multiple of this when the call's aspect ratio differs.
        interpolation: how clean predictions are upsampled; only "bicubic" is known.

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
    ) -> None:
        if interpolation != INTERPOLATION:
            raise ValueError(f"interpolation {interpolation!r} is not known; models are trained with {INTERPOLATION!r}")
        if len(sigmas) != len(sizes):
            raise ValueError(f"{len(sigmas)} sigmas but {len(sizes)} sizes; give one size per sigma")
        self.base_sizes = [(s, s) if isinstance(s, int) else tuple(s) for s in sizes]
        self.keep_x0 = False
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
            model_output: velocity `[B, C, *size]`.
            timestep: ignored; steps are counted.
            sample: noised latent `[B, C, *size]`.
            return_dict: an output object instead of a tuple.
            noise: fresh noise for the next step `[B, C, *next_size]` instead of the one derived from the first latent.

        Returns:
            The next noised latent (the clean prediction after the last step), and this step's clean prediction.
        """
        i = self._step_index
        if i >= self.num_inference_steps:
            raise ValueError(f"step called more than {self.num_inference_steps} times; call set_timesteps first")
        if i == 0:
            self.sizes = self._sizes_for(tuple(sample.shape[2:]))
            self._seeds = [_latent_seed(row) for row in sample]
        x0 = sample.float() - self.sigmas[i].to(sample.device) * model_output.float()
        if self.keep_x0:
            self.x0_predictions.append(x0.to(sample.dtype))
        self._step_index = i + 1
        prev = x0 if i + 1 == self.num_inference_steps else self._renoise(x0, i + 1, noise)
        prev, x0 = prev.to(sample.dtype), x0.to(sample.dtype)
        return ScaleWiseSchedulerOutput(prev_sample=prev, pred_original_sample=x0) if return_dict else (prev, x0)

    def _renoise(self, x0: Tensor, i: int, noise: Tensor | None) -> Tensor:
        z = upsample(x0, self.sizes[i])
        if noise is None:
            rows = [
                torch.randn(z.shape[1:], generator=torch.Generator().manual_seed((seed + i) % 2**63))
                for seed in self._seeds
            ]
            noise = torch.stack(rows)
        sigma = self.sigmas[i].to(z.device)
        return (1 - sigma) * z + sigma * noise.to(z)

    def _sizes_for(self, first: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The schedule's sizes, stretched to the aspect ratio of the initial latent."""
        base, divisor = self.base_sizes, self.config.divisor
        if first == base[0]:
            return list(base)
        if len(first) != len(base[0]):
            raise ValueError(f"initial latent has size {first}, the schedule's first size is {base[0]}")
        sizes = []
        for size in base:
            grown = []
            for axis, (side, start) in enumerate(zip(size, base[0], strict=True)):
                unit = 1 if len(size) == 3 and axis == 0 else divisor
                grown.append(max(unit, round(first[axis] * side / start / unit) * unit))
            sizes.append(tuple(grown))
        sizes[0] = first
        return sizes


def _latent_seed(row: Tensor) -> int:
    data = row.detach().to(device="cpu", dtype=torch.float32).contiguous().numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1
