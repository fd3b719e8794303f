"""Sampling with networks in memory: the same operations as the stock pipeline with `ScaleWiseScheduler`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from swd.modules.in_pipelines import as_in_pipelines
from swd.modules.networks import Networks
from swd.types import Conditioning, Role, Size


def initial_latents(seeds: Sequence[int], channels: int, size: Size) -> Tensor:
    """Pure noise `[B, C, *size]`, each row from its own seed, as diffusers draws it from a list of generators."""
    rows = [torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return torch.cat(rows)


@torch.no_grad()
@as_in_pipelines()
def sample_latents(
    networks: Networks,
    scheduler: Any,
    latents: Tensor,
    conditioning: Conditioning,
    empty: Conditioning | None = None,
    guidance_scale: float = 1.0,
    role: Role = "student",
    steps: int | None = None,
) -> Tensor:
    """Run a diffusers scheduler over one role of the networks.

    Args:
        networks: the roles, which share one base.
        scheduler: a `ScaleWiseScheduler`, or any diffusers scheduler for the same diffusion process.
        latents: initial noise `[B, C, *first_size]`.
        conditioning: B rows.
        empty: conditioning of the empty prompt, one row; needed with guidance.
        guidance_scale: above 1 switches classifier-free guidance on.
        role: the network that predicts.
        steps: number of steps, for schedulers that do not define it themselves.

    Returns:
        Clean latents `[B, C, *last_size]`.
    """
    scheduler.set_timesteps(steps or scheduler.num_inference_steps, device=latents.device)
    # With guidance each row is predicted twice, without and with its prompt.
    guided = guidance_scale > 1
    if guided:
        assert empty is not None, "guidance takes an empty conditioning"
        conditioning = Conditioning.cat([empty.expand(len(latents)), conditioning])

    # Predict, then let the scheduler take the step; it may return a larger latent.
    x = latents
    with networks.role(role), networks.autocast():
        for i, timestep in enumerate(scheduler.timesteps):
            x_in = torch.cat([x, x]) if guided else x
            prediction, _ = networks.backbone_of(role).predict(
                x_in, scheduler.sigmas[i].expand(len(x_in)), conditioning
            )
            if guided:
                without, text = prediction.chunk(2)
                prediction = networks.backbone.guide(text, without, guidance_scale)
            x = scheduler.step(prediction, timestep, x, return_dict=False)[0]
    return x
