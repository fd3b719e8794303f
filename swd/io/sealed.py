"""Files of tensors and plain values: safetensors, with JSON in the header and a hash of all bytes inside."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from swd.io.files import blocks, joint_hash

SEAL = "sha256"
"""Name of the tensor of 32 bytes that holds the SHA-256 of the file, taken with zeros in its place."""
SEAL_BYTES = 32
LENGTH = 8
"""Bytes at the beginning of a safetensors file: the length of the header after them, little-endian."""
LONGEST_HEADER = 100_000_000
"""Bytes of a header, as the safetensors library limits them."""
PAIRS, TUPLE, NUMBER, TENSOR = "$pairs", "$tuple", "$float", "$tensor"
"""Keys of what JSON has no word for: dicts whose keys are no texts, tuples, numbers that are not finite, tensors."""


Memory = Literal["mapped", "own", "none"]


class Damaged(Exception):
    """A file is not as it was written; the message says in which way."""


def write_sealed(path: Path, tree: Any, kind: str, version: int) -> None:
    """Write a tree of values to a file, and flush it to the disk. Equal trees become equal bytes.

    Args:
        path: written in place; see `write_aside`.
        tree: dicts, lists and tuples of tensors, numbers, texts, booleans and None.
        kind: what the file is; the key in the header under which everything but tensors lies.
        version: of this kind's format.

    Raises:
        TypeError: naming a value of another type.
        OSError, SafetensorError: if it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    plain = {"version": version, "content": _to_plain(tree, (), tensors)}
    # One entry: the library writes several in an order of chance.
    header = {kind: json.dumps(plain, allow_nan=False, separators=(",", ":"))}
    save_file(own_memory(tensors) | {SEAL: torch.zeros(SEAL_BYTES, dtype=torch.uint8)}, path, header)
    with open(path, "r+b") as stream:
        place = _seal_place(stream)
        digest = bytes.fromhex(_hash(stream, place))
        stream.seek(place)
        stream.write(digest)
        stream.flush()
        os.fsync(stream.fileno())


def read_version(path: Path, kind: str) -> int | None:
    """The version of a file's format; None for one of another kind. Its bytes are not checked."""
    try:
        with open(path, "rb") as stream:
            version = json.loads(_header(stream)["__metadata__"][kind])["version"]
    except (OSError, Damaged, LookupError, TypeError, ValueError, RecursionError):
        return None
    return version if isinstance(version, int) else None


def check_seal(path: Path) -> None:
    """Raise Damaged unless every byte of a file is as it was written.

    Raises:
        Damaged: if it is not.
        OSError: if it cannot be read.
    """
    with open(path, "rb") as stream:
        place = _seal_place(stream)
        found = _hash(stream, place)
        stream.seek(place)
        if stream.read(SEAL_BYTES).hex() != found:
            raise Damaged("its hash differs")


def read_sealed(path: Path, kind: str) -> Any:
    """The tree of a file whose bytes are checked first; its tensors are mapped, see `read_unchecked`.

    Raises:
        Damaged: if it is not as it was written.
        OSError: if it cannot be read.
    """
    check_seal(path)
    return read_unchecked(path, kind)


def read_unchecked(path: Path, kind: str, memory: Memory = "mapped") -> Any:
    """The tree of a file that `check_seal` has passed.

    Args:
        path: the file.
        kind: as it was written with.
        memory: "mapped": tensors lie in the file, which is read where they are; changing them does not change it.
            "own": each has memory of its own. "none": None stands for each.

    Raises:
        Damaged: if it is no file of this kind.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name != SEAL and memory != "none"]  # noqa: SIM118
            tensors = {name: file.get_tensor(name) for name in names}
            if memory == "own":
                tensors = {name: tensor.clone() for name, tensor in tensors.items()}
            content = json.loads(file.metadata()[kind])["content"]
            return _from_plain(content, None if memory == "none" else tensors)
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"it cannot be read: {type(error).__name__}") from None


def own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, each in memory that no other one shares, as safetensors asks for."""
    found: dict[str, Tensor] = {}
    used: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().to("cpu").contiguous()
        place = value.untyped_storage().data_ptr()
        found[name] = value.clone() if place in used else value
        used.add(place)
    return found


# Header and hash


def _header(stream: BinaryIO) -> dict[str, Any]:
    """The header of an open safetensors file; afterwards the stream is at the first byte of the tensors."""
    size = os.fstat(stream.fileno()).st_size
    length = int.from_bytes(stream.read(LENGTH), "little")
    if length > min(size - LENGTH, LONGEST_HEADER):
        raise Damaged("it is cut off or no file of this kind")
    try:
        header = json.loads(stream.read(length))
    except (ValueError, RecursionError):
        raise Damaged("its header is damaged") from None
    if not isinstance(header, dict):
        raise Damaged("its header is damaged")
    return header


def _seal_place(stream: BinaryIO) -> int:
    """Where the seal of an open file begins."""
    stream.seek(0)
    header = _header(stream)
    try:
        begin, end = header[SEAL]["data_offsets"]
        place = stream.tell() + int(begin)
        whole = begin >= 0 and end - begin == SEAL_BYTES and place + SEAL_BYTES <= os.fstat(stream.fileno()).st_size
    except (LookupError, ValueError, TypeError, OverflowError):
        whole = False
    if not whole:
        raise Damaged("it is cut off or has no hash")
    return place


def _hash(stream: BinaryIO, place: int) -> str:
    """SHA-256 of an open file whose seal is at `place`, in hexadecimal."""
    size = os.fstat(stream.fileno()).st_size
    stream.seek(0)
    before = blocks(stream, place)

    def after() -> Any:
        stream.seek(place + SEAL_BYTES)
        yield from blocks(stream, size - place - SEAL_BYTES)

    return joint_hash(chain(before, [bytes(SEAL_BYTES)], after()))


# Values


def _to_plain(value: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    """A value as JSON has it; its tensors are added to `tensors`, by their place in the tree."""
    if isinstance(value, Tensor):
        name = ".".join(path)
        while name in tensors or name == SEAL:
            name += "_"
        tensors[name] = value
        return {TENSOR: name}
    if isinstance(value, Mapping):
        parts = {key: _to_plain(inner, (*path, str(key)), tensors) for key, inner in value.items()}
        if all(isinstance(key, str) and not key.startswith("$") for key in parts):
            return parts
        return {PAIRS: [[_to_plain(key, path, tensors), part] for key, part in parts.items()]}
    if isinstance(value, list | tuple):
        items = [_to_plain(inner, (*path, str(i)), tensors) for i, inner in enumerate(value)]
        return {TUPLE: items} if isinstance(value, tuple) else items
    if isinstance(value, float) and not math.isfinite(value):
        return {NUMBER: str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{'.'.join(path)} is a {type(value).__name__}; use numbers, texts, lists, dicts and tensors")


def _from_plain(value: Any, tensors: Mapping[str, Tensor] | None) -> Any:
    """The inverse of `_to_plain`."""
    if isinstance(value, list):
        return [_from_plain(inner, tensors) for inner in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value)) if len(value) == 1 else ""
    if tag == TENSOR:
        return None if tensors is None else tensors[value[tag]]
    if tag == NUMBER:
        return float(value[tag])
    if tag == TUPLE:
        return tuple(_from_plain(inner, tensors) for inner in value[tag])
    if tag == PAIRS:
        return {_from_plain(key, tensors): _from_plain(inner, tensors) for key, inner in value[tag]}
    return {key: _from_plain(inner, tensors) for key, inner in value.items()}
