"""The candidates of an evaluation: models that draw, and folders of pictures that somebody else drew."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from swd.data.identity import attention_kernel, quantized_layers, whole_fingerprint
from swd.data.picture_files import PICTURES
from swd.io.tables import read_table
from swd.metrics.features import picture_files
from swd.modules.pretrained import Pretrained
from swd.modules.requests import Requests
from swd.modules.saved_student import Student
from swd.scheduler import ScaleWiseScheduler
from swd.types import Size, UserError

LISTINGS = ("index.jsonl", "index.csv", "metainfo.csv")
"""Lists that a folder of pictures may hold: which file is the picture of which row."""


@dataclass(frozen=True)
class DrawingModel:
    """A teacher or a student that draws every picture; nothing large is loaded yet.

    Attributes:
        name: of its row.
        source: "teacher", or what the user named.
        model: the base.
        student: adapter or network; None: the teacher.
        schedule: the student's sampler.
        size: latent size of finished pictures.
        steps: of its sampler.
        sigmas: noise levels of the teacher's steps; None: those of its own sampler.
    """

    name: str
    source: str
    model: Pretrained
    student: Student | None
    schedule: ScaleWiseScheduler | None
    size: Size
    steps: int
    sigmas: tuple[float, ...] | None = None

    @property
    def passes(self) -> int:
        """Network evaluations in each step: with classifier-free guidance two."""
        return 2 if self.student is None and self.model.drawing_guidance_scale > 1 else 1

    @property
    def evaluations(self) -> int:
        """Network evaluations per picture."""
        return self.steps * self.passes

    @property
    def step_sizes(self) -> list[Size]:
        """The latent size of every step."""
        if self.schedule is None:
            return [self.size] * self.steps
        return [tuple(size) for size in self.schedule.sizes_ending_at(self.size)]

    def settings(self) -> dict[str, Any]:
        """Everything beside prompts and seeds that a picture depends on, as plain values."""
        model = self.model
        teacher = {"guidance_scale": model.drawing_guidance_scale, "sigmas": self.sigmas and list(self.sigmas)}
        # Earlier versions did not record these; null is left out, so that their evaluations go on.
        later: dict[str, str | None] = {"vae_precision": model.vae_precision}
        later |= {} if self.student else {"negative_prompt": model.negative_prompt}
        return {
            "model": {"name": model.name, "fingerprint": whole_fingerprint(model)},
            "student": self.student.hash if self.student else None,
            "schedule": _plain(self.schedule.config) if self.schedule else None,
            "steps": self.steps,
            "embedded_guidance": model.embedded_guidance,
            "max_text_tokens": model.max_text_tokens,
            "precision": model.precision,
            "quantization": model.quantization,
            "size": list(model.pixel_size(self.size)),
            **quantized_layers(model),
            **attention_kernel(model),
            **{key: value for key, value in later.items() if value is not None},
        } | ({} if self.student else teacher)


@dataclass(frozen=True)
class GivenPictures:
    """Pictures that lie in a folder: of another program, or real ones.

    Attributes:
        name: of its row.
        source: the folder, as the user named it.
        files: the picture of each row.
    """

    name: str
    source: str
    files: tuple[Path, ...]

    def settings(self) -> dict[str, Any]:
        """Identity of the pictures: names, lengths and times of change; reading all of them would take long."""
        digest = hashlib.sha256()
        for file in self.files:
            known = file.stat()
            digest.update(f"{file.name}\0{known.st_size}\0{known.st_mtime_ns}\n".encode())
        return {"pictures": digest.hexdigest()[:16]}


Candidate = DrawingModel | GivenPictures


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's configuration as JSON gives it back, without the version of the library that read it."""
    kept = {key: value for key, value in dict(config).items() if not key.startswith("_")}
    plain: dict[str, Any] = json.loads(json.dumps(kept, default=list))
    return plain


# Folders of pictures


def holds_pictures(folder: Path) -> bool:
    """Whether a folder holds pictures or a list of some; looks at its own files only."""
    if not folder.is_dir():
        return False
    return any((folder / name).is_file() for name in LISTINGS) or any(
        file.suffix.lower() in PICTURES for file in folder.iterdir()
    )


def given_pictures(name: str, source: str, requests: Requests) -> GivenPictures:
    """The pictures of a folder, matched to rows by its list, else by the numbers that its files are called.

    Args:
        name: of the row.
        source: the folder.
        requests: the pictures that the models draw, one a row.

    Raises:
        UserError: if a picture is missing or unreadable, or was drawn of another prompt.
    """
    folder = Path(source)
    listing = next((folder / each for each in LISTINGS if (folder / each).is_file()), None)
    found = _listed(listing, requests) if listing else _numbered(folder)
    missing = next((row for row in range(len(requests)) if row not in found), None)
    if missing is not None:
        raise UserError(
            f"models: {source} has no picture of row {missing} (of {len(requests)}); name files by their row "
            f"({missing:08d}.png), or list them in index.csv with the columns index and file"
        )
    files = tuple(found[row] for row in range(len(requests)))
    check_readable(files, "models")
    return GivenPictures(name, source, files)


def real_pictures(folder: Path) -> GivenPictures:
    """The pictures of a folder, in order of their names.

    Raises:
        UserError: if there are none, or one is unreadable.
    """
    files = tuple(picture_files(folder))
    check_readable(files, "reference")
    return GivenPictures("reference", str(folder), files)


def check_readable(files: Sequence[Path], key: str) -> None:
    """Raise UserError for the first file that is no picture; reads the beginning of each."""
    for file in files:
        try:
            with Image.open(file):
                pass
        except (OSError, ValueError, Image.DecompressionBombError):
            raise UserError(f"{key}: {file} is missing or no picture; copy it again, or take it out") from None


def _numbered(folder: Path) -> dict[int, Path]:
    """Pictures by the number that their names are."""
    found: dict[int, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in PICTURES and re.fullmatch(r"\d{1,12}", file.stem):
            row = int(file.stem)
            if row in found:
                raise UserError(f"models: {found[row]} and {file} are both of row {row}; take one out")
            found[row] = file
    return found


def _listed(listing: Path, requests: Requests) -> dict[int, Path]:
    """Pictures by row, as a list in their folder says; prompts in it must be those of the evaluation."""
    table = read_table(listing, "models: ")
    faulty = next((row for row in table.rows if row.fault), None)
    if faulty is not None:
        raise UserError(f"models: {listing}, line {faulty.line}: {faulty.fault}")
    index = table.column(("index",))
    file = table.needed(("file", "file_name", "filename", "path"), "models: ")
    prompt, seed = table.column(("prompt", "caption", "text")), table.column(("seed",))
    found: dict[int, Path] = {}
    for number, line in enumerate(table.rows):
        text = str(number if index is None else line.cells[index]).strip()
        if not re.fullmatch(r"\d{1,12}", text):
            raise UserError(f"models: {listing}, line {line.line}: index {text[:40]!r} is no row's number")
        row = int(text)
        if row >= len(requests):
            continue
        wanted = requests[row]
        if prompt is not None and str(line.cells[prompt]).strip() != wanted.prompt:
            raise UserError(
                f"models: {listing}, line {line.line}: row {row} is of {str(line.cells[prompt])[:60]!r}, and here it "
                f"is {wanted.prompt[:60]!r}; draw the same prompts in the same order"
            )
        if seed is not None and str(line.cells[seed]).strip() not in ("", "None", str(wanted.seed)):
            raise UserError(
                f"models: {listing}, line {line.line}: row {row} has seed {line.cells[seed]}, and here it is "
                f"{wanted.seed}; give seed= of those pictures, or take the column out"
            )
        found[row] = Path(os.path.normpath(listing.parent / str(line.cells[file]).strip()))
    return found
