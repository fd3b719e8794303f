"""The manifest of a folder of shards: kind, settings, number of samples, hashes of every shard and its index.

Shards may come from somebody else, so everything is checked, and no file outside of their folder is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from swd.io.storage import fetch, first_line, is_url
from swd.types import UserError

MANIFEST = "manifest.json"
FORMAT = 2
"""Version that is written."""
FORMATS = (1, 2)
"""Versions that can be read; the first has no hashes of the indices."""
KINDS = ("pictures", "videos", "cache")
"""Possible contents of shards."""


def read_manifest(root: str) -> dict[str, Any]:
    """The manifest of a folder of shards.

    Args:
        root: a folder, or any URL that fsspec knows.

    Raises:
        UserError: if it is missing, damaged or of another version.
    """
    # Read the file.
    where = f"{root.rstrip('/')}/{MANIFEST}"
    check_inside(root, [MANIFEST])
    try:
        manifest = json.loads(fetch(where))
    except FileNotFoundError:
        raise UserError(
            f"{root} holds no {MANIFEST}; make shards with swd generate, swd import or swd encode, or check the path"
        ) from None
    except (ValueError, RecursionError) as error:
        if "Protocol not known" in str(error):
            raise UserError(f"{root}: {error}; give a folder or a URL that fsspec knows") from None
        raise UserError(f"{where} is damaged ({str(error)[:80]}); make it again") from None
    except OSError as error:
        raise UserError(f"{where} cannot be read ({first_line(error)})") from None

    # Check its content.
    if not isinstance(manifest, dict) or not isinstance(manifest.get("shards"), list):
        raise UserError(f"{where} is no manifest of shards; make it again")
    if manifest.get("format") not in FORMATS or manifest["format"] is True:
        raise UserError(f"{where} has format {manifest.get('format')}, this version reads 1 and 2; make it again")
    if not manifest["shards"] or not manifest.get("samples", 1):
        raise UserError(f"{root} holds no samples")
    _check_manifest(manifest, where)
    return manifest


def _check_manifest(manifest: Mapping[str, Any], where: str) -> None:
    """Raise UserError for a manifest whose entries are missing, of other types, or contradict each other."""

    def expect(holds: object, fault: str) -> None:
        if not holds:
            raise UserError(f"{where} is damaged: {fault}; make the shards again")

    # Each entry of the list of shards.
    kind = manifest.get("kind")
    expect(kind in KINDS, f"kind is {kind!r}, known are {', '.join(KINDS)}")
    files = set()
    for number, entry in enumerate(manifest["shards"]):
        expect(isinstance(entry, dict), f"shard {number} of its list is no entry")
        file = entry.get("file")
        expect(isinstance(file, str), f"shard {number} of its list names no file")
        if not re.fullmatch(r"[\w-][\w.-]*\.tar", file):
            raise UserError(
                f"{where} lists the shard {file!r}, but shards lie in the folder of their manifest under names that "
                "end in .tar; do not use these data if somebody else made them"
            )
        expect(file not in files, f"it lists {file} twice")
        files.add(file)
        for key in ("samples", "bytes"):
            expect(is_count(entry.get(key)), f"{key} of {file} is {entry.get(key)!r}")
        for key in ("sha256", "index_sha256") if manifest["format"] > 1 else ("sha256",):
            text = isinstance(entry.get(key), str) and re.fullmatch("[0-9a-f]{64}", entry[key])
            expect(text, f"{key} of {file} is {entry.get(key)!r}")
    # Totals and the hash of the whole.
    for key in ("samples", "bytes"):
        total = sum(entry[key] for entry in manifest["shards"])
        expect(manifest.get(key) == total, f"{key} is {manifest.get(key)!r}, its shards have {total}")
    if "sha256" in manifest:
        same = manifest["sha256"] == manifest_hash(manifest)
        expect(same, "its hash is not the one stored in it (if you changed it on purpose, remove its last entry)")


def is_count(value: object) -> bool:
    """Whether a value is a whole number that an index can hold, 0 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def manifest_hash(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest without its own hash; it does not depend on the layout of the JSON text."""
    rest = json.loads(json.dumps({key: value for key, value in manifest.items() if key != "sha256"}))
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def check_inside(root: str, names: Sequence[str]) -> None:
    """Raise UserError for files of a local folder that are links out of the folder, or no plain files."""
    folder = re.sub("^(file|local)://", "", root)
    if is_url(folder):
        return
    base = os.path.realpath(folder)
    for name in names:
        real = os.path.realpath(os.path.join(folder, name))
        if os.path.commonpath([base, real]) != base:
            raise UserError(
                f"{root.rstrip('/')}/{name} is a link out of its folder, to {real}; put the file itself there"
            )
        if os.path.exists(real) and not os.path.isfile(real):  # reading a named pipe would never end
            raise UserError(f"{root.rstrip('/')}/{name} is no plain file; make the shards again")
