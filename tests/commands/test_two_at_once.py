"""Two programs in one place: the second ends in one line, and the first one's files stay as they are."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from tiny import composed, overrides

from swd.commands.train import fit
from swd.data.job import Job
from swd.io.folder_lock import Holder, _birth, held
from swd.types import UserError


def train(model: Path, folder: Path, **more: Any) -> Any:
    return fit(composed(overrides(model, folder, loss="mmd", trainer__max_steps=1, **more)))


def test_nothing_resumes_from_a_run_that_lives(tiny_model: Path, tmp_path: Path) -> None:
    train(tiny_model, tmp_path / "run")
    with held(tmp_path / "run", ""):
        for resume in ("auto", tmp_path / "run", tmp_path / "run" / "checkpoints" / "iteration-1.ckpt"):
            with pytest.raises(UserError, match=r"is being worked in by process \d+ on .* since .*resume=null") as e:
                train(tiny_model, tmp_path / "second", resume=resume)
            assert "\n" not in str(e.value) and not (tmp_path / "second").exists()
        with pytest.warns(UserWarning, match="no run has this configuration"):
            train(tiny_model, tmp_path / "third", resume="auto", seed=1)
    train(tiny_model, tmp_path / "second", resume="auto")  # once it has ended


def job(folder: Path) -> Job:
    folder.mkdir(exist_ok=True)
    return Job(folder, "pictures", 4, 2, {})


def samples(rows: range, advance: Any) -> Any:
    for row in rows:
        yield f"{row:08d}", {"txt": b"x"}, {}
        advance(1)


def test_a_share_of_a_job_is_made_by_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = "start all processes that are to share the work together"
    lock = tmp_path / ".running-0-of-2.json"
    parent = os.getppid()
    lock.write_text(json.dumps(asdict(replace(Holder.here(), pid=parent, birth=_birth(parent)))))
    for rank, world in ((0, 2), (0, 1), (2, 4)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        with pytest.raises(UserError, match=rf"{re.escape(str(tmp_path))} is being worked in by .*{together}"):
            job(tmp_path).run(samples)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert job(tmp_path).run(samples) is None
    assert sorted(p.name for p in tmp_path.glob("0*")) == ["00001.idx", "00001.tar"]
    lock.unlink()
    monkeypatch.delenv("RANK")
    manifest = job(tmp_path).run(samples)
    assert manifest is not None and manifest["samples"] == 4
    assert not list(tmp_path.glob(".running*"))
