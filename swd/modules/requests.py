"""A request for one picture or video: its prompt and its seed."""

from __future__ import annotations

import re
from dataclasses import dataclass


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
