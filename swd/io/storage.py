"""Files of the local file system, or of any storage that fsspec knows by its URL."""

from __future__ import annotations

import fsspec


def is_url(path: str) -> bool:
    """Whether a path is a URL for fsspec, not a path of the file system."""
    return "://" in path


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type if it has none."""
    return (str(error).splitlines() or [""])[0][:120] or type(error).__name__


def fetch(where: str) -> bytes:
    """The bytes of a file, or of any URL that fsspec knows.

    Raises:
        OSError: for all errors of the storage, and if the package for it is not installed.
        ValueError: if the URL is of no known kind.
    """
    try:
        with fsspec.open(where, "rb") as stream:
            return bytes(stream.read())
    except (OSError, ValueError):
        raise
    except Exception as error:  # storages raise errors of many types, such as aiohttp's
        raise OSError(first_line(error)) from None
