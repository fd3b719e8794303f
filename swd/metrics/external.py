"""Metrics that other projects compute, in Python environments of their own: a folder in, a JSON out.

    FOLDER/index.jsonl   {"file": "00000.png", "prompt": "a red circle", "seed": 0}, a picture a line
    FOLDER/hpsv3.json    a score for each picture, written by scripts/external/hpsv3.py

docs/external_metrics.md describes both. Which interpreter runs a script is said by the environment alone, never by a
configuration, since whoever sends a configuration must not say what runs here.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swd.io.files import file_hash, write_text
from swd.metrics.base import Drawn, PictureMetric, Reference, Score
from swd.types import UserError, check_shape

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "external"
NAMES = ("hpsv3", "imagereward", "geneval", "geneval2", "vbench")
INDEX = "index.jsonl"
FORMAT = 1
"""Version of the JSON's layout."""
PATIENCE = 900
"""Seconds that the look for packages may take; a cold import of torch from a network drive takes minutes."""
MANUAL = "docs/external_metrics.md"


def write_picture_index(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write the index of a folder of pictures.

    Args:
        folder: where the pictures are.
        rows: for each picture `file` (relative to the folder), `prompt`, `seed`, and whatever else is worth keeping.
    """
    return write_text(folder / INDEX, "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows))


def files_of(folder: Path) -> list[str]:
    """The pictures that a folder's index names, in its order.

    Raises:
        UserError: if there is no index, or it is damaged.
    """
    file = folder / INDEX
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
        return [str(json.loads(line)["file"]) for line in lines if line.strip()]
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); draw the folder again") from None
    except (ValueError, LookupError, TypeError, RecursionError):
        raise UserError(f'{file} is damaged: a line is no JSON object with "file"; draw the folder again') from None


@dataclass(frozen=True)
class OutsideScorer:
    """A script that scores a folder of pictures.

    Attributes:
        scorer: one of `NAMES`.
        run: whether the script is run here; else its JSON is read, which somebody made before.
    """

    scorer: str
    run: bool = True

    @property
    def name(self) -> str:
        """The key of its scores among features."""
        return f"outside-{self.scorer}"

    @property
    def variable(self) -> str:
        """The environment variable with the interpreter and further arguments of the script."""
        return f"SWD_SCORER_{self.scorer.upper()}"

    @property
    def script(self) -> Path:
        """The script."""
        return SCRIPTS / f"{self.scorer}.py"

    def command(self) -> list[str]:
        """The command that scores, before the folder.

        Raises:
            UserError: if the environment names no interpreter, or none that is there.
        """
        given = os.environ.get(self.variable, "")
        try:
            words = shlex.split(given)
        except ValueError as error:
            raise UserError(f"{self.variable}={given} cannot be read ({error}); close its quotes") from None
        if not words:
            raise UserError(
                f"{self.scorer} is scored by a Python environment of its own, and {self.variable} does not name one; "
                f"set it to that environment's python ({MANUAL})"
            )
        if shutil.which(words[0]) is None:
            raise UserError(f"{self.variable}: {words[0]} is no program; give that environment's python ({MANUAL})")
        if not self.script.is_file():
            raise UserError(f"{self.script} is not there; run from a checkout, or score by hand ({MANUAL})")
        return [words[0], str(self.script), *words[1:]]

    def check(self) -> None:
        """Look for interpreter, packages and files, before anything is drawn.

        Raises:
            UserError: for what is not there.
        """
        if not self.run:
            return
        command = [*self.command(), "--check"]
        try:
            done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            raise UserError(f"{self.scorer}: {shlex.join(command)} took more than {PATIENCE} s; run it alone") from None
        except OSError as error:
            raise UserError(f"{self.variable}: {command[0]} cannot be run ({error.strerror}) ({MANUAL})") from None
        if done.returncode:
            raise UserError(f"{self.scorer} cannot be scored: {last_line(done.stderr) or shlex.join(command)}")

    def __call__(self, folder: Path) -> Tensor:
        """Scores `[N, 2]` in float64 of the pictures of a folder, in the order of its index.

        The first column is the score, NaN for a picture that the metric does not judge; the second numbers its group.
        A JSON that is there and of the same index is read without scoring again.

        Raises:
            UserError: if the script fails, or its JSON is absent, damaged or of other pictures.
        """
        file = folder / f"{self.scorer}.json"
        if self.run and not is_of_index(file, folder):
            command = [*self.command(), str(folder), "--out", str(file)]
            if subprocess.run(command, env=environment()).returncode:
                raise UserError(f"{self.scorer} failed on {folder}; its messages stand above")
        return read_scores(file, folder, self.scorer)


def environment() -> dict[str, str]:
    """The environment of a script: this one, without what would lead another Python to this one's packages."""
    ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
    return {name: value for name, value in os.environ.items() if name not in ours}


def last_line(text: str) -> str:
    """The last line of a program's messages, without `error: `."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return re.sub(r"^error: ", "", lines[-1]) if lines else ""


def is_of_index(file: Path, folder: Path) -> bool:
    """Whether a JSON of scores is of the pictures that a folder's index names."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["index_sha256"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False
    return bool(found == file_hash(folder / INDEX))


def read_scores(file: Path, folder: Path, scorer: str) -> Tensor:
    """The scores in a JSON `[N, 2]`, as `OutsideScorer` returns them.

    Raises:
        UserError: if the JSON is absent, damaged, or of other pictures than the folder's.
    """
    again = f"score the folder again: PYTHON scripts/external/{scorer}.py {folder} ({MANUAL})"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); {again}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{file} is no JSON; {again}") from None
    problem = problem_of(found, scorer)
    if problem:
        raise UserError(f"{file} {problem}; {again}")
    if not is_of_index(file, folder):
        raise UserError(f"{file} is of other pictures than {folder / INDEX} names; {again}")
    scores, groups, numbers = found["scores"], found.get("groups", {}), dict[str, int]()
    rows = []
    for picture in files_of(folder):
        if picture not in scores:
            raise UserError(f"{file} has no score of {picture}; {again}")
        value = math.nan if scores[picture] is None else float(scores[picture])
        rows.append((value, numbers.setdefault(groups.get(picture, ""), len(numbers))))
    return torch.tensor(rows, dtype=torch.float64)


def problem_of(found: Any, scorer: str) -> str | None:
    """The first fault in the content of a JSON of scores; None if there is none."""
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        return f'has no "format": {FORMAT}'
    if found.get("metric") != scorer:
        return f"is of the metric {found.get('metric')!r}"
    scores, groups = found.get("scores"), found.get("groups", {})
    if not isinstance(scores, dict) or not isinstance(groups, dict):
        return 'has no "scores" by file'
    for picture, value in scores.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number and value is not None:
            return f"gives {picture} the score {value!r}, which is no finite number"
    if all(value is None for value in scores.values()):
        return "has a score for none of the pictures"
    if not all(isinstance(group, str) for group in groups.values()):
        return 'has "groups" that are no texts'
    return None


class External(PictureMetric):
    """The mean of scores from outside: over pictures, or over groups (GenEval's tasks) of their means.

    Its scores stand among the features, under the name of `outside`, which makes them of a folder of pictures.

    Args:
        scorer: "hpsv3", "imagereward", "geneval", "geneval2" or "vbench".
        run: whether the script is run here; else its JSON must be in the folder when it is scored.

    Raises:
        UserError: for an unknown scorer.
    """

    extractors = ()
    higher_is_better = True

    def __init__(self, scorer: str, run: bool = True) -> None:
        if scorer not in NAMES:
            raise UserError(f"scorer={scorer} is not known; use one of {', '.join(NAMES)}")
        self.name = scorer
        self.outside = OutsideScorer(scorer, run)

    def check(self, reference: Reference | None = None) -> None:
        super().check(reference)
        self.outside.check()

    def score(self, drawn: Drawn, reference: Reference | None = None) -> Score:
        if self.outside.name not in drawn.features:
            raise UserError(f"the drawn pictures have no scores of {self.name}; score their folder first")
        rows = drawn.features[self.outside.name]
        check_shape("scores", rows, (None, 2))
        parts = mean_of_groups(rows[:, 0].double(), rows[:, 1].long())
        return Score({self.name: float(parts.mean())}, parts)


def mean_of_groups(values: Tensor, groups: Tensor) -> Tensor:
    """`[N]` values whose mean is the mean over groups of the mean within each, and that a bootstrap may draw.

    A picture's value is that mean plus its derivative in the direction of the picture (the influence function):
    `m + N / (G n_g) (x - m_g)` for a picture of a group with n_g judged ones, of G groups.

    Args:
        values: `[N]`; NaN for pictures that are not judged, whose value is `m`.
        groups: number of each picture's group `[N]`.
    """
    judged = ~values.isnan()
    sizes = torch.bincount(groups[judged])
    numbers = sizes.nonzero().flatten()
    means = torch.bincount(groups[judged], values[judged], len(sizes)) / sizes.clamp_min(1)
    parts = torch.full_like(values, float(means[numbers].mean()))
    weights = len(values) / (len(numbers) * sizes.clamp_min(1))
    parts[judged] += weights[groups[judged]] * (values[judged] - means[groups[judged]])
    return parts
