"""Flow matching of a denoising network on several sizes.

Trains the embedded teacher from scratch, adapts a pretrained teacher to the low resolutions of a schedule before it is
distilled (SwD paper, appendix B), and trains a LoRA, such as a style.
"""

from __future__ import annotations

import copy
import math
import shutil
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from swd.modules.adapters import fold_alpha, write_base, write_layouts
from swd.modules.backbones.base import Backbone
from swd.modules.compiling import check_compiler, compile_in_place
from swd.modules.finite import all_finite
from swd.modules.hub import is_hub_id
from swd.modules.muon import MuonAdamW, hidden_matrices
from swd.modules.networks import SharedBase
from swd.modules.pretrained import Pretrained
from swd.modules.training_task import WatchedTask, averaged, check_finite, replace_files, warmup_cosine
from swd.schedule import downscale
from swd.types import Conditioning, PictureBatch, Size, UserError

SAVE_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Encoded:
    """One picture as the network sees it: its latent at some sizes, and its caption's conditioning (one row)."""

    latents: dict[Size, Tensor]
    conditioning: Conditioning


def draw_sigma(batch: int, shift: float, spread: float, generator: torch.Generator) -> Tensor:
    """Noise levels [batch] in (0, 1): logit-normal, then shifted toward noise (arXiv 2403.03206, sections 3.1 and 5.3).

    One falls in each of `batch` equally likely ranges, in random order: a batch then never misses a range, and the
    loss varies less from step to step.

    Args:
        batch: how many.
        shift: 1 leaves them; above 1 moves them toward 1.
        spread: deviation of the logit.
        generator: where the randomness comes from.
    """
    ranges = torch.randperm(batch, generator=generator)
    quantile = (ranges + torch.rand(batch, generator=generator)) / batch
    sigma = torch.sigmoid(spread * torch.special.ndtri(quantile.clamp(1e-4, 1 - 1e-4)))
    return shift * sigma / (1 + (shift - 1) * sigma)


class FlowMatching(WatchedTask):
    """Train every weight of a pretrained network, or a LoRA on it, to draw at all sizes of a schedule.

    Each step takes one size: pictures are shrunk in pixel space (area), encoded, noised as `x_t = (1 - sigma) x0 +
    sigma eps`, and the network predicts `eps - x0`. What is written is an average of the weights.

    Args:
        model: the pipeline to start from.
        sizes: latent sides, or (H, W).
        size_weights: how often each size is taken, relative to the others; None: all the same.
        out: pipeline folder to write; None: the model's own. Another folder becomes a complete pipeline. With `lora`
            the folder of the adapter, which must be given.
        lora: train a LoRA on the frozen network, of the model's rank, alpha and targets, rather than every weight.
        from_scratch: start from fresh weights rather than the pipeline's.
        lr: peak learning rate of AdamW.
        muon_lr: peak learning rate of Muon, which then trains the blocks' matrices (see `MuonAdamW`); None: AdamW
            alone.
        warmup: steps up to it; half a cosine down to zero follows.
        weight_decay: of AdamW.
        ema: decay of the averaged weights.
        caption_dropout: how often a caption becomes what guidance takes in its place (the empty one; SDXL: zeros).
        sigma_shift, sigma_spread: see `draw_sigma`.
        reuse: a step trains on `reuse` times as many pictures as its batch brings; the others come from a memory of
            pictures already encoded (at every size). 1: every picture is used once and encoded at one size only.
        memory: how many encoded pictures are kept. Checkpoints hold none: with `reuse` above 1 a run that goes on
            fills its memory again, and does not draw the pictures that the run before it would have drawn.
        compile: compile the network's blocks.
        save_every: steps between writes.
        save_dtype: of the weights written.
        seed: of every draw.

    Raises:
        UserError: for a size or a block count that the network cannot take, or counts that do not fit together.
    """

    deed = "training by flow matching"

    def __init__(
        self,
        model: Pretrained,
        sizes: Sequence[int | Sequence[int]],
        size_weights: Sequence[float] | None = None,
        out: str | None = None,
        lora: bool = False,
        from_scratch: bool = False,
        lr: float = 1e-5,
        muon_lr: float | None = None,
        warmup: int = 100,
        weight_decay: float = 0.01,
        ema: float = 0.999,
        caption_dropout: float = 0.1,
        sigma_shift: float = 3.0,
        sigma_spread: float = 1.0,
        reuse: int = 1,
        memory: int = 32_768,
        compile: bool = False,
        save_every: int = 500,
        save_dtype: Literal["fp16", "bf16", "fp32"] = "bf16",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.seed = seed
        self.sizes: list[Size] = [(s, s) if isinstance(s, int) else tuple(s) for s in sizes]
        self.size_weights = torch.tensor(size_weights or [1.0] * len(self.sizes))
        self.lora = lora
        if lora and not out:
            raise UserError("task.out is missing: task.lora=true writes an adapter; give the folder for it")
        self.out = Path(out) if out else model.folder
        self.lr = lr
        self.muon_lr = muon_lr
        self.warmup = warmup
        self.weight_decay = weight_decay
        self.caption_dropout = caption_dropout
        self.sigma_shift = sigma_shift
        self.sigma_spread = sigma_spread
        self.reuse = reuse
        if compile:
            check_compiler("task.compile=true")
        self.compile_blocks = compile
        self.save_every = save_every
        self.save_dtype = SAVE_DTYPES[save_dtype]
        self.from_scratch = from_scratch
        self.ema = ema
        self._check()

        self.memory: deque[Encoded] = deque(maxlen=memory)
        self.last_metrics: dict[str, Tensor] = {}
        self.backbone: Backbone
        self.average: AveragedModel
        self.adapter: nn.ParameterList  # trained with `lora`; the frozen network is in `_networks`
        self._networks: list[SharedBase] = []
        self._encoders: list[Any] = []  # in a list, to stay out of checkpoints and of the optimizer

    def configure_model(self) -> None:
        if hasattr(self, "backbone") or self._networks:
            return
        model = self.model
        if self.lora:
            device = self.device if self._trainer is None else self.trainer.strategy.root_device
            networks = model.networks(("student",), self.seed, device)
            assert isinstance(networks, SharedBase)  # `_check` refuses model.tuning=full
            self._networks.append(networks)
            self.adapter = nn.ParameterList(networks.role_parameters("student"))
            self.average = averaged(self.adapter, self.ema)
            return
        network = model.network_class.from_pretrained(
            model.fetch(), subfolder=model.backbone_class.subfolder, torch_dtype=torch.float32, use_safetensors=True
        )
        model.add_adapters(network)
        if self.from_scratch:
            model.backbone_class.initialise(network, self.seed)
        self.backbone = model.backbone_class(network.train().requires_grad_(True), model.embedded_guidance)
        self.average = averaged(network, self.ema)

    def _check(self) -> None:
        if is_hub_id(self.model.path) and self.out == self.model.folder:
            raise UserError(f"task.out is missing: {self.model.path} is on the hub; give a folder for the trained copy")
        if self.model.backbone_class.other_experts:
            raise UserError(
                f"task=flow trains all noise levels, and model.family={self.model.family} is one of several experts; "
                "give a model of one network"
            )
        if self.from_scratch and not self.model.backbone_class.trains_from_scratch:
            raise UserError(f"task.from_scratch is for the embedded teacher, not for {self.model.family}; leave it out")
        if self.lora:
            self._check_lora()
        if len(self.size_weights) != len(self.sizes):
            raise UserError(
                f"task.size_weights has {len(self.size_weights)} entries for {len(self.sizes)} sizes; give one per size"
            )
        for size in self.sizes:
            if min(size) < 1:
                raise UserError(f"task.sizes has {size}; sides are at least 1")
            self.model.limits.check_size(size)
        if self.reuse < 1:
            raise UserError(f"task.reuse={self.reuse}; use at least 1")

    def _check_lora(self) -> None:
        """Refuse what only training every weight can do."""
        for key, given in {
            "from_scratch": self.from_scratch,
            "muon_lr": self.muon_lr,
            "compile": self.compile_blocks,
        }.items():
            if given:
                raise UserError(f"task.{key}={given} trains whole networks; leave it out, or task.lora=true")
        if self.model.tuning == "full":
            raise UserError("model.tuning=full beside task.lora=true; leave one of the two out")
        self.model.check_targets()

    @property
    def encoders(self) -> Any:
        """Text encoders and VAE, loaded when first used."""
        if not self._encoders:
            self._encoders.append(self.model.encoders(self.device).to(self.device))
        return self._encoders[0]

    def on_fit_start(self) -> None:
        if self.lora:
            self._networks[0].to(self.device)
            return
        if self.trainer.is_global_zero and self.out.resolve() != self.model.folder.resolve():
            skip = shutil.ignore_patterns(self.model.backbone_class.subfolder, ".*")
            shutil.copytree(self.model.fetch(), self.out, ignore=skip, dirs_exist_ok=True)
        if self.compile_blocks:
            compile_in_place(self.backbone.repeated_blocks)

    def training_step(self, batch: PictureBatch, batch_idx: int) -> Tensor:
        generator = torch.Generator().manual_seed((self.seed << 32) + self.global_step * 1009 + self.global_rank)
        size = self.sizes[int(torch.multinomial(self.size_weights, 1, generator=generator))]
        x0, conditioning = self.gather(batch, size, generator)
        conditioning = self.drop_captions(conditioning, generator)

        process = self.model.backbone_class.process
        sigma = draw_sigma(len(x0), self.sigma_shift, self.sigma_spread, generator).to(x0)
        eps = torch.randn(x0.shape, generator=generator).to(x0)
        prediction = self.predict(process.add_noise(x0, eps, sigma), sigma, conditioning)
        # Straight paths: arXiv 2210.02747, eq. 9; noise prediction: arXiv 2006.11239, eq. 14.
        target = eps if process.prediction_type == "epsilon" else eps - x0
        loss = F.mse_loss(prediction.float(), target)

        self.checks = {"encoded data": all_finite([x0]), "the network's prediction": all_finite([prediction])}
        self.last_metrics = {"loss": loss.detach()}
        self.log_dict({"loss": loss.detach(), f"loss/{size[0]}": loss.detach()})
        return loss

    def predict(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """The prediction `[B, C, *size]` of what is trained."""
        if not self.lora:
            return self.backbone.predict(x_t, sigma, conditioning)[0]
        networks = self._networks[0]
        with networks.role("student"), networks.autocast():
            return networks.backbone.predict(x_t, sigma, conditioning)[0]

    def gather(self, batch: PictureBatch, size: Size, generator: torch.Generator) -> tuple[Tensor, Conditioning]:
        """Latents at `size` and conditioning: of the batch alone, or of it and pictures encoded earlier."""
        if self.reuse == 1:
            return self.encode(batch.pixels, size, generator), self.encode_prompts(batch.prompts)
        self.memory.extend(self.encode_all(batch, generator))
        count = self.reuse * len(batch)
        chosen = torch.randint(len(self.memory), (count - len(batch),), generator=generator).tolist()
        picked = [self.memory[-1 - i] for i in range(len(batch))] + [self.memory[i] for i in chosen]
        x0 = torch.stack([item.latents[size] for item in picked]).float()
        return x0, Conditioning.cat([item.conditioning for item in picked])

    def encode_all(self, batch: PictureBatch, generator: torch.Generator) -> list[Encoded]:
        """Every picture of the batch at every size."""
        latents = {size: self.encode(batch.pixels, size, generator) for size in dict.fromkeys(self.sizes)}
        conditioning = self.encode_prompts(batch.prompts)
        return [
            Encoded({size: x0[i] for size, x0 in latents.items()}, conditioning.rows([i])) for i in range(len(batch))
        ]

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Conditioning of B prompts; if it names a size, then the largest one that is trained."""
        conditioning: Conditioning = self.encoders.encode_prompts(prompts, max(self.sizes, key=math.prod))
        return conditioning

    @torch.no_grad()
    def encode(self, pixels: Tensor, size: Size, generator: torch.Generator) -> Tensor:
        """Shrink in pixel space, encode, sample the posterior: float32 latents [B, C, *size]."""
        side = self.encoders.pixel_size(size)
        pixels = downscale(pixels, side)
        mean, std = self.encoders.posterior(pixels)
        latents = mean + std * torch.randn(mean.shape, generator=generator).to(mean.device)
        shift, scale = self.encoders.shift_and_scale(latents)
        return (latents - shift) * scale

    def drop_captions(self, conditioning: Conditioning, generator: torch.Generator) -> Conditioning:
        """Replace some rows by what takes the place of a prompt for guidance."""
        dropped = torch.rand(len(conditioning), generator=generator) < self.caption_dropout
        empty = self.model.unconditional(self.encode_prompts([""]))

        def mix(kept: Tensor, blank: Tensor) -> Tensor:
            mask = dropped.view(-1, *[1] * (kept.ndim - 1)).to(kept.device)
            return torch.where(mask, blank.to(kept), kept)

        values = {
            f.name: mix(kept, getattr(empty, f.name))
            for f in fields(conditioning)
            if (kept := getattr(conditioning, f.name)) is not None
        }
        return replace(conditioning, **values)

    def update_average(self) -> None:
        self.average.update_parameters(self.adapter if self.lora else self.backbone.network)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.global_step % self.save_every == 0:
            self.export()

    def on_train_end(self) -> None:
        self.export()

    @property
    def target(self) -> Path:
        return self.out if self.lora else self.out / self.model.backbone_class.subfolder

    def export(self) -> None:
        """Write the averaged network into the pipeline folder `out`, or the averaged adapter."""
        if self.trainer.is_global_zero and self.lora:
            check_finite(self.average, str(self.target))
            replace_files(self.target, self._write_adapter)
        elif self.trainer.is_global_zero:
            network: Any = copy.deepcopy(self.average.module)
            network.to(self.save_dtype)
            check_finite(network, str(self.target))
            network.register_to_config(_name_or_path="")  # not where this machine keeps it
            replace_files(self.target, network.save_pretrained)

    def _write_adapter(self, folder: Path) -> None:
        """Write the averaged adapter in the layouts of peft and of diffusers."""
        networks = self._networks[0]
        model = self.model
        trained = [parameter.detach().clone() for parameter in self.adapter]
        with torch.no_grad():
            for parameter, mean in zip(self.adapter, self.average.module.parameters(), strict=True):
                parameter.copy_(mean)
            state = networks.adapter_state("student")
            for parameter, own in zip(self.adapter, trained, strict=True):
                parameter.copy_(own)
        state = fold_alpha(state, model.rank, model.rank if model.alpha is None else model.alpha)
        baked = [adapter.baked for adapter in model.own_adapters]
        write_layouts(folder, state, model.name, model.backbone_class.lora_prefix())
        write_base(folder, model.name, baked, model.backbone_class.expert())

    def configure_optimizers(self) -> Any:
        network = self.adapter if self.lora else self.backbone.network
        optimizer: torch.optim.Optimizer
        if self.muon_lr is None:
            optimizer = torch.optim.AdamW(
                network.parameters(), lr=self.lr, betas=(0.9, 0.99), weight_decay=self.weight_decay
            )
        else:
            hidden = hidden_matrices(self.backbone.block_list)
            optimizer = MuonAdamW(network, hidden, self.lr, self.muon_lr, self.weight_decay)
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(self.warmup, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
