"""Pictures reach the device as bytes, and are there the numbers that they were when loaders made them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from swd.data import job, picture_files
from swd.data.datamodule import BatchPlan, Guarded, PairData, ThreadedLoader, collate
from swd.data.picture_files import FolderDataset, load_picture, load_video, read_picture, read_video
from swd.io import video
from swd.types import Cached, CachedBatch, Conditioning, PictureBatch, in_unit_range, moved, stacked

BYTES = torch.arange(256, dtype=torch.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four captioned pictures of 20x16 pixels."""
    generator = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(generator.integers(0, 256, (16, 20, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"picture {i}")
    return tmp_path


def test_every_byte_is_the_number_that_it_was() -> None:
    for expected in (BYTES.float().contiguous().div_(127.5).sub_(1), BYTES.float() / 127.5 - 1):
        assert torch.equal(in_unit_range(BYTES), expected)
    assert in_unit_range(expected) is expected


def test_a_picture_is_the_same_through_the_loader(folder: Path) -> None:
    data = PairData(FolderDataset(folder, 16), batch_size=2)
    batches = list(data.batch_loader(BatchPlan(total=2)))
    assert all(batch.pixels.dtype == torch.uint8 for batch in batches)
    for batch in batches:
        found = batch.to("cpu").pixels
        for pixels, prompt in zip(found, batch.prompts, strict=True):
            with Image.open(folder / f"{prompt[-1]}.png") as image:
                plain = torch.from_numpy(np.array(image)[:, 2:18]).permute(2, 0, 1)
            assert torch.equal(pixels, plain.float().contiguous().div_(127.5).sub_(1))
            assert torch.equal(pixels, read_picture(folder / f"{prompt[-1]}.png", (16, 16)))


def test_shared_memory_holds_one_byte_a_value(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        shared.append(tensor.untyped_storage().nbytes())
        return tensor

    monkeypatch.setattr(job, "get_worker_info", lambda: SimpleNamespace(id=0))
    monkeypatch.setattr(Tensor, "share_memory_", count)
    Guarded(FolderDataset(folder, 16), collate).__getitems__([0, 1, 2])
    assert shared == [3 * 3 * 16 * 16]


def test_a_batch_moves_as_bytes_and_is_in_range_where_it_arrives() -> None:
    batch = PictureBatch(BYTES.view(1, 1, 16, 16), prompts=["x"])
    assert torch.equal(batch.to(torch.float64).pixels, in_unit_range(batch.pixels).double())
    assert torch.equal(batch.to("cpu").pixels, in_unit_range(batch.pixels))
    there = batch.to("meta").pixels
    assert there.is_meta and there.dtype == torch.float32


def test_only_copies_from_the_cpu_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    whole = Tensor.to

    def noted(tensor: Tensor, *args: Any, non_blocking: bool = False) -> Tensor:
        asked.append(non_blocking)
        return whole(tensor, *args)

    monkeypatch.setattr(Tensor, "to", noted)
    moved(torch.zeros(1), "meta")
    moved(torch.zeros(1, device="meta"), torch.float64)
    assert asked == [True, False]


def test_batches_are_pinned_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor + 1)
    posteriors = {(1, 1): (torch.zeros(1), torch.ones(1))}
    given = {
        "bytes": PictureBatch(torch.zeros(1, dtype=torch.uint8), prompts=["x"]),
        "cached": CachedBatch(Cached(Conditioning(torch.zeros(1), torch.ones(1)), posteriors), prompts=["x"]),
    }
    plan: Any = ["bytes", "cached"]
    for has_gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        for workers in (0, 1):
            plain, cached = ThreadedLoader(lambda name: given[name], plan, workers)
            assert isinstance(plain, PictureBatch) and isinstance(cached, CachedBatch)
            text, (mean, std) = cached.cached.conditioning, cached.cached.posteriors[(1, 1)]
            assert text.pooled is not None
            values = [plain.pixels, text.embeds, text.pooled, mean, std]
            assert [int(value) for value in values] == [has_gpu + value for value in (0, 0, 1, 0, 1)]


def test_bytes_and_numbers_go_together(folder: Path) -> None:
    picture = load_picture(folder / "0.png", (16, 16))
    number = torch.zeros(3, 16, 16)
    assert stacked([picture, picture]).dtype == torch.uint8
    assert torch.equal(stacked([picture, number]), torch.stack([read_picture(folder / "0.png", (16, 16)), number]))


@pytest.mark.parametrize(("frame", "dtype"), [((16, 20), torch.uint8), ((32, 40), torch.float32)])
def test_a_video_is_bytes_unless_it_is_shrunk(
    frame: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = torch.randint(0, 256, (3, 5, *frame), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    monkeypatch.setattr(picture_files.video, "read_bytes", lambda file, count: raw[:, :count])
    assert picture_files.video is video
    found = load_video(Path("x.mp4"), (4, 16, 16))
    assert found.dtype == dtype and found.shape == (3, 4, 16, 16)
    # As loaders made it before: to numbers, shrunk, cropped.
    numbers = (raw[:, :4].float() / 127.5 - 1).transpose(0, 1)
    shrunk = torch.nn.functional.interpolate(numbers, size=(16, 20), mode="area").transpose(0, 1)
    assert torch.equal(read_video(Path("x.mp4"), (4, 16, 16)), shrunk[..., 2:18])
