"""A pretrained model as configuration names it: where it is, what it can take, and how it is loaded."""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import diffusers
import torch
from safetensors import safe_open
from torch import Tensor, nn

from swd.modules import hub
from swd.modules.backbones import load_family
from swd.modules.backbones.base import TARGETS, Backbone, Limits
from swd.modules.encoders import Encoders, pixel_size
from swd.modules.networks import Networks, Role, SeparateCopies, SharedBase, check_targets
from swd.modules.quantize import Quantization, quantize
from swd.types import Size, UserError

Precision = Literal["auto", "fp32", "bf16"]

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
"""A tokenizer folder has at least one of them."""


class Pretrained:
    """A diffusers pipeline and how the project uses it. Building one reads configuration files only.

    Args:
        family: which backbone: a module of `swd.modules.backbones`, or the dotted name of any other.
        path: folder in diffusers layout, id of a repository on the Hugging Face hub, or `swd://assets/...` for the
            embedded ones.
        revision: branch, tag or commit of a repository on the hub.
        size: latent side, (H, W) or (F, H, W) of finished pictures; None: the network's own.
        tuning: "lora" trains adapters on one frozen base; "full" trains whole copies of it.
        rank: LoRA rank.
        alpha: LoRA alpha; None: alpha = rank.
        targets: names of the linear layers that get LoRA.
        precision: dtype of the frozen base; LoRA and losses are always float32. "auto": bf16 where the machine computes
            it natively.
        quantization: stores the frozen base's linear layers in 8 bits, "int8" or "fp8".
        guidance_scale: classifier-free guidance of the teacher, in DMD and when it samples.
        embedded_guidance: guidance that a guidance-distilled network (FLUX.1-dev) is fed, in all roles.
        feature_blocks: blocks that MMD and GAN read by default.
        max_text_tokens: length that the pipeline's T5 prompt is padded to.
        teacher_steps: steps of the teacher's own sampler.
        init_adapter: folder of an adapter to start the student from: a run, an export, or a published PEFT folder.

    Attributes:
        initial: what `init_adapter` holds, from when it was checked until the student has it.

    Raises:
        UserError: if the folder is missing or incomplete, or settings contradict each other.
    """

    initial: dict[str, Tensor] | None = None
    _tokenizers_checked = False

    def __init__(
        self,
        family: str,
        path: str,
        revision: str | None = None,
        size: int | Sequence[int] | None = None,
        tuning: Literal["lora", "full"] = "lora",
        rank: int = 64,
        alpha: float | None = None,
        targets: Sequence[str] = TARGETS,
        precision: Precision = "auto",
        quantization: Quantization | None = None,
        guidance_scale: float = 7.0,
        embedded_guidance: float | None = None,
        feature_blocks: Sequence[int] = (11,),
        max_text_tokens: int = 256,
        teacher_steps: int = 28,
        init_adapter: str | None = None,
    ) -> None:
        self.family, self.backbone_class = family, load_family(family)
        self.tuning, self.rank, self.alpha, self.targets = tuning, rank, alpha, tuple(targets)
        self.path, self.revision = path, revision
        self.precision, self.quantization = precision, quantization
        self.guidance_scale, self.embedded_guidance = guidance_scale, embedded_guidance
        self.feature_blocks, self.max_text_tokens = tuple(feature_blocks), max_text_tokens
        self.teacher_steps, self.init_adapter = teacher_steps, init_adapter
        self._check_settings()
        self.folder = hub.configuration(path, revision) if hub.is_hub_id(path) else resolve_asset(path)
        check_pipeline_folder(self.folder, weights=not hub.is_hub_id(path))
        self._check_family(read_json(self.folder / "model_index.json"))
        self._check_channels()
        self._check_betas()
        self._check_guidance()
        self.size: Size = self.limits.native if size is None else (size, size) if isinstance(size, int) else tuple(size)
        self.limits.check_size(self.size)

    def _check_settings(self) -> None:
        """What needs no file."""
        if self.tuning == "full" and (self.quantization or self.init_adapter):
            given = "quantization" if self.quantization else "init_adapter"
            raise UserError(f"model.tuning=full trains every weight, so model.{given} cannot be set; use tuning=lora")
        if self.max_text_tokens < 1:
            raise UserError(f"model.max_text_tokens={self.max_text_tokens}; use at least 1")
        if not self.guidance_scale >= 0:
            raise UserError(f"model.guidance_scale={self.guidance_scale}; use 1 for none, or more")
        if self.rank < 1:
            raise UserError(f"model.rank={self.rank}; a LoRA rank is at least 1")
        if self.alpha is not None and not self.alpha > 0:
            raise UserError(f"model.alpha={self.alpha}; use a number above 0, or null for alpha = rank")
        kinds = get_args(Quantization)
        if self.quantization not in (None, *kinds):
            raise UserError(f"model.quantization={self.quantization}; use {', '.join(kinds)} or null")

    def _check_family(self, index: dict[str, Any]) -> None:
        """Variants for other tasks share the network's class: the pipeline must be the family's, and have no more."""
        backbone, part = self.backbone_class, self.backbone_class.subfolder
        entry = index.get(part)
        actual = entry[1] if isinstance(entry, list) and entry[0] is not None else "nothing"
        if actual != backbone.network_type:
            raise UserError(
                f"model.path={self.path} holds {actual} as {part}, but model.family={self.family} is for "
                f"{backbone.network_type}"
            )
        pipeline = index.get("_class_name") or "no named pipeline"
        if pipeline not in (backbone.pipeline_type, *backbone.pipeline_aliases):
            raise UserError(
                f"model.path={self.path} is for {pipeline}, but model.family={self.family} is for "
                f"{backbone.pipeline_type}; give a model of that kind"
            )
        for name, entry in index.items():
            more = isinstance(entry, list) and entry[0] == "diffusers" and name not in (part, "vae", "scheduler")
            if more or (name == "expand_timesteps" and entry):
                raise UserError(
                    f"model.path={self.path} has {name}, which model.family={self.family} does not know; give a "
                    f"{backbone.pipeline_type} of {part}, vae and scheduler alone"
                )

    def _check_channels(self) -> None:
        """Networks for inpainting, control or a first frame take more channels than the VAE's latents have."""
        latent = self.vae_config.get("latent_channels", self.vae_config.get("z_dim"))
        if latent not in (None, self.channels):
            raise UserError(
                f"model.path={self.path}: its {self.backbone_class.subfolder} takes latents of {self.channels} "
                f"channels, but its VAE makes {latent}; model.family={self.family} is for text alone as input"
            )

    def _check_guidance(self) -> None:
        if self.network_config.get("guidance_embeds") and self.embedded_guidance is None:
            raise UserError(
                "model.embedded_guidance is null, but this network is fed a guidance scale; FLUX.1-dev's is 4.5"
            )

    def _check_betas(self) -> None:
        """A variance-preserving model must have been trained on the levels that `VariancePreserving` knows."""
        file = self.folder / "scheduler" / "scheduler_config.json"
        if self.backbone_class.process.prediction_type != "epsilon" or not file.is_file():
            return
        expected = {
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "prediction_type": "epsilon",
        }
        config = expected | read_json(file)
        for key, value in expected.items():
            if config[key] != value:
                raise UserError(
                    f"model.path={self.folder}: its scheduler has {key}={config[key]}, only {value} is known"
                )

    def check_targets(self) -> None:
        """Raise UserError if a target names no layer of the network; loads no weights."""
        check_targets(self.meta_network, self.targets)

    @cached_property
    def meta_network(self) -> nn.Module:
        """The network without weights, on the meta device, for names, shapes and counts; not to be changed."""
        with torch.device("meta"):
            network: nn.Module = self.network_class.from_config(self.network_config).eval()
        return network

    @cached_property
    def network_config(self) -> dict[str, Any]:
        """The denoising network's `config.json`."""
        return read_json(self.folder / self.backbone_class.subfolder / "config.json")

    @property
    def name(self) -> str:
        """What people call it: the id on the hub, or the folder's name."""
        return self.path if hub.is_hub_id(self.path) else self.folder.name

    @property
    def limits(self) -> Limits:
        """Valid sizes and blocks, from the network's configuration."""
        try:
            return self.backbone_class.limits_of(self.network_config)
        except (KeyError, TypeError) as error:
            file = self.folder / self.backbone_class.subfolder / "config.json"
            raise UserError(f"{file} is damaged: {error} is missing or wrong; download it again") from None

    @property
    def channels(self) -> int:
        """Latent channels C."""
        return self.limits.channels

    @cached_property
    def vae_config(self) -> dict[str, Any]:
        """The VAE's `config.json`."""
        return read_json(self.folder / "vae" / "config.json")

    @property
    def factor(self) -> int:
        """Pixels per latent along one side."""
        return self.backbone_class.encoders_type.factors(self.vae_config)[1]

    @property
    def frame_factor(self) -> int:
        """Frames per latent frame, beyond the first one."""
        return self.backbone_class.encoders_type.factors(self.vae_config)[0]

    def pixel_size(self, size: Size) -> Size:
        """Size in pixels of a latent size."""
        return pixel_size(size, self.backbone_class.encoders_type.factors(self.vae_config))

    def latent_size(self, pixels: Size) -> Size:
        """Latent size of a size in pixels.

        Raises:
            UserError: if the VAE would cut it.
        """
        sides = tuple(side // self.factor for side in pixels[-2:])
        size = sides if len(pixels) == 2 else ((pixels[0] - 1) // self.frame_factor + 1, *sides)
        if self.pixel_size(size) != tuple(pixels):
            raise UserError(
                f"{'x'.join(map(str, pixels))} pixels are no size of {self.name}'s VAE; sides must be multiples of "
                f"{self.factor}"
                + (f", frames 1 more than a multiple of {self.frame_factor}" if len(pixels) == 3 else "")
            )
        return size

    @property
    def parts(self) -> list[str]:
        """Names of the pipeline's subfolders."""
        index = read_json(self.folder / "model_index.json")
        return [name for name, entry in index.items() if isinstance(entry, list) and entry[0] is not None]

    def latent_dtype(self, pipe: Any) -> torch.dtype:
        """What the stock pipeline carries latents in."""
        if self.backbone_class.float_latents:
            return torch.float32
        dtype: torch.dtype = getattr(pipe, self.backbone_class.subfolder).dtype
        return dtype

    def dtype(self, device: torch.device | str = "cpu") -> torch.dtype:
        """The base's dtype on `device`."""
        if self.precision == "auto":
            return torch.bfloat16 if native_bf16(torch.device(device)) else torch.float32
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def fetch(self) -> Path:
        """The folder with all weights in it; downloads what is missing of a repository on the hub.

        Raises:
            UserError: if a part is missing, or a tokenizer is another model's.
        """
        folder = self.folder
        if hub.is_hub_id(self.path):
            folder = hub.weights(self.path, self.revision)
            check_pipeline_folder(folder)
        if not self._tokenizers_checked:
            check_tokenizers(folder)
            self._tokenizers_checked = True
        return folder

    def network(self, device: torch.device | str = "cpu") -> Backbone:
        """Load the denoising network alone.

        Raises:
            UserError: if its configuration and its weights disagree.
        """
        folder = self.fetch()
        misfit = first_misfit(folder / self.backbone_class.subfolder, self.meta_network)
        if misfit:
            part = self.backbone_class.subfolder
            raise UserError(f"model.path={folder}: {part!r} has weights of another configuration: {misfit}")
        network = self.network_class.from_pretrained(
            folder, subfolder=self.backbone_class.subfolder, torch_dtype=self.dtype(device), use_safetensors=True
        )
        return self.backbone_class(network, self.embedded_guidance)

    def networks(self, roles: Sequence[Role], seed: int = 0, device: torch.device | str = "cpu") -> Networks:
        """Load the base and give it its trainable roles: adapters, or copies of it."""
        if self.tuning == "full":
            return SeparateCopies(self.network(device), roles)
        backbone = self.network(device)
        if self.quantization:
            quantize(backbone.network, self.targets, self.quantization)
        return SharedBase(backbone, self.rank, self.alpha, self.targets, roles, seed)

    def untrained_networks(self, roles: Sequence[Role]) -> Networks:
        """`networks` without weights, on the meta device: names and shapes of what is trained."""
        with torch.device("meta"):
            backbone = self.backbone_class(copy.deepcopy(self.meta_network), self.embedded_guidance)
            if self.tuning == "full":
                return SeparateCopies(backbone, roles)
            return SharedBase(backbone, self.rank, self.alpha, self.targets, roles)

    @property
    def network_class(self) -> Any:
        """The diffusers class of the denoising network, as `model_index.json` names it."""
        library, name = read_json(self.folder / "model_index.json")[self.backbone_class.subfolder]
        return getattr(importlib.import_module(library), name)

    def pipeline(
        self, dtype: torch.dtype = torch.float32, vae_dtype: torch.dtype | None = None, **overrides: Any
    ) -> Any:
        """The stock pipeline; `transformer=None` (or `unet=None`) leaves the network out.

        Args:
            dtype: of its weights.
            vae_dtype: of the VAE's; None: the family's, which some keep in float32.
            overrides: of the pipeline's parts.
        """
        pipeline_class = getattr(diffusers, self.backbone_class.pipeline_type)
        vae_dtype = vae_dtype or self.backbone_class.encoders_type.vae_dtype or dtype
        return pipeline_class.from_pretrained(
            self.fetch(),
            torch_dtype={"default": dtype, "vae": vae_dtype},
            use_safetensors=True,
            local_files_only=True,
            **overrides,
        )

    def encoders(self, device: torch.device | str = "cpu") -> Encoders:
        """Load text encoders and VAE."""
        backbone = self.backbone_class
        vae_dtype = torch.float32 if self.vae_config.get("force_upcast") else None
        pipeline = self.pipeline(self.dtype(device), vae_dtype, **{backbone.subfolder: None})
        return backbone.encoders_type(pipeline, self.max_text_tokens)


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


def check_pipeline_folder(folder: Path, weights: bool = True) -> None:
    """Raise UserError unless `folder` is a complete diffusers pipeline with safetensors weights.

    Args:
        folder: in diffusers layout.
        weights: whether weights should be there already.
    """
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
        if "tokenizer" in name and not any((folder / name / file).is_file() for file in TOKENIZER_FILES):
            raise UserError(
                f"model.path={folder}: {name!r} holds no tokenizer ({', '.join(TOKENIZER_FILES)}); download it again"
            )
        if weights and not any(word in name for word in ("tokenizer", "scheduler", "processor", "feature_extractor")):
            check_model_folder(folder / name)


def check_tokenizers(folder: Path) -> None:
    """Raise UserError for a tokenizer that is not of the class that the index names, or not its text encoder's.

    Args:
        folder: a complete pipeline.
    """
    for name, entry in read_json(folder / "model_index.json").items():
        if "tokenizer" not in name or not isinstance(entry, list) or entry[0] is None:
            continue
        where = f"model.path={folder}: {name!r}"
        kind = getattr(importlib.import_module(entry[0]), entry[1])
        try:
            entries = len(kind.from_pretrained(folder / name, local_files_only=True))
        except Exception as error:  # tokenizers raise whatever the wrong file leads to
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
            raise UserError(f"{where} cannot be read as {entry[1]} ({reason}); download it again") from None
        encoder = folder / name.replace("tokenizer", "text_encoder") / "config.json"
        known = read_json(encoder).get("vocab_size") if encoder.is_file() else None
        if known is not None and entries > known:
            raise UserError(
                f"{where} has {entries} entries, but its text encoder knows {known}: it is another model's; "
                "download it again"
            )


def check_model_folder(folder: Path, where: str | None = None) -> None:
    """Raise UserError unless `folder` holds a model's configuration and whole safetensors files.

    Args:
        folder: in diffusers layout.
        where: how messages begin; None: as for a part of the pipeline at `model.path`.
    """
    where = where or f"model.path={folder.parent} is incomplete: {folder.name!r}"
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


def first_misfit(folder: Path, network: nn.Module) -> str | None:
    """The first parameter that safetensors files in `folder` lack or have in another shape; reads no weight."""
    have: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            have |= {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    for name, parameter in network.named_parameters():
        shape = have.get(name)
        if shape != tuple(parameter.shape):
            return f"{name}, " + (
                "which is not there" if shape is None else f"{shape} against {tuple(parameter.shape)}"
            )
    return None


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
        UserError: if there is none.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}; download it again") from None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{file} is damaged: it holds no JSON object; download it again")
    return value
