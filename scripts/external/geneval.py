"""GenEval (arXiv 2310.11513): whether an object detector finds what the prompt asks for, 1 or 0 a picture.

Its own program judges a folder that this script lays out for it:

    LAYOUT/00007/metadata.jsonl      line 7 (from 0) of the benchmark's prompts/evaluation_metadata.jsonl
    LAYOUT/00007/samples/0000.png    the pictures of that prompt

The score of a model is the mean over the six tasks of the share of right pictures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from contract import Picture, Problem, ScoreBatch, Scorer, check_files, link, run

PROMPTS, PROGRAM = "prompts/evaluation_metadata.jsonl", "evaluation/evaluate_images.py"
CLONE = "clone https://github.com/djghosh13/geneval, and fill the detector's folder by its download_models.sh"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this metric alone."""
    parser.add_argument("--repository", type=Path, required=True, help="the cloned benchmark")
    parser.add_argument("--detector", type=Path, required=True, help="folder with Mask2Former's weights")
    parser.add_argument("--model-config", type=Path, help="Mask2Former's configuration; mmdet's if left out")


def check(args: argparse.Namespace) -> None:
    """Look for the benchmark and the detector."""
    files = {f"--repository: {name}": args.repository / name for name in (PROMPTS, PROGRAM)}
    check_files({**files, "--detector": args.detector, "--model-config": args.model_config}, CLONE)


def read_benchmark(repository: Path) -> list[dict[str, Any]]:
    """The benchmark's prompts with what must be in the picture, in its order."""
    for name in (PROMPTS, PROGRAM):
        if not (repository / name).is_file():
            raise Problem(f"{repository / name} is not there; {CLONE} and give --repository FOLDER")
    return [
        json.loads(line) for line in (repository / PROMPTS).read_text(encoding="utf-8").splitlines() if line.strip()
    ]


def entries_of(benchmark: list[dict[str, Any]], pictures: list[Picture]) -> list[int]:
    """For each picture, the number of its prompt in the benchmark."""
    numbers = {entry["prompt"]: number for number, entry in enumerate(benchmark)}
    for picture in pictures:
        if picture.prompt not in numbers:
            raise Problem(f"{picture.path} has the prompt {picture.prompt!r}, none of GenEval's; draw with {PROMPTS}")
        if picture.path.suffix != ".png":
            raise Problem(f"{picture.path} is no .png, and GenEval reads no others; draw PNG files")
    return [numbers[picture.prompt] for picture in pictures]


def write_layout(benchmark: list[dict[str, Any]], pictures: list[Picture], layout: Path) -> dict[Path, str]:
    """Lay pictures out as GenEval reads them; the result says of which picture of the index each file is."""
    drawn: Counter[int] = Counter()
    files = {}
    for i, number in enumerate(entries_of(benchmark, pictures)):
        folder = layout / f"{number:05}"
        file = folder / "samples" / f"{drawn[number]:04}.png"
        link(pictures[i].path, file)
        (folder / "metadata.jsonl").write_text(json.dumps(benchmark[number]), encoding="utf-8")
        files[file] = pictures[i].file
        drawn[number] += 1
    return files


def read_results(results: Path, files: dict[Path, str]) -> dict[str, float]:
    """1 or 0 for each picture of the index, from the benchmark's own results."""
    if not results.is_file():
        raise Problem(f"{PROGRAM} wrote no results; its messages stand above")
    rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {files[Path(row["filename"])]: float(row["correct"]) for row in rows}


def load(args: argparse.Namespace) -> ScoreBatch:
    """The function that has the benchmark's program judge all pictures."""
    benchmark = read_benchmark(args.repository)
    if not args.detector.is_dir():
        raise Problem(
            f"--detector {args.detector} is not there; {args.repository}/evaluation/download_models.sh fills it"
        )

    def score(pictures: list[Picture]) -> list[float | None]:
        with tempfile.TemporaryDirectory() as work:
            files = write_layout(benchmark, pictures, Path(work, "pictures"))
            results = Path(work, "results.jsonl")
            command = [sys.executable, str(args.repository / PROGRAM), str(Path(work, "pictures"))]
            command += ["--outfile", str(results), "--model-path", str(args.detector)]
            command += ["--model-config", str(args.model_config)] if args.model_config else []
            if subprocess.run(command, check=False).returncode:
                raise Problem(f"{args.repository / PROGRAM} failed; its messages stand above")
            found = read_results(results, files)
        return [found.get(picture.file) for picture in pictures]

    return score


def groups(args: argparse.Namespace, pictures: list[Picture]) -> list[str]:
    """The task of each picture."""
    benchmark = read_benchmark(args.repository)
    return [str(benchmark[number]["tag"]) for number in entries_of(benchmark, pictures)]


MODULES = ("mmdet", "open_clip", "clip_benchmark", "pandas", "torch")
SCORER = Scorer("geneval", "", MODULES, load, arguments=arguments, check=check, groups=groups, at_once=True)

if __name__ == "__main__":
    sys.exit(run(SCORER))
