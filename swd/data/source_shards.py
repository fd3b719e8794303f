"""Shards of other programs as sources: their members are listed from the headers, and no picture is read."""

from __future__ import annotations

import glob
import os
import posixpath
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from webdataset.shardlists import expand_urls

from swd.data.picture_list import ENDINGS, Part, PictureList, PictureRow, Problem, passed_over, printable
from swd.data.shards import split_name
from swd.io.job_log import JobLog
from swd.io.ranks import is_first
from swd.types import UserError

MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}
"""First bytes of compressed files."""
PATTERNS = 1_000_000
"""Largest number of shards that a pattern may name."""


def shard_urls(pattern: str, key: str) -> list[str]:
    """The shards that a pattern with braces names, in order.

    Args:
        pattern: a pattern of WebDataset, or several joined by `::`.
        key: its name in messages, e.g. "source".

    Raises:
        UserError: if its braces are invalid or name more than `PATTERNS` shards.
    """
    try:
        for one in pattern.split("::"):
            if _count(one) > PATTERNS:
                raise UserError(f"{key}={one[:200]} names more than {PATTERNS:,} shards; give fewer")
        return list(expand_urls(pattern))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{key}={pattern[:200]}: its braces cannot be read; give {{000..099}}, or {{a,b}}") from None


def _count(pattern: str) -> int:
    """Upper limit of the number of names that a pattern with braces stands for."""
    counts = [1]
    changed = 1
    while changed:
        groups = re.findall(r"\{([^{}]*)\}", pattern)
        counts += [_choices(group) for group in groups]
        pattern, changed = re.subn(r"\{[^{}]*\}", "", pattern)
    return prod(counts)


def _choices(group: str) -> int:
    """Upper limit of the number of names that the inside of a pair of braces stands for."""
    numbers = re.fullmatch(r"(-?\d{1,18})\.\.(-?\d{1,18})(\.\.-?\d+)?", group)
    if numbers:
        return abs(int(numbers[2]) - int(numbers[1])) + 1
    return PATTERNS + 1 if re.fullmatch(r"-?\d+\.\.-?\d+(\.\.-?\d+)?", group) else group.count(",") + 1


def shard_files(pattern: str) -> list[Path]:
    """Files of a pattern with braces or asterisks, in order.

    Raises:
        UserError: if one does not exist or is no `.tar`, or the braces are invalid.
    """
    names = [name for one in shard_urls(pattern, "source") for name in (sorted(glob.glob(one)) or [one])]
    for name in names:
        if not os.path.isfile(name):
            raise UserError(f"source={pattern}: {name} does not exist")
        if not name.lower().endswith(".tar"):
            raise UserError(
                f"source={pattern}: {name} is no .tar; patterns are for shards (compressed ones: unpack them)"
            )
    return [Path(name) for name in names]


def rows_of_shards(files: Sequence[tuple[str, str]], found: PictureList, outside: bool) -> PictureList:
    """Add the samples of shards.

    Args:
        files: path of each shard, and its name in messages.
        found: the list that grows.
        outside: also take members whose names leave the shard.

    Returns:
        `found` itself.
    """
    task = f"list the samples of {files[0][0] if files else ''}"
    with JobLog(task, len(files), "shard", shown=is_first()) as progress:
        for path, name in files:
            if found.outside(path):
                reason = f"it lies outside of {found.root}; {found.key}=true takes it"
                found.rows.append(Problem("outside", name, reason))
            elif not os.path.isfile(path):
                found.rows.append(Problem("unreadable", name, "is a pipe, a device or a link to nothing, no file"))
            else:
                _add_shard(found, path, name, outside)
            progress.advance()
    return found


@dataclass
class _Sample:
    """Files of a shard that have one key.

    Attributes:
        parts: places of files by ending.
        dotted: pictures whose name holds a dot: their names by the part after the first dot.
        doubled: whether an ending came twice.
    """

    parts: dict[str, Part] = field(default_factory=dict)
    dotted: dict[str, str] = field(default_factory=dict)
    doubled: bool = False


def _add_shard(found: PictureList, path: str, shard: str, outside: bool) -> None:
    """Append the samples of a shard; keys end at the first dot of a name, as in WebDataset."""
    # Sort files by key.
    samples: dict[str, _Sample] = {}
    last: list[Problem] = []
    for name, part in _members(path):
        shown = f"{shard}/{printable(name)}"
        key, ending = split_name(name.removeprefix("./"))
        if isinstance(part, str) and not name:
            last.append(Problem("damaged shard", shard, part))
        elif passed_over(name):
            found.ignored["hidden or system files"] += 1
        elif isinstance(part, str):
            if ending in (*ENDINGS, "txt", "caption", "json"):
                last.append(Problem("no file", shown, part))
        elif not outside and (posixpath.isabs(name) or ".." in name.split("/")):
            last.append(Problem("outside", shown, f"its name leaves the shard; {found.key}=true takes it"))
        else:
            sample = samples.setdefault(key, _Sample())
            if ending in sample.parts:
                sample.doubled = True
            elif ending in ENDINGS or ending in ("txt", "caption", "json"):
                sample.parts[ending] = part
            elif ending.rpartition(".")[2] in ENDINGS:
                sample.dotted[ending] = shown
            else:
                found.ignored[f".{printable(ending)}"] += 1

    # Add the samples, then the problems of the shard.
    for key, sample in samples.items():
        _add_sample(found, shard, printable(key), sample)
    for key, sample in samples.items():
        if sample.doubled:
            last.append(Problem("duplicate name", f"{shard}/{key}", f"more than once in {shard}"))
    last.sort(key=lambda problem: problem.kind == "damaged shard")
    found.rows += last


def _add_sample(found: PictureList, shard: str, key: str, sample: _Sample) -> None:
    """Append a sample, or the problem for which it is left out."""
    # Pictures with a dot in their names belong to other samples, or are masks and the like.
    parts = sample.parts
    pictures = [ending for ending in parts if ending in ENDINGS]
    for ending, name in sample.dotted.items():
        if pictures:  # e.g. a mask beside the picture
            found.ignored[f".{printable(ending)}"] += 1
        else:
            stem = key.rpartition("/")[2]
            reason = f"its name holds a dot, so its key is {stem!r} by WebDataset's rule; use another sign than the dot"
            found.rows.append(Problem("dotted name", name, reason))

    # The first picture counts.
    if not pictures:
        if parts and not sample.dotted:
            found.rows.append(Problem("no picture", f"{shard}/{key}", f"only .{', .'.join(parts)}"))
        return
    for ending in pictures[1:]:
        found.ignored[f".{ending}"] += 1
    caption = parts.get("txt", parts.get("caption"))
    found.add(
        PictureRow(f"{shard}/{key}.{pictures[0]}", None, parts[pictures[0]], caption, parts.get("json")), key, shard
    )


class _Headers(tarfile.TarFile):
    """A tar file with an attribute of its base class that type checkers do not know: the members read so far."""

    members: list[tarfile.TarInfo]


def _members(path: str) -> Iterator[tuple[str, Part | str]]:
    """Name of every member of a shard, with the place of the file or the reason why it is no file.

    If the shard is damaged, the last pair is "" and the reason.
    """
    end = 0
    try:
        # Compressed shards are recognised by their first bytes.
        size = os.path.getsize(path)
        with open(path, "rb") as stream:
            start = stream.read(8)
        packed = next((name for magic, name in MAGIC.items() if start.startswith(magic)), None)
        if packed:
            yield "", f"compressed with {packed}, and samples are read from places in the file; unpack it first"
            return

        # Read the headers one by one.
        with _Headers.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # otherwise memory grows with each member
                if member.offset_data + member.size > size:
                    yield "", f"cut off in {printable(member.name)}"
                    return
                if member.size < 0 or member.offset_data < end:  # such a header can make reading endless
                    yield "", f"damaged at byte {end} of {size}"
                    return
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if member.isreg() and not member.issparse():
                    yield member.name, Part(path, member.offset_data, member.size)
                elif not member.isdir():
                    kind = "a link; put the file itself there" if member.islnk() or member.issym() else "no plain file"
                    yield member.name, f"it is {kind}"

        # tarfile reads a damaged header, or a cut between two samples, as the end, so check for the real end.
        mark = Part(path, end, tarfile.BLOCKSIZE).read(tarfile.BLOCKSIZE)
    except Exception as error:  # tarfile raises errors of many types for damaged headers
        yield "", printable((str(error).splitlines() or [type(error).__name__])[0][:160])
        return
    if mark != bytes(tarfile.BLOCKSIZE):
        yield "", f"damaged or cut off at byte {end} of {size}"
