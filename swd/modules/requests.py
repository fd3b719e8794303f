"""Requests for pictures or videos, each a prompt and a seed, and the lists that they come from."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swd.io import limits
from swd.io.tables import NoText, read_table, text_of
from swd.types import UserError


@dataclass(frozen=True)
class Request:
    """One picture or video to draw."""

    prompt: str
    seed: int

    @property
    def stem(self) -> str:
        """File name without its ending."""
        words = re.sub(r"[\W_]+", "-", self.prompt.lower()).strip("-")[:60]
        words = words.encode()[:180].decode(errors="ignore").rstrip("-")  # file names are limited in bytes
        return f"{words or 'empty'}_seed{self.seed}"


class Requests(Sequence[Request]):
    """One request a row: `copies` of each prompt, with seeds that count up; made when they are asked for.

    Args:
        rows: prompts, and their seeds where the list gives some.
        copies: pictures of each.
        seed: of the first row; a row whose prompt has no seed takes this plus its number.

    Raises:
        UserError: if there are too many, or a seed is out of range.
    """

    def __init__(self, rows: Sequence[tuple[str, int | None]], copies: int, seed: int) -> None:
        self.rows = rows
        self.copies = copies
        self.seed = seed
        count = len(rows) * copies
        if count > limits.MOST_ROWS:
            raise UserError(
                f"images_per_prompt={copies} of {len(rows)} prompts are {count} pictures, more than one folder holds; "
                f"use at most {max(1, limits.MOST_ROWS // len(rows))}"
            )
        for number in range(len(rows)):
            for row in (number * copies, number * copies + copies - 1):
                limits.seed("seed", self._seed(row))

    def __len__(self) -> int:
        return len(self.rows) * self.copies

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        if not 0 <= row < len(self):
            raise IndexError(row)
        return Request(self.rows[row // self.copies][0], self._seed(row))

    def _seed(self, row: int) -> int:
        own = self.rows[row // self.copies][1]
        return self.seed + row if own is None else own + row % self.copies

    def hash(self) -> str:
        """SHA-256 of all prompts and seeds."""
        digest = hashlib.sha256(b"[")
        for number, request in enumerate(self):
            digest.update(
                (", " * (number > 0) + json.dumps([request.prompt, request.seed], ensure_ascii=False)).encode()
            )
        digest.update(b"]")
        return digest.hexdigest()


def read_prompts(
    file: Path, key: str = "prompts_file", columns: Sequence[str] = ("prompt",)
) -> list[tuple[str, int | None]]:
    """Prompts, and their seeds where given, of a list.

    Args:
        file: a text file (a prompt a line), or a `.csv`, `.tsv` or `.jsonl` table with a column "prompt" and, if
            seeds are given, one "seed".
        key: what messages call it.
        columns: what the column of prompts may be called; the first name that is there counts.

    Raises:
        UserError: if the file is missing, empty, has no such column, or a line of it is faulty.
    """
    table = read_table(file, f"{key}=")
    if not table.rows:
        raise UserError(f"{key}={file} holds no prompt")
    faulty = next((row for row in table.rows if row.fault), None)
    if faulty is not None:
        raise UserError(f"{key}={file}, line {faulty.line}: {faulty.fault}")
    prompts, seeds = table.needed(columns, f"{key}="), table.column(("seed",))
    rows: list[tuple[str, int | None]] = []
    for row in table.rows:
        where = f"{key}={file}, line {row.line}"
        try:
            prompt = text_of(row.cells[prompts]).strip()
        except NoText as error:
            raise UserError(f"{where}: the prompt {error}; mend the line, or take it out") from None
        rows.append((prompt, None if seeds is None else _seed(row.cells[seeds], where)))
    return rows


def _seed(cell: Any, where: str) -> int | None:
    """A seed in a table; None for an empty cell."""
    text = "" if cell is None else str(cell).strip()
    if not text:
        return None
    if isinstance(cell, str | int) and re.fullmatch("[0-9]{1,19}", text) and int(text) < 2**63:
        return int(text)
    raise UserError(f"{where}: seed {text[:40]!r} is not a whole number of 0 or more, below 2^63")


def check_filled(rows: Sequence[tuple[str, int | None]], file: str, key: str = "prompts") -> None:
    """Raise UserError if one of the prompts that `read_prompts` gave is empty."""
    for number, (prompt, _) in enumerate(rows, 1):
        if not prompt:
            raise UserError(f"{key}={file}: prompt {number} is empty; remove the line")
