"""The options of `conf/model/`, and which of them a folder fits."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from swd.modules.model_folders import read_json

EMBEDDED = "swd://"
"""Beginning of the paths of models that ship with the package."""


def families_of_options() -> dict[str, str]:
    """The family of each option of `model/`, by the option's name; without the embedded model."""
    package = Path(__file__).parents[1]
    folders = [root / "conf" / "model" for root in (package.parent, package)]  # a checkout, an installed wheel
    files = next((sorted(folder.glob("[!_]*.yaml")) for folder in folders if folder.is_dir()), [])
    found = {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in files}
    return {name: node["family"] for name, node in found.items() if not str(node["path"]).startswith(EMBEDDED)}


def options_that_fit(families: Collection[str], network: Mapping[str, Any], published: Path) -> list[str]:
    """What to write for a folder: `model=OPTION` for each option of these families, `model.family=` for others.

    Options whose published network has the folder's configuration stand for all of their family.

    Args:
        families: those that take the folder.
        network: the `config.json` of its denoising network.
        published: the folder of the published configurations, one for each option.
    """
    options = [name for name, family in families_of_options().items() if family in families]
    same = [name for name in options if _is_of(network, published / f"{name}.json")]
    others = [family for family in families if family not in families_of_options().values()]
    return [f"model={name}" for name in same or options] + [f"model.family={family}" for family in sorted(others)]


def _is_of(network: Mapping[str, Any], file: Path) -> bool:
    """Whether a network has the values of a published configuration."""
    if not file.is_file():
        return False
    values = {key: value for key, value in read_json(file).items() if not key.startswith("_")}
    return all(network.get(key) == value for key, value in values.items())
