"""Numbers that tell how a distillation is doing: tensors in, scalars out, float32 inside."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from swd.diffusion import Process
from swd.losses.base import Metrics

RANGE_SAMPLE = 2**16
"""Values that the data's range is estimated from: 65 of them lie beyond a range that holds 99.9%."""
OUTSIDE = 0.001
"""Share of the data's values beyond the range that saturation is counted from."""


Average = Callable[[Tensor], Tensor]
"""The mean over all processes of a tensor of one shape on each; every process must call it."""


def itself(values: Tensor) -> Tensor:
    """The mean over the one process that there is."""
    return values


def prediction_statistics(x0_hat: Tensor, x0_real: Tensor, average: Average = itself, processes: int = 1) -> Metrics:
    """The student's predictions against the data's latents `[B, ...]` of the same size.

    Args:
        x0_hat, x0_real: of this process.
        average: over the processes, of which each has as many samples.
        processes: their number.

    Returns:
        `monitor/x0_std`: std of `x0_hat` over that of the data.
        `monitor/x0_spread`: the same of deviations from the mean over the batch of all processes, so that one picture
        for all prompts gives 0; absent for a batch of one. Equal on all processes.
        `monitor/saturation`: share of the values of `x0_hat` outside the range that holds 99.9% of the data's.
    """
    x0_hat, x0_real = x0_hat.float(), x0_real.float()
    low, high = inner_range(x0_real)
    found = {
        "monitor/x0_std": x0_hat.std(correction=0) / x0_real.std(correction=0).clamp(min=1e-12),
        "monitor/saturation": ((x0_hat < low) | (x0_hat > high)).float().mean(),
    }
    if len(x0_hat) * processes > 1:
        found["monitor/x0_spread"] = spread(x0_hat, average) / spread(x0_real, average).clamp(min=1e-12)
    return found


def inner_range(values: Tensor) -> tuple[Tensor, Tensor]:
    """The range that holds all values but a share of `OUTSIDE`, half of it on each side; of at most `RANGE_SAMPLE`."""
    flat = values.flatten()
    some = flat[:: -(-len(flat) // RANGE_SAMPLE)]
    outside = int(len(some) * OUTSIDE / 2)
    # Not sorted as a whole, which on the CPU takes as long as a block of a small network.
    smallest = some.topk(outside + 1, largest=False).values
    largest = some.topk(outside + 1).values
    return smallest[-1], largest[-1]


def spread(x: Tensor, average: Average = itself) -> Tensor:
    """Root mean square of deviations from the mean over the batch of all processes, of `[B, ...]` on each."""
    return average((x - average(x.mean(0))).square().mean()).sqrt()


def similarity(x: Tensor) -> Tensor:
    """Mean cosine between the pairs of `[S, B, ...]` along S, then the mean over B; 1 where all S are alike.

    Cosines are of deviations from each sample's own mean by channel, which is colour and the same in all.
    """
    flat = x.float() - x.float().mean(dim=tuple(range(3, x.ndim)), keepdim=True)
    unit = F.normalize(flat.flatten(2), dim=2)
    count = len(unit)
    pairs = torch.einsum("sbd,tbd->bst", unit, unit)
    return ((pairs.sum((1, 2)) - pairs.diagonal(dim1=1, dim2=2).sum(1)) / (count * (count - 1))).mean()


def velocity(process: Process, x_t: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """The velocity `eps - x0` that a clean prediction `x0` of `x_t` at levels `sigma` `[B]` implies; sigma above 0."""
    noise = process.add_noise(torch.zeros_like(x0), torch.ones_like(x0), sigma)
    eps = (x_t - process.add_noise(x0, torch.zeros_like(x0), sigma)) / noise
    return eps - x0


def rms(x: Tensor) -> Tensor:
    """Root mean square over all but the batch axis: `[B]`."""
    return x.float().flatten(1).square().mean(1).sqrt()


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine between samples `[B, ...]`: `[B]`."""
    return F.cosine_similarity(a.float().flatten(1), b.float().flatten(1), dim=1)
