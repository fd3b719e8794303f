"""Training the embedded teacher's autoencoder."""

from __future__ import annotations

import copy
import math
from collections import deque
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from swd.modules.training_task import WatchedTask, averaged, check_finite, replace_files, warmup_cosine
from swd.shapes.pipeline import build_shapes_pipeline, save_pipeline
from swd.types import PictureBatch, UserError


def edges(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels, along the height and along the width."""
    return pixels.diff(dim=-2), pixels.diff(dim=-1)


def reconstruction_loss(output: Tensor, target: Tensor, square_weight: float, edge_weight: float) -> Tensor:
    """Mean absolute error of the pixels, plus their squared error and the absolute error of neighbours' differences.

    With the absolute error alone the background is learnt first and the objects only much later. The objects fill few
    pixels but have large errors, so the squared error makes them count from the start.
    """
    loss = F.l1_loss(output, target) + square_weight * F.mse_loss(output, target)
    for a, b in zip(edges(output), edges(target), strict=True):
        loss = loss + edge_weight * F.l1_loss(a, b)
    return loss


class VAETask(WatchedTask):
    """Train the VAE of the pipeline in `path` on pictures at several sizes, and write it with the scale of its latents.

    `batch.pixels` is [B, 3, H, W] in [-1, 1]; each step shrinks its batch to one of `sizes`.

    Args:
        path: pipeline folder; if it is missing, an untrained pipeline is written there first.
        sizes: sides in pixels, multiples of 8, at most the pictures' own.
        lr: peak learning rate of Adam.
        warmup: steps up to the peak.
        kl_weight: weight of the mean KL divergence per latent element (nats).
        square_weight: weight of the squared error of the pixels.
        edge_weight: weight of the error in differences of neighbouring pixels.
        crop: side of the window that larger pictures are cut to.
        crop_chance: probability of that cut.
        ema: decay of the averaged weights; these are written.
        save_every: steps between writes.
        part: "all" trains from scratch; "decoder" trains only the decoder of the VAE in `path`, so that networks
            trained on its latents stay valid.
        seed: seed of every draw, and of the untrained pipeline.
    """

    deed = "training the VAE"

    def __init__(
        self,
        path: str,
        sizes: tuple[int, ...] = (48, 64, 96, 128),
        lr: float = 2e-3,
        warmup: int = 50,
        kl_weight: float = 5e-4,
        square_weight: float = 5.0,
        edge_weight: float = 0.25,
        crop: int = 64,
        crop_chance: float = 0.8,
        ema: float = 0.998,
        save_every: int = 500,
        part: Literal["all", "decoder"] = "all",
        seed: int = 0,
    ) -> None:
        super().__init__()
        for size in sizes:
            if size <= 0 or size % 8:
                raise ValueError(f"VAE sizes must be positive multiples of 8 pixels, got {size}: use e.g. 128")
        self.path = Path(path)
        self.sizes = tuple(sizes)
        self.lr = lr
        self.warmup = warmup
        self.kl_weight = kl_weight
        self.square_weight = square_weight
        self.edge_weight = edge_weight
        self.crop = crop
        self.crop_chance = crop_chance
        self.save_every = save_every
        self.seed = seed
        self.pick = torch.Generator().manual_seed(seed)
        self.part = part
        self.ema = ema
        self.vae: AutoencoderKL
        self.average: AveragedModel
        self.recent: deque[Tensor] = deque(maxlen=16)  # pictures that the scale of the latents is measured on

    def configure_model(self) -> None:
        if hasattr(self, "vae"):
            return
        if not (self.path / "model_index.json").exists():
            save_pipeline(build_shapes_pipeline(self.seed), self.path)
        whole = self.part == "all"
        vae: Any = (
            build_shapes_pipeline(self.seed).vae if whole else AutoencoderKL.from_pretrained(self.path / "vae").train()
        )
        self.vae = vae.to(memory_format=torch.channels_last)
        if self.part == "decoder":
            self.vae.encoder.requires_grad_(False)
        self.average = averaged(self.vae, self.ema)

    def training_step(self, batch: PictureBatch, batch_idx: int) -> Tensor:
        side = self.sizes[int(torch.randint(len(self.sizes), (), generator=self.pick))]
        pixels = F.interpolate(batch.pixels, size=(side, side), mode="area")
        pixels = self.maybe_crop(pixels).contiguous(memory_format=torch.channels_last)
        posterior = self.vae.encode(pixels).latent_dist
        mean = posterior.mean.float()
        logvar = posterior.logvar.float()
        noise = torch.randn(mean.shape, generator=self.pick).to(mean.device)
        latents = mean + noise * (0.5 * logvar).exp()
        output = self.vae.decode(latents).sample.float()

        reconstruction = reconstruction_loss(output, pixels, self.square_weight, self.edge_weight)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = reconstruction + self.kl_weight * kl
        self.checks = {"reconstruction": reconstruction.detach().isfinite(), "kl": kl.detach().isfinite()}
        error = F.mse_loss(output, pixels)
        self.last_metrics = {"loss": loss.detach(), "psnr": 10 * (4 / error.detach()).log10(), "kl": kl.detach()}
        self.log_dict(self.last_metrics)
        return loss

    def maybe_crop(self, pixels: Tensor) -> Tensor:
        """With probability `crop_chance`, a window of `crop` pixels at a random multiple of 8.

        That is cheaper, and enough for a convolutional network.
        """
        if pixels.shape[-1] <= self.crop or torch.rand((), generator=self.pick) >= self.crop_chance:
            return pixels
        places = (pixels.shape[-1] - self.crop) // 8 + 1
        top, left = (8 * torch.randint(places, (2,), generator=self.pick)).tolist()
        return pixels[..., top : top + self.crop, left : left + self.crop]

    def update_average(self) -> None:
        self.average.update_parameters(self.vae)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.recent.append(batch.pixels)
        if self.global_step % self.save_every == 0:
            self.export()

    def on_train_end(self) -> None:
        self.export()

    @torch.no_grad()
    def measure_latents(self, vae: AutoencoderKL, pixels: Tensor) -> tuple[float, float]:
        """Mean and standard deviation of sampled latents; all sizes have the same weight."""
        means = []
        squares = []
        for side in self.sizes:
            small = F.interpolate(pixels, size=(side, side), mode="area")
            latents = torch.cat([vae.encode(chunk).latent_dist.sample(self.pick).float() for chunk in small.split(16)])
            means.append(latents.mean())
            squares.append(latents.square().mean())
        mean = torch.stack(means).mean()
        square = torch.stack(squares).mean()
        return mean.item(), (square - mean.square()).sqrt().item()

    @property
    def target(self) -> Path:
        return self.path / "vae"

    def export(self) -> None:
        """Write the averaged VAE in half precision, with the shift and scale that normalise its latents."""
        if not self.trainer.is_global_zero:
            return
        vae: Any = copy.deepcopy(self.average.module)
        vae.eval()
        if self.part == "all":
            if not self.recent:  # the run was resumed after its last step
                self.recent.append(cast(Any, self.trainer).datamodule.last(256, 0).to(self.device).pixels)
            mean, deviation = self.measure_latents(vae, torch.cat(list(self.recent)))
            if not math.isfinite(mean + 1 / max(deviation, 1e-30)):
                raise UserError(f"VAE {self.target} has latents that are not finite and was not written")
            vae.register_to_config(shift_factor=round(mean, 4), scaling_factor=round(1 / deviation, 4))
        vae.to(torch.float16)
        check_finite(vae, f"VAE {self.target}")
        replace_files(self.target, vae.save_pretrained)

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.vae.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=self.lr, betas=(0.9, 0.99))
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(self.warmup, total, 0.01))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
