"""LoRAs that are added to a base's weights before anything else, such as a style.

Teacher, fake score and student then all start from the changed base (`model.adapters`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from swd.io import limits
from swd.modules.adapters import Adapter, Baked, check_expert, check_layers, load, locate, with_model_names
from swd.modules.hub import is_hub_id
from swd.types import UserError

LARGEST_WEIGHT = 10.0
"""Weights of adapters lie within this of 0; ours: above 2 pictures of most styles fall apart."""
KEYS = {"path", "weight", "hash", "expert"}


@dataclass(frozen=True)
class BaseAdapter:
    """One entry of `model.adapters`.

    Attributes:
        path: a run, a folder, a `.safetensors` file or a repository on the hub, as `swd sample adapter=` takes it.
        weight: factor of its update of the weights, not 0.
        hash: of its content, see `content_hash`; None until it was read.
        expert: the network that it is added to, by its name in a pipeline of several experts; None where there is one
            network, and until the adapter's own record was read.
    """

    path: str
    weight: float = 1.0
    hash: str | None = None
    expert: str | None = None

    def read(self, model: Any) -> Adapter:
        """Its weights.

        Args:
            model: the `Pretrained` whose base it is added to.

        Raises:
            UserError: if there is none, it does not fit the network, or its content is not that of `hash`.
        """
        adapter = with_model_names(load(self._located()), model)
        check_layers(adapter, model)
        found = content_hash(adapter)
        if self.hash not in (None, found):
            raise UserError(
                f"model.adapters: {self.path} has other weights than those that were recorded (hash {found}, not "
                f"{self.hash}); give the adapter that was used then, or leave out its hash"
            )
        return adapter

    def checked(self, model: Any) -> BaseAdapter:
        """The same with its hash and its expert; raises as `read`, and where it is not clear which expert it is for."""
        named = replace(self, expert=self._expert_of(model))
        return replace(named, hash=content_hash(named.read(model)))

    def _expert_of(self, model: Any) -> str | None:
        """The network that it is added to, in a pipeline of several experts."""
        # One network, or what the adapter's own record says.
        experts = model.experts
        where = f"model.adapters: {self.path}"
        if not experts:
            if self.expert is not None:
                raise UserError(
                    f"{where} has expert={self.expert}, but model.family={model.family} is one network alone; leave "
                    "expert out"
                )
            return None
        recorded = load(self._located()).expert

        # The entry and the record together name one of the experts.
        names = " and ".join(experts)
        if self.expert is None and recorded is None:
            raise UserError(
                f"{where} does not say which of {names} it is for; give {{path: {self.path}, expert: {experts[0]}}}, "
                "and one that is for both twice"
            )
        if self.expert is None:
            check_expert(f"adapter {self.path}", recorded, model)
            return recorded
        if self.expert not in experts:
            raise UserError(f"{where} has expert={self.expert}, but {model.name} has {names}; give one of these")
        if recorded not in (None, self.expert):
            raise UserError(f"{where} has expert={self.expert}, but is of the expert {recorded}; leave expert out")
        return self.expert

    def _located(self) -> Path:
        return locate(self.path, Path("outputs"), "model.adapters")

    @property
    def record(self) -> dict[str, Any]:
        """The entry for configurations, with its hash."""
        return {"path": self.path, "weight": self.weight, "hash": self.hash} | self.of_expert

    @property
    def of_expert(self) -> dict[str, str]:
        """Entry of records about the expert; empty where there is one network."""
        return {"expert": self.expert} if self.expert else {}

    @property
    def baked(self) -> Baked:
        """The entry for a student's files: without folders of this machine."""
        assert self.hash is not None  # `checked` gave it
        return Baked(self.path if is_hub_id(self.path) else Path(self.path).name, self.weight, self.hash)


def read_entries(given: Sequence[str | Mapping[str, Any]] | None) -> tuple[BaseAdapter, ...]:
    """The entries of `model.adapters`: paths, or mappings with `path` and, as needed, `weight` and `expert`.

    Raises:
        UserError: for an entry that is neither, or a weight that is no number or out of range.
    """
    entries = []
    for value in given or ():
        entry = {"path": value} if isinstance(value, str) else dict(value) if isinstance(value, Mapping) else {}
        if not isinstance(entry.get("path"), str) or not entry["path"].strip() or not entry.keys() <= KEYS:
            raise UserError(
                f"model.adapters has {value!r}; give a path, or a path and its weight: "
                "model.adapters=[style.safetensors,{path:other,weight:0.8}]"
            )
        weight = entry.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or weight == 0:
            raise UserError(f"model.adapters: {entry['path']} has weight {weight!r}; use a number other than 0")
        limits.number(f"model.adapters: weight of {entry['path']}", weight, -LARGEST_WEIGHT, LARGEST_WEIGHT)
        expert = entry.get("expert")
        if not isinstance(expert, str | None):
            raise UserError(f"model.adapters: {entry['path']} has expert {expert!r}; give the network's name as a text")
        entries.append(BaseAdapter(entry["path"], float(weight), entry.get("hash"), expert))
    return tuple(entries)


def content_hash(adapter: Adapter) -> str:
    """Hash of an adapter's weights, 16 hexadecimal digits: one for all layouts in which the same weights can lie."""
    digest = hashlib.sha256()
    for key, value in sorted(adapter.state.items()):
        digest.update(f"{key} {tuple(value.shape)}\n".encode())
        digest.update(value.float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
