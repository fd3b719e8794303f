"""Recognises an error that says that a device or the machine has too little memory."""

from __future__ import annotations

import re

WORDS = re.compile(r"out of memory|can't allocate memory|not enough memory|Cannot allocate memory", re.IGNORECASE)


def out_of_memory(error: BaseException | None) -> str | None:
    """How much could not be allocated, in words, if an error or a cause of it is of too little memory; else None."""
    while error is not None:
        text = " ".join(str(error).split())
        known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        if known or (isinstance(error, RuntimeError | OSError) and WORDS.search(text)):
            return _asked(text)
        error = error.__cause__
    return None


def _asked(text: str) -> str:
    """The size that an allocator was asked for, as its message says it."""
    found = re.search(r"tried to allocate ([\d.]+) ?(bytes|[KMGT]i?B)", text, re.IGNORECASE)
    if found is None:
        return "out of memory"
    if found[2].lower() == "bytes":
        return f"out of memory, {float(found[1]) / 1e9:.3g} GB more were asked for"
    return f"out of memory, {found[1]} {found[2]} more were asked for"
