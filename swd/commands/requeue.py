"""Jobs that SLURM starts again: a run goes on in its own folder, by the same command."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from signal import Signals
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger

from swd.io.files import write_aside
from swd.io.signals import Stopped
from swd.modules.adapters import CHECKPOINTS

JOB = "slurm_job"
"""Key of `run.json` with the number of the SLURM job that a run is of."""
INTERACTIVE = ("bash", "interactive")
"""Names of jobs in which a person gives commands; nothing is queued again there."""


def job_record() -> dict[str, str]:
    """Entry of `run.json` that a requeued job finds its run by; empty outside SLURM."""
    job = os.environ.get("SLURM_JOB_ID")
    return {JOB: job} if job else {}


def earlier_run(folder: Path, command: str) -> Path | None:
    """The folder in which this command trained before SLURM queued its job again; None if there is none.

    A requeued job keeps its number, and SLURM counts how often it was started again. Without that count the same
    command in the same job, as in an interactive one, is a new run.

    Args:
        folder: that a new run would have; those of the same name lie beside it.
        command: as `run.json` records it.
    """
    if os.environ.get("SLURM_RESTART_COUNT", "0") == "0" or not job_record():
        return None
    wanted: dict[str, Any] = job_record() | {"command": command}
    found: list[tuple[int, Path]] = []
    for file in {folder / "run.json", *folder.parent.glob("*/run.json")}:
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            if wanted.items() <= record.items():
                found.append((file.stat().st_mtime_ns, file.parent))
        except (OSError, ValueError, AttributeError):  # of a run that is being deleted, or damaged
            continue
    return max(found)[1] if found else None


def requeue(stop: Stopped) -> None:
    """Ask SLURM to queue this job again, if it announced with SIGUSR1 that the job's time is over.

    SLURM ends the job's processes as soon as it agrees, so everything is saved before.
    """
    job = os.environ.get("SLURM_JOB_ID", "")
    if stop.number != getattr(Signals, "SIGUSR1", None) or not re.fullmatch(r"[0-9]+", job):
        return
    if os.environ.get("SLURM_JOB_NAME") in INTERACTIVE:
        return
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}", "") for name in ("JOB_ID", "TASK_ID"))
    name = f"{array}_{task}" if array.isdigit() and task.isdigit() else job
    print(str(stop), file=sys.stderr, flush=True)
    program = shutil.which("scontrol")
    reason = "there is no scontrol here"
    if program is not None:
        result = subprocess.run([program, "requeue", name], capture_output=True, text=True, check=False)
        if not result.returncode:
            return
        reason = (result.stderr or result.stdout).strip().partition("\n")[0] or f"exit status {result.returncode}"
    warnings.warn(f"SLURM did not queue job {name} again ({reason}); give the same command once more", stacklevel=2)


def has_checkpoints(run: Path) -> bool:
    """Whether a run folder holds checkpoints, whole or damaged."""
    return any((run / CHECKPOINTS).glob("iteration-*"))


def go_on_writing(loggers: Sequence[Logger], folder: Path, iterations: int) -> None:
    """Let the logger of `metrics.csv` add rows to those of an earlier run in the same folder.

    Args:
        loggers: of the run.
        folder: of the run.
        iterations: done in the checkpoint that the run goes on from; rows of later ones are left out.
    """
    file = folder / "metrics.csv"
    for logger in loggers:
        if not isinstance(logger, CSVLogger) or not file.is_file():
            continue
        with file.open(newline="", encoding="utf-8") as stream:
            header, *rows = list(csv.reader(stream)) or [[]]
        writer = logger.experiment  # which removes the file that is there
        if "step" not in header:
            continue
        place = header.index("step")
        kept = [row for row in rows if len(row) == len(header) and _at_most(row[place], iterations)]
        write_aside(file, partial(_write_rows, [header, *kept]))
        writer.metrics_keys = header


def _write_rows(rows: list[list[str]], file: Path) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(rows)


def _at_most(text: str, iterations: int) -> bool:
    try:
        return float(text) <= iterations
    except ValueError:
        return False
