"""`swd import`: every layout, every kind of picture, and a report that is whole however often it was stopped."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from PIL import Image
from tiny import composed

from swd.commands import cli, import_pictures
from swd.commands.import_pictures import run
from swd.data import shards, sources
from swd.data.buckets import bucket_sizes, nearest_bucket
from swd.data.picture_files import PICTURES, FolderDataset, decode, read_picture
from swd.data.shards import ShardSet
from swd.data.webdataset import ShardData
from swd.io.files import file_hash
from swd.types import UserError


def picture(width: int = 48, height: int = 48, seed: int = 0) -> Image.Image:
    """Noise on a coarse grid."""
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(noise.repeat(8, 0).repeat(8, 1)[:height, :width])


def published(folder: Path, names: list[str], side: int = 48) -> Path:
    """A folder in the published layout; the index of row i is 100 + i."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metainfo.csv", "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["idx", "name", "text"])
        for i, name in enumerate(names):
            picture(side, side, i).save(folder / name)
            writer.writerow([100 + i, name, f"caption {i}"])
    return folder


def do(source: object, out: Path, *arguments: str) -> dict[str, Any]:
    """Import; gives the report."""
    run(composed([f"source='{source}'", f"out={out}", "workers=2", *arguments], "import"))
    return json.loads((out / "report.json").read_text(encoding="utf-8")) if (out / "report.json").is_file() else {}


def read(out: Path) -> list[dict[str, Any]]:
    """Key, picture bytes, caption and JSON of every sample, by the tar files themselves."""
    samples: dict[str, dict[str, Any]] = {}
    for file in sorted(out.glob("*.tar")):
        with tarfile.open(file) as tar:
            for member in tar:
                key, ending = shards.split_name(member.name)
                data = tar.extractfile(member).read()  # type: ignore[union-attr]
                decoded = {"txt": lambda d: d.decode(), "json": json.loads}.get(ending, lambda d: d)(data)
                samples.setdefault(key, {"key": key})[ending if ending in ("txt", "json") else "picture"] = decoded
                if ending not in ("txt", "json"):
                    samples[key]["ending"] = ending
    return list(samples.values())


def hashes(out: Path) -> list[str]:
    """Of every shard, by the manifest, and of every index."""
    manifest = json.loads((out / "manifest.json").read_text())
    return [entry["sha256"] for entry in manifest["shards"]] + [file_hash(f) for f in sorted(out.glob("*.idx"))]


# Layouts

ENDINGS = ["a.jpg", "b.JPEG", "c.PNG", "d.WebP", "e.tif", "f.TIFF", "g.bmp", "h.GIF"]
STORED = ["jpg", "jpg", "png", "webp", "tiff", "tiff", "bmp", "gif"]


def test_the_published_layout_keeps_bytes_captions_and_indices(tmp_path: Path, capsys: Any) -> None:
    folder = published(tmp_path / "photos", ENDINGS)
    report = do(folder, tmp_path / "out", "shard_size=3")
    samples = read(tmp_path / "out")
    assert [s["ending"] for s in samples] == STORED
    assert [s["picture"] for s in samples] == [(folder / name).read_bytes() for name in ENDINGS]
    assert [s["txt"] for s in samples] == [f"caption {i}" for i in range(8)]
    assert samples[1]["json"] == {"index": 101, "file": "b.JPEG", "width": 48, "height": 48}
    assert [s["key"] for s in samples] == [f"{i:08d}" for i in range(8)]
    assert report == {"rows": 8, "imported": 8, "problems": {}, "ignored": {}, "list": []}
    said = capsys.readouterr()
    assert "8 of 8 pictures" in said.out
    assert (
        said.err.startswith("list the pictures of ")
        and "\nimporting " in said.err
        and "8 pictures\ndone: 8 pictures in " in said.err
    )
    data = ShardSet(str(tmp_path / "out"))
    assert data.columns["width"].tolist() == [48] * 8 and len(data.manifest["shards"]) == 3
    assert data.read(5, ["tiff"])["tiff"].tobytes() == samples[5]["picture"]


def test_training_reads_every_kind_that_is_imported(tmp_path: Path) -> None:
    folder = published(tmp_path / "photos", [*ENDINGS, "i.avif", "j.jp2"])
    assert do(folder, tmp_path / "out")["imported"] == 10
    source: Any = ShardData(str(tmp_path / "out"), size=48).source
    items = [source[i] for i in range(10)]
    assert [(item.prompt, item.skipped) for item in items] == [(f"caption {i}", ()) for i in range(10)]
    plain = FolderDataset(str(folder), 48)
    assert all(torch.equal(items[i].pixels, plain[i]["pixels"]) for i in range(10))
    assert {f".{ending}" for ending in sources.ENDINGS} == set(PICTURES)


TEXTS = ['a "quoted", one', "two\nlines", "wide 🦊 日本", "  blanks around  "]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_lists_with_columns_in_any_order(tmp_path: Path, kind: str) -> None:
    folder = published(tmp_path / "photos", [f"p.{i}.png" for i in range(4)])
    rows = [{"Prompt": text, "seed": 1, "File_Name": f"photos/p.{i}.png", "id": 7 + i} for i, text in enumerate(TEXTS)]
    file = tmp_path / f"list.{kind.upper()}"
    with open(file, "w", newline="", encoding="utf-8-sig") as stream:
        if kind == "csv":
            writer = csv.DictWriter(stream, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        else:
            stream.write("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    do(file, tmp_path / "out")
    samples = read(tmp_path / "out")
    assert [s["txt"] for s in samples] == TEXTS
    assert [s["json"]["index"] for s in samples] == [7, 8, 9, 10]
    assert [s["picture"] for s in samples] == [(folder / f"p.{i}.png").read_bytes() for i in range(4)]


def test_pairs_in_any_case_at_any_depth(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for i, (name, text) in enumerate([("b/x.y.JPG", "b/x.y.TXT"), ("a.png", "a.txt"), ("a.webp", ""), ("c.png", "")]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(seed=i).save(folder / name)
        if text:
            (folder / text).write_text(f"\ufeff text {i}\n", encoding="utf-8")
    (folder / "._a.jpg").write_bytes(b"what a Mac leaves")
    report = do(folder, tmp_path / "out")
    assert [(s["json"]["file"], s["txt"]) for s in read(tmp_path / "out")] == [
        ("a.png", "text 1"),
        ("b/x.y.JPG", "text 0"),
    ]
    assert [(p["row"], p["file"], p["kind"]) for p in report["list"]] == [
        (1, "a.webp", "duplicate name"),
        (3, "c.png", "no caption"),
    ]


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def encoded(seed: int, kind: str = "PNG", side: int = 48) -> bytes:
    stream = io.BytesIO()
    picture(side, side, seed).save(stream, kind)
    return stream.getvalue()


def write_tars(folder: Path) -> list[Path]:
    folder.mkdir()
    files = [folder / f"t{i}.tar" for i in range(2)]
    with tarfile.open(files[0], "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in {
            "./x/0.PNG": encoded(0),
            "./x/0.txt": b"zero\n",
            "x/1.jpeg": encoded(1, "JPEG"),
            "x/1.caption": "eins 🦊".encode(),
            "x/1.pth": b"cbuiltins\nexit\n(tR.",
            "x/2.webp": encoded(2, "WEBP"),
            "x/2.json": b'{"caption": "two", "index": 77}',
            "x/2.pickle": b"cbuiltins\nexit\n(tR.",
        }.items():
            add(tar, name, data)
    with tarfile.open(files[1], "w") as tar:
        for name, data in {
            "x/0.png": encoded(3),
            "x/0.txt": b"zero again",
            "x/3.txt": b"words alone",
            "x/4.png": encoded(4),
            "x/4.txt": b"four",
            "x/5.png": encoded(5),
        }.items():
            add(tar, name, data)
    return files


@pytest.mark.parametrize("form", ["folder", "braces", "asterisk"])
def test_shards_made_elsewhere(tmp_path: Path, form: str) -> None:
    write_tars(tmp_path / "wds")
    source = {"folder": "wds", "braces": "wds/t{0..1}.tar", "asterisk": "wds/*.tar"}[form]
    report = do(tmp_path / source, tmp_path / "out", "shard_size=2")
    samples = read(tmp_path / "out")
    assert [(s["txt"], s["ending"], s["json"]["index"]) for s in samples] == [
        ("zero", "png", 0),
        ("eins 🦊", "jpg", 1),
        ("two", "webp", 77),
        ("four", "png", 5),
    ]
    assert [s["picture"] for s in samples] == [encoded(0), encoded(1, "JPEG"), encoded(2, "WEBP"), encoded(4)]
    assert report["problems"] == {"duplicate name": 1, "no picture": 1, "no caption": 1}
    assert report["ignored"] == {".pth": 1, ".pickle": 1}
    assert [p["file"] for p in report["list"]] == ["t1.tar/x/0.png", "t1.tar/x/3", "t1.tar/x/5.png"]


@pytest.mark.parametrize("cut", ["in a picture", "in a header", "between samples", "damaged header"])
def test_of_a_truncated_shard_what_is_before_the_cut_is_imported(tmp_path: Path, cut: str) -> None:
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        starts = []
        for i in range(4):
            starts.append(tar.offset)
            add(tar, f"{i}.txt", b"text")
            add(tar, f"{i}.png", encoded(i))
    data = bytearray((tmp_path / "t.tar").read_bytes())
    if cut == "damaged header":
        data[starts[2] + 100 : starts[2] + 300] = b"\xff" * 200
    stop = {"in a picture": starts[3] - 700, "in a header": starts[2] + 100, "between samples": starts[2]}
    (tmp_path / "t.tar").write_bytes(data[: stop.get(cut)])
    report = do(tmp_path / "t.tar", tmp_path / "out")
    assert [s["picture"] for s in read(tmp_path / "out")] == [encoded(0), encoded(1)]
    assert report["problems"]["damaged shard"] == 1 and report["list"][-1]["file"] == "t.tar"


def test_webdataset_reads_the_result_and_so_does_another_import(tmp_path: Path) -> None:
    folder = published(tmp_path / "photos", [f"{i}.png" for i in range(5)])
    do(folder, tmp_path / "out", "shard_size=2")
    pattern = str(tmp_path / "out" / "{00000..00002}.tar")
    samples = list(webdataset.WebDataset(pattern, shardshuffle=False).decode("rgb8").to_tuple("png", "txt", "json"))
    assert [s[1] for s in samples] == [f"caption {i}" for i in range(5)]
    for i, sample in enumerate(samples):
        np.testing.assert_array_equal(sample[0], np.asarray(picture(seed=i)))
    do(tmp_path / "out", tmp_path / "again", "shard_size=2")
    again = read(tmp_path / "again")
    assert [s["json"]["index"] for s in again] == [100, 101, 102, 103, 104]
    assert [s["picture"] for s in again] == [s["picture"] for s in read(tmp_path / "out")]


# Pictures


def test_exif_orientation_counts_for_sizes_and_pixels(tmp_path: Path) -> None:
    folder = published(tmp_path / "photos", ["a.png"])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    lying = Image.new("RGB", (96, 64), "red")
    lying.paste((0, 0, 255), (0, 0, 48, 64))  # its left half becomes the upper one
    lying.save(folder / "a.png", exif=exif)
    do(folder, tmp_path / "out", "size=64")
    columns = ShardSet(str(tmp_path / "out")).columns
    assert (columns["width"].tolist(), columns["height"].tolist()) == ([64], [96])
    do(folder, tmp_path / "scaled", "size=64", "buckets=[1:1,2:3]", "multiple=8", "resize=true")
    stored = np.asarray(Image.open(io.BytesIO(read(tmp_path / "scaled")[0]["picture"])))
    assert stored.shape == (80, 56, 3)
    assert stored[:39].mean((0, 1)) == pytest.approx([0, 0, 255]) and stored[41:].mean((0, 1)) == pytest.approx(
        [255, 0, 0]
    )


def test_pictures_of_any_mode_look_as_they_should(tmp_path: Path) -> None:
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    deep = Image.fromarray(np.full((8, 8), 0x8080, np.uint16))
    flat = Image.new("P", (8, 8), 1)
    flat.putpalette([9, 9, 9, 10, 200, 30])
    frames = [Image.new("RGB", (8, 8), color) for color in ((0, 255, 0), (0, 0, 255))]
    wanted = {"rgba": (255, 127, 127), "deep": (128, 128, 128), "cmyk": (0, 255, 255), "p": (10, 200, 30)}
    wanted |= {"clear": (255, 255, 255), "moving": (0, 255, 0), "one": (255, 255, 255)}
    saved = {
        "rgba": (half, "PNG", {}),
        "deep": (deep, "PNG", {}),
        "cmyk": (Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "TIFF", {}),
        "p": (flat, "PNG", {}),
        "clear": (flat, "PNG", {"transparency": 1}),
        "moving": (frames[0], "GIF", {"save_all": True, "append_images": frames[1:]}),
        "one": (Image.new("1", (8, 8), 1), "TIFF", {}),
    }
    for name, (image, kind, options) in saved.items():
        image.save(tmp_path / name, kind, **options)
        found = decode(tmp_path / name)
        assert found.mode == "RGB" and found.getpixel((3, 3)) == pytest.approx(wanted[name], abs=1), name
    with open(tmp_path / "rgba", "rb") as stream:
        assert read_picture(stream, (4, 4))[1].mean().item() == pytest.approx(0, abs=0.02)


def test_what_cannot_be_used_is_reported_with_its_reason(tmp_path: Path, capsys: Any) -> None:
    names = ["good.png", "cut.jpg", "crc.png", "text.png", "empty.png", "gone.png", "small.png", "odd.eps", "last.png"]
    folder = published(tmp_path / "photos", names[:-2] + names[-1:], side=64)
    picture(64, 64).save(folder / "cut.jpg", quality=100)
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:-500])
    data = bytearray((folder / "crc.png").read_bytes())
    at = data.index(b"IDAT") + 4
    data[at + struct.unpack(">I", data[at - 8 : at - 4])[0]] ^= 1
    (folder / "crc.png").write_bytes(data)
    (folder / "text.png").write_text("no picture")
    (folder / "empty.png").write_bytes(b"")
    (folder / "gone.png").unlink()
    picture(100, 63).save(folder / "small.png")
    picture(64, 64).save(folder / "odd.eps")
    with open(folder / "metainfo.csv", "a", encoding="utf-8") as stream:
        stream.write("8,odd.eps,x\n9,./good.png,twice\n10,last.png\n11,last.png,\n12,,x\n")
    report = do(folder, tmp_path / "out", "size=64", "shard_size=4")
    assert [s["json"]["file"] for s in read(tmp_path / "out")] == ["good.png", "last.png"]
    kinds = {p["file"]: p["kind"] for p in report["list"]}
    assert kinds == {
        "cut.jpg": "unreadable",
        "crc.png": "unreadable",
        "text.png": "unreadable",
        "empty.png": "unreadable",
        "gone.png": "missing",
        "small.png": "too small",
        "odd.eps": "unreadable",
        "./good.png": "duplicate name",
        "metainfo.csv, line 12": "bad line",
        "last.png": "duplicate name",
        "metainfo.csv, line 14": "bad line",
    }
    assert report["problems"] == {"unreadable": 5, "duplicate name": 2, "bad line": 2, "missing": 1, "too small": 1}
    assert report["rows"] == 13 and [p["row"] for p in report["list"]] == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12]
    reasons = {p["file"]: p["reason"] for p in report["list"]}
    assert reasons["small.png"] == "100x63, smaller than 64x64" and "truncated" in reasons["cut.jpg"]
    out = capsys.readouterr().out
    assert "2 of 13 pictures" in out and "left out: 5 unreadable, 2 duplicate name" in out


def test_captions_that_are_none(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, text in enumerate([b"good", b" \n\t", b"", b"\xff\xfe", b"\xef\xbb\xbf"]):
        picture(seed=i).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_bytes(text)
    report = do(folder, tmp_path / "out")
    assert report["imported"] == 1 and report["problems"] == {"no caption": 4}


# Sizes


def test_bucket_sizes() -> None:
    aspects = ["1:1", "4:3", "3:4", "16:9", "9:16"]
    sizes = bucket_sizes(aspects, 1024)
    assert sizes == [(1024, 1024), (896, 1152), (1152, 896), (768, 1344), (1344, 768)]
    for aspect, (height, width) in zip(aspects, sizes, strict=True):
        left, right = map(int, aspect.split(":"))
        assert height % 64 == width % 64 == 0 and height * width == pytest.approx(1024 * 1024, rel=0.02)
        assert nearest_bucket(right * 500, left * 500, sizes) == sizes.index((height, width))
    # Halfway between 1:1 and 4:3 of 896x1152 is the ratio sqrt(1152 / 896) = 1.134.
    assert nearest_bucket(1000, 1133, sizes) == 0 and nearest_bucket(1000, 1135, sizes) == 1
    assert nearest_bucket(1, 10000, sizes) == 3
    with pytest.raises(UserError, match=r"buckets 1:1 and 10:9 are both 512x512 at size=512"):
        bucket_sizes(["1:1", "10:9"], 512)
    with pytest.raises(UserError, match="WIDTH:HEIGHT"):
        bucket_sizes(["wide"], 512)


@pytest.mark.parametrize(("width", "height", "kind"), [(300, 200, "png"), (170, 260, "jpg"), (210, 200, "webp")])
def test_a_circle_stays_a_circle(tmp_path: Path, width: int, height: int, kind: str) -> None:
    y, x = np.mgrid[:height, :width]
    disc = (x - width / 2 + 0.5) ** 2 + (y - height / 2 + 0.5) ** 2 < 60**2
    (tmp_path / "photos").mkdir()
    Image.fromarray((disc[..., None] * np.full(3, 255)).astype(np.uint8)).save(tmp_path / "photos" / "a.png")
    (tmp_path / "photos" / "a.txt").write_text("a disc")
    arguments = ["size=128", "buckets=[1:1,4:3,2:3]", "multiple=16", "resize=true", f"format={kind}"]
    report = do(tmp_path / "photos", tmp_path / "out", *arguments)
    sample = read(tmp_path / "out")[0]
    stored = np.asarray(Image.open(io.BytesIO(sample["picture"])).convert("L")) > 127
    assert stored.shape == (sample["json"]["height"], sample["json"]["width"])
    assert (sample["json"]["original_width"], sample["json"]["original_height"]) == (width, height)
    sizes = bucket_sizes(["1:1", "4:3", "2:3"], 128, 16)
    bucket = sizes[nearest_bucket(height, width, sizes)]
    assert stored.shape == bucket and sample["ending"] == kind
    assert report["buckets"] == {f"{w}x{h}": int((h, w) == bucket) for h, w in sizes}
    scale = max(bucket[0] / height, bucket[1] / width)
    across, down = stored.any(0).sum(), stored.any(1).sum()
    assert abs(int(across) - int(down)) <= 2 and across == pytest.approx(120 * scale, abs=2)
    assert stored.sum() == pytest.approx(np.pi * (60 * scale) ** 2, rel=0.03)


def test_too_small_is_what_would_have_to_be_enlarged_for_its_bucket(tmp_path: Path) -> None:
    folder = published(tmp_path / "photos", ["a.png", "b.png", "c.png"])
    for name, size in {"a.png": (160, 80), "b.png": (96, 96), "c.png": (160, 79)}.items():
        picture(*size).save(folder / name)
    report = do(folder, tmp_path / "out", "size=112", "buckets=[1:1,2:1]", "multiple=16")
    assert bucket_sizes(["1:1", "2:1"], 112, 16) == [(112, 112), (80, 160)]
    assert [(p["file"], p["reason"]) for p in report["list"]] == [
        ("b.png", "96x96, smaller than 112x112"),
        ("c.png", "160x79, smaller than 160x80"),
    ]
    assert report["buckets"] == {"112x112": 0, "160x80": 1}


# Stopping


class Killed(BaseException):
    """Stands for a signal."""


def broken(folder: Path) -> Path:
    """Ten rows in the published layout, two of them unreadable."""
    published(folder, [f"{i}.png" for i in range(10)])
    for i in (1, 6):
        (folder / f"{i}.png").write_bytes(b"no picture")
    return folder


@pytest.mark.parametrize("row", [0, 4, 9])
def test_a_killed_import_continues_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: int) -> None:
    folder = broken(tmp_path / "photos")
    whole = do(folder, tmp_path / "whole", "shard_size=3")
    original = import_pictures.load_row

    def load(entry: Any, number: int, plan: Any) -> Any:
        if number == row:
            raise Killed
        return original(entry, number, plan)

    (tmp_path / "out" / ".00001.x" / ".00001.done").mkdir(parents=True)  # as a killed process leaves it
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(import_pictures, "load_row", load)
        do(folder, tmp_path / "out", "shard_size=3")
    assert len(list((tmp_path / "out").glob("*.tar"))) == row // 3
    assert not (tmp_path / "out" / "manifest.json").exists() and not list((tmp_path / "out").glob(".*"))
    assert do(folder, tmp_path / "out", "shard_size=3") == whole
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    assert whole["problems"] == {"unreadable": 2} and [p["row"] for p in whole["list"]] == [1, 6]
    assert do(folder, tmp_path / "out", "shard_size=3") == whole  # done already


def test_two_processes_make_the_same_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    folder = broken(tmp_path / "photos")
    whole = do(folder, tmp_path / "whole", "shard_size=2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert do(folder, tmp_path / "out", "shard_size=2") == {}
    assert "others are still at work" in capsys.readouterr().out
    assert sorted(f.name for f in (tmp_path / "out").glob("*.tar")) == ["00001.tar", "00003.tar"]
    monkeypatch.setenv("RANK", "0")
    assert do(folder, tmp_path / "out", "shard_size=2") == whole
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_strict_stops_at_the_first_problem(tmp_path: Path) -> None:
    folder = broken(tmp_path / "photos")
    with pytest.raises(UserError, match=r"^1\.png: unreadable \(no picture of a known format\)"):
        do(folder, tmp_path / "out", "strict=true", "shard_size=2")
    assert not (tmp_path / "out").exists()
    picture(seed=1).save(folder / "1.png")
    with pytest.raises(UserError, match=r"^6\.png: unreadable"):  # continues, and stops in the fourth shard
        do(folder, tmp_path / "out", "strict=true", "shard_size=2")
    assert [f.name for f in sorted((tmp_path / "out").glob("*.tar"))] == ["00000.tar", "00001.tar", "00002.tar"]
    assert do(folder, tmp_path / "out", "shard_size=2")["imported"] == 9
    with pytest.raises(UserError, match=r"^6\.png: unreadable"):  # also if it was found earlier
        do(folder, tmp_path / "out", "strict=true", "shard_size=2")
    (folder / "metainfo.csv").write_text("i,f,c\n0,1.png,x\n1,2.png,\n")
    with pytest.raises(UserError, match=r"^2\.png: no caption \(no caption in metainfo.csv, line 3\)"):
        do(folder, tmp_path / "never", "strict=true")
    assert not (tmp_path / "never").exists()


def test_a_shard_without_any_good_row(tmp_path: Path) -> None:
    folder = published(tmp_path / "photos", [f"{i}.png" for i in range(6)])
    for i in (2, 3):
        (folder / f"{i}.png").write_bytes(b"")
    assert do(folder, tmp_path / "out", "shard_size=2")["imported"] == 4
    data = ShardSet(str(tmp_path / "out"))
    assert [json.loads(data.read(i, ["json"])["json"].tobytes())["index"] for i in range(4)] == [100, 101, 104, 105]
    pattern = str(tmp_path / "out" / "{00000..00002}.tar")
    assert len(list(webdataset.WebDataset(pattern, shardshuffle=False))) == 4
    with pytest.raises(UserError, match="none of 6 rows could be imported"):
        do(folder, tmp_path / "none", "size=1000")


def test_limit_takes_the_first_rows_and_another_list_is_refused(tmp_path: Path) -> None:
    folder = published(tmp_path / "photos", [f"{i}.png" for i in range(5)])
    do(folder, tmp_path / "out", "limit=2")
    assert [s["txt"] for s in read(tmp_path / "out")] == ["caption 0", "caption 1"]
    for change in ("limit=3", "size=16"):
        with pytest.raises(UserError, match="holds a job of other settings"):
            do(folder, tmp_path / "out", change)


# Wrong input

WRONG: dict[str, tuple[dict[str, bytes], list[str], str]] = {
    "missing": ({}, ["source=nowhere"], "source=nowhere does not exist"),
    "kind": ({"a.zip": b""}, ["source=a.zip"], "is of no known kind"),
    "empty folder": ({"d/readme.md": b""}, ["source=d"], r"holds no metainfo.csv, no pictures .* and no .tar"),
    "columns": ({"a.csv": b"url,words\nx,y\n"}, ["source=a.csv"], "has columns url, words; one must be called file or"),
    "keys": ({"a.jsonl": b'{"file": "x", "b": 1}\n'}, ["source=a.jsonl"], "has columns file, b; .* caption or text or"),
    "encoding": ({"a.csv": "file,text\nx,Bär\n".encode("latin-1")}, ["source=a.csv"], r"is not UTF-8 text \(byte 13\)"),
    "utf-16": ({"d/metainfo.csv": "i,f,c\n".encode("utf-16")}, ["source=d"], "is not UTF-8 text"),
    "no header": ({"d/metainfo.csv": b"0,x.png,c\n", "d/x.png": b""}, ["source=d"], "has no header row"),
    "no rows": ({"d/metainfo.csv": b"i,f,c\n"}, ["source=d"], "lists no captioned picture$"),
    "no captions": ({"d/x.png": b""}, ["source=d"], "no captioned picture; first of 1 problems: x.png: no caption"),
    "quotes": ({"a.csv": b'file,text\nx,"' + b"y" * 200_000}, ["source=a.csv"], "line 2: .*; check its quotes"),
    "no tar": ({"a.tar": b"no tar" * 500}, ["source=a.tar"], "a.tar: damaged shard"),
    "pattern": ({}, ["source='a/{0..1}.tar'"], "a/0.tar does not exist"),
    "size": ({}, ["size=0"], "size=0; use at least 1"),
    "resize": ({}, ["resize=true"], "size is null beside resize=true"),
    "buckets without size": ({}, ["buckets=[1:1]"], "size is null beside buckets"),
    "buckets": ({}, ["size=64", "buckets=[1:1,x]"], "aspect=x; give WIDTH:HEIGHT"),
    "no buckets": ({}, ["size=64", "buckets=[]"], "buckets is empty"),
    "format": ({}, ["format=gif"], "png | jpg | webp"),
    "type": ({}, ["strict=1"], "strict=1 is not valid; expected true or false"),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_wrong_input_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    files, arguments, words = WRONG[case]
    for name, data in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(data)
    with pytest.raises(UserError, match=words) as caught:
        run(composed(["source=x", "out=out", *arguments], "import"))
    assert "\n" not in str(caught.value) and not Path("out").exists()


def test_source_and_out_must_be_given() -> None:
    for arguments, words in (([], "source is missing"), (["source=x"], "out is missing")):
        with pytest.raises(UserError, match=words):
            run(composed(arguments, "import"))


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    folder = published(tmp_path / "photos", ["a.png"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is not empty \(it holds mine.txt\)"), contextlib.chdir(tmp_path):
        do(folder, tmp_path / "out")
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    published(tmp_path / "photos", ["a.png", "b.png"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SWD_COMMAND", raising=False)
    for arguments, words in (([], "2 of 2 pictures"), (["limit=x"], "limit='x' is not valid")):
        GlobalHydra.instance().clear()
        monkeypatch.setattr("sys.argv", ["swd", "import", "source=photos", "out=shards", *arguments])
        with contextlib.suppress(SystemExit):
            cli.main()
        assert words in "".join(capsys.readouterr())
    assert sorted(f.name for f in tmp_path.iterdir()) == ["photos", "shards"]
    HydraConfig.instance().cfg = None
