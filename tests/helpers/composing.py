"""Hydra composes in the tests what it always does, with less work done twice."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

import pytest
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.hydra import Hydra
from hydra.plugins.config_source import ConfigResult

_load_config = FileConfigSource.load_config
_get_mode = Hydra.get_mode
_read: dict[tuple[Any, ...], ConfigResult] = {}
"""Files that were read, by their path, time and size, and by who asked for them."""


def load_config(self: FileConfigSource, config_path: str) -> ConfigResult:
    """`FileConfigSource.load_config`, which reads a file again only when it has changed."""
    file = os.path.realpath(os.path.join(self.path, self._normalize_file_name(config_path)))
    if not os.path.exists(file):
        return _load_config(self, config_path)
    status = os.stat(file)
    key = (file, status.st_mtime_ns, status.st_size, self.path, self.provider)
    if key not in _read:
        _read[key] = _load_config(self, config_path)
    return copy.deepcopy(_read[key])


def get_mode(self: Hydra, config_name: str | None, overrides: Sequence[str]) -> Any:
    """`Hydra.get_mode`, which composes everything to read `hydra.mode`: no file here sets it, a command line may."""
    return _get_mode(self, config_name, list(overrides)) if any("hydra" in each for each in overrides) else None


def compose_faster(patch: pytest.MonkeyPatch) -> None:
    """Compose once for a command line rather than twice, and read each file once."""
    patch.setattr(FileConfigSource, "load_config", load_config)
    patch.setattr(Hydra, "get_mode", get_mode)
