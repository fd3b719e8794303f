"""Programs in processes of their own, alone and in groups.

A new interpreter needs five seconds to import torch, Lightning and diffusers. Here one process imports them, once for
all tests of a worker, and programs are forked from it. What depends on a fresh interpreter, or on how a user starts
one, takes `subprocess` instead, as tests/commands/test_distributed.py does.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric.utilities.rank_zero import _get_rank, rank_zero_only

HELPERS = Path(__file__).parent
ROOT = HELPERS.parents[1]

_context = multiprocessing.get_context("forkserver")


def prepare_forks() -> Any:
    """The context whose processes have imported `preloaded`; the first call starts the one they are forked from."""
    from multiprocessing import forkserver

    _context.set_forkserver_preload(["preloaded"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{HELPERS}")
        forkserver.ensure_running()
    return _context


class Fork:
    """A Python program in a new process: that part of `subprocess.Popen` which tests use.

    Args:
        command: `[sys.executable, FILE, *arguments]` or `[sys.executable, "-c", TEXT, *arguments]`.
        env: the whole environment.
        cwd: folder in which it runs.
        out: file that its standard output is added to.
        err: file that its standard error is added to.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str], cwd: str | Path, out: Path, err: Path) -> None:
        self.out = out
        self.err = err
        self._process = prepare_forks().Process(target=_run, args=(list(command), dict(env), cwd, out, err))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            self.send_signal(signal.SIGKILL)
            raise TimeoutError(f"no end after {timeout} s: {self.err.read_text()}")
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote, once it has ended."""
        self.wait(timeout)
        return self.out.read_text(), self.err.read_text()


def _run(command: list[str], env: dict[str, str], cwd: str | Path, out: Path, err: Path) -> None:
    """In the new process: the program, as an interpreter would start it."""
    assert "preloaded" in sys.modules, "nothing was imported before the fork"
    threading.Thread(target=_end_with_the_tests, daemon=True).start()
    for file, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), stream)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    with suppress(ValueError):  # a rank that is no number, of which the program has to say so
        rank_zero_only.rank = _get_rank() or 0  # which Lightning has from the environment at its import
    _, first, *arguments = command
    text = arguments.pop(0) if first == "-c" else Path(first).read_text()
    sys.argv = [first, *arguments]
    sys.path[:0] = [str(Path(first).parent), *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    try:
        exec(compile(text, first, "exec"), {"__name__": "__main__", "__file__": first})
    finally:
        atexit._run_exitfuncs()  # which the end of a process of multiprocessing leaves out


def _end_with_the_tests() -> None:
    """End this process when that of the tests ends before it, killed for example; it would wait for others for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def meeting() -> dict[str, str]:
    """Variables that say where the processes of a group find each other: at a port that is free now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}


def environment() -> dict[str, str]:
    """The variables of this process, for a command that it starts."""
    return {key: value for key, value in os.environ.items() if key != "SWD_COMMAND"} | {"OMP_NUM_THREADS": "1"}


def torchrun(world: int) -> list[dict[str, str]]:
    """Variables of the processes of torchrun on one machine, beside `meeting`."""
    common = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def run_together(command: Sequence[str], world: int, folder: Path, limit: float = 600) -> str:
    """A program in a group of processes, as torchrun starts them; what they wrote to standard error.

    Args:
        command: as of `Fork`.
        world: how many processes.
        folder: where it runs, with files of its output.
        limit: seconds until the processes are killed.

    Raises:
        AssertionError: with that text, if one of them fails. The others, which would wait for it, are killed.
    """
    out, err = folder / "out.txt", folder / "err.txt"
    common = environment() | meeting()
    ranks = [Fork(command, common | own, folder, out, err) for own in torchrun(world)]
    end = time.monotonic() + limit
    while time.monotonic() < end and {rank.poll() for rank in ranks} in ({None}, {None, 0}):
        time.sleep(0.02)
    for rank in ranks:
        rank.send_signal(signal.SIGKILL)
    assert [rank.wait() for rank in ranks] == [0] * world, err.read_text()[-8000:]
    return err.read_text()


def train_on_two(arguments: Sequence[str], folder: Path, program: str | None = None) -> str:
    """`train.py` on two gloo processes, each started in `folder` as by the launcher of a cluster; their standard error.

    Args:
        arguments: of the command line.
        folder: where it runs, and where its runs lie unless the arguments say otherwise.
        program: a text to run in the place of `train.py`, for example one that breaks something first.
    """
    file = ROOT / "train.py"
    if program is not None:
        file = folder / "program.py"
        file.write_text(program)
    return run_together([sys.executable, str(file), f"output={folder}", *arguments], 2, folder)
