"""What the processes of one program tell each other beside its tensors: decisions of the first one, and failures.

They meet at a key-value store (torch's TCPStore) that the launcher names. It needs no process group and no GPU, so it
works before training begins, and while a process waits for tensors that never come.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch.distributed as dist

from swd.io.job_log import print_line
from swd.io.masking import mask_text
from swd.io.ranks import Ranks, meeting_point, ranks
from swd.types import UserError

T = TypeVar("T")

TICK = 0.5
"""Seconds between two looks at the store: short beside the minute within which all processes end."""
SILENT = 45.0
"""Seconds without a sign of life after which a process counts as gone, so that all end within a minute; long beside
what a library may do without letting other threads run."""
LOST = 4.0
"""The same once an exchange of tensors has failed, when some process most likely is gone."""
FAREWELL = 20.0
"""Seconds that a failed process has to end its loggers, and that the others wait for each other."""
GOODBYE = 3.0
"""Seconds that the first process waits for the others to exit before it."""
ARRIVAL = 600.0
"""Seconds that processes wait for each other before training: torchrun and Lightning wait ten minutes and longer."""
GLOO_AND_NCCL = ("torch/distributed", "torch/autograd/graph.py", "torch/nn/parallel/distributed.py")
"""Files in which a process waits for others."""


@dataclass(frozen=True)
class Failure:
    """Why all processes end.

    Attributes:
        rank: the process that failed.
        line: for the user.
        code: exit status of all processes.
    """

    rank: int
    line: str
    code: int = 2


class PeerFailure(UserError):
    """This process ends because of another one's failure, which is printed once, by whoever is first.

    Args:
        failure: of the other process.
    """

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.line)
        self.failure = failure


class Peers:
    """The other processes of this program.

    Args:
        store: that all of them reach.
        here: the place of this process.
        wait: seconds to wait for others before training.

    Attributes:
        folder: of the run, for the traceback of a defect; None until it is known.
        traced: whether a traceback has been written.
    """

    def __init__(self, store: Any, here: Ranks, wait: float = ARRIVAL) -> None:
        self.here = here
        self.wait = wait
        self.folder: str | None = None
        self.traced = False
        self._store = store
        self._lock = threading.Lock()
        self._agreed = 0
        self._watch: threading.Thread | None = None
        self._stop = threading.Event()
        self._ending = threading.Event()
        self._tidy: Callable[[], object] = lambda: None
        self._beats: dict[int, tuple[int, float]] = {}  # by rank: the last count, and when it came
        self._beat = 0

    # Decisions

    def agree(self, decide: Callable[[], T], wait: float | None = None) -> T:
        """Return what `decide` returns on the first process, on all of them, once all have come here.

        Args:
            decide: called on the first process alone; its result can be written as JSON.
            wait: seconds to wait for others; None: as given to the constructor.

        Raises:
            PeerFailure: if another process failed.
        """
        self._agreed += 1
        place = f"agreed/{self._agreed}"
        if not self.here.first:
            self._set(f"{place}/{self.here.rank}", "here")
            self._await([place], "process 0 has not come so far", wait)
            result: T = json.loads(self._get(place))
            return result
        others = [f"{place}/{rank}" for rank in range(1, self.here.world)]
        self._await(others, f"not all of {self.here.world} processes have come so far", wait)
        value = decide()
        self._set(place, json.dumps(value))
        return value

    def part(self) -> None:
        """Leave each other at the end of a training, the process that keeps the store last; ends `watch`.

        Raises:
            PeerFailure: if another process failed.
        """
        self.agree(lambda: None, wait=float("inf"))
        self._stop.set()
        if self._watch is not None:
            self._watch.join()
        self._watch = None
        place = f"parted/{self._agreed}"
        if not self.here.first:
            self._add(place)
            return
        until = time.monotonic() + FAREWELL
        while self._add(place, 0) < self.here.world - 1 and time.monotonic() < until:
            time.sleep(0.02)

    def _await(self, keys: list[str], waiting: str, wait: float | None) -> None:
        wait = self.wait if wait is None else wait
        until = time.monotonic() + wait
        while not self._check(keys):
            failure = self.failure()
            if failure is not None:
                raise PeerFailure(failure)
            if time.monotonic() > until:
                raise UserError(f"{waiting} within {wait:g} s; look at their output, and start all of them again")
            time.sleep(0.1)

    # Failures

    def failure(self) -> Failure | None:
        """The first failure of any process; None while there is none."""
        if not self._check(["failure"]):
            return None
        return Failure(**json.loads(self._get("failure")))

    def known(self) -> Failure | None:
        """As `failure`; if the store is gone, that the process which keeps it is gone."""
        try:
            return self.failure()
        except (RuntimeError, OSError):
            return Failure(0, gone_text([0], self.here.world), 1)

    def post(self, line: str, code: int = 2) -> Failure:
        """Tell all processes that they must end, unless one has done so before.

        Returns:
            The failure that counts: the first one.
        """
        mine = json.dumps({"rank": self.here.rank, "line": mask_text(line), "code": code})
        with self._lock:
            first = self._store.compare_set("failure", "", mine)
        return Failure(**json.loads(first))

    def end(self, line: str, code: int = 2) -> int:
        """End with all other processes: the line of the first failure is printed once, and all exit alike.

        Args:
            line: this process's failure, if it is the first.
            code: exit status for it.

        Returns:
            The exit status of this process.
        """
        self._ending.set()
        try:
            failure = self.post(line, code)
            self._leave(failure)
        except (RuntimeError, OSError):  # the store is gone, and with it whoever kept it
            if self.here.rank <= 1:
                print_line(f"error: {line}")
            return code
        with suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # launchers send it as soon as the first process has ended
        return failure.code

    def _leave(self, failure: Failure) -> None:
        """Print the failure once, and wait until all processes are ready to exit."""
        self._set(f"leaving/{self.here.rank}", "yes")
        until = time.monotonic() + FAREWELL
        if self.here.first:
            self.print_once(failure)
            everyone = [f"leaving/{rank}" for rank in range(self.here.world) if rank not in self._gone(LOST)]
            while not self._check(everyone) and time.monotonic() < until:
                time.sleep(0.05)
            self._set("exit", "now")
            self._see_off(len(everyone) - 1)
            return
        while not self._check(["exit"]) and time.monotonic() < until:
            time.sleep(0.02)
        self.print_once(failure)  # where the first process could not
        self._add("left")

    def _see_off(self, others: int) -> None:
        """Wait until the others have left the store, which may end with this process."""
        until = time.monotonic() + GOODBYE
        while self._add("left", 0) < others and time.monotonic() < until:
            time.sleep(0.02)

    def print_once(self, failure: Failure) -> None:
        """Print the line of a failure unless some process has printed it."""
        if self._add("printed") == 1:
            print_line(f"error: {failure.line}")

    def after_error(self, error: BaseException, place: str) -> Failure:
        """The failure that an error of this process comes from; its own one if no other process failed or is gone.

        Args:
            error: of an exchange of tensors, as when a process is killed, or any other.
            place: file and line of the error, for the message.
        """
        until = time.monotonic() + LOST + 4 * TICK
        exchange = is_exchange(error)
        while exchange and self._watch is not None and time.monotonic() < until:
            failure = self.known()
            if failure is not None:
                return failure
            gone = self._gone(LOST)
            if gone:
                return self.post(gone_text(gone, self.here.world), 1)
            time.sleep(0.1)
        reason = " ".join(str(error).split())[:300]
        return self.post(f"{self.here.name} failed: {type(error).__name__}: {reason} ({place})", 1)

    # Watching

    def watch(self, timeout: float, tidy: Callable[[], object] = lambda: None) -> None:
        """Look after the other processes until `part`, from a thread: end this one when one of them fails or stalls.

        Args:
            timeout: seconds in one and the same call after which this process counts as stalled.
            tidy: what is to be done before this process ends from outside of its main thread.
        """
        self._tidy = tidy
        self._stop.clear()
        self._watch = threading.Thread(target=self._look, args=(timeout,), name="peers", daemon=True)
        self._watch.start()

    def _look(self, timeout: float) -> None:
        stuck = Stuck(threading.main_thread().ident or 0)
        looked = time.monotonic()
        while not self._stop.wait(TICK):
            if time.monotonic() - looked > 4 * TICK:  # the whole program was paused, as when SLURM suspends a job
                self._beats.clear()
            looked = time.monotonic()
            try:
                failure = self.failure() or self._signs(stuck, timeout)
            except (RuntimeError, OSError):
                self._store_lost()
                return
            if failure is not None:
                self._end_from_outside(failure)
                return

    def _signs(self, stuck: Stuck, timeout: float) -> Failure | None:
        """Give a sign of life, and look at those of the others and at this process's main thread."""
        self._beat += 1
        where = stuck.where()
        self._set(f"beat/{self.here.rank}", json.dumps([self._beat, stuck.seconds, where]))
        self._look_at_others()
        gone = self._gone(SILENT)
        if gone:
            return self.post(gone_text(gone, self.here.world), 1)
        if stuck.seconds > timeout:
            return self.post(self._stalled(timeout), 1)
        return None

    def _look_at_others(self) -> None:
        """Note whose sign of life is new: the first process looks at all others, and those look at it."""
        others = range(1, self.here.world) if self.here.first else [0]
        there = [rank for rank in others if rank in self._beats or self._check([f"beat/{rank}"])]
        for rank in there:
            count = json.loads(self._get(f"beat/{rank}"))[0]
            if rank not in self._beats or self._beats[rank][0] != count:
                self._beats[rank] = (count, time.monotonic())

    def _gone(self, seconds: float) -> list[int]:
        """Processes that gave no sign of life for so long."""
        now = time.monotonic()
        return [rank for rank, (_, seen) in list(self._beats.items()) if now - seen > seconds]

    def _stalled(self, timeout: float) -> str:
        """The line of a stall: where the processes are that wait for no other, else where all are."""
        places = {}
        for rank in range(self.here.world):
            key = f"beat/{rank}"
            places[rank] = json.loads(self._get(key))[2] if self._check([key]) else "an unknown place"
        culprits = {rank: place for rank, place in places.items() if not place.startswith("waiting ")} or places
        named = ", ".join(f"process {rank} is in {place}" for rank, place in list(culprits.items())[:4])
        rest = "; the others wait" if len(culprits) < len(places) else ""
        return f"training stalled for {timeout:g} s (trainer.timeout): {named}{rest}"

    def _store_lost(self) -> None:
        """End after the store, and so the process that keeps it, has gone without a word."""
        time.sleep(LOST)
        if self._stop.is_set() or self._ending.is_set():
            return
        if self.here.rank == 1:
            print_line(f"error: {gone_text([0], self.here.world)}")
        os._exit(1)

    def _end_from_outside(self, failure: Failure) -> None:
        """End this process although its main thread may wait for ever."""
        if self.here.first:
            self.print_once(failure)
        if self._ending.wait(FAREWELL if failure.rank == self.here.rank else 2 * TICK):
            return  # the main thread is on its way
        with suppress(Exception):
            self._tidy()
        with suppress(RuntimeError, OSError):
            self._leave(failure)
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(failure.code)

    # The store

    def _set(self, key: str, value: str) -> None:
        with self._lock:
            self._store.set(key, value)

    def _get(self, key: str) -> str:
        with self._lock:
            value: bytes = self._store.get(key)
        return value.decode()

    def _add(self, key: str, number: int = 1) -> int:
        with self._lock:
            return int(self._store.add(key, number))

    def _check(self, keys: list[str]) -> bool:
        with self._lock:
            return bool(self._store.check(keys))


class Stuck:
    """How long a thread has been in one and the same call.

    Args:
        thread: its identifier.
    """

    def __init__(self, thread: int) -> None:
        self.thread = thread
        self.seconds = 0.0
        self._last: tuple[Any, ...] = ()
        self._looked = time.monotonic()

    def where(self) -> str:
        """The place of the thread, and count the time since it came there."""
        frames = list(_frames(sys._current_frames().get(self.thread)))
        now = tuple((frame.f_code, frame.f_lasti) for frame in frames)
        # A pause of the whole program, as when SLURM suspends a job, is no time in a call.
        passed = min(time.monotonic() - self._looked, 4 * TICK)
        self._looked = time.monotonic()
        same = now == self._last and not any(frame.f_code is Peers._await.__code__ for frame in frames)
        self.seconds = self.seconds + passed if same else 0.0
        self._last = now
        return _place(frames)


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _place(frames: list[FrameType]) -> str:
    """The innermost place of a stack outside of installed packages, after "waiting" if it waits for other processes."""
    files = [frame.f_code.co_filename.replace(os.sep, "/") for frame in frames]
    if not frames:
        return "an unknown place"
    own = next((i for i, file in enumerate(files) if "site-packages" not in file), len(files) - 1)
    # Further out, training always runs inside of DDP.
    waiting = any(part in file for file in files[:own] for part in GLOO_AND_NCCL)
    frame = frames[own]
    text = f"{frame.f_code.co_name} ({frame.f_code.co_filename}, line {frame.f_lineno})"
    return f"waiting {text}" if waiting else text


def is_exchange(error: BaseException) -> bool:
    """Whether an error comes from an exchange of tensors, and so most likely from another process."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "nccl", "connection", "timed out"))


def gone_text(gone: list[int], world: int) -> str:
    """The line for processes that ended without a word."""
    which = ", ".join(map(str, gone))
    return (
        f"process {which} of {world} ended without a word (killed, out of memory, or its machine is lost), so that all "
        "ended; the same command with resume=auto goes on from the last checkpoint"
    )


# Of this program

_peers: Peers | None = None


def connect(wait: float = ARRIVAL) -> Peers | None:
    """The peers of this process; None if it was started alone. Waits until the first process is there.

    Raises:
        UserError: if they cannot be reached.
    """
    global _peers
    here = ranks()
    if _peers is None and here.world > 1:
        _peers = Peers(_store(here, wait), here, wait)
    return _peers


def connected() -> Peers | None:
    """The peers, if this process has met them."""
    return _peers


def forget() -> None:
    """Forget the peers: their processes have ended, and others may be started."""
    global _peers
    _peers = None


def _store(here: Ranks, wait: float) -> Any:
    """The store that all processes of this program reach, with keys of its own for each start of them."""
    address, port = meeting_point(here)
    os.environ["MASTER_ADDR"] = address
    os.environ["MASTER_PORT"] = str(port)
    try:
        found = dist.rendezvous(f"tcp://{address}:{port}", here.rank, here.world, timeout=timedelta(seconds=wait))
        store, _, _ = next(found)
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{here.name} has not met all others at {address}:{port} ({reason}); start all of them, and give another "
            "MASTER_PORT if this one is in use"
        ) from None
    return dist.PrefixStore(f"swd/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
