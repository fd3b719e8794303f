"""Counts prompts that are longer than a model's text encoders read; the encoders cut the rest without a warning."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from swd.io.job_log import JobLog
from swd.modules.pretrained import Pretrained

AT_ONCE = 1000
"""Prompts given to a tokenizer in one call."""
MANY = 100_000
"""From this number of prompts on, counting takes some seconds and is reported."""


@dataclass(frozen=True)
class Beyond:
    """Prompts that are longer than a model sees.

    Attributes:
        limit: tokens that the model sees, including the special ones around the text.
        checked: number of prompts that were counted.
        count: number of them that are longer.
        most: tokens of the longest prompt beyond the limit.
    """

    limit: int
    checked: int = 0
    count: int = 0
    most: int = 0

    def metadata(self) -> dict[str, int]:
        """Values for a manifest."""
        return {"limit": self.limit, "samples": self.count, "most": self.most}


class TextLimit:
    """Counts the tokens of prompts for the text encoder that sees most of them; loads its tokenizer alone.

    Args:
        model: the model with the encoders.

    Attributes:
        limit: tokens that this encoder sees; None where it has no limit, or its tokenizer cannot be read (loading the
            model says so then).
        chosen: whether the limit is `max_text_tokens`, rather than the encoder's own.
    """

    def __init__(self, model: Pretrained) -> None:
        self.encoders = model.backbone_class.encoders_type
        self.limit: int | None = None
        self.chosen = False
        self._tokenizer: Any = None
        parts = model.files.parts
        part, self.chosen = next((entry for entry in self.encoders.longest if entry[0] in parts), ("", False))
        if not part:
            return
        try:
            self._tokenizer = model.files.tokenizer(part)
            self.limit = model.max_text_tokens if self.chosen else int(self._tokenizer.model_max_length)
        except Exception:  # a damaged file makes tokenizers raise errors of many types
            return
        if self.limit > 10**6:  # transformers stores a huge number for tokenizers without a limit
            self.limit = None

    @property
    def fix(self) -> str:
        """Advice for prompts that are too long."""
        most = self.encoders.most_text_tokens
        if self.limit is None or not self.chosen or self.limit >= most:
            return "shorten them"
        return f"shorten them, or raise it (up to {most}; the model was trained on its own number)"

    def counts(self, prompts: Sequence[str]) -> list[int]:
        """Number of tokens of each prompt, including the special ones that the pipeline adds."""
        return self.encoders.count_tokens(self._tokenizer, prompts)

    def beyond(self, prompts: Iterable[str]) -> Beyond:
        """The number of prompts that are longer than the limit, and the largest excess."""
        if self.limit is None:
            return Beyond(0)
        listed = list(prompts)
        known: dict[str, int] = {}
        different = list(dict.fromkeys(listed))
        with JobLog("counting tokens", len(different), "prompt", shown=len(different) > MANY) as progress:
            for start in range(0, len(different), AT_ONCE):
                part = different[start : start + AT_ONCE]
                known |= dict(zip(part, self.counts(part), strict=True))
                progress.advance(len(part))
        over = [known[prompt] - self.limit for prompt in listed if known[prompt] > self.limit]
        return Beyond(self.limit, len(listed), len(over), max(over, default=0))


def evenly(total: int, most: int) -> list[int]:
    """Up to `most` of the numbers below `total`, spread evenly, the first one among them."""
    return [i * total // min(total, most) for i in range(min(total, most))]


def warn_beyond(model: Pretrained, prompts: Sequence[str], what: str = "prompts", total: int | None = None) -> Beyond:
    """Warn once if some prompts are longer than the model sees.

    Args:
        model: the model that reads the prompts.
        prompts: the prompts to count.
        what: name of the prompts in the message, e.g. "captions".
        total: number of all prompts, if `prompts` are a sample of them.
    """
    limit = TextLimit(model)
    found = limit.beyond(prompts)
    if found.count:
        sampled = f" that were looked at (there are {total})" if total is not None and total > found.checked else ""
        name = f"model.max_text_tokens={found.limit}"
        allowed = name if limit.chosen else f"the {found.limit} tokens of this model's text encoder"
        warnings.warn(
            f"{found.count} of {found.checked} {what}{sampled} are longer than {allowed}, by up to {found.most} "
            f"tokens; what is beyond is cut off: {limit.fix}",
            stacklevel=2,
        )
    return found
