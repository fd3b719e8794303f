"""Trainings as a launcher starts them, at the price of one import: a program that forks for every process.

Run as a program, it reads a file of launches, and starts their processes one launch after another.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT = 240.0
"""Seconds within which every launch must have ended; a launch takes a few on an idle machine."""


@dataclass(frozen=True)
class Launch:
    """A training on several processes.

    Attributes:
        name: of the folder that it runs in.
        arguments: of the command line.
        environments: variables of each process, beside MASTER_ADDR and MASTER_PORT.
        broken: a text that each process runs first, for example one that breaks something.
    """

    name: str
    arguments: Sequence[str]
    environments: Sequence[Mapping[str, str]]
    broken: str = ""


@dataclass(frozen=True)
class Outcome:
    """How the processes of a launch ended.

    Attributes:
        folder: that they ran in.
        codes: exit statuses, by rank.
        errors: standard errors, by rank.
    """

    folder: Path
    codes: list[int] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def lines(self) -> list[str]:
        """Lines of all processes that report an error."""
        return [line for text in self.errors for line in text.splitlines() if line.startswith("error: ")]

    @property
    def noise(self) -> list[str]:
        """Lines of tracebacks, of Python and of C++."""
        return [line for text in self.errors for line in text.splitlines() if "frame #" in line or "  File " in line]


def srun(tasks: int) -> list[dict[str, str]]:
    """Variables of the tasks of one step of srun on one node."""
    step = {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_NTASKS": str(tasks), "SLURM_NNODES": "1"}
    return [step | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(tasks)]


def torchrun(processes: int) -> list[dict[str, str]]:
    """Variables of the processes of torchrun on one machine."""
    world = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return [world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def start(launches: Sequence[Launch], folder: Path) -> dict[str, Outcome]:
    """Start launches, one after another, and say how each ended."""
    file = folder / "launches.json"
    file.write_text(json.dumps([asdict(launch) for launch in launches]))
    environment = {key: value for key, value in os.environ.items() if key != "SWD_COMMAND"} | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    subprocess.run([sys.executable, __file__, str(file)], env=environment, check=True, timeout=LIMIT * len(launches))
    outcomes = {}
    for launch in launches:
        own = folder / launch.name
        errors = [(own / f"{rank}.err").read_text() for rank in range(len(launch.environments))]
        outcomes[launch.name] = Outcome(own, json.loads((own / "codes.json").read_text()), errors)
    return outcomes


def _run(launch: Launch, folder: Path) -> None:
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    left = {}
    for rank, environment in enumerate(launch.environments):
        child = os.fork()
        if not child:
            _process(launch, rank, {**meeting, **environment}, folder)
        left[rank] = child
    codes = [999] * len(left)
    until = time.monotonic() + LIMIT
    while left:
        for rank, child in list(left.items()):
            if time.monotonic() > until:
                os.kill(child, signal.SIGKILL)
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[rank] = os.waitstatus_to_exitcode(status)
                del left[rank]
        time.sleep(0.05)
    (folder / "codes.json").write_text(json.dumps(codes))


def _process(launch: Launch, rank: int, environment: Mapping[str, str], folder: Path) -> None:
    code = 1
    try:
        os.chdir(folder)
        for handle, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{rank}.{name}", os.O_CREAT | os.O_WRONLY), handle)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        os.environ.update(environment)
        sys.argv = [str(ROOT / "train.py"), *launch.arguments]
        exec(launch.broken, {})
        from swd.commands.cli import launch as command

        command("train")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    import hydra  # noqa: F401

    import swd.commands.train  # noqa: F401

    file = Path(sys.argv[1])
    for values in json.loads(file.read_text()):
        _run(Launch(**values), file.parent / values["name"])
