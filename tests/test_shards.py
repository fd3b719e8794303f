"""Shards, their index, and jobs that make them."""

from __future__ import annotations

import json
import os
import pickle
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from fsspec.implementations.local import LocalFileSystem
from shards import make_pictures

from swd.data.shards import CHECKSUMS, MANIFEST, CorruptSample, ShardSet, read_manifest, split_name
from swd.data.stream import read_shard
from swd.data.work import Job, Sample, share
from swd.files import file_hash
from swd.types import UserError


def contents(row: int) -> dict[str, bytes]:
    rng = np.random.default_rng(row)
    return {
        "txt": f"caption {row} ü".encode(),
        "bin": rng.bytes(int(rng.integers(0, 2000))),
        "8x8.safetensors": rng.bytes(512),
    }


def make(rows: range, advance: Callable[[int], object]) -> Iterator[Sample]:
    for row in rows:
        yield f"{row:06d}", contents(row), {"width": 10 * row}
        advance(1)


def job(folder: Path, rows: int = 11, **settings: object) -> Job:
    return Job(folder, "pictures", rows, 4, {"made": "for tests", **settings})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    whole = job(tmp_path / "shards")
    whole.claim()
    assert whole.run(make) is not None
    return whole.folder


def hashes(folder: Path) -> list[str]:
    return [entry["sha256"] for entry in read_manifest(str(folder))["shards"]]


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_every_file_of_every_sample_comes_back(folder: Path, scheme: str) -> None:
    shards = ShardSet(f"{scheme}{folder}")
    assert len(shards) == 11 and shards.endings == ["txt", "bin", "8x8.safetensors"]
    assert shards.columns["width"].tolist() == [10 * row for row in range(11)]
    for row in (0, 3, 4, 10, 7):
        for endings in (["txt"], ["8x8.safetensors", "txt"], ["txt", "bin", "8x8.safetensors"]):
            found = shards.read(row, endings)
            assert {e: data.tobytes() for e, data in found.items()} == {e: contents(row)[e] for e in endings}


def test_files_side_by_side_are_one_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = ShardSet(str(folder))
    reads: list[int] = []
    whole = ShardSet._read_range

    def counted(self: ShardSet, shard: int, start: int, stop: int, *rest: object) -> np.ndarray:
        reads.append(stop - start)
        return whole(self, shard, start, stop, *rest)

    monkeypatch.setattr(ShardSet, "_read_range", counted)
    shards.read(5, ["txt", "bin", "8x8.safetensors"])
    assert len(reads) == 1 and reads[0] < 6000
    reads.clear()
    shards.read(5, ["txt"])
    assert reads == [len(contents(5)["txt"])]


def test_webdataset_reads_the_same(folder: Path) -> None:
    urls = [str(p) for p in sorted(folder.glob("*.tar"))]
    found = list(wds.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in found] == [f"{row:06d}" for row in range(11)]
    assert all(sample[e] == contents(row)[e] for row, sample in enumerate(found) for e in contents(row))


def test_names_split_as_webdataset_splits_them() -> None:
    from webdataset.tariterators import base_plus_ext

    for name in ("a/b.c/00012.64x64.safetensors", "x.PNG", "dir/x.tar.gz", "a.b"):
        key, ending = base_plus_ext(name)
        assert split_name(name) == (key, ending.lower())


def test_a_reader_survives_pickling_as_loader_processes_need(folder: Path) -> None:
    shards = ShardSet(str(folder))
    shards.read(1, ["txt"])
    assert pickle.loads(pickle.dumps(shards)).read(9, ["txt"])["txt"].tobytes() == contents(9)["txt"]


def test_threads_read_more_shards_than_may_be_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard that one thread puts away may be in use by another, and its descriptor's number given out again."""
    monkeypatch.setattr("swd.data.shards.OPEN_FILES", 1)
    shards, before = ShardSet(str(folder)), len(os.listdir("/proc/self/fd"))

    def reads(row: int) -> None:
        assert shards.read(row, ["txt"])["txt"].tobytes() == contents(row)["txt"]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(reads, [7 * i % 11 for i in range(20_000)]))
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_a_store_with_errors_of_its_own_costs_a_sample_not_the_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """aiohttp's, for one, are no OSError."""
    shards = ShardSet(f"file://{folder}")

    def fails(*args: object, **options: object) -> bytes:
        raise LookupError("503 try later\nand more")

    monkeypatch.setattr(LocalFileSystem, "cat_file", fails)
    with pytest.raises(CorruptSample, match=r"00001\.tar cannot be read \(503 try later\)$"):
        shards.read(5, ["txt"])
    monkeypatch.setattr(LocalFileSystem, "open", fails)
    with pytest.raises(UserError, match=r"manifest\.json cannot be read \(503 try later\)$"):
        ShardSet(f"file://{folder}")
    assert list(read_shard(f"file://{folder}/00000.tar")) == [{"bad": f"file://{folder}/00000.tar: 503 try later"}]


def test_a_job_that_is_started_twice_ends_in_one_line(tmp_path: Path) -> None:
    first, again = job(tmp_path / "shards"), job(tmp_path / "shards")

    def disturbed(rows: range, advance: Callable[[int], object]) -> Iterator[Sample]:
        if rows.start == 4:
            again.run(make)
        yield from make(rows, advance)

    first.claim()
    with pytest.raises(UserError, match="the same job was started again and is at work on shard 00001"):
        first.run(disturbed)
    assert again.is_complete and len(ShardSet(str(again.folder))) == 11


def test_hashes_and_counts_are_those_of_the_files(folder: Path) -> None:
    manifest = read_manifest(str(folder))
    assert manifest["samples"] == 11 and [entry["samples"] for entry in manifest["shards"]] == [4, 4, 3]
    for entry in manifest["shards"]:
        assert entry["sha256"] == file_hash(folder / entry["file"])
        assert entry["bytes"] == (folder / entry["file"]).stat().st_size


# Damage


@pytest.mark.parametrize("kind", CHECKSUMS)
def test_any_changed_byte_changes_the_checksum(kind: str) -> None:
    checksum = CHECKSUMS[kind]
    data = np.random.default_rng(0).bytes(1003)
    for place in (0, 7, 8, 500, 999, 1000, 1002):
        damaged = bytearray(data)
        damaged[place] ^= 0x10
        assert checksum(bytes(damaged)) != checksum(data), place
    assert checksum(data) == checksum(np.frombuffer(data, np.uint8)) and 0 <= checksum(b"") < 2**63


def test_a_damaged_file_is_named(folder: Path) -> None:
    shards = ShardSet(str(folder))
    place = shards.place(5, "bin")
    with open(folder / "00001.tar", "r+b") as stream:
        stream.seek(place.offset + place.size // 2)
        stream.write(b"\x00\xff\x00")
    with pytest.raises(CorruptSample, match=r"00001\.tar, sample 1: \.bin is damaged"):
        shards.read(5, ["bin"])
    assert shards.read(5, ["txt"])["txt"].tobytes() == contents(5)["txt"]


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_truncated_shard_loses_only_what_is_cut(folder: Path, scheme: str) -> None:
    shards = ShardSet(f"{scheme}{folder}")
    place = shards.place(6, "bin")
    os.truncate(folder / "00001.tar", place.offset + 1)
    assert shards.read(6, ["txt"])["txt"].tobytes() == contents(6)["txt"]
    for row, endings in ((6, ["txt", "bin"]), (7, ["txt"])):
        with pytest.raises(CorruptSample, match="is cut off"):
            shards.read(row, endings)


def test_missing_files_are_named(folder: Path) -> None:
    shards = ShardSet(str(folder))
    (folder / "00002.tar").unlink()
    with pytest.raises(CorruptSample, match=r"00002\.tar cannot be read"):
        shards.read(9, ["txt"])
    with pytest.raises(CorruptSample, match=r"has no \.jpg"):
        shards.read(0, ["jpg"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / MANIFEST).unlink(), r"holds no manifest\.json; make shards with"),
        (lambda f: (f / MANIFEST).write_text("{"), "is damaged"),
        (lambda f: (f / MANIFEST).write_text("[]"), "is no manifest"),
        (lambda f: (f / "00001.idx").unlink(), r"00001\.idx cannot be read"),
        (lambda f: (f / "00001.idx").write_bytes(b"x" * 30), r"00001\.idx cannot be read"),
        (lambda f: (f / "00001.idx").write_bytes((f / "00002.idx").read_bytes()), "lists 3 samples, the manifest says"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(folder: Path, change: Callable[[Path], object], message: str) -> None:
    change(folder)
    with pytest.raises(UserError, match=message) as caught:
        ShardSet(str(folder))
    assert "\n" not in str(caught.value)


def test_other_formats_and_unknown_urls_are_refused(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(UserError, match="has format 99, this version reads 1 and 2"):
        ShardSet(str(folder))
    with pytest.raises(UserError, match="nosuch"):
        ShardSet("nosuch://bucket/path")


# Jobs


def stop_at(row: int) -> Callable[[range, Callable[[int], object]], Iterator[Sample]]:
    def broken(rows: range, advance: Callable[[int], object]) -> Iterator[Sample]:
        for sample in make(rows, advance):
            if sample[0] == f"{row:06d}":
                raise KeyboardInterrupt
            yield sample

    return broken


@pytest.mark.parametrize("row", [0, 5, 10])
def test_a_stopped_job_continues_without_a_duplicate_or_a_gap(folder: Path, tmp_path: Path, row: int) -> None:
    again = job(tmp_path / "again")
    again.claim()
    with pytest.raises(KeyboardInterrupt):
        again.run(stop_at(row))
    assert not again.is_complete and not (again.folder / f"{row // 4:05d}.tar").exists()
    redone: list[int] = []

    def noted(rows: range, advance: Callable[[int], object]) -> Iterator[Sample]:
        redone.extend(rows)
        return make(rows, advance)

    again.claim()
    assert again.run(noted) is not None
    assert redone == list(range(row - row % 4, 11))
    assert hashes(again.folder) == hashes(folder)
    assert not [p for p in again.folder.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("names", [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")])
def test_processes_share_the_shards(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, str]
) -> None:
    made: Counter[int] = Counter()

    def noted(rows: range, advance: Callable[[int], object]) -> Iterator[Sample]:
        made.update(rows)
        return make(rows, advance)

    finished = []
    for rank in (1, 0):
        monkeypatch.setenv(names[0], str(rank))
        monkeypatch.setenv(names[1], "2")
        assert share() == (rank, 2)
        part = job(tmp_path / "shared")
        part.claim()
        finished.append(part.run(noted))
    assert finished[0] is None and finished[1] is not None
    assert made == Counter(range(11)) and hashes(tmp_path / "shared") == hashes(folder)


def test_a_folder_of_another_job_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds a job of other settings: made was for tests, now for fun"):
        job(folder, made="for fun").claim()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match=r"is not empty \(it holds thesis\.txt\)"):
        job(tmp_path / "other").claim()
    for wrong, message in ((Job(tmp_path / "a", "x", 3, 0, {}), "shard_size=0"), (job(tmp_path / "b", 0), "nothing")):
        with pytest.raises(UserError, match=message):
            wrong.claim()


def test_equal_samples_make_equal_shards(tmp_path: Path) -> None:
    a, b = (make_pictures(tmp_path / name, 5) for name in "ab")
    assert hashes(a) == hashes(b)
    with tarfile.open(a / "00000.tar") as opened:
        assert {member.mtime for member in opened} == {0}
