"""Commands that do not train end at a signal in one line, keep what is finished, and go on from it."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from shards import make_pictures

from swd.commands import cli
from swd.data import job


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any) -> Any:
    """Runs a command in this process; returns its exit status and its lines on standard error."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: str) -> tuple[int, list[str]]:
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = None
        monkeypatch.delenv("SWD_COMMAND", raising=False)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        capfd.readouterr()
        code: Any = 0
        try:
            cli.launch(name)
        except SystemExit as stop:
            code = stop.code
        finally:
            HydraConfig.instance().cfg = None
        return code, capfd.readouterr().err.splitlines()

    return run


def test_a_signal_ends_a_job_in_one_line_and_the_same_command_goes_on(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pictures(tmp_path / "pictures", 3, [(64, 64)])
    arguments = ("source=pictures", "out=shards", "shard_size=1")
    write = job.write_shard

    def stopped(folder: Path, shard: int, samples: Any) -> None:
        if shard == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        write(folder, shard, samples)

    monkeypatch.setattr(job, "write_shard", stopped)
    code, told = command("import", *arguments)
    assert code == 143
    assert told[-1] == "stopped by SIGTERM; what was finished is kept, and the same command goes on from it"
    assert not any("Traceback" in line for line in told)
    assert sorted(file.name for file in (tmp_path / "shards").glob("*.tar")) == ["00000.tar"]
    assert not list((tmp_path / "shards").glob(".running*"))
    kept = (tmp_path / "shards" / "00000.tar").stat().st_mtime_ns
    monkeypatch.setattr(job, "write_shard", write)
    assert command("import", *arguments)[0] == 0
    assert len(list((tmp_path / "shards").glob("*.tar"))) == 3
    assert (tmp_path / "shards" / "00000.tar").stat().st_mtime_ns == kept


REQUIRED = {
    "generate": ["prompts=prompts.csv", "out=pictures"],
    "encode": ["model=shapes", "data=shapes", "out=cache"],
    "evaluate": ["models=[teacher]", "metrics=[shapes_accuracy]", "model=shapes", "prompts=prompts.csv"],
    "export": ["run=run", "to=folder"],
}
"""Arguments without which a command does not begin."""


@pytest.mark.parametrize("name", ["generate", "encode", "import", "evaluate", "sample", "export", "report"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_every_command_ends_at_a_signal_in_one_line(
    command: Any, monkeypatch: pytest.MonkeyPatch, name: str, number: signal.Signals, code: int
) -> None:
    def run(cfg: object) -> None:
        os.kill(os.getpid(), number)

    monkeypatch.setattr(importlib.import_module(cli.COMMANDS[name][0]), "run", run)
    before = signal.getsignal(number)
    status, told = command(name, *REQUIRED.get(name, []))
    assert status == code and len(told) == 1 and told[0].startswith("stopped"), told
    assert signal.getsignal(number) == before
