"""Pipelines from the Hugging Face hub: configuration first, weights when they are needed."""

from __future__ import annotations

import errno
import re
import socket
import ssl
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from swd.modules.model_folders import parts_of, read_json
from swd.types import UserError

CONFIGURATION = ("*.json", "*.txt", "*.model")
"""Configuration files and tokenizers of a pipeline."""
NEVER = (
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.msgpack",
    "*.onnx*",
    "*.h5",
    "*.py",
    "*.fp16*",
    "*.bf16*",
)
"""Formats that can run code or belong to other frameworks, and further copies of the weights."""
HTTP_LIBRARIES = ("httpx", "httpx2", "requests", "urllib3")
"""Libraries by which releases of huggingface_hub reach the hub; most of their errors are no OSError."""


def is_hub_id(path: str) -> bool:
    """Whether a path names a repository on the hub: `owner/name`, and no such folder here."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path)) and not Path(path).exists()


def configuration(repository: str, revision: str | None = None, key: str = "model.path") -> Path:
    """A folder with a repository's configuration files; `key` names the option in messages.

    Raises:
        UserError: if the repository is missing, gated or out of reach.
    """
    return _download(repository, revision, CONFIGURATION, key)


def weights(repository: str, revision: str | None = None) -> Path:
    """A folder with all of a pipeline: only the subfolders that its index names, safetensors only.

    Raises:
        UserError: if the repository is missing, gated or out of reach, or its index is damaged.
    """
    parts = parts_of(read_json(configuration(repository, revision) / "model_index.json"))
    folder = _download(repository, revision, [*CONFIGURATION, *(f"{part}/*.safetensors" for part in parts)])
    # Parts without plain weights are downloaded in their fp16 variant.
    bare = [p for p in parts if (folder / p / "config.json").is_file() and not any((folder / p).glob("*.safetensors"))]
    if bare:
        wanted = [f"{part}/*.fp16*.{ending}" for part in bare for ending in ("safetensors", "json")]
        folder = _download(repository, revision, wanted, never=[each for each in NEVER if each != "*.fp16*"])
    return folder


def adapter(repository: str, key: str = "adapter") -> Path:
    """A folder with a published adapter; `key` names the option in messages.

    Raises:
        UserError: if the repository is missing, gated or out of reach.
    """
    return _download(repository, None, ["*.json", "*.safetensors"], key)


def model(repository: str, revision: str | None = None, key: str = "path") -> Path:
    """A folder with one network: its configuration and safetensors weights; `key` is what the user calls it.

    Raises:
        UserError: if the repository is missing, gated or out of reach.
    """
    return _download(repository, revision, [*CONFIGURATION, "*.safetensors"], key)


def _download(
    repository: str,
    revision: str | None,
    patterns: Sequence[str],
    key: str = "model.path",
    never: Sequence[str] = NEVER,
) -> Path:
    """Download files of a repository, and turn the errors of the hub and of this machine into one line each."""
    where = f"{key}={repository}"
    try:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(never))
        )
    # The repository is refused, or not there.
    except GatedRepoError:
        raise UserError(
            f"{where} is gated: accept its licence at https://huggingface.co/{repository}, then run `hf auth login`; "
            f"or give {key}=FOLDER"
        ) from None
    except RevisionNotFoundError:
        raise UserError(
            f"{where} has no revision {revision!r}; leave {key.removesuffix('path')}revision out for the newest"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{where} is neither a folder here nor a repository on the hub that you can read; check its spelling, "
            f"`hf auth login` if it is private, or give {key}=FOLDER"
        ) from None
    except HFValidationError:
        raise UserError(f"{where} is no name that the hub allows; check its spelling, or give {key}=FOLDER") from None
    # This machine cannot store it, or cannot reach the hub.
    except Exception as error:
        if is_local(error):
            raise UserError(
                f"{where} cannot be stored: {file_error_text(error)}; free space, or set HF_HOME=FOLDER"
            ) from None
        if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] not in HTTP_LIBRARIES:
            raise
        raise UserError(
            f"{where} is not on this machine and the hub cannot be reached; download it where there is network "
            f"(`hf download {repository}`), or give {key}=FOLDER"
        ) from None


def is_local(error: Exception) -> bool:
    """Whether an error comes from this machine's files (a full disk, a forbidden folder), not from the network."""
    if not isinstance(error, OSError) or isinstance(
        error, ConnectionError | TimeoutError | socket.gaierror | ssl.SSLError
    ):
        return False
    # Errors that the hub itself reports have no error number.
    return error.errno is not None and error.errno not in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN)


def file_error_text(error: Exception) -> str:
    """Path and reason of a failed file operation, on one line."""
    assert isinstance(error, OSError)
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
