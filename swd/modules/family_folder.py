"""Configuration files of a pipeline, read for one family of networks: sizes, channels, blocks."""

from __future__ import annotations

import copy
import inspect
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from swd.io.limits import LARGEST_SIDE, STEPS
from swd.modules import hub, latents
from swd.modules.backbones import known_families, load_family
from swd.modules.backbones.base import NetworkLimits
from swd.modules.encoders import pixel_size
from swd.modules.model_folders import LARGEST_WIDTH, MOST_LAYERS, check_scaling, check_shift
from swd.modules.model_options import options_that_fit
from swd.modules.pipeline_folder import PipelineFolder, reason_of
from swd.types import Conditioning, Size, UserError


class FamilyFolder:
    """A pipeline's configuration, checked for a family. Weights are neither read nor needed.

    Args:
        family: a module of `swd.modules.backbones`, or the dotted name of any other.
        path: folder in diffusers layout, id of a repository on the hub, or `swd://assets/...`.
        revision: branch, tag or commit of a repository on the hub.

    Attributes:
        files: the folder with the configuration files.

    Raises:
        UserError: if the folder is missing or incomplete, or of another family.
    """

    def __init__(self, family: str, path: str, revision: str | None = None) -> None:
        self.family = family
        self.backbone_class = load_family(family)
        self.path = path
        self.revision = revision
        on_hub = hub.is_hub_id(path)
        self.files = PipelineFolder(hub.configuration(path, revision) if on_hub else resolve_asset(path), not on_hub)
        try:
            self._check()
        except UserError as error:
            fits = self._options_that_fit()
            raise UserError(f"{error}; {' or '.join(fits)} fits this folder" if fits else str(error)) from None

    def _check(self) -> None:
        """Raise UserError unless the folder is one of the family."""
        self._check_family()
        self._check_numbers()
        self._check_channels()
        self._check_process()

    def _options_that_fit(self) -> list[str]:
        """Options of the command line that take the folder, where the family does not; empty if none does."""
        found = {}
        for family in known_families():
            other = copy.copy(self)
            other.family = family
            other.backbone_class = load_family(family)
            with suppress(UserError):
                other._check()
                found[family] = other
        if not found:
            return []
        network = next(iter(found.values())).network_config
        return options_that_fit(found, network, resolve_asset("swd://assets/published/networks"))

    @property
    def folder(self) -> Path:
        """Where the configuration files are."""
        return self.files.path

    @property
    def parts(self) -> list[str]:
        """Names of the pipeline's subfolders."""
        return list(self.files.parts)

    @property
    def _known_parts(self) -> list[str]:
        """Parts that the family's pipeline takes."""
        return list(inspect.signature(getattr(diffusers, self.backbone_class.pipeline_type).__init__).parameters)

    # Checks

    def _check_family(self) -> None:
        """Check that network and pipeline are the family's, with no further parts.

        Variants of a model for other tasks have the same class of network.
        """
        backbone = self.backbone_class
        part = backbone.subfolder
        index = self.files.index
        actual = self.files.parts.get(part, ("", "nothing"))[1]
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
        if index.get("is_distilled"):
            raise UserError(
                f"model.path={self.path} was distilled to few steps already (is_distilled in its model_index.json), so "
                f"it is no teacher for a student of model.family={self.family}; give the base model"
            )
        self.check_parts(set(self.files.absent))
        for name, entry in index.items():
            library = self.files.parts.get(name, ("", ""))[0]
            more = library == "diffusers" and name not in (part, *backbone.other_experts, "vae", "scheduler")
            if more or (name in backbone.unknown_settings and entry):
                raise UserError(
                    f"model.path={self.path} has {name}, which model.family={self.family} does not know; give a "
                    f"{backbone.pipeline_type} of {part}, vae and scheduler alone"
                )
        for name in backbone.unknown_settings:
            if self.network_config.get(name):
                raise UserError(
                    f"model.path={self.path}: its {part} has {name}, which model.family={self.family} does not know; "
                    f"give a {backbone.pipeline_type} for text alone as input"
                )

        self._check_experts()

    def _check_experts(self) -> None:
        """Check that the networks for other noise levels are there, and that the levels are divided as is known."""
        backbone = self.backbone_class
        where = f"model.path={self.path}"
        for name in backbone.other_experts:
            actual = self.files.parts.get(name, ("", "nothing"))[1]
            if actual != backbone.network_type:
                raise UserError(
                    f"{where} holds {actual} as {name}, but model.family={self.family} is one of several experts, each "
                    f"a {backbone.network_type}; give a model of that kind"
                )
        for key, value in backbone.known_settings.items():
            if self.files.index.get(key) != value:
                raise UserError(
                    f"{where} has {key}={self.files.index.get(key)}, but model.family={self.family} is for {value}; "
                    "give a model of that kind"
                )

    def check_parts(self, absent: set[str]) -> None:
        """Raise UserError if a part is absent that the family needs, or a tokenizer whose text encoder is there."""
        backbone = self.backbone_class
        encoders = (name for name in self._known_parts if name.startswith(("text_encoder", "tokenizer")))
        needed = {"vae", "scheduler", *encoders}
        for name in sorted(needed & absent):
            encoder = name.replace("tokenizer", "text_encoder")
            if name not in backbone.encoders_type.optional or encoder not in absent:
                raise UserError(
                    f"model.path={self.path}: model_index.json names no {name}, and model.family={self.family} does "
                    "not work without it; give a complete model"
                )

    def _check_numbers(self) -> None:
        """Check the sizes and widths of the limits, before anything is computed from them."""
        limits = self.limits
        factors = self._factors
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

    def _check_channels(self) -> None:
        """Refuse networks for inpainting, control or a first frame: they take more channels than latents have."""
        latent = latents.channels(self.vae_config)
        if latent not in (None, self.channels):
            raise UserError(
                f"model.path={self.path}: its {self.backbone_class.subfolder} takes latents of {self.channels} "
                f"channels, but its VAE makes {latent}; model.family={self.family} is for text alone as input"
            )

    def _check_process(self) -> None:
        """Check that the model was trained on the noise levels of its family's process."""
        file = self.folder / "scheduler" / "scheduler_config.json"
        expected = self.backbone_class.process.trained_on
        if not file.is_file():
            return
        config = self.files.config("scheduler", file.name)
        if config.get("num_train_timesteps", STEPS) != STEPS:
            raise UserError(
                f"{file} has num_train_timesteps={config['num_train_timesteps']}, but models of model.family="
                f"{self.family} are fed noise levels as timesteps from 0 to {STEPS}; download it again"
            )
        check_shift(config, file)
        config = {**expected, **config}
        for key, value in expected.items():
            if config[key] != value:
                raise UserError(
                    f"model.path={self.folder}: its scheduler has {key}={config[key]}, only {value} is known"
                )

    # Properties

    @property
    def name(self) -> str:
        """Name for messages and records: the id on the hub, or the folder's name."""
        return self.path if hub.is_hub_id(self.path) else self.folder.name

    @cached_property
    def meta_network(self) -> nn.Module:
        """The network without weights, on the meta device, for names, shapes and counts; not to be changed."""
        try:
            with torch.device("meta"):
                network: nn.Module = self.network_class.from_config(self.network_config).eval()
        except Exception as error:  # the class raises errors of any type for wrong values
            file = self.folder / self.backbone_class.subfolder / "config.json"
            raise UserError(
                f"{file} is damaged: no {self.backbone_class.network_type} can be built of it ({reason_of(error)}); "
                "download it again"
            ) from None
        return network

    @property
    def network_class(self) -> Any:
        """The diffusers class of the denoising network, as `model_index.json` names it."""
        return self.files.class_of(self.backbone_class.subfolder)

    @property
    def network_config(self) -> dict[str, Any]:
        """The denoising network's `config.json`."""
        return self.files.config(self.backbone_class.subfolder)

    @property
    def limits(self) -> NetworkLimits:
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
        config = self.files.config("vae")
        check_scaling(config, self.folder / "vae" / "config.json")
        return config

    @property
    def _factors(self) -> tuple[int, int]:
        """Frames per latent frame beyond the first one, and pixels per latent along a side."""
        config = self.vae_config
        try:
            return self.backbone_class.encoders_type.factors(config)
        except (LookupError, TypeError, ValueError, ArithmeticError) as error:
            file = self.folder / "vae" / "config.json"
            raise UserError(f"{file} is damaged: {reason_of(error)}; download it again") from None

    @property
    def factor(self) -> int:
        """Pixels per latent along one side."""
        return self._factors[1]

    @property
    def frame_rate(self) -> int:
        """Frames a second of videos that the model draws."""
        return self.backbone_class.frame_rate(self.network_config)

    @property
    def frame_factor(self) -> int:
        """Frames per latent frame, beyond the first one."""
        return self._factors[0]

    def pixel_size(self, size: Size) -> Size:
        """Size in pixels of a latent size."""
        return pixel_size(size, self._factors)

    def size_arguments(self, first: Size, final: Size) -> dict[str, int]:
        """Height and width (number of frames) in pixels with which the stock pipeline is called.

        Args:
            first: latent size of the call's first latents.
            final: latent size of the finished pictures or videos.
        """
        pixels = self.pixel_size(first if self.backbone_class.called_with_first_size else final)
        return {"height": pixels[-2], "width": pixels[-1]} | ({"num_frames": pixels[0]} if len(pixels) == 3 else {})

    def latent_size(self, pixels: Size) -> Size:
        """Latent size of a size in pixels.

        Raises:
            UserError: if the VAE would crop pictures of this size.
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

    def unconditional(self, empty: Conditioning) -> Conditioning:
        """Conditioning in place of a prompt, for classifier-free guidance as in the stock pipeline.

        Args:
            empty: the encoded empty prompt, from the encoders or a cache.
        """
        return self.backbone_class.unconditional(empty, self.files.index)


def resolve_asset(path: str) -> Path:
    """A local path; `swd://assets/NAME` is a folder that ships with the package."""
    if not path.startswith("swd://"):
        return Path(path)
    package = Path(__file__).parents[1]
    relative = path.removeprefix("swd://")
    if Path(relative).is_absolute() or ".." in Path(relative).parts:
        raise UserError(f"model.path={path} leads out of the installation; give swd://assets/NAME, or a folder")
    for root in (package.parent, package):  # a checkout, an installed wheel
        if (root / relative).is_dir():
            return root / relative
    raise UserError(f"model.path={path} does not ship with this installation; reinstall swd or give a folder")
