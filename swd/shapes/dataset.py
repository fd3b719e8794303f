"""Captioned pictures of coloured shapes, drawn on demand: unlimited, and the same on every machine.

A scene holds one to three shaded objects over a shaded background: one in the middle, two side by side or one above
the other, three in different corners. Its caption follows a small grammar::

    caption  := objects [ "on a" BACKGROUND "background" ]
    objects  := mention                                            one object
              | mention "and" mention                              two objects in any arrangement
              | mention RELATION mention                           two objects
              | mention RELATION mention "and" RELATION mention    three; both relations are about the first mention
    mention  := ("a" | "an") [ SIZE ] [ COLOUR ] SHAPE

so "a red star left of a ring and above a blue heart" says that the star is left of the ring and that the star is
above the heart. `left of` means the same row and a smaller column, `above` the same column and a smaller row;
`right of` and `below` are their opposites. A word that a caption leaves out is random in the picture.

Relations determine where the objects are. At noise levels that hide the whole picture, a denoiser can therefore read
from the text alone what to draw where.

Some (colour, shape) pairs are never drawn for the splits "train" and "val"; every caption of the split "heldout"
names at least one of them. The split "all" draws every pair equally often.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypedDict, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

RESOLUTION = 128
PLACES = 3
"""Places along one side: the middles of the first half, of the whole and of the second half."""
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "diamond")
SIZES = {"small": 38.0, "large": 56.0}  # across, in pixels of a 128x128 picture
RELATIONS = ("left of", "right of", "above", "below")
SPLITS = ("train", "val", "heldout", "all")

COLOURS = {
    "red": (0.86, 0.10, 0.12),
    "orange": (0.97, 0.50, 0.06),
    "yellow": (0.98, 0.88, 0.16),
    "green": (0.14, 0.64, 0.20),
    "cyan": (0.16, 0.84, 0.88),
    "blue": (0.12, 0.26, 0.92),
    "purple": (0.54, 0.14, 0.74),
    "pink": (0.98, 0.52, 0.74),
}
BACKGROUNDS = {
    "white": (0.93, 0.93, 0.93),
    "gray": (0.50, 0.50, 0.50),
    "black": (0.07, 0.07, 0.07),
    "navy": (0.07, 0.10, 0.30),
    "sand": (0.79, 0.70, 0.50),
}
HELD_OUT = frozenset({("red", "square"), ("yellow", "star"), ("green", "ring"), ("blue", "heart"), ("pink", "cross")})
PAIRS = tuple(itertools.product(COLOURS, SHAPES))
TRAIN_PAIRS = tuple(pair for pair in PAIRS if pair not in HELD_OUT)

_GLUE = ("a", "an", "and", "on", "background", "left", "right", "of", "above", "below")
WORDS = tuple(dict.fromkeys([*_GLUE, *SIZES, *COLOURS, *SHAPES, *BACKGROUNDS]))
"""Every word that can occur in a caption."""


_Option = TypeVar("_Option")


@dataclass(frozen=True)
class Mention:
    """One object as a caption describes it; None for a property that the caption leaves out."""

    shape: str
    colour: str | None = None
    size: str | None = None

    def caption(self) -> str:
        words = [word for word in (self.size, self.colour, self.shape) if word]
        return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])


@dataclass(frozen=True)
class Prompt:
    """The content of a caption.

    `relations` has one entry for each mention after the first: the relation of the *first* mention to that one. It is
    empty if the caption only lists its objects.
    """

    mentions: tuple[Mention, ...]
    relations: tuple[str, ...] = ()
    background: str | None = None

    def caption(self) -> str:
        """The caption, lower case, in the grammar of this module."""
        first, *others = [mention.caption() for mention in self.mentions]
        if self.relations:
            text = first + " " + " and ".join(f"{r} {m}" for r, m in zip(self.relations, others, strict=True))
        else:
            text = " and ".join([first, *others])
        return f"{text} on a {self.background} background" if self.background else text


@dataclass(frozen=True)
class Object:
    """One drawn object with its place (row and column in 0..PLACES-1)."""

    shape: str
    colour: str
    size: str
    row: int
    column: int


@dataclass(frozen=True)
class Scene:
    """Everything that a picture shows. `seed` fixes what no caption mentions: jitter, rotation, shading."""

    objects: tuple[Object, ...]
    background: str
    relations: tuple[str, ...] = ()
    seed: int = 0

    def prompt(self) -> Prompt:
        """The content of the complete caption."""
        mentions = tuple(Mention(o.shape, o.colour, o.size) for o in self.objects)
        return Prompt(mentions, self.relations, self.background)

    def caption(self) -> str:
        """The complete caption, with every property of every object."""
        return self.prompt().caption()


def related(relation: str, a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether place `a` stands in `relation` to place `b`; places are (row, column)."""
    if relation in ("right of", "below"):
        a, b = b, a
    if relation in ("left of", "right of"):
        return a[0] == b[0] and a[1] < b[1]
    if relation in ("above", "below"):
        return a[1] == b[1] and a[0] < b[0]
    raise ValueError(f"unknown relation {relation!r}: use one of {', '.join(RELATIONS)}")


# --- from a caption to its content -------------------------------------------------------------------------------

_MENTION = rf"an? (?:({'|'.join(SIZES)}) )?(?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES)})"
_RELATION = f"({'|'.join(RELATIONS)})"
_CAPTION = re.compile(
    rf"{_MENTION}(?: {_RELATION} {_MENTION}(?: and {_RELATION} {_MENTION})?| and {_MENTION})?"
    rf"(?: on an? ({'|'.join(BACKGROUNDS)}) background)?"
)


def parse_caption(text: str) -> Prompt:
    """Read a caption back.

    Case, repeated spaces and a final full stop do not matter.

    Raises:
        ValueError: when the text is outside the grammar of this module.
    """
    match = _CAPTION.fullmatch(" ".join(text.lower().strip().rstrip(".").split()))
    if match is None:
        raise ValueError(
            f"cannot read the caption {text!r}: write it like 'a small red star above a blue ring on a gray "
            f"background' (shapes: {', '.join(SHAPES)}; colours: {', '.join(COLOURS)}; "
            f"backgrounds: {', '.join(BACKGROUNDS)})"
        )
    g = match.groups()
    found = [(None, g[0:3]), (g[3], g[4:7]), (g[7], g[8:11]), (None, g[11:14])]
    mentions = tuple(Mention(shape, colour, size) for _, (size, colour, shape) in found if shape)
    return Prompt(mentions, tuple(relation for relation, _ in found if relation), g[14])


# --- drawing a scene at random ----------------------------------------------------------------------------------


_ARRANGEMENTS: dict[int, tuple[tuple[tuple[int, int], ...], ...]] = {
    1: (((1, 1),),),
    2: (((1, 0), (1, 2)), ((0, 1), (2, 1))),
    3: (((0, 0), (0, 2), (2, 0), (2, 2)),),
}
"""Sets of places over which objects are spread, by number of objects."""


@cache
def _layouts(relations: tuple[str, ...], count: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Every placement of `count` objects in which the first one has the given relations to the others."""
    return tuple(
        placed
        for places in _ARRANGEMENTS[count]
        for placed in itertools.permutations(places, count)
        if all(related(r, placed[0], other) for r, other in zip(relations, placed[1:], strict=False))
    )


@cache
def _possible_relations(count: int) -> tuple[tuple[str, ...], ...]:
    """Every choice of different relations of the first of `count` objects to the others that can be placed."""
    return tuple(r for r in itertools.permutations(RELATIONS, count - 1) if _layouts(r, count))


def _pick(rng: np.random.Generator, options: Sequence[_Option]) -> _Option:
    """One of the options, all equally likely."""
    return options[int(rng.integers(len(options)))]


def _draw_pairs(rng: np.random.Generator, count: int, split: str) -> tuple[list[tuple[str, str]], int | None]:
    """Different (colour, shape) pairs, and the position of the held-out pair, if the split needs one."""
    pool = PAIRS if split in ("heldout", "all") else TRAIN_PAIRS
    pairs = [pool[i] for i in rng.choice(len(pool), size=count, replace=False)]
    if split != "heldout":
        return pairs, None
    at = int(rng.integers(count))
    free = tuple(pair for pair in sorted(HELD_OUT) if pair not in pairs[:at] + pairs[at + 1 :])
    pairs[at] = _pick(rng, free)
    return pairs, at


def draw_scene(rng: np.random.Generator, split: str = "train") -> tuple[Scene, Prompt]:
    """A random scene, and a caption that leaves some of its properties out.

    Raises:
        ValueError: for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
    count = int(rng.choice(3, p=(0.25, 0.45, 0.30))) + 1
    relations: tuple[str, ...] = ()
    if count == 3 or (count == 2 and rng.random() < 0.9):
        relations = _pick(rng, _possible_relations(count))
    places = _pick(rng, _layouts(relations, count))
    pairs, held_out = _draw_pairs(rng, count, split)
    sizes = tuple(SIZES)
    objects = tuple(
        Object(shape, colour, _pick(rng, sizes), row, column)
        for (colour, shape), (row, column) in zip(pairs, places, strict=True)
    )
    scene = Scene(objects, _pick(rng, tuple(BACKGROUNDS)), relations, int(rng.integers(2**31)))

    named = rng.random((count, 2)) < (0.9, 0.6)  # probability that a colour and a size are named
    mentions = tuple(
        Mention(o.shape, o.colour if named[i, 0] or i == held_out else None, o.size if named[i, 1] else None)
        for i, o in enumerate(objects)
    )
    return scene, Prompt(mentions, relations, scene.background if rng.random() < 0.7 else None)


# --- from a scene to pixels -------------------------------------------------------------------------------------


def _box(x: np.ndarray, y: np.ndarray, half_x: float, half_y: float) -> np.ndarray:
    return np.maximum(np.abs(x) - half_x, np.abs(y) - half_y)


def _fold(x: np.ndarray, y: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates folded into half of one of `n` equal sectors around the centre; the first axis points up."""
    radius = np.hypot(x, y)
    angle = np.arctan2(x, -y)
    sector = 2 * np.pi / n
    angle = np.abs(angle - sector * np.round(angle / sector))
    return radius * np.cos(angle), radius * np.sin(angle)


def _star(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    # In a folded sector the outline is the segment from the tip to the notch; its line's normal gives the distance.
    along, across = _fold(x, y, 5)
    notch_x = 0.46 * radius * np.cos(np.pi / 5)
    notch_y = 0.46 * radius * np.sin(np.pi / 5)
    normal = np.array([notch_y, radius - notch_x]) / np.hypot(notch_y, radius - notch_x)
    return (along - radius) * normal[0] + across * normal[1]


def _heart(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    # A square standing on its corner, and a disc on each of its two upper sides.
    half = 0.56 * radius
    y = y - 0.08 * radius
    diagonal = half * np.sqrt(0.5)
    corner = (np.abs(x) + np.abs(y)) * np.sqrt(0.5) - half
    lobe = np.hypot(np.abs(x) - diagonal, y + diagonal) - half
    return np.minimum(corner, lobe)


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance to a shape's outline: negative inside, exact near smooth parts of the outline.

    Args:
        shape: one of `SHAPES`.
        x: coordinates relative to the shape's centre in pixels, to the right.
        y: the same, downwards.
        radius: half of the shape's nominal size in pixels.
    """
    if shape == "circle":
        return np.hypot(x, y) - 0.95 * radius
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.74 * radius) - 0.25 * radius
    if shape == "square":
        return _box(x, y, 0.82 * radius, 0.82 * radius)
    if shape == "cross":
        return np.minimum(_box(x, y, 0.98 * radius, 0.29 * radius), _box(x, y, 0.29 * radius, 0.98 * radius))
    if shape == "diamond":
        return (np.abs(x) / 0.66 + np.abs(y) - radius) / np.hypot(1 / 0.66, 1)
    if shape == "triangle":
        return _fold(x, 0.2 * radius - y, 3)[0] - 0.56 * radius  # folded upside down: sides, not tips
    if shape == "star":
        return _star(x, y - 0.05 * radius, 1.06 * radius)
    if shape == "heart":
        return _heart(x, y, radius)
    raise ValueError(f"unknown shape {shape!r}: use one of {', '.join(SHAPES)}")


def _background(rng: np.random.Generator, name: str) -> np.ndarray:
    """[128, 128, 3] in about [0, 1]: the named colour under a linear gradient."""
    line = np.linspace(-1, 1, RESOLUTION, dtype=np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    strength = rng.uniform(0.02, 0.10)
    light = np.float32(strength * np.sin(angle)) * line[:, None] + np.float32(strength * np.cos(angle)) * line[None]
    tint = rng.uniform(-0.02, 0.02, 3)
    return light[..., None] + (np.array(BACKGROUNDS[name]) + tint).astype(np.float32)


def _shading(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Factors on an object's colour: a linear gradient from at most -20% to +20%."""
    angle = rng.uniform(0, 2 * np.pi)
    return 1 + rng.uniform(0.05, 0.2) * (x * np.cos(angle) + y * np.sin(angle)) / radius


def _pixels_around(centre: float, reach: float) -> slice:
    """The pixels of one axis of the canvas that are at most `reach` from `centre`."""
    return slice(max(0, int(centre - reach)), min(RESOLUTION, int(centre + reach) + 1))


def _paint(canvas: np.ndarray, rng: np.random.Generator, thing: Object) -> None:
    """Blend one object into the [128, 128, 3] canvas, in place, touching only a window around it."""
    radius = SIZES[thing.size] / 2 * rng.uniform(0.95, 1.05)
    step = RESOLUTION / (PLACES + 1)
    centre_x = (thing.column + 1) * step + rng.uniform(-2, 2)
    centre_y = (thing.row + 1) * step + rng.uniform(-2, 2)
    reach = 1.15 * radius + 2
    rows = _pixels_around(centre_y, reach)
    columns = _pixels_around(centre_x, reach)
    ys, xs = np.mgrid[rows, columns].astype(np.float32) + 0.5
    xs = xs - centre_x
    ys = ys - centre_y

    angle = rng.uniform(-0.2, 0.2)
    turned_x = xs * np.cos(angle) + ys * np.sin(angle)
    turned_y = ys * np.cos(angle) - xs * np.sin(angle)
    # Approximate coverage of a pixel that an edge crosses: from 0 to 1 within half a pixel of the outline.
    cover = np.clip(0.5 - signed_distance(thing.shape, turned_x, turned_y, radius), 0, 1)[..., None]
    colour = (np.array(COLOURS[thing.colour]) + rng.uniform(-0.03, 0.03, 3)).astype(np.float32)
    window = canvas[rows, columns]
    window += cover * (colour * _shading(rng, xs, ys, radius)[..., None] - window)


def render(scene: Scene, size: int = RESOLUTION) -> Tensor:
    """Draw a scene: [3, size, size] float32 in [-1, 1]. Smaller sizes are area averages of the 128x128 picture."""
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}: use 128, 96, 64 or 48")
    rng = np.random.default_rng(scene.seed)
    canvas = _background(rng, scene.background)
    for thing in scene.objects:
        _paint(canvas, rng, thing)
    pixels = torch.from_numpy(np.clip(canvas, 0, 1).transpose(2, 0, 1).copy()) * 2 - 1
    if size != RESOLUTION:
        mode = "area" if size < RESOLUTION else "bilinear"
        pixels = F.interpolate(pixels[None], size=(size, size), mode=mode)[0]
    return pixels


class Item(TypedDict):
    """An item of `ShapesDataset`.

    Attributes:
        pixels: the picture `[3, resolution, resolution]` in [-1, 1].
        prompt: its caption.
        index: its number in the data set.
    """

    pixels: Tensor
    prompt: str
    index: int


class ShapesDataset(Dataset[Item]):
    """Pictures and captions by index; item i depends on (seed, split, i) alone.

    Args:
        split: "train", "val" (like train, other pictures), "heldout" (with pairs that neither of them has) or "all".
        seed: 0 or more.
        length: number of items; any number, since items are drawn on demand.
        resolution: side of the pictures in pixels.
    """

    def __init__(
        self, split: str = "train", seed: int = 0, length: int = 100_000, resolution: int = RESOLUTION
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
        if seed < 0 or length < 1 or resolution < 1:
            raise ValueError(
                f"seed must be 0 or more, length and resolution positive: got {seed}, {length}, {resolution}"
            )
        self.split = split
        self.seed = seed
        self.length = length
        self.resolution = resolution

    def __len__(self) -> int:
        return self.length

    def draw(self, index: int) -> tuple[Scene, Prompt]:
        """The scene of item `index`, and the content of its caption.

        Raises:
            IndexError: outside [0, length).
        """
        if not 0 <= index < self.length:
            raise IndexError(f"index {index} is outside [0, {self.length})")
        return draw_scene(np.random.default_rng([self.seed, SPLITS.index(self.split), index]), self.split)

    def caption(self, index: int) -> str:
        """The caption of an item, without drawing it."""
        return self.draw(index)[1].caption()

    def __getitem__(self, index: int) -> Item:
        scene, prompt = self.draw(index)
        return {"pixels": render(scene, self.resolution), "prompt": prompt.caption(), "index": index}
