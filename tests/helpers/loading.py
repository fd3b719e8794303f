"""Parts of tiny pipelines are read once: every later load of the same files gives a copy of what the first one gave.

A part takes 20 to 40 ms to load, nearly all of it in libraries' code that does not depend on what is tested, and a
training loads eight. A copy takes a fifth of it.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines import pipeline_utils

from swd.modules.pipeline_folder import PipelineFolder

LARGEST = 8_000_000
"""Bytes of the files of a part that is kept; those of tiny pipelines have less."""
MOST = 64
"""Parts that are kept; the one that was not asked for the longest goes first."""
_kept: OrderedDict[tuple[Any, ...], Any] = OrderedDict()


def copy_what_was_loaded(patch: pytest.MonkeyPatch) -> None:
    """Let pipelines and `PipelineFolder` copy parts that were loaded before from the same files in the same way."""
    load_part = pipeline_utils.load_sub_model
    load, tokenizer = PipelineFolder.load, PipelineFolder.tokenizer

    @functools.wraps(load_part)
    def copied_part(**options: Any) -> Any:
        plain = [(key, value) for key, value in options.items() if isinstance(value, str | bool | torch.dtype | None)]
        folder = Path(options["cached_folder"], options["name"])
        return _copied(folder, (*plain, str(options["model_variants"])), lambda: load_part(**options))

    def copied_load(self: PipelineFolder, part: str, dtype: torch.dtype) -> Any:
        return _copied(self.path / part, (self.parts[part], dtype), lambda: load(self, part, dtype))

    def copied_tokenizer(self: PipelineFolder, name: str) -> Any:
        return _copied(self.path / name, self.parts[name], lambda: tokenizer(self, name))

    patch.setattr(pipeline_utils, "load_sub_model", copied_part)
    patch.setattr(PipelineFolder, "load", copied_load)
    patch.setattr(PipelineFolder, "tokenizer", copied_tokenizer)


def _copied(folder: Path, how: tuple[Any, ...], load: Callable[[], Any]) -> Any:
    """What `load` gives, or a copy of what it gave for the same arguments and files.

    Args:
        folder: with the files that are read.
        how: everything else that the result depends on.
        load: reads them.
    """
    files = [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in sorted(folder.rglob("*"))]
    if sum(size for *_, size in files) > LARGEST:
        return load()
    key = (how, *files)
    if key not in _kept:
        _kept[key] = load()
    _kept.move_to_end(key)
    if len(_kept) > MOST:
        _kept.popitem(last=False)
    return copy.deepcopy(_kept[key])
