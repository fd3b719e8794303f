"""Features of pictures, stored chunk by chunk; what was computed from other pictures or weights is computed again.

Each chunk is a safetensors file whose metadata hold a hash of what its features depend on: the pictures, the extractor
with its preparation, and the extractor's weights. So no list of finished chunks can disagree with the files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from swd.evaluation.plan import Pictures, chunks_of, key_of, mine
from swd.io.files import clear_leftovers, write_aside
from swd.io.job_log import JobLog
from swd.metrics.base import Extractor, TextExtractor
from swd.metrics.features import extract, read_pictures

NAME = "features"


@dataclass(frozen=True)
class FeatureFiles:
    """Features `[N, D]` of N rows in one folder.

    Attributes:
        folder: of the chunks.
        rows: N.
        chunk_size: rows of a chunk.
        key: hash of everything that the features depend on.
        share: number of this process and number of processes.
    """

    folder: Path
    rows: int
    chunk_size: int
    key: str
    share: tuple[int, int] = (0, 1)

    @property
    def chunks(self) -> list[range]:
        """Rows of each chunk."""
        return chunks_of(self.rows, self.chunk_size)

    def file(self, chunk: int) -> Path:
        """The file of a chunk."""
        return self.folder / f"{chunk:05d}.safetensors"

    def is_done(self, chunk: int) -> bool:
        """Whether a chunk is there, and of these pictures and weights."""
        try:
            with safe_open(self.file(chunk), "pt") as file:
                return (file.metadata() or {}).get("key") == self.key
        except (OSError, SafetensorError):
            return False

    @property
    def is_complete(self) -> bool:
        """Whether all chunks of all processes are done."""
        return all(self.is_done(chunk) for chunk in range(len(self.chunks)))

    def write(self, chunk: int, features: Tensor) -> None:
        """Store the features of a chunk."""
        assert len(features) == len(self.chunks[chunk]), f"{len(features)} rows for chunk {chunk}"
        content = {NAME: features.float().cpu().contiguous()}
        write_aside(self.file(chunk), lambda new: save_file(content, new, {"key": self.key}))

    def load(self) -> Tensor:
        """All features `[N, D]`, float32, in order of the rows."""
        return torch.cat([load_file(self.file(chunk))[NAME] for chunk in range(len(self.chunks))])


def key_for(extractor: str, weights: str, source: str) -> str:
    """The hash of features.

    Args:
        extractor: its name, which says the preparation of pictures.
        weights: hash of its weights.
        source: hash of the pictures or prompts.
    """
    return key_of({"extractor": extractor, "weights": weights, "source": source})


def extract_missing(store: FeatureFiles, compute: Callable[[range], Tensor], task: str, unit: str = "picture") -> None:
    """Compute this process's share of the chunks that are missing.

    Args:
        store: where they go.
        compute: features `[B, D]` of a range of rows.
        task: description in one line.
        unit: name of a row.
    """
    clear_leftovers(store.folder)
    shares = list(mine(store.chunks, store.share))
    left = [(chunk, rows) for chunk, rows in shares if not store.is_done(chunk)]
    total, todo = (sum(len(rows) for _, rows in each) for each in (shares, left))
    with JobLog(task, total, unit, done=total - todo, shown=store.share[0] == 0 and todo > 0) as progress:
        for chunk, rows in left:
            store.write(chunk, compute(rows))
            progress.advance(len(rows))


def picture_features(extractor: Extractor, pictures: Pictures, batch_size: int) -> Callable[[range], Tensor]:
    """A function that gives features of rows, read from their files."""
    device = _device()

    def compute(rows: range) -> Tensor:
        return extract(extractor, read_pictures(pictures.files[row] for row in rows), batch_size, device)

    return compute


def prompt_features(extractor: TextExtractor, prompts: Sequence[str], batch_size: int) -> Callable[[range], Tensor]:
    """A function that gives features of the prompts of rows."""
    device = _device()

    def compute(rows: range) -> Tensor:
        texts = [prompts[row] for row in rows]
        parts = [
            extractor.prompt_features(texts[start : start + batch_size], device).cpu()
            for start in range(0, len(texts), batch_size)
        ]
        return torch.cat(parts)

    return compute


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
