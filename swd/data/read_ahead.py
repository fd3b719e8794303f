"""Threads that compute results before they are needed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

In = TypeVar("In")
Out = TypeVar("Out")


def read_ahead(read: Callable[[In], Out], requests: Iterable[In], workers: int, ahead: int) -> Iterator[Out]:
    """`map(read, requests)` in threads: results in order, and an error is raised where its result would come.

    Args:
        read: function that is called in a thread.
        requests: its arguments, one for each call.
        workers: number of threads.
        ahead: number of calls that are started before the next result is taken.
    """
    pool = ThreadPoolExecutor(workers, "swd-data")
    waiting = deque[Future[Out]]()
    try:
        for request in requests:
            waiting.append(pool.submit(read, request))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
