"""Pipeline folders with configurations and empty weights: of the models in `conf/model/`, or copied from a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from swd.modules.backbones import load_family
from swd.modules.family_folder import resolve_asset
from swd.modules.model_folders import LIBRARIES, class_of, parts_of, read_json
from swd.types import UserError

ASSET = "swd://assets/published"
"""Where the published configurations are; its README says where they come from."""


def published() -> list[str]:
    """Names of the options of `model/` whose configurations ship with the package: network, VAE and text encoders."""
    networks, encoders = (
        {file.stem for file in (resolve_asset(ASSET) / part).glob("*.json")} for part in ("networks", "encoders")
    )
    return sorted(networks & encoders)


def published_folder(name: str, family: str, folder: Path) -> Path:
    """Write the published configuration of a model as a pipeline's folder with empty weights.

    Args:
        name: one of `published`.
        family: the model's.
        folder: where to; it is made.
    """
    root = resolve_asset(ASSET)
    kinds = load_family(family)
    networks = dict.fromkeys((kinds.subfolder, *kinds.other_experts), read_json(root / "networks" / f"{name}.json"))
    return write_folder(networks | read_json(root / "encoders" / f"{name}.json"), family, folder)


def copied_folder(path: Path, family: str, folder: Path) -> Path:
    """Write the configurations of network, VAE and text encoders in `path` as a folder with empty weights.

    Raises:
        UserError: if one of them is missing or damaged.
    """
    if not (path / "model_index.json").is_file():
        raise UserError(f"model.path={path} has no model_index.json; give a diffusers pipeline folder")
    index = read_json(path / "model_index.json")
    kinds = load_family(family)
    wanted = (kinds.subfolder, *kinds.other_experts, "vae", *kinds.encoders_type.text_encoders)
    parts = {
        part: read_json(path / part / "config.json") | {"_class_name": kind}
        for part, (_, kind) in parts_of(index).items()
        if part in wanted
    }
    settings = {key: value for key, value in index.items() if not isinstance(value, list)}
    return write_folder(parts, family, folder, settings)


def write_folder(
    parts: Mapping[str, Mapping[str, Any]], family: str, folder: Path, settings: Mapping[str, Any] | None = None
) -> Path:
    """Write configurations as a folder in diffusers layout whose weights are empty files.

    Args:
        parts: configurations with their `_class_name`, by the part's name.
        family: the model's.
        folder: where to; it is made.
        settings: what `model_index.json` holds beside the parts; None: what the family's pipeline has.
    """
    kinds = load_family(family)
    own = {"_class_name": kinds.pipeline_type, **kinds.known_settings}
    index: dict[str, Any] = dict(own if settings is None else settings)
    for part, config in parts.items():
        kind = config["_class_name"]
        library = next((name for name in LIBRARIES if class_of(name, kind) is not None), LIBRARIES[0])
        index[part] = [library, kind]
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file({}, folder / part / "model.safetensors")
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder
