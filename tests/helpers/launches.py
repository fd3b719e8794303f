"""Trainings as a launcher starts them: how each process ended, and what it said."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from processes import ROOT, Fork, environment, meeting

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


PROGRAM = """
import sys
sys.argv[0] = {program!r}
exec({broken!r}, {{}})
from swd.commands.cli import launch
launch("train")
"""


def start(launches: Sequence[Launch], folder: Path) -> dict[str, Outcome]:
    """Start launches, one after another, and say how each ended."""
    return {launch.name: _outcome(launch, folder / launch.name) for launch in launches}


def _outcome(launch: Launch, folder: Path) -> Outcome:
    folder.mkdir()
    program = PROGRAM.format(program=str(ROOT / "train.py"), broken=launch.broken)
    command = [sys.executable, "-c", program, *launch.arguments]
    common = environment() | meeting()
    files = [(folder / f"{rank}.out", folder / f"{rank}.err") for rank in range(len(launch.environments))]
    ranks = [
        Fork(command, common | dict(own), folder, out, err)
        for own, (out, err) in zip(launch.environments, files, strict=True)
    ]
    until = time.monotonic() + LIMIT
    while time.monotonic() < until and None in {rank.poll() for rank in ranks}:
        time.sleep(0.05)
    for rank in ranks:
        rank.send_signal(signal.SIGKILL)
    return Outcome(folder, [rank.wait() for rank in ranks], [err.read_text() for _, err in files])
