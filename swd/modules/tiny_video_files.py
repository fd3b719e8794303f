"""Files of TAEHV's decoders: which fits a model, by the shapes of its weights, and how it is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from swd.modules.family_folder import FamilyFolder
from swd.modules.latents import KINDS, ChannelLatents
from swd.modules.model_folders import read_json
from swd.modules.pipeline_folder import reason_of
from swd.modules.tiny_video import BLOCKS, STAGES, TinyVideoDecoder
from swd.types import UserError

SOURCE = "https://github.com/madebyollin/taehv"
FILES = {16: "taew2_1.safetensors", 48: "taew2_2.safetensors or taew2_2_super.safetensors"}
"""Files that fit, by the number of the model's latent channels: Wan2.1's VAE has 16, that of Wan2.2 TI2V-5B 48."""
OTHER_MODELS = {"taehv": "HunyuanVideo", "taecvx": "CogVideoX", "taeos1_3": "Open-Sora 1.3"}
"""Beginnings of the names of published files for other models' latents, whose weights have the shapes of taew2_1's."""


def names_in_files(wide: bool) -> dict[str, str]:
    """Beginnings of the names of a decoder's weights, ours and those in TAEHV's files, which number all layers."""
    first, start, length = (0, 1, 7) if wide else (1, 3, 6)
    names = {"first": f"decoder.{first}"}
    for i in range(STAGES):
        at = start + i * length
        names |= {f"stages.{i}.blocks.{j}": f"decoder.{at + j}" for j in range(BLOCKS)}
        names[f"stages.{i}.convolution"] = f"decoder.{at + (3 if wide else 5)}"
        names[f"stages.{i}.grow"] = f"decoder.{at + (6 if wide else 4)}.conv"
    return names | {"last": f"decoder.{start + STAGES * length + (0 if wide else 1)}"}


def name_in_file(name: str, wide: bool) -> str:
    """The name in TAEHV's files of one of the decoder's weights."""
    ours, theirs = next(pair for pair in names_in_files(wide).items() if name.startswith(f"{pair[0]}."))
    return theirs + name.removeprefix(ours)


def settings_by_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Arguments of `TinyVideoDecoder` by the shapes of a file's weights.

    Raises:
        KeyError: for a weight that is missing.
    """
    wide = "decoder.0.weight" in shapes
    rows, columns = {}, {}
    for ours, theirs in names_in_files(wide).items():
        if "blocks" not in ours:
            rows[ours], columns[ours] = (*shapes[f"{theirs}.weight"], 0, 0)[:2]
    stages = [f"stages.{i}" for i in range(STAGES)]
    return {
        "latent_channels": columns["first"],
        "widths": [rows["first"], *(rows[f"{stage}.convolution"] // (4 if wide else 1) for stage in stages)],
        "growth": [rows[f"{stage}.grow"] // max(1, columns[f"{stage}.grow"]) for stage in stages],
        "patch": math.isqrt(rows["last"] // 3),
        "wide": wide,
    }


def decoder_settings(file: Path, where: str) -> dict[str, Any]:
    """Arguments of `TinyVideoDecoder` for a file; no weights are read.

    Args:
        file: a safetensors file.
        where: beginning of messages.

    Raises:
        UserError: if the file is damaged, or has no such decoder.
    """
    try:
        shapes = shapes_in(file)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{where} is damaged or cannot be read ({reason_of(error)}); download it again from {SOURCE}"
        ) from None
    try:
        settings = settings_by_shapes(shapes)
        misfit = first_other_shape(shapes, settings)
    except KeyError as error:
        misfit = f"it has no {error.args[0]}"
    except ValueError as error:  # sizes of which no layer can be built
        misfit = str(error)
    if misfit:
        raise UserError(f"{where} is no decoder of TAEHV ({misfit}); give a .safetensors file of {SOURCE}")
    return settings


def shapes_in(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a safetensors file by their names."""
    with safe_open(file, "pt") as opened:
        return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118


def first_other_shape(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any]) -> str | None:
    """The first weight of a decoder with these settings that has another shape in a file; None if all fit.

    Raises:
        KeyError: for a weight that the file lacks.
    """
    for ours, weight in without_weights(settings).state_dict().items():
        name = name_in_file(ours, settings["wide"])
        if shapes[name] != tuple(weight.shape):
            return f"{name} is {shapes[name]}, where {tuple(weight.shape)} would fit the others"
    return None


def decoder_file(path: str, where: str, fits: str) -> Path:
    """The safetensors file at a path: itself, or the only one in a folder.

    Args:
        path: the path.
        where: beginning of messages.
        fits: the file that is wanted, for messages.

    Raises:
        UserError: if there is none.
    """
    given = Path(path)
    advice = f"give {fits}, downloaded from {SOURCE}"
    if not given.exists():
        raise UserError(f"{where} does not exist; {advice}")
    if given.is_file():
        if given.suffix.lower() != ".safetensors":
            raise UserError(f"{where} is no .safetensors file, and others can run code; {advice}")
        return given
    if (given / "config.json").is_file():
        kind = read_json(given / "config.json").get("_class_name")
        raise UserError(f"{where} is of the class {kind}, which does not decode this model's latents; {advice}")
    files = sorted(given.glob("*.safetensors"))
    if len(files) != 1:
        raise UserError(f"{where} holds {len(files)} .safetensors files; {advice}")
    return files[0]


# Use


def takes_video_decoder(vae_class: str) -> bool:
    """Whether TAEHV is the small decoder for latents of VAEs of a class: those of Wan and of Qwen-Image."""
    return issubclass(KINDS.get(vae_class, object), ChannelLatents)


def check_video_decoder(path: str, model: FamilyFolder, where: str) -> None:
    """Raise UserError unless a file holds a decoder of TAEHV that fits a model's latents, with finite weights.

    Args:
        path: the file, or a folder with nothing else of this kind.
        model: the model.
        where: beginning of messages.
    """
    fits = FILES.get(model.channels, "the file")
    file = decoder_file(path, where, fits)
    other = next((whose for name, whose in OTHER_MODELS.items() if file.name.lower().startswith(name)), None)
    if other:
        raise UserError(f"{where} is for {other}, as its name says; give {fits}, downloaded from {SOURCE}")
    settings = decoder_settings(file, where)
    frames, side = math.prod(settings["growth"]), 2**STAGES * settings["patch"]
    channels = settings["latent_channels"]
    wrong = None
    if channels != model.channels:
        wrong = f"decodes {channels} channels, this model's latents have {model.channels}"
    elif side != model.factor:
        wrong = f"enlarges {side} times, this model's decoder {model.factor} times"
    elif frames != model.frame_factor:
        wrong = f"makes {frames} frames of one, this model's decoder {model.frame_factor}"
    if wrong:
        raise UserError(f"{where} {wrong}; give {fits}, downloaded from {SOURCE}")
    for name, weight in decoder_weights(file, without_weights(settings)).items():
        if not weight.dtype.is_floating_point:
            wrong = f"has {name} of {weight.dtype}, which is no floating-point type"
        elif not weight.float().isfinite().all():
            wrong = f"has values in {name} that are not finite"
        if wrong:
            raise UserError(f"{where} {wrong}; give {fits}, downloaded from {SOURCE} again")


def without_weights(settings: Mapping[str, Any]) -> TinyVideoDecoder:
    """A decoder with these settings on the meta device."""
    with torch.device("meta"):
        return TinyVideoDecoder(**settings)


def decoder_weights(file: Path, decoder: TinyVideoDecoder) -> dict[str, Tensor]:
    """The weights of a decoder in a file, by our names."""
    with safe_open(file, "pt") as opened:
        return {ours: opened.get_tensor(name_in_file(ours, decoder.wide)) for ours in decoder.state_dict()}


def load_video_decoder(path: str, dtype: torch.dtype, where: str) -> TinyVideoDecoder:
    """The decoder in a file that `check_video_decoder` passed; weights of an encoder there are not read.

    Args:
        path: the file, or a folder with nothing else of this kind.
        dtype: dtype of the decoder.
        where: beginning of messages.

    Raises:
        UserError: if there is none.
    """
    file = decoder_file(path, where, "a decoder's file")
    decoder = without_weights(decoder_settings(file, where))
    weights = decoder_weights(file, decoder)
    decoder.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()}, assign=True)
    return decoder.requires_grad_(False).eval()
