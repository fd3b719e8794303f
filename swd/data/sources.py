"""Lists captioned pictures in lists, folders, and shards of other programs, for `swd import` and `data=images`.

Listing reads lists, names and the headers of shards, never a picture. A source from somebody else could name any file
of this machine; by default, files outside of the source's folder are left out.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Collection, Mapping
from pathlib import Path

from swd.data.picture_list import ENDINGS, Part, PictureList, PictureRow, Problem, passed_over, printable
from swd.data.source_lists import LIST, rows_of_list
from swd.data.source_shards import rows_of_shards, shard_files
from swd.io.job_log import JobLog
from swd.io.ranks import is_first
from swd.types import UserError

LISTS = (".csv", ".tsv", ".jsonl", ".ndjson")
"""Endings of lists."""
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".zip", ".7z", ".rar", ".parquet")
"""Endings of archives from which single files cannot be read."""
GIVE = "give a folder, a .csv or .jsonl list, or .tar shards"
"""End of messages about a source that cannot be read."""


def list_source(source: str, outside: bool = False, skip: Path | None = None) -> PictureList:
    """The rows of a source.

    Args:
        source: a folder, a list, or shards.
        outside: also take files that lie outside of the source's folder.
        skip: a folder to leave out, such as the output folder.

    Raises:
        UserError: if the source is missing, of unknown kind or damaged, or has no captioned picture.
    """
    # Find out its kind, and list it.
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):
        found = _folder(path, outside, skip)
    elif os.path.isfile(path):
        found = _file(path, source, outside)
    elif any(mark in source for mark in "{*?["):
        found = rows_of_shards([(str(file), file.name) for file in shard_files(str(path))], PictureList(), outside)
    else:
        fault = "is a pipe or a device" if os.path.exists(path) else "does not exist"
        raise UserError(f"source={source} {fault}; {GIVE}")

    # It must hold a picture.
    if not any(isinstance(row, PictureRow) for row in found.rows):
        first = f"; first of {len(found.rows)} problems: {_in_words(found.rows[0])}" if found.rows else ""
        passed = ", ".join(f"{count:,} {kind}" for kind, count in found.ignored.most_common(5))
        more = f"; passed over: {passed}" if passed else ""
        raise UserError(f"source={source} lists no captioned picture{first}{more}{_hint_at_list(path)}")
    return found


def _file(path: Path, source: str, outside: bool) -> PictureList:
    """The rows of a source that is a file."""
    name = path.name.lower()
    packed = next((ending for ending in PACKED if name.endswith(ending)), None)
    if path.suffix.lower() in LISTS:
        return rows_of_list(path, outside)
    if path.suffix.lower() == ".tar":
        return rows_of_shards([(str(path), path.name)], PictureList(), outside)
    if packed:
        raise UserError(f"source={source} is of no known kind: compressed, so samples cannot be found; unpack it first")
    raise UserError(f"source={source} is of no known kind; {GIVE}")


def _in_words(row: PictureRow | Problem) -> str:
    return f"{row.file}: {row.kind} ({row.reason})" if isinstance(row, Problem) else row.file


def list_in(folder: Path) -> Path | None:
    """A list in a folder that is read only if the user names it, such as the `metadata.jsonl` of Hugging Face."""
    try:
        found = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in LISTS)
    except OSError:  # also if it is no folder
        return None
    return next((folder / name for name in found if name != LIST and not passed_over(name)), None)


def _hint_at_list(folder: Path) -> str:
    file = list_in(folder)
    return f"; if {file.name} there is their list, give source={file}" if file else ""


def _folder(folder: Path, outside: bool, skip: Path | None) -> PictureList:
    """The rows of a source that is a folder: its list, else its pictures, else its shards."""
    # Pictures, with their captions.
    if os.path.isfile(folder / LIST):
        return rows_of_list(folder / LIST, outside)
    found = PictureList(None if outside else os.path.realpath(folder))
    names = _walk(folder, found, skip)
    problems = list(found.rows)
    tars = [name for name in names if name.lower().endswith(".tar")]
    _pair(folder, names, ENDINGS, found)
    _count_others(names, found)

    # Shards count only where there are no pictures.
    if tars and not any(isinstance(row, PictureRow) for row in found.rows):
        shards = PictureList(found.root, rows=problems, ignored=found.ignored)
        for name in names:
            ending = posixpath.splitext(name)[1].lower()
            if ending[1:] in ENDINGS:
                shards.ignored[f"{ending} (without a caption, beside shards)"] += 1
        return rows_of_shards([(os.path.join(folder, name), printable(name)) for name in tars], shards, outside)
    if tars:
        found.ignored[".tar (beside pictures; import them by source=FOLDER/*.tar)"] += len(tars)

    # It must hold something.
    if not found.rows:
        packs = ", ".join(f"{count} {kind}" for kind, count in found.ignored.most_common(5))
        raise UserError(
            f"source={folder} holds no {LIST}, no pictures ({', '.join('.' + e for e in ENDINGS)}) and no .tar"
            f"{f'; it holds {packs}' if packs else ''}{_hint_at_list(folder)}"
        )
    return found


def _count_others(names: Collection[str], found: PictureList) -> None:
    """Count the files of a folder that are neither pictures nor shards, nor the text file of a picture."""
    stems = {stem for stem, ending in map(posixpath.splitext, names) if ending.lower()[1:] in ENDINGS}
    for name in names:
        stem, ending = posixpath.splitext(name)
        packed = next((packed for packed in PACKED if name.lower().endswith(packed)), None)
        ending = printable(ending.lower())
        if packed:
            found.ignored[f"{packed} (unpack them first)"] += 1
        elif ending == ".txt" and stem not in stems:
            found.ignored[".txt (without a picture)"] += 1
        elif ending[1:] not in ENDINGS and ending not in (".txt", ".tar"):
            found.ignored[ending or "without an ending"] += 1


def list_folder(folder: Path, endings: Collection[str], outside: bool = False) -> PictureList:
    """Captioned files of a folder: those in its `metainfo.csv`, else files at any depth with a `.txt` of the same name.

    Args:
        folder: the folder.
        endings: endings of the files to list, in lower case without the dot.
        outside: also take files that lie outside of the folder.

    Raises:
        UserError: if the list cannot be read.
    """
    key = "data.dataset.outside"
    if os.path.isfile(folder / LIST):
        return rows_of_list(folder / LIST, outside, key)
    found = PictureList(None if outside else os.path.realpath(folder), key)
    _pair(folder, _walk(folder, found), endings, found)
    return found


def _walk(folder: Path, found: PictureList, skip: Path | None = None) -> dict[str, str]:
    """All entries below a folder that are no folders: names relative to it, sorted, each with the result of `_kind`.

    Hidden and system files are passed over. Folders that cannot be read, and links to folders outside, are added to
    `found` as problems.
    """
    names: dict[str, str] = {}
    entered = {os.path.realpath(folder)} | ({os.path.realpath(skip)} if skip else set())
    left = [""]
    with JobLog(f"list the files below {folder}", 1, "folder", shown=is_first()) as progress:
        while left:
            below = left.pop()
            for name, path, kind, is_link in _entries(folder, below, found):
                if kind is not None:
                    names[below + name] = kind
                elif is_link and found.outside(path):
                    reason = f"a link to a folder outside of {found.root}; {found.key}=true takes it"
                    found.rows.append(Problem("outside", f"{below}{name}/", reason))
                elif not is_link or found.root is None:  # links inside lead to folders that are listed anyway
                    real = os.path.realpath(path)
                    if real not in entered:
                        entered.add(real)
                        left.append(f"{below}{name}/")
                        progress.total += 1
            progress.advance()
    found.rows.sort(key=lambda row: row.file)
    return dict(sorted(names.items()))


def _entries(folder: Path, below: str, found: PictureList) -> list[tuple[str, str, str | None, bool]]:
    """Entries of a folder, links last: name, path, the result of `_kind`, and whether it is a link."""
    try:
        with os.scandir(os.path.join(folder, below)) as entries:
            wanted = [entry for entry in entries if not passed_over(entry.name)]
    except OSError as error:
        found.rows.append(Problem("unreadable", below or str(folder), error.strerror or str(error)))
        return []
    listed = [(entry.name, entry.path, _kind(entry), entry.is_symlink()) for entry in wanted]
    return sorted(listed, key=lambda entry: (entry[3], entry[0]))


def _kind(entry: os.DirEntry[str]) -> str | None:
    """Reason why an entry of a folder is no readable file; empty if it is one, None for a folder."""
    try:
        if entry.is_dir():
            return None
        if entry.is_file():
            return ""
        return "a link to nothing" if entry.is_symlink() else "a pipe, a socket or a device, no file"
    except OSError as error:
        return error.strerror or str(error)


def _pair(folder: Path, names: Mapping[str, str], endings: Collection[str], found: PictureList) -> None:
    """Add files with their captions, the text files of the same name; a second file of one name is a duplicate."""
    texts: dict[str, str] = {}
    split = [(name, *posixpath.splitext(name)) for name in names]
    # If there are a.TXT and a.txt, a.TXT counts: it is set last.
    for name, stem, ending in sorted(split, key=lambda s: s[2], reverse=True):
        if ending.lower() == ".txt":
            texts[stem] = os.path.join(folder, name)
    for name, stem, ending in split:
        if ending.lower()[1:] not in endings:
            continue
        shown = printable(name)
        if names[name]:
            found.rows.append(Problem("unreadable", shown, names[name]))
        else:
            caption = Part(texts[stem]) if stem in texts else None
            found.add(PictureRow(shown, None, Part(os.path.join(folder, name)), caption), stem, f"{shown} and its .txt")
