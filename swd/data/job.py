"""Long jobs that write shards: split over processes, resumed after a kill without a duplicate or a gap.

Row i of the job always lies in shard `i div shard_size`, whoever writes it. A process takes every `world`-th shard,
skips the complete ones, and whoever completes the last one writes the manifest. A complete shard that is no longer what
its index says is made again, and no manifest is written over one.
"""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import get_worker_info

from swd.config import first_difference
from swd.data.read_ahead import read_ahead
from swd.data.shards import MANIFEST, fault, is_done, read_manifest, shard_name, write_manifest, write_shard
from swd.io.files import claim_folder, file_hash, write_json
from swd.io.job_log import JobLog
from swd.io.masking import mask, mask_text
from swd.modules.model_folders import read_json
from swd.types import UserError

JOB = "job.json"
PARTIAL = ".partial"
"""Folder of finished rows whose shard is not complete yet, for jobs that keep such."""

MOST_ROWS = 10**7
"""Rows of one job: ten times the largest published set of generated captions and pictures that is trained from."""
MOST_IN_A_SHARD = 10**6
"""Rows of one shard, which is begun again after a kill; WebDataset's own examples have 10,000."""

CHECKERS = 4
"""Threads that check shards: about as many as make a local disk busy."""

Sample = tuple[str, Mapping[str, bytes], Mapping[str, int]]
"""Key, contents by ending, columns of the index."""


def share() -> tuple[int, int]:
    """This process's number and how many there are, from torchrun's or SLURM's environment; (0, 1) without."""
    for rank, world in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if rank in os.environ and world in os.environ:
            return int(os.environ[rank]), int(os.environ[world])
    return 0, 1


def is_first() -> bool:
    """Whether this process is the one that speaks for all, also among those that Lightning starts itself."""
    if "RANK" in os.environ or "SLURM_PROCID" in os.environ:
        return share()[0] == 0
    return all(os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "NODE_RANK"))


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
        told = next((word for word in ("No space left on device", "File too large") if word in str(error)), None)
        if told is None:
            raise
        raise UserError(
            f"loader processes have no room in shared memory ({told}); make /dev/shm larger (docker: --shm-size), or "
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
    """Tell on standard error what is about to happen, from the first process alone."""
    if is_first():
        print(mask_text(text), file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Job:
    """A job over rows 0..rows-1 whose results go to the shards of one folder.

    Attributes:
        folder: of the shards.
        kind: what they hold, for the manifest.
        rows: how many rows there are.
        shard_size: rows in a shard.
        settings: everything that decides what the shards hold; plain values, for the manifest.
        unit: what a row is called in the progress bar.
    """

    folder: Path
    kind: str
    rows: int
    shard_size: int
    settings: Mapping[str, Any]
    unit: str = "picture"

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return -(-self.rows // self.shard_size)

    def rows_of(self, shard: int) -> range:
        """The rows of a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.rows))

    @property
    def shards_left(self) -> list[int]:
        """The shards that are not complete, of all processes."""
        return [shard for shard in range(self.shards) if not is_done(self.folder, shard)]

    @property
    def rows_left(self) -> int:
        """How many rows they have."""
        return sum(len(self.rows_of(shard)) for shard in self.shards_left)

    @property
    def is_complete(self) -> bool:
        """Whether the manifest is there already, with all of its shards at their full length and their indices whole.

        Raises:
            UserError: if the manifest is damaged.
        """
        if not (self.folder / MANIFEST).is_file():
            return False
        try:
            entries = read_manifest(str(self.folder))["shards"]
        except UserError as error:
            told = str(error).rpartition(";")[0] or str(error)
            raise UserError(f"{told}; remove it, and the same command checks the shards and writes it again") from None
        sizes = {entry["file"]: entry["bytes"] for entry in entries}
        files = {file.name: file.stat().st_size for file in self.folder.glob("*.tar")}
        if not sizes.items() <= files.items() or self.shards_left:
            return False
        hashes = {entry["file"]: entry.get("index_sha256") for entry in entries}
        return all(told in (None, file_hash((self.folder / f).with_suffix(".idx"))) for f, told in hashes.items())

    def claim(self) -> None:
        """Make the folder, or take up the job that lies in it.

        Raises:
            UserError: if it cannot be written, holds something else, or a job of other settings; if it is too large.
        """
        self.check()
        claim_folder(self.folder)
        told = mask({"kind": self.kind, "rows": self.rows, "shard_size": self.shard_size, **self.settings})
        if not (self.folder / JOB).is_file():
            found = sorted(p.name for p in self.folder.iterdir() if not p.name.startswith("."))
            # Several processes start at once: another one's first files are no stranger's.
            if found and not (self.folder / JOB).is_file():
                raise UserError(f"out={self.folder} is not empty (it holds {found[0]}); choose another folder")
            write_json(self.folder / JOB, told)
        difference = first_difference(read_json(self.folder / JOB), told)
        if difference:
            raise UserError(f"out={self.folder} holds a job of other settings: {difference}; choose another folder")

    def check(self) -> None:
        """Raise UserError for a job without rows, or with more than one folder or shard should have."""
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
                done, for the progress bar. Rows may be left out.
            measured: more entries for the manifest, asked for when all is complete.
            task: what is done, on what and where to, in one line for people.

        Returns:
            The manifest if the whole job is complete, None while other processes are still at it.

        Raises:
            UserError: if a shard that another process made has been damaged since.
        """
        rank, world = share()
        mine = range(rank, self.shards, world)
        self._remove_strays(mine)
        self._remove_damaged(mine)
        left = [shard for shard in mine if not is_done(self.folder, shard)]
        total, todo = (sum(len(self.rows_of(shard)) for shard in shards) for shards in (mine, left))
        told = task or f"making {self.kind} in {self.folder}"
        with JobLog(told, total, self.unit, done=total - todo, shown=rank == 0 and todo > 0) as progress:
            for shard in left:
                write_shard(self.folder, shard, make(self.rows_of(shard), progress.advance))
        if self.shards_left:
            return None
        for reason in self._faults([shard for shard in range(self.shards) if shard not in mine]).values():
            raise UserError(f"out={self.folder}: {reason}; run the same command again, it makes this shard anew")
        manifest = write_manifest(self.folder, self.kind, self.shards, mask({**self.settings, **measured()}))
        # Half-written shards of killed processes, and what they kept; another one may be writing the manifest, too.
        for stray in (*self.folder.glob(".[0-9]*"), self.folder / PARTIAL):
            shutil.rmtree(stray, ignore_errors=True)
        return manifest

    def _faults(self, shards: Sequence[int]) -> dict[int, str]:
        """Which of these complete shards are not what their indices say, and why; reads all of them."""
        with JobLog(
            f"checking the shards that lie in {self.folder}", len(shards), "shard", shown=is_first() and bool(shards)
        ) as progress:
            found = {}
            # Hashing frees the interpreter; more threads than this seldom read faster.
            reasons = read_ahead(lambda shard: fault(self.folder, shard), shards, CHECKERS, 2 * CHECKERS)
            for shard, reason in zip(shards, reasons, strict=True):
                if reason is not None:
                    found[shard] = reason
                progress.advance()
        return found

    def _remove_damaged(self, mine: range) -> None:
        """Remove the complete shards of this process's share that have been cut or changed since they were made."""
        for shard, reason in self._faults([shard for shard in mine if is_done(self.folder, shard)]).items():
            warnings.warn(f"{self.folder}: {reason}; it is made again", stacklevel=3)
            for ending in (".tar", ".idx"):
                (self.folder / (shard_name(shard) + ending)).unlink(missing_ok=True)

    def _remove_strays(self, mine: range) -> None:
        """Remove what killed processes left of this process's shards: nobody else can be at work on these."""
        for stray in self.folder.glob(".[0-9]*"):
            number = stray.name[1:].split(".")[0]
            if number.isdigit() and int(number) in mine:
                shutil.rmtree(stray, ignore_errors=True)
