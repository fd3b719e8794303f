"""Valid ranges of numbers in configurations, and the checks of them, with messages of one kind."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from swd.types import UserError

STEPS = 1000
"""Steps of a sampler at most: these models were trained on 1,000 noise levels, and more steps would repeat some."""
GUIDANCE = 100.0
"""Guidance scale at most: ten times the largest that any of these models is published with."""
NO_GUIDANCE = "1 for none"
"""Said behind the range of a guidance scale."""
AT_ONCE = 4096
"""Pictures or prompts in one batch at most: more than any device holds of the smallest model."""
SIDE = 8192
"""Pixels along a side: eight times what these models were trained on."""
LARGEST_SIDE = 2**14
"""Side of a latent, or a number that latents are divided by: far beyond any model, small enough to compute with."""
FRAMES = 1000
"""Frames of a video at most: ten times the number that these models were trained on."""
MOST_ROWS = 10**7
"""Rows of one job at most: ten times the largest published training set of generated pictures."""
MOST_IN_A_SHARD = 10**6
"""Rows of one shard at most, since a shard is begun again after a kill; WebDataset's examples have 10,000."""
FPS = 240
"""Frames a second at most: those of the fastest displays."""
BATCH = 2**16
"""Samples of one batch over all processes at most: hundreds of times the largest of the paper's."""
HEAD_LAYERS = 64
"""Layers of the discriminator's head at most: their widths fall from the network's to 1."""

ALPHAS = 1e-3, 1e6
"""Range of LoRA alpha. Alphas in use are within ten times the rank; with far smaller ones updates vanish in float32."""


@dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`, both included; `above`: `least` itself is not.

    Attributes:
        why: what is said behind the limits, such as which value means none; with it both limits are told.
    """

    least: float = 0
    most: float = math.inf
    above: bool = False
    why: str = ""

    def problem(self, value: Any) -> str | None:
        """The fix for a `value` out of range, "use ..."; None if it is in range, or is no number."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        if self.why:
            return None if self.least <= value <= self.most else f"use {self.least:g} to {self.most:g}, {self.why}"
        if value < self.least or (self.above and value == self.least):
            return f"use a number above {self.least:g}" if self.above else f"use {self.least:g} or more"
        return f"use at most {self.most:,.15g}" if value > self.most else None


LARGEST_FLOAT = 3.4028234663852886e38
"""Largest number of float32, which losses and optimizers compute in."""
LARGEST_INTEGER = 2**63 - 1
"""Largest number of int64, which tensors and files store."""

SHARE, COUNT, WEIGHT = Range(0, 1), Range(1, 2**31 - 1), Range(0, 1e6)
ABOVE = Range(0, above=True)
RATE = Range(0, 1e6, above=True)
"""Learning rates. AdamW moves every weight by about the rate at each step, so a rate near 1 already destroys a network;
this bound only refuses numbers that nobody can have meant."""
RANGES: Mapping[str, Range] = {
    "lr": RATE,
    "critic_lr": RATE,
    "muon_lr": RATE,
    "weight_decay": Range(0, 1e3),
    "critic_updates": Range(0, 10_000),
    "weight": WEIGHT,
    "discriminator_weight": WEIGHT,
    "kl_weight": WEIGHT,
    "square_weight": WEIGHT,
    "edge_weight": WEIGHT,
    "size_weights": WEIGHT,
    "layers": Range(1, HEAD_LAYERS),
    "ema": SHARE,
    "caption_dropout": SHARE,
    "crop_chance": SHARE,
    "max_bad": SHARE,
    "seed": Range(0, LARGEST_INTEGER),
    "batch_size": Range(1, BATCH),
    "warmup": Range(0, 2**31 - 1),
    "every": COUNT,
    "keep": COUNT,
    "save_every": COUNT,
    "reuse": Range(1, 10_000),
    "memory": COUNT,
    "max_steps": COUNT,
    "num_nodes": Range(1, 100_000),
    "memory_gb": Range(0, 1e6, above=True),
    "rank": COUNT,
    "alpha": Range(*ALPHAS, why="null for alpha = rank"),
    "dmd_guidance_scale": Range(0, GUIDANCE, why=NO_GUIDANCE),
    "drawing_guidance_scale": Range(1, GUIDANCE, why=NO_GUIDANCE),
    "clip": ABOVE,
    "accumulate": COUNT,
    "exploding": Range(1, above=True),
    "bandwidth": ABOVE,
    "critic_max_snr": ABOVE,
}
"""Ranges of arguments of this project's constructors and of the Trainer, by name; a name means the same everywhere."""


def whole(key: str, value: int | None, least: int = 1, most: int | None = None, why: str = "") -> None:
    """Raise UserError unless a whole number is in range; None is accepted.

    Args:
        key: its name in the configuration.
        value: the number.
        least: smallest valid number.
        most: largest one; None: no limit.
        why: the reason of the upper limit.
    """
    if value is not None and value < least:
        raise UserError(f"{key}={value}; use {'0 or more' if least == 0 else f'at least {least}'}")
    if value is not None and most is not None and value > most:
        raise UserError(f"{key}={value}; use at most {most}" + (f", {why}" if why else ""))


def number(
    key: str,
    value: float | None,
    least: float | None = None,
    most: float | None = None,
    why: str = "",
    above: float | None = None,
) -> None:
    """Raise UserError unless a number is finite and in range; None is accepted.

    Args:
        key: its name in the configuration.
        value: the number.
        least: smallest valid number; None: no such limit.
        most: largest one, given only together with `least`.
        why: the reason of the limits.
        above: a limit that the number must exceed, given alone.
    """
    if value is None:
        return
    in_range = (least is None or value >= least) and (most is None or value <= most)
    # An integer beyond any float is finite to Python, but nothing can compute with it.
    if in_range and (above is None or value > above) and abs(value) <= sys.float_info.max:
        return
    allowed = "a finite number"
    if least is not None:
        allowed = f"{least:g} to {most:g}" if most is not None else f"a finite number of {least:g} or more"
    elif above is not None:
        allowed = f"a finite number above {above:g}"
    raise UserError(f"{key}={value}; use {allowed}" + (f", {why}" if why else ""))


def seed(key: str, value: int, stop: int = 2**63) -> None:
    """Raise UserError unless a seed is at least 0 and below `stop`."""
    if not 0 <= value < stop:
        raise UserError(f"{key}={value}; use 0 or more, below 2^{stop.bit_length() - 1}")


def most_workers() -> int:
    """Largest number of loader processes: four for each core, at least 32 since loaders may wait for a network."""
    return max(32, 4 * (os.cpu_count() or 1))


def workers(key: str, value: int) -> None:
    """Raise UserError unless a number of loader processes is from 0 to `most_workers()`."""
    cores = os.cpu_count() or 1
    whole(key, value, 0, most_workers(), f"each is a process or a thread, and this machine has {cores} cores")
