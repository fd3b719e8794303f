"""`swd compare A B`: a page on which people vote between two pictures of one prompt without knowing who drew which.

Sides and order are random but for the seed. The names of the folders stand in the page only scrambled: that keeps a
voter from reading them by chance, and is no secret.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swd.io.files import file_hash
from swd.report.folders import Key, Picture, embedded, names_of, read_picture_folder
from swd.report.page import templates
from swd.types import UserError

FORMAT = 1
"""Layout of the files of votes."""


@dataclass(frozen=True)
class Pair:
    """Two pictures of one prompt, of A and of B."""

    key: Key
    prompt: str
    a: Path
    b: Path


@dataclass(frozen=True)
class Study:
    """The pairs of pictures that people vote on.

    Attributes:
        names: of A and B, known from the folders.
        pairs: in the order of their keys; a vote names a pair by its position here.
        criteria: what each pair is voted on, one vote each.
        alone: pictures of A and of B that have no partner.
    """

    names: tuple[str, str]
    pairs: Sequence[Pair]
    criteria: Sequence[str]
    alone: tuple[int, int]

    def hash(self) -> str:
        """Equal for pages with the same names, pictures, prompts and criteria, whatever their seeds are."""
        pairs = [[pair.key, pair.prompt, file_hash(pair.a), file_hash(pair.b)] for pair in self.pairs]
        content = json.dumps([self.names, pairs, list(self.criteria)])
        return hashlib.sha256(content.encode()).hexdigest()[:32]


def read_study(a: Path, b: Path, criteria: Sequence[str], n: int | None = None) -> Study:
    """Pair the pictures of two folders by their index, else by the number or the name of their files.

    Args:
        a, b: folders with an `index.jsonl`, as evaluations write them, or with pictures.
        criteria: names of what is voted on.
        n: pairs at most, the first ones; None: all.

    Raises:
        UserError: if a folder holds no pictures, no two of them belong together, or two that do have other prompts.
    """
    names = names_of([a, b])
    first, second = read_picture_folder(a).pictures, read_picture_folder(b).pictures
    common = sorted((key for key in first if key in second), key=lambda key: (isinstance(key, str), key))
    if not common:
        raise UserError(
            f"no picture of {a} has a partner in {b}: they are matched by index.jsonl, else by number or name; "
            "draw the same prompts with the same seeds, or give the files the same names"
        )
    pairs = []
    for key in common[:n]:
        prompt = _common_prompt(key, first[key], second[key])
        pairs.append(Pair(key, prompt, first[key].file, second[key].file))
    alone = (len(first) - len(common), len(second) - len(common))
    return Study((names[0], names[1]), pairs, list(criteria), alone)


def _common_prompt(key: Key, a: Picture, b: Picture) -> str:
    if a.prompt and b.prompt and a.prompt != b.prompt:
        raise UserError(
            f"picture {key} is of {a.prompt[:80]!r} in {a.file.parent} and of {b.prompt[:80]!r} in {b.file.parent}; "
            "draw both with the same list of prompts"
        )
    return a.prompt or b.prompt


# The page


@dataclass(frozen=True)
class Layout:
    """How a page shows a study.

    Attributes:
        title: of the page; it should not name the models.
        seed: of sides and order.
        side: width and height of a picture at most, in pixels.
        quality: of WebP, 1 to 100.
        megabytes: all pictures together at most.
    """

    title: str
    seed: int
    side: int
    quality: int
    megabytes: float


def render_pairs(study: Study, layout: Layout) -> str:
    """The page as one HTML document.

    Raises:
        UserError: if a picture cannot be read, or all together are larger than `layout.megabytes`.
    """
    # In half of the pairs A is on the right; the order of the pairs is random too.
    draw = random.Random(layout.seed)
    count = len(study.pairs)
    flipped = [i % 2 == 1 for i in range(count)]
    draw.shuffle(flipped)
    order = list(range(count))
    draw.shuffle(order)

    # Pictures are encoded anew, so that none brings metadata along.
    shown: list[dict[str, Any]] = []
    size = 0.0
    for position in order:
        pair = study.pairs[position]
        both = [embedded(file, layout.side, layout.quality) for file in (pair.a, pair.b)]
        size += sum(map(len, both)) * 0.75
        if size > layout.megabytes * 1e6:
            raise UserError(
                f"the first {len(shown)} of {count} pairs are larger than megabytes={layout.megabytes:g}; give fewer "
                "(n=), smaller ones (side=, quality=), or a larger limit"
            )
        left, right = reversed(both) if flipped[position] else both
        shown.append({"id": position, "prompt": pair.prompt, "left": left, "right": right})

    identity = study.hash()
    hidden = {
        "names": list(study.names),
        "pairs": [[pair.key, pair.prompt, flip] for pair, flip in zip(study.pairs, flipped, strict=True)],
    }
    payload = {
        "format": FORMAT,
        "study": identity,
        "page": f"{identity}-{layout.seed}",
        "criteria": list(study.criteria),
        "pairs": shown,
        "sealed": scramble(hidden, identity),
    }
    return templates().get_template("compare.html.j2").render(title=layout.title, payload=payload)


def scramble(value: Any, key: str) -> str:
    """A value as text that cannot be read at a glance; `unscramble` reads it."""
    content, mask = json.dumps(value, ensure_ascii=False).encode(), key.encode()
    return base64.b64encode(bytes(byte ^ mask[i % len(mask)] for i, byte in enumerate(content))).decode()


def unscramble(text: str, key: str) -> Any:
    """The value of `scramble`.

    Raises:
        ValueError: if the text is damaged, or the key is empty.
    """
    if not key:
        raise ValueError("no key")
    content, mask = base64.b64decode(text, validate=True), key.encode()
    return json.loads(bytes(byte ^ mask[i % len(mask)] for i, byte in enumerate(content)))
