"""VBench (arXiv 2311.17982): one of its dimensions of quality, a score for each video.

VBench tells prompts by the names of files, PROMPT-0.mp4 to PROMPT-4.mp4, so the videos are linked under such names. A
dimension judges only videos of its own prompts; the others have no score.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from contract import Picture, Problem, ScoreBatch, Scorer, link, run

SCALE = {"imaging_quality": 0.01}
"""VBench gives a video's imaging quality from 0 to 100, and their mean from 0 to 1."""
MOST = 5
"""Videos of a prompt that VBench reads."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this metric alone."""
    parser.add_argument("--dimension", required=True, help="such as subject_consistency, imaging_quality, color")


def write_layout(pictures: list[Picture], folder: Path) -> dict[str, str]:
    """Link videos as VBench names them; the result says of which file of the index each name is."""
    drawn: Counter[str] = Counter()
    names = {}
    for picture in pictures:
        number = drawn[picture.prompt]
        drawn[picture.prompt] += 1
        if number >= MOST or "/" in picture.prompt:
            reason = f"VBench reads {MOST} videos a prompt" if number >= MOST else "a file name cannot hold '/'"
            raise Problem(f"{picture.path}, of the prompt {picture.prompt!r}: {reason}; draw VBench's own prompts")
        name = f"{picture.prompt}-{number}{picture.path.suffix}"
        link(picture.path, folder / name)
        names[name] = picture.file
    return names


def read_results(file: Path, dimension: str, names: dict[str, str]) -> dict[str, float]:
    """Scores by file of the index, from VBench's own results: the mean, then a list of videos."""
    results: Any = json.loads(file.read_text(encoding="utf-8"))
    rows = results[dimension][1]
    scale = SCALE.get(dimension, 1.0)
    return {names[Path(row["video_path"]).name]: scale * float(row["video_results"]) for row in rows}


def load(args: argparse.Namespace) -> ScoreBatch:
    """VBench, and the function that has it judge all videos."""
    import torch
    import vbench

    prompts = Path(vbench.__file__).parent / "VBench_full_info.json"

    def score(pictures: list[Picture]) -> list[float | None]:
        with tempfile.TemporaryDirectory() as work:
            names = write_layout(pictures, Path(work, "videos"))
            judge = vbench.VBench(torch.device(args.device), str(prompts), str(Path(work, "results")))
            judge.evaluate(videos_path=str(Path(work, "videos")), name="swd", dimension_list=[args.dimension])
            found = read_results(Path(work, "results", "swd_eval_results.json"), args.dimension, names)
        return [found.get(picture.file) for picture in pictures]

    return score


SCORER = Scorer("vbench", "vbench", ("vbench", "torch"), load, arguments=arguments, at_once=True)

if __name__ == "__main__":
    sys.exit(run(SCORER))
