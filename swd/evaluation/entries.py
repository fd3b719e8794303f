"""The entries of `models`, which name the rows of an evaluation; nothing large is imported for them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swd.config import fits
from swd.io import limits
from swd.types import UserError

OPTIONS = {
    "name": str,
    "model": str,
    "base": str,
    "steps": int,
    "guidance_scale": int | float,
    "sigmas": list[float],
    "schedule": str | dict[str, Any],
}
"""Keys of an entry that is a mapping."""


def entry_of(entry: Any) -> dict[str, Any]:
    """An entry of `models` as a mapping with a name.

    Raises:
        UserError: for an unknown key, a value of another type, or a number out of range.
    """
    given = {"model": entry} if isinstance(entry, str) else entry
    if not isinstance(given, dict) or "model" not in given:
        raise UserError(f"models: {entry!r} is no model; give a path, or {{name: NAME, model: PATH, OPTION: VALUE}}")
    for key, value in given.items():
        if key not in OPTIONS:
            raise UserError(f"models: unknown key {key} in {entry!r}; known keys are {', '.join(OPTIONS)}")
        if not fits(value, OPTIONS[key]) or isinstance(value, bool):
            raise UserError(f"models: {key}={value!r} is not valid")
    if not given["model"].strip():
        raise UserError("models: an entry is empty; give a path, or teacher")
    named: dict[str, Any] = {"name": name_of(given["model"])} | given
    limits.whole(f"models: steps of {named['name']}", named.get("steps"), 1, limits.STEPS)
    scale = named.get("guidance_scale")
    limits.number(f"models: guidance_scale of {named['name']}", scale, 1, limits.GUIDANCE, limits.NO_GUIDANCE)
    return named


def check_row_names(names: Sequence[str]) -> None:
    """Raise UserError for a name that is no folder's, or that two models have."""
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9][\w.+-]{0,99}", name):
            raise UserError(
                f"models: {name!r} is no name of a row; use letters, digits, '.', '_', '-' and '+', e.g. "
                "{name: mine, model: FOLDER}"
            )
        # File systems may not tell capitals from small letters.
        if [other.lower() for other in names].count(name.lower()) > 1:
            raise UserError(f"models: two are called {name}; give one another name: {{name: NAME, model: ...}}")


def name_of(source: str) -> str:
    """The name of a row that is given none: the end of its path, with the folder above a run's time."""
    parts = [part for part in Path(source).parts if part not in ("/", "..")]
    last = Path(parts[-1]).stem if parts and parts[-1].endswith(".safetensors") else (parts or ["model"])[-1]
    if re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d|adapter|student", last) and len(parts) > 1:
        last = f"{parts[-2]}_{last}"
    return re.sub(r"[^\w.+-]+", "-", last, flags=re.ASCII).strip("-.") or "model"
