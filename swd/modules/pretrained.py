"""A pretrained model as configuration names it: where it is, what it can take, and how it is loaded."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import StableDiffusion3Pipeline

from swd.modules.backbones.base import Backbone, Limits
from swd.modules.backbones.sd3 import SD3Backbone
from swd.modules.encoders import SD3Encoders
from swd.modules.networks import SD3_TARGETS, Role, SharedBase
from swd.types import UserError

Precision = Literal["auto", "fp32", "bf16"]

BACKBONES: dict[str, type[Backbone]] = {"sd3": SD3Backbone}


class Pretrained:
    """A diffusers pipeline folder and how the project uses it. Building one reads configuration files only.

    Args:
        family: which backbone.
        path: folder in diffusers layout, `swd://assets/...` for the embedded ones.
        rank: LoRA rank.
        alpha: LoRA alpha; None: alpha = rank.
        targets: names of the linear layers that get LoRA.
        precision: dtype of the frozen base; LoRA and losses are always float32. "auto": bf16 where the machine computes
            it natively.
        guidance_scale: classifier-free guidance of the teacher, in DMD and when it samples.
        feature_blocks: blocks that MMD and GAN read by default.
        max_text_tokens: length that the pipeline's T5 prompt is padded to.
        teacher_steps: steps of the teacher's own sampler.

    Raises:
        UserError: if the folder is missing or incomplete.
    """

    def __init__(
        self,
        family: Literal["sd3"],
        path: str,
        rank: int = 64,
        alpha: float | None = None,
        targets: Sequence[str] = SD3_TARGETS,
        precision: Precision = "auto",
        guidance_scale: float = 7.0,
        feature_blocks: Sequence[int] = (11,),
        max_text_tokens: int = 256,
        teacher_steps: int = 28,
    ) -> None:
        self.family, self.rank, self.alpha, self.targets = family, rank, alpha, tuple(targets)
        self.folder = resolve_asset(path)
        self.precision, self.guidance_scale = precision, guidance_scale
        self.feature_blocks, self.max_text_tokens = tuple(feature_blocks), max_text_tokens
        self.teacher_steps = teacher_steps
        if rank < 1:
            raise UserError(f"model.rank={rank}; a LoRA rank is at least 1")
        check_pipeline_folder(self.folder)

    @property
    def backbone_class(self) -> type[Backbone]:
        """The family's backbone."""
        return BACKBONES[self.family]

    @cached_property
    def network_config(self) -> dict[str, Any]:
        """The denoising network's `config.json`."""
        text = (self.folder / self.backbone_class.subfolder / "config.json").read_text()
        config: dict[str, Any] = json.loads(text)
        return config

    @property
    def limits(self) -> Limits:
        """Valid sizes and blocks, from the network's configuration."""
        return self.backbone_class.limits_of(self.network_config)

    @property
    def channels(self) -> int:
        """Latent channels C."""
        return int(self.network_config["in_channels"])

    @property
    def native_size(self) -> int:
        """Latent side of the pictures that the model draws by default."""
        return int(self.network_config["sample_size"])

    def dtype(self, device: torch.device | str = "cpu") -> torch.dtype:
        """The base's dtype on `device`."""
        if self.precision == "auto":
            return torch.bfloat16 if native_bf16(torch.device(device)) else torch.float32
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def networks(self, roles: Sequence[Role], seed: int = 0, device: torch.device | str = "cpu") -> SharedBase:
        """Load the base and give it its adapters."""
        network = self.network_class.from_pretrained(
            self.folder, subfolder=self.backbone_class.subfolder, torch_dtype=self.dtype(device), use_safetensors=True
        )
        return SharedBase(self.backbone_class(network), self.rank, self.alpha, self.targets, roles, seed)

    @property
    def network_class(self) -> Any:
        """The diffusers class of the denoising network, as `model_index.json` names it."""
        library, name = json.loads((self.folder / "model_index.json").read_text())[self.backbone_class.subfolder]
        return getattr(importlib.import_module(library), name)

    def pipeline(self, dtype: torch.dtype = torch.float32, **overrides: Any) -> StableDiffusion3Pipeline:
        """The stock pipeline; `transformer=None` leaves the network out."""
        return StableDiffusion3Pipeline.from_pretrained(
            self.folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True, **overrides
        )

    def encoders(self, device: torch.device | str = "cpu") -> SD3Encoders:
        """Load text encoders and VAE."""
        return SD3Encoders(self.pipeline(self.dtype(device), transformer=None), self.max_text_tokens)


def native_bf16(device: torch.device) -> bool:
    """Whether the device computes bf16 in hardware (elsewhere it is emulated and slow)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def resolve_asset(path: str) -> Path:
    """A local path; `swd://assets/NAME` is a folder that ships with the package."""
    if not path.startswith("swd://"):
        return Path(path)
    package = Path(__file__).parents[1]
    relative = path.removeprefix("swd://")
    for root in (package.parent, package):  # a checkout, an installed wheel
        if (root / relative).is_dir():
            return root / relative
    raise UserError(f"model.path={path} does not ship with this installation; reinstall swd or give a folder")


def check_pipeline_folder(folder: Path) -> None:
    """Raise UserError unless `folder` is a complete diffusers pipeline with safetensors weights."""
    index = folder / "model_index.json"
    if not folder.is_dir():
        raise UserError(f"model.path={folder} does not exist; give a diffusers pipeline folder")
    if not index.is_file():
        raise UserError(f"model.path={folder} has no model_index.json; give a diffusers pipeline folder")
    for name, entry in json.loads(index.read_text()).items():
        if name.startswith("_") or not isinstance(entry, list) or entry[0] is None:
            continue
        part = folder / name
        if not part.is_dir():
            raise UserError(f"model.path={folder} is incomplete: subfolder {name!r} is missing; download it again")
        is_model = (part / "config.json").is_file() or not any(word in name for word in ("tokenizer", "scheduler"))
        if is_model and not any(part.glob("*.safetensors")):
            raise UserError(f"model.path={folder} is incomplete: {name!r} has no .safetensors weights")
