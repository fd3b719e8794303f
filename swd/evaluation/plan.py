"""The plan of an evaluation: models x prompts x seeds, resolved and hashed, and the folder that belongs to it.

    FOLDER/plan.json                                   what the folder's pictures are of
    FOLDER/pictures/MODEL/00000000.png, index.jsonl    pictures by row
    FOLDER/costs/MODEL.json                            FLOPs, latency, memory
    FOLDER/features/MODEL/EXTRACTOR/00000.safetensors  features of a chunk of rows
    FOLDER/scores/METRIC.json                          numbers and intervals
    FOLDER/results.json, table.md, table.csv, report.html

Rows are split into chunks, and a process does every `world`-th chunk from drawing to features. So none waits for
another, and whichever finishes last scores.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from swd.config import first_difference
from swd.data.job import share
from swd.evaluation.candidates import Candidate, DrawingModel, GivenPictures
from swd.io.files import claim_folder, write_json
from swd.io.masking import mask
from swd.metrics.external import INDEX, write_picture_index
from swd.modules.model_folders import read_json
from swd.modules.requests import Requests
from swd.types import UserError

PLAN = "plan.json"
FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """The pictures of an evaluation: who draws which prompts.

    Attributes:
        folder: where everything goes.
        prompts: the list's name, for the record.
        requests: prompt and seed of each row; row i is the same for all candidates.
        candidates: what is compared; differences are taken to the first one.
        batch_size: pictures drawn, and read by an extractor, at once.
        chunk_size: rows that one process does from drawing to features.
        share: number of this process and number of processes; the launcher's unless one process does all.
    """

    folder: Path
    prompts: str
    requests: Requests
    candidates: tuple[Candidate, ...]
    batch_size: int
    chunk_size: int
    share: tuple[int, int] = field(default_factory=share)

    @property
    def chunks(self) -> list[range]:
        """Rows of each chunk."""
        return chunks_of(len(self.requests), self.chunk_size)

    @cached_property
    def rows_hash(self) -> str:
        """SHA-256 of all prompts and seeds."""
        return self.requests.hash()

    def settings(self) -> dict[str, Any]:
        """Settings that every picture in the folder depends on, as plain values."""
        return {
            "format": FORMAT,
            "prompts": {"count": len(self.requests.rows), "hash": key_of({"rows": list(self.requests.rows)})},
            "images_per_prompt": self.requests.copies,
            "seed": self.requests.seed,
            "chunk_size": self.chunk_size,
            "models": self.model_settings,
        }

    @cached_property
    def model_settings(self) -> dict[str, dict[str, Any]]:
        """Settings of each candidate that decide its pictures, beside prompts and seeds, with hashes of weights."""
        return {candidate.name: candidate.settings() for candidate in self.candidates}

    def claim(self) -> None:
        """Create the folder, or continue the plan that it holds; models may be added to it, or left out.

        Raises:
            UserError: if it holds other files, other prompts or seeds, or another model of the same name.
        """
        claim_folder(self.folder)
        file, settings = self.folder / PLAN, mask(self.settings())
        if not file.is_file():
            found = sorted(p.name for p in self.folder.iterdir() if not p.name.startswith("."))
            # Another process of this evaluation may have written the plan since the first check.
            if found and not file.is_file():
                raise UserError(f"{self.folder} is not empty (it holds {found[0]}); choose another name=")
            write_json(file, settings)
            return
        known = read_json(file)
        earlier = dict(known.get("models") or {})
        models = settings["models"]
        settings["models"] = earlier | models
        kept = {**known, "models": {name: known_as for name, known_as in earlier.items() if name in models}}
        difference = first_difference(kept, {**settings, "models": {name: models[name] for name in kept["models"]}})
        if difference:
            raise UserError(f"{self.folder} holds another evaluation: {difference}; choose another name=")
        if settings != known:
            write_json(file, settings)

    # Pictures

    def pictures(self, candidate: Candidate) -> Pictures:
        """Where the pictures of a candidate lie."""
        folder = self.folder / "pictures" / candidate.name
        if isinstance(candidate, GivenPictures):
            return Pictures(candidate.files, key_of(self.model_settings[candidate.name]))
        files = tuple(folder / f"{row:08d}.png" for row in range(len(self.requests)))
        return Pictures(files, key_of({"rows": self.rows_hash, **self.model_settings[candidate.name]}))

    def write_index(self, candidate: Candidate) -> None:
        """Write index.jsonl once all pictures are there: a line with index, prompt, seed and file for each."""
        folder = self.folder / "pictures" / candidate.name
        if (folder / INDEX).is_file() and isinstance(candidate, DrawingModel):
            return
        rows = []
        for row, file in enumerate(self.pictures(candidate).files):
            request = self.requests[row]
            name = file.name if isinstance(candidate, DrawingModel) else str(file.absolute())
            rows.append({"index": row, "prompt": request.prompt, "seed": request.seed, "file": name})
        write_picture_index(folder, rows)


@dataclass(frozen=True)
class Pictures:
    """Files of pictures in order of their rows, and a hash of everything that they depend on."""

    files: Sequence[Path]
    key: str


def chunks_of(rows: int, size: int) -> list[range]:
    """Rows 0..rows-1 in ranges of `size`, the last one shorter."""
    return [range(start, min(start + size, rows)) for start in range(0, rows, size)]


def mine(chunks: Sequence[range], share: tuple[int, int]) -> Iterator[tuple[int, range]]:
    """Number and rows of the chunks of a process: every `world`-th one."""
    rank, world = share
    return ((number, chunks[number]) for number in range(rank, len(chunks), world))


def key_of(value: Mapping[str, Any]) -> str:
    """A hash of plain values, to tell whether what was computed from them is still valid."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]
