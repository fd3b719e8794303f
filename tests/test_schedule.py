"""Scale schedules: rules, intervals, resizing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from swd.schedule import Interval, ScaleSchedule, downscale, upsample
from swd.types import UserError, WrongProcess


@pytest.mark.parametrize(
    ("sigmas", "sizes", "names"),
    [
        ([], [], ["sigmas", "empty"]),
        ([1.0, 0.5], [4], ["2 sigmas", "1 sizes"]),
        ([1.0], [4, 6], ["1 sigmas", "2 sizes"]),
        ([1.1, 0.5], [4, 6], ["1.1", "(0, 1]"]),
        ([1.0, 0.0], [4, 6], ["0.0", "(0, 1]"]),
        ([1.0, -0.5], [4, 6], ["-0.5", "(0, 1]"]),
        ([1.0, float("nan")], [4, 6], ["nan", "(0, 1]"]),
        ([1.0, 0.5, 0.5], [4, 6, 8], ["strictly decreasing", "0.5"]),
        ([0.5, 1.0], [4, 6], ["strictly decreasing", "1.0 follows 0.5"]),
        ([1.0, 0.5], [6, 4], ["must not shrink", "(4, 4) follows (6, 6)"]),
        ([1.0, 0.5], [[4, 6], [6, 4]], ["must not shrink", "(6, 4) follows (4, 6)"]),
        ([1.0, 0.5], [0, 4], ["(0, 0)"]),
        ([1.0, 0.5], [4, [6, 6, 6]], ["(6, 6, 6)", "alike"]),
        ([1.0, 0.5], [[4], [6]], ["(4,)", "(H, W)"]),
    ],
)
def test_a_wrong_schedule_is_refused_in_one_line(sigmas: list[float], sizes: list[Any], names: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        ScaleSchedule(sigmas, sizes)
    message = str(caught.value)
    assert "\n" not in message
    for name in names:
        assert name in message


def test_intervals_start_where_the_previous_step_ended() -> None:
    schedule = ScaleSchedule([1.0, 0.9, 0.6, 0.3], [4, 4, [6, 8], [6, 10]])
    assert len(schedule) == 4
    assert [schedule.interval(i) for i in range(4)] == [
        Interval(0, 1.0, (4, 4), (4, 4)),
        Interval(1, 0.9, (4, 4), (4, 4)),
        Interval(2, 0.6, (4, 4), (6, 8)),
        Interval(3, 0.3, (6, 8), (6, 10)),
    ]


def test_the_sampler_of_a_schedule_has_its_levels_and_sizes() -> None:
    scheduler = ScaleSchedule([1.0, 0.5], [4, [6, 8]]).scheduler(divisor=2)
    assert scheduler.sigmas.tolist() == [1.0, 0.5, 0.0]
    assert scheduler.base_sizes == [(4, 4), (6, 8)]
    assert scheduler.config.divisor == 2


def test_levels_of_another_process_are_refused() -> None:
    levels, sizes = [1.0, 0.8], [4, 6]
    for process in ("flow", "epsilon"):
        own = ScaleSchedule(levels, sizes, process).scheduler(prediction_type=process)
        assert torch.equal(own.timesteps, ScaleSchedule(levels, sizes).scheduler(prediction_type=process).timesteps)
    with pytest.raises(UserError, match=r"process=flow.*schedule\.process=epsilon"):
        ScaleSchedule(levels, sizes, "flow").scheduler(prediction_type="epsilon")
    with pytest.raises(UserError, match=r"process=epsilon.*schedule\.process=flow"):
        ScaleSchedule(levels, [6, 6], "epsilon").check_process("flow")


def test_downscaling_averages_areas() -> None:
    pixels = torch.randn(2, 3, 12, 24, generator=torch.Generator().manual_seed(0))
    expected = pixels.reshape(2, 3, 4, 3, 8, 3).mean((3, 5))
    assert_close(downscale(pixels, (4, 8)), expected, rtol=0, atol=1e-6)
    assert downscale(pixels, (12, 24)) is pixels


def test_downscaling_goes_directly_from_full_size() -> None:
    """Pixels 0..4 to two: [0, 3) and [2, 5) when the ratio is not whole (adaptive areas)."""
    pixels = torch.arange(5.0).expand(1, 1, 5, 5)
    assert_close(downscale(pixels, (5, 2))[0, 0, 0], torch.tensor([1.0, 3.0]))


def test_upsampling_is_bicubic_without_antialias() -> None:
    x0 = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(x0, size=(8, 10), mode="bicubic", align_corners=False, antialias=False)
    assert torch.equal(upsample(x0, (8, 10)), expected)
    assert upsample(x0, (6, 6)) is x0
    flat = torch.full((1, 1, 5, 5), 0.7)
    assert_close(upsample(flat, (9, 7)), torch.full((1, 1, 9, 7), 0.7))


@pytest.mark.parametrize(("frames", "target"), [(6, 11), (11, 21), (1, 4), (5, 5)])
def test_video_time_is_blended_with_both_ends_fixed(frames: int, target: int) -> None:
    x0 = torch.randn(2, 3, frames, 4, 5, generator=torch.Generator().manual_seed(0))
    result = upsample(x0, (target, 4, 5))
    assert result.shape == (2, 3, target, 4, 5)
    places = np.linspace(0, frames - 1, target)
    for b, c, h, w in [(0, 0, 0, 0), (1, 2, 3, 4), (0, 1, 2, 3)]:
        line = np.interp(places, np.arange(frames), x0[b, c, :, h, w].double().numpy())
        assert_close(result[b, c, :, h, w].double(), torch.from_numpy(line), rtol=0, atol=1e-5)
    assert_close(result[:, :, 0], x0[:, :, 0], rtol=0, atol=1e-6)
    assert_close(result[:, :, -1], x0[:, :, -1], rtol=0, atol=1e-6)


def test_video_space_is_bicubic_per_frame() -> None:
    x0 = torch.randn(2, 3, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    result = upsample(x0, (7, 8, 9))
    for here, there in ((0, 0), (1, 2), (2, 4), (3, 6)):  # frames that linear blending leaves in place
        assert_close(result[:, :, there], upsample(x0[:, :, here], (8, 9)), rtol=0, atol=1e-5)


def test_a_sampler_is_written_with_sides_where_sizes_are_square() -> None:
    config = ScaleSchedule([1.0, 0.8, 0.5], [4, [4, 6], [6, 6]]).scheduler(2, "epsilon").config
    assert config.sizes == [4, [4, 6], 6] and config.sigmas == [1.0, 0.8, 0.5]
    assert config.prediction_type == "epsilon" and config.divisor == 2
    video = ScaleSchedule([1.0, 0.8], [[2, 2, 4], [3, 3, 6]]).scheduler().config
    assert video.sizes == [[2, 2, 4], [3, 3, 6]], "frames and height may be equal"
    assert video.divisor == 1 and video.prediction_type == "flow"


def test_a_side_that_the_network_cannot_take_is_refused() -> None:
    with pytest.raises(UserError, match=r"^schedule: sizes contains \(6, 7\); .*multiples of 2$"):
        ScaleSchedule([1.0, 0.5], [4, [6, 7]]).scheduler(2)


def test_a_stretched_schedule_ends_at_the_size_asked_for() -> None:
    """Sides are multiplied by final / own last size, then rounded to the divisor: 4 * 12 / 8 = 6, 6 * 12 / 8 = 9."""
    schedule = ScaleSchedule([1.0, 0.8, 0.6], [4, 6, 8], "epsilon")
    assert schedule.stretched((8, 8)) is schedule
    wide = schedule.stretched((8, 12))
    assert wide.sizes == ((4, 6), (6, 9), (8, 12))
    assert wide.sigmas == schedule.sigmas and wide.process == "epsilon"
    assert schedule.stretched((8, 12), 2).sizes == ((4, 6), (6, 8), (8, 12)), "half a unit goes to the even one"
    assert schedule.stretched((6, 14), 2).sizes == ((4, 8), (4, 10), (6, 14)), "3 and 7 go up, 4.5 and 10.5 down"
    plain = ScaleSchedule([1.0, 0.8], [4, 8])
    assert plain.stretched((4, 4)).sizes == ((2, 2), (4, 4)) and plain.stretched((4, 4)).process is None
    with pytest.raises(UserError, match=r"^schedule: sizes contains \(4, 4\); .*multiples of 8"):
        plain.stretched((16, 16), 8)


@pytest.mark.parametrize(
    ("process", "other", "sizes", "full_size"),
    [
        ("epsilon", "flow", [6, 6], True),
        ("epsilon", "flow", [4, 6], False),
        ("flow", "epsilon", [6, 6], True),
        ("flow", "epsilon", [4, 6], False),
    ],
)
def test_both_processes_are_named(process: Any, other: str, sizes: list[int], full_size: bool) -> None:
    schedule = ScaleSchedule([1.0, 0.8], sizes, process)
    schedule.check_process(process)
    with pytest.raises(WrongProcess) as caught:
        schedule.check_process(other)
    assert (caught.value.needed, caught.value.full_size) == (other, full_size)
    assert str(caught.value) == (
        f"schedule.process={process}, but this model's noise levels are of the process {other}; give sigmas of that "
        f"process and schedule.process={other}"
    )


def test_a_schedule_names_its_keys() -> None:
    with pytest.raises(UserError, match=r"^schedule\.sigmas is empty"):
        ScaleSchedule([], [])
    with pytest.raises(UserError, match=r"^schedule\.sizes must not shrink"):
        ScaleSchedule([1.0, 0.5], [6, 4])
