"""Long jobs that write shards: split over processes, resumed after a kill without a duplicate or a gap.

Row i of the job always lies in shard `i div shard_size`, whoever writes it. A process takes every `world`-th shard,
skips the complete ones, and whoever completes the last one writes the manifest.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from swd.config import first_difference
from swd.data.shards import MANIFEST, is_done, write_manifest, write_shard
from swd.files import claim_folder, write_json
from swd.masking import mask
from swd.modules.pretrained import read_json
from swd.types import UserError

JOB = "job.json"
PARTIAL = ".partial"
"""Folder of finished rows whose shard is not complete yet, for jobs that keep such."""

Sample = tuple[str, Mapping[str, bytes], Mapping[str, int]]
"""Key, contents by ending, columns of the index."""


def share() -> tuple[int, int]:
    """This process's number and how many there are, from torchrun's or SLURM's environment; (0, 1) without."""
    for rank, world in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if rank in os.environ and world in os.environ:
            return int(os.environ[rank]), int(os.environ[world])
    return 0, 1


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
        """Whether the manifest is there already."""
        return (self.folder / MANIFEST).is_file()

    def claim(self) -> None:
        """Make the folder, or take up the job that lies in it.

        Raises:
            UserError: if it cannot be written, holds something else, or a job of other settings.
        """
        if self.shard_size < 1:
            raise UserError(f"shard_size={self.shard_size}; use at least 1")
        if self.rows < 1:
            raise UserError("there is nothing to do: the list of samples is empty")
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

    def run(
        self,
        make: Callable[[range, Callable[[int], object]], Iterator[Sample]],
        measured: Callable[[], Mapping[str, Any]] = dict,
    ) -> dict[str, Any] | None:
        """Make every shard of this process's share that is not complete yet.

        Args:
            make: yields the samples of a range of rows in order, and calls its second argument with the number of rows
                done, for the progress bar. Rows may be left out.
            measured: more entries for the manifest, asked for when all is complete.

        Returns:
            The manifest if the whole job is complete, None while other processes are still at it.
        """
        rank, world = share()
        mine = range(rank, self.shards, world)
        self._remove_strays(mine)
        left = [shard for shard in mine if not is_done(self.folder, shard)]
        total, todo = (sum(len(self.rows_of(shard)) for shard in shards) for shards in (mine, left))
        bar = tqdm(total=total, initial=total - todo, unit=self.unit, disable=rank != 0 or not todo, mininterval=1)
        with bar:
            for shard in left:
                write_shard(self.folder, shard, make(self.rows_of(shard), bar.update))
        if self.shards_left:
            return None
        manifest = write_manifest(self.folder, self.kind, self.shards, mask({**self.settings, **measured()}))
        # Half-written shards of killed processes, and what they kept; another one may be writing the manifest, too.
        for stray in (*self.folder.glob(".[0-9]*"), self.folder / PARTIAL):
            shutil.rmtree(stray, ignore_errors=True)
        return manifest

    def _remove_strays(self, mine: range) -> None:
        """Remove what killed processes left of this process's shards: nobody else can be at work on these."""
        for stray in self.folder.glob(".[0-9]*"):
            number = stray.name[1:].split(".")[0]
            if number.isdigit() and int(number) in mine:
                shutil.rmtree(stray, ignore_errors=True)
