"""Folders of feature networks in transformers' layout, from this machine or the hub."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from swd.io.files import file_hash
from swd.modules import hub
from swd.modules.model_folders import check_model_folder, read_json, weight_files
from swd.types import UserError


def find_model(path: str, key: str, architecture: str, revision: str | None = None) -> Path:
    """The folder of a network with `config.json` and safetensors weights; from the hub it is downloaded once.

    Args:
        path: a folder, or a hub id.
        key: what the user calls the path, for messages.
        architecture: `model_type` that the configuration must state.
        revision: of the hub's repository; None is the newest.

    Raises:
        UserError: if it is absent, incomplete, or another kind of network.
    """
    folder = _from_hub(path, revision, key) if hub.is_hub_id(path) else Path(path)
    if not folder.is_dir():
        raise UserError(
            f"{key}={path} is no folder; give a folder with config.json and .safetensors weights, or a hub id"
        )
    check_model_folder(folder, f"{key}={path}")
    found = read_json(folder / "config.json").get("model_type")
    if found != architecture:
        raise UserError(f"{key}={path} is a network of type {found!r}; give one of type {architecture!r}")
    return folder


@cache
def _from_hub(path: str, revision: str | None, key: str) -> Path:
    """`hub.model`, which asks the hub for changes at every call, once in a process."""
    return hub.model(path, revision, key)


def weights_hash(folder: Path) -> str:
    """SHA-256 of the names and SHA-256 of a folder's weight files."""
    listed = "".join(f"{file.name} {cached_file_hash(file)}\n" for file in weight_files(folder)[1])
    return hashlib.sha256(listed.encode()).hexdigest()


def cached_file_hash(file: Path) -> str:
    """SHA-256 of a file, read again only if its size or time of change is another."""
    about = file.stat()
    return _hash(file, about.st_size, about.st_mtime_ns)


@cache
def _hash(file: Path, size: int, changed: int) -> str:
    return file_hash(file)


def load_network(network_class: Any, folder: Path, config: Any = None) -> nn.Module:
    """A network of transformers from a folder's safetensors weights, in float32; weights that it lacks are passed over.

    Args:
        network_class: a class of transformers.
        folder: as `find_model` returns it.
        config: of the network; None: as in the folder.

    Raises:
        UserError: if weights that the network needs are missing or of another shape.
    """
    try:
        network, report = network_class.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except RuntimeError:  # transformers raises it for weights of another shape, after a table of them
        raise UserError(f"weights in {folder} have other shapes than its config.json says; download it again") from None
    if report["missing_keys"]:
        raise UserError(f"{folder} has no weights {min(report['missing_keys'])}; download it again")
    return cast(nn.Module, network)
