"""Checkpoint files: written completely or not at all, with a hash of their bytes, and checked before a run resumes."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from safetensors import SafetensorError
from torch import Tensor

from swd.io.files import blocks, failed_operation, joint_hash, write_aside
from swd.io.sealed import Damaged, Memory, check_seal, read_unchecked, read_version, write_sealed
from swd.modules.finite import all_finite
from swd.types import UserError

KIND = "swd_checkpoint"
"""Key in a file's header under which everything but tensors lies."""
VERSION = 1
"""Version of the format that is written. A reader refuses newer ones, and says to update."""

PICKLED = b"PK\x03\x04"
"""Beginning of the checkpoints of earlier versions: archives of `torch.save`, read without running code."""
MARK = b"swd-sha256:"
"""Beginning of the comment of such an archive; 64 hexadecimal digits follow. Version 0.1.0 wrote none."""
COMMENT = len(MARK) + 64

NEEDED = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step", "pytorch-lightning_version")


class Resumable(Protocol):
    """A task that can tell whether it can be resumed from a checkpoint."""

    def misfit(self, checkpoint: Mapping[str, Any]) -> str | None:
        """Description of what a checkpoint lacks or has in another shape; None if it fits. Loads no weights."""


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's plugin for checkpoint files: every one that a run writes or reads has the format of this project.

    A file is written under a temporary name in its own folder, and renamed once it is complete on the disk.

    Args:
        device: where optimizers keep their states. On the CPU they keep the very tensors that are read, which therefore
            get memory of their own: mapped ones are lost with the disk that the file lies on.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._mapped = torch.device(device).type != "cpu"
        self._failures: list[str] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`, with the hash of its bytes.

        Raises:
            UserError: if it cannot be written; inside `failures` the message is collected instead.
        """
        path = Path(path)
        try:
            write_aside(path, lambda new: write_sealed(new, checkpoint, KIND, VERSION))
        except (OSError, SafetensorError, TypeError) as error:
            reason = getattr(failed_operation(error) or error, "strerror", None) or error
            message = (
                f"checkpoint {path} cannot be written ({reason}); nothing of it is left, and earlier "
                "checkpoints are whole: make room and go on with resume=auto"
            )
            if isinstance(error, TypeError):
                message = f"checkpoint {path} cannot be written: the state {error}"
            if self._failures is None:
                raise UserError(message) from None
            self._failures.append(message)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint of this version or an earlier one; see `read`."""
        return read_checkpoint(Path(path), "mapped" if self._mapped else "own")

    @contextmanager
    def failures(self) -> Iterator[list[str]]:
        """Collect messages of failed writes instead of raising, for a caller that must inform other processes first."""
        found: list[str] = []
        self._failures = found
        try:
            yield found
        finally:
            self._failures = None


def read_checkpoint(path: Path, tensors: Memory = "mapped") -> dict[str, Any]:
    """The content of a checkpoint, its bytes checked; nothing in it runs.

    Args:
        path: the file.
        tensors: in which memory they are, see `swd.io.sealed.read_unchecked`; those of earlier versions have their own.

    Raises:
        UserError: if it is damaged, or of a newer version.
    """
    try:
        return _read(path, tensors)
    except (Damaged, OSError) as error:
        reason = error if isinstance(error, Damaged) else error.strerror
        raise UserError(f"checkpoint {path} is damaged ({reason}); give another one") from None


def _read(path: Path, tensors: Memory = "mapped") -> dict[str, Any]:
    """`read`, with Damaged or OSError for a file that is not as it was written."""
    if is_pickled(path):
        check_archive(path)
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # reading an archive that is no checkpoint raises errors of many types
            raise Damaged(f"it cannot be read: {type(error).__name__}") from None
    else:
        check_seal(path)
        check_version(path)
        content = read_unchecked(path, KIND, tensors)
    if not isinstance(content, dict):
        raise Damaged("it holds no state of a run")
    return content


def is_pickled(path: Path) -> bool:
    """Whether a file has the format of an earlier version."""
    with open(path, "rb") as stream:
        return stream.read(len(PICKLED)) == PICKLED


def check_version(path: Path) -> None:
    """Raise Damaged for a file that is no checkpoint, UserError for one whose format is newer than this program."""
    version = read_version(path, KIND)
    if version is None:
        raise Damaged("it is no checkpoint of swd")
    if version > VERSION:
        raise UserError(
            f"checkpoint {path} has format {version}, and this version of swd reads up to {VERSION}; update swd"
        )


def check_archive(path: Path) -> None:
    """Raise Damaged if a checkpoint of an earlier version is not as it was written.

    A file of version 0.1.0 has no hash; the checksums inside the zip archive, which cover its contents, are used there.
    """
    size = path.stat().st_size
    with open(path, "rb") as stream:
        stream.seek(max(size - COMMENT, 0))
        comment = stream.read()
        if comment.startswith(MARK):
            stream.seek(0)
            if joint_hash(blocks(stream, size - COMMENT)).encode() != comment[len(MARK) :]:
                raise Damaged("its hash differs")
            return
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
            if wrong is not None or archive.comment:
                raise Damaged(f"{wrong or 'its end'} has changed")
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError):
        raise Damaged("it is cut off or no checkpoint") from None


def damage(path: Path, task: Resumable | None = None) -> str | None:
    """Reason why a checkpoint cannot be resumed from; None if it can.

    Args:
        path: the file.
        task: the task to resume; None: check the file alone.

    Raises:
        UserError: if a newer version has written it.
    """
    try:
        _checked(path, task)
    except Damaged as error:
        return str(error)
    return None


def read_resumable(path: Path) -> dict[str, Any]:
    """The content of a checkpoint that a run can be resumed from, or its student taken.

    Raises:
        UserError: if it is damaged, or of a newer version.
    """
    try:
        return _checked(path, None)
    except Damaged as error:
        raise UserError(f"checkpoint {path} is damaged ({error}); give another one") from None


def _checked(path: Path, task: Resumable | None) -> dict[str, Any]:
    """The content of a whole checkpoint.

    Raises:
        Damaged: if a run cannot be resumed from it.
        UserError: if a newer version has written it.
    """
    try:
        checkpoint = _read(path)
        wrong = _content_damage(checkpoint) or (task.misfit(checkpoint) if task is not None else None)
    except (UserError, Damaged):
        raise
    except Exception as error:  # a file that cannot be read, or whose content is none, raises errors of many types
        raise Damaged(f"it cannot be read: {type(error).__name__}") from None
    if wrong:
        raise Damaged(wrong)
    return checkpoint


def _content_damage(checkpoint: Mapping[str, Any]) -> str | None:
    """Reason why no task can be resumed from the content of a checkpoint; None if one may."""
    missing = [key for key in NEEDED if key not in checkpoint]
    if missing:
        return f"it has no {missing[0]}"
    if not all_finite(tensors([checkpoint["state_dict"], checkpoint["optimizer_states"]])):
        return "it holds values that are not finite"
    return None


def iterations(path: str | Path) -> int:
    """Number of iterations that were done when a checkpoint was written, which `damage` has found whole."""
    path = Path(path)
    if is_pickled(path):
        return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"])
    return int(read_unchecked(path, KIND, "none")["global_step"])


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
