"""Shared parts of every scorer outside of `swd`: a folder of pictures with an index in, a JSON of scores out.

Plain Python 3.9 without packages, because it runs in the environments of other projects. docs/external_metrics.md
describes both files. An error is one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

HERE = Path(__file__).resolve().parent
sys.path[:] = [each for each in sys.path if Path(each).resolve() != HERE]  # hpsv3 is the package, not the script here

INDEX = "index.jsonl"
FORMAT = 1
"""Version of the JSON's layout."""


class Problem(Exception):
    """Wrong input: the message is one line with what was wrong and what to do."""


@dataclass(frozen=True)
class Picture:
    """One line of the index.

    Attributes:
        file: path relative to the folder, as in the index.
        path: the file itself.
        prompt: what it was drawn from.
    """

    file: str
    path: Path
    prompt: str


class ScoreBatch(Protocol):
    """Scores pictures; None for one that the metric does not judge."""

    def __call__(self, pictures: list[Picture]) -> list[float | None]: ...


@dataclass(frozen=True)
class Scorer:
    """One metric.

    Attributes:
        name: of the metric, and of its script and requirements.
        package: distribution whose version is recorded; "" for a cloned repository.
        modules: what must be importable.
        load: makes the function that scores, from the arguments of the command line.
        higher_is_better: the direction of the scores.
        arguments: adds the metric's own arguments.
        check: raises `Problem` for a file that those arguments name and that is not there.
        groups: a name for each picture, where the metric's value is the mean over groups of their means.
        at_once: whether `load`'s function wants all pictures in one call.
    """

    name: str
    package: str
    modules: tuple[str, ...]
    load: Callable[[argparse.Namespace], ScoreBatch]
    higher_is_better: bool = True
    arguments: Callable[[argparse.ArgumentParser], Any] = lambda parser: None
    check: Callable[[argparse.Namespace], Any] = lambda args: None
    groups: Callable[[argparse.Namespace, list[Picture]], list[str]] | None = None
    at_once: bool = False


def run(scorer: Scorer, argv: list[str] | None = None) -> int:
    """The command of a scorer: 0 when the JSON was written, 2 after a line that says what is wrong."""
    try:
        args = parse(scorer, argv)
        check_modules(scorer)
        scorer.check(args)
        if not args.check:
            score_folder(scorer, args)
    except Problem as problem:
        print(f"error: {' '.join(str(problem).split())}", file=sys.stderr)
        return 2
    return 0


def parse(scorer: Scorer, argv: list[str] | None) -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(prog=f"{scorer.name}.py", description=f"Score a folder of pictures: {scorer.name}")
    parser.add_argument("folder", type=Path, nargs="?", help=f"folder with pictures and {INDEX}")
    parser.add_argument("--check", action="store_true", help="look for packages and files, and score nothing")
    parser.add_argument("--out", type=Path, help=f"JSON to write; FOLDER/{scorer.name}.json if left out")
    parser.add_argument("--device", default="cuda", help="where the model runs; cuda if left out")
    parser.add_argument("--batch", type=int, default=8, help="pictures scored together; 8 if left out")
    scorer.arguments(parser)
    args = parser.parse_args(argv)
    if args.batch < 1:
        raise Problem(f"--batch {args.batch} is not valid; use 1 or more")
    if args.folder is None and not args.check:
        raise Problem(f"no folder was given; give one with pictures and {INDEX}")
    if args.out is None and args.folder is not None:
        args.out = args.folder / f"{scorer.name}.json"
    return args


def score_folder(scorer: Scorer, args: argparse.Namespace) -> None:
    """Score all pictures and write the JSON; a run that was killed goes on where it was."""
    # Look at everything before the model loads.
    pictures = read_index(args.folder)
    index = index_hash(args.folder)
    groups = scorer.groups(args, pictures) if scorer.groups else None

    # Score what is not yet scored.
    partial = args.out.with_name(f".{args.out.name}.partial")
    scores = read_partial(partial, index)
    left = [picture for picture in pictures if picture.file not in scores]
    score = scorer.load(args) if left else None
    size = len(left) if scorer.at_once else args.batch
    for first in range(0, len(left), max(1, size)):
        batch = left[first : first + size]
        scores.update(checked(scorer, batch, score(batch) if score else []))
        write_json(partial, {"index_sha256": index, "scores": scores})
        print(f"{scorer.name}: {len(scores)} of {len(pictures)} pictures", file=sys.stderr)

    # One file with all of them.
    result: dict[str, Any] = {
        "format": FORMAT,
        "metric": scorer.name,
        "package": f"{scorer.package} {metadata.version(scorer.package)}" if scorer.package else "",
        "higher_is_better": scorer.higher_is_better,
        "index_sha256": index,
        "scores": {picture.file: scores[picture.file] for picture in pictures},
    }
    if groups is not None:
        result["groups"] = {picture.file: groups[i] for i, picture in enumerate(pictures)}
    write_json(args.out, result)
    partial.unlink()


def checked(scorer: Scorer, batch: list[Picture], values: list[float | None]) -> dict[str, float | None]:
    """Scores by file, after a look at their number and that they are finite."""
    if len(values) != len(batch):
        raise Problem(f"{scorer.name} gave {len(values)} scores for {len(batch)} pictures; report this")
    for i, picture in enumerate(batch):
        value = values[i]
        if value is not None and not math.isfinite(value):
            raise Problem(f"{scorer.name} gave {value} for {picture.path}; look at that picture")
    return {picture.file: values[i] for i, picture in enumerate(batch)}


def check_modules(scorer: Scorer) -> None:
    """Refuse an environment that lacks a package."""
    for module in scorer.modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # importing runs the package, which may fail in any way
            raise Problem(
                f"{scorer.name} needs the package {module}, which {sys.executable} cannot import "
                f"({type(error).__name__}: {error}); install requirements/external/{scorer.name}.txt there "
                "(docs/external_metrics.md)"
            ) from None


# Files


def read_index(folder: Path) -> list[Picture]:
    """The pictures that a folder's index names, all of which are there."""
    file = folder / INDEX
    if not file.is_file():
        raise Problem(
            f"{file} is not there; give a folder that `swd` drew, or write the index (docs/external_metrics.md)"
        )
    pictures = [
        read_line(folder, line, f"{file}, line {number}")
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1)
        if line.strip()
    ]
    if not pictures:
        raise Problem(f"{file} names no pictures; draw some")
    twice = len(pictures) - len({picture.file for picture in pictures})
    if twice:
        raise Problem(f"{file} names {twice} pictures twice; draw into an empty folder")
    return pictures


def read_line(folder: Path, line: str, where: str) -> Picture:
    """The picture of one line of the index."""
    try:
        row = json.loads(line)
        file, prompt = row["file"], row["prompt"]
    except (ValueError, LookupError, TypeError):
        file = prompt = None
    if not isinstance(file, str) or not isinstance(prompt, str):
        raise Problem(f'{where} is no JSON object with the texts "file" and "prompt"; draw the folder again')
    if not (folder / file).is_file():
        raise Problem(f"{where} names {folder / file}, which is not there; draw the folder again")
    return Picture(file, folder / file, prompt)


def check_files(files: dict[str, Path | None], source: str) -> None:
    """Refuse files, by the argument that names them, that are not there; None is none."""
    for name, file in files.items():
        if file is not None and not file.exists():
            raise Problem(f"{name} {file} is not there; {source}")


def index_hash(folder: Path) -> str:
    """SHA-256 of a folder's index, which tells of which pictures scores are."""
    return hashlib.sha256((folder / INDEX).read_bytes()).hexdigest()


def read_partial(file: Path, index: str) -> dict[str, float | None]:
    """Scores that a killed run left, if they are of the same index."""
    try:
        left = json.loads(file.read_text(encoding="utf-8"))
        return dict(left["scores"]) if left["index_sha256"] == index else {}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def write_json(file: Path, value: Any) -> None:
    """Write JSON aside, then rename it, so that no reader sees half a file."""
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(aside, file)
    except OSError as error:
        raise Problem(f"{file} cannot be written ({error.strerror}); give another one with --out") from None


def link(target: Path, file: Path) -> None:
    """A link to a picture under the name that a benchmark wants."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.symlink_to(target.resolve())
