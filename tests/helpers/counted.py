"""Encoders that are counted, and data that seem to be encoded."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest

from swd.modules.encoders import Encoders
from swd.modules.pretrained import Pretrained
from swd.types import Conditioning, Size


class Counted:
    """Every encoder that is loaded, as long as something refers to it, and whether text came with it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.text: list[bool] = []
        self.loaded: list[Any] = []
        load = Pretrained.encoders

        def counted(model: Pretrained, device: Any = "cpu", text: bool = True) -> Encoders:
            encoders = load(model, device, text)
            self.text.append(bool(len(encoders.text_models)))
            self.loaded += [weakref.ref(encoders), weakref.ref(encoders.vae), *map(weakref.ref, encoders.text_models)]
            return encoders

        monkeypatch.setattr(Pretrained, "encoders", counted)

    @property
    def alive(self) -> int:
        gc.collect()
        return sum(each() is not None for each in self.loaded)


class Cache:
    """Stands for data that are encoded."""

    def empty(self, bucket: Size | None) -> Conditioning:
        raise AssertionError("drawing needs no empty prompt")
