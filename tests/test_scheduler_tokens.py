"""The scheduler under FLUX's tokens, and the numbers by which it knows a latent."""

from __future__ import annotations

import hashlib
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import swd.scheduler as scheduler_module
from swd.scheduler import (
    ScaleWiseScheduler,
    check_schedule,
    pack,
    position_ids,
    signal_levels,
    unpack,
    upsample,
    vp_scales,
    vp_timestep,
)

SIGMAS, SIZES = [1.0, 0.8, 0.6], [4, 6, 8]
CHANNELS = 4


class Network(torch.nn.Module):
    """Predicts half of its input, and notes the position ids that reach it."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(**config)
        self.ids: list[Tensor] = []

    def forward(self, hidden_states: Tensor, img_ids: Tensor) -> Tensor:
        self.ids.append(img_ids)
        return hidden_states / 2


class FluxTransformer2DModel(Network):
    """The class name by which the scheduler knows FLUX."""


def attached(**config: Any) -> tuple[ScaleWiseScheduler, Network]:
    scheduler = ScaleWiseScheduler(sigmas=SIGMAS, sizes=SIZES, divisor=2)
    network = FluxTransformer2DModel(**({"axes_dims_rope": (2, 2)} | config))
    pipe = SimpleNamespace(scheduler=None, transformer=network)
    assert scheduler.attach(pipe) is pipe and pipe.scheduler is scheduler
    return scheduler, network


def loop(scheduler: ScaleWiseScheduler, network: Network, x: Tensor, final: tuple[int, int]) -> Tensor:
    """A pipeline's loop, with ids of the final size at every step."""
    network.ids.clear()
    scheduler.set_timesteps(3)
    for timestep in scheduler.timesteps:
        x = scheduler.step(network(hidden_states=x, img_ids=position_ids(final)), timestep, x, return_dict=False)[0]
    return x


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_network_gets_the_position_ids_of_each_step() -> None:
    scheduler, network = attached()
    x = scheduler.initial_latents(2, CHANNELS, 12, 8, generator=seeded(), packed=True)
    assert x.shape == (2, 6, 16)
    drawn = loop(scheduler, network, x, (12, 8))
    assert drawn.shape == (2, 24, 16)
    for found, size in zip(network.ids, [(6, 4), (8, 6), (12, 8)], strict=True):
        assert torch.equal(found, position_ids(size))
    late = position_ids((12, 8)).double()
    network(hidden_states=x, img_ids=late)
    assert network.ids[-1] is late, "after the last step the network is called by itself"


def test_position_ids_keep_their_dtype() -> None:
    scheduler, network = attached()
    scheduler.set_timesteps(3)
    x = scheduler.initial_latents(1, CHANNELS, packed=True)
    network(hidden_states=x, img_ids=position_ids((8, 8), dtype=torch.bfloat16))
    assert network.ids[-1].dtype == torch.bfloat16 and network.ids[-1].shape == (4, 3)


def test_tokens_are_sampled_as_maps_are() -> None:
    scheduler, network = attached()
    maps = scheduler.initial_latents(2, CHANNELS, 12, 8, generator=seeded())
    tokens = loop(scheduler, network, pack(maps), (12, 8))
    scheduler.set_timesteps(3)
    x = maps
    for timestep in scheduler.timesteps:
        x = scheduler.step(x / 2, timestep, x).prev_sample
    assert x.shape == (2, CHANNELS, 12, 8)
    assert torch.equal(unpack(tokens, (12, 8)), x)
    lone = ScaleWiseScheduler(sigmas=SIGMAS, sizes=SIZES, divisor=2)  # no network was attached
    x = lone.initial_latents(2, CHANNELS, 12, 8, generator=seeded(), packed=True)
    for timestep in lone.timesteps:
        x = lone.step(x / 2, timestep, x).prev_sample
    assert torch.equal(x, tokens)


def test_attaching_again_replaces_the_earlier_schedule() -> None:
    first, network = attached()
    second = ScaleWiseScheduler(sigmas=SIGMAS, sizes=[4, 4, 8], divisor=2)
    second.attach(SimpleNamespace(scheduler=None, transformer=network))
    loop(second, network, second.initial_latents(1, CHANNELS, packed=True), (8, 8))
    assert [len(ids) for ids in network.ids] == [4, 4, 16] and first.step_index == 0
    assert len(network._forward_pre_hooks) == 1


def test_other_networks_are_left_alone() -> None:
    scheduler = ScaleWiseScheduler(sigmas=SIGMAS, sizes=SIZES)
    other = Network(axes_dims_rope=(2, 2))  # other families have rotary axes too
    for pipe in (SimpleNamespace(transformer=other), SimpleNamespace(transformer=None), SimpleNamespace()):
        assert scheduler.attach(pipe) is pipe and pipe.scheduler is scheduler
    assert not other._forward_pre_hooks


def test_a_compiled_network_or_one_with_an_adapter_is_known_by_the_network_inside() -> None:
    scheduler = ScaleWiseScheduler(sigmas=SIGMAS, sizes=SIZES, divisor=2)
    for wrapped in (torch.compile(FluxTransformer2DModel()), WithAdapter(FluxTransformer2DModel())):
        scheduler.attach(SimpleNamespace(transformer=wrapped))
        assert len(wrapped._forward_pre_hooks) == 1


class WithAdapter(torch.nn.Module):
    """A peft model's way to its base."""

    def __init__(self, base: Network) -> None:
        super().__init__()
        self.base = base

    def get_base_model(self) -> Network:
        return self.base


def test_layouts_hold_the_same_numbers() -> None:
    scheduler = ScaleWiseScheduler(sigmas=SIGMAS, sizes=SIZES, divisor=2)
    made = {
        layout: scheduler.initial_latents(2, CHANNELS, 12, 8, generator=seeded(), layout=layout)
        for layout in ("map", "tokens", "patches")
    }
    assert made["map"].shape == (2, 4, 6, 4) and made["patches"].shape == (2, 16, 3, 2)
    assert torch.equal(made["tokens"], pack(made["map"]))
    assert torch.equal(made["patches"].flatten(2).transpose(1, 2), made["tokens"])
    assert torch.equal(made["patches"][1, 4 * 3 + 2 * 1 + 0], made["map"][1, 3, 1::2, 0::2])
    with pytest.raises(ValueError, match=r"^layout 'rows' is not known; use one of map, tokens, patches$"):
        scheduler.initial_latents(1, CHANNELS, layout="rows")


def test_tokens_of_another_size_are_refused() -> None:
    scheduler, network = attached()
    plain = torch.randn(1, 9, 16, generator=seeded())
    message = (
        "9 tokens are no latent of size (4, 4), where a call that ends at (8, 8) starts: "
        "pass latents=initial_latents(..., packed=True), and height and width of the final size"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        loop(scheduler, network, plain, (8, 8))
    made = scheduler.initial_latents(1, CHANNELS, 10, 6, packed=True)  # starts at 4 x 4 too
    message = (
        "latents=initial_latents(...) were made for the final size (10, 6), but height and width of the "
        "call are those of (8, 8); give both the same"
    )
    assert made.shape == (1, 4, 16)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        loop(scheduler, network, made, (8, 8))
    scheduler.set_timesteps(3)
    message = "9 tokens are no latent of size (4, 4): pass latents=initial_latents(...)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        scheduler.step(plain, 0, plain)


# Contents of latents


def test_first_latents_are_the_generators_own_numbers() -> None:
    scheduler = ScaleWiseScheduler(sigmas=SIGMAS, sizes=[[4, 6], [6, 9], [8, 12]])
    assert torch.equal(scheduler.initial_latents(2, 3, generator=seeded()), torch.randn(2, 3, 4, 6, generator=seeded()))
    each = scheduler.initial_latents(2, 3, generator=[seeded(1), seeded(2)])
    assert torch.equal(each, torch.cat([torch.randn(1, 3, 4, 6, generator=seeded(s)) for s in (1, 2)]))
    with pytest.raises(ValueError, match=r"^1 generators for 2 samples; give one each$"):
        scheduler.initial_latents(2, 3, generator=[seeded()])
    assert scheduler.initial_latents(1, 3, height=16).shape == (1, 3, 8, 6)
    assert scheduler.initial_latents(1, 3, width=24).shape == (1, 3, 4, 12)
    film = ScaleWiseScheduler(sigmas=[1.0, 0.5], sizes=[[3, 4, 6], [6, 8, 12]])
    assert film.initial_latents(1, 3).shape == (1, 3, 3, 4, 6)
    assert film.initial_latents(1, 3, frames=12).shape == (1, 3, 6, 4, 6)
    assert film.initial_latents(1, 3, 16, 24, 2).shape == (1, 3, 1, 8, 12)


def test_sizes_end_where_asked_in_multiples_of_the_divisor() -> None:
    scheduler = ScaleWiseScheduler(sigmas=SIGMAS, sizes=SIZES, divisor=2)
    assert scheduler.sizes_ending_at((16, 6)) == [(8, 4), (12, 4), (16, 6)]
    assert scheduler.sizes_ending_at((2, 2)) == [(2, 2), (2, 2), (2, 2)], "a side is at least one divisor"
    for wrong in ((8, 9), (9, 8)):
        with pytest.raises(ValueError, match=rf"^size {re.escape(str(wrong))}: sides must be multiples of 2, above 0$"):
            scheduler.sizes_ending_at(wrong)
    film = ScaleWiseScheduler(sigmas=SIGMAS, sizes=[[3, 4, 4], [5, 6, 6], [9, 8, 8]], divisor=2)
    assert film.sizes_ending_at((7, 16, 8)) == [(2, 8, 4), (4, 12, 6), (7, 16, 8)], "frames are no multiples"
    assert film.sizes_ending_at((1, 8, 8))[0] == (1, 4, 4)


def seed_of(row: Tensor) -> int:
    """A sample's seed in exported models: 8 bytes of BLAKE2b of its signs, one a byte, without the lowest bit."""
    signs = bytes(int(value > 0) for value in row.flatten().tolist())
    return int.from_bytes(hashlib.blake2b(signs, digest_size=8).digest(), "little") // 2


@pytest.mark.parametrize("packed", [False, True])
def test_fresh_noise_comes_from_the_signs_of_the_first_latent(packed: bool) -> None:
    """At step i a generator with the sample's seed plus i draws it: pictures of exported models depend on it."""
    scheduler = ScaleWiseScheduler(sigmas=SIGMAS, sizes=SIZES, divisor=2)
    maps = torch.randn(2, CHANNELS, 4, 4, generator=seeded())
    maps[0, 0, 0, 0] = 0.0
    x = pack(maps) if packed else maps
    seeds = [seed_of(row) for row in maps]
    for i, side in ((1, 6), (2, 8)):
        before = unpack(x, (SIZES[i - 1],) * 2) if packed else x
        output = scheduler.step(torch.zeros_like(x), 0, x)
        x = output.prev_sample
        noise = torch.stack([torch.randn(CHANNELS, side, side, generator=seeded((s + i) % 2**63)) for s in seeds])
        expected = (1 - SIGMAS[i]) * upsample(before, (side, side)) + SIGMAS[i] * noise
        assert_close(unpack(x, (side, side)) if packed else x, expected, rtol=0, atol=1e-6)
        if not packed:
            assert torch.equal(output.pred_original_sample, before)


def test_stored_noise_of_a_seed() -> None:
    """Numbers of version 0.1."""
    signs = torch.tensor([1.0, -1, 1, 1, -1, -1, 1, -1]).view(1, 2, 2, 2)
    scheduler = ScaleWiseScheduler(sigmas=[1.0, 0.5], sizes=[2, 2])
    x = scheduler.step(signs, 0, signs).prev_sample  # the clean prediction is 0: half the noise is left
    assert seed_of(signs[0]) == 3776150720842565828
    assert_close((2 * x).flatten()[:4], torch.tensor([-1.04674, 0.34503, -1.21472, 0.38518]), rtol=0, atol=1e-4)


def test_a_mark_turns_signs_by_the_size() -> None:
    """Marked are latents whose first size alone would lead elsewhere: one to 32 of their signs are turned."""
    scheduler = ScaleWiseScheduler(sigmas=SIGMAS, sizes=[4, 6, 8], divisor=1)
    plain = torch.randn(2, CHANNELS, 4, 4, generator=seeded())
    for final in ((9, 8), (8, 7), (9, 9)):
        made = scheduler.initial_latents(2, CHANNELS, *final, generator=seeded())
        digest = int.from_bytes(hashlib.blake2b(repr(final).encode(), digest_size=4).digest(), "little")
        turned = [place == 0 or digest >> place & 1 == 1 for place in range(32)] + [False] * 32
        factors = 1 - 2 * torch.tensor(turned).float()
        assert torch.equal(made.flatten(1), plain.flatten(1) * factors)
    assert torch.equal(scheduler.initial_latents(2, CHANNELS, 8, 8, generator=seeded()), plain)


# First latents of a call


def test_a_number_of_steps_or_levels_of_its_own_is_refused() -> None:
    scheduler = ScaleWiseScheduler(sigmas=SIGMAS, sizes=SIZES)
    for near in ([1.0, 0.8009, 0.6], [1.0, 2 / 3, 1 / 3 + 4e-6]):
        scheduler.set_timesteps(sigmas=near)
    for far in ([1.0, 0.802, 0.6], [1.0, 2 / 3, 1 / 3 + 1e-4]):
        with pytest.raises(ValueError, match=r"^sigmas=\[1\.0, .*\] differ from this model's schedule \[1\.0, 0\.8, 0"):
            scheduler.set_timesteps(sigmas=far)
    message = "num_inference_steps=2, but this model was distilled for 3 steps; pass num_inference_steps=3"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        scheduler.set_timesteps(2)
    scheduler.set_timesteps()
    assert scheduler.num_inference_steps == 3
    scheduler.set_timesteps(3, device="meta")
    assert scheduler.timesteps.is_meta and scheduler.sigmas.is_meta


def test_refusals_of_image_to_image_say_why() -> None:
    scheduler = ScaleWiseScheduler(sigmas=SIGMAS, sizes=SIZES)
    x = torch.zeros(1, CHANNELS, 4, 4)
    assert scheduler.scale_model_input(x) is x and scheduler.scale_model_input(x, 3) is x
    scheduler.set_begin_index()
    assert scheduler.begin_index == 0
    message = "strength below 1 (begin_index=1) is not supported: start from pure noise"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        scheduler.set_begin_index(1)
    message = "a scale-wise model starts from pure noise: use the text-to-image pipeline, without strength"
    with pytest.raises(ValueError, match=f"^{message}$"):
        scheduler.scale_noise(x)
    scheduler.step(x, 0, x)
    message = (
        "add_noise of latents of size (4, 4) at a step of size (6, 6): inpainting and "
        "image-to-image keep one size, a scale-wise model grows; use the text-to-image pipeline"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        scheduler.add_noise(x, x, 500)
    grown = scheduler.add_noise(torch.ones(1, CHANNELS, 6, 6), torch.zeros(1, CHANNELS, 6, 6), 500)
    assert_close(grown, torch.full_like(grown, 0.5))


@pytest.mark.parametrize(("kind", "last"), [("flow", 500), ("epsilon", 999)])
def test_noise_is_added_at_any_timestep_of_the_network(kind: str, last: int) -> None:
    scheduler = ScaleWiseScheduler(sigmas=SIGMAS, sizes=SIZES, num_train_timesteps=500, prediction_type=kind)
    ones, zeros = torch.ones(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)
    for time in (0, last // 2, last):
        signal, noise = scheduler.add_noise(ones, zeros, time), scheduler.add_noise(zeros, ones, torch.tensor([time]))
        share = (signal, noise) if kind == "flow" else (signal.square(), noise.square())
        assert_close(share[0] + share[1], ones)
        if kind == "flow":
            assert_close(noise, torch.full_like(noise, time / last))
    both = scheduler.add_noise(ones, zeros, torch.tensor([0, last]))
    assert both[0].min() > 0.99 and both[1].max() < 0.1
    for wrong in ([last + 1], [-1], [1, 2, 3]):
        with pytest.raises(ValueError, match=rf"; give one, or one a sample, from 0 to {last}$"):
            scheduler.add_noise(ones, zeros, torch.tensor(wrong))


def test_the_variance_preserving_loop_equals_its_closed_form() -> None:
    scheduler = ScaleWiseScheduler(sigmas=SIGMAS[:2], sizes=[4, 6], prediction_type="epsilon")
    assert scheduler.timesteps.tolist() == [999, 800] and scheduler.timesteps.dtype == torch.int64
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    abar = torch.cumprod(1 - betas, 0)
    x = torch.randn(1, CHANNELS, 4, 4, generator=seeded(), dtype=torch.float64)
    noise = torch.randn(1, CHANNELS, 6, 6, generator=seeded(1))
    first = scheduler.step((x / 2).float(), 999, x.float(), noise=noise)
    x0 = (x - (1 - abar[999]).sqrt() * x / 2) / abar[999].sqrt()
    assert_close(first.pred_original_sample.double(), x0, rtol=1e-4, atol=1e-4)
    grown = upsample(x0, (6, 6))
    expected = abar[800].sqrt() * grown + (1 - abar[800]).sqrt() * noise.double()
    assert_close(first.prev_sample.double(), expected, rtol=1e-4, atol=1e-4)
    assert isinstance(scheduler.step(noise, 800, noise, return_dict=False), tuple)
    with pytest.raises(ValueError, match=r"^step called more than 2 times; call set_timesteps first$"):
        scheduler.step(noise, 0, noise)


def test_a_call_keeps_the_sizes_that_it_started_with() -> None:
    """Whatever tokens arrive later, and be they first ones of a larger call by their signs."""
    scheduler = ScaleWiseScheduler(sigmas=SIGMAS, sizes=SIZES, divisor=2)
    first = scheduler.initial_latents(1, CHANNELS, generator=seeded(), packed=True)
    larger = scheduler.initial_latents(1, CHANNELS, 12, 12, generator=seeded(1), packed=True)
    assert larger.shape == (1, 9, 16)
    scheduler.step(first, 0, first)
    assert scheduler.step(larger, 0, larger).prev_sample.shape == (1, 16, 16)
    assert scheduler.sizes == [(4, 4), (6, 6), (8, 8)]


def test_seeds_wrap_around_at_63_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swd.scheduler._latent_seed", lambda row: 2**63 - 1)
    scheduler = ScaleWiseScheduler(sigmas=[1.0, 0.5], sizes=[2, 2])
    x = torch.ones(1, CHANNELS, 2, 2)
    noised = scheduler.step(x, 0, x).prev_sample  # the clean prediction is 0: half the noise is left
    assert torch.equal(2 * noised, torch.randn(1, CHANNELS, 2, 2, generator=seeded(0)))


def test_levels_are_float32_whatever_the_default_dtype() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        scheduler = ScaleWiseScheduler(sigmas=SIGMAS, sizes=SIZES)
    finally:
        torch.set_default_dtype(torch.float32)
    assert scheduler.sigmas.dtype == scheduler.timesteps.dtype == torch.float32


@pytest.mark.parametrize("where", ["", "schedule."])
def test_a_schedule_that_is_none_is_named_by_its_place(where: str) -> None:
    for arguments, message in (
        (([1.0], [4, 6], 1), "{0}sigmas and {0}sizes differ in number: 1 sigmas but 2 sizes; give one size per sigma"),
        (([], [4], 1), "{0}sigmas is empty; give at least one noise level, e.g. [1.0]"),
        (([1.0], 4, 1), "{0}sizes is 4; give a list"),
        (([1.0, 0.5], [4, [2, 4, 4]], 1), "{0}sizes contains (2, 4, 4) beside (4, 4); give sizes that are all alike"),
        (([1.0], [4], 0), "{0}divisor is 0; use a whole number of at least 1"),
        (([1.0], [5], 2), "{0}sizes contains (5, 5); height and width must be multiples of 2"),
        (([1.0, 0.5], [6, 4], 2), "{0}sizes must not shrink, but (4, 4) follows (6, 6)"),
        (([1.0, 1.0], [6, 6], 2), "{0}sigmas must be strictly decreasing, but 1.0 follows 1.0"),
        (([1.5], [6], 2), "{0}sigmas contains 1.5; noise levels lie in (0, 1]"),
        (([None], [6], 2), "{0}sigmas contains None; noise levels are numbers in (0, 1]"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message.format(where))}$"):
            check_schedule(*arguments, *([where] if where else []))


def test_sizes_may_be_arrays_one_by_one() -> None:
    levels, sizes = check_schedule(np.array([1.0, 0.5]), [np.array([2, 4, 6]), torch.tensor([3, 4, 6])], 2)
    assert levels == (1.0, 0.5) and sizes == ((2, 4, 6), (3, 4, 6))
    assert check_schedule([1], [np.int64(4)]) == ((1.0,), ((4, 4),))


def test_of_later_position_ids_only_the_dtype_counts() -> None:
    scheduler, network = attached()
    scheduler.set_timesteps(3)
    x = scheduler.initial_latents(1, CHANNELS, packed=True)
    for step, size in enumerate(SIZES):
        ids = position_ids((8, 8)) if step == 0 else torch.zeros(16, 3)
        x = scheduler.step(network(hidden_states=x, img_ids=ids), 0, x).prev_sample
        assert torch.equal(network.ids[-1], position_ids((size, size)))


def test_a_step_of_the_variance_preserving_process_is_rounded_and_bounded() -> None:
    sigmas = torch.tensor([0.0, 0.0004, 0.0006, 0.0014, 0.5, 0.9994, 1.0])
    assert vp_timestep(sigmas).tolist() == [0, 0, 1, 1, 500, 999, 999]
    assert vp_timestep(torch.tensor(0.7, dtype=torch.bfloat16)).item() == 699  # bf16 has 0.69921875


def test_predictions_are_kept_in_the_dtype_of_the_latents() -> None:
    scheduler = ScaleWiseScheduler(sigmas=SIGMAS, sizes=SIZES)
    scheduler.keep_x0 = True
    x = torch.ones(1, CHANNELS, 4, 4, dtype=torch.bfloat16)
    scheduler.step(x / 2, 0, x)
    assert scheduler.x0_predictions[0].dtype == torch.bfloat16


def test_noise_is_added_where_the_latents_lie() -> None:
    for kind in ("flow", "epsilon"):
        scheduler = ScaleWiseScheduler(sigmas=SIGMAS, sizes=SIZES, prediction_type=kind)
        x = torch.ones(1, CHANNELS, 4, 4)
        assert scheduler.add_noise(x.to("meta"), x, 500).is_meta


def test_what_a_call_cannot_start_from_is_said_in_full() -> None:
    scheduler = ScaleWiseScheduler(sigmas=SIGMAS, sizes=SIZES, divisor=2)
    large = torch.ones(1, CHANNELS, 8, 8)
    message = (
        "the first latent has size (8, 8), but this schedule starts at (4, 4) and ends at (8, 8): the call would end "
        "at (16, 16). Pass latents=scheduler.initial_latents(..) for the final size, or height and width (num_frames) "
        "of the first size alone (SANA: with use_resolution_binning=False)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        scheduler.step(large, 0, large)
    scheduler.set_timesteps()
    made = [scheduler.initial_latents(1, CHANNELS, *final, generator=seeded(3)) for final in ((8, 8), (10, 8))]
    both = torch.cat(made)
    message = "latents of one call were made for final sizes (8, 8) and (10, 8); call twice"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        scheduler.step(both, 0, both)
    scheduler.set_timesteps()
    video = torch.ones(1, CHANNELS, 2, 4, 4)
    message = "initial latent has size (2, 4, 4), the schedule's first size is (4, 4)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        scheduler.step(video, 0, video)
    for wrong in ((2, 8, 8), (8,)):
        with pytest.raises(ValueError, match="zip"):
            scheduler.sizes_ending_at(wrong)


@pytest.mark.parametrize(
    ("sizes", "first", "too_large"),
    [
        ([4, 8], (1, 100), True),  # hardly any side after rounding, but of far more area
        ([4, 8], (1, 18), False),
        ([[6, 20, 34], [21, 60, 104]], (6, 30, 52), True),
        ([[6, 20, 34], [21, 60, 104]], (7, 20, 34), True),
        ([[4, 8, 8], [8, 8, 8]], (5, 8, 8), True),
        ([[4, 4, 4], [4, 8, 8]], (5, 4, 4), False),
        ([[4, 4, 4], [4, 8, 8]], (6, 4, 4), True),
    ],
)
def test_a_first_size_has_about_the_area_and_the_frames_of_the_schedules(
    sizes: list[Any], first: tuple[int, ...], too_large: bool
) -> None:
    scheduler = ScaleWiseScheduler(sigmas=[1.0, 0.5], sizes=sizes)
    x = torch.ones(1, 1, *first)
    if not too_large:
        assert scheduler.step(x, 0, x).pred_original_sample.shape[2:] == first
        return
    with pytest.raises(
        ValueError, match=f"^the first latent has size {re.escape(str(first))}, but this schedule starts"
    ):
        scheduler.step(x, 0, x)


def test_videos_grow_in_space_and_time() -> None:
    """Each frame as a picture is, then frames blended: the first and the last stay."""
    x = torch.randn(2, 3, 2, 4, 4, generator=seeded())
    grown = upsample(x, (3, 6, 8))
    first, last = (upsample(x[:, :, frame], (6, 8)) for frame in (0, 1))
    assert_close(grown, torch.stack([first, (first + last) / 2, last], 2), rtol=0, atol=1e-6)


# Copies from the device


def test_first_latents_are_copied_from_the_device_once_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[tuple[int, ...]] = []
    plain = scheduler_module._signs

    def counted(latents: Tensor) -> Tensor:
        copied.append(tuple(latents.shape))
        return plain(latents)

    monkeypatch.setattr(scheduler_module, "_signs", counted)
    scheduler, network = attached()
    for packed in (False, True, True):
        start = scheduler.initial_latents(3, CHANNELS, 8, 8, generator=seeded(), packed=packed)
        copied.clear()
        if packed:
            loop(scheduler, network, start, (8, 8))
        else:
            scheduler.set_timesteps(3)
            for _ in SIZES:
                start = scheduler.step(start, 0, start).prev_sample
        assert copied == [(3, 4, 4 * CHANNELS) if packed else (3, CHANNELS, 4, 4)]


@pytest.mark.parametrize("kind", ["flow", "epsilon"])
@pytest.mark.parametrize("case", ["map", "tokens", "video"])
def test_steps_wait_for_nothing_on_the_device(case: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be copied from the meta device: a step that asks for a value there fails."""
    monkeypatch.setattr(scheduler_module, "_signs", lambda latents: torch.zeros(latents.shape, dtype=torch.uint8))
    sizes: Any = [(1, 4, 4), (2, 6, 6), (3, 8, 8)] if case == "video" else SIZES
    scheduler = ScaleWiseScheduler(sigmas=SIGMAS, sizes=sizes, divisor=2, prediction_type=kind)
    first = torch.randn(2, CHANNELS, *([1] if case == "video" else []), 4, 4)
    x = (pack(first) if case == "tokens" else first).to("meta")
    scheduler.set_timesteps(3, device="meta")
    for timestep in scheduler.timesteps:
        x = scheduler.step(x, timestep, x).prev_sample
    assert x.is_meta and x.shape[-1] == (4 * CHANNELS if case == "tokens" else 8)
    with pytest.raises(NotImplementedError):
        x.cpu()


def test_factors_of_the_variance_preserving_process_stay_where_the_steps_are() -> None:
    steps = torch.tensor([0, 1, 500, 999])
    abar = signal_levels()[steps]
    for found, expected in zip(vp_scales(steps), (abar.sqrt(), (1 - abar).sqrt()), strict=True):
        assert torch.equal(found, expected)
    assert all(factor.is_meta for factor in vp_scales(steps.to("meta")))
