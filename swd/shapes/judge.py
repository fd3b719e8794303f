"""A small classifier that reads pictures of shapes, and scores for how well pictures follow their captions."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from swd.shapes.dataset import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    RESOLUTION,
    SHAPES,
    SIZES,
    Mention,
    Object,
    Prompt,
    parse_caption,
    related,
)

NOTHING = len(SHAPES)
"""The shape class of an empty place."""
ATTRIBUTES = ("shape", "colour", "size", "relation", "background", "count")


@dataclass(frozen=True)
class Reading:
    """Objects and background that the judge sees in one picture."""

    objects: tuple[Object, ...]
    background: str


class _Block(nn.Module):
    """Convolution, batch norm, SiLU; with a skip connection where the shape stays."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.skip = stride == 1 and width_in == width

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.norm(self.conv(x)))
        return x + y if self.skip else y


def _reader_of_places(features: int, outputs: int) -> nn.Sequential:
    """Logits `[B, outputs, P, P]` at the places, from the features of the whole picture."""
    # Windows of neighbouring places overlap, so a window's features must keep positions inside it.
    return nn.Sequential(
        nn.AvgPool2d(2),
        nn.Conv2d(features, 2 * features, 4, stride=2),
        nn.SiLU(),
        nn.Conv2d(2 * features, outputs, 1),
    )


class Judge(nn.Module):
    """Reads shape (or nothing), colour and size at each of the places, and the background.

    Args:
        widths: channels at strides 2, 4 and 8.
        features: channels of the last layer, the width of `features()`.
    """

    def __init__(self, widths: Sequence[int] = (24, 48, 64), features: int = 64) -> None:
        super().__init__()
        self.config = {"widths": list(widths), "features": features}
        a, b, c = widths
        self.body = nn.Sequential(
            _Block(3, a, 2),
            _Block(a, b, 2),
            _Block(b, b, 1),
            _Block(b, c, 2),
            _Block(c, c, 1),
            _Block(c, c, 1),
            _Block(c, features, 1),
        )
        self.outputs = {"shape": NOTHING + 1, "colour": len(COLOURS), "size": len(SIZES)}
        self.places = _reader_of_places(features, sum(self.outputs.values()))
        self.background = nn.Linear(features, len(BACKGROUNDS))

    def _map(self, pixels: Tensor) -> Tensor:
        expected = (3, RESOLUTION, RESOLUTION)
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != expected:
            raise ValueError(f"the judge reads pixels [B, 3, 128, 128], got {tuple(pixels.shape)}: resize first")
        return self.body(pixels)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Logits: shape [B, 9, P, P], colour [B, 8, P, P], size [B, 2, P, P], background [B, 5]; P is PLACES.

        Args:
            pixels: [B, 3, 128, 128] in [-1, 1].
        """
        maps = self._map(pixels)
        parts = self.places(maps).split(list(self.outputs.values()), dim=1)
        return dict(zip(self.outputs, parts, strict=True)) | {"background": self.background(maps.mean((2, 3)))}

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """[B, D] averages of the last layer over the picture, for Fréchet distances. `pixels` as in `forward`."""
        return self._map(pixels).mean((2, 3)).float()

    @torch.no_grad()
    def choices(self, pixels: Tensor) -> Tensor:
        """The most likely classes of each picture, as `reading_of` reads them: `[B, 3 P P + 1]` int64.

        Shape, colour and size of each place, then the background. `pixels` as in `forward`.
        """
        best = {name: logits.argmax(1) for name, logits in self(pixels).items()}
        return torch.cat([best[name].reshape(len(pixels), -1) for name in (*self.outputs, "background")], dim=1)

    def read(self, pixels: Tensor) -> list[Reading]:
        """The most likely reading of each picture. `pixels` as in `forward`."""
        return [reading_of(row) for row in self.choices(pixels).tolist()]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / "model.safetensors")

    @staticmethod
    def check_folder(folder: str | Path) -> Path:
        """The folder, if it holds a judge's files; raises ValueError otherwise."""
        folder = Path(folder)
        if not all((folder / name).is_file() for name in ("config.json", "model.safetensors")):
            raise ValueError(
                f"no judge in {folder}: it needs config.json and model.safetensors; "
                "make it with `python train.py experiment=shapes_judge`"
            )
        return folder

    @staticmethod
    def width_of(folder: str | Path) -> int:
        """Width of the features of the judge in `folder`, without reading its weights."""
        return int(json.loads((Judge.check_folder(folder) / "config.json").read_text())["features"])

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Judge:
        """The judge in `folder`, in evaluation mode.

        Raises:
            ValueError: when the folder does not hold a judge.
        """
        folder = cls.check_folder(folder)
        judge = cls(**json.loads((folder / "config.json").read_text()))
        judge.load_state_dict(load_file(folder / "model.safetensors"))
        return judge.eval().requires_grad_(False)


def reading_of(choices: Sequence[int]) -> Reading:
    """The reading that a row of `Judge.choices` stands for."""
    shapes, colours, sizes = (choices[i * PLACES**2 : (i + 1) * PLACES**2] for i in range(3))
    names = tuple(COLOURS), tuple(SIZES)
    objects = tuple(
        Object(SHAPES[shapes[i]], names[0][colours[i]], names[1][sizes[i]], *divmod(i, PLACES))
        for i in range(PLACES**2)
        if shapes[i] != NOTHING
    )
    return Reading(objects, tuple(BACKGROUNDS)[choices[-1]])


# --- how well a picture follows its caption ----------------------------------------------------------------------

Score = dict[str, tuple[int, int]]
"""For each attribute in the caption: how many of its statements hold, and how many it makes."""


def _object_hits(mention: Mention, thing: Object | None) -> Score:
    """Shape, colour and size of one mention against the object matched to it."""
    wanted = {"shape": mention.shape, "colour": mention.colour, "size": mention.size}
    return {
        name: (int(thing is not None and getattr(thing, name) == value), 1)
        for name, value in wanted.items()
        if value is not None
    }


def _add(scores: Sequence[Score]) -> Score:
    total: Score = {}
    for score in scores:
        for name, (hits, count) in score.items():
            before = total.get(name, (0, 0))
            total[name] = (before[0] + hits, before[1] + count)
    return total


def _assignment_score(prompt: Prompt, matched: Sequence[Object | None]) -> Score:
    scores = [_object_hits(m, o) for m, o in zip(prompt.mentions, matched, strict=True)]
    first = matched[0]
    for relation, other in zip(prompt.relations, matched[1:], strict=False):
        holds = (
            first is not None
            and other is not None
            and related(relation, (first.row, first.column), (other.row, other.column))
        )
        scores.append({"relation": (int(holds), 1)})
    return _add(scores)


def score_reading(prompt: Prompt, reading: Reading) -> Score:
    """Score of a reading; mentions are matched to the objects seen so that most statements hold."""
    absent = (None,) * max(0, len(prompt.mentions) - len(reading.objects))
    candidates = itertools.permutations((*reading.objects, *absent), len(prompt.mentions))
    scored = (_assignment_score(prompt, matched) for matched in candidates)
    best = max(scored, key=lambda score: sum(hits for hits, _ in score.values()))
    if prompt.background is not None:
        best["background"] = (int(prompt.background == reading.background), 1)
    best["count"] = (int(len(prompt.mentions) == len(reading.objects)), 1)
    return best


def pack_score(score: Score) -> Tensor:
    """A score as `[A, 2]` int64; attributes that the caption does not mention are (0, 0)."""
    return torch.tensor([score.get(name, (0, 0)) for name in ATTRIBUTES])


def summarise(scores: Sequence[Score]) -> dict[str, float]:
    """Accuracy in [0, 1] of each attribute that a caption names, their `mean`, and `exact_match`.

    `exact_match` is the share of pictures in which every statement of the caption holds.
    """
    if not scores:
        raise ValueError("no pictures to score: pass at least one picture and its prompt")
    total = _add(scores)
    accuracy = {name: total[name][0] / total[name][1] for name in ATTRIBUTES if name in total}
    exact = sum(all(hits == count for hits, count in score.values()) for score in scores) / len(scores)
    return accuracy | {"mean": sum(accuracy.values()) / len(accuracy), "exact_match": exact}


def score_pictures(judge: Judge, pixels: Tensor, prompts: Sequence[str], batch: int = 64) -> list[Score]:
    """One `Score` per picture, for `summarise`; arguments as in `prompt_accuracy`."""
    if len(pixels) != len(prompts):
        raise ValueError(f"{len(pixels)} pictures but {len(prompts)} prompts: pass one prompt per picture")
    wanted = [parse_caption(prompt) for prompt in prompts]
    readings = [reading for chunk in pixels.split(batch) for reading in judge.read(chunk)]
    return [score_reading(p, r) for p, r in zip(wanted, readings, strict=True)]


def prompt_accuracy(judge: Judge, pixels: Tensor, prompts: Sequence[str], batch: int = 64) -> dict[str, float]:
    """How well pictures follow their prompts: accuracy in [0, 1] of each attribute, `mean` and `exact_match`.

    Attributes are shape, colour and size of the objects, relations, background, each scored only if the prompt names
    it, and `count`, the number of objects. Mentions are matched to the objects seen by the best assignment.

    Args:
        judge: reads the pictures.
        pixels: [B, 3, 128, 128] in [-1, 1], on the judge's device.
        prompts: B captions in the grammar of `swd.shapes.dataset`.
        batch: pictures read at a time.

    Raises:
        ValueError: for a prompt outside the grammar, or lengths that differ.
    """
    return summarise(score_pictures(judge, pixels, prompts, batch))
