"""A style on the embedded teacher: a LoRA learns it by flow matching, and students of the changed base keep it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from swd.commands.sample import Request, build_pipeline, draw
from swd.data.datamodule import PairData
from swd.data.iterations import Iterations
from swd.losses import MMD
from swd.modules.adapters import load
from swd.modules.distiller import Distiller
from swd.modules.flow_matching import FlowMatching
from swd.modules.pretrained import Pretrained
from swd.schedule import ScaleSchedule
from swd.shapes.dataset import Item, ShapesDataset
from swd.types import PictureBatch, UserError

LIGHT = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
SEPIA = torch.tensor([1.0, 0.72, 0.4]).view(3, 1, 1)
PROMPTS = [
    "a large red star on a white background",
    "a large blue ring on a gray background",
    "a large green circle on a sand background",
    "a large yellow heart on a navy background",
]


def in_sepia(pixels: Tensor) -> Tensor:
    """Pictures `[3, H, W]` in [-1, 1] in shades of one colour."""
    return 2 * ((pixels + 1) / 2 * LIGHT).sum(-3, keepdim=True) * SEPIA - 1


def off_palette(pixels: Tensor) -> float:
    """Length of what is not along that colour, relative to the pictures' own: 0 in sepia, about 0.35 in the data."""
    colours = (pixels + 1) / 2
    unit = SEPIA / SEPIA.norm()
    rest = colours - (colours * unit).sum(-3, keepdim=True) * unit
    return float(rest.norm(dim=-3).mean() / colours.norm(dim=-3).mean())


class Sepia(Dataset[Item]):
    """The shapes in that palette."""

    def __init__(self) -> None:
        self.shapes = ShapesDataset("train", 0, 2400)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> Item:
        item = self.shapes[index]
        return {**item, "pixels": in_sepia(item["pixels"])}


def teacher(side: int, *adapters: Any) -> Pretrained:
    return Pretrained(
        "sd3",
        "swd://assets/shapes-sd3",
        size=side,
        rank=16,
        precision="fp32",
        feature_blocks=[3],
        max_text_tokens=24,
        teacher_steps=6,
        dmd_guidance_scale=4.0,
        drawing_guidance_scale=4.0,
        adapters=adapters or None,
    )


def fit(task: L.LightningModule, data: Any, steps: int) -> None:
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=None if isinstance(task, Distiller) else 1.0,
    )
    trainer.fit(task, data)


def learn_style(folder: Path, sizes: list[int], steps: int, batch: int) -> Path:
    task = FlowMatching(
        teacher(sizes[-1]), sizes, out=str(folder), lora=True, lr=5e-3, warmup=5, ema=0.9, save_every=10**6
    )
    fit(task, PairData(Sepia(), batch, endless=True), steps)
    return folder


def drawn(model: Pretrained) -> float:
    """How far the teacher's pictures are from the palette."""
    pictures, _ = draw(build_pipeline(model), model, [Request(prompt, i) for i, prompt in enumerate(PROMPTS)])
    return off_palette(torch.stack(pictures))


def student(model: Pretrained, sigmas: list[float], sizes: list[int], steps: int, style: bool, lr: float) -> float:
    """How far the pictures of a student are from the palette after some iterations on pictures in it, or others."""
    data: Dataset[Item] = Sepia() if style else ShapesDataset("train", 0, 1000)
    task = Distiller(model, ScaleSchedule(sigmas, sizes), {"mmd": MMD(blocks=[3])}, critic_updates=0, lr=lr)
    items = [data[i] for i in range(8)]
    batch = PictureBatch(pixels=torch.stack([item["pixels"] for item in items]), prompts=[i["prompt"] for i in items])
    fit(task, Iterations([batch] * steps, task.batches_per_iteration), steps)
    return off_palette(task.sample(PROMPTS, list(range(len(PROMPTS))))[0])


@pytest.fixture(scope="module")
def sepia(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return learn_style(tmp_path_factory.mktemp("style") / "sepia", [6], 40, 8)


def test_a_style_that_flow_matching_taught_is_added_to_the_base_by_its_weight(sepia: Path) -> None:
    assert load(sepia).ranks == {16}
    plain, half, styled = (
        drawn(teacher(6, *adapters)) for adapters in ((), ({"path": str(sepia), "weight": 0.5},), (str(sepia),))
    )
    assert styled < 0.6 * plain and styled < half < plain


def test_a_student_of_the_styled_base_keeps_the_style(sepia: Path) -> None:
    without = student(teacher(6), [1.0, 0.7], [4, 6], 3, style=False, lr=1e-4)
    styled = student(teacher(6, str(sepia)), [1.0, 0.7], [4, 6], 3, style=True, lr=1e-4)
    assert styled < 0.7 * without


def test_a_lora_is_refused_what_only_whole_networks_can(tmp_path: Path) -> None:
    for more, message in (
        ({"out": None}, "task.out is missing"),
        ({"from_scratch": True}, "task.from_scratch=True trains whole networks"),
        ({"muon_lr": 0.1}, "task.muon_lr=0.1 trains whole networks"),
        ({"compile": True}, "task.compile=True trains whole networks"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            FlowMatching(teacher(6), [6], **{"out": str(tmp_path), "lora": True} | more)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_longer_training_keeps_the_style_at_all_sizes(tmp_path: Path) -> None:
    sizes = [6, 8, 12, 16]
    path = str(learn_style(tmp_path / "sepia", sizes, 300, 8))
    plain, styled = drawn(teacher(16)), drawn(teacher(16, path))
    assert styled < 0.35 * plain
    levels = [1.0, 0.896, 0.737, 0.602]
    without = student(teacher(16), levels, sizes, 100, style=False, lr=2e-4)
    kept = student(teacher(16, path), levels, sizes, 100, style=True, lr=2e-4)
    assert kept < 0.35 * without
