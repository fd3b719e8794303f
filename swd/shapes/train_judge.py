"""Training the judge, the classifier that reads pictures of shapes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from swd.data.datamodule import BatchPlan, Guarded, GuardedLoader, TrainingData, as_it_is, check_loading
from swd.modules.training_task import WatchedTask, averaged, check_finite, replace_files, warmup_cosine
from swd.shapes.dataset import BACKGROUNDS, COLOURS, PLACES, RESOLUTION, SHAPES, SIZES, Item, Scene, ShapesDataset
from swd.shapes.judge import NOTHING, Judge

IGNORE = -100
"""Target of colour and size at an empty place, which the loss ignores."""


def targets(scene: Scene) -> dict[str, Tensor]:
    """Class indices of a scene: shape, colour and size [P, P] with P = PLACES, and background []."""
    shape = torch.full((PLACES, PLACES), NOTHING)
    colour = torch.full((PLACES, PLACES), IGNORE)
    size = torch.full((PLACES, PLACES), IGNORE)
    for thing in scene.objects:
        place = thing.row, thing.column
        shape[place] = SHAPES.index(thing.shape)
        colour[place] = tuple(COLOURS).index(thing.colour)
        size[place] = tuple(SIZES).index(thing.size)
    return {
        "shape": shape,
        "colour": colour,
        "size": size,
        "background": torch.tensor(tuple(BACKGROUNDS).index(scene.background)),
    }


class LabelledItem(Item):
    """An item of `LabelledShapes`: what `targets` returns is under "targets"."""

    targets: dict[str, Tensor]


class LabelledShapes(ShapesDataset):
    """`ShapesDataset` whose items also hold the judge's targets under "targets"."""

    def __getitem__(self, index: int) -> LabelledItem:
        return {**super().__getitem__(index), "targets": targets(self.draw(index)[0])}


class JudgeData(TrainingData):
    """Drawn pictures with the judge's targets, each used once, in the order of their indices.

    Args:
        split: split of `ShapesDataset`; "all" has every pair of colour and shape.
        batch_size: pictures in a batch, over all processes.
        workers: loader processes.
        seed: seed of the pictures.
    """

    def __init__(self, split: str = "all", batch_size: int = 64, workers: int = 0, seed: int = 0) -> None:
        super().__init__()
        check_loading(batch_size, workers, seed)
        self.split = split
        self.batch_size = batch_size
        self.workers = workers
        self.seed = seed

    def batch_loader(self, plan: BatchPlan) -> DataLoader[Any]:
        return GuardedLoader(
            Guarded(LabelledShapes(self.split, self.seed, plan.total * self.batch_size), default_collate),
            batch_sampler=plan.batches(None, self.batch_size, self.seed),
            num_workers=self.workers,
            collate_fn=as_it_is,
        )


def degrade(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Degrade pictures as generated ones may be: lost resolution, noise, a shift in colour and contrast."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    if uniform(0, 1) < 0.6:
        side = int(uniform(44, RESOLUTION))
        mode = "area" if uniform(0, 1) < 0.5 else "bilinear"
        pixels = F.interpolate(pixels, size=(side, side), mode=mode)
        pixels = F.interpolate(pixels, size=(RESOLUTION, RESOLUTION), mode="bicubic", align_corners=False)
    device = pixels.device
    shape = (len(pixels), 3, 1, 1)
    contrast = 1 + 0.08 * (2 * torch.rand(shape, generator=generator) - 1)
    shift = 0.08 * (2 * torch.rand(shape, generator=generator) - 1)
    noise = uniform(0, 0.1) * torch.randn(pixels.shape, generator=generator)
    return pixels * contrast.to(device) + shift.to(device) + noise.to(device)


def judge_loss(logits: dict[str, Tensor], wanted: dict[str, Tensor]) -> Tensor:
    """Sum of the cross entropies of shape, colour, size and background; empty places count for the shape alone."""
    losses = [F.cross_entropy(logits[name].float(), wanted[name], ignore_index=IGNORE) for name in logits]
    return torch.stack(losses).sum()


def judge_accuracy(logits: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Share of right classes of each attribute: over places, for the background over pictures."""
    result = {}
    for name, values in logits.items():
        named = wanted[name] != IGNORE
        result[name] = (values.argmax(1) == wanted[name])[named].float().mean().item()
    return result


class JudgeTask(WatchedTask):
    """Train a `Judge` on drawn pictures and write it to `out`.

    A batch holds `pixels` [B, 3, 128, 128] in [-1, 1] and `targets` (see `targets`).

    Args:
        out: folder to write.
        widths: see `Judge`.
        features: see `Judge`.
        lr: peak learning rate of AdamW.
        warmup: steps up to the peak.
        weight_decay: weight decay of AdamW.
        ema: decay of the averaged weights; these are written.
        save_every: steps between writes.
        seed: seed of the degradations.
    """

    deed = "training the judge"

    def __init__(
        self,
        out: str,
        widths: tuple[int, ...] = (24, 48, 64),
        features: int = 64,
        lr: float = 3e-3,
        warmup: int = 50,
        weight_decay: float = 0.01,
        ema: float = 0.995,
        save_every: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.out = Path(out)
        self.lr = lr
        self.warmup = warmup
        self.weight_decay = weight_decay
        self.save_every = save_every
        self.generator = torch.Generator().manual_seed(seed)
        judge: Any = Judge(widths, features)
        self.judge: Judge = judge.to(memory_format=torch.channels_last)
        self.average = averaged(self.judge, ema)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        pixels = degrade(batch["pixels"], self.generator).contiguous(memory_format=torch.channels_last)
        logits = self.judge(pixels)
        loss = judge_loss(logits, batch["targets"])
        accuracy = {f"accuracy/{k}": v for k, v in judge_accuracy(logits, batch["targets"]).items()}
        self.last_metrics: dict[str, Any] = {"loss": loss.detach(), **accuracy}
        self.log_dict(self.last_metrics)
        return loss

    def update_average(self) -> None:
        self.average.update_parameters(self.judge)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.global_step % self.save_every == 0:
            self.export()

    def on_train_end(self) -> None:
        self.export()

    @property
    def target(self) -> Path:
        return self.out

    def export(self) -> None:
        """Write the averaged judge."""
        if self.trainer.is_global_zero:
            judge: Any = copy.deepcopy(self.average.module)
            check_finite(judge, f"judge {self.out}")
            replace_files(self.out, judge.eval().save_pretrained)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.judge.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(self.warmup, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
