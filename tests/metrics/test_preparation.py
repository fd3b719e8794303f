"""Preparations against their sizes, positions and Pillow's own filters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from swd.metrics.inception import PAPER
from swd.metrics.preparation import CentreCrop, ShortSide, Squash, apply_transforms, names, normalise


def picture(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def test_a_name_says_every_step() -> None:
    assert names(PAPER) == "512bicubic-256lanczos-crop256"
    assert names([CentreCrop(), Squash(336, "bicubic")]) == "crop-336x336bicubic"
    assert names([]) == "plain"


def test_square_pictures_are_prepared_as_in_the_released_code() -> None:
    found = apply_transforms(picture(700, 700), PAPER)
    image = Image.fromarray(picture(700, 700).permute(1, 2, 0).numpy())
    expected = image.resize((512, 512)).resize((256, 256), Image.Resampling.LANCZOS)  # Pillow's default is bicubic
    assert torch.equal(found, torch.from_numpy(np.asarray(expected).copy()).permute(2, 0, 1))


@pytest.mark.parametrize(("size", "expected"), [((40, 61), (20, 30)), ((61, 40), (30, 20)), ((20, 50), (20, 50))])
def test_short_side_keeps_the_aspect_ratio(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert apply_transforms(picture(*size), [ShortSide(20, "bilinear")]).shape == (3, *expected)


def test_crops_are_around_the_middle() -> None:
    whole = picture(11, 20)
    assert torch.equal(apply_transforms(whole, [CentreCrop(5)]), whole[:, 3:8, 7:12])
    assert torch.equal(apply_transforms(whole, [CentreCrop()]), whole[:, :, 4:15])


def test_squash_ignores_the_aspect_ratio_and_widens_its_filter() -> None:
    halves = torch.zeros(3, 8, 64, dtype=torch.uint8)
    halves[:, :, ::2] = 255
    found = apply_transforms(halves, [Squash(4, "bilinear")])
    assert found.shape == (3, 4, 4)
    assert (found.float() - 127.5).abs().max() < 3  # a filter of two pixels would see one kind of column alone


def test_normalise_is_by_channel() -> None:
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1)
    found = normalise(pixels, (0.5, 0.1, 0.0), (0.5, 0.2, 4.0))
    torch.testing.assert_close(found.flatten(), torch.tensor([-1.0, 0.5, 0.25]))
