"""Measures the figures in the model cards of the embedded models.

    python -m swd.shapes.figures judge   --pictures 4096
    python -m swd.shapes.figures vae     --pictures 512
    python -m swd.shapes.figures teacher --pictures 256 --split heldout --guidance 4

Prints one line of JSON: accuracies in [0, 1] (see `swd.shapes.judge`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from swd.modules.family_folder import resolve_asset
from swd.shapes.dataset import SPLITS, ShapesDataset
from swd.shapes.judge import Judge, prompt_accuracy
from swd.shapes.pipeline import TEXT_TOKENS

SEED = 1_000_003
"""Seed of the pictures that figures are measured on; trainings use small seeds, so the pictures differ."""


def pictures(split: str, count: int) -> tuple[Tensor, list[str], list[str]]:
    """Rendered pictures [N, 3, 128, 128], their captions, and their complete captions."""
    dataset = ShapesDataset(split, SEED, count)
    pixels = torch.stack([dataset[i]["pixels"] for i in range(count)])
    drawn = [dataset.draw(i) for i in range(count)]
    return pixels, [prompt.caption() for _, prompt in drawn], [scene.caption() for scene, _ in drawn]


@torch.no_grad()
def in_batches(function: Callable[[Tensor], Tensor], inputs: Tensor, batch: int = 32) -> Tensor:
    """Apply a function to chunks along the first axis."""
    return torch.cat([function(chunk) for chunk in inputs.split(batch)])


def resized(pixels: Tensor, side: int) -> Tensor:
    """Pictures resized to 128x128, the size that the judge reads."""
    return pixels if side == 128 else F.interpolate(pixels, size=(128, 128), mode="bicubic", align_corners=False)


def measure_judge(judge: Judge, split: str, count: int) -> dict[str, object]:
    """Accuracy of the judge on rendered pictures with complete captions."""
    pixels, _, full = pictures(split, count)
    return dict(prompt_accuracy(judge, pixels, full))


def measure_vae(judge: Judge, folder: Path, split: str, count: int, sizes: tuple[int, ...]) -> dict[str, object]:
    """Accuracy of VAE reconstructions at each size, and their peak signal-to-noise ratio in dB."""
    vae = StableDiffusion3Pipeline.from_pretrained(folder, transformer=None, local_files_only=True).vae
    pixels, _, full = pictures(split, count)
    result: dict[str, object] = {}
    for side in sizes:
        small = F.interpolate(pixels, size=(side, side), mode="area")
        output = in_batches(lambda x: vae.decode(vae.encode(x).latent_dist.mode()).sample, small).clamp(-1, 1)
        psnr = 10 * (4 / (output - small).square().mean()).log10()
        result[str(side)] = prompt_accuracy(judge, resized(output, side), full) | {"psnr": psnr.item()}
    return result


def measure_teacher(
    judge: Judge, folder: Path, split: str, count: int, sizes: tuple[int, ...], steps: int, guidance: float
) -> dict[str, object]:
    """Accuracy of pictures that the stock pipeline draws for the captions of a split."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    dataset = ShapesDataset(split, SEED, count)
    prompts = [dataset.draw(i)[1].caption() for i in range(count)]
    result: dict[str, object] = {}
    for side in sizes:
        drawn = []
        for start in range(0, count, 32):
            chunk = prompts[start : start + 32]
            generators = [torch.Generator().manual_seed(SEED + start + i) for i in range(len(chunk))]
            with torch.autocast("cpu", torch.bfloat16):
                output = pipeline(
                    chunk,
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    height=side,
                    width=side,
                    max_sequence_length=TEXT_TOKENS,
                    generator=generators,
                    output_type="pt",
                ).images
            drawn.append(output.float() * 2 - 1)
        result[str(side)] = prompt_accuracy(judge, resized(torch.cat(drawn), side), prompts)
    return result


def argument_parser() -> argparse.ArgumentParser:
    """The arguments of this module's command."""
    parser = argparse.ArgumentParser(description="figures of the embedded models")
    parser.add_argument("what", choices=("judge", "vae", "teacher"))
    parser.add_argument("--split", choices=SPLITS, default="heldout")
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128], help="sides in pixels")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--pipeline", type=Path, help="default: the embedded teacher")
    parser.add_argument("--judge", type=Path, help="default: the embedded judge")
    return parser


def main() -> None:
    """Measure one kind of figures; see the module's description."""
    a = argument_parser().parse_args()
    folder = a.pipeline or resolve_asset("swd://assets/shapes-sd3")
    judge = Judge.from_pretrained(a.judge or resolve_asset("swd://assets/shapes-judge"))
    sizes = tuple(a.sizes)
    if a.what == "judge":
        result = measure_judge(judge, a.split, a.pictures)
    elif a.what == "vae":
        result = measure_vae(judge, folder, a.split, a.pictures, sizes)
    else:
        result = measure_teacher(judge, folder, a.split, a.pictures, sizes, a.steps, a.guidance)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
