"""Embeddings of timesteps with known frequencies are diffusers' own, bit for bit."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.embeddings import Timesteps
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from swd.modules.time_waves import TimeWaves, install_waves

USUAL = {"num_channels": 256, "flip_sin_to_cos": True, "downscale_freq_shift": 0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_waves_are_those_of_diffusers(dtype: torch.dtype) -> None:
    layer = Timesteps(**USUAL)
    timesteps = torch.tensor([0.0, 0.37, 1.0, 250.5, 994.0, 1000.0]).to(dtype)
    expected = layer(timesteps)
    install_waves(nn.Sequential(layer))
    assert type(layer) is TimeWaves
    assert torch.equal(layer(timesteps), expected) and expected.dtype == torch.float32
    assert layer(timesteps.to("meta")).is_meta
    with FakeTensorMode() as mode:
        assert layer(mode.from_tensor(timesteps)).shape == expected.shape


@pytest.mark.parametrize(
    "other", [{"num_channels": 320}, {"flip_sin_to_cos": False}, {"downscale_freq_shift": 1}, {"scale": 1000}]
)
def test_layers_of_other_frequencies_stay_as_they_are(other: dict[str, int]) -> None:
    layer = Timesteps(**USUAL | other)
    install_waves(nn.Sequential(layer))
    assert type(layer) is Timesteps
