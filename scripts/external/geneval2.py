"""GenEval 2 (arXiv 2512.16853): Qwen3-VL answers questions about each picture; Soft-TIFA of its answers, times 100.

Its own program takes one picture a prompt, as a JSON of paths by prompt, so it runs once for each picture of a prompt:

    paths.json        {"a green backpack and a pig": "/pictures/0.png", ...}
    benchmark.jsonl   the lines of geneval2_data.jsonl whose prompts were drawn
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from contract import Picture, Problem, ScoreBatch, Scorer, check_files, run, write_json

PROMPTS, PROGRAM = "geneval2_data.jsonl", "evaluation.py"
CLONE = "clone https://github.com/facebookresearch/GenEval2"
METHODS = ("soft_tifa_gm", "soft_tifa_am", "tifa", "vqascore")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this metric alone."""
    parser.add_argument("--repository", type=Path, required=True, help="the cloned benchmark")
    parser.add_argument("--method", default=METHODS[0], choices=METHODS, help="how answers become a score")


def check(args: argparse.Namespace) -> None:
    """Look for the benchmark."""
    check_files({f"--repository: {name}": args.repository / name for name in (PROMPTS, PROGRAM)}, CLONE)


def read_benchmark(repository: Path) -> dict[str, dict[str, Any]]:
    """The benchmark's entries by prompt."""
    lines = (repository / PROMPTS).read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines if line.strip()]
    return {entry["prompt"]: entry for entry in entries}


def rounds_of(pictures: list[Picture]) -> list[list[Picture]]:
    """Pictures in rounds that have no prompt twice: the first picture of every prompt, the second, and so on."""
    drawn: Counter[str] = Counter()
    rounds: list[list[Picture]] = []
    for picture in pictures:
        number = drawn[picture.prompt]
        drawn[picture.prompt] += 1
        if number == len(rounds):
            rounds.append([])
        rounds[number].append(picture)
    return rounds


def write_layout(benchmark: dict[str, dict[str, Any]], pictures: list[Picture], folder: Path) -> tuple[Path, Path]:
    """Write a round's `benchmark.jsonl` and `paths.json`, the two files that the benchmark's program reads."""
    for picture in pictures:
        if picture.prompt not in benchmark:
            raise Problem(f"{picture.path} has the prompt {picture.prompt!r}, none of GenEval 2's; draw with {PROMPTS}")
    entries, paths = folder / "benchmark.jsonl", folder / "paths.json"
    folder.mkdir(parents=True, exist_ok=True)
    entries.write_text("".join(json.dumps(benchmark[each.prompt]) + "\n" for each in pictures), encoding="utf-8")
    write_json(paths, {each.prompt: str(each.path.resolve()) for each in pictures})
    return entries, paths


def score_of(answers: list[float], method: str) -> float:
    """A picture's score in [0, 100] from the scores of its questions: their geometric or arithmetic mean."""
    if method == "soft_tifa_gm":
        return 100 * math.exp(sum(map(math.log, answers)) / len(answers)) if min(answers) > 0 else 0.0
    return 100 * sum(answers) / len(answers)


def load(args: argparse.Namespace) -> ScoreBatch:
    """The function that has the benchmark's program judge all pictures."""
    benchmark = read_benchmark(args.repository)

    def judge(pictures: list[Picture], folder: Path) -> dict[str, float]:
        entries, paths = write_layout(benchmark, pictures, folder)
        out = folder / "answers.json"
        command = [sys.executable, str(args.repository / PROGRAM), "--benchmark_data", str(entries)]
        command += ["--image_filepath_data", str(paths), "--method", args.method, "--output_file", str(out)]
        if subprocess.run(command, check=False).returncode or not out.is_file():
            raise Problem(f"{args.repository / PROGRAM} failed; its messages stand above")
        answers = json.loads(out.read_text(encoding="utf-8"))
        return {picture.file: score_of(answers[i], args.method) for i, picture in enumerate(pictures)}

    def score(pictures: list[Picture]) -> list[float | None]:
        found: dict[str, float] = {}
        with tempfile.TemporaryDirectory() as work:
            for number, part in enumerate(rounds_of(pictures)):
                found.update(judge(part, Path(work, str(number))))
        return [found[picture.file] for picture in pictures]

    return score


SCORER = Scorer(
    "geneval2", "", ("transformers", "scipy", "torch"), load, arguments=arguments, check=check, at_once=True
)

if __name__ == "__main__":
    sys.exit(run(SCORER))
