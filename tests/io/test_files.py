"""Files are whole or absent, and nobody's files are replaced silently."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from swd.io import files
from swd.io.files import blocks, claim_folder, file_hash, in_use, joint_hash, write_aside, write_json, write_text
from swd.types import UserError


def test_a_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    write_json(path, {"x": 1})
    write_json(path, {"x": "ä"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"x": "ä"}
    assert os.listdir(path.parent) == ["a.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.txt", "old")

    def fail(new: Path) -> None:
        new.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_aside(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_killed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.txt", "old")
    program = (
        "import os, sys; from pathlib import Path; from swd.io.files import write_aside\n"
        "write_aside(Path(sys.argv[1]), lambda new: (new.write_text('half'), os._exit(9)))"
    )
    result = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert result.returncode == 9 and path.read_text() == "old"


def fill(new: Path, text: str) -> None:
    new.mkdir()
    (new / "part").write_text(text)


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    write_aside(path, lambda new: fill(new, "one"))
    (path / "stale").write_text("from before")
    write_aside(path, lambda new: fill(new, "two"))
    assert os.listdir(path) == ["part"] and (path / "part").read_text() == "two"
    assert os.listdir(tmp_path) == ["adapter"]


def test_a_folder_that_cannot_be_replaced_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "adapter"
    write_aside(path, lambda new: fill(new, "one"))

    def refuse(source: object, target: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no"):
        write_aside(path, lambda new: fill(new, "two"))
    assert (path / "part").read_text() == "one"


def test_a_new_folder_is_claimed_and_a_used_one_refused(tmp_path: Path) -> None:
    folder = claim_folder(tmp_path / "a" / "b")
    assert folder.is_dir()
    write_text(folder / "config.yaml", "x: 1")
    with pytest.raises(UserError, match="already holds a run"):
        claim_folder(folder)


def test_a_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written") as caught:
        claim_folder(tmp_path / "file" / "run")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written"):
        claim_folder(tmp_path / "run")


def test_of_two_runs_that_start_at_once_one_is_refused(tmp_path: Path) -> None:
    claim_folder(tmp_path / "run", reserve=True)
    with pytest.raises(UserError, match="already holds a run"):
        claim_folder(tmp_path / "run", reserve=True)
    with pytest.raises(UserError, match="already holds a run"):
        claim_folder(tmp_path / "run")


def test_a_hash_in_parts_is_the_hash_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(range(256)) * 5
    path = tmp_path / "data"
    path.write_bytes(data)
    whole = hashlib.sha256(data).hexdigest()
    assert file_hash(path) == whole == joint_hash([data[:7], b"", data[7:]])
    monkeypatch.setattr(files, "BLOCK", 100)
    for length in (0, 1, 99, 100, 101, 1279, 1280, 5000):  # the file has 1,280 bytes
        with open(path, "rb") as stream:
            parts = list(blocks(stream, length))
        assert joint_hash(parts) == hashlib.sha256(data[:length]).hexdigest()
        assert all(0 < len(part) <= 100 for part in parts)


def test_a_folder_in_use_is_locked_until_the_end(tmp_path: Path) -> None:
    with in_use(tmp_path) as free, in_use(tmp_path) as second:
        assert free and not second
    with in_use(tmp_path) as again:
        assert again
