"""A pipeline in diffusers layout: its files, whether they are complete, and how its parts are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from swd.modules.model_folders import (
    check_index,
    check_model_folder,
    check_part,
    class_of,
    parts_of,
    read_json,
    weight_files,
)
from swd.types import UserError

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
"""A tokenizer folder has at least one of them."""

LOADING_FAILS = Exception
"""Type of the errors that diffusers and transformers raise for files that do not fit; it varies."""


class PipelineFolder:
    """A folder with a pipeline. Its index and its parts' configurations are read once, when it is made.

    Args:
        path: the folder.
        weights: whether weights must be there.

    Attributes:
        index: the content of `model_index.json`.
        parts: library and class of each part that is there, by the part's name, which is its subfolder's too.
        absent: parts that the index names as null.

    Raises:
        UserError: unless it is a complete diffusers pipeline with safetensors weights.
    """

    def __init__(self, path: Path, weights: bool = True) -> None:
        self.path = path
        if not path.is_dir():
            reason = "is a file" if path.exists() else "does not exist"
            raise UserError(f"model.path={path} {reason}; give a diffusers pipeline folder")
        if not (path / "model_index.json").is_file():
            raise UserError(f"model.path={path} has no model_index.json; give a diffusers pipeline folder")
        self.index = read_json(path / "model_index.json")
        check_index(self.index, f"model.path={path}")
        self.parts = parts_of(self.index)
        self.absent = [name for name, entry in self.index.items() if entry == [None, None]]
        self._configs: dict[str, dict[str, Any]] = {}
        for name in self.parts:
            self._check(name, weights)

    def _check(self, name: str, weights: bool) -> None:
        """Check that a part is complete, and that its configuration can be built from."""
        folder = self.path / name
        if not folder.is_dir() or not any(folder.iterdir()):
            raise UserError(f"model.path={self.path} is incomplete: subfolder {name!r} is missing; download it again")
        if "tokenizer" in name and not any((folder / file).is_file() for file in TOKENIZER_FILES):
            raise UserError(
                f"model.path={self.path}: {name!r} holds no tokenizer ({', '.join(TOKENIZER_FILES)}); download it again"
            )
        for file in ("config.json", "scheduler_config.json"):
            if (folder / file).is_file():
                check_part(self.config(name, file), folder / file)
        if (folder / "tokenizer_config.json").is_file():
            code = self.config(name, "tokenizer_config.json").get("auto_map")
            check_part({"auto_map": code}, folder / "tokenizer_config.json")
        if weights and not any(word in name for word in ("tokenizer", "scheduler", "processor", "feature_extractor")):
            check_model_folder(folder)

    def config(self, part: str, file: str = "config.json") -> dict[str, Any]:
        """The content of a part's configuration file.

        Raises:
            UserError: if there is none, or it is damaged.
        """
        name = f"{part}/{file}"
        if name not in self._configs:
            self._configs[name] = read_json(self.path / part / file)
        return self._configs[name]

    def has_variant(self, part: str) -> bool:
        """Whether a part has weights only in a variant, such as fp16."""
        return weight_files(self.path / part)[0] is not None

    def class_of(self, part: str) -> Any:
        """The class of a part, as the index names it."""
        return class_of(*self.parts[part])

    def is_processor(self, part: str) -> bool:
        """Whether a part is a processor: a tokenizer and what reads pictures beside it."""
        return self.parts[part][1].endswith("Processor")

    def tokenizer(self, part: str) -> Any:
        """Load a tokenizer; of a processor the tokenizer alone, since reading pictures needs further packages."""
        kind = AutoTokenizer if self.is_processor(part) else self.class_of(part)
        return kind.from_pretrained(self.path / part, local_files_only=True)

    def load(self, part: str, dtype: torch.dtype) -> Any:
        """Load a part's weights, of the variant that is there.

        Raises:
            UserError: if its library does not take them.
        """
        try:
            return self.class_of(part).from_pretrained(
                self.path / part,
                torch_dtype=dtype,
                variant=weight_files(self.path / part)[0],
                use_safetensors=True,
                local_files_only=True,
            )
        except LOADING_FAILS as error:
            raise UserError(f"model.path={self.path}: {part!r} cannot be loaded ({reason_of(error)})") from None

    def check_tokenizers(self) -> None:
        """Raise UserError for a tokenizer that is not of the class that the index names, or not its text encoder's."""
        for name in self.parts:
            if "tokenizer" in name:
                self._check_tokenizer(name)

    def _check_tokenizer(self, name: str) -> None:
        """Load a tokenizer, and compare the number of its entries with its text encoder's."""
        where = f"model.path={self.path}: {name!r}"
        try:
            entries = len(self.tokenizer(name))
        except Exception as error:  # tokenizers raise errors of many types for wrong files
            kind = self.parts[name][1]
            raise UserError(f"{where} cannot be read as {kind} ({reason_of(error)}); download it again") from None
        encoder = name.replace("tokenizer", "text_encoder")
        has_config = (self.path / encoder / "config.json").is_file()
        config = self.config(encoder) if has_config else {}
        known = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
        if isinstance(known, int) and entries > known:
            raise UserError(
                f"{where} has {entries} entries, but its text encoder knows {known}: it is another model's; "
                "download it again"
            )


def reason_of(error: Exception) -> str:
    """Message of an error on one short line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    if "ignore_mismatched_sizes" in text:  # this message only refers to a table in the log
        return "its weights have other shapes than its config.json says"
    # Libraries advise users to let a folder's own code run, which this package never does.
    return "it has code of its own, which is never run" if "trust_remote_code" in text else text[:160]
