"""HPSv3 (arXiv 2508.03789): a preference score of Qwen2-VL 7B; the first of its two outputs, the mean."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from contract import Picture, ScoreBatch, Scorer, check_files, run


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this metric alone."""
    parser.add_argument("--weights", type=Path, help="HPSv3.safetensors; from the hub (MizzenAI/HPSv3) if left out")


def check(args: argparse.Namespace) -> None:
    """Look for the weights."""
    check_files({"--weights": args.weights}, "download HPSv3.safetensors of MizzenAI/HPSv3")


def load(args: argparse.Namespace) -> ScoreBatch:
    """The model, and the function that scores a batch."""
    import torch
    from hpsv3 import HPSv3RewardInferencer

    model = HPSv3RewardInferencer(device=args.device, checkpoint_path=args.weights and str(args.weights))

    def score(pictures: list[Picture]) -> list[float | None]:
        paths, prompts = [str(each.path) for each in pictures], [each.prompt for each in pictures]
        with torch.no_grad():
            return [float(row[0]) for row in model.reward(image_paths=paths, prompts=prompts)]

    return score


SCORER = Scorer("hpsv3", "hpsv3", ("hpsv3", "torch"), load, arguments=arguments, check=check)

if __name__ == "__main__":
    sys.exit(run(SCORER))
