"""A diffusers scheduler that makes stock pipelines sample scale-wise.

This file stands alone: it needs torch and diffusers only, so that an exported model can carry it along.

    scheduler = ScaleWiseScheduler.from_pretrained(folder)
    scheduler.attach(pipe)
    latents = scheduler.initial_latents(1, channels=16, height=128, width=128, generator=generator)
    pipe(prompt=prompt, latents=latents, height=1024, width=1024, num_inference_steps=4, guidance_scale=1.0)

Z-Image refuses latents of another size than `height` and `width`: they are 512 there, those of the *first* size, and
`guidance_scale` is 0.0 for none. The picture comes out at the last size all the same.

Without `latents`, a pipeline draws the noise itself: call it with `height` and `width` (Wan: `num_frames` too) of the
*first* size; the picture comes out at the last one. SANA then needs `use_resolution_binning=False` as well, and SDXL
`original_size` and `target_size` of the last size, an input of its network at every step. FLUX.1, Chroma and
Qwen-Image need `latents`.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor

INTERPOLATION = "bicubic"
REMEMBERED = 20_000
"""Largest number of first latents whose sizes a scheduler remembers; each counts twice, as a map and as tokens."""
LAYOUTS = ("map", "tokens", "patches")
"""Layouts in which pipelines take latents, see `to_layout`."""
BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
"""First and last beta of the variance-preserving process, under the keys of Stable Diffusion's schedulers."""


def upsample(x0: Tensor, size: Sequence[int]) -> Tensor:
    """Resize a clean latent to a larger size (SwD paper, section 4.1).

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
    """Resample a video in time: each frame is a linear blend of its neighbours, the first and the last are kept.

    Args:
        video: `[B, C, F, H, W]`.
        frames: the new number of frames.
    """
    count = video.shape[2]
    if count == frames:
        return video
    place = torch.linspace(0, count - 1, frames, dtype=torch.float64)
    left = place.floor().long().clamp(max=max(count - 2, 0))
    # Not blocking: a copy from the CPU that waits for the device would leave it idle afterwards.
    share = (place - left).to(torch.float32).to(video.device, non_blocking=True).view(1, 1, -1, 1, 1)
    right = (left + 1).clamp(max=count - 1).to(video.device, non_blocking=True)
    left = left.to(video.device, non_blocking=True)
    return ((1 - share) * video.index_select(2, left) + share * video.index_select(2, right)).to(video.dtype)


@cache
def signal_levels() -> Tensor:
    """`abar` of Stable Diffusion's 1000 steps, float32: the roots of the betas rise linearly from first to last."""
    roots = torch.linspace(BETAS["beta_start"] ** 0.5, BETAS["beta_end"] ** 0.5, 1000, dtype=torch.float32)
    return torch.cumprod(1 - roots.square(), 0)


def vp_scales(timestep: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of signal and noise at steps of the variance-preserving process, float32 on the steps' device.

    In `x_t = sqrt(abar) x0 + sqrt(1 - abar) eps`, the two factors in this order.
    """
    signal, noise = _vp_tables(timestep.device)
    return signal.take(timestep), noise.take(timestep)  # indexing by a scalar would wait for its value


@cache
def _vp_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """The factors at all steps, computed on the CPU, so that they are the same on every device, and kept on each."""
    abar = signal_levels()
    return abar.sqrt().to(device), (1 - abar).sqrt().to(device)


def vp_timestep(sigma: Tensor) -> Tensor:
    """The step of a variance-preserving network at level `sigma`: `min(round(1000 sigma), 999)`, int64."""
    return (1000 * sigma.float()).round().long().clamp(0, 999)


def check_schedule(
    sigmas: Any, sizes: Any, divisor: Any = 1, where: str = ""
) -> tuple[tuple[float, ...], tuple[tuple[int, ...], ...]]:
    """Check the noise levels and latent sizes of a schedule.

    Args:
        sigmas: N noise levels in (0, 1], strictly decreasing.
        sizes: N latent side lengths, (H, W) or (F, H, W), all of one kind; sides never shrink.
        divisor: heights and widths must be multiples of this.
        where: text before "sigmas" and "sizes" in messages.

    Returns:
        The levels as floats, and the sizes as tuples.

    Raises:
        ValueError: if a rule above is broken.
    """
    # Each list by itself, then their lengths.
    levels = _noise_levels(sigmas, f"{where}sigmas")
    shapes = tuple(_size(size, f"{where}sizes") for size in _listed(sizes, f"{where}sizes"))
    if len(levels) != len(shapes):
        counts = f"{len(levels)} sigmas but {len(shapes)} sizes"
        raise ValueError(f"{where}sigmas and {where}sizes differ in number: {counts}; give one size per sigma")

    # Sizes against the divisor and against each other.
    _check_count(divisor, f"{where}divisor")
    for size in shapes:
        if len(size) != len(shapes[0]):
            raise ValueError(f"{where}sizes contains {size} beside {shapes[0]}; give sizes that are all alike")
        if any(side % divisor for side in size[-2:]):
            raise ValueError(f"{where}sizes contains {size}; height and width must be multiples of {divisor}")
    for small, large in pairwise(shapes):
        if any(b < a for a, b in zip(small, large, strict=True)):
            raise ValueError(f"{where}sizes must not shrink, but {large} follows {small}")
    return levels, shapes


def _check_count(value: Any, name: str) -> None:
    if not _is_number(value, Integral) or value < 1:
        raise ValueError(f"{name} is {value!r}; use a whole number of at least 1")


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _listed(values: Any, name: str) -> list[Any]:
    """The entries of a list, an array or a tensor."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Sequence):
        raise ValueError(f"{name} is {values!r}; give a list")
    return list(values)


def _noise_levels(sigmas: Any, name: str) -> tuple[float, ...]:
    """Noise levels, strictly decreasing in (0, 1]."""
    levels = _listed(sigmas, name)
    if not levels:
        raise ValueError(f"{name} is empty; give at least one noise level, e.g. [1.0]")
    for sigma in levels:
        if not _is_number(sigma, Real):
            raise ValueError(f"{name} contains {sigma!r}; noise levels are numbers in (0, 1]")
        if not 0 < sigma <= 1:
            raise ValueError(f"{name} contains {float(sigma)}; noise levels lie in (0, 1]")
    for a, b in pairwise(levels):
        if not b < a:
            raise ValueError(f"{name} must be strictly decreasing, but {float(b)} follows {float(a)}")
    return tuple(float(sigma) for sigma in levels)


def _size(size: Any, name: str) -> tuple[int, ...]:
    """One size: a side, (H, W) or (F, H, W), of whole numbers from 1."""
    sides = size.tolist() if hasattr(size, "tolist") else size
    sides = list(sides) if isinstance(sides, Sequence) and not isinstance(sides, str) else [sides, sides]
    whole = all(_is_number(side, Integral) and side > 0 for side in sides)
    if not whole or len(sides) not in (2, 3):
        shown = size if isinstance(size, str) else tuple(sides)
        raise ValueError(
            f"{name} contains {shown!r}; every size is a side, (H, W) or (F, H, W), all alike, of whole numbers from 1"
        )
    return tuple(int(side) for side in sides)


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


def to_layout(latents: Tensor, layout: str) -> Tensor:
    """Latents `[B, C, *size]` in a pipeline's layout.

    Args:
        latents: the latents.
        layout: "map" leaves them as they are; "tokens" is `pack`; "patches" is a map of its tokens
            `[B, 4 C, H/2, W/2]`, as FLUX.2's pipelines take them.

    Raises:
        ValueError: for another layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is not known; use one of {', '.join(LAYOUTS)}")
    if layout == "map":
        return latents
    tokens = pack(latents)
    if layout == "tokens":
        return tokens
    return tokens.transpose(1, 2).unflatten(2, (latents.shape[-2] // 2, latents.shape[-1] // 2))


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
    """Sampler of scale-wise distilled models: predict clean, upsample, noise afresh (SwD paper, section 4.1).

    `step` may return a *larger* sample than it was given. Re-noising draws come from a hash of the signs of each
    sample's own initial latent, so a picture is the same alone or in a batch and follows the caller's generator.

    Where a call ends follows from its first latent. One from `initial_latents` ends at the size that was asked for
    there, in whatever order and how often such latents are used. Any other is taken as the first size of the schedule,
    in its own aspect ratio; one that is too large for that is refused, since it would end far beyond the last size.

    Args:
        sigmas: noise level of every step, strictly decreasing, the first at most 1, all above 0.
        sizes: latent side length, (H, W) or (F, H, W) of every step, all of one kind, never decreasing. Heights and
            widths are multiples of `divisor`.
        num_train_timesteps: the network's timestep at sigma 1.
        divisor: latent side lengths are rounded to a multiple of this when the call's aspect ratio differs.
        interpolation: how clean predictions are upsampled; only "bicubic" is known.
        prediction_type: the network's prediction: "flow", the velocity of rectified flow, or "epsilon", the noise of
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
        _check_count(num_train_timesteps, "num_train_timesteps")
        self._levels, checked = check_schedule(sigmas, sizes, divisor)
        self.base_sizes = list(checked)
        self.keep_x0 = False
        self._plans: OrderedDict[tuple[int, ...], list[tuple[int, ...]]] = OrderedDict()
        self._begin_index: int | None = None
        self.set_timesteps(len(self._levels))
        self._in_call = False

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Build a scheduler as diffusers does, from a configuration that holds a schedule.

        Raises:
            ValueError: for another scheduler's configuration, which holds no `sigmas` and `sizes`.
        """
        if isinstance(config, Mapping):
            missing = [key for key in ("sigmas", "sizes") if key not in config and key not in kwargs]
            if missing:
                kind = config.get("_class_name")
                what = f"a configuration of {kind}" if kind not in (None, cls.__name__) else "this configuration"
                raise ValueError(
                    f"{what} has no {' and '.join(missing)}: load the schedule that was saved with the model, "
                    f"{cls.__name__}.from_pretrained(folder), or give sigmas= and sizes="
                )
            if not {"sigmas", "sizes"} & set(config) and "prediction_type" in config:
                # diffusers would drop another class's value where it is that class's default, as SDXL's "epsilon" is.
                kwargs.setdefault("prediction_type", config["prediction_type"])
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def __len__(self) -> int:
        """Number of timesteps that the network was trained on, as of diffusers' schedulers."""
        return int(self.config.num_train_timesteps)

    # Methods that pipelines call before the loop

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Prepare for a new sample; everything about an earlier one is forgotten.

        Args:
            num_inference_steps: must be the schedule's number of steps.
            device: where the timesteps go.
            sigmas: accepted when they are this schedule's, or evenly spaced ones that a pipeline fills in by itself.
            mu: ignored (resolution-dependent shift of other schedulers).
        """
        # Refuse steps of another schedule.
        own = list(self._levels)
        steps = len(sigmas) if sigmas is not None else num_inference_steps
        if steps is not None and steps != len(own):
            raise ValueError(
                f"num_inference_steps={steps}, but this model was distilled for {len(own)} steps; "
                f"pass num_inference_steps={len(own)}"
            )
        if sigmas is not None and not self._known(sigmas):
            raise ValueError(f"sigmas={list(sigmas)} differ from this model's schedule {own}; leave sigmas out")

        # Levels and timesteps, as pipelines read them.
        self.sigmas = torch.tensor([*own, 0.0], dtype=torch.float32, device=device)
        self.timesteps = self.config.num_train_timesteps * self.sigmas[:-1]
        if self.config.prediction_type == "epsilon":
            self.timesteps = vp_timestep(self.sigmas[:-1])
        self.num_inference_steps = len(own)

        # State of one sample.
        self.sizes = list(self.base_sizes)
        self.x0_predictions: list[Tensor] = []
        self._step_index = 0
        self._in_call = True  # whether a pipeline is sampling; other calls of its network are left alone
        self._started = False  # whether this sample's sizes are known
        self._seeds: list[int] = []
        self._signs: Tensor | None = None  # of the first latents, on the CPU

    def _known(self, sigmas: Sequence[float]) -> bool:
        """Whether noise levels are this schedule's own, or the evenly spaced ones that a pipeline fills in."""
        given = torch.as_tensor(list(sigmas), dtype=torch.float64)
        n = len(given)
        own = torch.tensor(self._levels, dtype=torch.float64)
        return torch.allclose(given, own, atol=1e-3) or torch.allclose(
            given, torch.linspace(1.0, 1.0 / n, n, dtype=torch.float64), atol=1e-6
        )

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Only 0 is possible: img2img `strength` below 1 would start in the middle of the schedule."""
        if begin_index:
            raise ValueError(f"strength below 1 (begin_index={begin_index}) is not supported: start from pure noise")
        self._begin_index = begin_index

    @property
    def begin_index(self) -> int | None:
        """The first step, as a pipeline set it: 0, or None before it did."""
        return self._begin_index

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor | float) -> Tensor:
        """Noise clean latents as in training: `(1 - sigma) x0 + sigma eps` with `sigma = timestep / 1000`.

        The variance-preserving process ("epsilon") has `sqrt(abar) x0 + sqrt(1 - abar) eps`, `abar` of the timestep.

        Args:
            original_samples: `[B, C, *size]`, any size.
            noise: standard Gaussian noise of the same shape.
            timesteps: one for all samples, or `[B]`; from 0 to `num_train_timesteps`, for "epsilon" to 999.

        Raises:
            ValueError: for timesteps out of range, or if latents of another size than the current one are noised in the
                middle of a call, as inpainting pipelines do: sizes grow here, and the two would not fit.
        """
        # Refuse what does not fit the schedule.
        size = tuple(original_samples.shape[2:])
        if 0 < self._step_index < self.num_inference_steps and size != self.sizes[self._step_index]:
            raise ValueError(
                f"add_noise of latents of size {size} at a step of size {self.sizes[self._step_index]}: inpainting and "
                "image-to-image keep one size, a scale-wise model grows; use the text-to-image pipeline"
            )
        time = torch.as_tensor(timesteps).cpu().double().reshape(-1)  # not every device has float64
        last = self.config.num_train_timesteps if self.config.prediction_type == "flow" else len(signal_levels()) - 1
        if time.numel() not in (1, len(original_samples)) or not bool(((time >= 0) & (time <= last)).all()):
            raise ValueError(f"timesteps={time.tolist()}; give one, or one a sample, from 0 to {last}")

        # Noise in float32.
        if self.config.prediction_type == "flow":
            signal = 1 - time / last
            level = time / last
        else:
            signal, level = vp_scales(time.round().long())
        x0 = original_samples.float()
        axes = [1] * (original_samples.ndim - 1)
        signal, level = (scale.to(x0).view(-1, *axes) for scale in (signal, level))
        return (signal * x0 + level * noise.to(x0)).to(original_samples.dtype)

    def scale_noise(self, *args: Any, **kwargs: Any) -> Tensor:
        """Raise ValueError: image-to-image pipelines call this, but a scale-wise model starts from pure noise."""
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
        layout: str = "map",
    ) -> Tensor:
        """Pure noise at the first size, for a pipeline's `latents=`.

        Args:
            batch: number of samples.
            channels: latent channels.
            height, width, frames: *final* latent size, from which the first one follows; None: the schedule's own.
            generator: one for all samples, or one for each.
            packed: as FLUX's tokens `[B, L, 4 C]`: the same as `layout="tokens"`.
            layout: of the result, see `to_layout`.

        Returns:
            `[B, C, *first_size]` float32, or the same in another layout. They keep their final size when they are
            moved, cast, split, or put together with others for the same final size. Latents with changed values count
            as the pipeline's own.

        Raises:
            ValueError: if there are not as many generators as samples, or a side is no multiple of `divisor`.
        """
        # The sizes of all steps, from the last one.
        final = self.base_sizes[-1]
        sides = (final[-2] if height is None else height, final[-1] if width is None else width)
        wanted: tuple[int, ...] = sides if len(final) == 2 else (final[0] if frames is None else frames, *sides)
        plan = self.sizes_ending_at(wanted)
        first = plan[0]

        # Noise of the first size.
        if isinstance(generator, Sequence):
            if len(generator) != batch:
                raise ValueError(f"{len(generator)} generators for {batch} samples; give one each")
            rows = [torch.randn(1, channels, *first, generator=g) for g in generator]
            noise = torch.cat(rows)
        else:
            noise = torch.randn(batch, channels, *first, generator=generator)
        noise = self._remember(noise, plan)
        return to_layout(noise, "tokens" if packed else layout)

    def _remember(self, noise: Tensor, plan: list[tuple[int, ...]]) -> Tensor:
        """Remember the sizes of a call by the values of its first latents, and return these latents.

        If the first size alone would lead to other sizes, the latents are marked: the signs of a few values, chosen by
        the final size, are flipped. The result is still Gaussian noise, but not what a pipeline draws from that seed.
        """
        first = plan[0]
        if plan != self._sizes_for(first) or self._is_too_large(first):
            noise = noise * _mark(plan[-1], noise[0].numel()).view(noise.shape[1:])
        even = noise.ndim == 4 and not any(side % 2 for side in noise.shape[2:])
        signs = _signs(noise)
        for row in [*signs, *(pack(signs) if even else [])]:  # as a map and as FLUX's tokens
            key = _key(row)
            self._plans.pop(key, None)  # a known key moves to the end, among the newest
            self._plans[key] = plan
        while len(self._plans) > REMEMBERED:
            self._plans.popitem(last=False)
        return noise

    def attach(self, pipe: Any) -> Any:
        """Make a diffusers pipeline sample with this schedule; returns the pipeline.

        Some pipelines make an input of their network once, for one size; a hook replaces it by that of each step's
        size. The network's class says which input that is; networks of other classes are left alone.
        """
        pipe.scheduler = self
        network: Any = getattr(pipe, "transformer", None)
        refresh = {
            "FluxTransformer2DModel": self._refresh_ids,
            "QwenImageTransformer2DModel": self._refresh_shapes,
            "Flux2Transformer2DModel": self._refresh_ids_of_flux2,
            "ChromaTransformer2DModel": self._refresh_ids_and_mask,
            "WanTransformer3DModel": self._one_time_a_sample,
        }
        for name in _class_names(network):
            if name in refresh:
                for handle in getattr(network, "_scale_wise_hooks", []):
                    handle.remove()  # the hook of an earlier schedule
                hook = partial(self._while_sampling, refresh[name])
                network._scale_wise_hooks = [network.register_forward_pre_hook(hook, with_kwargs=True)]
        unpacking = getattr(type(pipe), "_unpack_latents_with_ids", None)
        if unpacking is not None:
            pipe._unpack_latents_with_ids = partial(self._unpack_final, unpacking)  # in place of an earlier schedule's
        return pipe

    def _while_sampling(self, refresh: Any, network: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A network's inputs as `refresh` changes them while a pipeline samples; other calls are left alone."""
        return refresh(network, args, kwargs) if self._in_call else (args, kwargs)

    def _refresh_ids_of_flux2(
        self, network: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Give FLUX.2's transformer the position ids of the current step's size; its pipelines make the first one's."""
        tokens = kwargs["hidden_states"]
        ids = kwargs["img_ids"]
        if not self._started:
            if bool(ids[..., 0].any()):
                raise ValueError("image= was given, but this model was distilled for text alone as input; leave it out")
            first = _size_of_ids(ids)
            self._seeds = [_latent_seed(row) for row in unpack(self._first_signs(tokens), first)]
            self.sizes = self._start(first)
            self._started = True
        size = self._token_size(tokens)
        return args, kwargs | {"img_ids": F.pad(position_ids(size, ids.device, ids.dtype), (0, 1))}

    def _unpack_final(self, stock: Any, tokens: Tensor, ids: Tensor, *sides: Any, **named: Any) -> Tensor:
        """Tokens `[B, L, 4 C]` as a map of patches, in place of the `stock` method of FLUX.2's pipelines.

        After a scale-wise call, the tokens are those of the last size and `ids` those of the first one.
        """
        if tokens.shape[1] == ids.shape[1]:  # another scheduler's call, or one size throughout
            unpacked: Tensor = stock(tokens, ids, *sides, **named)
            return unpacked
        return to_layout(unpack(tokens, self.sizes[-1]), "patches")

    def _refresh_ids(self, network: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Give FLUX's transformer the position ids of the current step's size."""
        ids = kwargs["img_ids"]
        if self._step_index == 0:
            self._start_from_tokens(kwargs["hidden_states"], _size_of_ids(ids))
        size = self._token_size(kwargs["hidden_states"])
        return args, kwargs | {"img_ids": position_ids(size, ids.device, ids.dtype)}

    def _refresh_ids_and_mask(self, network: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Give Chroma's transformer ids and mask of the current step's size.

        The mask becomes one of booleans: as the pipeline makes it, of numbers, it hides nothing.
        """
        args, kwargs = self._refresh_ids(network, args, kwargs)
        mask = kwargs.get("attention_mask")
        if mask is None:
            return args, kwargs
        text = mask[:, : kwargs["encoder_hidden_states"].shape[1]].bool()
        image = text.new_ones(kwargs["hidden_states"].shape[:2])
        return args, kwargs | {"attention_mask": torch.cat([text, image], 1)}

    def _one_time_a_sample(
        self, network: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Give Wan's transformer one timestep a sample where the pipeline of Wan2.2 TI2V-5B has one a token.

        It makes them for the tokens of the first size. In text to video all are equal, and one a sample means the same;
        where they differ, as with a first frame that is given, they are left alone.
        """
        time = kwargs.get("timestep")
        if time is None or time.ndim != 2 or bool((time != time[:, :1]).any()):
            return args, kwargs
        return args, kwargs | {"timestep": time[:, 0]}

    def _refresh_shapes(
        self, network: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Give Qwen-Image's transformer the numbers of rows and columns of the current step's size."""
        tokens = kwargs["hidden_states"]
        shapes = kwargs["img_shapes"]
        if self._step_index == 0:
            self._start_from_tokens(tokens, tuple(2 * side for side in shapes[0][0][1:]))
        height, width = self._token_size(tokens)
        return args, kwargs | {"img_shapes": [[(1, height // 2, width // 2)]] * len(shapes)}

    def _start_from_tokens(self, tokens: Tensor, final: tuple[int, ...]) -> None:
        """Set the sizes of a call with tokens. It ends at its `height` and `width`.

        Args:
            tokens: the first ones, `[B, L, 4 C]`.
            final: latent size of that height and width, of which the pipeline told its network.
        """
        self.sizes = self.sizes_ending_at(final)
        self._started = True
        first = self.sizes[0]
        if 4 * tokens.shape[1] != first[0] * first[1]:
            raise ValueError(
                f"{tokens.shape[1]} tokens are no latent of size {first}, where a call that ends at {final} starts: "
                "pass latents=initial_latents(..., packed=True), and height and width of the final size"
            )
        planned = self._planned([_key(row) for row in self._first_signs(tokens)])
        if planned is not None and planned[-1] != final:
            raise ValueError(
                f"latents=initial_latents(...) were made for the final size {planned[-1]}, but height and width of the "
                f"call are those of {final}; give both the same"
            )

    def _token_size(self, tokens: Tensor) -> tuple[int, ...]:
        """Latent size of packed tokens at the current step."""
        size = self.sizes[self._step_index]
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
            model_output: the network's prediction, of the shape of `sample`.
            timestep: ignored; steps are counted.
            sample: noised latent `[B, C, *size]`, or FLUX's tokens `[B, L, 4 C]`.
            return_dict: whether to return an output object instead of a tuple.
            noise: fresh noise for the next step `[B, C, *next_size]` instead of the one derived from the first latent.

        Returns:
            The next noised latent (the clean prediction after the last step), and this step's clean prediction.
        """
        i = self._step_index
        if i >= self.num_inference_steps:
            raise ValueError(f"step called more than {self.num_inference_steps} times; call set_timesteps first")

        # FLUX's tokens become a map; the first step sets the seeds and sizes of the sample.
        packed = sample.ndim == 3
        dtype = sample.dtype
        signs = self._first_signs(sample) if i == 0 else None
        if packed:
            sample, model_output = self._unpacked(sample, model_output)
        if signs is not None:
            signs = unpack(signs, tuple(sample.shape[2:])) if packed else signs
            self._seeds = [_latent_seed(row) for row in signs]
            self.sizes = self.sizes if packed else self._start(tuple(sample.shape[2:]))
            self._started = True

        # Predict clean, then upsample and noise for the next step.
        x0 = self._to_x0(sample.float(), model_output.float(), i)
        if self.keep_x0:
            self.x0_predictions.append(x0.to(dtype))
        self._step_index = i + 1
        self._in_call = i + 1 < self.num_inference_steps
        prev = x0 if i + 1 == self.num_inference_steps else self._renoise(x0, i + 1, noise)

        # Back to the layout and dtype of the input.
        if packed:
            prev = pack(prev)
            x0 = pack(x0)
        prev = prev.to(dtype)
        x0 = x0.to(dtype)
        return ScaleWiseSchedulerOutput(prev_sample=prev, pred_original_sample=x0) if return_dict else (prev, x0)

    def _unpacked(self, sample: Tensor, model_output: Tensor) -> tuple[Tensor, Tensor]:
        """A sample and a prediction as maps of the current step's size, from FLUX's tokens."""
        if not self._started:  # without an attached network, FLUX's position ids are unknown here
            self.sizes = self._planned([_key(row) for row in self._first_signs(sample)]) or self.sizes
        size = self._token_size(sample)
        return unpack(sample, size), unpack(model_output, size)

    def _first_signs(self, latents: Tensor) -> Tensor:
        """Signs of the first latents of a call on the CPU. Copying them waits for the device, so it is done once."""
        if self._signs is None or self._signs.shape != latents.shape:
            self._signs = _signs(latents)
        return self._signs

    def _scales(self, i: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of signal and noise at step `i`."""
        sigma = self.sigmas[i]
        if self.config.prediction_type == "flow":
            return (1 - sigma).to(like.device), sigma.to(like.device)
        signal, level = vp_scales(vp_timestep(sigma))
        return signal.to(like.device), level.to(like.device)

    def _to_x0(self, sample: Tensor, model_output: Tensor, i: int) -> Tensor:
        signal, noise = self._scales(i, sample)
        if self.config.prediction_type == "flow":
            return sample - noise * model_output
        return (sample - noise * model_output) / signal

    def _renoise(self, x0: Tensor, i: int, noise: Tensor | None) -> Tensor:
        z = upsample(x0, self.sizes[i])
        noise = self._fresh_noise(z, i) if noise is None else noise.to(z)
        signal, level = self._scales(i, z)
        return signal * z + level * noise

    def _fresh_noise(self, like: Tensor, i: int) -> Tensor:
        """Noise of step `i`, each sample's from its own seed, in the shape, on the device and in the dtype of `like`.

        It is drawn on the CPU, while the device still computes, and copied without waiting for the device.
        """
        drawn = torch.empty(like.shape, device="cpu", pin_memory=like.is_cuda)
        for row, seed in zip(drawn, self._seeds, strict=True):
            torch.randn(row.shape, generator=torch.Generator().manual_seed((seed + i) % 2**63), out=row)
        return drawn.to(like, non_blocking=True)

    def sizes_ending_at(self, final: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The schedule's sizes, stretched so that they end at exactly `final`.

        Raises:
            ValueError: if a side is no multiple of `divisor`, or below 1.
        """
        base = self.base_sizes
        if any(side < 1 for side in final) or any(side % self.config.divisor for side in final[-2:]):
            raise ValueError(f"size {final}: sides must be multiples of {self.config.divisor}, above 0")
        return [*(self._stretched(size, final, base[-1]) for size in base[:-1]), final]

    def _stretched(self, size: tuple[int, ...], wanted: tuple[int, ...], base: tuple[int, ...]) -> tuple[int, ...]:
        """`size` times wanted / base along each axis; heights and widths are rounded to multiples of the divisor."""
        stretched = []
        for axis, (side, new, old) in enumerate(zip(size, wanted, base, strict=True)):
            unit = 1 if len(size) == 3 and axis == 0 else self.config.divisor
            stretched.append(max(unit, round(new * side / old / unit) * unit))
        return tuple(stretched)

    def _start(self, first: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The sizes of a call from its first latents.

        Raises:
            ValueError: if this schedule cannot start from latents of this size.
        """
        planned = self._planned([(seed, *first) for seed in self._seeds])
        if planned is not None:
            return list(planned)
        sizes = self._sizes_for(first)
        if self._is_too_large(first):
            raise ValueError(
                f"the first latent has size {first}, but this schedule starts at {self.base_sizes[0]} and ends at "
                f"{self.base_sizes[-1]}: the call would end at {sizes[-1]}. Pass latents=scheduler.initial_latents(..) "
                "for the final size, or height and width (num_frames) of the first size alone (SANA: with "
                "use_resolution_binning=False)"
            )
        return sizes

    def _planned(self, keys: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]] | None:
        """The sizes that `initial_latents` planned for the samples of a call; None for latents from elsewhere.

        Raises:
            ValueError: if the samples were made for different final sizes.
        """
        known = (self._plans.get(key) for key in keys)
        plans = {plan[-1]: plan for plan in known if plan is not None}
        if len(plans) > 1:
            raise ValueError(
                f"latents of one call were made for final sizes {' and '.join(map(str, plans))}; call twice"
            )
        return next(iter(plans.values()), None)

    def _is_too_large(self, first: tuple[int, ...]) -> bool:
        """Whether a latent size is too large for the schedule's first size in every aspect ratio.

        First sizes of all aspect ratios have the same area (and number of frames), up to rounding to the divisor.
        Rounding adds at most half a divisor to a side of the last size, which is then scaled by the ratio of first to
        last size, and another half to the side of the first size.
        """
        start = self.base_sizes[0]
        end = self.base_sizes[-1]
        if start == end:
            return False  # one size throughout: the call ends where it starts
        if all(side >= last for side, last in zip(first, end, strict=True)):
            return True
        ratios = [small / large for small, large in zip(start, end, strict=True)]
        sides = [
            side - self.config.divisor / 2 * (1 + ratio) for side, ratio in zip(first[-2:], ratios[-2:], strict=True)
        ]
        too_wide = min(sides) > 0 and math.prod(sides) > math.prod(start[-2:])
        return too_wide or (len(first) == 3 and first[0] - (1 + ratios[0]) / 2 > start[0])

    def _sizes_for(self, first: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The schedule's sizes, stretched to the aspect ratio of the initial latent."""
        base = self.base_sizes
        if len(first) != len(base[0]):
            raise ValueError(f"initial latent has size {first}, the schedule's first size is {base[0]}")
        if first == base[0]:
            return list(base)
        sizes = [self._stretched(size, first, base[0]) for size in base]
        sizes[0] = first
        return sizes


def _class_names(network: Any) -> list[str]:
    """Names of a network's class and of that class's bases; of the network inside, where compiling or peft wraps it."""
    network = getattr(network, "_orig_mod", network)
    if hasattr(network, "get_base_model"):
        network = network.get_base_model()
    return [base.__name__ for base in type(network).__mro__]


def _size_of_ids(ids: Tensor) -> tuple[int, ...]:
    """Latent size for which a pipeline made position ids `[..., (index, row, column, ..)]`, one for each 2x2 patch."""
    return tuple(2 * (int(ids[..., axis].max()) + 1) for axis in (1, 2))


def _mark(final: tuple[int, ...], count: int) -> Tensor:
    """`count` factors 1 or -1, float32; 1 to 32 of them are -1, at places that depend on the final size."""
    digest = int.from_bytes(hashlib.blake2b(repr(final).encode(), digest_size=4).digest(), "little")
    factors = torch.ones(count)
    for place in range(min(32, count)):
        factors[place] = -1 if place == 0 or digest >> place & 1 else 1
    return factors


def _signs(latents: Tensor) -> Tensor:
    """1 where a latent is above 0, else 0: uint8 on the CPU."""
    return (latents.detach().float() > 0).to(device="cpu", dtype=torch.uint8)


def _key(signs: Tensor) -> tuple[int, ...]:
    """Key of a latent `[C, *size]`, or of its tokens `[L, 4 C]`, among remembered ones: its seed and its shape."""
    return (_latent_seed(signs), *(signs.shape[1:] if signs.ndim > 2 else signs.shape[:1]))


def _latent_seed(signs: Tensor) -> int:
    """A seed from the signs of a latent: they survive rounding, so that half precision draws the same noise."""
    return int.from_bytes(hashlib.blake2b(signs.contiguous().numpy().tobytes(), digest_size=8).digest(), "little") >> 1
