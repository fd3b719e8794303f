"""Hydra composes in the tests what it always does, with less work done twice."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig

Plugins.instance()  # imports the classes that read files anew: `import` would give others, which Hydra does not use
FileSource: Any = SourcesRegistry.instance().types["file"]
PackageSource: Any = SourcesRegistry.instance().types["pkg"]
_load_config = FileSource.load_config
_load_from_package = PackageSource.load_config
_join = ConfigLoaderImpl._compose_config_from_defaults_list
_get_mode = Hydra.get_mode
_read: dict[tuple[Any, ...], ConfigResult] = {}
"""Files that were read, by their path, time and size, and by who asked for them."""
_joined: dict[tuple[Any, ...], DictConfig] = {}
"""Files put together, by their list, and by path, time and size of each."""


def load_config(self: Any, config_path: str) -> ConfigResult:
    """`load_config` of a source of files, which reads a file again only when it has changed."""
    file = os.path.realpath(os.path.join(self.path, self._normalize_file_name(config_path)))
    if not os.path.exists(file):
        result: ConfigResult = _load_config(self, config_path)
        return result
    return _once((_stamp(file), self.path, self.provider), _load_config, self, config_path)


def load_from_package(self: Any, config_path: str) -> ConfigResult:
    """`load_config` of a source in a package, here Hydra's own, whose files do not change."""
    return _once((config_path, self.path, self.provider), _load_from_package, self, config_path)


def _once(key: tuple[Any, ...], load: Any, source: Any, config_path: str) -> ConfigResult:
    if key not in _read:
        _read[key] = load(source, config_path)
    return copy.deepcopy(_read[key])


def join(self: ConfigLoaderImpl, defaults: Any, repo: Any) -> DictConfig:
    """The files of a defaults list as one configuration; values of the command line come later."""
    entries = tuple(tuple(vars(each).items()) for each in defaults)
    folders = [source.path for source in repo.get_sources() if source.scheme() == "file"]
    files = [os.path.join(folder, f"{each.config_path}.yaml") for folder in folders for each in defaults]
    key = (entries, *(_stamp(file) for file in files if os.path.exists(file)))
    if key not in _joined:
        _joined[key] = _join(self, defaults, repo)
    return copy.deepcopy(_joined[key])


def _stamp(file: str) -> tuple[str, int, int]:
    status = os.stat(file)
    return os.path.realpath(file), status.st_mtime_ns, status.st_size


def get_mode(self: Hydra, config_name: str | None, overrides: Sequence[str]) -> Any:
    """`Hydra.get_mode`, which composes everything to read `hydra.mode`: no file here sets it, a command line may."""
    return _get_mode(self, config_name, list(overrides)) if any("hydra" in each for each in overrides) else None


def compose_faster(patch: pytest.MonkeyPatch) -> None:
    """Compose once for a command line rather than twice, and read and put together each file once."""
    patch.setattr(FileSource, "load_config", load_config)
    patch.setattr(PackageSource, "load_config", load_from_package)
    patch.setattr(ConfigLoaderImpl, "_compose_config_from_defaults_list", join)
    patch.setattr(Hydra, "get_mode", get_mode)
