"""A folder in which a program works is refused to others, and free once that program is gone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from swd.io import folder_lock
from swd.io.folder_lock import LOCK, SILENT, Holder, held, holder_of, refuse_living
from swd.types import UserError

FIX = "give another folder="


def write(lock: Path, holder: Holder, age: float = 0) -> None:
    lock.write_text(json.dumps(asdict(holder)))
    os.utime(lock, (time.time() - age, time.time() - age))


def test_a_living_program_is_named_and_its_lock_goes_with_it(tmp_path: Path) -> None:
    with held(tmp_path, FIX):
        with pytest.raises(UserError) as error, held(tmp_path, FIX):
            pass
        holder = holder_of(tmp_path / LOCK)
        assert holder is not None and holder.pid == os.getpid()
        assert str(error.value) == (
            f"{tmp_path} is being worked in by process {os.getpid()} on {holder.host} since {holder.since}; wait for "
            f"it, stop it (kill {os.getpid()} there), or {FIX}"
        )
    assert os.listdir(tmp_path) == []


def test_the_lock_of_a_killed_program_is_taken_over_with_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = (
        "import os, sys; from pathlib import Path; from swd.io.folder_lock import held\n"
        "with held(Path(sys.argv[1]), ''): os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False).returncode == -9
    assert (tmp_path / LOCK).exists()
    with held(tmp_path, FIX):
        pass
    line = f"{tmp_path}: the program that worked here ended without taking back its lock; going on in its place\n"
    assert capsys.readouterr().err == line
    assert os.listdir(tmp_path) == []


def test_whose_process_and_heartbeat_count(tmp_path: Path) -> None:
    lock, here = tmp_path / LOCK, Holder.here()
    cases = (
        (here, 10 * SILENT, True),  # on this machine the process counts, whatever its heartbeat
        (replace(here, birth="1"), 0, False),  # its number was given to another process
        (replace(here, pid=2**22 + 1), 0, False),
        (replace(here, machine="far", pid=1), SILENT - 60, True),
        (replace(here, machine="far", pid=1), SILENT + 60, False),
    )
    for holder, age, lives in cases:
        write(lock, holder, age)
        assert (holder_of(lock) is not None) == lives, (holder, age)
    lock.write_text("{")
    assert holder_of(lock) is not None  # it is being written at this moment
    os.utime(lock, (0, 0))
    assert holder_of(lock) is None
    refuse_living(tmp_path, FIX)
    assert not lock.exists()


def test_a_heartbeat_keeps_a_lock_fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "BEAT", 0.01)
    with held(tmp_path, FIX):
        os.utime(tmp_path / LOCK, (0, 0))
        end = time.time() + 20
        while (tmp_path / LOCK).stat().st_mtime == 0 and time.time() < end:
            time.sleep(0.01)
        assert time.time() - (tmp_path / LOCK).stat().st_mtime < 60


def test_locks_of_other_names_count_where_they_are_named(tmp_path: Path) -> None:
    with held(tmp_path, FIX, name="a"), held(tmp_path, FIX, name="b"):
        with pytest.raises(UserError, match="is being worked in by"), held(tmp_path, FIX, name="c", others=["b"]):
            pass
        assert sorted(os.listdir(tmp_path)) == ["a", "b"]
