"""The stock pipeline with `ScaleWiseScheduler` is the sampler used in training."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
from tiny import CHANNELS, SIGMAS, SIZES, TEXT_TOKENS, build_latents, build_networks, build_schedule
from torch import Tensor
from torch.testing import assert_close

from swd.data.buckets import aspect_size
from swd.diffusion import RectifiedFlow, VariancePreserving
from swd.modules.backbones.sd3 import SD3Encoders
from swd.modules.networks import SharedBase
from swd.modules.sampling import initial_latents, sample_latents
from swd.schedule import ScaleSchedule, upsample
from swd.scheduler import ScaleWiseScheduler
from swd.types import UserError

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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigmas": [0.5, 0.8]}, r"sigmas must be strictly decreasing, but 0\.8 follows 0\.5"),
        ({"sigmas": [0.5, 0.5]}, "strictly decreasing"),
        ({"sigmas": [1.8, 0.5]}, r"sigmas contains 1\.8; noise levels lie in \(0, 1\]"),
        ({"sigmas": [1.0, 0.0]}, r"contains 0\.0"),
        ({"sigmas": [1.0, -0.1]}, r"contains -0\.1"),
        ({"sigmas": [1.0, float("nan")]}, "contains nan"),
        ({"sigmas": [float("inf"), 0.5]}, "contains inf"),
        ({"sigmas": ["1.0", 0.5]}, "contains '1.0'; noise levels are numbers"),
        ({"sigmas": [True, 0.5]}, "contains True"),
        ({"sigmas": [None, 0.5]}, "contains None"),
        ({"sigmas": 1.0}, r"sigmas is 1\.0; give a list"),
        ({"sigmas": "1.0"}, "give a list"),
        ({"sigmas": {"a": 1.0}}, "give a list"),
        ({"sigmas": []}, "sigmas is empty"),
        ({"sizes": []}, "2 sigmas but 0 sizes"),
        ({"sizes": [6, 4]}, r"must not shrink, but \(4, 4\) follows \(6, 6\)"),
        ({"sizes": [[4, 6], [6, 4]]}, "must not shrink"),
        ({"sizes": [[3, 4, 4], [2, 6, 6]]}, "must not shrink"),
        ({"sizes": [4, [2, 6, 6]]}, r"\(2, 6, 6\) beside \(4, 4\)"),
        ({"sizes": [0, 4]}, r"sizes contains \(0, 0\)"),
        ({"sizes": [-4, 4]}, r"sizes contains \(-4, -4\)"),
        ({"sizes": [4.5, 6]}, r"\(4\.5, 4\.5\).*whole numbers"),
        ({"sizes": ["4", "6"]}, "sizes contains '4'"),
        ({"sizes": [None, 6]}, "None"),
        ({"sizes": [True, 6]}, "True"),
        ({"sizes": [[4], [6]]}, r"\(4,\)"),
        ({"sizes": 8}, "sizes is 8; give a list"),
        ({"sizes": [5, 6], "divisor": 2}, r"\(5, 5\).*multiples of 2"),
        ({"sizes": [[4, 4], [6, 7]], "divisor": 2}, r"\(6, 7\).*multiples of 2"),
        ({"divisor": 0}, "divisor is 0; use a whole number of at least 1"),
        ({"divisor": -2}, "divisor is -2"),
        ({"divisor": 1.5}, r"divisor is 1\.5"),
        ({"divisor": "2"}, "divisor is '2'"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0"),
        ({"num_train_timesteps": None}, "num_train_timesteps is None"),
        ({"prediction_type": "v_prediction"}, "v_prediction"),
    ],
)
def test_what_is_no_schedule_is_refused_by_the_constructor_and_from_a_file(
    arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    whole = {"sigmas": [1.0, 0.5], "sizes": [4, 6]} | arguments
    with pytest.raises(ValueError, match=message) as caught:
        ScaleWiseScheduler(**whole)
    assert "\n" not in str(caught.value)
    file = tmp_path / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": "ScaleWiseScheduler"} | whole))
    with pytest.raises(ValueError, match=message):
        ScaleWiseScheduler.from_pretrained(tmp_path)
    if not {"divisor", "num_train_timesteps", "prediction_type"} & set(arguments):
        with pytest.raises(UserError, match=message):
            ScaleSchedule(**whole)


def test_what_has_been_exported_still_loads(tmp_path: Path) -> None:
    """Every field of earlier files, with the sizes in each of their forms; arrays and tensors as before."""
    fields = {"divisor": 2, "interpolation": "bicubic", "num_train_timesteps": 1000, "prediction_type": "flow"}
    for sizes in ([4, 6, 8], [4, [6, 8], 8], [[2, 4, 4], [3, 6, 6], [5, 8, 8]], [8, 8, 8]):
        config = {"_class_name": "ScaleWiseScheduler", "_diffusers_version": "0.36.0", "sigmas": list(SIGMAS)}
        (tmp_path / "scheduler_config.json").write_text(json.dumps(config | fields | {"sizes": sizes}))
        scheduler = ScaleWiseScheduler.from_pretrained(tmp_path)
        assert ScaleWiseScheduler.from_config(scheduler.config).base_sizes == scheduler.base_sizes
        assert ScaleWiseScheduler.from_config(scheduler.config, divisor=1).config.divisor == 1
    for kind in (np.array, torch.tensor):
        scheduler = ScaleWiseScheduler(sigmas=kind([1.0, 0.5]), sizes=kind([4, 6]))
        assert scheduler.base_sizes == [(4, 4), (6, 6)] and scheduler.sigmas.tolist() == [1.0, 0.5, 0.0]


@pytest.mark.parametrize(
    "other", [FlowMatchEulerDiscreteScheduler(shift=3.0), DDIMScheduler(), EulerDiscreteScheduler()], ids=type
)
def test_another_schedulers_configuration_is_refused(other: Any, tmp_path: Path) -> None:
    """`X.from_config(pipe.scheduler.config)` would take the default schedule, whatever the model."""
    kind = type(other).__name__
    with pytest.raises(ValueError, match=r"has no sigmas and sizes.*ScaleWiseScheduler\.from_pretrained\(folder\)"):
        ScaleWiseScheduler.from_config(other.config)
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"a configuration of {kind} has no sigmas and sizes"):
        ScaleWiseScheduler.from_pretrained(tmp_path)
    for config in ({}, {"sigmas": [1.0, 0.5]}, {"_class_name": "ScaleWiseScheduler", "sigmas": [1.0]}):
        with pytest.raises(ValueError, match=r"this configuration has no .*sizes"):
            ScaleWiseScheduler.from_config(config)
    own = ScaleWiseScheduler.from_config(other.config, sigmas=[1.0, 0.5], sizes=[4, 6])
    assert own.base_sizes == [(4, 4), (6, 6)]
    assert own.config.prediction_type == getattr(other.config, "prediction_type", "flow")


# Which size a call ends at


def ends_at(scheduler: ScaleWiseScheduler, x: Tensor) -> tuple[int, ...]:
    return tuple(run(scheduler, x)[-1].shape[2:])


@pytest.mark.parametrize(
    "first", [(8, 8), (6, 6), (6, 8), (16, 16), (12, 5), (5, 12), (10, 4), (20, 20), (8, 4), (4, 8)]
)
def test_a_first_latent_too_large_for_the_schedule_is_refused(first: tuple[int, int]) -> None:
    scheduler = build_schedule().scheduler(divisor=2)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"starts at \(4, 4\) and ends at \(8, 8\).*initial_latents") as caught:
            run(scheduler, torch.randn(1, 4, *first))
        assert "\n" not in str(caught.value)
    assert ends_at(scheduler, build_latents(side=4)) == (8, 8)


@pytest.mark.parametrize("first", [(6, 20, 34), (5, 20, 34), (6, 34, 20), (6, 26, 26), (6, 10, 16)])
def test_videos_start_small_on_every_axis(first: tuple[int, ...]) -> None:
    sizes = [[6, 20, 34], [11, 30, 52], [21, 60, 104]]
    scheduler = ScaleWiseScheduler(sigmas=list(SIGMAS), sizes=sizes, divisor=2)
    assert not scheduler._is_too_large(first)
    for frames, height, width in ((21, *first[1:]), (7, *first[1:]), (first[0], 60, 104), (21, 60, 104), (11, 30, 52)):
        assert scheduler._is_too_large((frames, height, width))


@pytest.mark.parametrize(("sizes", "divisor"), [((64, 80, 96, 128), 2), ((32, 48, 96, 128), 2), ((16, 20, 24, 32), 1)])
def test_first_sizes_of_all_aspect_ratios_are_taken_and_no_later_ones(sizes: tuple[int, ...], divisor: int) -> None:
    scheduler = ScaleWiseScheduler(sigmas=[1.0, 0.9, 0.8, 0.7], sizes=sizes, divisor=divisor)
    for width in range(1, 25):
        for height in range(1, 25):
            if 0.25 <= width / height <= 4:
                final = aspect_size(f"{width}:{height}", sizes[-1] ** 2, divisor)
                first, *later = scheduler.sizes_ending_at(final)
                assert not scheduler._is_too_large(first), (final, first)
                assert all(map(scheduler._is_too_large, later)), (final, later)


def test_one_size_throughout_takes_any(tmp_path: Path) -> None:
    scheduler = ScaleWiseScheduler(sigmas=list(SIGMAS), sizes=[8, 8, 8])
    for size in ((8, 8), (4, 4), (16, 24)):
        assert ends_at(scheduler, torch.randn(1, 4, *size)) == size


def test_a_plan_belongs_to_its_latents(tmp_path: Path) -> None:
    """A first size of 32x32 leads to 130x126 for the latents that were made for it, and to 128x128 for all others."""
    scheduler = ScaleWiseScheduler(sigmas=list(SIGMAS), sizes=[32, 64, 128], divisor=2)
    seed = torch.Generator().manual_seed
    plain = torch.randn(2, 4, 32, 32, generator=seed(0))
    usual = scheduler.initial_latents(2, 4, generator=seed(0))
    odd = scheduler.initial_latents(2, 4, height=130, width=126, generator=seed(0))
    large = scheduler.initial_latents(2, 4, height=256, width=192, generator=seed(0))
    assert torch.equal(usual, plain) and not torch.equal(odd, plain)
    assert torch.equal(odd.abs(), plain.abs()) and large.shape[2:] == (64, 48)
    expected = [(odd, (130, 126)), (plain, (128, 128)), (large, (256, 192)), (usual, (128, 128)), (odd, (130, 126))]
    for x, final in [*expected, *reversed(expected)]:
        assert ends_at(scheduler, x) == final
    copied = copy.deepcopy(scheduler)
    scheduler.initial_latents(1, 4, height=126, width=130, generator=seed(0))
    for one in (scheduler, copied):
        assert ends_at(one, odd[1:].half()) == (130, 126) and ends_at(one, plain) == (128, 128)
    wide = scheduler.initial_latents(2, 4, height=64, width=256, generator=seed(0))  # the same numbers as 16x64
    assert torch.equal(wide.flatten(), plain.flatten()) and ends_at(scheduler, wide) == (64, 256)
    scheduler.initial_latents(1, 4, generator=seed(0))
    assert ends_at(scheduler, plain) == (128, 128) and ends_at(scheduler, wide) == (64, 256)
    with pytest.raises(ValueError, match="made for final sizes"):
        ends_at(scheduler, torch.cat([odd[:1], usual[1:]]))
    with pytest.raises(ValueError, match="starts at"):
        ends_at(copied, torch.randn(large.shape, generator=seed(0)))


def test_marked_latents_are_noise_as_any_other() -> None:
    scheduler = ScaleWiseScheduler(sigmas=[1.0, 0.5], sizes=[8, 32])
    noise = scheduler.initial_latents(4000, 1, height=33, width=31, generator=torch.Generator().manual_seed(0))
    assert noise.flatten(1).mean(0).abs().max() < 0.07 and (noise.flatten(1).std(0) - 1).abs().max() < 0.06


def test_few_plans_are_kept() -> None:
    scheduler = ScaleWiseScheduler(sigmas=[1.0, 0.5], sizes=[4, 8])
    for _ in range(3):
        scheduler.initial_latents(9000, 1)
    assert len(scheduler._plans) <= 20_000


# The interface that pipelines use


@pytest.mark.parametrize("process", [RectifiedFlow(), VariancePreserving()])
def test_add_noise_is_the_noising_of_training(process: Any) -> None:
    scheduler = ScaleWiseScheduler(sigmas=[1.0, 0.8, 0.6], sizes=[4, 6, 8], prediction_type=process.prediction_type)
    x0, eps = build_latents(3), build_latents(3, seed=1)
    times = torch.tensor([999, 400, 17])
    expected = process.add_noise(x0, eps, times / 1000)
    assert_close(scheduler.add_noise(x0, eps, times), expected, rtol=0, atol=1e-6)
    for i, sigma in enumerate(scheduler.sigmas[:-1]):  # one for all; what `step` makes of it comes back
        x_t = scheduler.add_noise(x0, eps, scheduler.timesteps[i][None])
        assert_close(x_t, process.add_noise(x0, eps, sigma), rtol=0, atol=1e-6)
    half = scheduler.add_noise(x0.half(), eps.half(), scheduler.timesteps[1])
    assert half.dtype == torch.float16 and half.shape == x0.shape
    for wrong in (torch.tensor([1001]), torch.tensor([-1.0]), torch.tensor([float("nan")]), torch.tensor([1, 2])):
        with pytest.raises(ValueError, match="timesteps="):
            scheduler.add_noise(x0, eps, wrong)


def test_add_noise_between_steps_is_refused_where_sizes_grow() -> None:
    """Inpainting pipelines blend the noised picture with the latents after each step."""
    x = build_latents(side=4)
    for sizes, fits in (([4, 6, 8], False), ([4, 4, 4], True)):
        scheduler = ScaleWiseScheduler(sigmas=list(SIGMAS), sizes=sizes)
        scheduler.step(x, 0, x)
        if fits:
            assert scheduler.add_noise(x, x, scheduler.timesteps[1]).shape == x.shape
            continue
        with pytest.raises(ValueError, match="inpainting and image-to-image keep one size"):
            scheduler.add_noise(x, x, scheduler.timesteps[1])
        scheduler.set_timesteps(3)
        assert scheduler.add_noise(x, x, scheduler.timesteps[1]).shape == x.shape


def test_what_third_party_code_asks_for() -> None:
    scheduler = ScaleWiseScheduler(sigmas=list(SIGMAS), sizes=[4, 6, 8], num_train_timesteps=500)
    assert len(scheduler) == 500 and scheduler.order == 1 and scheduler.init_noise_sigma == 1.0
    assert scheduler.timesteps.tolist() == [500, 400, 300] and scheduler.num_inference_steps == 3
    assert scheduler.begin_index is None and scheduler.step_index == 0
    scheduler.set_begin_index(0)
    assert scheduler.begin_index == 0
    run(pickle.loads(pickle.dumps(scheduler)), build_latents(side=4))


@pytest.mark.parametrize("kind", ["img2img", "inpaint"])
def test_sdxls_other_pipelines_end_in_one_sentence(kind: str, tmp_path: Path) -> None:
    base = families.build("sdxl")
    scheduler = ScaleWiseScheduler(sigmas=[1.0, 0.8, 0.6], sizes=[4, 6, 8], divisor=2, prediction_type="epsilon")
    parts = base.components | {"scheduler": scheduler}
    for unused in ("image_encoder", "feature_extractor"):
        parts.pop(unused, None)
    pipeline = {"img2img": StableDiffusionXLImg2ImgPipeline, "inpaint": StableDiffusionXLInpaintPipeline}[kind]
    pipe = pipeline(**parts, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    picture = torch.rand(1, 3, 64, 64)
    more = {"mask_image": torch.ones(1, 1, 64, 64)} if kind == "inpaint" else {}
    for strength, side, message in (
        (None, 64, "strength below 1"),
        (0.5, 64, "strength below 1"),
        (1.0, 64, r"starts at \(4, 4\)"),
        (1.0, 32, "inpainting and image-to-image keep one size"),
    ):
        small = torch.nn.functional.interpolate(picture, size=side)
        masks = {key: torch.nn.functional.interpolate(mask, size=side) for key, mask in more.items()}
        sizes = {"height": side, "width": side} if kind == "inpaint" else {}
        call: dict[str, Any] = {"prompt": "a star", "image": small, "num_inference_steps": 3, "guidance_scale": 1.0}
        call |= {"output_type": "latent"} | masks | sizes | ({} if strength is None else {"strength": strength})
        if (kind, strength, side) == ("img2img", 1.0, 32):  # the first size at full strength: nothing to refuse
            assert pipe(**call).images.shape[2:] == (8, 8)
            continue
        with pytest.raises(ValueError, match=message):
            pipe(**call)


@pytest.mark.parametrize("size", [{"height": 0}, {"width": -8}, {"height": -4, "width": -4}])
def test_no_final_size_is_below_one(size: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="sides must be multiples of 1, above 0"):
        ScaleWiseScheduler([1.0, 0.5], [4, 8]).initial_latents(1, 4, **size)
