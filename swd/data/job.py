"""Long jobs that write shards: split over processes, and resumed after a kill without duplicates or gaps.

Row i of the job always lies in shard `i div shard_size`, whichever process writes it. A process takes every `world`-th
shard and skips the complete ones; the process that completes the last shard writes the manifest. A complete shard that
does not match its index any more is made again, and no manifest is written while a shard is damaged.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import get_worker_info

from swd.config import first_difference
from swd.data.manifest import MANIFEST, read_manifest
from swd.data.read_ahead import read_ahead
from swd.data.shard_writer import fault, is_done, shard_name, write_manifest, write_shard
from swd.io import job_log
from swd.io.files import claim_folder, file_hash, write_json
from swd.io.folder_lock import held_share
from swd.io.job_log import JobLog
from swd.io.limits import MOST_IN_A_SHARD, MOST_ROWS
from swd.io.masking import mask
from swd.io.ranks import is_first, share
from swd.modules.model_folders import read_json
from swd.types import UserError

JOB = "job.json"
PARTIAL = ".partial"
"""Folder for finished rows of shards that are not complete yet; only some jobs use it."""

CHECKERS = 4
"""Threads that check shards: about as many as keep a local disk busy."""

Sample = tuple[str, Mapping[str, bytes], Mapping[str, int]]
"""Key, contents by ending, columns of the index."""


def in_shared_memory(value: Any) -> Any:
    """In a loader process, put the tensors of a batch where the training process reads them; elsewhere do nothing.

    A loader does so itself, but in a thread, where a failure loses the batch and leaves the training waiting for ever.

    Returns:
        `value` itself.

    Raises:
        UserError: if there is no room.
    """
    if get_worker_info() is None:
        return value
    try:
        _share(value)
    except (RuntimeError, OSError) as error:
        fault = next((words for words in ("No space left on device", "File too large") if words in str(error)), None)
        if fault is None:
            raise
        raise UserError(
            f"loader processes have no room in shared memory ({fault}); make /dev/shm larger (docker: --shm-size), or "
            "use data.workers=0"
        ) from None
    return value


def _share(value: Any) -> None:
    if isinstance(value, Tensor):
        value.share_memory_()
    elif is_dataclass(value):
        _share([getattr(value, field.name) for field in fields(value)])
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            _share(part)


def say(text: str) -> None:
    """Print a line on standard error, from the first process only."""
    if is_first():
        job_log.print_line(text)


@dataclass(frozen=True)
class Job:
    """A job that turns rows 0..rows-1 into the shards of one folder.

    Attributes:
        folder: folder of the shards.
        kind: their content, one of `swd.data.manifest.KINDS`, for the manifest.
        rows: number of rows.
        shard_size: rows in a shard.
        settings: everything that the content of the shards depends on; plain values, for the manifest.
        unit: name of a row in messages.
    """

    folder: Path
    kind: str
    rows: int
    shard_size: int
    settings: Mapping[str, Any]
    unit: str = "picture"

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.shard_size)

    def rows_of(self, shard: int) -> range:
        """The rows of a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.rows))

    @property
    def shards_left(self) -> list[int]:
        """Shards of all processes that are not complete."""
        return [shard for shard in range(self.shards) if not is_done(self.folder, shard)]

    @property
    def rows_left(self) -> int:
        """Number of rows in these shards."""
        return sum(len(self.rows_of(shard)) for shard in self.shards_left)

    @property
    def is_complete(self) -> bool:
        """Whether the manifest exists, all its shards have their full length, and their indices are unchanged.

        Raises:
            UserError: if the manifest is damaged.
        """
        if not (self.folder / MANIFEST).is_file():
            return False
        try:
            entries = read_manifest(str(self.folder))["shards"]
        except UserError as error:
            message = str(error).rpartition(";")[0] or str(error)
            raise UserError(
                f"{message}; remove it, and the same command checks the shards and writes it again"
            ) from None
        sizes = {entry["file"]: entry["bytes"] for entry in entries}
        files = {file.name: file.stat().st_size for file in self.folder.glob("*.tar")}
        if not sizes.items() <= files.items() or self.shards_left:
            return False
        hashes = {entry["file"]: entry.get("index_sha256") for entry in entries}
        return all(
            recorded in (None, file_hash((self.folder / file).with_suffix(".idx"))) for file, recorded in hashes.items()
        )

    def claim(self) -> None:
        """Create the folder, or continue the job that it holds.

        Raises:
            UserError: if the job is too large, or the folder cannot be written, holds other files or a job with other
                settings.
        """
        self.check()
        claim_folder(self.folder)
        settings = mask({"kind": self.kind, "rows": self.rows, "shard_size": self.shard_size, **self.settings})
        if not (self.folder / JOB).is_file():
            found = sorted(p.name for p in self.folder.iterdir() if not p.name.startswith("."))
            # A process of the same job may have written its files since the first check; then the job file exists.
            if found and not (self.folder / JOB).is_file():
                raise UserError(f"out={self.folder} is not empty (it holds {found[0]}); choose another folder")
            write_json(self.folder / JOB, settings)
        difference = first_difference(read_json(self.folder / JOB), settings)
        if difference:
            raise UserError(f"out={self.folder} holds a job of other settings: {difference}; choose another folder")

    def check(self) -> None:
        """Raise UserError for a job without rows, or with too many rows for one folder or one shard."""
        if not 1 <= self.shard_size <= MOST_IN_A_SHARD:
            limit = "at least 1" if self.shard_size < 1 else f"at most {MOST_IN_A_SHARD}"
            raise UserError(f"shard_size={self.shard_size}; use {limit}")
        if self.rows < 1:
            raise UserError("there is nothing to do: the list of samples is empty")
        if self.rows > MOST_ROWS:
            raise UserError(
                f"{self.rows} {self.unit}s are more than one folder holds ({MOST_ROWS}); make them in several folders"
            )

    def run(
        self,
        make: Callable[[range, Callable[[int], object]], Iterator[Sample]],
        measured: Callable[[], Mapping[str, Any]] = dict,
        task: str | None = None,
    ) -> dict[str, Any] | None:
        """Make every shard of this process's share that is not complete yet.

        Args:
            make: yields the samples of a range of rows in order, and calls its second argument with the number of rows
                done, for the progress bar. It may leave out rows.
            measured: returns more entries for the manifest; called when all shards are complete.
            task: description of the job in one line, with its input and output.

        Returns:
            The manifest if the whole job is complete, None if other processes are still working.

        Raises:
            UserError: if a shard that another process made has been damaged since, or another program makes this
                process's shards.
        """
        rank, world = share()
        with held_share(self.folder, rank, world):
            return self._run(rank, world, make, measured, task)

    def _run(
        self,
        rank: int,
        world: int,
        make: Callable[[range, Callable[[int], object]], Iterator[Sample]],
        measured: Callable[[], Mapping[str, Any]],
        task: str | None,
    ) -> dict[str, Any] | None:
        """`run`, as process `rank` of `world`."""
        # Clear what earlier processes left, and see what there is to do.
        mine = range(rank, self.shards, world)
        self._remove_strays(mine)
        self._remove_damaged(mine)
        left = [shard for shard in mine if not is_done(self.folder, shard)]
        total = sum(len(self.rows_of(shard)) for shard in mine)
        todo = sum(len(self.rows_of(shard)) for shard in left)

        # Make the shards.
        description = task or f"making {self.kind} in {self.folder}"
        with JobLog(description, total, self.unit, done=total - todo, shown=rank == 0 and todo > 0) as progress:
            for shard in left:
                write_shard(self.folder, shard, make(self.rows_of(shard), progress.advance))
        if self.shards_left:
            return None

        # All are complete: check those of other processes, and finish.
        for reason in self._faults([shard for shard in range(self.shards) if shard not in mine]).values():
            raise UserError(f"out={self.folder}: {reason}; run the same command again, it makes this shard anew")
        manifest = write_manifest(self.folder, self.kind, self.shards, mask({**self.settings, **measured()}))
        # Remove what killed processes left. Another process may be doing the same at this moment.
        for stray in (*self.folder.glob(".[0-9]*"), self.folder / PARTIAL):
            shutil.rmtree(stray, ignore_errors=True)
        return manifest

    def _faults(self, shards: Sequence[int]) -> dict[int, str]:
        """Complete shards that do not match their indices, each with the reason; reads all of the given shards."""
        with JobLog(
            f"checking the shards that lie in {self.folder}", len(shards), "shard", shown=is_first() and bool(shards)
        ) as progress:
            found = {}
            # Threads help because hashing releases the interpreter's lock; with more of them, reading is seldom faster.
            reasons = read_ahead(lambda shard: fault(self.folder, shard), shards, CHECKERS, 2 * CHECKERS)
            for shard, reason in zip(shards, reasons, strict=True):
                if reason is not None:
                    found[shard] = reason
                progress.advance()
        return found

    def _remove_damaged(self, mine: range) -> None:
        """Remove complete shards of this process's share that have been cut or changed since they were made."""
        for shard, reason in self._faults([shard for shard in mine if is_done(self.folder, shard)]).items():
            warnings.warn(f"{self.folder}: {reason}; it is made again", stacklevel=3)
            for ending in (".tar", ".idx"):
                (self.folder / (shard_name(shard) + ending)).unlink(missing_ok=True)

    def _remove_strays(self, mine: range) -> None:
        """Remove temporary folders of this process's shards; no other process can be working on these shards."""
        for stray in self.folder.glob(".[0-9]*"):
            number = stray.name[1:].split(".")[0]
            if number.isdigit() and int(number) in mine:
                shutil.rmtree(stray, ignore_errors=True)
