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
from swd.modules.networks import SD3_TARGETS, Role, SharedBase, check_targets
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
        if alpha is not None and not alpha > 0:
            raise UserError(f"model.alpha={alpha}; use a number above 0, or null for alpha = rank")
        check_pipeline_folder(self.folder)
        self._check_family()

    def _check_family(self) -> None:
        index = read_json(self.folder / "model_index.json")
        expected = self.backbone_class.network_type
        actual = (index.get(self.backbone_class.subfolder) or [None, "nothing"])[1]
        if actual != expected:
            raise UserError(
                f"model.path={self.folder} holds {actual} as {self.backbone_class.subfolder}, but "
                f"model.family={self.family} is for {expected}"
            )

    def check_targets(self) -> None:
        """Raise UserError if a target names no layer of the network; loads no weights."""
        with torch.device("meta"):
            check_targets(self.network_class.from_config(self.network_config), self.targets)

    @property
    def backbone_class(self) -> type[Backbone]:
        """The family's backbone."""
        return BACKBONES[self.family]

    @cached_property
    def network_config(self) -> dict[str, Any]:
        """The denoising network's `config.json`."""
        return read_json(self.folder / self.backbone_class.subfolder / "config.json")

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
        library, name = read_json(self.folder / "model_index.json")[self.backbone_class.subfolder]
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
    for name, entry in read_json(index).items():
        if name.startswith("_") or not isinstance(entry, list) or entry[0] is None:
            continue
        if not (folder / name).is_dir() or not any((folder / name).iterdir()):
            raise UserError(f"model.path={folder} is incomplete: subfolder {name!r} is missing; download it again")
        if not any(word in name for word in ("tokenizer", "scheduler", "processor", "feature_extractor")):
            check_model_folder(folder / name)


def check_model_folder(folder: Path) -> None:
    """Raise UserError unless `folder` holds a model's configuration and whole safetensors files."""
    where = f"model.path={folder.parent} is incomplete: {folder.name!r}"
    if not (folder / "config.json").is_file():
        raise UserError(f"{where} has no config.json; download it again")
    read_json(folder / "config.json")
    files = {file.name for file in folder.glob("*.safetensors")}
    if not files:
        raise UserError(f"{where} has no .safetensors weights")
    for index in folder.glob("*.safetensors.index.json"):
        missing = set(read_json(index)["weight_map"].values()) - files
        if missing:
            raise UserError(f"{where} has no {min(missing)}; download it again")
    for name in sorted(files):
        if not is_whole(folder / name):
            raise UserError(f"{where} has a damaged {name}; download it again")


def is_whole(file: Path) -> bool:
    """Whether a safetensors file is as long as its header says; the weights are not read."""
    try:
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(length, 2**27)))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    return file.stat().st_size == 8 + length + max(ends, default=0)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: if it is none.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{file} is damaged: it holds no JSON object; download it again")
    return value
