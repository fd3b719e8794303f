"""Progress of a long job on standard error: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

from tqdm import tqdm

from swd.io.masking import mask_text

INTERVAL = 30.0
"""Seconds between two lines where there is no terminal: often enough to see that a job runs, few enough for a log."""


class JobLog:
    """Reports on standard error that a job starts, how far it is, and that it ended.

    On a terminal this is one live bar. Elsewhere it is a line at the start, one about every 30 seconds with place, rate
    and time left, and one at the end. A context manager.

    Args:
        task: description of the job in one line, with its input and output.
        total: how many units there are.
        unit: name of one unit, e.g. "picture".
        done: how many were done before this process started.
        shown: False prints nothing (for all processes but the first).
        interval: seconds between two lines.
        clock: returns seconds since any fixed moment; tests give their own.
    """

    def __init__(
        self,
        task: str,
        total: int,
        unit: str = "step",
        done: int = 0,
        shown: bool = True,
        interval: float = INTERVAL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.task = task
        self.total = total
        self.unit = unit
        self.shown = shown
        self.interval = interval
        self.place = done
        self._first = done
        self._clock = clock
        self._started = clock()
        self._last_line = self._started
        self._bar: tqdm | None = None

    def __enter__(self) -> JobLog:
        self._started = self._clock()
        self._last_line = self._started
        if not self.shown:
            return self
        earlier = f", {self.place} of them done before" if self.place else ""
        print_line(f"{self.task}: {self._count(self.total)}{earlier}")
        if sys.stderr.isatty():
            self._bar = tqdm(total=self.total, initial=self.place, unit=self.unit, mininterval=1, file=sys.stderr)
        return self

    def advance(self, count: int = 1, note: str = "") -> None:
        """Report that `count` more units are done; `note`, e.g. the losses, is put at the end of the line."""
        self.place += count
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif self.shown and self._clock() - self._last_line >= self.interval:
            self._last_line = self._clock()
            print_line(self.line(note))

    def line(self, note: str = "") -> str:
        """Place, rate and time left in words."""
        seconds = max(self._clock() - self._started, 1e-9)
        rate = (self.place - self._first) / seconds
        left = f"{duration((self.total - self.place) / rate)} left" if rate else "time left unknown"
        share = self.place / max(self.total, 1)
        text = f"{self.unit} {self.place}/{self.total} ({share:.0%}), {rate_text(rate, self.unit)}, {left}"
        return f"{text}; {note}" if note else text

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        if self.shown and kind is None:
            seconds = self._clock() - self._started
            print_line(f"done: {self._count(self.place - self._first)} in {duration(seconds)}")

    def _count(self, number: int) -> str:
        return f"{number} {self.unit}{'' if number == 1 else 's'}"


def print_line(text: str) -> None:
    """A line for the reader, on standard error, at once, without credentials."""
    print(mask_text(text), file=sys.stderr, flush=True)


def rate_text(rate: float, unit: str) -> str:
    """A rate per second, or its inverse where units take longer than a second."""
    return f"{rate:.3g} {unit}s/s" if rate >= 1 or rate == 0 else f"{1 / rate:.3g} s/{unit}"


def duration(seconds: float) -> str:
    """Seconds as "45 s", "3 min 20 s" or "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
