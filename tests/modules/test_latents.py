"""The kinds of latents on tiny VAEs of diffusers' classes, against the arithmetic of the stock pipelines."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLFlux2, AutoencoderKLQwenImage, Flux2KleinPipeline
from torch import Tensor
from torch.testing import assert_close

from swd.modules.encoders import Encoders
from swd.modules.latents import ChannelLatents, channels, factors, kind_of
from swd.types import SeededDraws


def seeded(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def flux2() -> Any:
    """Statistics other than 0 and 1, with which a normalisation that is left out would be seen."""
    torch.manual_seed(0)
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    ).eval()
    vae.bn.running_mean.copy_(0.3 * seeded(16))
    vae.bn.running_var.copy_(1.0 + seeded(16).square())
    return vae


def qwen() -> Any:
    torch.manual_seed(0)
    return AutoencoderKLQwenImage(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()


def encoders(vae: Any) -> Encoders:
    return Encoders(SimpleNamespace(vae=vae))


def test_flux2_latents_are_normalised_as_its_pipeline_does() -> None:
    vae = flux2()
    pixels = seeded(2, 3, 16, 24).clamp(-1, 1)
    ours = encoders(vae).encode(pixels, SeededDraws(0))
    with torch.no_grad():
        drawn, std = encoders(vae).posterior(pixels)
        mean, _ = encoders(vae).distribution(pixels)
        pipeline: Any = SimpleNamespace(vae=vae, _patchify_latents=Flux2KleinPipeline._patchify_latents)
        theirs = [Flux2KleinPipeline._encode_vae_image(pipeline, row[None], None) for row in pixels]
    stock = Flux2KleinPipeline._unpatchify_latents(torch.cat(theirs))
    assert ours.shape == (2, 4, 8, 12)
    assert_close(mean, stock, rtol=1e-4, atol=1e-5)
    assert (mean - drawn).abs().max() > 0.1, "the statistics count"
    assert_close(encoders(vae).decode(mean), vae.decode(drawn).sample.clamp(-1, 1), rtol=1e-3, atol=1e-4)
    assert std.shape == drawn.shape and vae.bn.num_batches_tracked == 0


def test_qwen_pictures_are_videos_of_one_frame() -> None:
    vae = qwen()
    pixels = seeded(2, 3, 16, 24).clamp(-1, 1)
    own = encoders(vae)
    with torch.no_grad():
        z = vae.encode(pixels[:, :, None]).latent_dist.mean
        mean, std = (torch.tensor(v).view(1, 16, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
        expected = ((z - mean) / std)[:, :, 0]
        found, _ = own.distribution(pixels)
        pictures = vae.decode(z).sample[:, :, 0].clamp(-1, 1)
    assert found.shape == (2, 16, 2, 3)
    assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert_close(own.decode(found), pictures, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"latent_channels": 32, "block_out_channels": (8, 8, 8, 8)}, (32, (1, 8))),
        ({"z_dim": 48, "scale_factor_temporal": 4, "scale_factor_spatial": 16}, (48, (4, 16))),
        ({"latent_channels": 32, "encoder_block_out_channels": (8,) * 6}, (32, (1, 32))),
        ({}, (None, (4, 8))),
    ],
)
def test_channels_and_factors_by_configuration(config: dict[str, Any], expected: Any) -> None:
    assert (channels(config), factors(config)) == expected


def test_the_kind_is_that_of_the_class_or_of_its_base() -> None:
    class AutoencoderKLWan:
        pass

    class Derived(AutoencoderKLWan):
        pass

    assert kind_of(Derived()) is ChannelLatents
