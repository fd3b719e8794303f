"""The stock pipeline with `ScaleWiseScheduler` is the sampler used in training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from tiny import CHANNELS, SIGMAS, SIZES, TEXT_TOKENS, build_latents, build_networks, build_schedule
from torch import Tensor
from torch.testing import assert_close

from swd.modules.backbones.sd3 import SD3Encoders
from swd.modules.networks import SharedBase
from swd.sampling import initial_latents, sample_latents
from swd.schedule import upsample
from swd.scheduler import ScaleWiseScheduler

PROMPTS = ["a red star above a blue ring", "a green heart"]


@pytest.fixture(scope="module")
def networks() -> SharedBase:
    return build_networks(alpha=4)


@pytest.fixture(scope="module")
def pipe(tiny_model: Path, networks: SharedBase) -> StableDiffusion3Pipeline:
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny_model)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights({f"transformer.{k}": v for k, v in networks.adapter_state("student").items()})
    pipe.scheduler = build_schedule().scheduler(divisor=2)
    return pipe


def draw(pipe: StableDiffusion3Pipeline, prompts: Sequence[str], seeds: Sequence[int], **more: Any) -> Tensor:
    arguments: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 1.0, "height": 32, "width": 32} | more
    generator = [torch.Generator().manual_seed(s) for s in seeds]
    return pipe(
        list(prompts), generator=generator, output_type="latent", max_sequence_length=TEXT_TOKENS, **arguments
    ).images


def test_the_stock_pipeline_equals_the_training_sampler_bit_for_bit(
    pipe: StableDiffusion3Pipeline, networks: SharedBase
) -> None:
    conditioning = SD3Encoders(pipe, TEXT_TOKENS).encode_prompts(PROMPTS)
    latents = initial_latents([3, 4], CHANNELS, (SIZES[0],) * 2)
    ours = sample_latents(networks, build_schedule().scheduler(), latents, conditioning)
    theirs = draw(pipe, PROMPTS, [3, 4])
    assert ours.shape == (2, CHANNELS, SIZES[-1], SIZES[-1])
    assert torch.equal(theirs, ours)
    teacher = sample_latents(networks, build_schedule().scheduler(), latents, conditioning, role="teacher")
    assert (teacher - ours).abs().max() > 0.1


def test_guidance_equals_the_stock_pipeline_too(pipe: StableDiffusion3Pipeline, networks: SharedBase) -> None:
    encoders = SD3Encoders(pipe, TEXT_TOKENS)
    conditioning, empty = encoders.encode_prompts(PROMPTS), encoders.encode_prompts([""])
    latents = initial_latents([3, 4], CHANNELS, (SIZES[0],) * 2)
    ours = sample_latents(networks, build_schedule().scheduler(), latents, conditioning, empty, guidance_scale=3.0)
    assert_close(draw(pipe, PROMPTS, [3, 4], guidance_scale=3.0), ours, rtol=1e-4, atol=1e-4)


def test_a_picture_is_the_same_alone_or_in_a_batch(pipe: StableDiffusion3Pipeline) -> None:
    together = draw(pipe, PROMPTS, [3, 4])
    for i, (prompt, seed) in enumerate(zip(PROMPTS, [3, 4], strict=True)):
        assert_close(draw(pipe, [prompt], [seed])[0], together[i], rtol=0, atol=1e-5)


def test_a_picture_follows_its_generator_and_nothing_else(pipe: StableDiffusion3Pipeline) -> None:
    first = draw(pipe, PROMPTS[:1], [3])
    torch.manual_seed(123)
    assert torch.equal(draw(pipe, PROMPTS[:1], [3]), first)
    assert (draw(pipe, PROMPTS[:1], [5]) - first).abs().max() > 0.1


def test_sizes_follow_the_aspect_ratio_of_the_call(pipe: StableDiffusion3Pipeline) -> None:
    pipe.scheduler.keep_x0 = True
    latents = draw(pipe, PROMPTS, [3, 4], height=48, width=32)
    assert latents.shape[2:] == (12, 8)
    assert [tuple(x.shape[2:]) for x in pipe.scheduler.x0_predictions] == [(6, 4), (8, 6), (12, 8)]
    pipe.scheduler.keep_x0 = False
    assert draw(pipe, PROMPTS, [3, 4]).shape[2:] == (8, 8), "the next call starts from the schedule's own sizes"


@pytest.mark.parametrize("first", [(4, 6), (6, 4), (2, 2), (10, 4)])
def test_stretched_sizes_are_multiples_of_the_divisor(first: tuple[int, int]) -> None:
    scheduler = build_schedule().scheduler(divisor=2)
    sizes = scheduler._sizes_for(first)
    assert sizes[0] == first
    for size, base in zip(sizes, SIZES, strict=True):
        for side, start in zip(size, first, strict=True):
            assert side % 2 == 0 and abs(side - start * base / SIZES[0]) <= 1


@pytest.mark.parametrize("steps", [1, 2, 4, 28])
def test_another_number_of_steps_is_refused(pipe: StableDiffusion3Pipeline, steps: int) -> None:
    with pytest.raises(ValueError, match=rf"num_inference_steps={steps}.*pass num_inference_steps=3"):
        draw(pipe, PROMPTS[:1], [3], num_inference_steps=steps)


def test_image_to_image_is_refused() -> None:
    scheduler = build_schedule().scheduler()
    scheduler.set_begin_index(0)
    with pytest.raises(ValueError, match="strength"):
        scheduler.set_begin_index(1)
    with pytest.raises(ValueError, match="text-to-image"):
        scheduler.scale_noise(build_latents(), None, None)


def test_a_pipelines_own_sigmas_are_refused_unless_they_are_a_default() -> None:
    scheduler = build_schedule().scheduler()
    for sigmas in (SIGMAS, [1.0, 2 / 3, 1 / 3]):
        scheduler.set_timesteps(sigmas=list(sigmas), mu=1.15)
        assert_close(scheduler.timesteps, torch.tensor([1000.0, 800.0, 600.0]))
    with pytest.raises(ValueError, match="leave sigmas out"):
        scheduler.set_timesteps(sigmas=[1.0, 0.7, 0.6])
    with pytest.raises(ValueError, match="3 steps"):
        scheduler.set_timesteps(sigmas=[1.0, 0.5])


def run(scheduler: ScaleWiseScheduler, x: Tensor, noises: Sequence[Tensor | None] = (None,) * 3) -> list[Tensor]:
    """Steps with the stand-in network `velocity = x / 2`; every state, the first included."""
    scheduler.set_timesteps(3)
    states = [x]
    for timestep, noise in zip(scheduler.timesteps, noises, strict=True):
        states.append(scheduler.step(states[-1] / 2, timestep, states[-1], noise=noise).prev_sample)
    return states


def test_the_loop_equals_its_closed_form() -> None:
    x = build_latents(side=4)
    noises = [build_latents(side=6, seed=1), build_latents(side=8, seed=2), None]
    actual, expected = run(build_schedule().scheduler(), x, noises), x.double()
    for i, sigma in enumerate(SIGMAS):
        expected = expected * (1 - sigma / 2)
        if i < 2:
            following = SIGMAS[i + 1]
            expected = (1 - following) * upsample(expected, (SIZES[i + 1],) * 2) + following * noises[i].double()
        assert_close(actual[i + 1].double(), expected, rtol=0, atol=1e-5)


def test_fresh_noise_is_standard_and_its_own_for_each_step_and_sample() -> None:
    scheduler = ScaleWiseScheduler(sigmas=[1.0, 0.9, 0.8], sizes=[64, 64, 64])
    x = torch.randn(2, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(3)
    noises = [x[0], x[1]]
    for i in range(2):
        sigma = scheduler.sigmas[i + 1]
        zero = x / scheduler.sigmas[i]  # the velocity that predicts x0 = 0
        x = scheduler.step(zero, 0, x).prev_sample
        noises += [row / sigma for row in x]
    for noise in noises:
        assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    table = torch.corrcoef(torch.stack([n.flatten() for n in noises]))
    assert (table - torch.eye(6)).abs().max() < 0.05


def test_every_prediction_is_kept_on_request() -> None:
    scheduler = build_schedule().scheduler()
    run(scheduler, build_latents(side=4))
    assert scheduler.x0_predictions == []
    scheduler.keep_x0 = True
    states = run(scheduler, build_latents(side=4))
    assert [x.shape[-1] for x in scheduler.x0_predictions] == list(SIZES)
    assert torch.equal(scheduler.x0_predictions[-1], states[-1])
    run(scheduler, build_latents(side=4))
    assert len(scheduler.x0_predictions) == 3, "a new call starts anew"


def test_bf16_latents_are_computed_in_float32_and_returned_as_bf16() -> None:
    scheduler, x = build_schedule().scheduler(), build_latents(side=4).bfloat16()
    scheduler.set_timesteps(3)
    output = scheduler.step((x / 2), 1000, x)
    assert output.prev_sample.dtype == output.pred_original_sample.dtype == torch.bfloat16
    exact = build_schedule().scheduler()
    expected = exact.step((x / 2).float(), 1000, x.float())
    assert torch.equal(output.prev_sample, expected.prev_sample.bfloat16())
    assert torch.equal(output.pred_original_sample, expected.pred_original_sample.bfloat16())


def test_one_step_too_many_is_refused() -> None:
    scheduler = build_schedule().scheduler()
    x = run(scheduler, build_latents(side=4))[-1]
    assert scheduler.step_index == 3
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(x, 0, x)


@pytest.mark.parametrize("sizes", [[4, 6, 8], [[4, 6], [6, 8], [8, 8]], [[2, 4, 4], [3, 6, 6], [5, 8, 8]]])
def test_a_saved_scheduler_is_the_same(tmp_path: Path, sizes: list[Any]) -> None:
    scheduler = ScaleWiseScheduler(sigmas=SIGMAS, sizes=sizes, divisor=2)
    scheduler.save_pretrained(tmp_path)
    loaded = ScaleWiseScheduler.from_pretrained(tmp_path)
    assert loaded.base_sizes == scheduler.base_sizes and loaded.config.divisor == 2
    assert loaded.config.interpolation == "bicubic"
    x = torch.randn(2, 4, *scheduler.base_sizes[0], generator=torch.Generator().manual_seed(0))
    for a, b in zip(run(loaded, x), run(scheduler, x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigmas": [1.0, 0.5], "sizes": [4]}, "2 sigmas but 1 sizes"),
        ({"sigmas": [1.0], "sizes": [4], "interpolation": "nearest"}, "nearest"),
    ],
)
def test_a_scheduler_that_training_does_not_know_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScaleWiseScheduler(**arguments)


def test_latents_of_another_kind_are_refused() -> None:
    scheduler = build_schedule().scheduler()
    video = torch.zeros(1, 4, 2, 4, 4)
    with pytest.raises(ValueError, match="first size"):
        scheduler.step(video, 0, video)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_draws_the_same_noise(dtype: torch.dtype) -> None:
    """Pictures of a half-precision pipeline are those of the training sampler, up to rounding."""
    latents = build_latents(side=SIZES[0])

    def run(x: torch.Tensor) -> torch.Tensor:
        scheduler = build_schedule().scheduler(2)
        scheduler.set_timesteps(len(SIZES))
        for timestep in scheduler.timesteps:
            x = scheduler.step(torch.zeros_like(x), timestep, x, return_dict=False)[0]
        return x.float()

    assert (run(latents.to(dtype)) - run(latents)).abs().max() < 0.05
