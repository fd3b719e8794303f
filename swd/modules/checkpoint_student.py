"""Students inside checkpoints: what `swd sample` and `swd export` take of a run that has written no other student."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swd.config import read_recorded
from swd.io.files import file_hash
from swd.io.limits import ALPHAS
from swd.modules.adapters import Adapter, Baked, baked_of, check_expert, fold_alpha
from swd.modules.backbones import known_families, load_family
from swd.modules.checkpoint_files import read_resumable
from swd.modules.pretrained import Pretrained
from swd.types import UserError

AVERAGED = "average.module."
"""Beginning of the keys of the average of the student's weights."""
ADAPTER = "networks.backbone.network."
"""Beginning of the keys of a student that is an adapter on the base."""
WHOLE = "networks.copies.student.network."
"""Beginning of the keys of a student that is trained whole."""


@dataclass(frozen=True)
class CheckpointNetwork:
    """A network that is trained whole, as a checkpoint holds it.

    Attributes:
        source: the checkpoint.
        state: its parameters, float32, by name in the diffusers model.
        expert: the network's name in a pipeline of several experts, if its run recorded a family of such.
    """

    source: Path
    state: dict[str, Tensor]
    expert: str | None = None

    @property
    def hash(self) -> str:
        return file_hash(self.source)[:16]

    def fitted(self, model: Pretrained) -> CheckpointNetwork:
        self.check_model(model)
        return self

    def check_model(self, model: Pretrained) -> None:
        """Raise UserError, with both names, if it was made for another network."""
        check_expert(f"checkpoint {self.source}", self.expert, model)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.meta_network.named_parameters()}
        for name in sorted({*shapes, *self.state}):
            found = tuple(self.state[name].shape) if name in self.state else None
            if shapes.get(name) != found:
                raise UserError(
                    f"checkpoint {self.source} does not fit model {model.name}: {name} is {found or 'missing'} rather "
                    f"than {shapes.get(name) or 'no weight'}"
                )

    def network(self, model: Pretrained, device: torch.device | str = "cpu") -> Any:
        """The base's network with these parameters; what is no parameter is the base's."""
        network = model.network(device).network
        network.load_state_dict(self.state, strict=False)
        return network

    def load_into(self, pipe: Any, model: Pretrained) -> None:
        """Do nothing: `network` has loaded all of the student."""

    def fold_into(self, network: Any) -> None:
        """Do nothing: `network` has loaded all of the student."""

    def write(self, folder: Path, model: Pretrained) -> None:
        """Write it in float32, as a run does when it ends."""
        network: Any = model.network("cpu").network.float()
        network.load_state_dict(self.state, strict=False)
        network.save_pretrained(folder)


def from_checkpoint(path: Path, ema: bool | None = None) -> Adapter | CheckpointNetwork:
    """The student in a checkpoint, which is read as plain tensors and never runs code.

    Args:
        path: a checkpoint that `adapters.locate` returned.
        ema: as in `adapters.locate`.

    Raises:
        UserError: if it is damaged, or of another task than a distillation, or has no average that is asked for.
    """
    state = read_resumable(path)["state_dict"]
    stored = {key.removeprefix(AVERAGED): value for key, value in state.items() if key.startswith(AVERAGED)}
    average = {f"networks.{name.replace('/', '.')}": value for name, value in stored.items()}
    if ema and not average:
        raise UserError(f"checkpoint {path} has no average: task.ema was off when it was trained; leave out ema")
    return _student(average if average and ema is not False else state, path)


def _student(state: dict[str, Tensor], path: Path) -> Adapter | CheckpointNetwork:
    """The student among the weights of a checkpoint."""
    file = path.parent.parent / "config.yaml"
    whole = {key.removeprefix(WHOLE): value.float() for key, value in state.items() if key.startswith(WHOLE)}
    if whole:
        return CheckpointNetwork(path, whole, _recorded_expert(file))
    mine = {key: value for key, value in state.items() if key.startswith(ADAPTER) and ".student." in key}
    lora = {key.removeprefix(ADAPTER).replace(".student.", "."): value.float() for key, value in mine.items()}
    if not lora:
        raise UserError(f"checkpoint {path} holds no student; give one of a distillation")
    rank = max(value.shape[0] for key, value in lora.items() if ".lora_A." in key)
    expert = _recorded_expert(file)
    folded = fold_alpha(lora, rank, _recorded_alpha(file, rank))
    return Adapter(folded, path, baked=_recorded_adapters(file, expert), expert=expert)


def _recorded_expert(file: Path) -> str | None:
    """The expert that a run trained, by its name in the pipeline; None for one network alone, or without a record."""
    if not file.is_file():
        return None
    node = read_recorded(file).get("model")
    family = node.get("family") if isinstance(node, dict) else None
    return load_family(family).expert() if family in known_families() else None


def _recorded_adapters(file: Path, expert: str | None) -> tuple[Baked, ...]:
    """The adapters that were added to a run's own network, from the configuration that it recorded."""
    entries = read_recorded(file)["model"].get("adapters") or []
    if isinstance(entries, list):
        others = [entry for entry in entries if isinstance(entry, dict) and entry.get("expert") not in (None, expert)]
        entries = [entry for entry in entries if entry not in others]
    named = [entry | {"name": entry.get("path")} if isinstance(entry, dict) else entry for entry in entries]
    return baked_of(named, file)


def _recorded_alpha(file: Path, rank: int) -> float:
    """The LoRA alpha of a run, from the configuration that it recorded; null there stands for the rank."""
    node = read_recorded(file).get("model")
    if not isinstance(node, dict):
        raise UserError(f"{file} has no model; copy the run again")
    alpha = node.get("alpha")
    if alpha is None:
        return rank
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not ALPHAS[0] <= alpha <= ALPHAS[1]:
        raise UserError(f"{file}: model.alpha={alpha!r} is no LoRA alpha; copy the run again")
    return alpha
