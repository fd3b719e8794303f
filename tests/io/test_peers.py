"""Processes that tell each other decisions and failures: forks of this one, which meet at a store."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from swd.io import peers
from swd.io.peers import Failure, PeerFailure, Peers, connect
from swd.types import UserError

LIMIT = 60.0
"""Seconds within which all processes must have ended."""


@dataclass(frozen=True)
class Ended:
    codes: list[int]
    errors: list[str]
    seconds: float

    @property
    def lines(self) -> list[str]:
        return [line for text in self.errors for line in text.splitlines() if line.startswith("error: ")]


@dataclass(frozen=True)
class Running:
    """Processes that were forked together, by rank."""

    children: list[int]
    folder: Path
    started: float


def fork(world: int, act: Callable[[Peers], int], folder: Path) -> Running:
    """Call `act` in processes of their own; its result is the exit status of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(exist_ok=True)
    started = time.monotonic()
    return Running([os.fork() or _child(rank, world, port, act, folder) for rank in range(world)], folder, started)


def wait(*groups: Running) -> list[Ended]:
    """How each group ended; what still runs after `LIMIT` is killed."""
    codes = [[999] * len(group.children) for group in groups]
    ends = [group.started for group in groups]
    left = {child: (number, rank) for number, group in enumerate(groups) for rank, child in enumerate(group.children)}
    until = time.monotonic() + LIMIT
    while left and time.monotonic() < until:
        for child, (number, rank) in list(left.items()):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[number][rank] = os.waitstatus_to_exitcode(status)
                ends[number] = time.monotonic()
                del left[child]
        time.sleep(0.02)
    for child in left:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    errors = [[(group.folder / f"{rank}.err").read_text() for rank in range(len(group.children))] for group in groups]
    seconds = [end - group.started for group, end in zip(groups, ends, strict=True)]
    return [Ended(*each) for each in zip(codes, errors, seconds, strict=True)]


def together(world: int, act: Callable[[Peers], int], folder: Path) -> Ended:
    return wait(fork(world, act, folder))[0]


def _child(rank: int, world: int, port: int, act: Callable[[Peers], int], folder: Path) -> int:
    code = 98
    try:
        os.dup2(os.open(folder / f"{rank}.err", os.O_CREAT | os.O_WRONLY), 2)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        values = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
        os.environ |= {key: str(value) for key, value in values.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        met = connect(LIMIT)
        assert met is not None
        code = act(met)
        time.sleep(0.5 * (rank == 0))  # it keeps the store
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(code)


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, seconds in (("TICK", 0.1), ("SILENT", 3.0), ("LOST", 2.0), ("FAREWELL", 4.0)):
            patch.setattr(peers, name, seconds)
        patch.setattr(peers, "_peers", None)
        yield


def idle(met: Peers) -> int:
    """Wait for ever, as for tensors of another process."""
    met.watch(LIMIT, lambda: print("tidy", file=sys.stderr))
    time.sleep(LIMIT)
    return 99


def test_the_first_process_decides_for_all(tmp_path: Path) -> None:
    def act(met: Peers) -> int:
        first = met.agree(lambda: {"folder": f"made by {met.here.rank}", "checkpoint": None})
        second = met.agree(lambda: met.here.rank + 5)
        return second if first == {"folder": "made by 0", "checkpoint": None} else 90

    assert together(3, act, tmp_path).codes == [5, 5, 5]


def test_processes_part_with_the_keeper_of_the_store_last(tmp_path: Path) -> None:
    def act(met: Peers) -> int:
        met.watch(LIMIT)
        time.sleep(0.3 * met.here.rank)
        met.part()
        if met.here.first:
            os._exit(0)  # and the store with it
        return 0

    ended = together(3, act, tmp_path)
    assert ended.codes == [0, 0, 0] and ended.errors == ["", "", ""]


def test_wrong_input_that_all_notice_is_one_line(tmp_path: Path) -> None:
    ended = together(3, lambda met: met.end("steps=0; use 1 or more"), tmp_path)
    assert ended.codes == [2, 2, 2]
    assert ended.lines == ["error: steps=0; use 1 or more"]
    assert ended.errors[0].strip() == ended.lines[0]


def test_an_error_of_one_process_reaches_those_that_wait_for_a_decision(tmp_path: Path) -> None:
    def act(met: Peers) -> int:
        if met.here.rank == 2:
            return met.end("b.txt is missing")
        try:
            met.agree(lambda: 1)
        except PeerFailure as error:
            assert error.failure == Failure(2, "b.txt is missing", 2)
            return met.end(str(error))
        return 97

    ended = together(3, act, tmp_path)
    assert ended.codes == [2, 2, 2] and ended.lines == ["error: b.txt is missing"]
    assert ended.errors[0].strip() == "error: b.txt is missing"


def test_an_error_while_others_wait_for_ever_ends_all(tmp_path: Path) -> None:
    def act(met: Peers) -> int:
        if met.here.rank != 1:
            return idle(met)
        met.watch(LIMIT)
        failure = met.after_error(ZeroDivisionError("by  zero\nhere"), "a.py, line 3")
        return met.end(failure.line, failure.code)

    ended = together(3, act, tmp_path)
    assert ended.codes == [1, 1, 1]
    assert ended.lines == ["error: process 1 of 3 failed: ZeroDivisionError: by zero here (a.py, line 3)"]
    assert [text.count("tidy") for text in ended.errors] == [1, 0, 1]


# Cases that are mostly waiting: all of them wait at the same time.


def killed(gone: int) -> Callable[[Peers], int]:
    def act(met: Peers) -> int:
        if met.here.rank != gone:
            return idle(met)
        met.watch(LIMIT)
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
        return 99

    return act


def broken_exchange(met: Peers) -> int:
    met.watch(LIMIT)
    time.sleep(1)
    if met.here.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    failure = met.after_error(RuntimeError("[gloo/tcp/pair.cc:538] Connection closed by peer"), "x.py, line 1")
    return met.end(failure.line, failure.code)


def stalled(met: Peers) -> int:
    dist.init_process_group("gloo", timeout=timedelta(seconds=LIMIT))
    met.watch(2)
    if met.here.rank == 1:
        time.sleep(LIMIT)
    dist.barrier()
    return 99


def never_comes(met: Peers) -> int:
    met.wait = 0.5
    if met.here.rank == 1:
        time.sleep(4)
        return 0
    try:
        met.agree(lambda: 1)
    except UserError as error:
        return met.end(str(error))
    return 97


@pytest.fixture(scope="module")
def waited(quick: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    folder = tmp_path_factory.mktemp("waited")
    acts = {"killed-0": killed(0), "killed-1": killed(1), "broken": broken_exchange, "stalled": stalled}
    running = {name: fork(3, act, folder / name) for name, act in acts.items()}
    running["never"] = fork(2, never_comes, folder / "never")
    return dict(zip(running, wait(*running.values()), strict=True))


@pytest.mark.parametrize("gone", [0, 1])
def test_a_killed_process_is_named(waited: dict[str, Ended], gone: int) -> None:
    ended = waited[f"killed-{gone}"]
    assert ended.codes == [-9 if rank == gone else 1 for rank in range(3)]
    assert len(ended.lines) == 1
    assert ended.lines[0].startswith(f"error: process {gone} of 3 ended without a word (killed")


def test_an_exchange_that_broke_off_is_blamed_on_the_process_that_is_gone(waited: dict[str, Ended]) -> None:
    ended = waited["broken"]
    assert ended.codes == [1, -9, 1]
    assert len(ended.lines) == 1 and ended.lines[0].startswith("error: process 1 of 3 ended without a word")


def test_a_stalled_process_ends_all_and_is_named(waited: dict[str, Ended]) -> None:
    ended = waited["stalled"]
    assert ended.codes == [1, 1, 1] and ended.seconds < 15
    assert len(ended.lines) == 1
    place = r"process 1 is in stalled \(\S+test_peers\.py, line \d+\); the others wait"
    assert re.fullmatch(rf"error: training stalled for 2 s \(trainer\.timeout\): {place}", ended.lines[0])


def test_a_process_that_never_comes_is_one_line(waited: dict[str, Ended]) -> None:
    ended = waited["never"]
    assert ended.codes == [2, 0]
    assert ended.lines == [
        "error: not all of 2 processes have come so far within 0.5 s; look at their output, and start all of them again"
    ]
