"""Trainings on two processes of torchrun and srun: one run, one line where something is wrong, one exit status."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launches import Launch, Outcome, srun, start
from processes import ROOT, torchrun
from tiny import assert_same_weights, overrides

OPTIONS: dict[str, Any] = {"loss": "dmd", "task__lr": 1e-4, "task__critic_updates": 1}
BAD_BATCH = """
import swd.data.datamodule, swd.types
from swd.data.iterations import Iterations
import os
given = Iterations.__iter__
def broken(self):
    for number, batches in enumerate(given(self)):
        if number == 1 and os.environ["RANK_HERE"] == "1":
            raise swd.types.UserError("b.png is damaged; remove it")
        yield batches
Iterations.__iter__ = broken
"""
BROKEN_STEP = """
import os, signal, time
from swd.modules.distiller import Distiller

given = Distiller.training_step
def broken(self, *arguments):
    if self.trainer.global_step == 1 and os.environ["RANK_HERE"] == "1":
        {what}
    return given(self, *arguments)
Distiller.training_step = broken
"""


def arguments(model: Path, *more: str, **options: Any) -> list[str]:
    """A command line without `folder=`, so that each process makes a name of its own."""
    given = overrides(model, Path("unused"), **OPTIONS, **options)
    return ["output=outputs", *(argument for argument in given if not argument.startswith("folder=")), *more]


def numbered(environments: list[dict[str, str]]) -> list[dict[str, str]]:
    return [environment | {"RANK_HERE": str(rank)} for rank, environment in enumerate(environments)]


def broken(name: str, model: Path, what: str, *more: str) -> Launch:
    """A training whose second process does `what` in its second iteration."""
    return Launch(name, arguments(model, *more), numbered(torchrun(2)), BROKEN_STEP.format(what=what))


@pytest.fixture(scope="module")
def launched(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    given = arguments(tiny_model)
    launches = [
        Launch("one", given, [{}]),
        Launch("srun", given, numbered(srun(2))),
        Launch("bad_batch", given, numbered(srun(2)), BAD_BATCH),
        Launch("too_many", arguments(tiny_model, trainer__devices=3), torchrun(2)),
        Launch("no_number", given, [{"RANK": "x", "WORLD_SIZE": "2"}]),
    ]
    return start(launches, tmp_path_factory.mktemp("launched"))


def test_two_tasks_of_srun_train_one_run_together(launched: dict[str, Outcome]) -> None:
    outcome = launched["srun"]
    assert outcome.codes == [0, 0], outcome.errors
    runs = list((outcome.folder / "outputs" / "tiny").iterdir())
    assert len(runs) == 1 and {file.name for file in runs[0].iterdir()} >= {"run.json", "config.yaml", "metrics.csv"}
    assert_same_weights(outcome.folder, launched["one"].folder)


def test_an_error_of_one_process_in_training_ends_all_with_its_line(launched: dict[str, Outcome]) -> None:
    outcome = launched["bad_batch"]
    assert outcome.codes == [2, 2], outcome.errors
    assert outcome.lines == ["error: b.png is damaged; remove it"] and outcome.noise == []
    assert outcome.lines[0] in outcome.errors[0]


def test_numbers_that_contradict_the_launcher_are_one_line_and_leave_no_run(launched: dict[str, Outcome]) -> None:
    outcome = launched["too_many"]
    assert outcome.codes == [2, 2] and len(outcome.lines) == 1
    assert outcome.lines[0].startswith(
        "error: trainer.devices=3 on 1 node, but torchrun started 2 processes, 2 on each of 1 node; leave out"
    )
    assert not list(outcome.folder.glob("outputs/tiny/*"))
    assert launched["no_number"].codes == [2]
    assert launched["no_number"].errors[0].count("\n") == 1 and "RANK=x" in launched["no_number"].errors[0]


@pytest.fixture(scope="module")
def failed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    launches = [
        broken("killed", tiny_model, "os.kill(os.getpid(), signal.SIGKILL)"),
        broken("raises", tiny_model, "raise ValueError('odd')"),
        broken("stalls", tiny_model, "time.sleep(600)", "trainer.timeout=20"),
    ]
    return start(launches, tmp_path_factory.mktemp("failed"))


@pytest.mark.slow
def test_a_process_that_dies_raises_or_stalls_ends_all_with_the_cause(failed: dict[str, Outcome]) -> None:
    killed, raises, stalls = failed["killed"], failed["raises"], failed["stalls"]
    assert killed.codes == [1, -9] and raises.codes == [1, 1] and stalls.codes == [1, 1], failed
    assert [len(outcome.lines) for outcome in (killed, raises, stalls)] == [1, 1, 1], failed
    assert killed.lines[0].startswith("error: process 1 of 2 ended without a word (killed")
    assert raises.lines[0].startswith("error: process 1 of 2 failed: ValueError: odd (<string>, line ")
    assert re.search(
        r"stalled for 20 s \(trainer\.timeout\): process 1 is in broken .*the others wait", stalls.lines[0]
    )
    assert all(outcome.noise == [] for outcome in failed.values())
    (traceback,) = raises.folder.glob("outputs/tiny/*/traceback-1.txt")
    assert "ValueError: odd" in traceback.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "options"), [(1, []), (2, ["trainer=hsdp"])], ids=["ddp", "hsdp"])
def test_two_agents_of_torchrun_train_one_run(
    processes: int, options: list[str], tiny_model: Path, tmp_path: Path, launched: dict[str, Outcome]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if key != "SWD_COMMAND"} | {"OMP_NUM_THREADS": "1"}
    agents = []
    for node in range(2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={node}"]
        command += [f"--nproc-per-node={processes}", "--master-addr=127.0.0.1", f"--master-port={port}"]
        command += [str(ROOT / "train.py"), *arguments(tiny_model), *options]
        agents.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True))
    errors = [agent.communicate(timeout=600)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], errors
    assert len(list((tmp_path / "outputs" / "tiny").iterdir())) == 1
    assert_same_weights(tmp_path, launched["one"].folder)
