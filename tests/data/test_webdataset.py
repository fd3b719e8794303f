"""Training data from shards: order, resume, buckets, damage, streams."""

from __future__ import annotations

import gzip
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shards import make_pictures, picture

from swd.data.cache import TEXT, latents_name, pack_latents, pack_text
from swd.data.datamodule import Order
from swd.data.job import Job, Sample
from swd.data.shards import CorruptSample, ShardSet
from swd.data.streamed import BrokenShard, read_shard
from swd.data.webdataset import ShardData
from swd.types import Batch, Conditioning, UserError


class StubTrainer:
    """A stand-in with the attributes that data read of a trainer."""

    def __init__(self, updates: int = 0, total: int = 12, rank: int = 0, world: int = 1) -> None:
        self.max_steps, self.global_rank, self.world_size = total, rank, world
        self.global_step, self.lightning_module = updates, None


def loader(data: ShardData, **trainer: int) -> Any:
    data.trainer = StubTrainer(**trainer)  # type: ignore[assignment]
    return data.train_dataloader()


def shard_data(folder: Path | str, **options: Any) -> ShardData:
    return ShardData(str(folder), **{"size": 32, "batch_size": 4, "seed": 3} | options)


def prompts(data: ShardData, **trainer: int) -> list[list[str]]:
    return [batch.prompts for batch in loader(data, **trainer)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures") / "shards", 11)


def joined(parts: list[list[list[str]]]) -> list[list[str]]:
    """Global batches, put together from all processes."""
    return [list(chain(*batches)) for batches in zip(*parts, strict=True)]


# Order and resume


def test_pictures_and_captions_are_those_of_the_shards(folder: Path) -> None:
    for batch in loader(shard_data(folder, size=64), total=3):
        for pixels, prompt in zip(batch.to("cpu").pixels, batch.prompts, strict=True):
            row = int(prompt.rsplit(" ", 1)[1])
            expected = torch.from_numpy(np.asarray(picture(row, 64, 64)).copy()).permute(2, 0, 1) / 127.5 - 1
            torch.testing.assert_close(pixels, expected)


def test_every_epoch_has_every_sample_once_in_an_order_of_its_own(folder: Path) -> None:
    flat = list(chain(*prompts(shard_data(folder), total=12)))
    epochs = [flat[11 * e : 11 * (e + 1)] for e in range(4)]
    assert all(Counter(epoch) == Counter(epochs[0]) and len(set(epoch)) == 11 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert flat != list(chain(*prompts(shard_data(folder, seed=4), total=12)))


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("updates", [1, 4, 11])
def test_a_resumed_run_gets_the_batch_that_was_due(folder: Path, workers: int, updates: int) -> None:
    straight = prompts(shard_data(folder))
    assert len(straight) == 12  # more than four epochs
    assert prompts(shard_data(folder, workers=workers), updates=updates) == straight[updates:]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("sizes", [((64, 64),), ((64, 48), (48, 64), (64, 64))])
def test_processes_and_workers_change_nothing(tmp_path: Path, world: int, sizes: Any) -> None:
    folder = make_pictures(tmp_path / "shards", 21, sizes)
    options: dict[str, Any] = {"buckets": ["1:1", "4:3", "3:4"], "multiple": 8} if len(sizes) > 1 else {}
    straight = prompts(shard_data(folder, **options))
    for updates in (0, 5):
        parts = [
            prompts(shard_data(folder, workers=rank % 2, **options), updates=updates, rank=rank, world=world)
            for rank in range(world)
        ]
        assert joined(parts) == straight[updates:]


def test_a_window_keeps_reads_near_each_other(tmp_path: Path) -> None:
    groups = torch.arange(60) // 5  # 12 shards of 5
    order = Order(range(60), "seed", groups, window=3)
    epochs = [[order[60 * e + g] for g in range(60)] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(60))
        windows = [epoch[15 * w : 15 * (w + 1)] for w in range(4)]
        assert all(len({int(groups[i]) for i in window}) == 3 for window in windows)
        assert any(int(groups[a]) != int(groups[b]) for a, b in zip(windows[0], windows[0][1:], strict=False))
    assert epochs[0] != epochs[1]
    folder = make_pictures(tmp_path / "shards", 11)
    assert prompts(shard_data(folder, window=2), updates=3) == prompts(shard_data(folder, window=2))[3:]


# Buckets


def test_a_batch_has_one_size_and_nothing_is_squashed(tmp_path: Path) -> None:
    folder = make_pictures(tmp_path / "shards", 24, [(96, 64), (64, 96), (64, 64), (97, 64)])
    data = shard_data(folder, size=64, buckets=["1:1", "3:2", "2:3"], multiple=8, batch_size=4)
    seen: Counter[Any] = Counter()
    for batch in loader(data, total=40):
        assert tuple(batch.pixels.shape[2:]) == batch.bucket
        seen[batch.bucket] += 1
        rows = [int(prompt.rsplit(" ", 1)[1]) for prompt in batch.prompts]
        assert {("tall" if r % 4 == 1 else "square" if r % 4 == 2 else "wide") for r in rows} == {
            "tall" if batch.bucket[0] > batch.bucket[1] else "square" if batch.bucket[0] == batch.bucket[1] else "wide"
        }
    assert sum(seen.values()) == 40 and len(seen) == 3
    assert seen[max(seen, key=lambda b: b[1] / b[0])] > 12  # half of the samples are wide


def test_every_bucket_is_seen_in_proportion(tmp_path: Path) -> None:
    folder = make_pictures(tmp_path / "shards", 20, [(64, 64)] * 4 + [(96, 64)])
    data = shard_data(folder, size=48, buckets=["1:1", "3:2"], multiple=8, batch_size=2)
    count = Counter(batch.bucket for batch in loader(data, total=200))
    wide = next(n for bucket, n in count.items() if bucket[0] != bucket[1])
    assert 20 < wide < 65  # a fifth of 200


# Copies and repairs


def test_a_copy_in_another_process_reads_the_same(folder: Path) -> None:
    """Loader processes that are not forked get a pickled copy."""
    source: Any = shard_data(folder, size=64).source
    source.batch_of([(0, 0), (1, 0)])  # opens files and takes memory, which no copy can share
    copy = pickle.loads(pickle.dumps(source))
    batches = [reader.batch_of([(2, 0), (5, 0), (2, 0)]) for reader in (source, copy)]
    assert batches[0].prompts == batches[1].prompts == [source.caption(i) for i in (2, 5, 2)]
    assert torch.equal(batches[0].pixels, batches[1].pixels)
    assert torch.equal(batches[0].pixels, source.collate([source[i] for i in (2, 5, 2)]).pixels)


# Damage


def cached_data(folder: Path, broken: int) -> ShardData:
    """A streamed cache of four samples with one latent each; the text of one of them holds a value that is not finite,
    under a checksum that fits."""
    sizes = [[2, 2]]

    def make(rows: range, advance: Callable[[int], object]) -> Iterator[Sample]:
        for row in rows:
            text = pack_text(Conditioning(torch.full((1, 2, 3), float(row + 1))), "fp32")
            if row == broken:
                text = text.replace(struct.pack("<f", row + 1.0), struct.pack("<f", float("nan")))
            latents = pack_latents(torch.full((1, 2, 2), float(row)), None, "fp32")
            files = {"txt": b"number %d" % row, TEXT: text, latents_name((2, 2)): latents}
            yield f"{row}", files, {"usable": 1, "bucket": 0, "text": row}

    settings = {"buckets": [{"pixels": [16, 16], "sizes": sizes}], "identity": {}, "deduplicate": False}
    job = Job(folder, "cache", 4, 4, settings)
    job.claim()
    assert job.run(make) is not None
    return ShardData(f"pipe:cat {folder}/00000.tar", batch_size=4, manifest=str(folder))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("streamed", [True, False])
def test_a_cached_sample_with_damaged_values_is_replaced_and_named(
    tmp_path: Path, workers: int, streamed: bool
) -> None:
    data = cached_data(tmp_path / "cache", broken=2)
    if not streamed:
        data = ShardData(str(tmp_path / "cache"), batch_size=4)
    data.workers = workers
    (batch,) = loader(data, total=1)
    rows = [int(prompt.rsplit(" ", 1)[1]) for prompt in batch.prompts]
    assert len(rows) == 4 and set(rows) == {0, 1, 3}
    assert batch.cached.conditioning.embeds[:, 0, 0].tolist() == [row + 1.0 for row in rows]
    assert batch.cached.posteriors[(2, 2)][0][:, 0, 0, 0].tolist() == [float(row) for row in rows]
    (reason,) = batch.skipped
    name = r"00000\.tar, 2: " if streamed else r"00000\.tar, sample 2: "
    assert re.search(name + "embeds0 has values that are not finite$", reason)


def damage(folder: Path, row: int, keep: int = 10) -> str:
    """Overwrite the middle of a picture; returns its shard's name."""
    shards = ShardSet(str(folder))
    place = shards.place(row, "png")
    file = folder / shards.files[place.shard]
    with open(file, "r+b") as stream:
        stream.seek(place.offset + place.size // 2)
        stream.write(b"damaged!" * 2)
    return file.name


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_sample_is_skipped_counted_and_shown(tmp_path: Path, workers: int) -> None:
    folder = make_pictures(tmp_path / "shards", 11)
    name = damage(folder, 6)
    data = shard_data(folder, workers=workers)
    batches = list(loader(data))
    assert all(len(batch) == 4 for batch in batches)
    assert not any("number 6" in prompt for batch in batches for prompt in batch.prompts)
    with pytest.warns(UserWarning, match=rf"skipped a sample \(1 so far\).*{name}, sample 2: \.png is damaged"):
        for batch in batches:
            data.on_before_batch_transfer(batch, 0)
    assert len(data.names) == 1 and data.bad >= 4 and data.seen == 48
    assert prompts(shard_data(folder), updates=4) == [batch.prompts for batch in batches][4:]


@pytest.mark.parametrize("world", [1, 4])
def test_too_many_corrupt_samples_stop_the_run(tmp_path: Path, world: int) -> None:
    """A share of what each process has read: no number of processes, and no restart, lets more pass."""
    folder = make_pictures(tmp_path / "shards", 11)
    for row in (1, 6):
        damage(folder, row)
    data = shard_data(folder)
    message = r"^1[12] of \d+ samples.*max_bad=0\.01.*\.tar, sample"
    with pytest.warns(UserWarning), pytest.raises(UserError, match=message):
        for batch in loader(data, total=500, world=world, updates=100):
            data.on_before_batch_transfer(batch, 0)
    assert 11 / 0.25 < data.seen < 11 / 0.13  # 2 of 11 samples
    strict = shard_data(folder, max_bad=0.0)
    with pytest.warns(UserWarning), pytest.raises(UserError, match=r"^[12] of \d+ samples"):
        for batch in loader(strict):
            strict.on_before_batch_transfer(batch, 0)


def test_a_few_corrupt_samples_do_not(tmp_path: Path) -> None:
    folder = make_pictures(tmp_path / "shards", 11)
    damage(folder, 6)
    data = shard_data(folder, max_bad=0.15)
    with pytest.warns(UserWarning, match="1 so far"):
        for batch in loader(data, total=300):
            data.on_before_batch_transfer(batch, 0)
    assert data.seen == 1200 and 1200 / 11 - 2 <= data.bad <= 1200 / 11 + 2


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_cannot_be_read_at_all_end_in_one_line(tmp_path: Path, workers: int) -> None:
    folder = make_pictures(tmp_path / "shards", 4)
    (folder / "00000.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"^100 samples in a row cannot be read, the last one: .*cut off$") as caught:
        next(iter(loader(shard_data(folder, workers=workers))))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"hold no sample that can be read$"):
        next(iter(loader(shard_data(f"pipe:cat {folder}/00000.tar", workers=workers))))


def test_a_truncated_shard_is_skipped_too(tmp_path: Path) -> None:
    folder = make_pictures(tmp_path / "shards", 11)
    os.truncate(folder / "00001.tar", ShardSet(str(folder)).place(6, "png").offset + 9)
    found = {prompt for batch in prompts(shard_data(folder), total=6) for prompt in batch}
    assert {int(prompt.rsplit(" ", 1)[1]) for prompt in found} == set(range(11)) - {6, 7}


def test_wrong_settings_are_refused(folder: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"batch_size": 0}, r"data\.batch_size=0; use at least 1"),
        ({"manifest": str(folder)}, r"data\.manifest=.* is for streamed shards, but data\.path=.*; leave it out"),
        ({"window": 0}, r"data\.window=0; use at least 1"),
        ({"max_bad": 2.0}, r"data\.max_bad=2\.0"),
        ({"max_bad": float("nan")}, r"data\.max_bad=nan; use 0 to 1"),
        ({"workers": 100_000}, r"data\.workers=100000; use at most \d+, each is a process or a thread"),
        ({"prefetch": 10**9}, r"data\.prefetch=1000000000; use at most 100, so many batches"),
        ({"batch_size": 10**9}, r"data\.batch_size=1000000000; use at most 65536"),
        ({"seed": -1}, r"data\.seed=-1; use 0 or more"),
        ({"size": 32, "buckets": ["1:1"], "multiple": 0}, r"data\.multiple=0; use at least 1"),
        ({"size": [32, 48], "buckets": ["1:1"]}, r"data\.size=\[32, 48\] beside data\.buckets"),
        ({"buckets": ["wide"]}, "aspect=wide"),
    ):
        with pytest.raises(UserError, match=message):
            shard_data(folder, **options)
    with pytest.raises(UserError, match=r"data\.path is missing"):
        ShardData(None)
    with pytest.raises(UserError, match="use swd import first"):
        shard_data(f"pipe:cat {folder}/00000.tar", buckets=["1:1"])


# Streams


def pipe(folder: Path) -> str:
    return f"pipe:cat {folder}/{{00000..00005}}.tar"


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("streamed") / "shards", 24)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pipe_gives_every_sample_and_resumes(streamed: Path, workers: int) -> None:
    data = shard_data(pipe(streamed), workers=workers)
    straight = prompts(data)
    first = list(chain(*straight[:6]))
    assert len(set(first)) == 24 and first != sorted(first)
    for updates in (1, 2, 7):
        assert prompts(shard_data(pipe(streamed), workers=workers), updates=updates) == straight[updates:]
    assert prompts(shard_data(pipe(streamed), workers=workers, seed=9)) != straight


def test_processes_stream_different_shards(streamed: Path) -> None:
    parts = [prompts(shard_data(pipe(streamed), batch_size=8), rank=rank, world=2, total=3) for rank in (0, 1)]
    flat = list(chain(*joined(parts)))
    assert len(flat) == 24 and len(set(flat)) == 24


def test_plain_tar_urls_stream_too(streamed: Path) -> None:
    expected = prompts(shard_data(pipe(streamed)))
    assert prompts(shard_data(f"{streamed}/{{00000..00005}}.tar")) == expected
    assert prompts(shard_data(f"file://{streamed}/{{00000..00005}}.tar")) == expected


def test_a_stream_skips_what_breaks_off(tmp_path: Path) -> None:
    folder = make_pictures(tmp_path / "shards", 24)
    os.truncate(folder / "00001.tar", ShardSet(str(folder)).place(6, "png").offset + 9)
    (folder / "00003.tar").unlink()
    data = shard_data(pipe(folder), max_bad=1.0)
    batches: list[Batch] = list(loader(data, total=8))
    assert all(len(batch) == 4 for batch in batches)
    rows = {int(prompt.rsplit(" ", 1)[1]) for batch in batches for prompt in batch.prompts}
    assert rows <= set(range(24)) - {6, 7, 12, 13, 14, 15} and len(rows) > 12
    told = {name for batch in batches for name in batch.skipped}
    assert any("00001.tar" in name for name in told) and any("00003.tar" in name for name in told)


@pytest.mark.parametrize("place", ["in a file", "in a header", "between samples"])
def test_a_stream_names_the_shard_that_breaks_off(tmp_path: Path, place: str) -> None:
    """tarfile takes one that is cut in a header or between two files for a whole one."""
    folder = make_pictures(tmp_path / "shards", 24)
    with tarfile.open(folder / "00001.tar") as opened:
        starts = [member.offset for member in opened if member.name.endswith(".png")]
    os.truncate(folder / "00001.tar", starts[2] + {"in a file": 600, "in a header": 100, "between samples": 0}[place])
    for url in (f"pipe:cat {folder}/00001.tar", f"{folder}/00001.tar", f"file://{folder}/00001.tar"):
        *good, last = read_shard(url)
        assert [sample["__key__"] for sample in good] == ["00000004", "00000005"][: len(good)] and good
        assert last.reason.startswith(f"{url}: unexpected end of data; it breaks off after {len(good)} sample")
    data = shard_data(pipe(folder), max_bad=1.0)
    with pytest.warns(
        UserWarning, match=r"skipped a sample \(1 so far\): pipe:cat .*00001\.tar: unexpected end of data"
    ):
        for batch in loader(data, total=6):
            data.on_before_batch_transfer(batch, 0)
    assert len(data.names) == 1 and data.bad in (1, 2)  # once an epoch


def test_whole_streams_are_whole(tmp_path: Path) -> None:
    """Also compressed ones, and ones without the padding that tar adds."""
    folder = make_pictures(tmp_path / "shards", 4)
    file, count = folder / "00000.tar", 4
    with tarfile.open(file) as opened:
        last = max(member.offset_data + member.size for member in opened)
    bare = tmp_path / "bare.tar"
    bare.write_bytes(file.read_bytes()[: -(-last // 512) * 512 + 1024])
    zipped = tmp_path / "zipped.tar"
    zipped.write_bytes(gzip.compress(file.read_bytes()))
    for url in (file, bare, zipped):
        found = list(read_shard(f"pipe:cat {url}"))
        assert len(found) == count and not any(isinstance(sample, BrokenShard) for sample in found), url


def test_a_passing_fault_of_a_remote_read_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_pictures(tmp_path / "shards", 5)
    shards = ShardSet(f"file://{folder}")
    filesystem, _ = shards._remote(0)
    read, failures = filesystem.cat_file, [2]

    def flaky(*args: Any, **kwargs: Any) -> Any:
        failures[0] -= 1
        if failures[0] >= 0:
            raise TimeoutError("for a moment")
        return read(*args, **kwargs)

    monkeypatch.setattr("swd.data.shards.PAUSES", (0.0, 0.0))
    monkeypatch.setattr(filesystem, "cat_file", flaky)
    assert shards.read(1, ["txt"])["txt"].tobytes().endswith(b"number 1")
    failures[0] = 3
    with pytest.raises(CorruptSample, match="for a moment"):
        shards.read(1, ["txt"])


def test_a_stream_needs_a_shard_for_every_reader(streamed: Path) -> None:
    with pytest.raises(UserError, match="6 streamed shards for 4 processes with 2 loader processes"):
        loader(shard_data(pipe(streamed), workers=2), world=4)


def test_remote_shards_are_read_by_range(tmp_path: Path) -> None:
    """Over HTTP."""
    pytest.importorskip("aiohttp")
    folder = make_pictures(tmp_path / "shards", 11)
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).parents[1] / "helpers" / "range_server.py"), str(folder)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        url = f"http://127.0.0.1:{port}"
        assert prompts(shard_data(url), total=4) == prompts(shard_data(folder), total=4)
        assert prompts(shard_data(url, workers=1), total=3) == prompts(shard_data(folder), total=3)
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
