"""Files are written aside and renamed, so that nothing is ever half-written, and never overwritten silently."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from swd.types import UserError

CHECKSUMS = "checksums.json"
"""Name of the file with the SHA-256 of every other file of a student's folder."""

_LEFTOVER = re.compile(r"\.(.+)\.[a-z0-9_]{8}")
"""Names of the folders that `write_aside` works in."""

ADVICE = {
    errno.ENOSPC: "free some space, or choose another disk",
    errno.EDQUOT: "your quota is used up: free some space, or choose another disk",
    errno.EFBIG: "choose a disk that takes files of this size",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "change its permissions, or choose another folder",
    errno.EPERM: "change its permissions, or choose another folder",
    errno.EIO: "the disk or the network failed; try again, or choose another one",
    errno.ESTALE: "the network disk was lost; try again",
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n 4096), or use fewer workers",
    errno.ENFILE: "too many files are open on this machine: use fewer workers",
    errno.ENAMETOOLONG: "use shorter names",
    errno.ENOTDIR: "a part of this path is a file; choose another one",
    errno.EISDIR: "this is a folder, and a file is needed; choose another name",
    errno.ELOOP: "links lead in a circle; choose another path",
    errno.EBUSY: "another program holds it; try again",
    errno.ENODEV: "the disk is gone; choose another one",
    errno.ENXIO: "the disk is gone; choose another one",
}
"""Advice for a failed file operation, by error number. Only errors of the machine are listed, none of the program."""


def failed_operation(error: BaseException, path: Path | str | None = None) -> OSError | None:
    """The failed file operation that caused an error, with error number and file name; None for errors of other kinds.

    Args:
        error: of Python, or of a library that hides the number: safetensors, torch, Pillow, ffmpeg.
        path: the file that was being written, used where the error names none.
    """
    number = getattr(error, "errno", None)
    file = getattr(error, "filename", None) or path
    file = None if file is None else str(file)
    if isinstance(error, OSError) and number in ADVICE:
        return OSError(number, os.strerror(number), file)
    text = " ".join(str(error).split())
    ours = isinstance(error, OSError) or type(error).__name__ in ("SafetensorError", "RuntimeError")
    if not ours:
        return None
    named = re.search(r"\(os error (\d+)\)|\[Errno (\d+)\]", text)
    if named and int(named[1] or named[2]) in ADVICE:
        number = int(named[1] or named[2])
        return OSError(number, os.strerror(number), file)
    if "No space left on device" in text:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file)
    writer = "PytorchStreamWriter failed writing", "inline_container.cc", "when writing image file"
    if any(words in text for words in writer) and "PytorchStreamReader" not in text:
        return OSError(errno.EIO, "writing failed; the disk may be full", file)
    return None


def write_aside(path: Path, write: Callable[[Path], object]) -> Path:
    """Call `write` on a temporary sibling of `path`, then rename it to `path`.

    A folder that is already at `path` is replaced only after the new one is complete.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        with in_use(work):
            new = work / path.name
            write(new)
            replace(path, new, work / "old")
    except UserError:
        raise
    except Exception as error:
        failed = failed_operation(error)
        if failed is None:
            raise
        inside = failed.filename is None or str(failed.filename).startswith(str(work))
        # The message names the file that the user knows, not the temporary sibling.
        raise OSError(failed.errno, failed.strerror, str(path) if inside else failed.filename) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return path


@contextmanager
def in_use(work: Path) -> Iterator[bool]:
    """Hold the lock on a folder that `write_aside` made; yields whether the lock was free. It ends with the process."""
    handle = os.open(work, os.O_RDONLY)
    try:
        yield _lock(handle)
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    """Lock an open folder; False if another process has locked it, or if its file system or Windows has no locks."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def clear_leftovers(folder: Path) -> None:
    """Remove temporary folders that killed writes left in `folder`; those of writes that still run stay.

    A write may have been killed between moving the old folder away and moving the new one in; then the old one is put
    back.
    """
    for work in folder.glob(".*"):
        found = _LEFTOVER.fullmatch(work.name)
        if found is None or not work.is_dir() or work.is_symlink():
            continue
        ours = False
        try:
            with in_use(work) as ours:
                if ours and (work / "old").exists() and not (folder / found[1]).exists():
                    os.rename(work / "old", folder / found[1])
        except OSError:  # removed by another process meanwhile, or owned by another user
            continue
        if ours:
            shutil.rmtree(work, ignore_errors=True)


def replace(path: Path, new: Path, old: Path) -> None:
    """Rename `new` to `path`; a folder at `path` goes to `old` meanwhile, and back if that fails."""
    if not path.is_dir():
        os.replace(new, path)
        return
    os.rename(path, old)
    try:
        os.replace(new, path)
    except BaseException:
        os.rename(old, path)
        raise


def write_text(path: Path, text: str) -> Path:
    """Write a text file aside, then rename it."""
    return write_aside(path, lambda new: new.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> Path:
    """Write JSON aside, then rename it."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def claim_folder(folder: Path, marker: str = "config.yaml", reserve: bool = False) -> Path:
    """Create an output folder that no earlier run has used.

    Args:
        folder: the folder to create.
        marker: name of the file by which a run marks the folder as its own.
        reserve: also create an empty marker, so that of two runs that start at once one is refused.

    Raises:
        UserError: if it cannot be written, or `marker` shows that another run owns it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"output folder {folder} cannot be written ({error.strerror}); choose another") from None
    taken = UserError(f"output folder {folder} already holds a run; choose another folder")
    if not reserve and (folder / marker).exists():
        raise taken
    try:
        if reserve:
            (folder / marker).touch(exist_ok=False)
    except FileExistsError:
        raise taken from None
    return folder


BLOCK = 2**22
"""Bytes that `blocks` reads at once: enough that hashing, not reading, takes the time."""


def blocks(stream: BinaryIO, length: int) -> Iterator[bytes]:
    """The next `length` bytes of an open file, a block at a time; fewer if it ends before."""
    while length > 0 and (block := stream.read(min(length, BLOCK))):
        yield block
        length -= len(block)


def joint_hash(parts: Iterable[bytes]) -> str:
    """SHA-256 of byte strings one after the other, in hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_checksums(folder: Path) -> Path:
    """Record the SHA-256 of every file in a folder beside them, for `check_checksums`."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name != CHECKSUMS)
    return write_json(folder / CHECKSUMS, {"sha256": {file.name: file_hash(file) for file in files}})


def check_checksums(folder: Path, names: Iterable[str]) -> None:
    """Compare files with the hashes recorded beside them; a folder without a record is not checked.

    Args:
        folder: where the files are.
        names: the files that are about to be read.

    Raises:
        UserError: if a file is not the one that was written, or the record itself is damaged.
    """
    record = folder / CHECKSUMS
    if not record.is_file():
        return
    try:
        hashes = json.loads(record.read_text(encoding="utf-8"))["sha256"]
        known = {name: hashes[name] for name in names if name in hashes}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise UserError(f"{record} is damaged; copy the folder again") from None
    for name, expected in known.items():
        if (folder / name).is_file() and file_hash(folder / name) != expected:
            raise UserError(
                f"{folder / name} is not the file that was written: its SHA-256 is not the one in {CHECKSUMS}; "
                f"copy the folder again, or remove {CHECKSUMS} if you changed the file yourself"
            )


def finite(value: Any) -> Any:
    """A copy of plain values in which numbers that JSON cannot hold (NaN and infinities) are None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
