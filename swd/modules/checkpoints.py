"""Checkpoint files: written completely or not at all, with a hash of their bytes, and checked before a run resumes."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor

from swd.io.files import blocks, joint_hash, write_aside
from swd.modules.finite import all_finite
from swd.types import UserError

MARK = b"swd-sha256:"
"""Beginning of the comment of a checkpoint's zip archive; 64 hexadecimal digits follow."""
COMMENT = len(MARK) + 64
END = 22
"""Bytes of the record at the end of a zip archive; its last two are the length of the comment after it."""

NEEDED = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step", "pytorch-lightning_version")


class Resumable(Protocol):
    """A task that can tell whether it can be resumed from a checkpoint."""

    def misfit(self, checkpoint: Mapping[str, Any]) -> str | None:
        """Description of what a checkpoint lacks or has in another shape; None if it fits. Loads no weights."""


class CheckpointFiles(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name in its own folder, and renames it once it is complete on the disk."""

    def __init__(self) -> None:
        self._failures: list[str] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`, with the hash of its bytes.

        Raises:
            UserError: if it cannot be written; inside `failures` the message is collected instead.
        """
        path = Path(path)
        try:
            write_aside(path, lambda new: _write(checkpoint, new))
        except OSError as error:
            message = (
                f"checkpoint {path} cannot be written ({error.strerror or error}); nothing of it is left, and earlier "
                "checkpoints are whole: make room and go on with resume=auto"
            )
            if self._failures is None:
                raise UserError(message) from None
            self._failures.append(message)

    @contextmanager
    def failures(self) -> Iterator[list[str]]:
        """Collect messages of failed writes instead of raising, for a caller that must inform other processes first."""
        found: list[str] = []
        self._failures = found
        try:
            yield found
        finally:
            self._failures = None


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    try:
        with open(path, "wb") as stream:
            torch.save(checkpoint, stream)
    except RuntimeError as error:  # torch hides the operating system's error behind one of its own
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    seal(path)


def seal(path: Path) -> None:
    """Append the SHA-256 of a zip archive as its comment, so that it stays a valid archive; flush to the disk."""
    with open(path, "r+b") as stream:
        stream.seek(-2, os.SEEK_END)
        stream.write(COMMENT.to_bytes(2, "little"))
        stream.seek(0)
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        stream.seek(0, os.SEEK_END)
        stream.write(MARK + digest.encode())
        stream.flush()
        os.fsync(stream.fileno())


def bytes_changed(path: Path) -> str | None:
    """Reason why the bytes of a checkpoint differ from those that were written; None if they are the same.

    A file of version 0.1.0 has no hash; the checksums inside the zip archive, which cover its contents, are used there.
    """
    if path.stat().st_size < COMMENT + END:
        return "it is cut off"
    with open(path, "rb") as stream:
        stream.seek(-COMMENT, os.SEEK_END)
        comment = stream.read()
        if comment.startswith(MARK):
            stream.seek(0)
            found = joint_hash(blocks(stream, path.stat().st_size - COMMENT))
            return None if found.encode() == comment[len(MARK) :] else "its hash differs"
    return _archive_changed(path)


def _archive_changed(path: Path) -> str | None:
    """Reason why a zip archive differs from its own checksums; None if it does not."""
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
            if wrong is not None or archive.comment:
                return f"{wrong or 'its end'} has changed"
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError):
        return "it is cut off or no checkpoint"
    return None


def damage(path: Path, task: Resumable | None = None) -> str | None:
    """Reason why a checkpoint cannot be resumed from; None if it can.

    Args:
        path: the file.
        task: the task to resume; None: check the file alone.
    """
    try:
        changed = bytes_changed(path)
        if changed:
            return changed
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        wrong = _content_damage(checkpoint)
        return task.misfit(checkpoint) if task is not None and wrong is None else wrong
    except UserError:
        raise
    except Exception as error:  # reading a file that is no checkpoint raises errors of many types
        return f"it cannot be read: {type(error).__name__}"


def _content_damage(checkpoint: Mapping[str, Any]) -> str | None:
    """Reason why no task can be resumed from the content of a checkpoint; None if one may."""
    missing = [key for key in NEEDED if key not in checkpoint]
    if missing:
        return f"it has no {missing[0]}"
    if not all_finite(tensors([checkpoint["state_dict"], checkpoint["optimizer_states"]])):
        return "it holds values that are not finite"
    return None


def iterations(path: str | Path) -> int:
    """Number of iterations that were done when a checkpoint was written."""
    return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"])


def progress_in_iterations(checkpoint: dict[str, Any], batches_per_iteration: int) -> None:
    """Let the loop's progress in a checkpoint count iterations, where an earlier version counted their batches.

    Args:
        checkpoint: changed in place; whole, as `damage` says.
        batches_per_iteration: of the run that it is of.
    """
    loop = checkpoint["loops"]["fit_loop"]
    progress = loop["epoch_loop.batch_progress"]
    if progress["total"]["ready"] == checkpoint["global_step"]:
        return
    for counts in (progress["total"], progress["current"], loop["epoch_loop.state_dict"]):
        counts.update({name: count // batches_per_iteration for name, count in counts.items()})


def optimizer_misfit(state: Mapping[str, Any], shapes: list[tuple[int, ...]]) -> str | None:
    """Description of the first fault in a stored AdamW state for parameters of these shapes, in order; None if it fits.

    Parameters that never had a gradient have no state.
    """
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    if numbers != list(range(len(shapes))):
        return f"an optimizer is for {len(numbers)} parameters rather than {len(shapes)}"
    if shapes and not state["state"]:
        return "an optimizer has lost its moments"
    if lost := lost_settings(state):
        return lost
    for number, values in state["state"].items():
        for name in ("exp_avg", "exp_avg_sq", "step"):
            expected = () if name == "step" else shapes[number]
            if name not in values or tuple(values[name].shape) != expected:
                return f"{name} of parameter {number} is missing or has another shape"
    return None


def lost_settings(state: Mapping[str, Any]) -> str | None:
    """Which setting of AdamW a stored group of parameters lacks, in words; None if it has all.

    torch fills in what newer versions added, but takes a group without one of these and fails at the next step.
    """
    for group in state["param_groups"]:
        for name in ("lr", "betas", "eps", "weight_decay"):
            if name not in group:
                return f"an optimizer has no {name}"
    return None


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested dicts and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors(each)
