"""`sample.py`: pictures of prompts with the stock diffusers pipeline, the student's adapter and its schedule."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image, PngImagePlugin

from swd import __version__, train
from swd.config import check, to_plain
from swd.export import DIFFUSERS_WEIGHTS, SCHEDULER_CONFIG, find_adapter, load_adapter
from swd.files import claim_folder, write_aside
from swd.images import to_pil
from swd.modules.pretrained import Pretrained
from swd.scheduler import ScaleWiseScheduler
from swd.types import UserError

ROOT = train.ROOT | {
    "prompts": list[str] | str,
    "images_per_prompt": int,
    "batch_size": int,
    "adapter": str | None,
    "show_sizes": bool,
}


@dataclass(frozen=True)
class Request:
    """One picture to draw."""

    prompt: str
    seed: int

    @property
    def stem(self) -> str:
        """File name without its ending."""
        words = re.sub(r"[^a-z0-9]+", "-", self.prompt.lower()).strip("-")[:60].rstrip("-")
        return f"{words or 'empty'}_seed{self.seed}"


def run(cfg: DictConfig) -> None:
    """Draw what the configuration asks for; prints the path of every file."""
    check(cfg, ROOT)
    train.quiet()
    requests = plan(cfg)
    model: Pretrained = instantiate(cfg.model, _convert_="all")
    adapter = None if cfg.adapter is None else find_adapter(cfg.adapter, Path(cfg.output))
    folder = claim_files(Path(cfg.folder), requests)
    print(f"model {model.folder.name}, " + (f"adapter {adapter}" if adapter else "no adapter: the teacher"))

    pipe = build_pipeline(model, adapter)
    for start in range(0, len(requests), cfg.batch_size):
        batch = requests[start : start + cfg.batch_size]
        final, sizes = draw(pipe, model, batch)
        for i, request in enumerate(batch):
            info = {"prompt": request.prompt, "seed": request.seed, "adapter": adapter, "model": to_plain(cfg.model)}
            print(save(final[i], folder / f"{request.stem}.png", info))
            for number, pictures in enumerate(sizes if cfg.show_sizes else [], 1):
                side = "x".join(map(str, reversed(pictures[i].size)))
                print(save(pictures[i], folder / f"{request.stem}_step{number}_{side}.png", info))


def plan(cfg: DictConfig) -> list[Request]:
    """The pictures asked for, each with its own seed.

    Raises:
        UserError: for an empty list of prompts, an empty prompt, or counts below 1.
    """
    prompts = [cfg.prompts] if isinstance(cfg.prompts, str) else list(cfg.prompts)
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise UserError(f"prompts={prompts} holds nothing to draw; give prompts='[a red star above a blue ring]'")
    for key in ("images_per_prompt", "batch_size"):
        if cfg[key] < 1:
            raise UserError(f"{key}={cfg[key]}; use at least 1")
    if cfg.seed < 0:
        raise UserError(f"seed={cfg.seed}; use 0 or more")
    repeated = [prompt for prompt in prompts for _ in range(cfg.images_per_prompt)]
    return [Request(prompt, cfg.seed + i) for i, prompt in enumerate(repeated)]


def claim_files(folder: Path, requests: list[Request]) -> Path:
    """Create the output folder; refuse to replace a picture that is already there."""
    claim_folder(folder)
    for request in requests:
        if (folder / f"{request.stem}.png").exists():
            raise UserError(f"{folder / request.stem}.png exists already; choose another folder or seed")
    return folder


def build_pipeline(model: Pretrained, adapter: Path | None, dtype: torch.dtype = torch.float32) -> Any:
    """The stock pipeline of the model; with an adapter, its LoRA weights and its scale-wise scheduler.

    Raises:
        UserError: if the adapter does not fit the model.
    """
    if adapter is not None:
        check_adapter(model, adapter)
    pipe: Any = model.pipeline(dtype)
    pipe.set_progress_bar_config(disable=True)
    if adapter is not None:
        pipe.load_lora_weights(str(adapter), weight_name=DIFFUSERS_WEIGHTS)
        pipe.scheduler = ScaleWiseScheduler.from_pretrained(adapter)
    return pipe.to("cuda") if torch.cuda.is_available() else pipe


def check_adapter(model: Pretrained, adapter: Path) -> None:
    """Raise UserError if the adapter was made for another network."""
    state, config = load_adapter(adapter)
    if not (adapter / SCHEDULER_CONFIG).is_file():
        raise UserError(f"adapter {adapter} has no {SCHEDULER_CONFIG}; export it again")
    with torch.device("meta"):
        network = model.network_class.from_config(model.network_config)
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    for key, value in state.items():
        layer, kind = key.rsplit(".lora_", 1)
        shape = shapes.get(f"{layer}.weight")
        side = None if shape is None else shape[1] if kind.startswith("A") else shape[0]
        if side is None or side != value.shape[1 if kind.startswith("A") else 0]:
            base = config.get("base_model_name_or_path")
            raise UserError(f"adapter {adapter} (made for {base}) does not fit model {model.folder.name}: {layer}")


@torch.no_grad()
def draw(pipe: Any, model: Pretrained, requests: list[Request]) -> tuple[list[Image.Image], list[list[Image.Image]]]:
    """Pictures of a batch of requests, and, from a scale-wise scheduler, the decoded prediction of every step."""
    arguments: dict[str, Any] = {"max_sequence_length": model.max_text_tokens}
    scheduler = pipe.scheduler
    factor = pipe.vae_scale_factor
    if isinstance(scheduler, ScaleWiseScheduler):
        scheduler.keep_x0 = True
        height, width = (side * factor for side in scheduler.base_sizes[0])
        arguments |= {"num_inference_steps": scheduler.num_inference_steps, "guidance_scale": 1.0}
    else:
        height = width = model.native_size * factor
        arguments |= {"num_inference_steps": model.teacher_steps, "guidance_scale": model.guidance_scale}
    generators = [torch.Generator().manual_seed(request.seed) for request in requests]
    prompts = [request.prompt for request in requests]
    images = pipe(prompts, height=height, width=width, generator=generators, **arguments).images
    if not isinstance(scheduler, ScaleWiseScheduler):
        return images, []
    return images, [[to_pil(x) for x in decode(pipe, x0)] for x0 in scheduler.x0_predictions]


def decode(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """Pictures `[B, 3, H, W]` in [-1, 1] of a pipeline's latents."""
    vae = pipe.vae
    pixels: torch.Tensor = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor)[0]
    return pixels


def save(image: Image.Image, path: Path, info: dict[str, Any]) -> Path:
    """Write a PNG with its origin in the metadata, never over an existing file."""
    if path.exists():
        raise UserError(f"{path} exists already; choose another folder or seed")
    meta = PngImagePlugin.PngInfo()
    for key, value in {**info, "software": f"swd {__version__}"}.items():
        meta.add_text(key, str(value))
    return write_aside(path, lambda new: image.save(new, format="PNG", pnginfo=meta))
