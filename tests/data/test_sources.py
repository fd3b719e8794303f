"""Folders, lists and shards of other people: `swd import`, `data=images` and streams agree on it."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import socket
import struct
import tarfile
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from PIL import Image, PngImagePlugin
from shards import make_pictures
from tiny import composed

from swd.commands import cli, import_pictures
from swd.data import picture_files
from swd.data.decoders import PictureDecoder
from swd.data.indexed import IndexedShards
from swd.data.job import Job
from swd.data.picture_files import FolderDataset
from swd.data.picture_list import ENDINGS
from swd.data.shards import ShardSet, split_name
from swd.data.source_shards import shard_urls
from swd.data.sources import list_source
from swd.data.streamed import StreamedFiles, is_stream, read_shard
from swd.data.webdataset import ShardData
from swd.types import UserError


def picture(seed: int = 0, side: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8))


def encoded(seed: int = 0, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    picture(seed).save(stream, kind, **options)
    return stream.getvalue()


def fill(folder: Path, names: dict[str, str | bytes | None]) -> Path:
    """Files by name; None is a picture."""
    for number, (name, content) in enumerate(names.items()):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(
            encoded(number) if content is None else content.encode() if isinstance(content, str) else content
        )
    return folder


def tar(file: Path, members: dict[str, bytes | str | None], links: dict[str, str] | None = None) -> Path:
    """A tar of files (None: a picture) and of symbolic links."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as opened:
        for number, (name, content) in enumerate(members.items()):
            data = encoded(number) if content is None else content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            opened.addfile(info, io.BytesIO(data))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            opened.addfile(info)
    return file


def do(source: object, out: Path, *arguments: str) -> dict[str, Any]:
    """Import; gives the report, with the captions by file name under `captions`."""
    import_pictures.run(composed([f"source='{source}'", f"out={out}", "workers=1", *arguments], "import"))
    report: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    captions: dict[str, str] = {}
    for file in sorted(out.glob("*.tar")):
        with tarfile.open(file) as opened:
            held: dict[str, dict[str, bytes]] = {}
            for member in opened:
                key, ending = split_name(member.name)
                held.setdefault(key, {})[ending] = opened.extractfile(member).read()  # type: ignore[union-attr]
        captions |= {json.loads(files["json"])["file"]: files["txt"].decode() for files in held.values()}
    return report | {"captions": captions}


def kinds(report: dict[str, Any]) -> dict[str, str]:
    return {problem["file"]: problem["kind"] for problem in report["list"]}


def captions_of(folder: Path, **options: Any) -> dict[str, str]:
    """The captions that data=images trains on, by name."""
    data = FolderDataset(str(folder), 32, **options)
    return {file.relative_to(folder).as_posix(): caption for file, caption in data.pairs}


# Folders

HIDDEN = [
    ".ipynb_checkpoints/a-checkpoint",
    ".thumbnails/a",
    ".Trash-1000/files/a",
    "@eaDir/a",
    "__MACOSX/a",
    "deep/__MACOSX/a",
    "deep/.git/a",
    "._a",
    "deep/._x",
    "$RECYCLE.BIN/a",
    "lost+found/a",
    "System Volume Information/a",
    "#recycle/a",
]


def test_hidden_and_system_files_are_passed_over(tmp_path: Path) -> None:
    """Also where the source itself lies below a hidden folder."""
    folder = fill(tmp_path / ".data" / "set", {"a.png": None, "a.txt": "one", "deep/b.png": None, "deep/b.txt": "two"})
    for name in HIDDEN:
        fill(folder, {f"{name}.png": None, f"{name}.txt": "hidden"})
    fill(folder, {"Thumbs.db": b"x", "desktop.ini": b"x", ".DS_Store": b"x"})
    report = do(folder, tmp_path / "out")
    assert report["captions"] == {"a.png": "one", "deep/b.png": "two"} and report["rows"] == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing to warn of
        assert captions_of(folder) == report["captions"]
    members: dict[str, Any] = {"a.png": None, "a.txt": "one", "deep/b.png": None, "deep/b.txt": "two"}
    for name in HIDDEN:
        members |= {f"{name}.png": None, f"{name}.txt": "hidden"}
    report = do(tar(tmp_path / "t.tar", members), tmp_path / "tarred")
    assert report["captions"] == {"t.tar/a.png": "one", "t.tar/deep/b.png": "two"} and report["rows"] == 2
    assert report["ignored"] == {"hidden or system files": 2 * len(HIDDEN)}
    assert [sample["__key__"] for sample in read_shard(str(tmp_path / "t.tar"))] == ["a", "deep/b"]


def test_both_readers_of_a_folder_find_the_same_and_say_what_they_leave_out(tmp_path: Path) -> None:
    folder = fill(
        tmp_path / "d",
        {
            "0.png": None,
            "0.txt": "zero\u2028 one",
            "1.png": None,
            "1.TXT": "\ufeffone\r\n",
            "2.png": None,
            "2.caption": "two",
            "3.png": None,
            "3.txt": " \u200b\n",
            "4.png": None,
            "4.txt": b"B\xe4r",
            "5.png": None,
            "5.webp": encoded(5, "WEBP"),
            "5.txt": "five",
            "6.png": None,
            "6.txt": b"six\0",
        },
    )
    report = do(folder, tmp_path / "out")
    assert report["captions"] == {"0.png": "zero  one", "1.png": "one", "5.png": "five"}
    assert report["problems"] == {"no caption": 4, "duplicate name": 1}
    told = r"5 of 8 pictures are left out: 1 without a caption, 3 whose caption is empty or no text, 1 of a name that"
    with pytest.warns(UserWarning, match=told) as caught:
        assert captions_of(folder) == report["captions"]
    assert len(caught) == 1


def test_both_readers_of_the_published_list_find_the_same(tmp_path: Path) -> None:
    folder = fill(tmp_path / "d", {"0.png": None, "1.png": None})
    (folder / "metainfo.csv").write_text('idx, name ,text\n0,0.png,"a, b"\n1,1.png, \n2,0.png,again\n\n,,\n')
    report = do(folder, tmp_path / "out")
    assert report["captions"] == {"0.png": "a, b"} and report["problems"] == {"no caption": 1, "duplicate name": 1}
    with pytest.warns(UserWarning, match="2 of 3 pictures are left out: 1 without a caption, 1 of a name"):
        assert captions_of(folder) == {"0.png": "a, b"}
    for row, told in (
        ("2,1.png,a cat, black", "4 columns, the header has 3; put cells that hold a comma in quotes"),
        ('2,1.png,"open', "a quote is not closed"),
        ("2,none.png,x", "none.png is not in the folder"),
        ("2,,x", "no file name"),
        ("2,1.png,a\0b", "holds a NUL byte"),
    ):
        (folder / "metainfo.csv").write_text(f"idx,name,text\n0,0.png,fine\n{row}\n")
        with pytest.raises(UserError, match=f"metainfo.csv, line 3: .*{told}"):
            captions_of(folder)
        report = do(folder, tmp_path / f"out-{told[:5]}")
        assert report["captions"] == {"0.png": "fine"} and len(report["list"]) == 1
    (folder / "metainfo.csv").write_text("name,name,text\n0,0.png,fine\n")
    for read in (captions_of, lambda f: do(f, tmp_path / "never")):
        with pytest.raises(UserError, match="has more than one column name"):
            read(folder)


def test_a_list_of_hugging_face_is_pointed_to(tmp_path: Path) -> None:
    folder = fill(tmp_path / "d", {"0.png": None, "metadata.jsonl": '{"file_name": "0.png", "text": "a star"}\n'})
    with pytest.raises(UserError, match=rf"give source={folder}/metadata\.jsonl"):
        list_source(str(folder))
    with pytest.raises(UserError, match=rf"swd import source={folder}/metadata\.jsonl"):
        captions_of(folder)
    assert do(folder / "metadata.jsonl", tmp_path / "out")["captions"] == {"0.png": "a star"}


def test_what_is_no_file_neither_blocks_nor_ends_an_import(tmp_path: Path) -> None:
    folder = fill(tmp_path / "d", {"0.png": None, "0.txt": "zero"})
    os.mkfifo(folder / "1.png")
    (folder / "2.png").symlink_to("nothing")
    (folder / "3.png").mkdir()
    fill(folder, {"1.txt": "x", "2.txt": "x", "3.png/4.png": None})
    os.mkfifo(folder / "5.tar")
    (folder / "6.png").symlink_to("6.png")
    with socket.socket(socket.AF_UNIX) as bound, contextlib.chdir(folder):
        bound.bind("7.png")
        os.mkfifo("3.png/4.txt")
        report = do(folder, tmp_path / "out")
        with pytest.warns(UserWarning, match="5 of 6 pictures are left out"):
            assert captions_of(folder) == {"0.png": "zero"}
    assert report["captions"] == {"0.png": "zero"}
    assert kinds(report) == {f"{name}.png": "unreadable" for name in ("1", "2", "6", "7")} | {
        "3.png/4.png": "unreadable"
    }


def test_of_several_columns_of_captions_the_first_with_a_value_counts(tmp_path: Path) -> None:
    folder = fill(tmp_path / "d", {f"{i}.png": None for i in range(4)})
    records = [
        {"prompt": "p", "text": "t", "caption": None},
        {"text": "t", "caption": "c"},
        {"caption": 5, "text": "t"},
    ]
    lines = [json.dumps({"file": f"{i}.png", **record}) for i, record in enumerate([*records, {"prompt": "p"}])]
    (folder / "list.jsonl").write_text("\n".join(lines))
    report = do(folder / "list.jsonl", tmp_path / "out")
    assert report["captions"] == {"0.png": "t", "1.png": "c", "3.png": "p"}
    assert [problem["reason"] for problem in report["list"]] == [
        "no caption in list.jsonl, line 3: it is the number 5, not text"
    ]


def test_a_list_may_name_what_is_no_file(tmp_path: Path) -> None:
    folder = fill(tmp_path / "d", {"0.png": None})
    os.mkfifo(folder / "1.png")
    (folder / "2.png").mkdir()
    names = [
        "0.png",
        "1.png",
        "2.png",
        "3.png",
        "n" * 300 + ".png",
        "0.png/x.png",
        "s\\u0000.png",
        "\\ud800.png",
        "\\ud800/x.png",
        " ",
    ]
    lines = [f'{{"file": "{name}", "text": "t", "index": 1{"0" * i}}}' for i, name in enumerate(names)]
    (folder / "list.jsonl").write_text("\n".join(lines))
    report = do(folder / "list.jsonl", tmp_path / "out")
    assert report["captions"] == {"0.png": "t"} and len(report["list"]) == 9
    assert report["problems"] == {"unreadable": 4, "bad line": 4, "missing": 1}


# Outside


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    return fill(tmp_path / "elsewhere", {"s.png": None, "s.txt": "secret", "t.tar": b""})


def test_links_and_names_that_leave_the_folder_are_refused(tmp_path: Path, secret: Path) -> None:
    folder = fill(tmp_path / "d", {"0.png": None, "0.txt": "zero", "1.png": None, "2.txt": "two"})
    (folder / "1.txt").symlink_to(secret / "s.txt")
    (folder / "2.png").symlink_to("../elsewhere/s.png")
    (folder / "3").symlink_to(secret)
    (folder / "4.png").symlink_to("0.png")  # inside
    fill(folder, {"4.txt": "four"})
    report = do(folder, tmp_path / "out")
    assert report["captions"] == {"0.png": "zero", "4.png": "four"}
    assert kinds(report) == {"1.png": "outside", "2.png": "outside", "3/": "outside"}
    assert all("outside=true" in problem["reason"] for problem in report["list"])
    with pytest.warns(UserWarning, match="3 of 5 pictures are left out: 3 outside.*data.dataset.outside=true"):
        assert captions_of(folder) == report["captions"]
    taken = do(folder, tmp_path / "all", "outside=true")["captions"]
    assert taken == report["captions"] | {"1.png": "secret", "2.png": "two", "3/s.png": "secret"}
    assert captions_of(folder, outside=True) == taken
    with pytest.raises(UserError, match=r"3/: outside \(a link to a folder outside"):
        do(folder, tmp_path / "never", "strict=true")


@pytest.mark.parametrize(
    "name", ["../elsewhere/s.png", "{absolute}", "in/../../elsewhere/s.png", "linked/s.png", "l.png"]
)
@pytest.mark.parametrize("kind", ["list.csv", "list.jsonl", "metainfo.csv"])
def test_lists_that_name_other_folders(tmp_path: Path, secret: Path, name: str, kind: str) -> None:
    folder = fill(tmp_path / "d", {"0.png": None, "in/1.png": None})
    (folder / "linked").symlink_to(secret)
    (folder / "l.png").symlink_to(secret / "s.png")
    name = name.format(absolute=secret / "s.png")
    inside, rows = str(folder / "0.png"), [("0", "in/1.png"), ("1", name)]
    rows.append(("2", inside))  # an absolute name inside
    if kind.endswith("csv"):
        text = "\n".join(["id,file,text", *(f"{number},{file},t{number}" for number, file in rows)])
    else:
        text = "\n".join(json.dumps({"id": n, "file": file, "text": f"t{n}"}) for n, file in rows)
    (folder / kind).write_text(text)
    source = folder if kind == "metainfo.csv" else folder / kind
    report = do(source, tmp_path / "out")
    assert report["captions"] == {"in/1.png": "t0", inside: "t2"} and kinds(report) == {name: "outside"}
    assert do(source, tmp_path / "all", "outside=true")["captions"] == report["captions"] | {name: "t1"}
    if kind == "metainfo.csv":
        with pytest.warns(UserWarning, match="1 of 3 pictures are left out: 1 outside"):
            assert len(FolderDataset(str(folder), 32)) == 2
        assert len(FolderDataset(str(folder), 32, outside=True)) == 3


def test_a_list_that_is_a_link_to_another_folder_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "passwd").write_text("root:x:0:0\n")
    folder = fill(tmp_path / "d", {"0.png": None})
    (folder / "metainfo.csv").symlink_to(tmp_path / "passwd")
    for read in (lambda: list_source(str(folder)), lambda: captions_of(folder)):
        with pytest.raises(UserError, match=r"is a link to a file outside") as caught:
            read()
        assert "x:0" not in str(caught.value)


def test_members_of_shards_that_are_links_or_leave_it(tmp_path: Path, secret: Path) -> None:
    members = {"0.png": None, "0.txt": "zero", "../1.png": None, "../1.txt": "x", "/2.png": None, "a/../../3.png": None}
    file = tar(tmp_path / "d" / "t.tar", members, {"4.png": str(secret / "s.png"), "0.json": "/etc/passwd"})
    (tmp_path / "d" / "u.tar").symlink_to(secret / "t.tar")
    report = do(tmp_path / "d", tmp_path / "out")
    assert report["captions"] == {"t.tar/0.png": "zero"}
    assert kinds(report) == {
        f"t.tar/{name}": "outside" for name in ("../1.png", "../1.txt", "/2.png", "a/../../3.png")
    } | {
        "t.tar/4.png": "no file",
        "t.tar/0.json": "no file",
        "u.tar": "outside",
    }
    assert file.exists() and not (tmp_path / "1.png").exists()


# Shards


def test_pictures_whose_name_holds_a_dot_are_told(tmp_path: Path) -> None:
    file = tar(
        tmp_path / "t.tar",
        {"a.v2.jpg": encoded(0, "JPEG"), "a.v2.txt": "x", "b.png": None, "b.mask.png": None, "b.txt": "two"},
    )
    report = do(file, tmp_path / "out")
    assert report["captions"] == {"t.tar/b.png": "two"} and report["rows"] == 2
    assert kinds(report) == {"t.tar/a.v2.jpg": "dotted name"} and "holds a dot" in report["list"][0]["reason"]
    assert report["ignored"] == {".v2.txt": 1, ".mask.png": 1}
    with pytest.raises(UserError, match=r"t\.tar/a\.v2\.jpg: dotted name"):
        do(file, tmp_path / "never", "strict=true")
    with pytest.raises(UserError, match=r"lists no captioned picture; first of 1 problems: u.tar/x.1.png: dotted name"):
        list_source(str(tar(tmp_path / "u.tar", {"x.1.png": None, "x.1.txt": "x"})))


CAPTIONS: list[tuple[dict[str, Any], str | None]] = [
    ({"json": {"prompt": "p"}}, "p"),
    ({"json": {"prompt": "p", "text": "t"}}, "t"),
    ({"json": {"prompt": "p", "text": "t", "caption": "c"}}, "c"),
    ({"json": {"Caption": "c\u2029d"}}, "c d"),
    ({"json": {"caption": None, "text": "t"}}, "t"),
    ({"json": {"caption": 5, "text": "t"}}, None),
    ({"json": {"caption": ["a"]}}, None),
    ({"json": {"caption": float("nan")}}, None),
    ({"json": {"text": " \n"}}, None),
    ({"json": [1]}, None),
    ({"json": b"{"}, None),
    ({"json": b"[" * 50_000}, None),
    ({"txt": b" t\r\n"}, "t"),
    ({"txt": b"B\xe4r"}, None),
    ({"txt": b"\n \t", "json": {"text": "t"}}, "t"),
    ({"txt": b"t", "json": {"caption": "c"}}, "t"),
    ({"caption": b"c"}, "c"),
    ({"txt": b"t\0"}, None),
    ({}, None),
]


@pytest.mark.parametrize(("files", "expected"), CAPTIONS)
def test_every_reader_finds_the_same_caption(tmp_path: Path, files: dict[str, Any], expected: str | None) -> None:
    contents = {name: v if isinstance(v, bytes) else json.dumps(v).encode() for name, v in files.items()}
    file = tar(
        tmp_path / "t.tar",
        {"x.png": None, **{f"x.{name}": data for name, data in contents.items()}, "y.png": None, "y.txt": "y"},
    )
    report = do(file, tmp_path / "out")
    assert report["captions"].get("t.tar/x.png") == expected
    assert kinds(report) == ({} if expected else {"t.tar/x.png": "no caption"})
    decoder = PictureDecoder((32, 32))
    raw: Any = next(iter(read_shard(str(file))))
    job = Job(tmp_path / "own", "pictures", 1, 1, {})
    job.claim()
    assert job.run(lambda rows, done: iter([("x", {"png": encoded(0), **contents}, {})]))
    own = IndexedShards(ShardSet(str(tmp_path / "own")), decoder)
    for read in (
        lambda: decoder.decode(StreamedFiles(raw), 0, 0).prompt,
        lambda: own.read(0, 0).prompt,
        lambda: own.caption(0),
    ):
        if expected is None:
            with pytest.raises(Exception, match="no caption"):
                read()
        else:
            assert read() == expected


def test_what_a_folder_of_pictures_holds_beside_them_is_counted(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    fill(folder, {"a.png": None, "a.txt": "a", "b.HEIC": b"x", "b.txt": "b", "c.jxl": b"x", "sub/d.heic": b"x"})
    fill(folder, {"README.md": "x", "noend": b"x", "c.caption": "c", ".hidden.heic": b"x"})
    report = do(folder, tmp_path / "out")
    assert report["captions"] == {"a.png": "a"}
    assert report["ignored"] == {
        ".heic": 2,
        ".jxl": 1,
        ".md": 1,
        ".caption": 1,
        "without an ending": 1,
        ".txt (without a picture)": 1,
    }


def test_shards_are_found_at_any_depth_and_the_others_counted(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    for name in ("a.tar", "sub/b.TAR", "sub/deep/c.tar", ".hidden/d.tar"):
        tar(folder / name, {f"{Path(name).stem}.png": None, f"{Path(name).stem}.txt": name})
    packed = gzip.compress((folder / "a.tar").read_bytes())
    fill(folder, {"e.tar.gz": packed, "sub/f.tgz": packed, "g.zip": b"PK", "alone.png": None})
    report = do(folder, tmp_path / "out")
    assert report["captions"] == {f"{n}/{n[-5]}.png": n for n in ("a.tar", "sub/b.TAR", "sub/deep/c.tar")}
    assert report["ignored"] == {
        ".tar.gz (unpack them first)": 1,
        ".tgz (unpack them first)": 1,
        ".zip (unpack them first)": 1,
        ".png (without a caption, beside shards)": 1,
    }
    fill(folder, {"alone.txt": "x"})
    report = do(folder, tmp_path / "mixed")
    assert report["captions"] == {"alone.png": "x"} and sum(report["ignored"].values()) == 6
    again = do(folder, folder / "shards")  # a result that lies in its source is no part of it
    assert do(folder, folder / "shards") == again


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.TAR", "x.tar"])
def test_streams_read_compressed_shards_and_import_says_how(tmp_path: Path, name: str) -> None:
    make_pictures(tmp_path / "shards", 4)
    data = (tmp_path / "shards" / "00000.tar").read_bytes()
    file = fill(tmp_path, {name: data if name == "x.TAR" else gzip.compress(data)}) / name
    assert is_stream(str(file)) and is_stream(f"https://host/{name}?x=1")
    assert len(list(read_shard(str(file)))) == 4
    assert ShardData(str(file), size=64, batch_size=2).stream is not None
    if name == "x.TAR":
        assert len(list_source(str(file)).rows) == 4
        return
    with pytest.raises(UserError, match=r"compressed.*unpack it first"):
        list_source(str(file))


def test_patterns_that_name_too_much_or_nothing(tmp_path: Path) -> None:
    for pattern, told in (
        ("a/{0..999999999}.tar", "more than 1,000,000 shards"),
        ("{0..99999999999999999999999}.tar", "more than 1,000,000 shards"),
        ("{0..9999}{0..9999}.tar", "more than 1,000,000 shards"),
        ("{a,b}" * 40 + ".tar", "more than 1,000,000 shards"),
        ("{0..", "braces cannot be read|does not exist"),
    ):
        with pytest.raises(UserError, match=told):
            list_source(pattern)
        if "more" in told:
            with pytest.raises(UserError, match=told):
                ShardData(f"pipe:cat {pattern}", size=64)
    assert shard_urls("a/{00..02}.tar::{x,y{1,2}}.tar", "source")[2:] == ["a/02.tar", "x.tar", "y1.tar", "y2.tar"]
    fill(
        tmp_path,
        {"photos [1]{2}/0.png": None, "photos [1]{2}/0.txt": "x", "l[1].csv": "file,text\nphotos [1]{2}/0.png,x\n"},
    )
    assert (
        len(list_source(str(tmp_path / "photos [1]{2}")).rows) == 1
        and len(list_source(str(tmp_path / "l[1].csv")).rows) == 1
    )


def test_headers_of_shards_that_lie(tmp_path: Path) -> None:
    """Sizes beyond the file or below zero, and numbers that are none, neither loop nor end an import."""
    good = tar(tmp_path / "d" / "a.tar", {"0.png": None, "0.txt": "zero"})
    for number, size in enumerate((b"\xff" * 12, b"77777777777\0", b"nonsense\0\0\0\0")):
        header = bytearray(tarfile.TarInfo("1.png").tobuf(tarfile.USTAR_FORMAT))
        header[124:136] = size
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        (tmp_path / "d" / f"b{number}.tar").write_bytes(bytes(header) + good.read_bytes())
    pax = tarfile.TarInfo("2.png")
    pax.size = 0
    pax.pax_headers = {"size": "-512", "GNU.sparse.major": "x", "path": "2\0.png"}
    (tmp_path / "d" / "c.tar").write_bytes(pax.tobuf(tarfile.PAX_FORMAT) + bytes(10240))
    report = do(tmp_path / "d", tmp_path / "out")
    assert "a.tar/0.png" in report["captions"] and report["problems"]["damaged shard"] >= 3


# Pictures


@pytest.mark.parametrize("kind", sorted({*picture_files.STORED_AS} - {"AVIF"}))
def test_every_format_that_a_list_can_name_is_stored_as_readers_know_it(tmp_path: Path, kind: str) -> None:
    options = {"save_all": True, "append_images": [picture(1)]} if kind == "MPO" else {}
    folder = fill(tmp_path / "d", {"0a1b2c": encoded(0, kind, **options), "list.csv": "file,text\n0a1b2c,x\n"})
    assert do(folder / "list.csv", tmp_path / "out")["imported"] == 1
    shards = ShardSet(str(tmp_path / "out"))
    assert set(shards.endings) - {"txt", "json"} <= set(ENDINGS)
    assert IndexedShards(shards, PictureDecoder((32, 32))).read(0, 0).pixels.shape == (3, 32, 32)


def test_every_format_that_pillow_opens_has_an_ending() -> None:
    assert set(picture_files.FORMATS) <= set(picture_files.STORED_AS) and set(picture_files.STORED_AS.values()) <= set(
        ENDINGS.values()
    )


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP", "many", "tEXt", "bomb"])
def test_pngs_with_large_texts_are_pictures(tmp_path: Path, kind: str) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("kept", "x", zip=True)
    if kind == "many":
        for number in range(100):
            info.add_text(f"w{number}", "x" * 1_000_000, zip=True)
    elif kind == "tEXt":
        info.add_text("w", "x" * 70_000_000)
    elif kind in ("zTXt", "iTXt"):
        (info.add_text if kind == "zTXt" else info.add_itxt)("w", "x" * 3_000_000, zip=True)
    data = encoded(0, pnginfo=info)
    if kind in ("iCCP", "bomb"):
        packed = zlib.compress(bytes(2_000_000 if kind == "iCCP" else 300_000_000), 9)
        name = b"iCCP" if kind == "iCCP" else b"zTXt"
        data = data[:33] + chunk(name, b"w\0\0" + packed) + data[33:]
    folder = fill(tmp_path / "d", {"0.png": data, "0.txt": "x"})
    assert do(folder, tmp_path / "out")["imported"] == 1
    assert np.array_equal(np.asarray(picture_files.decode(folder / "0.png")), np.asarray(picture(0)))
    stored = ShardSet(str(tmp_path / "out"))
    assert stored.read(0, ["png"])["png"].tobytes() == data
    with picture_files.open_picture(data) as opened:
        assert opened.text.get("kept") == "x"  # type: ignore[attr-defined]


def bomb(kind: str, side: int) -> bytes:
    """A small file of `side` x `side` pixels."""
    if kind in ("JPEG", "WEBP"):
        data = bytearray(
            encoded(0, kind, **({"save_all": True, "append_images": [picture(1)]} if kind == "WEBP" else {}))
        )
        side = min(side, 16_383 if kind == "WEBP" else 65_500)
        if kind == "WEBP":  # the canvas of an animation
            data[24:30] = (side - 1).to_bytes(3, "little") * 2
        else:
            at = data.index(b"\xff\xc0") + 5
            data[at : at + 4] = struct.pack(">HH", side, side)
        return bytes(data)
    if kind == "PNG":
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        return (
            b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", header)
            + chunk(b"IDAT", zlib.compress(bytes(9)))
            + chunk(b"IEND", b"")
        )
    stream = io.BytesIO()
    small = Image.new("1", (8, 8))
    small.save(stream, kind, **({"save_all": True, "append_images": [small] * 3} if kind in ("GIF", "TIFF") else {}))
    data = bytearray(stream.getvalue())
    if kind == "GIF":
        data[6:10] = struct.pack("<HH", side, side)
    elif kind == "BMP":
        data[18:26] = struct.pack("<ii", side, side)
    else:
        for tag in (256, 257):  # width and height, of 16 or of 32 bits
            at = next(i for t in (3, 4) if (i := data.find(struct.pack("<HHI", tag, t, 1))) > 0)
            data[at : at + 12] = struct.pack("<HHII", tag, 4, 1, side)
    return bytes(data)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF", "JPEG", "WEBP"])
@pytest.mark.parametrize("side", [8_300, 13_000, 60_000])
def test_picture_bombs_are_refused_before_they_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, side: int
) -> None:
    ending = picture_files.STORED_AS[kind]
    folder = fill(tmp_path / "d", {f"0.{ending}": bomb(kind, side), "0.txt": "x", "1.png": None, "1.txt": "y"})
    load = Image.Image.load
    largest: list[int] = []

    def counted(self: Image.Image) -> Any:
        largest.append(self.width * self.height)
        return load(self)

    for base in (
        Image.Image,
        *{type(picture_files.open_picture(encoded(0, kind))) for kind in ("PNG", "GIF", "BMP", "TIFF", "JPEG", "WEBP")},
    ):
        monkeypatch.setattr(base, "load", counted)
    report = do(folder, tmp_path / "out")
    assert kinds(report) == {f"0.{ending}": "unreadable"} and max(largest, default=0) < 10_000
    assert "beyond max_pixels=67,108,864" in report["list"][0]["reason"]
    with pytest.raises(UserError, match=r"cannot be read as a picture .*beyond max_pixels"):
        FolderDataset(str(folder), 32)[0]
    files = {ending: bomb(kind, side), "txt": b"x", "__url__": "u", "__key__": "k"}
    with pytest.raises(Exception, match="beyond max_pixels"):
        PictureDecoder((32, 32)).decode(StreamedFiles(files), 0, 0)


def test_the_limit_on_pixels_is_the_user_s(tmp_path: Path) -> None:
    folder = fill(tmp_path / "d", {"0.png": None, "0.txt": "x"})
    assert do(folder, tmp_path / "out", "max_pixels=1024")["imported"] == 1
    with pytest.raises(UserError, match="none of 1 rows"):
        do(folder, tmp_path / "less", "max_pixels=1023")
    with pytest.raises(UserError, match=r"beyond max_pixels=1,023"):
        FolderDataset(str(folder), 32, max_pixels=1023)[0]
    with pytest.raises(Exception, match=r"32x32 pixels, beyond max_pixels=1,023"):
        IndexedShards(ShardSet(str(tmp_path / "out")), PictureDecoder((32, 32), max_pixels=1023)).read(0, 0)
    for value in (0, -1, 10**9):
        with pytest.raises(UserError, match=f"max_pixels={value}; use 1 to 178,956,970"):
            do(folder, tmp_path / "never", f"max_pixels={value}")


def test_files_that_are_too_large_for_a_picture_or_a_text_are_not_read(tmp_path: Path) -> None:
    folder = fill(
        tmp_path / "d", {"0.png": None, "0.txt": "x", "1.png": None, "1.txt": "y", "2.png": b"", "2.txt": "z"}
    )
    os.truncate(folder / "1.txt", 2**40)
    os.truncate(folder / "2.png", 2**41)
    report = do(folder, tmp_path / "out")
    assert report["captions"] == {"0.png": "x"} and report["problems"] == {"unreadable": 2}
    assert all("bytes, more than" in problem["reason"] for problem in report["list"])


@pytest.mark.parametrize(
    "error", [MemoryError(), RecursionError("deep"), ZeroDivisionError("x"), SyntaxError("odd"), struct.error("x")]
)
def test_whatever_a_decoder_raises_lands_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    folder = fill(tmp_path / "d", {"0.png": None, "0.txt": "x", "1.png": None, "1.txt": "y"})
    decode, bad = import_pictures.decode, encoded(1)
    bad = (folder / "1.png").read_bytes()

    def failing(file: Any, limit: int) -> Any:
        if file.getvalue() == bad:
            raise error
        return decode(file, limit)

    with monkeypatch.context() as patched:
        patched.setattr(import_pictures, "decode", failing)
        report = do(folder, tmp_path / "out")
    assert report["captions"] == {"0.png": "x"} and kinds(report) == {"1.png": "unreadable"}


def test_a_file_that_vanishes_while_others_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fill(
        tmp_path / "d", {"0.png": None, "0.txt": "x", "1.png": None, "1.txt": "y", "2.png": None, "2.txt": "z"}
    )
    listed = import_pictures.list_source

    def then_vanish(*arguments: Any) -> Any:
        found = listed(*arguments)
        (folder / "0.png").unlink()
        (folder / "1.txt").unlink()
        return found

    monkeypatch.setattr(import_pictures, "list_source", then_vanish)
    report = do(folder, tmp_path / "out")
    assert report["captions"] == {"2.png": "z"} and report["problems"] == {"missing": 2}


def test_names_that_are_no_unicode_are_written_to_the_report(tmp_path: Path) -> None:
    folder = fill(tmp_path / "d", {"0.png": None, "0.txt": "x"})
    odd = os.fsencode(folder) + b"/\xff"
    for name, data in (
        (odd + b".png", b"none"),
        (odd + b".txt", b"t"),
        (odd + b"2.png", encoded(3)),
        (odd + b"2.txt", b"t"),
    ):
        with open(name, "wb") as stream:
            stream.write(data)
    report = do(folder, tmp_path / "out")
    assert report["captions"] == {"0.png": "x", "?2.png": "t"} and kinds(report) == {"?.png": "unreadable"}


# Wrong values


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["workers=100000"], "workers=100000; use at most 256: threads beyond"),
        (["shard_size=100000000000"], "shard_size=100000000000; use at most 1000000: a shard that is stopped"),
        (["multiple=100000"], "multiple=100000; use at most 8192"),
        (["size=9000"], "size=9000: no picture of at most max_pixels=67108864 covers it"),
        (["size=64", "buckets=[1:1]", "multiple=128"], "multiple=128 is more than size=64"),
        (["size=64", "buckets=[1:1000]", "multiple=8"], "more than 64 times the other"),
        (["size=64", f"buckets=['1:{'9' * 400}']", "multiple=8"], "give WIDTH:HEIGHT"),
        (["workers=.nan"], "workers=.* is not valid; expected an integer"),
        (["size=.inf"], "size=.* is not valid; expected an integer"),
        (["max_pixels=1e3"], "max_pixels=1000.0 is not valid"),
        (["source=''"], "source is empty; give source="),
        (["out=' '"], "out=' ' is no name of a file"),
        (["outside=1"], "outside=1 is not valid; expected true or false"),
        (["source='~nobody-here/x'"], "does not exist"),
        ([f"source={'n' * 300}"], "does not exist"),
    ],
)
def test_senseless_values_are_refused_with_their_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], told: str
) -> None:
    monkeypatch.chdir(fill(tmp_path, {"d/0.png": None, "d/0.txt": "x"}))
    with pytest.raises(UserError, match=told) as caught:
        import_pictures.run(composed(["source=d", "out=out", *arguments], "import"))
    assert "\n" not in str(caught.value) and not Path("out").exists()


def test_listing_says_what_it_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = fill(tmp_path / "d", {"0.png": None, "0.txt": "x"})
    fill(tmp_path, {"list.csv": "file,text\nd/0.png,x\n"})
    tar(tmp_path / "t" / "a.tar", {"0.png": None, "0.txt": "x"})
    for source, told in (
        (folder, "list the files below "),
        (tmp_path / "list.csv", "list the pictures of "),
        (tmp_path / "t", "list the samples of "),
    ):
        list_source(str(source))
        lines = capsys.readouterr().err.splitlines()
        assert any(line.startswith(told) for line in lines) and lines[-1].startswith("done: 1 ")


# Random overrides and sources

VALUES: dict[str, list[str]] = {
    "source": [
        "d",
        "d/list.csv",
        "d/list.jsonl",
        "d/t.tar",
        "'d/{0..3}.tar'",
        "'d/*.tar'",
        "d/0.png",
        "none",
        "''",
        "/dev/zero",
    ],
    "out": ["out", "''", "d/0.png", "d", "/proc/x", "'out/../out'", "null", "[a]", "d/fifo"],
    "size": ["null", "8", "0", "-1", "16.5", "x", "1e9", "99999999999999999999", ".nan", "[8]"],
    "buckets": ["null", "[1:1]", "[1:1,2:1]", "[]", "[0:1]", "['nan:1']", "[1:1,1:1]", "1:1", "[1]", "['1:1e9']"],
    "multiple": ["8", "0", "1", "100000", "-8", "x", "1.5", "null"],
    "resize": ["true", "false", "1", "null", "x"],
    "format": ["png", "jpg", "webp", "gif", "null", "1"],
    "strict": ["true", "false", "null"],
    "shard_size": ["1", "2", "1000", "0", "-1", "99999999999999999999", "1e3", "null"],
    "limit": ["null", "1", "3", "0", "-5", "99999999999999999999999", ".inf"],
    "workers": ["1", "4", "0", "100000", "-1", "2.5", ".nan", "null"],
    "outside": ["true", "false", "null", "2"],
    "max_pixels": ["67108864", "1", "0", "-1", "99999999999", ".nan", "1024", "null"],
}


def hostile(folder: Path, rng: np.random.Generator) -> None:
    """A folder, two lists and a tar, with random damage."""
    names = [f"{i}{ending}" for i, ending in enumerate([".png", ".jpg", ".gif", ".webp", ".tif", ".bmp", ".txt", ""])]
    kinds = ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PNG", "JPEG"]
    contents: dict[str, Any] = {}
    for name, kind in zip(names, kinds, strict=True):
        data = bytearray(encoded(0, kind))
        for _ in range(rng.integers(0, 4)):
            data[rng.integers(0, len(data))] = rng.integers(0, 256)
        contents[name] = bytes(data[: rng.integers(1, 2 * len(data))])
        if rng.random() < 0.8:
            contents[Path(name).stem + ".txt"] = (
                bytes(rng.integers(0, 256, 5, np.uint8)) if rng.random() < 0.3 else b"text"
            )
    quotes = ['"', "", "", ",", "\0", "\u2028", "\n", "\xff"]
    noise = lambda: "".join(rng.choice(quotes, 2))  # noqa: E731
    contents["list.csv"] = "file,text\n" + "".join(f"{name}{noise()},t{noise()}\n" for name in names)
    contents["list.jsonl"] = "".join(f'{{"file": "{name}{noise()}", "text": "t"}}\n' for name in names)
    fill(folder, contents)
    tar(folder / "t.tar", {name: contents[name] for name in contents if rng.random() < 0.8})
    data = bytearray((folder / "t.tar").read_bytes())
    for _ in range(rng.integers(0, 6)):
        data[rng.integers(0, len(data))] = rng.integers(0, 256)
    (folder / "t.tar").write_bytes(data)
    if rng.random() < 0.3:
        (folder / "metainfo.csv").write_bytes((folder / "list.csv").read_bytes())
    os.mkfifo(folder / "fifo")


def fuzz(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rounds: range) -> list[int]:
    """Run the command with random overrides; gives the exit statuses."""
    monkeypatch.delenv("SWD_COMMAND", raising=False)
    statuses = []
    for number in rounds:
        rng = np.random.default_rng(number)
        here = folder / str(number)
        hostile(here / "d", rng)
        monkeypatch.chdir(here)
        chosen = rng.choice(list(VALUES)[2:], rng.integers(0, 4), replace=False)
        keys = ["source", "out", *chosen]
        likely = [0 if rng.random() < 0.85 else rng.integers(0, len(VALUES[key])) for key in keys]
        arguments = [f"{key}={VALUES[key][place]}" for key, place in zip(keys, likely, strict=True)]
        if rng.random() < 0.6:
            arguments[0] = f"source={VALUES['source'][rng.integers(0, 4)]}"
        GlobalHydra.instance().clear()
        monkeypatch.setattr("sys.argv", ["swd", "import", *arguments])
        status: Any = 0
        try:
            cli.main()
        except SystemExit as stopped:
            status = stopped.code
        except BaseException as error:
            raise AssertionError(f"round {number}: {arguments}") from error
        told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert (status, len(told)) in ((0, 0), (2, 1)), (number, arguments, status, told)
        statuses.append(status)
    HydraConfig.instance().cfg = None
    return statuses


def test_random_overrides_end_in_an_import_or_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert set(fuzz(tmp_path, monkeypatch, capsys, range(10))) == {0, 2}


@pytest.mark.slow
def test_many_random_overrides_end_in_an_import_or_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    statuses = fuzz(tmp_path, monkeypatch, capsys, range(100, 300))
    assert min(statuses.count(0), statuses.count(2)) > 40
