"""Shards number by number: where files lie, what an index and a manifest say, and which of it is refused."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import xxhash
from fsspec.implementations.local import LocalFileSystem

from swd.data import shards
from swd.data.manifest import MANIFEST, check_inside, is_count, manifest_hash, read_manifest
from swd.data.shard_index import Index, parse_index, sum_of_words, xxh3
from swd.data.shard_writer import ShardWriter, fault, is_done, shard_name, write_manifest, write_shard
from swd.data.shards import CorruptSample, Place, Scratch, ShardSet, split_name
from swd.io.storage import first_line
from swd.types import UserError

SAMPLES: list[tuple[str, Mapping[str, bytes], Mapping[str, int]]] = [
    ("a", {"txt": b"one", "bin": bytes(range(200)) * 3}, {"width": 7}),
    ("b", {"bin": b"", "json": b"{}"}, {"height": 5}),
    ("c", {"txt": b"x" * 512}, {}),
]


def says(message: str, kind: type[Exception] = UserError) -> Any:
    """An error with exactly this message."""
    return pytest.raises(kind, match=f"^{re.escape(message)}$")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of other endings and columns: three samples, then one."""
    whole = tmp_path / "fox_X"
    write_shard(whole, 0, iter(SAMPLES))
    write_shard(whole, 1, iter([("d", {"json": b"[1]"}, {"width": 9})]))
    write_manifest(whole, "pictures", 2, {"made": "for tests"})
    return whole


def index_of(folder: Path, number: int = 0) -> Index:
    return parse_index((folder / f"{shard_name(number)}.idx").read_bytes(), "x.idx")


# Checksums and names


def test_checksums_are_63_bits_of_known_functions() -> None:
    for data in (b"", b"swd", bytes(range(256)), b"a", b"b", b"c", b"d"):
        assert xxh3(data) == xxhash.xxh3_64_intdigest(data) % 2**63 < 2**63
    assert any(xxhash.xxh3_64_intdigest(bytes([value])) >= 2**63 for value in range(9))
    words = [2**63 + 5, 2**64 - 1, 7]
    data = b"".join(word.to_bytes(8, "little") for word in words)
    for tail in (b"", b"\1", b"\1\2\3\4\5\6\7"):
        expected = (sum(words) % 2**64 + int.from_bytes(tail, "little")) % 2**63
        assert sum_of_words(data + tail) == expected
        assert sum_of_words(np.frombuffer(data + tail, np.uint8)) == expected
    assert sum_of_words(b"\0\1") == 256 and sum_of_words(b"") == 0


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("train/00012.64x64.safetensors", ("train/00012", "64x64.safetensors")),
        ("a.b/c.d/x.PNG", ("a.b/c.d/x", "png")),
        ("x.tar.gz", ("x", "tar.gz")),
        ("plain", ("plain", "")),
    ],
)
def test_a_name_splits_at_the_first_dot_of_the_file(name: str, parts: tuple[str, str]) -> None:
    assert split_name(name) == parts


def test_shards_are_numbered_with_five_digits() -> None:
    assert [shard_name(n) for n in (0, 12, 123456)] == ["00000", "00012", "123456"]


def test_counts_are_whole_numbers_that_an_index_holds() -> None:
    assert all(is_count(value) for value in (0, 1, 2**62 - 1))
    assert not any(is_count(value) for value in (-1, 2**62, True, 1.0, "1", None))


def test_an_error_is_its_first_line_or_its_type() -> None:
    assert first_line(ValueError("one\ntwo")) == "one" and first_line(KeyError()) == "KeyError"
    assert first_line(ValueError("x" * 200)) == "x" * 120 and first_line(ValueError("\nx")) == "ValueError"


# Writing


def test_an_index_says_where_each_file_lies(folder: Path) -> None:
    index, data = index_of(folder), (folder / "00000.tar").read_bytes()
    assert index.endings == ["txt", "bin", "json"] and len(index) == 3 and index.checksum == "xxh3"
    # A header of one block before each file, which ends at a block's end: 512 + 512, 512 + 1024, 512, 512 + 512, ...
    assert index.table[0].tolist() == [[512, 1536, -1], [-1, 3072, 3584], [4608, -1, -1]]
    assert index.table[1].tolist() == [[3, 600, -1], [-1, 0, 2], [512, -1, -1]]
    for row, (_, files, _) in enumerate(SAMPLES):
        for column, ending in enumerate(index.endings):
            if ending not in files:
                assert index.table[2, row, column] == -1
                continue
            offset, size, checksum = index.table[:, row, column]
            assert data[offset : offset + size] == files[ending] and checksum == xxh3(files[ending])
    assert {name: values.tolist() for name, values in index.columns.items()} == {
        "height": [-1, 5, -1],
        "width": [7, -1, -1],
    }
    assert index.sha256 == hashlib.sha256(data).hexdigest() and index.size == len(data)
    with tarfile.open(folder / "00000.tar") as opened:
        assert opened.getnames() == ["a.txt", "a.bin", "b.bin", "b.json", "c.txt"]


def test_an_index_holds_its_own_hash_with_zeros_in_its_place(folder: Path) -> None:
    data = (folder / "00000.idx").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    stored = json.loads(header["__metadata__"]["index"])
    assert stored.keys() == {"endings", "sha256", "bytes", "checksum", "own"} and len(header["__metadata__"]) == 1
    assert hashlib.sha256(data.replace(stored["own"].encode(), b"0" * 64)).hexdigest() == stored["own"]
    tensors = safetensors.numpy.load(data)
    assert tensors.keys() == {"offset", "size", "checksum", "column/height", "column/width"}
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.int64)}


def test_a_writer_that_fails_leaves_no_index(tmp_path: Path) -> None:
    with pytest.raises(KeyError), ShardWriter(tmp_path / "x.tar") as writer:
        writer.add("a", {"txt": b"x"})
        raise KeyError
    assert [file.name for file in tmp_path.iterdir()] == ["x.tar"]
    with ShardWriter(tmp_path / "y.tar") as writer:
        writer.add("a", {"txt": b"x"})
    assert parse_index((tmp_path / "y.idx").read_bytes(), "y").columns == {}


def test_a_shard_is_done_with_both_of_its_files(folder: Path) -> None:
    assert is_done(folder, 0) and is_done(folder, 1) and not is_done(folder, 2)
    assert sorted(file.name for file in folder.iterdir()) == [
        "00000.idx", "00000.tar", "00001.idx", "00001.tar", MANIFEST
    ]  # fmt: skip
    (folder / "00000.idx").unlink()
    (folder / "00001.tar").unlink()
    assert not is_done(folder, 0) and not is_done(folder, 1)


def test_errors_of_a_disk_name_the_shard(tmp_path: Path) -> None:
    def failing(error: OSError) -> Iterator[Any]:
        yield SAMPLES[0]
        raise error

    with pytest.raises(OSError, match="No space left") as caught:
        write_shard(tmp_path / "a" / "b", 3, failing(OSError(errno.ENOSPC, "No space left")))
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "a" / "b" / "00003.tar"))
    for error in (OSError(errno.EIO, "broken", "the file"), OSError("no number"), FileNotFoundError(2, "gone", "it")):
        with pytest.raises(OSError) as caught:
            write_shard(tmp_path, 0, failing(error))
        assert caught.value is error
    assert [file.name for file in tmp_path.iterdir()] == ["a"], "temporary folders are gone"


def test_a_job_whose_folder_is_taken_away_was_started_again(tmp_path: Path) -> None:
    def removing() -> Iterator[Any]:
        yield SAMPLES[0]
        for work in tmp_path.glob(".00007.*"):
            for file in work.iterdir():
                file.unlink()
            work.rmdir()

    with says(f"out={tmp_path}: the same job was started again and is at work on shard 00007; let one of them run"):
        write_shard(tmp_path, 7, removing())


def test_a_manifest_counts_and_hashes_what_is_there(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    sizes = [(folder / f"0000{n}.tar").stat().st_size for n in (0, 1)]
    expected: dict[str, Any] = {
        "format": 2, "kind": "pictures", "samples": 4, "bytes": sum(sizes), "made": "for tests",
        "shards": [
            {
                "file": f"0000{n}.tar", "samples": (3, 1)[n], "bytes": sizes[n],
                "sha256": hashlib.sha256((folder / f"0000{n}.tar").read_bytes()).hexdigest(),
                "index_sha256": hashlib.sha256((folder / f"0000{n}.idx").read_bytes()).hexdigest(),
            }
            for n in (0, 1)
        ],
    }  # fmt: skip
    own = hashlib.sha256(json.dumps(expected, sort_keys=True).encode()).hexdigest()
    assert manifest == expected | {"sha256": own} and list(manifest)[:4] == ["format", "kind", "samples", "bytes"]
    assert manifest_hash(dict(reversed(manifest.items()))) == own
    assert manifest_hash(manifest | {"made": "otherwise"}) != own
    assert write_manifest(folder, "pictures", 2, {"made": "for tests"}) == manifest
    with pytest.raises(AssertionError, match=r"^settings must not be called \{'kind'\}$"):
        write_manifest(folder, "pictures", 2, {"kind": "x"})


# Refusals


@pytest.mark.parametrize(
    ("offset", "size", "fits"),
    [
        (100, 0, True),
        (0, 100, True),
        (40, 60, True),
        (-1, -1, True),
        (-1, 500, True),
        (40, 61, False),
        (101, 0, False),
        (0, -1, False),
        (-2, 0, False),
        (2**62, 2**62, False),
    ],
)
def test_files_lie_within_their_shard(offset: int, size: int, fits: bool) -> None:
    table = np.full((3, 2, 2), -1, np.int64)
    table[:2, 1, 1] = offset, size
    index = Index(["txt", "bin"], table, {}, "", "xxh3", None)
    if fits:
        index.check_places(100, "x.idx")
        return
    with says(
        f"x.idx is damaged: .bin of sample 1 lies at {offset} with {size} bytes, but the shard has 100; "
        "make the shards again"
    ):
        index.check_places(100, "x.idx")


def an_index(tensors: dict[str, Any] | None = None, **metadata: Any) -> bytes:
    """An index of one sample with a file `txt`, without its own hash."""
    whole = {name: np.zeros((1, 1), np.int64) for name in ("offset", "size", "checksum")} | (tensors or {})
    stored = {"endings": ["txt"], "sha256": "", "bytes": 0, "checksum": "xxh3"} | metadata
    stored = {key: value for key, value in stored.items() if value is not ...}
    return safetensors.numpy.save(whole, {"index": json.dumps(stored)})


def test_an_index_of_the_first_format_has_sums_of_words_and_no_size() -> None:
    index = parse_index(an_index(checksum=..., bytes=...), "x")
    assert (index.checksum, index.size, index.endings, len(index)) == ("words", None, ["txt"], 1)
    columns = parse_index(an_index({"column/a": np.array([4]), "note": np.zeros(3)}), "x").columns
    assert {name: values.tolist() for name, values in columns.items()} == {"a": [4]}


TWO = {name: np.zeros((1, 2), np.int64) for name in ("offset", "size", "checksum")}


@pytest.mark.parametrize(
    "data",
    [
        an_index(TWO, endings=["txt", "txt"]),
        an_index(TWO, endings="ab"),
        an_index(TWO, endings=["txt", 7]),
        an_index(TWO),
        an_index({name: values[0, :1] for name, values in TWO.items()}),
        an_index({"column/a": np.zeros(2, np.int64)}),
        an_index({"column/a": np.zeros((1, 1), np.int64)}),
        an_index({"column/a": np.zeros(1, np.int32)}),
        an_index({name: np.zeros((1, 1), np.uint8) for name in TWO}),
        an_index(sha256=None),
        an_index(checksum="md5"),
        an_index(bytes=-1),
        an_index(bytes=True),
        an_index(bytes="7"),
    ],
)
def test_an_index_whose_parts_do_not_fit_is_refused(data: bytes) -> None:
    with says("x.idx is damaged: its parts do not fit together; make the shards again"):
        parse_index(data, "x.idx")


def test_an_index_that_is_none_is_refused(folder: Path) -> None:
    data = (folder / "00000.idx").read_bytes()
    for broken in (b"", data[:-1], an_index(endings=...), an_index(sha256=...), data[:3], an_index()[:40]):
        with pytest.raises(UserError, match=r"^x\.idx cannot be read \(.{1,80}\); make the shards again$"):
            parse_index(broken, "x.idx")
    with says("x.idx is damaged: its hash is not the one stored in it; make the shards again"):
        parse_index(data.replace(b'"column/width"', b'"column/depth"'), "x.idx")
    with says("x.idx is damaged: its hash is not the one stored in it; make the shards again"):
        parse_index(an_index(own=7), "x.idx")


def test_a_shard_that_does_not_match_its_index_is_named(folder: Path) -> None:
    assert fault(folder, 0) is None
    file, size = folder / "00000.tar", (folder / "00000.tar").stat().st_size
    data = file.read_bytes()
    file.write_bytes(data[:-512])
    assert fault(folder, 0) == f"00000.tar has {size - 512} bytes, its index says {size}"
    file.write_bytes(b"?" + data[1:])
    assert fault(folder, 0) == "the hash of 00000.tar is not the one in its index"
    own = hashlib.sha256(data).hexdigest()
    file.write_bytes(data)
    (folder / "00000.idx").write_bytes(an_index(sha256=own, bytes=...))
    assert fault(folder, 0) is None, "an index of the first format has no size"
    (folder / "00000.idx").write_bytes(an_index({"offset": np.full((1, 1), 2**40)}, sha256=own, bytes=...))
    assert str(fault(folder, 0)).startswith("00000.idx is damaged: .txt of sample 0 lies at 1099511627776 with 0 bytes")
    (folder / "00000.idx").write_bytes(an_index(bytes=-1))
    assert fault(folder, 0) == "00000.idx is damaged: its parts do not fit together"


def changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> str:
    """A manifest after a change, with the message that it is refused with, from where the file's name ends."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest.pop("sha256")
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError) as caught:
        read_manifest(f"{folder}/")
    start = f"{folder}/{MANIFEST} "
    assert str(caught.value).startswith(start)
    return str(caught.value).removeprefix(start)


LATER = "; make the shards again"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("shards"), "is no manifest of shards; make it again"),
        (lambda m: m.update(format=3), "has format 3, this version reads 1 and 2; make it again"),
        (lambda m: m.update(format=True), "has format True, this version reads 1 and 2; make it again"),
        (lambda m: m.update(kind="x"), f"is damaged: kind is 'x', known are pictures, videos, cache{LATER}"),
        (lambda m: m["shards"].insert(1, 5), f"is damaged: shard 1 of its list is no entry{LATER}"),
        (lambda m: m["shards"][1].update(file=5), f"is damaged: shard 1 of its list names no file{LATER}"),
        (lambda m: m["shards"][1].update(file="00000.tar"), f"is damaged: it lists 00000.tar twice{LATER}"),
        (lambda m: m["shards"][1].update(samples=-1), f"is damaged: samples of 00001.tar is -1{LATER}"),
        (lambda m: m["shards"][1].update(bytes=None), f"is damaged: bytes of 00001.tar is None{LATER}"),
        (lambda m: m["shards"][0].update(sha256="0" * 63), f"is damaged: sha256 of 00000.tar is '{'0' * 63}'{LATER}"),
        (lambda m: m["shards"][0].update(index_sha256=5), f"is damaged: index_sha256 of 00000.tar is 5{LATER}"),
        (lambda m: m.update(samples=5), f"is damaged: samples is 5, its shards have 4{LATER}"),
        (lambda m: m.update(bytes=5), r"is damaged: bytes is 5, its shards have "),
        (
            lambda m: m.update(sha256="0" * 64),
            "is damaged: its hash is not the one stored in it (if you changed it on purpose, remove its last entry)"
            + LATER,
        ),
        (
            lambda m: m["shards"][1].update(file="../x.tar"),
            "lists the shard '../x.tar', but shards lie in the folder of their manifest under names that end in .tar; "
            "do not use these data if somebody else made them",
        ),
    ],
)
def test_a_manifest_is_refused_for_its_first_fault(
    folder: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    found = changed(folder, change)
    assert found == message or (message.endswith("have ") and found.startswith(message))


def test_a_manifest_that_cannot_be_read_says_why(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / MANIFEST
    file.write_text("[1")
    with pytest.raises(UserError, match=rf"^{file} is damaged \(.{{5,80}}\); make it again$"):
        read_manifest(str(folder))
    file.write_text("[1]")
    with says(f"{file} is no manifest of shards; make it again"):
        read_manifest(str(folder))
    for empty in ({"shards": []}, {"shards": [1], "samples": 0}):
        file.write_text(json.dumps({"format": 2} | empty))
        with says(f"{folder} holds no samples"):
            read_manifest(str(folder))
    file.unlink()
    with says(
        f"{folder} holds no {MANIFEST}; make shards with swd generate, swd import or swd encode, or check the path"
    ):
        read_manifest(str(folder))
    with pytest.raises(UserError, match=r"^nosuch://a: Protocol not known: nosuch; give a folder or a URL that fsspec"):
        read_manifest("nosuch://a")

    def fails(*args: object, **options: object) -> bytes:
        raise PermissionError(errno.EACCES, "not allowed")

    monkeypatch.setattr(LocalFileSystem, "open", fails)
    with says(f"file://{folder}/{MANIFEST} cannot be read ([Errno {errno.EACCES}] not allowed)"):
        read_manifest(f"file://{folder}")


@pytest.mark.parametrize("scheme", ["", "file://", "local://"])
def test_files_stay_in_their_folder(folder: Path, scheme: str) -> None:
    (folder / "x.tar").symlink_to(folder.parent / "elsewhere.tar")
    (folder / "y.tar").mkdir()
    check_inside(f"{scheme}{folder}", ["00000.tar", "missing.tar"])
    real = os.path.realpath(folder.parent / "elsewhere.tar")
    with says(f"{scheme}{folder}/x.tar is a link out of its folder, to {real}; put the file itself there"):
        check_inside(f"{scheme}{folder}/", ["00000.tar", "x.tar"])
    with says(f"{scheme}{folder}/y.tar is no plain file; make the shards again"):
        check_inside(f"{scheme}{folder}/", ["y.tar"])
    check_inside("https://somewhere/x", ["x.tar"])


# Reading


def test_memory_is_taken_in_parts_that_start_at_multiples_of_64() -> None:
    scratch = Scratch()
    first = scratch.take(100)
    first[:] = 1
    second = scratch.take(72)  # 128 + 72 is all of the 200 that were allocated
    second[:] = 2
    assert (len(first), len(second)) == (100, 72) and set(first) == {1}
    assert second.ctypes.data - first.ctypes.data == 128
    third = scratch.take(1)  # beyond them: new memory, and the old parts stay
    third[:] = 3
    assert set(first) == {1} and set(second) == {2} and not np.shares_memory(third, second)
    scratch.clear()
    assert scratch.take(5).ctypes.data == third.ctypes.data


def test_samples_of_shards_with_other_endings_and_columns(folder: Path) -> None:
    found = ShardSet(f"{folder}/")
    assert found.root == str(folder) and len(found) == 4 and found.files == ["00000.tar", "00001.tar"]
    assert found.endings == ["txt", "bin", "json"] and found.starts.tolist() == [0, 3, 4]
    assert {name: values.tolist() for name, values in found.columns.items()} == {
        "height": [-1, 5, -1, -1],
        "width": [7, -1, -1, 9],
    }
    assert [found.shard_of(i) for i in range(4)] == [0, 0, 0, 1]
    assert [found.name(i) for i in (0, 2, 3)] == [
        f"{folder}/00000.tar, sample 0", f"{folder}/00000.tar, sample 2", f"{folder}/00001.tar, sample 0"
    ]  # fmt: skip
    assert found.have("txt").tolist() == [True, False, True, False]
    assert found.have("json").tolist() == [False, True, False, True]
    assert found.have("png").tolist() == [False] * 4 and found.have("png").dtype == np.bool_
    assert [found.has(i, "json") for i in range(4)] == [False, True, False, True] and not found.has(0, "png")
    assert found.place(3, "json") == Place(1, 512, 3, xxh3(b"[1]"))
    with says(f"{folder}/00001.tar, sample 0 has no .txt", CorruptSample):
        found.place(3, "txt")
    with says(f"{folder}/00000.tar, sample 0 has no .png", CorruptSample):
        found.read(0, ["txt", "png"])
    scratch = Scratch()
    for memory in (None, scratch):
        for row, (_, files, _) in enumerate(SAMPLES):
            read = found.read(row, list(files), memory)
            assert {ending: data.tobytes() for ending, data in read.items()} == files
    assert found.read(3, ["json"])["json"].tobytes() == b"[1]"


def test_numbers_of_samples_are_checked_against_their_range(folder: Path) -> None:
    found = ShardSet(str(folder))
    found.check_column("width", -1, 10)
    message = "the index of {}, sample {} is damaged: width is {}, which is not from {} to {}; make the shards again"
    with says(message.format(f"{folder}/00000.tar", 1, -1, 0, 9)):
        found.check_column("width", 0, 10)
    with says(message.format(f"{folder}/00001.tar", 0, 9, -1, 8)):
        found.check_column("width", -1, 9)
    with says(f"the index of {folder} has no column depth; make the shards again"):
        found.check_column("depth", 0, 1)


def test_an_index_must_be_the_manifests(folder: Path) -> None:
    second = folder / "00001.idx"
    data, other = second.read_bytes(), (folder / "00000.idx").read_bytes()
    second.write_bytes(other)
    with says(f"{second} lists 3 samples, the manifest says 1"):
        ShardSet(str(folder))
    wrong = f"{second} is damaged, or of another shard: its hash is not the manifest's; make the shards again"
    own = hashlib.sha256((folder / "00001.tar").read_bytes()).hexdigest()
    for replaced in (an_index(sha256=own), an_index(sha256="0" * 64)):
        second.write_bytes(replaced)
        with says(wrong):
            ShardSet(str(folder))
    second.unlink()
    with pytest.raises(UserError, match=rf"^{second} cannot be read \(.{{5,80}}\); make the shards again$"):
        ShardSet(str(folder))
    second.write_bytes(data)
    assert len(ShardSet(str(folder))) == 4


def test_damage_is_named_by_sample_and_ending(folder: Path) -> None:
    found = ShardSet(str(folder))
    file = folder / "00000.tar"
    data = bytearray(file.read_bytes())
    data[1536 + 599] ^= 1
    file.write_bytes(data)
    with says(f"{folder}/00000.tar, sample 0: .bin is damaged", CorruptSample):
        found.read(0, ["txt", "bin"])
    os.truncate(file, 1536 + 599)
    fresh = ShardSet(str(folder))
    with says(f"{folder}/00000.tar, sample 0: .bin is cut off", CorruptSample):
        fresh.read(0, ["bin"])
    assert fresh.read(0, ["txt"])["txt"].tobytes() == b"one"
    with says(f"{folder}/00000.tar, sample 2: .txt is cut off", CorruptSample):
        fresh.read(2, ["txt"])
    file.unlink()
    with pytest.raises(CorruptSample, match=rf"^{folder}/00000\.tar cannot be read \(\[Errno 2\].*\)$"):
        ShardSet(str(folder)).read(2, ["txt"])


def test_no_more_is_read_than_asked_for(folder: Path) -> None:
    for found in (ShardSet(str(folder)), ShardSet(f"file://{folder}")):
        assert found._read_range(0, 512, 515).tobytes() == b"one"
        assert len(found._read_range(0, 512, 2**30)) == (folder / "00000.tar").stat().st_size - 512
    assert len(ShardSet(str(folder))._read_range(0, 2**40, 2**40 + 5)) == 0


def place(offset: int, size: int) -> Place:
    return Place(0, offset, size, 0)


@pytest.mark.parametrize(
    ("places", "runs"),
    [
        ({"a": place(512, 100), "b": place(1536, 5)}, [["a", "b"]]),
        ({"b": place(1536, 5), "a": place(512, 100)}, [["a", "b"]]),
        ({"a": place(0, 10), "b": place(10 + 1024, 1)}, [["a", "b"]]),
        ({"a": place(0, 10), "b": place(10 + 1025, 1)}, [["a"], ["b"]]),
        ({"a": place(0, 9), "b": place(9, 2), "c": place(2000, 1), "d": place(2001, 3)}, [["a", "b"], ["c", "d"]]),
        ({"a": place(0, 10), "b": place(9, 1)}, [["a"], ["b"]]),
        ({}, []),
    ],
)  # fmt: skip
def test_files_with_a_header_between_them_are_one_run(places: dict[str, Place], runs: list[list[str]]) -> None:
    assert shards._runs(places) == runs


def test_what_will_be_read_is_announced_to_the_system(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []

    def noted(descriptor: int, offset: int, length: int, advice: int) -> None:
        asked.append((offset, length, advice))
        raise OSError(errno.EINVAL, "not on this system")

    monkeypatch.setattr(os, "posix_fadvise", noted, raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_WILLNEED", 3, raising=False)
    ShardSet(str(folder)).expect(0, ["bin", "txt", "png"])
    assert asked == [(512, 1536 + 600 - 512, 3)]
    ShardSet(f"file://{folder}").expect(0, ["txt"])
    assert len(asked) == 1
    monkeypatch.delattr(os, "posix_fadvise")
    ShardSet(str(folder)).expect(0, ["txt"])


def test_a_remote_read_is_tried_again_after_each_pause(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("swd.data.shards.time.sleep", pauses.append)
    found, read = ShardSet(f"file://{folder}"), LocalFileSystem.cat_file
    fails: list[Exception] = [ConnectionError("lost"), ConnectionError("lost")]

    def unsteady(self: Any, *args: Any, **options: Any) -> bytes:
        if fails:
            raise fails.pop()
        return bytes(read(self, *args, **options))

    monkeypatch.setattr(LocalFileSystem, "cat_file", unsteady)
    assert found.read(0, ["txt"])["txt"].tobytes() == b"one" and pauses == [0.5, 2.0]
    fails.extend(ConnectionError("lost\nagain") for _ in range(3))
    with says(f"file://{folder}/00000.tar cannot be read (lost)", CorruptSample):
        found.read(0, ["txt"])
    assert pauses == [0.5, 2.0] * 2 and not fails
    fails.append(FileNotFoundError("no such thing"))
    with says(f"file://{folder}/00000.tar cannot be read (no such thing)", CorruptSample):
        found.read(0, ["txt"])
    assert len(pauses) == 4, "what is not there will not be there in a moment"


def test_open_files_are_few_kept_and_closed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    original = os.open
    monkeypatch.setattr(os, "open", lambda path, *flags: opened.append(str(path)) or original(path, *flags))
    found = ShardSet(str(folder))
    for row in (0, 1, 3, 2, 3):
        found.read(row, [found.endings[0] if found.has(row, "txt") else "json"])
    assert [path for path in opened if path.endswith(".tar")] == [f"{folder}/00000.tar", f"{folder}/00001.tar"]
    monkeypatch.setattr(shards, "OPEN_FILES", 1)
    found = ShardSet(str(folder))
    opened.clear()
    for row in (0, 3, 3, 0):
        found.read(row, ["txt" if row == 0 else "json"])
    assert len([path for path in opened if path.endswith(".tar")]) == 3
