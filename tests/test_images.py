"""Folders of pictures and videos as data, and MP4 files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from swd import video
from swd.data.images import FolderDataset, read_picture
from swd.schedule import downscale
from swd.types import UserError


def gradient(width: int, height: int) -> Image.Image:
    """Red grows along the width, green along the height."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], -1).round().astype(np.uint8))


def clip(frames: int = 9, side: int = 32) -> torch.Tensor:
    """A smooth video: brightness grows with time."""
    return torch.linspace(-0.8, 0.8, frames).view(1, -1, 1, 1).expand(3, frames, side, side)


def test_pictures_are_cropped_and_never_squashed(tmp_path: Path) -> None:
    gradient(200, 100).save(tmp_path / "wide.png")
    pixels = read_picture(tmp_path / "wide.png", (50, 50))
    assert pixels.shape == (3, 50, 50)
    # The middle half of the width is left, all of the height.
    assert pixels[0, 25, 0].item() == pytest.approx(-0.5, abs=0.03)
    assert pixels[0, 25, -1].item() == pytest.approx(0.5, abs=0.03)
    assert pixels[1, 0, 25].item() == pytest.approx(-1, abs=0.03)
    assert pixels[1, -1, 25].item() == pytest.approx(1, abs=0.03)


def test_the_published_list_names_files_and_captions(tmp_path: Path) -> None:
    for name in ("x.png", "y.png"):
        gradient(64, 64).save(tmp_path / name)
    (tmp_path / "metainfo.csv").write_text('index,name,caption\n0,y.png,"a star, red"\n1,x.png,a ring\n')
    data = FolderDataset(str(tmp_path), 32)
    assert len(data) == 2 and [data[i]["prompt"] for i in range(2)] == ["a star, red", "a ring"]
    assert data[0]["pixels"].shape == (3, 32, 32)


def test_captions_beside_pictures_in_any_case(tmp_path: Path) -> None:
    for name in ("B.JPG", "a.webp", "c.png"):
        gradient(64, 64).save(tmp_path / name)
    (tmp_path / "B.txt").write_text("second\n")
    (tmp_path / "a.txt").write_text("first")
    data = FolderDataset(str(tmp_path), (32, 48))
    assert {data[i]["prompt"] for i in range(len(data))} == {"first", "second"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [("0,gone.png,x", "gone.png is not in the folder"), ("0,x.png", "2 columns"), ("", "holds no captioned files")],
)
def test_wrong_lists_are_named(tmp_path: Path, rows: str, message: str) -> None:
    gradient(64, 64).save(tmp_path / "x.png")
    (tmp_path / "metainfo.csv").write_text(f"index,name,caption\n{rows}\n" if rows else "index,name,caption\n")
    with pytest.raises(UserError, match=message):
        FolderDataset(str(tmp_path), 32)


def test_wrong_folders_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="path is missing"):
        FolderDataset(None, 32)
    with pytest.raises(UserError, match="does not exist"):
        FolderDataset(str(tmp_path / "none"), 32)
    with pytest.raises(UserError, match="does not fit pictures"):
        FolderDataset(str(tmp_path), (1, 2, 3))
    gradient(16, 64).save(tmp_path / "small.png")
    with pytest.raises(UserError, match="16x64, smaller than 32x32"):
        read_picture(tmp_path / "small.png", (32, 32))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="cannot be read as a picture"):
        read_picture(tmp_path / "broken.png", (32, 32))


def test_videos_come_back_as_they_were_written(tmp_path: Path) -> None:
    pytest.importorskip("imageio_ffmpeg")
    file = video.write(tmp_path / "a.mp4", clip(), 8, '{"prompt": "a star"}')
    again = video.read(file)
    assert again.shape == (3, 9, 32, 32)
    assert (again - clip()).abs().mean() < 0.03
    assert b"a star" in file.read_bytes()
    (tmp_path / "a.txt").write_text("it grows light")
    item = FolderDataset(str(tmp_path), (5, 16, 24), "videos")[0]
    assert item["pixels"].shape == (3, 5, 16, 24) and item["prompt"] == "it grows light"
    assert item["pixels"][0, :, 0, 0].diff().gt(0).all()


def test_videos_lose_frames_by_blending(tmp_path: Path) -> None:
    small = downscale(clip(9, 8)[None], (5, 4, 4))
    assert small.shape == (1, 3, 5, 4, 4)
    torch.testing.assert_close(small[0, 0, :, 0, 0], torch.linspace(-0.8, 0.8, 5))
    with pytest.raises(UserError, match="do not fit sizes"):
        downscale(clip(9, 8)[None], (4, 4))
