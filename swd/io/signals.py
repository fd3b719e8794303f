"""Signals that ask a program to end: at a moment of its own choosing while a training runs, else at once."""

from __future__ import annotations

import os
import signal
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from swd.io.ranks import is_first

NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
"""Signals that are obeyed: of schedulers and `kill`, of Ctrl-C, of a terminal that closes, of SLURM's `--signal`."""
SAME = 2.0
"""Seconds within which a second signal is the first one once more: a launcher passes on what its processes got too."""
WORKER_SECONDS = 120
"""Seconds that a loader process outlives a SIGTERM, so that the update it fetches for can be finished."""


class Stopped(BaseException):
    """A signal ended the work. No `Exception`, since nothing that mends errors may go on after it.

    Args:
        number: of the signal.
        text: sentence for the user: where the work ended, and how it goes on.

    Attributes:
        code: exit status: 128 and the number, as shells and schedulers count.
    """

    def __init__(self, number: int, text: str = "") -> None:
        name = signal.Signals(number).name
        super().__init__(text or f"stopped by {name}; what was finished is kept, and the same command goes on from it")
        self.number = number
        self.code = 128 + number


class _Received:
    """The signals of this process.

    Attributes:
        number: of the first signal that waits to be obeyed; None: there is none.
        when: moment of the first signal in seconds of `time.monotonic`.
        postponed: whether a signal waits until it is asked for.
        closing: whether the work ends already, and only a second Ctrl-C hurries it.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.when = 0.0
        self.postponed = False
        self.closing = False

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Obey or note a signal; a second one ends the process at once."""
        first = self.number is None
        if first:
            self.number = number
            self.when = time.monotonic()
            if self.postponed:
                if is_first():  # each of many processes gets the signal
                    name = signal.Signals(number).name
                    _tell(f"{name}: the iteration is finished and saved first; again ends at once")
                return
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise Stopped(number)
        if time.monotonic() - self.when < SAME or (self.closing and number != signal.SIGINT):
            return
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


_received = _Received()


def _tell(text: str) -> None:
    """Write a line from a signal handler: `print` fails if the signal came inside another one."""
    try:
        os.write(2, f"{text}\n".encode())
    except OSError:  # the terminal is gone, and every later line would fail
        null = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            if stat.S_ISCHR(os.fstat(stream).st_mode):
                os.dup2(null, stream)


def _numbers() -> list[signal.Signals]:
    """The signals of `NAMES` that this system has."""
    return [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


def _install(numbers: list[signal.Signals]) -> dict[signal.Signals, Any]:
    """Receive signals, except those that the program was started to ignore (`nohup`); the handlers before."""
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is not threading.main_thread():
        return before
    for number in numbers:
        handler = signal.getsignal(number)
        if handler not in (signal.SIG_IGN, None):
            before[number] = handler
            signal.signal(number, _received.receive)
    return before


@contextmanager
def listening() -> Iterator[None]:
    """Receive signals inside: the first raises `Stopped`, or KeyboardInterrupt for Ctrl-C, unless it is postponed.

    Inside another `listening` this does nothing.
    """
    global _received
    if signal.getsignal(signal.SIGTERM) == _received.receive:
        yield
        return
    _received = _Received()
    before = _install(_numbers())
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def postpone() -> None:
    """From now on let signals wait until `requested` is asked; takes them back from handlers of other libraries."""
    if threading.current_thread() is threading.main_thread():
        _install([number for number in _numbers() if signal.getsignal(number) != signal.SIG_IGN])
    _received.postponed = True


def obey() -> None:
    """End `postpone`.

    Raises:
        Stopped: if a signal waits.
    """
    _received.postponed = False
    if _received.number is not None and not _received.closing:
        _received.closing = True
        raise Stopped(_received.number)


def requested() -> int | None:
    """Number of the signal that waits to be obeyed; None: there is none."""
    return _received.number


def close() -> None:
    """Everything is saved: from now on only a second Ctrl-C ends the process before its end."""
    _received.closing = True


def outlive(_worker: int = 0) -> None:
    """Let a loader process go on when its whole group is signalled: it ends with its parent, or a while after SIGTERM.

    Args:
        _worker: number of the process, which loaders pass.
    """
    for number in _numbers():
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: _last_minutes())


def _last_minutes() -> None:
    """End this process after `WORKER_SECONDS`, without a handler of Python, which a hanging disk would keep waiting."""
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(WORKER_SECONDS)
    else:
        os._exit(128 + signal.SIGTERM)
