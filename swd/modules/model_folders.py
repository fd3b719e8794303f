"""Checks of a pipeline's folder: the classes of its parts, the numbers in their configurations, their weight files."""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from swd.types import UserError

LIBRARIES = ("diffusers", "transformers")
"""Libraries of the classes that parts may have; a class from elsewhere would be code that the folder brings along."""

LARGEST = 2**24
"""Largest number that a configuration may hold; the largest known vocabulary has 2^18 entries."""
MOST_LAYERS = 512
"""Largest number of layers or blocks in one entry; the deepest known network has 60."""
MOST_IN_ALL = 4096
"""Largest product of all such entries of a configuration; FLUX's is 722, Chroma1's 3610."""
LARGEST_WIDTH = 2**16
"""Largest number of channels of latents, and of features; the largest known are 1536 and 5120."""

VARIANTS = ("fp32", "fp16", "bf16")
"""Variants of weights in order of preference, for parts without plain weights."""


def check_index(index: Mapping[str, Any], where: str) -> None:
    """Check `model_index.json`: nothing is imported but classes of the known libraries.

    Args:
        index: the file's content.
        where: beginning of messages.

    Raises:
        UserError: for an entry that is damaged, a part with code of its own, or an unknown class.
    """
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list):
            continue
        pair = len(entry) == 2 and (entry == [None, None] or all(isinstance(each, str) for each in entry))
        if not pair or not re.fullmatch(r"[A-Za-z]\w*", name):
            raise UserError(f"{where} has a damaged model_index.json: {name!r} is {_shown(entry)}; download it again")
        library, kind = entry
        if library is None:
            continue
        if library not in LIBRARIES:
            raise UserError(
                f"{where} has {name!r} of {_shown(library)}, which is code of its own and never run; give a model "
                f"whose parts are all of {' and '.join(LIBRARIES)}"
            )
        if class_of(library, kind) is None:
            raise UserError(
                f"{where} has {name!r} of the class {_shown(kind)}, which the installed {library} does not have; "
                f"update {library}, or download the model again"
            )


def parts_of(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Library and class of every part that `model_index.json` names; entries that are null are left out."""
    entries = {name: entry for name, entry in index.items() if isinstance(entry, list) and not name.startswith("_")}
    return {name: (entry[0], entry[1]) for name, entry in entries.items() if len(entry) == 2 and entry[0] is not None}


def class_of(library: str, name: str) -> Any:
    """A class of a known library by its name; None if there is none."""
    try:
        found = getattr(importlib.import_module(library), name, None)
    except Exception:  # a lazy module raises any error of its submodules
        return None
    return found if isinstance(found, type) else None


def check_part(config: Mapping[str, Any], file: Path) -> None:
    """Check a part's configuration before anything is built from it.

    Raises:
        UserError: for code of its own, or a number so large that building the part would not end.
    """
    if config.get("auto_map"):
        raise UserError(f"{file} names code of its own (auto_map), which is never run; give a model without it")
    product = 1
    for key, value in config.items():
        for number in _numbers(value):
            if isinstance(number, int) and abs(number) > LARGEST:
                raise UserError(_absurd(file, key, number, LARGEST))
        if not re.search("layers|blocks", key):
            continue
        counts = [number for number in _numbers(value) if isinstance(number, int)]
        of_blocks = key.endswith("_per_block")  # a list of counts; other lists hold names or numbers of blocks
        most = max([len(counts), sum(counts) if of_blocks else 0, *counts])
        if most > MOST_LAYERS:
            raise UserError(_absurd(file, key, most, MOST_LAYERS))
        product *= max(1, sum(counts)) if of_blocks or isinstance(value, int) else 1
        if product > MOST_IN_ALL:
            raise UserError(_absurd(file, f"{key} with the counts before it", product, MOST_IN_ALL))


def _absurd(file: Path, key: str, number: int, most: int) -> str:
    return f"{file} is damaged: {key} is {_shown(number)}, and at most {most} is known; download it again"


def _numbers(value: Any, depth: int = 0) -> Iterator[float]:
    """Numbers in a value and in the lists in it; booleans are left out."""
    if isinstance(value, list) and depth < 8:
        for each in value:
            yield from _numbers(each, depth + 1)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def _shown(value: Any) -> str:
    if isinstance(value, int) and abs(value) > 10**15:
        return f"about 10^{math.floor(math.log10(abs(value)))}"
    text = " ".join(str(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_scaling(config: Mapping[str, Any], file: Path) -> None:
    """Raise UserError if a value by which a VAE's latents are shifted or scaled is not finite, or a scale is 0."""
    for key in ("scaling_factor", "shift_factor", "latents_mean", "latents_std"):
        value = config.get(key)
        numbers = list(_numbers(value))
        wrong = any(not math.isfinite(n) or (n == 0 and key in ("scaling_factor", "latents_std")) for n in numbers)
        if value is not None and (wrong or len(numbers) != (len(value) if isinstance(value, list) else 1)):
            raise UserError(f"{file} is damaged: {key} is {_shown(value)}; download it again")


def check_shift(config: Mapping[str, Any], file: Path) -> None:
    """Raise UserError if a scheduler's configuration shifts its noise levels by anything but a number above 0."""
    for key in ("shift", "flow_shift"):
        shift = config.get(key, 1.0)
        is_number = isinstance(shift, int | float) and not isinstance(shift, bool)
        if shift is not None and not (is_number and 0 < shift < math.inf):
            raise UserError(f"{file} is damaged: {key} is {shift!r}, not a number above 0; download it again")


def weight_files(folder: Path) -> tuple[str | None, list[Path]]:
    """The safetensors files that a part's weights are read from.

    Returns:
        The variant, such as "fp16", or None for plain weights, which are preferred; and all of its files.
    """
    found: dict[str | None, list[Path]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        # NAME.fp16.safetensors, NAME.fp16-00001-of-00002.safetensors, NAME-00001-of-00002.fp16.safetensors
        match = re.fullmatch(
            r"\w+(?:\.(?P<early>\w+))?(?:-\d{5}-of-\d{5})?(?:\.(?P<late>\w+))?\.safetensors", file.name, re.ASCII
        )
        variant = (match["early"] or match["late"]) if match else None
        found.setdefault(variant, []).append(file)
    if not found or None in found:
        return None, found.get(None, [])
    variant = next((v for v in VARIANTS if v in found), min(v for v in found if v))
    return variant, found[variant]


def weight_indices(folder: Path, variant: str | None) -> list[Path]:
    """Files that list the shards of a part's weights."""
    return sorted(folder.glob("*.safetensors.index." + (f"{variant}." if variant else "") + "json"))


def check_model_folder(folder: Path, where: str | None = None) -> None:
    """Raise UserError unless `folder` holds a model's configuration and whole safetensors files.

    Args:
        folder: in diffusers layout.
        where: beginning of messages; None: that for a part of the pipeline at `model.path`.
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
        if not is_whole_file(folder / name):
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


def is_whole_file(file: Path) -> bool:
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
