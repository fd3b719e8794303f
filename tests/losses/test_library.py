"""The method's equations are a library, and docs/losses.md shows how they are used without the package's trainer."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from lightning import Trainer
from tiny import build_schedule
from torch import Tensor

from swd.data.iterations import Iterations
from swd.losses import DMD, GAN, MMD
from swd.modules import distiller
from swd.modules.pretrained import Pretrained
from swd.types import PictureBatch

ROOT = Path(__file__).parents[2]
HEAVY = ("lightning", "pytorch_lightning", "hydra", "omegaconf", "transformers", "peft")


LIGHT = ("swd.types", "swd.diffusion", "swd.schedule", "swd.losses", "swd.losses.update")


@pytest.fixture(scope="module")
def heavy_after() -> dict[str, list[str]]:
    """Heavy libraries that a new interpreter has imported after it imported each module in turn."""
    program = (
        "import importlib, json, sys\n"
        f"for name in {LIGHT}:\n"
        "    importlib.import_module(name)\n"
        f"    print(json.dumps([name, [heavy for heavy in {HEAVY} if heavy in sys.modules]]))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    return dict(json.loads(line) for line in result.stdout.splitlines())


@pytest.mark.parametrize("name", LIGHT)
def test_importing_it_is_light(name: str, heavy_after: dict[str, list[str]]) -> None:
    assert heavy_after[name] == []


# docs/losses.md

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "losses.md").read_text(encoding="utf-8"), re.S)
PROMPTS = ["a red star", "two blue circles"]


def block(beginning: str) -> str:
    """The one block of the page in which a line begins so."""
    (found,) = [text for text in BLOCKS if re.search(f"^{beginning}", text, re.M)]
    return found


def batches(count: int) -> list[Tensor]:
    return [2 * torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(i)) - 1 for i in range(count)]


def losses_of_the_page(model: Path) -> list[tuple[float, dict[str, float]]]:
    """Loss and metrics of every update, as the page's loop prints them."""
    printed: list[tuple[float, dict[str, float]]] = []
    names: dict[str, Any] = {
        "pipe": StableDiffusion3Pipeline.from_pretrained(model),
        "schedule": build_schedule(),
        "batches": iter([(pixels, PROMPTS) for pixels in batches(12)]),
        "blocks": (1,),
        "rate": 1e-2,
        "iterations": 2,
        "critic_updates": 5,
        "print": lambda iteration, update, row: printed.append((row.pop("loss"), row)),
    }
    program = "import torch\n" + block("for iteration in")
    exec(compile(program, "docs/losses.md", "exec"), names)
    return printed


def losses_of_the_distiller(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[float, dict[str, float]]]:
    seen: list[tuple[float, dict[str, float]]] = []

    def watched(function: Any) -> Any:
        def call(*args: Any) -> Any:
            found = function(*args)
            seen.append((found[0].item(), {name: value.item() for name, value in found[-1].items()}))
            return found

        return call

    for name in ("critic_loss", "generator_gradient"):
        monkeypatch.setattr(distiller, name, watched(getattr(distiller, name)))
    terms = {"dmd": DMD(), "mmd": MMD(blocks=(1,)), "gan": GAN(blocks=(1,))}
    pretrained = Pretrained("sd3", str(model), size=8, rank=64, precision="fp32", feature_blocks=(1,))
    task = distiller.Distiller(pretrained, build_schedule(), terms, lr=1e-2, critic_updates=5)
    trainer = Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
    )
    items: Any = [PictureBatch(pixels, prompts=PROMPTS) for pixels in batches(12)]
    trainer.fit(task, Iterations(items, 6))
    return seen


def test_the_loop_of_the_page_gives_the_distillers_losses(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = losses_of_the_distiller(tiny_model, tmp_path, monkeypatch)
    assert len(expected) == 12 and len({loss for loss, _ in expected}) == 12
    assert losses_of_the_page(tiny_model) == expected


def test_what_the_page_asks_one_to_bring_is_what_the_loop_uses() -> None:
    given = block("path = ")
    for name in ("pipe", "schedule", "batches", "blocks", "rate", "iterations", "critic_updates"):
        assert re.search(rf"^(?:.*, )?{name}(?:,.*)? = ", given, re.M), name


def test_the_function_of_the_page() -> None:
    real, fake = torch.zeros(2, 3, 4), torch.full((2, 3, 4), 3.0)
    names: dict[str, Any] = {"features_of_data": real, "features_of_student": fake}
    exec(compile(block("loss = mmd_loss"), "docs/losses.md", "exec"), names)
    assert names["loss"].item() == pytest.approx((9 + 1e-6) ** 0.5 - 1e-3)
