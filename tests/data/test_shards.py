"""Shards, their index, and jobs that make them."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import webdataset as wds
from fsspec.implementations.local import LocalFileSystem
from shards import make_pictures

from swd.data.job import Job, Sample
from swd.data.manifest import MANIFEST, read_manifest
from swd.data.shard_index import CHECKSUMS
from swd.data.shard_writer import fault
from swd.data.shards import CorruptSample, ShardSet, split_name
from swd.data.streamed import BrokenShard, read_shard
from swd.io.files import file_hash
from swd.io.ranks import share
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
    assert list(read_shard(f"file://{folder}/00000.tar")) == [BrokenShard(f"file://{folder}/00000.tar: 503 try later")]


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


# Damage that lies in what says where samples are


def change_index(file: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Change arrays of an index and leave out its own hash, as indices of the first format are."""
    data = file.read_bytes()
    told = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["index"])
    tensors = {key: value.copy() for key, value in safetensors.numpy.load(data).items()}
    change(tensors)
    told.pop("own")
    file.write_bytes(safetensors.numpy.save(tensors, {"index": json.dumps(told)}))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object], formats: int | None = None) -> None:
    """Change a manifest as an editor does: its own hash is left out then."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest.pop("sha256")
    if formats == 1:
        manifest["format"] = 1
        for entry in manifest["shards"]:
            entry.pop("index_sha256")
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        ShardSet(str(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_byte_of_an_index_is_covered(folder: Path) -> None:
    file = folder / "00001.idx"
    data = file.read_bytes()
    for place in range(0, len(data), 29):
        file.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        assert "00001.idx" in refused(folder)
    (folder / "00001.idx").write_bytes((folder / "00000.idx").read_bytes())  # of as many samples
    assert "00001.idx is damaged, or of another shard" in refused(folder)


def test_every_byte_of_a_manifest_is_covered(folder: Path) -> None:
    file = folder / MANIFEST
    data = file.read_bytes()
    for place in range(0, len(data), 7):
        if not data[place : place + 1].isspace():
            file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            assert MANIFEST in refused(folder) or "00" in refused(folder)
    file.write_text(json.dumps(json.loads(data)))  # laid out otherwise, it says the same
    assert len(ShardSet(str(folder))) == 11


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["offset"].__setitem__((1, 0), 10**12), "lies at 1000000000000"),
        (lambda t: t["offset"].__setitem__((1, 0), -7), "lies at -7"),
        (lambda t: t["size"].__setitem__((2, 1), 2**40), "with 1099511627776 bytes, but the shard has"),
        (lambda t: t["size"].__setitem__((0, 2), -5), "with -5 bytes"),
        (lambda t: t["size"].__setitem__((0, 2), 2**63 - 1), "bytes, but the shard has"),
        (lambda t: t.update(size=t["size"][:, :1]), "cannot be read"),
        (lambda t: t.update({"column/width": t["column/width"][:2]}), "do not fit together"),
        (lambda t: t.update({"column/width": t["column/width"].astype(np.float32)}), "do not fit together"),
        (lambda t: t.update({k: t[k].astype(np.int32) for k in ("offset", "size", "checksum")}), "do not fit together"),
        (lambda t: t.pop("checksum"), "cannot be read"),
    ],
)
def test_an_index_is_checked_for_its_ranges_where_no_hash_is_stored(
    folder: Path, change: Callable[[dict[str, np.ndarray]], object], message: str
) -> None:
    rewrite(folder, lambda manifest: None, formats=1)
    change_index(folder / "00001.idx", change)
    assert message in refused(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("kind"), "kind is None"),
        (lambda m: m.update(kind=7), "kind is 7"),
        (lambda m: m.update(format=True), "has format True"),
        (lambda m: m.update(samples=-3), "samples is -3, its shards have 11"),
        (lambda m: m.update(samples=12), "samples is 12, its shards have 11"),
        (lambda m: m.update(bytes="much"), "bytes is 'much'"),
        (lambda m: m.update(shards=[]), "holds no samples"),
        (lambda m: m.update(shards=[1, 2]), "shard 0 of its list is no entry"),
        (lambda m: m["shards"][1].pop("samples"), "samples of 00001.tar is None"),
        (lambda m: m["shards"][1].update(samples=4.0), "samples of 00001.tar is 4.0"),
        (lambda m: m["shards"][1].update(samples=10**30), "samples of 00001.tar is 1000"),
        (lambda m: m["shards"][2].update(bytes=-1), "bytes of 00002.tar is -1"),
        (lambda m: m["shards"][2].update(sha256=None), "sha256 of 00002.tar is None"),
        (lambda m: m["shards"][2].pop("index_sha256"), "index_sha256 of 00002.tar is None"),
        (lambda m: m["shards"][2].pop("file"), "shard 2 of its list names no file"),
        (lambda m: m["shards"][2].update(file="00001.tar"), "it lists 00001.tar twice"),
        (lambda m: m.update(shards={"a": 1}), "is no manifest of shards"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    rewrite(folder, change)
    assert message in refused(folder)


def test_a_manifest_of_endless_depth_is_refused(folder: Path) -> None:
    (folder / MANIFEST).write_text("[" * 100_000)
    assert f"{MANIFEST} is damaged" in refused(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../x.tar",
        "/etc/x.tar",
        "sub/../../x.tar",
        "sub/x.tar",
        "https://elsewhere/x.tar",
        "..",
        ".tar",
        "a\\b.tar",
        "x",
    ],
)
def test_a_manifest_that_names_a_file_elsewhere_is_refused(folder: Path, name: str) -> None:
    (folder.parent / "x.tar").write_bytes((folder / "00001.tar").read_bytes())
    (folder.parent / "x.idx").write_bytes((folder / "00001.idx").read_bytes())
    rewrite(folder, lambda manifest: manifest["shards"][1].update(file=name))
    assert f"lists the shard {name!r}" in refused(folder)


@pytest.mark.parametrize("name", ["00001.tar", "00001.idx", MANIFEST])
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_link_out_of_the_folder_is_refused(folder: Path, name: str, scheme: str) -> None:
    (folder / name).rename(folder.parent / name)
    (folder / name).symlink_to(folder.parent / name)
    with pytest.raises(UserError, match=rf"{name} is a link out of its folder"):
        ShardSet(f"{scheme}{folder}")
    (folder / name).unlink()
    (folder.parent / name).rename(folder / f"own{name}")
    (folder / name).symlink_to(f"own{name}")  # within the folder is fine
    (folder.parent / "linked").symlink_to(folder)  # and so is a link to the folder
    assert len(ShardSet(f"{scheme}{folder.parent / 'linked'}")) == 11


@pytest.mark.parametrize("name", ["00001.tar", "00001.idx", MANIFEST])
def test_a_named_pipe_among_the_files_does_not_hang(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert f"{name} is no plain file" in refused(folder)


def test_parts_that_changed_places_are_damage(folder: Path) -> None:
    shards = ShardSet(str(folder))
    row = next(row for row in range(4, 8) if shards.place(row, "bin").size > 1000)
    place, ending = shards.place(row, "bin"), "bin"
    for start, stop, length in ((0, 256, 256), (8, 16, 8), (100, 700, 1)):
        data = bytearray((folder / "00001.tar").read_bytes())
        a, b = place.offset + start, place.offset + stop
        data[a : a + length], data[b : b + length] = data[b : b + length], data[a : a + length]
        assert data != (folder / "00001.tar").read_bytes()
        damaged = folder.parent / f"damaged{start}"
        shutil.copytree(folder, damaged)
        (damaged / "00001.tar").write_bytes(data)
        with pytest.raises(CorruptSample, match=r"\.bin is damaged"):
            ShardSet(str(damaged)).read(row, [ending])


def test_shards_of_the_first_format_are_read(folder: Path) -> None:
    """Their checksums are sums of words, and their manifest has no hash of the index."""
    old = Path(__file__).parents[1] / "data" / "version_0_1" / "cache"
    shards = ShardSet(str(old))
    assert shards.manifest["format"] == 1 and len(shards) > 1
    for row in range(len(shards)):
        for ending in shards.endings:
            if shards.has(row, ending):
                assert len(shards.read(row, [ending])[ending])
    damaged = shutil.copytree(old, folder.parent / "old")
    place = shards.place(0, "txt")
    with open(damaged / "00000.tar", "r+b") as stream:
        stream.seek(place.offset)
        stream.write(b"?")
    with pytest.raises(CorruptSample, match=r"\.txt is damaged"):
        ShardSet(str(damaged)).read(0, ["txt"])


# Damage that a job meets when it goes on


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, flip])
@pytest.mark.parametrize("name", ["00001.tar", "00001.idx", "00002.tar"])
def test_a_damaged_shard_is_made_again_not_called_good(folder: Path, damage: Callable[[Path], None], name: str) -> None:
    before = hashes(folder)
    (folder / MANIFEST).unlink()
    damage(folder / name)
    redone: list[int] = []

    def noted(rows: range, advance: Callable[[int], object]) -> Iterator[Sample]:
        redone.extend(rows)
        return make(rows, advance)

    again = job(folder)
    again.claim()
    with pytest.warns(UserWarning, match=rf"{name[:5]}\.(tar|idx).*; it is made again"):
        assert again.run(noted) is not None
    assert hashes(folder) == before and len(ShardSet(str(folder))) == 11
    assert {row // 4 for row in redone} == {int(name[:5])}


def test_no_manifest_is_written_over_another_process_s_damaged_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        part = job(tmp_path / "shared")
        part.claim()
        if rank == 1:
            flip(part.folder / "00002.tar")
            with pytest.raises(UserError, match=r"00002\.tar is not the one in its index; run the same command again"):
                part.run(make)
            assert not part.is_complete
        else:
            assert part.run(make) is None


def test_a_complete_job_whose_shard_is_cut_goes_on(folder: Path) -> None:
    before = hashes(folder)
    cut(folder / "00000.tar")
    again = job(folder)
    assert not again.is_complete
    with pytest.warns(UserWarning, match="00000.tar has .* bytes"):
        again.run(make)
    assert again.is_complete and hashes(folder) == before
    flip(folder / "00002.idx")
    assert not again.is_complete
    with pytest.warns(UserWarning, match="00002.idx .* it is made again"):
        again.run(make)
    assert again.is_complete and hashes(folder) == before
    (folder / MANIFEST).write_text("{")
    with pytest.raises(UserError, match=r"is damaged.*; remove it, and the same command checks the shards"):
        assert again.is_complete


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the disk fills, and the same command ends with the same bytes."""
    whole = job(tmp_path / "whole")
    whole.claim()
    whole.run(make)
    full, free = job(tmp_path / "full"), [0]
    full.claim()

    def limited(original: Any) -> Any:
        def write(self: Any, *args: Any, **options: Any) -> Any:
            free[0] -= 1
            if free[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device", "00000.tar")
            return original(self, *args, **options)

        return write

    for name in ("write_bytes", "write_text"):
        monkeypatch.setattr(Path, name, limited(getattr(Path, name)))
    monkeypatch.setattr(tarfile.TarFile, "addfile", limited(tarfile.TarFile.addfile))
    for room in (0, 1, 12, 18, 12, 22, 10):  # a shard of four samples takes 13 writes
        free[0] = room
        with pytest.raises(OSError, match="No space left"):
            full.run(make)
        left = sorted(file.name for file in full.folder.iterdir())
        assert not [name for name in left if name.startswith(".")] and MANIFEST not in left
        assert all(fault(full.folder, int(name[:5])) is None for name in left if name.endswith(".tar"))
    free[0] = 10**6
    assert full.run(make) is not None and hashes(full.folder) == hashes(whole.folder)


@pytest.mark.parametrize(
    ("rows", "shard_size", "message"),
    [
        (10**12, 4, "are more than one folder holds"),
        (5, 10**9, "shard_size=1000000000; use at most"),
        (5, -1, "at least"),
    ],
)
def test_a_job_beyond_reason_is_refused(tmp_path: Path, rows: int, shard_size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Job(tmp_path / "out", "pictures", rows, shard_size, {}).claim()
    assert not (tmp_path / "out").exists()


def test_a_job_says_what_it_does(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    new = job(tmp_path / "out")
    new.claim()
    new.run(make, task="drawing with a model into out")
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "drawing with a model into out: 11 pictures" and lines[-1].startswith("done: 11 pictures in ")


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


@pytest.mark.parametrize("names", [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID")])
def test_processes_share_the_shards(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    made: Counter[int] = Counter()

    def noted(rows: range, advance: Callable[[int], object]) -> Iterator[Sample]:
        made.update(rows)
        return make(rows, advance)

    finished = []
    for rank in (1, 0):
        for name, value in zip(names, (str(rank), "2", "0"), strict=False):
            monkeypatch.setenv(name, value)
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
