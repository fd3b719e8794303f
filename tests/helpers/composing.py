"""Hydra composes in the tests what it always does, with less work done twice."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import pytest
from hydra._internal import config_loader_impl, defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.defaults_list import DefaultsList, Overrides
from hydra._internal.hydra import Hydra
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.default_element import GroupDefault
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig

Plugins.instance()  # imports the classes that read files anew: `import` would give others, which Hydra does not use
FileSource: Any = SourcesRegistry.instance().types["file"]
PackageSource: Any = SourcesRegistry.instance().types["pkg"]
_load_config = FileSource.load_config
_load_from_package = PackageSource.load_config
_join = ConfigLoaderImpl._compose_config_from_defaults_list
_list_defaults = config_loader_impl.create_defaults_list
_map_choices = defaults_list._create_interpolation_map
_get_mode = Hydra.get_mode
_read: dict[tuple[Any, ...], ConfigResult] = {}
"""Files that were read, by their path, time and size, and by who asked for them."""
_joined: dict[tuple[Any, ...], DictConfig] = {}
"""Files put together, by their list, and by path, time and size of each."""
_listed: dict[tuple[Any, ...], tuple[DefaultsList, dict[str, tuple[str, int, int] | None]]] = {}
"""Defaults lists, by what they depend on, each with the files that it was made of, by path, time and size."""


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


def list_defaults(repo: Any, config_name: str | None, overrides_list: list[Any], **options: bool) -> DefaultsList:
    """Hydra's `create_defaults_list`, which goes through the files anew only for options or files that are new.

    Values on the command line, which it sorts from options of groups, do not change the list.
    """
    given = Overrides(repo=repo, overrides_list=overrides_list)
    values = {id(each) for each in given.config_overrides}
    chosen = tuple(each.input_line for each in overrides_list if id(each) not in values)
    sources = tuple((each.provider, each.scheme(), each.path) for each in repo.get_sources())
    key = (config_name, chosen, *options.values(), sources)
    if key not in _listed or any(_stamp_if_any(file) != stamp for file, stamp in _listed[key][1].items()):
        made = _list_defaults(repo=repo, config_name=config_name, overrides_list=overrides_list, **options)
        folders = [path for _, scheme, path in sources if scheme == "file"]
        asked = [each.removeprefix("config_path=") for each in repo.cache]
        files = [os.path.join(folder, f"{each.removesuffix('.yaml')}.yaml") for folder in folders for each in asked]
        _listed[key] = made, {file: _stamp_if_any(file) for file in files}
    return dataclasses.replace(_listed[key][0], config_overrides=given.config_overrides)


def map_choices(overrides: Any, defaults: list[Any], self_added: bool) -> DictConfig | None:
    """Hydra's `_create_interpolation_map`, which only entries such as `recipe: ${model}` are read by."""
    named = [each for each in defaults if not (isinstance(each, GroupDefault) and each.is_options())]
    return _map_choices(overrides, defaults, self_added) if any(each.is_interpolation() for each in named) else None


def _stamp_if_any(file: str) -> tuple[str, int, int] | None:
    return _stamp(file) if os.path.exists(file) else None


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
    patch.setattr(defaults_list, "_create_interpolation_map", map_choices)
    patch.setattr(config_loader_impl, "create_defaults_list", list_defaults)
    patch.setattr(Hydra, "get_mode", get_mode)
