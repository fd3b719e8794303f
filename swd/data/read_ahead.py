"""Threads that work ahead of whoever takes their results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

In = TypeVar("In")
Out = TypeVar("Out")


def read_ahead(read: Callable[[In], Out], requests: Iterable[In], workers: int, ahead: int) -> Iterator[Out]:
    """`map(read, requests)` by threads: results in order, errors where their result is due.

    Args:
        read: called in a thread.
        requests: what for.
        workers: threads.
        ahead: how many results are ready or under way beyond the one that is due.
    """
    pool, waiting = ThreadPoolExecutor(workers, "swd-data"), deque[Future[Out]]()
    try:
        for request in requests:
            waiting.append(pool.submit(read, request))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
