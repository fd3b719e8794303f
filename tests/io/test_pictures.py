"""Folders of pictures and videos as data, and MP4 files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from swd.data.picture_files import FolderDataset, read_picture, read_video
from swd.io import video
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


def solid(mode: str, colour: object, side: int = 4) -> Image.Image:
    return Image.new(mode, (side, side), colour)  # type: ignore[arg-type]


def transparent_palette() -> Image.Image:
    """Colour 0 is (10, 20, 30) and transparent, colour 1 is red; the left half is transparent."""
    image = Image.fromarray(np.repeat([[0, 0, 1, 1]], 4, 0).astype(np.uint8), "P")
    image.putpalette([10, 20, 30, 255, 0, 0])
    image.info["transparency"] = 0
    return image


@pytest.mark.parametrize(
    ("image", "ending", "left", "right"),
    [
        (solid("RGBA", (200, 0, 100, 255)), "png", (200, 0, 100), (200, 0, 100)),
        (solid("RGBA", (200, 0, 100, 0)), "png", (255, 255, 255), (255, 255, 255)),
        (solid("RGBA", (200, 0, 100, 51)), "png", (244, 204, 224), (244, 204, 224)),
        (solid("LA", (100, 51)), "png", (224, 224, 224), (224, 224, 224)),
        (transparent_palette(), "png", (255, 255, 255), (255, 0, 0)),
        (transparent_palette(), "webp", (255, 255, 255), (255, 0, 0)),
        (solid("L", 100), "png", (100, 100, 100), (100, 100, 100)),
        (solid("1", 1), "png", (255, 255, 255), (255, 255, 255)),
        (solid("I;16", 0x8000), "png", (128, 128, 128), (128, 128, 128)),
        (solid("I;16", 0xFFFF), "tif", (255, 255, 255), (255, 255, 255)),
        (solid("I;16", 257 * 3), "png", (3, 3, 3), (3, 3, 3)),
        (solid("CMYK", (255, 0, 0, 0)), "tif", (0, 255, 255), (0, 255, 255)),
        (solid("CMYK", (0, 0, 0, 255)), "jpg", (0, 0, 0), (0, 0, 0)),
    ],
    ids=lambda value: getattr(value, "mode", None),
)
def test_every_kind_of_picture_becomes_rgb(
    tmp_path: Path, image: Image.Image, ending: str, left: tuple[int, ...], right: tuple[int, ...]
) -> None:
    file = tmp_path / f"a.{ending}"
    image.save(file, **({"lossless": True} if ending == "webp" else {}))
    pixels = ((read_picture(file, (4, 4)) + 1) * 127.5).round()
    assert pixels[:, 1, 0].tolist() == pytest.approx(left, abs=1)
    assert pixels[:, 1, -1].tolist() == pytest.approx(right, abs=1)


def test_of_an_animation_the_first_frame_is_taken(tmp_path: Path) -> None:
    frames = [solid("RGB", colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert read_picture(tmp_path / "a.webp", (4, 4))[:, 0, 0].tolist() == [1, -1, -1]


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_pictures_stand_as_their_exif_says(tmp_path: Path, orientation: int, turns: int) -> None:
    """Orientation 6 is a camera's portrait: the stored picture has to be turned clockwise."""
    image, exif = gradient(32, 16), Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    size = (16, 32) if turns % 2 == 0 else (32, 16)
    expected = torch.from_numpy(np.rot90(np.asarray(image), turns).copy()).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(read_picture(tmp_path / "a.png", size), expected)


def test_texts_are_utf8(tmp_path: Path) -> None:
    gradient(64, 64).save(tmp_path / "x.png")
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbf\xc3\xa9toile\r\n")  # with a byte order mark, as Windows writes it
    assert FolderDataset(str(tmp_path), 32)[0]["prompt"] == "\u00e9toile"
    (tmp_path / "x.txt").write_bytes("\u00e9toile".encode("latin-1"))
    with pytest.raises(UserError, match=r"x\.txt is not UTF-8 text"):
        FolderDataset(str(tmp_path), 32)
    (tmp_path / "metainfo.csv").write_bytes("index,name,caption\n0,x.png,\u00e9toile\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"metainfo\.csv, line 2: it is not UTF-8 text \(byte 27\)"):
        FolderDataset(str(tmp_path), 32)
    (tmp_path / "metainfo.csv").write_text('index,name,caption\n0,x.png,"two\nlines"\n')
    assert FolderDataset(str(tmp_path), 32)[0]["prompt"] == "two\nlines"


def test_videos_need_ffmpeg_before_training_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "a.txt").write_text("a star")
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(UserError, match=r"reading and writing videos needs ffmpeg.*imageio-ffmpeg"):
        FolderDataset(str(tmp_path), (5, 16, 16), "videos")


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # imageio-ffmpeg leaves its pipes to the collector
def test_only_the_frames_asked_for_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    file = video.write(tmp_path / "a.mp4", clip(), 8)
    decoded: list[int] = []
    closed: list[bool] = []
    original = ffmpeg.read_frames

    def counted(*args: str) -> Any:
        try:
            for number, value in enumerate(original(*args)):
                decoded.append(number)  # 0 is the header
                yield value
        finally:
            closed.append(True)

    monkeypatch.setattr(ffmpeg, "read_frames", counted)
    assert torch.equal(video.read(file, 4), video.read(file)[:, :4])
    assert decoded == [*range(5), *range(10)] and closed == [True, True]
    with pytest.raises(UserError, match=r"a\.mp4 is \(9, 32, 32\) .* smaller than \(10, 32, 32\)"):
        read_video(file, (10, 32, 32))
    (tmp_path / "b.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match=r"b\.mp4 cannot be read as a video"):
        read_video(tmp_path / "b.mp4", (1, 8, 8))


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
