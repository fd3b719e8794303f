"""A pretrained model as configuration names it: where it is, what it can take, and how it is loaded."""

from __future__ import annotations

import copy
import inspect
import json
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args

import diffusers
import torch
from safetensors import safe_open
from torch import Tensor, nn

from swd.io import limits
from swd.modules import hub
from swd.modules.backbones import load_family
from swd.modules.backbones.base import TARGETS, Backbone, Limits
from swd.modules.encoders import Encoders, pixel_size
from swd.modules.model_folders import (
    LARGEST_SIDE,
    LARGEST_WIDTH,
    MOST_LAYERS,
    check_index,
    check_part,
    check_scaling,
    class_of,
    weight_files,
    weight_indices,
)
from swd.modules.networks import Networks, Role, SeparateCopies, SharedBase
from swd.modules.quantize import Quantization, quantize
from swd.modules.targets import check_targets
from swd.types import Conditioning, Size, UserError

Precision = Literal["auto", "fp32", "bf16"]

LARGEST_RANK = 256
"""LoRA rank that is always allowed, twice the largest of the paper (appendix A); else up to the network's width."""
DMD_GUIDANCE, DRAWING_GUIDANCE = 7.0, 4.5
"""Stable Diffusion 3.5 Medium's: of DMD in the released script, of the training set in the paper's appendix A."""

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
"""A tokenizer folder has at least one of them."""


LOADING_FAILS = (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, ImportError, RuntimeError)
"""What diffusers and transformers raise for files that do not fit."""


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
        dmd_guidance_scale: classifier-free guidance of the teacher in DMD; 1 for none. The default is that of the
            released script for Stable Diffusion 3.5 Medium.
        drawing_guidance_scale: classifier-free guidance of the teacher when it draws: its training set, samples, the
            rows of an evaluation; 1 for none. The default is the paper's for Stable Diffusion 3.5 (appendix A).
        embedded_guidance: guidance that a guidance-distilled network (FLUX.1-dev) is fed, in all roles.
        feature_blocks: blocks that MMD and GAN read by default.
        max_text_tokens: length that the pipeline's T5 prompt is padded to.
        teacher_steps: steps of the teacher's own sampler, 1 to 1000.
        init_adapter: folder of an adapter to start the student from: a run, an export, or a published PEFT folder.
        guidance_scale: what runs of earlier versions have instead of the two scales above: one for both. A scale of its
            own wins over it.

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
        dmd_guidance_scale: float | None = None,
        drawing_guidance_scale: float | None = None,
        embedded_guidance: float | None = None,
        feature_blocks: Sequence[int] = (11,),
        max_text_tokens: int = 256,
        teacher_steps: int = 28,
        init_adapter: str | None = None,
        guidance_scale: float | None = None,
    ) -> None:
        self.family, self.backbone_class = family, load_family(family)
        self.tuning, self.rank, self.alpha, self.targets = tuning, rank, alpha, tuple(targets)
        self.path, self.revision = path, revision
        self.precision, self.quantization = precision, quantization
        self.dmd_guidance_scale, self.drawing_guidance_scale = guidance_scales(
            dmd_guidance_scale, drawing_guidance_scale, guidance_scale
        )
        self.embedded_guidance = embedded_guidance
        self.feature_blocks, self.max_text_tokens = tuple(feature_blocks), max_text_tokens
        self.teacher_steps, self.init_adapter = teacher_steps, init_adapter
        self._check_settings()
        self.folder = hub.configuration(path, revision) if hub.is_hub_id(path) else resolve_asset(path)
        check_pipeline_folder(self.folder, weights=not hub.is_hub_id(path))
        self._check_family(read_json(self.folder / "model_index.json"))
        self._check_numbers()
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
        most = self.backbone_class.encoders_type.most_text_tokens
        limits.whole("model.max_text_tokens", self.max_text_tokens, 1, most, f"all that {self.family}'s pipeline takes")
        limits.whole("model.teacher_steps", self.teacher_steps, 1, limits.STEPS)
        limits.number("model.embedded_guidance", self.embedded_guidance, 0, limits.GUIDANCE)
        if self.rank < 1:
            raise UserError(f"model.rank={self.rank}; a LoRA rank is at least 1")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise UserError(f"model.alpha={self.alpha}; use a finite number above 0, or null for alpha = rank")
        if self.init_adapter is not None and not self.init_adapter.strip():
            raise UserError(
                "model.init_adapter is empty; name a run, an adapter's folder or file, or use null for a fresh start"
            )
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
        self._check_parts({name for name, entry in index.items() if isinstance(entry, list) and entry[0] is None})
        for name, entry in index.items():
            more = isinstance(entry, list) and entry[0] == "diffusers" and name not in (part, "vae", "scheduler")
            if more or (name in self.backbone_class.unknown_settings and entry):
                raise UserError(
                    f"model.path={self.path} has {name}, which model.family={self.family} does not know; give a "
                    f"{backbone.pipeline_type} of {part}, vae and scheduler alone"
                )

    def _check_parts(self, absent: set[str]) -> None:
        """Parts may be left out only where the family can do without, and a text encoder only with its tokenizer."""
        backbone = self.backbone_class
        known = inspect.signature(getattr(diffusers, backbone.pipeline_type).__init__).parameters
        needed = {"vae", "scheduler", *(name for name in known if name.startswith(("text_encoder", "tokenizer")))}
        for name in sorted(needed & absent):
            encoder = name.replace("tokenizer", "text_encoder")
            if name not in backbone.encoders_type.optional or encoder not in absent:
                raise UserError(
                    f"model.path={self.path}: model_index.json names no {name}, and model.family={self.family} does "
                    "not work without it; give a complete model"
                )

    def _check_numbers(self) -> None:
        """Sizes and widths that limits are made of, before anything is computed from them."""
        limits, factors = self.limits, self._factors
        sides = [*limits.native, *(side for side in (limits.max_side, limits.max_frames) if side is not None)]
        ranges = {
            "divisor": ([limits.divisor], LARGEST_SIDE),
            "number of blocks": ([limits.blocks], MOST_LAYERS),
            "width": ([limits.width], LARGEST_WIDTH),
            "number of channels": ([limits.channels], LARGEST_WIDTH),
            "side": (sides, LARGEST_SIDE),
        }
        file = self.folder / self.backbone_class.subfolder / "config.json"
        for key, (values, most) in ranges.items():
            for value in values:
                if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                    raise UserError(f"{file} is damaged: its {key} is {value!r}, not 1 to {most}; download it again")
        if not all(isinstance(factor, int) and 1 <= factor <= 1024 for factor in factors):
            file = self.folder / "vae" / "config.json"
            raise UserError(f"{file} is damaged: by how much it shrinks pictures cannot be; download it again")
        if self.rank > max(LARGEST_RANK, limits.width):
            raise UserError(
                f"model.rank={self.rank} is more than this network's width, {limits.width}, so that it is no low rank "
                f"any more; use at most {max(LARGEST_RANK, limits.width)}, or model.tuning=full"
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
        """The model must have been trained on the noise levels of its family's process."""
        file, expected = self.folder / "scheduler" / "scheduler_config.json", self.backbone_class.process.trained_on
        if not expected or not file.is_file():
            return
        config = {**expected, **read_json(file)}
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
        try:
            with torch.device("meta"):
                network: nn.Module = self.network_class.from_config(self.network_config).eval()
        except Exception as error:  # whatever a wrong value leads to inside the class
            file = self.folder / self.backbone_class.subfolder / "config.json"
            raise UserError(
                f"{file} is damaged: no {self.backbone_class.network_type} can be built of it ({_reason(error)}); "
                "download it again"
            ) from None
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
        config = self.network_config
        try:
            return self.backbone_class.limits_of(config)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, AssertionError) as error:
            file = self.folder / self.backbone_class.subfolder / "config.json"
            raise UserError(f"{file} is damaged: {error} is missing or wrong; download it again") from None

    @property
    def channels(self) -> int:
        """Latent channels C."""
        return self.limits.channels

    @cached_property
    def vae_config(self) -> dict[str, Any]:
        """The VAE's `config.json`."""
        file = self.folder / "vae" / "config.json"
        config = read_json(file)
        check_scaling(config, file)
        return config

    @property
    def _factors(self) -> tuple[int, int]:
        """Frames per latent frame beyond the first one, and pixels per latent along a side."""
        config = self.vae_config
        try:
            return self.backbone_class.encoders_type.factors(config)
        except (LookupError, TypeError, ValueError, ArithmeticError) as error:
            file = self.folder / "vae" / "config.json"
            raise UserError(f"{file} is damaged: {_reason(error)}; download it again") from None

    @property
    def factor(self) -> int:
        """Pixels per latent along one side."""
        return self._factors[1]

    @property
    def frame_factor(self) -> int:
        """Frames per latent frame, beyond the first one."""
        return self._factors[0]

    def pixel_size(self, size: Size) -> Size:
        """Size in pixels of a latent size."""
        return pixel_size(size, self._factors)

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

    def unconditional(self, empty: Conditioning) -> Conditioning:
        """What takes the place of a prompt for classifier-free guidance, as the stock pipeline has it.

        Args:
            empty: the encoded empty prompt, from the encoders or a cache.
        """
        return self.backbone_class.unconditional(empty, read_json(self.folder / "model_index.json"))

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
            index = read_json(folder / "model_index.json")
            known = inspect.signature(getattr(diffusers, self.backbone_class.pipeline_type).__init__).parameters
            self._check_parts({*self._absent, *(name for name in known if name not in index)})
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
        network = self._part(folder, self.backbone_class.subfolder, self.dtype(device))
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
        return class_of(*read_json(self.folder / "model_index.json")[self.backbone_class.subfolder])

    def _part(self, folder: Path, name: str, dtype: torch.dtype) -> Any:
        """Load one part's weights, of the variant that is there."""
        kind = class_of(*read_json(folder / "model_index.json")[name])
        try:
            return kind.from_pretrained(
                folder / name,
                torch_dtype=dtype,
                variant=weight_files(folder / name)[0],
                use_safetensors=True,
                local_files_only=True,
            )
        except LOADING_FAILS as error:
            raise UserError(f"model.path={folder}: {name!r} cannot be loaded ({_reason(error)})") from None

    def pipeline(self, dtype: torch.dtype = torch.float32, kept: bool = False, **overrides: Any) -> Any:
        """The stock pipeline; `transformer=None` (or `unet=None`) leaves the network out.

        Args:
            dtype: of its weights.
            kept: whether what its VAE makes is kept, as of `Encoders.vae_precision`.
            overrides: of the pipeline's parts.
        """
        pipeline_class = getattr(diffusers, self.backbone_class.pipeline_type)
        vae_dtype = self.backbone_class.encoders_type.vae_precision(self.vae_config, dtype, kept)
        folder = self.fetch()
        parts: dict[str, Any] = dict.fromkeys(self._absent)
        for name in self.parts:
            # The pipeline would take a variant of every part that has one, beside plain weights too.
            if name not in overrides and weight_files(folder / name)[0] is not None:
                parts[name] = self._part(folder, name, vae_dtype if name == "vae" else dtype)
        try:
            return pipeline_class.from_pretrained(
                folder,
                torch_dtype={"default": dtype, "vae": vae_dtype},
                use_safetensors=True,
                local_files_only=True,
                **parts | overrides,
            )
        except LOADING_FAILS as error:
            raise UserError(
                f"model.path={folder} cannot be loaded as {pipeline_class.__name__} ({_reason(error)})"
            ) from None

    @property
    def _absent(self) -> list[str]:
        """Parts that the index names as null: the pipeline asks to be told so."""
        index = read_json(self.folder / "model_index.json")
        return [name for name, entry in index.items() if isinstance(entry, list) and entry[0] is None]

    def encoders(self, device: torch.device | str = "cpu") -> Encoders:
        """Load text encoders and VAE."""
        backbone = self.backbone_class
        pipeline = self.pipeline(self.dtype(device), kept=True, **{backbone.subfolder: None})
        if self._absent:
            # A pipeline makes zeros in place of a missing encoder's text, as wide as its network says.
            network = SimpleNamespace(config=SimpleNamespace(**self.network_config))
            object.__setattr__(pipeline, backbone.subfolder, network)
        return backbone.encoders_type(pipeline, self.max_text_tokens)


def _reason(error: Exception) -> str:
    """What an error says, on one short line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    # Libraries advise to run a folder's own code, which this package never does.
    return "it has code of its own, which is never run" if "trust_remote_code" in text else text[:160]


def guidance_scales(dmd: float | None, drawing: float | None, both: float | None) -> tuple[float, float]:
    """The guidance of DMD and that of drawing, from the two keys and the one that runs of earlier versions have.

    Raises:
        UserError: for a scale that cannot be used, or all three at once.
    """
    for key, scale, least in (("dmd", dmd, 0.0), ("drawing", drawing, 1.0), ("", both, 0.0)):
        limits.number(f"model.{key}{key and '_'}guidance_scale", scale, least, limits.GUIDANCE, "1 for none")
    if both is None:
        return DMD_GUIDANCE if dmd is None else float(dmd), DRAWING_GUIDANCE if drawing is None else float(drawing)
    if dmd is not None and drawing is not None:
        raise UserError(
            f"model.guidance_scale={both} is two keys now, model.dmd_guidance_scale={dmd} for the teacher in DMD and "
            f"model.drawing_guidance_scale={drawing} for what it draws; set these and leave guidance_scale out"
        )
    # Below 1 pipelines drew without guidance.
    return float(both if dmd is None else dmd), float(max(both, 1.0) if drawing is None else drawing)


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
    entries = read_json(index)
    check_index(entries, f"model.path={folder}")
    for name, entry in entries.items():
        if name.startswith("_") or not isinstance(entry, list) or entry[0] is None:
            continue
        if not (folder / name).is_dir() or not any((folder / name).iterdir()):
            raise UserError(f"model.path={folder} is incomplete: subfolder {name!r} is missing; download it again")
        if "tokenizer" in name and not any((folder / name / file).is_file() for file in TOKENIZER_FILES):
            raise UserError(
                f"model.path={folder}: {name!r} holds no tokenizer ({', '.join(TOKENIZER_FILES)}); download it again"
            )
        for file in ("config.json", "scheduler_config.json"):
            if (folder / name / file).is_file():
                check_part(read_json(folder / name / file), folder / name / file)
        if (folder / name / "tokenizer_config.json").is_file():
            read_tokenizer_config(folder / name / "tokenizer_config.json")
        if weights and not any(word in name for word in ("tokenizer", "scheduler", "processor", "feature_extractor")):
            check_model_folder(folder / name)


def read_tokenizer_config(file: Path) -> dict[str, Any]:
    """A tokenizer's configuration.

    Raises:
        UserError: if it is damaged or names code of its own.
    """
    config = read_json(file)
    check_part({"auto_map": config.get("auto_map")}, file)
    return config


def check_tokenizers(folder: Path) -> None:
    """Raise UserError for a tokenizer that is not of the class that the index names, or not its text encoder's.

    Args:
        folder: a complete pipeline.
    """
    for name, entry in read_json(folder / "model_index.json").items():
        if "tokenizer" not in name or not isinstance(entry, list) or entry[0] is None:
            continue
        where = f"model.path={folder}: {name!r}"
        kind: Any = class_of(*entry)
        try:
            entries = len(kind.from_pretrained(folder / name, local_files_only=True))
        except Exception as error:  # tokenizers raise whatever the wrong file leads to
            raise UserError(f"{where} cannot be read as {entry[1]} ({_reason(error)}); download it again") from None
        encoder = folder / name.replace("tokenizer", "text_encoder") / "config.json"
        known = read_json(encoder).get("vocab_size") if encoder.is_file() else None
        if isinstance(known, int) and entries > known:
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
    variant, paths = weight_files(folder)
    files = {file.name for file in paths}
    if not files:
        raise UserError(f"{where} has no .safetensors weights")
    for index in weight_indices(folder, variant):
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise UserError(f"{where} has a damaged {index.name}; download it again")
        missing = set(shards.values()) - files
        if missing:
            raise UserError(f"{where} has no {min(missing)}; download it again")
    for name in sorted(files):
        if not is_whole(folder / name):
            raise UserError(f"{where} has a damaged {name}; download it again")


def first_misfit(folder: Path, network: nn.Module) -> str | None:
    """The first parameter that safetensors files in `folder` lack or have in another shape; reads no weight."""
    have: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder)[1]:
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
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{file} is damaged: it holds no JSON object; download it again")
    return value
