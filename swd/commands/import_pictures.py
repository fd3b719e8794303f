"""`swd import`: make shards of captioned pictures in any common layout, with a report of the pictures left out.

The job has one row for each row of the source, so that several processes can share it and a killed one can go on.
Problems with a shard's rows are stored before the shard counts as complete, so the report is whole however often the
job was stopped.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from PIL import Image

from swd.commands import keys
from swd.config import check
from swd.data.buckets import bucket_sizes, nearest_bucket
from swd.data.job import JOB, Job, Sample
from swd.data.picture_files import (
    MAX_PIXELS,
    STORED_AS,
    byte_limit,
    check_max_pixels,
    cover_and_crop,
    decode,
    open_picture,
)
from swd.data.picture_list import ENDINGS, PictureList, PictureRow, Problem, printable
from swd.data.read_ahead import read_ahead
from swd.data.shard_writer import shard_name
from swd.data.shards import ShardSet
from swd.data.sources import list_source
from swd.io import limits
from swd.io.files import write_json
from swd.io.masking import mask
from swd.io.pictures import picture_bytes
from swd.io.ranks import share
from swd.io.tables import NoText
from swd.types import UserError

ROOT = keys.IMPORT
REPORT, PROBLEMS = "report.json", "problems"
QUALITY = 95
MOST = {
    "workers": (256, "threads beyond the processor's cores save no time, and each holds a picture"),
    "shard_size": (1_000_000, "a shard that is stopped is begun again"),
    "multiple": (8192, "it is of pixels of a picture's side"),
}
"""Largest sensible values, with the reasons."""


def run(cfg: DictConfig) -> None:
    """Import the source that the configuration names; prints a summary."""
    plan = prepare(cfg)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # the report has the warnings that matter
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    source = list_source(cfg.source, cfg.outside, Path(cfg.out))
    if cfg.limit is not None:
        source.rows = source.rows[: cfg.limit]
    check_enough_there(source.rows, cfg.max_missing)
    if cfg.strict:
        refuse_first(row for row in source.rows if isinstance(row, Problem))
    settings = {
        "source": cfg.source,
        "source_sha256": source.hash,
        "size": plan.size,
        "buckets": plan.buckets,
        "multiple": plan.multiple,
        "resize": plan.resize,
        "stored_as": plan.format if plan.resize else None,
        **({} if plan.max_pixels == MAX_PIXELS else {"max_pixels": plan.max_pixels}),
    }
    job = Job(Path(cfg.out), "pictures", len(source.rows), cfg.shard_size, settings)
    job.claim()
    print(import_rows(job, source, plan) or "this process's share is done; others are still at work")


@dataclass(frozen=True)
class ImportPlan:
    """How pictures are checked and stored; the meanings are those of the configuration's keys."""

    size: int | None = None
    buckets: tuple[str, ...] | None = None
    multiple: int = 64
    resize: bool = False
    format: str = "png"
    strict: bool = False
    workers: int = 4
    max_pixels: int = MAX_PIXELS

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Sizes (height, width) that pictures are cropped to; empty: each keeps its own."""
        if self.size is None:
            return []
        if self.buckets is None:
            return [(self.size, self.size)]
        return bucket_sizes(self.buckets, self.size, self.multiple)


def prepare(cfg: DictConfig) -> ImportPlan:
    """The configuration, checked.

    Raises:
        UserError: naming what is wrong and the fix.
    """
    for key, example in (("source", "source=photos"), ("out", "out=shards")):
        if OmegaConf.is_missing(cfg, key):
            raise UserError(f"{key} is missing; give {example}, see swd import --help")
    check(cfg, ROOT)
    for key in ("source", "out"):
        if not cfg[key].strip() or "\0" in cfg[key] or printable(cfg[key]) != cfg[key]:
            raise UserError(f"{key}={printable(cfg[key])!r} is no name of a file or folder; give {key}=FOLDER, say")
    check_numbers(cfg)
    if cfg.size is None and (cfg.resize or cfg.buckets is not None):
        raise UserError(f"size is null beside {'resize=true' if cfg.resize else 'buckets'}; give size=1024, say")
    buckets = None if cfg.buckets is None else tuple(cfg.buckets)
    plan = ImportPlan(cfg.size, buckets, cfg.multiple, cfg.resize, cfg.format, cfg.strict, cfg.workers, cfg.max_pixels)
    assert plan.sizes or cfg.size is None  # refuses buckets that are none
    return plan


def check_numbers(cfg: DictConfig) -> None:
    """Raise UserError for numbers out of range, and for sizes that no picture can have."""
    for key in ("size", "multiple", "shard_size", "limit", "workers"):
        if cfg[key] is not None and cfg[key] < 1:
            raise UserError(f"{key}={cfg[key]}; use at least 1")
    for key, (most, why) in MOST.items():
        if cfg[key] > most:
            raise UserError(f"{key}={cfg[key]}; use at most {most}: {why}")
    limits.number("max_missing", cfg.max_missing, 0, 1, "a share of the rows")
    check_max_pixels(cfg.max_pixels, "max_pixels")
    if cfg.size is not None and cfg.size**2 > cfg.max_pixels:
        raise UserError(
            f"size={cfg.size}: no picture of at most max_pixels={cfg.max_pixels} covers it; use a smaller one"
        )
    if cfg.buckets is not None and cfg.size is not None and cfg.multiple > cfg.size:
        raise UserError(f"multiple={cfg.multiple} is more than size={cfg.size}; use a smaller one")


def check_enough_there(rows: Sequence[PictureRow | Problem], most: float) -> None:
    """Raise UserError if more than a share of the rows name files that are not there."""
    missing = [row.file for row in rows if isinstance(row, PictureRow) and not os.path.isfile(row.picture.path)]
    if len(missing) > most * len(rows):
        raise UserError(
            f"{len(missing):,} of {len(rows):,} rows name files that are not there, {missing[0]} first, more than "
            f"max_missing={most:g} allows; put them there, or give a larger share"
        )


def refuse_first(problems: Iterator[Problem]) -> None:
    """With `strict=true`: raise UserError for the first problem, if there is one."""
    for problem in problems:
        raise UserError(f"{problem.file}: {problem.kind} ({problem.reason}); mend it, or strict=false leaves it out")


def import_rows(job: Job, source: PictureList, plan: ImportPlan) -> str | None:
    """Make this process's share of the shards; whoever completes the last one writes the report.

    Returns:
        A summary if all is done.

    Raises:
        UserError: with `strict`, at the first problem; if nothing at all could be imported.
    """
    if plan.strict:
        refuse_first(stored_problems(job))
    try:
        manifest = job.run(
            lambda rows, done: make(job, source, plan, rows, done),
            task=f"importing {job.settings['source']} into {job.folder}",
        )
    except UserError:
        forget_job(job)
        raise
    if manifest is None:
        return None
    report = write_report(job, source, plan, manifest)
    if not report["imported"]:
        raise UserError(f"out={job.folder}: none of {job.rows} rows could be imported; {REPORT} there says why")
    return summary_text(job, report, manifest)


def forget_job(job: Job) -> None:
    """Remove the record of a job that was refused before its first shard: once mended, the source is another job."""
    if share()[1] == 1 and not any(job.folder.glob("*.tar")):
        (job.folder / JOB).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty: other files in it are the user's
            job.folder.rmdir()


def make(
    job: Job, source: PictureList, plan: ImportPlan, rows: range, done: Callable[[int], object]
) -> Iterator[Sample]:
    """The samples of a range of rows; writes the range's problems into a file before it ends.

    Args:
        job: the job; the range is one of its shards.
        source: the rows.
        plan: how pictures are checked and stored.
        rows: numbers of the range's rows.
        done: called with the number of rows done.
    """
    problems = []
    # Threads, since Pillow frees the interpreter while it works.
    results = read_ahead(
        lambda number: load_row(source.rows[number], number, plan), rows, plan.workers, 2 * plan.workers
    )
    for number, result in zip(rows, results, strict=True):
        if isinstance(result, Problem):
            if plan.strict:
                refuse_first(iter([result]))
            problems.append({"row": number, **asdict(result)})
        else:
            yield result
        done(1)
    file = job.folder / PROBLEMS / f"{shard_name(rows.start // job.shard_size)}.json"
    if problems:
        write_json(file, problems)
    else:
        file.unlink(missing_ok=True)


# One row


def load_row(row: PictureRow | Problem, number: int, plan: ImportPlan) -> Sample | Problem:
    """The sample of a row, or why there is none."""
    if isinstance(row, Problem):
        return row
    try:
        return sample_of(row, number, plan)
    except FileNotFoundError as error:
        return Problem("missing", row.file, f"{error.filename} is not there")
    except NoText as error:
        return Problem("no caption", row.file, f"its caption {error}")
    except Exception as error:  # Pillow raises many types of errors, and no picture may end an import
        return Problem("unreadable", row.file, reason(error))


def sample_of(row: PictureRow, number: int, plan: ImportPlan) -> Sample | Problem:
    """The sample of a row, or the problem if its picture is too small.

    Raises:
        Exception: of many types, if a file cannot be read.
    """
    data = row.picture.read(byte_limit(plan.max_pixels))
    caption, index = row.read_texts()
    with open_picture(data, plan.max_pixels) as opened:
        ending = ENDINGS.get(Path(row.file).suffix.lower()[1:]) or STORED_AS[str(opened.format)]
        opened.verify()  # PNG's checksums, which decoding passes over
    image = decode(io.BytesIO(data), plan.max_pixels)
    metadata = {"index": number if index is None else index, "file": row.file}
    sizes = plan.sizes
    if sizes:
        height, width = sizes[nearest_bucket(image.height, image.width, sizes)]
        if image.height < height or image.width < width:
            return Problem("too small", row.file, f"{image.width}x{image.height}, smaller than {width}x{height}")
    if plan.resize:
        metadata |= {"original_width": image.width, "original_height": image.height}
        image = cover_and_crop(image, (height, width))
        image.info = {}  # no metadata
        data = picture_bytes(image, plan.format, QUALITY)
        ending = plan.format
    columns = {"width": image.width, "height": image.height}
    files = {ending: data, "txt": caption.encode(), "json": json.dumps(metadata | columns).encode()}
    return f"{number:08d}", files, columns


def reason(error: Exception) -> str:
    """The first line of an error of reading a picture."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = (str(error).splitlines() or [""])[0]
    return "no picture of a known format" if "cannot identify" in text else text[:160] or type(error).__name__


# The report


def stored_problems(job: Job) -> Iterator[Problem]:
    """Problems of the shards that are complete, in order."""
    for entry in _stored(job):
        yield Problem(entry["kind"], entry["file"], entry["reason"])


def _stored(job: Job) -> Iterator[dict[str, Any]]:
    for file in sorted((job.folder / PROBLEMS).glob("[0-9]*.json")):
        yield from json.loads(file.read_text(encoding="utf-8"))


def write_report(job: Job, source: PictureList, plan: ImportPlan, manifest: dict[str, Any]) -> dict[str, Any]:
    """Write the report: numbers of pictures, and each picture left out with the reason."""
    problems = list(_stored(job))
    report: dict[str, Any] = {
        "rows": job.rows,
        "imported": manifest["samples"],
        "problems": dict(Counter(entry["kind"] for entry in problems).most_common()),
        "ignored": dict(source.ignored.most_common()),
    }
    if plan.buckets is not None:
        report["buckets"] = histogram(job, plan)
    write_json(job.folder / REPORT, mask(report | {"list": problems}))
    return report


def histogram(job: Job, plan: ImportPlan) -> dict[str, int]:
    """Number of pictures in each bucket, by "WIDTHxHEIGHT"."""
    columns = ShardSet(str(job.folder)).columns
    pairs = Counter(zip(columns["height"].tolist(), columns["width"].tolist(), strict=True)) if columns else {}
    counts = dict.fromkeys(plan.sizes, 0)
    for (height, width), count in pairs.items():
        counts[plan.sizes[nearest_bucket(height, width, plan.sizes)]] += count
    return {f"{width}x{height}": count for (height, width), count in counts.items()}


def summary_text(job: Job, report: dict[str, Any], manifest: dict[str, Any]) -> str:
    """The report as a few lines of text."""
    counted = lambda counts: ", ".join(f"{count:,} {kind}" for kind, count in counts.items())  # noqa: E731
    lines = [f"{job.folder}: {report['imported']:,} of {job.rows:,} pictures, {manifest['bytes'] / 1e6:,.1f} MB"]
    if report["problems"]:
        lines.append(f"left out: {counted(report['problems'])}; each one is in {job.folder / REPORT}")
    if report["ignored"]:
        lines.append(f"files that are no pictures or captions: {counted(report['ignored'])}")
    if "buckets" in report:
        lines.append("buckets: " + ", ".join(f"{size} {count:,}" for size, count in report["buckets"].items()))
    return "\n".join(lines)
