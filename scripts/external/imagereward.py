"""ImageReward-v1.0 (arXiv 2304.05977): a reward of BLIP, which reads the first 35 tokens of a prompt."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from contract import Picture, ScoreBatch, Scorer, check_files, run


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this metric alone."""
    parser.add_argument("--weights", type=Path, help="ImageReward.pt; from the hub (THUDM/ImageReward) if left out")
    parser.add_argument("--config", type=Path, help="med_config.json; from the hub if left out")


def check(args: argparse.Namespace) -> None:
    """Look for the weights."""
    check_files({"--weights": args.weights, "--config": args.config}, "download it from THUDM/ImageReward")


def load(args: argparse.Namespace) -> ScoreBatch:
    """The model, and the function that scores a batch."""
    import ImageReward

    weights = str(args.weights) if args.weights else "ImageReward-v1.0"
    model = ImageReward.load(weights, device=args.device, med_config=args.config and str(args.config))

    def score(pictures: list[Picture]) -> list[float | None]:
        return [float(model.score(each.prompt, str(each.path))) for each in pictures]

    return score


SCORER = Scorer("imagereward", "image-reward", ("ImageReward",), load, arguments=arguments, check=check)

if __name__ == "__main__":
    sys.exit(run(SCORER))
