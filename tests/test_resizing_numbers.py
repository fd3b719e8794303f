"""Resizing and FLUX's packing of latents, number by number."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from swd.schedule import Resizing, downscale, upsample
from swd.scheduler import blend_frames, pack, position_ids, unpack
from swd.types import UserError


def video(*frames: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """One sample, one channel, one pixel: only time is left."""
    return torch.tensor(frames, dtype=dtype).view(1, 1, -1, 1, 1)


@pytest.mark.parametrize(
    ("frames", "wanted", "expected"),
    [
        ((0.0, 10.0), 5, [0.0, 2.5, 5.0, 7.5, 10.0]),
        ((0.0, 10.0, 40.0), 5, [0.0, 5.0, 10.0, 25.0, 40.0]),
        ((1.0, 4.0, 16.0, 64.0), 3, [1.0, 10.0, 64.0]),
        ((1.0, 4.0, 16.0, 64.0), 2, [1.0, 64.0]),
        ((1.0, 4.0, 16.0, 64.0), 1, [1.0]),
        ((7.0,), 3, [7.0, 7.0, 7.0]),
    ],
)
def test_frames_are_blended_from_their_two_neighbours(
    frames: tuple[float, ...], wanted: int, expected: list[float]
) -> None:
    assert_close(blend_frames(video(*frames), wanted), video(*expected), rtol=0, atol=1e-6)


def test_a_blend_keeps_the_dtype_and_as_many_frames_are_the_video_itself() -> None:
    half = video(0.0, 1.0, dtype=torch.bfloat16)
    assert blend_frames(half, 3).dtype == torch.bfloat16
    assert_close(blend_frames(half, 3), video(0.0, 0.5, 1.0, dtype=torch.bfloat16))
    assert blend_frames(half, 2) is half
    both = torch.cat([video(0.0, 2.0), video(10.0, 30.0)])
    assert blend_frames(both, 3).flatten(1).tolist() == [[0.0, 1.0, 2.0], [10.0, 20.0, 30.0]]


def test_frames_are_blended_where_the_video_lies() -> None:
    assert blend_frames(video(0.0, 1.0).to("meta"), 3).is_meta


def test_frames_are_placed_in_float64_and_blended_in_float32() -> None:
    """Frame k of n lies at `k (count - 1) / (n - 1)`; in float32 it would miss by 3e-5."""
    count, wanted = 1000, 7001
    zigzag = (torch.arange(count) % 2).float().view(1, 1, -1, 1, 1)
    places = torch.arange(wanted, dtype=torch.float64) * (count - 1) / (wanted - 1)
    expected = 1 - (places % 2 - 1).abs()
    assert (blend_frames(zigzag, wanted).double().flatten() - expected).abs().max() < 1e-6
    frames = torch.randn(1, 2, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    share = torch.tensor(1 / 3, dtype=torch.float64).float()
    assert torch.equal(blend_frames(frames, 4)[:, :, 1], (1 - share) * frames[:, :, 0] + share * frames[:, :, 1])


def test_a_token_is_a_patch_of_two_by_two() -> None:
    """Row by row of patches; in a token channel by channel, each as its four pixels row by row."""
    batch, channels, height, width = 2, 3, 4, 6
    latents = torch.arange(batch * channels * height * width, dtype=torch.float32).view(batch, channels, height, width)
    tokens = pack(latents)
    assert tokens.shape == (batch, 6, 12)
    for b in range(batch):
        for row in range(2):
            for column in range(3):
                patch = latents[b, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
                assert torch.equal(tokens[b, 3 * row + column], patch.flatten())
    assert torch.equal(unpack(tokens, (height, width)), latents)
    assert torch.equal(unpack(pack(latents.transpose(2, 3).contiguous()), (width, height)), latents.transpose(2, 3))


def test_position_ids_are_row_and_column_of_each_token() -> None:
    expected = torch.tensor([[0, row, column] for row in range(2) for column in range(3)])
    ids = position_ids((4, 6))
    assert ids.dtype == torch.float32 and torch.equal(ids, expected.float())
    assert torch.equal(position_ids((6, 2)), torch.tensor([[0.0, row, 0.0] for row in range(3)]))
    assert torch.equal(position_ids((5, 7)), ids), "a row or column without a partner is in no token"
    half = position_ids((4, 6), "cpu", torch.bfloat16)
    assert half.dtype == torch.bfloat16 and torch.equal(half, expected.bfloat16())
    assert position_ids((4, 6), "meta").is_meta


def test_a_video_is_shrunk_in_time_first_then_in_space() -> None:
    pixels = torch.randn(2, 3, 3, 6, 4, generator=torch.Generator().manual_seed(0))
    ends = pixels[:, :, [0, 2]]  # two of three frames: the first and the last
    expected = ends.reshape(2, 3, 2, 3, 2, 2, 2).mean((4, 6))
    assert_close(downscale(pixels, (2, 3, 2)), expected, rtol=0, atol=1e-6)
    assert downscale(pixels, (3, 6, 4)) is pixels
    assert_close(downscale(pixels, [2, 6, 4]), ends, rtol=0, atol=1e-6)


def test_a_size_may_be_a_list() -> None:
    pixels = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    assert downscale(pixels, [4, 4]) is pixels and upsample(pixels, [4, 4]) is pixels
    assert downscale(pixels, [2, 4]).shape == (1, 2, 2, 4)


def test_what_cannot_be_shrunk_is_refused_with_both_sizes() -> None:
    pixels = torch.zeros(1, 3, 8, 6)
    with pytest.raises(UserError, match=r"pictures of \(8, 6\) pixels cannot be shrunk to \(4, 7\)"):
        downscale(pixels, (4, 7))
    with pytest.raises(UserError, match=r"pictures of \(8, 6\) pixels cannot be shrunk to \(9, 6\)"):
        downscale(pixels, (9, 6))
    with pytest.raises(UserError, match=r"data of \(8, 6\) pixels do not fit sizes of \(1, 4, 4\)"):
        downscale(pixels, (1, 4, 4))


# How training data are shrunk


def test_a_cascade_makes_the_source_of_the_target() -> None:
    row = torch.tensor([0.0, 6.0, 12.0, 6.0, 0.0, 0.0, 3.0, 9.0, 6.0, 6.0, 0.0, 12.0])
    pixels = row.expand(1, 1, 12, 12)
    three, four = [6.0, 2.0, 6.0, 6.0], [3.0, 9.0, 0.0, 6.0, 6.0, 6.0]
    small, large = Resizing().pair(pixels, (4, 4), (6, 6))
    assert large[0, 0, 0].tolist() == four and small[0, 0, 0].tolist() == three
    # From six sides to four: each is the mean of the two that it touches.
    small, large = Resizing("cascade").pair(pixels, (4, 4), (6, 6))
    assert large[0, 0, 0].tolist() == four and small[0, 0, 0].tolist() == [6.0, 4.5, 6.0, 6.0]
    same, larger = Resizing("cascade").pair(pixels, (6, 6), (6, 6))
    assert same is larger


@pytest.mark.parametrize(("count", "expected"), [(3, [0, 4, 8]), (5, [0, 2, 4, 6, 8]), (6, [0, 2, 3, 5, 6, 8])])
def test_nearest_frames(count: int, expected: list[int]) -> None:
    clip = torch.arange(9.0).view(1, 1, 9, 1, 1).expand(1, 1, 9, 2, 2)
    assert downscale(clip, (count, 2, 2), "nearest")[0, 0, :, 0, 0].tolist() == expected
    assert_close(downscale(clip, (count, 2, 2))[0, 0, :, 0, 0], torch.linspace(0, 8, count))
    small, large = Resizing(frames="nearest").pair(clip, (2, 1, 1), (count, 2, 2))
    assert small.flatten().tolist() == [0, 8] and large[0, 0, :, 1, 1].tolist() == expected
