"""Trained students for sampling and export: an adapter on the base, or a network that was trained whole.

They are read from folders, or from the checkpoint of a run.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from swd.io.files import check_checksums, file_hash, write_json
from swd.modules import adapters
from swd.modules.adapters import NETWORK_CONFIG
from swd.modules.checkpoint_student import from_checkpoint
from swd.modules.model_folders import check_model_folder, first_misfit, read_json, weight_files
from swd.modules.pretrained import Pretrained
from swd.types import UserError


class Student(Protocol):
    """A trained student, which can be checked against a model and put into the stock pipeline.

    `Adapter` and `FullStudent` implement it.
    """

    @property
    def hash(self) -> str:
        """Hash of its weights for records: 16 hexadecimal digits."""

    def fitted(self, model: Pretrained) -> Student:
        """The same for a model, under that one's names of layers.

        Raises:
            UserError: with the names of student and model, if it was made for another network.
        """

    def network(self, model: Pretrained, device: torch.device | str = "cpu") -> Any:
        """The denoising network for a pipeline, on the CPU, in the dtype that the model uses on `device`."""

    def load_into(self, pipe: Any, model: Pretrained) -> None:
        """Load the rest of the student, such as an adapter, into a pipeline that holds `network`."""

    def fold_into(self, network: Any) -> None:
        """Instead of `load_into`, add the rest of the student to the weights of `network`, in place."""


@dataclass(frozen=True)
class FullStudent:
    """A network that was trained whole (`model.tuning=full`): a diffusers model in a folder of its own.

    Attributes:
        folder: folder with `config.json` and safetensors weights.
    """

    folder: Path

    @property
    def weights(self) -> list[Path]:
        """Its safetensors files."""
        return weight_files(self.folder)[1]

    @property
    def hash(self) -> str:
        hashes = [file_hash(file) for file in self.weights]
        joined = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
        return joined[:16]

    def fitted(self, model: Pretrained) -> FullStudent:
        self.check_model(model)
        return self

    def check_model(self, model: Pretrained) -> None:
        """Raise UserError, with both names, if it was made for another network."""
        adapters.check_expert(f"student {self.folder}", adapters.read_expert(self.folder), model)
        where = f"student {self.folder} does not fit model {model.name}"
        kind = read_json(self.folder / NETWORK_CONFIG).get("_class_name")
        expected = model.backbone_class.network_type
        if kind != expected:
            raise UserError(f"{where}: it is a {kind}, that takes a {expected}")
        misfit = first_misfit(self.folder, model.meta_network)
        if misfit:
            raise UserError(f"{where}: {misfit}")
        check_checksums(self.folder, [NETWORK_CONFIG, *(file.name for file in self.folder.glob("*.safetensors*"))])

    def network(self, model: Pretrained, device: torch.device | str = "cpu") -> Any:
        return model.network_class.from_pretrained(
            self.folder,
            torch_dtype=model.dtype(device),
            variant=weight_files(self.folder)[0],
            use_safetensors=True,
            local_files_only=True,
        )

    def load_into(self, pipe: Any, model: Pretrained) -> None:
        """Do nothing: `network` has loaded all of the student."""

    def fold_into(self, network: Any) -> None:
        """Do nothing: `network` has loaded all of the student."""

    def write(self, folder: Path, model: Pretrained) -> None:
        """Copy its files into a folder."""
        config = read_json(self.folder / NETWORK_CONFIG)
        config.pop("_name_or_path", None)  # a folder of the machine that it was trained on
        write_json(folder / NETWORK_CONFIG, config)
        for file in [*self.weights, *self.folder.glob("*.safetensors.index*.json")]:
            shutil.copyfile(file, folder / file.name)


def load_student(path: Path, ema: bool | None = None) -> Student:
    """Read the student at a path that `adapters.locate` returned.

    Args:
        path: its folder or file, or a checkpoint.
        ema: of a checkpoint, as in `locate`; of a folder `locate` has chosen.

    Raises:
        UserError: if it is incomplete or damaged.
    """
    if adapters.is_checkpoint(path):
        return from_checkpoint(path, ema)
    if path.is_dir() and adapters.is_network(path):
        check_model_folder(path, f"student {path}")
        return FullStudent(path)
    return adapters.load(path)
