"""Cost of data loading: cached samples against raw reads, pictures against Pillow, memory over many samples.

    python benchmarks/data.py                  all three; needs about 2 GB of disk
    python benchmarks/data.py --only cache     cache | pictures | memory

Every figure is a ratio of medians over runs that alternate, so that it does not depend on the machine's load.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

from swd.data.cache import TEXT, latents_name, pack_latents, pack_text
from swd.data.datamodule import ThreadedLoader
from swd.data.decoders import CacheDecoder
from swd.data.indexed import IndexedShards
from swd.data.job import Job, Sample
from swd.data.picture_files import cover_and_crop, decode, read_picture
from swd.data.shards import ShardSet
from swd.data.webdataset import DueBatches
from swd.types import Conditioning

SIZES = ((64, 64), (80, 80), (96, 96), (128, 128))


# Cached samples


def sd35_medium(rows: int) -> Iterator[dict[str, bytes]]:
    """Samples of noise in the form that `swd encode model=sd35_medium schedule=image_4step` stores."""
    embeds = torch.randn(1, 589, 4096)
    embeds[:, :77, 2048:] = 0  # CLIP is narrower than T5
    text = pack_text(Conditioning(embeds, torch.randn(1, 2048)), "bf16")
    latents = {
        latents_name(size): pack_latents(torch.randn(16, *size), torch.rand(16, *size), "bf16") for size in SIZES
    }
    for _ in range(rows):
        yield {"txt": b"a prompt", TEXT: text, **latents}


def small(rows: int) -> Iterator[dict[str, bytes]]:
    """Samples of a few hundred bytes."""
    text = pack_text(Conditioning(torch.randn(1, 4, 8)), "bf16")
    latents = {latents_name(size): pack_latents(torch.randn(1, 2, 2), None, "bf16") for size in SIZES}
    for _ in range(rows):
        yield {"txt": b"a prompt", TEXT: text, **latents}


def make_cache(folder: Path, rows: int, shard_size: int, samples: Callable[[int], Iterator[dict[str, bytes]]]) -> Path:
    """A folder of cached samples."""

    def make(part: range, advance: Callable[[int], object]) -> Iterator[Sample]:
        for row, files in zip(part, samples(len(part)), strict=True):
            yield f"{row:08d}", files, {"usable": 1, "bucket": 0, "text": row}

    buckets = [{"pixels": [1024, 1024], "sizes": [list(size) for size in SIZES]}]
    job = Job(folder, "cache", rows, shard_size, {"buckets": buckets, "identity": {}, "deduplicate": False})
    job.claim()
    assert job.run(make) is not None
    return folder


def loader(folder: Path, batch_size: int, total: int, workers: int) -> ThreadedLoader:
    """The loader of `data=webdataset` for a training with one update in each iteration."""
    shards = ShardSet(str(folder))
    source = IndexedShards(shards, CacheDecoder(shards.manifest, shards.root))
    requests = DueBatches(None, batch_size, 0, total, 0, orders=source.orders(0, None))
    requests.steps = len(SIZES)
    return ThreadedLoader(source.batch_of, requests, workers)


def forget(folder: Path) -> None:
    """Drop the shards from the page cache."""
    for file in folder.glob("*.tar"):
        with open(file, "rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def raw_read(folder: Path, count: int) -> float:
    """Seconds to read the first `count` bytes of the shards from front to back, 8 MiB at a time."""
    buffer, left = bytearray(2**23), count
    start = time.perf_counter()
    for file in sorted(folder.glob("*.tar")):
        with open(file, "rb", buffering=0) as stream:
            while left > 0:
                got = stream.readinto(memoryview(buffer)[: min(left, len(buffer))])
                if not got:
                    break
                left -= got
    return time.perf_counter() - start


def cached_read(folder: Path, batch_size: int, total: int, workers: int) -> tuple[float, int]:
    """Seconds to load all batches, and their bytes."""
    count, start = 0, time.perf_counter()
    for batch in loader(folder, batch_size, total, workers):
        cached = batch.cached
        count += cached.conditioning.embeds.nbytes * 2256896 // (589 * 4096)  # what is stored, without zeros
        count += sum(mean.nbytes + std.nbytes for mean, std in cached.posteriors.values())
    return time.perf_counter() - start, count


def bench_cache(folder: Path, rows: int, workers: int, repeats: int) -> None:
    """Time cached loading and reading the same number of bytes, alternately."""
    batch_size = 8
    total = rows // batch_size
    make_cache(folder, rows, 32, sd35_medium)
    size = sum(file.stat().st_size for file in folder.glob("*.tar")) / rows
    print(f"cached samples: SD3.5-M, 4 sizes, 589 text tokens, {size / 1e6:.2f} MB each, batches of {batch_size}")
    for state in ("cold", "warm"):
        ratios, speeds = [], []
        for _ in range(repeats):
            if state == "cold":
                forget(folder)
            ours, count = cached_read(folder, batch_size, total, workers)
            if state == "cold":
                forget(folder)
            raw = raw_read(folder, count)
            ratios.append(raw / ours)
            speeds.append((count / ours / 1e9, count / raw / 1e9))
        ours_speed, raw_speed = (statistics.median(column) for column in zip(*speeds, strict=True))
        print(
            f"  {state}: {statistics.median(ratios):.0%} of raw sequential read "
            f"({ours_speed:.2f} against {raw_speed:.2f} GB/s, {workers} workers, "
            f"{count / 1e6 / batch_size / total:.2f} MB read a sample, {repeats} runs)"
        )


# Pictures


def pillow(data: bytes, side: int) -> Image.Image:
    """Decode, shrink and crop with Pillow alone."""
    with Image.open(io.BytesIO(data)) as opened:
        image = opened.convert("RGB")
    scale = side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BOX)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def bench_pictures(repeats: int) -> None:
    """Time `read_picture` and the same work by Pillow."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8))
    photo = coarse.resize((2048, 1536), Image.Resampling.BICUBIC)
    for ending in ("JPEG", "PNG"):
        stream = io.BytesIO()
        photo.save(stream, ending, quality=95)
        data, ratios = stream.getvalue(), []
        for _ in range(repeats):
            seconds = [
                timed(lambda data=data: cover_and_crop(decode(io.BytesIO(data)), (1024, 1024))),
                timed(lambda data=data: read_picture(io.BytesIO(data), (1024, 1024))),
                timed(lambda data=data: pillow(data, 1024)),
            ]
            ratios.append((seconds[0] / seconds[2], seconds[1] / seconds[2]))
        ours, tensors = (statistics.median(column) for column in zip(*ratios, strict=True))
        print(
            f"pictures: {ending} 2048x1536 to 1024x1024, decoding and resizing take {ours:.2f} of Pillow's own time, "
            f"{tensors:.2f} with the conversion to a float tensor"
        )


def timed(function: Callable[[], object], times: int = 5) -> float:
    """Seconds that `times` calls take."""
    start = time.perf_counter()
    for _ in range(times):
        function()
    return time.perf_counter() - start


# Memory


def bench_memory(folder: Path, rows: int, workers: int) -> None:
    """Memory of the loader and its processes over many samples."""
    make_cache(folder, rows, 10_000, small)
    process, seen, marks = psutil.Process(), 0, []
    for batch in loader(folder, 50, rows // 50, workers):
        seen += len(batch)
        if seen % (rows // 10) == 0:
            family = [process, *process.children(recursive=True)]
            marks.append(sum(each.memory_full_info().uss for each in family) / 1e6)
    listed = ", ".join(f"{mark:.0f}" for mark in marks)
    print(f"memory: {rows} small samples, MB in use at every tenth of them: {listed}")


def main() -> None:
    """Run the benchmarks that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("cache", "pictures", "memory"))
    parser.add_argument("--samples", type=int, default=256, help="cached samples of 6.8 MB")
    parser.add_argument("--small", type=int, default=100_000, help="small samples for the memory")
    parser.add_argument("--workers", type=int, default=4, help="as conf/data/webdataset.yaml has it")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", help="where the samples go; a temporary folder by default")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(options.folder or tempfile.mkdtemp(prefix="swd-bench-"))
    try:
        if options.only in (None, "cache"):
            bench_cache(folder / "cache", options.samples, options.workers, options.repeats)
        if options.only in (None, "pictures"):
            bench_pictures(options.repeats)
        if options.only in (None, "memory"):
            bench_memory(folder / "small", options.small, options.workers)
    finally:
        if not options.folder:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
