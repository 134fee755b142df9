"""Work on several threads, in order and no further ahead than it is asked for."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor


def in_order[In, Out](
    function: Callable[[In], Out], items: Iterable[In], threads: int | None
) -> Iterator[Out]:
    """``map`` on threads, and lazy: at most ``threads`` results are made ahead.

    Threads, never forked processes, which would all draw the same noise. Whoever leaves the results
    half way leaves what is being made to end by itself.

    Args:
        function: called once for each item, on any thread.
        items: taken as they are needed.
        threads: how many; None is one per processor.
    """
    threads = threads or os.cpu_count() or 1
    if threads == 1:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(threads)
    try:
        ahead: deque[Future[Out]] = deque()
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        # Must not wait: the garbage collector closes a generator that was left half way, at any
        # moment, also while a thread is being started. That holds a lock of `threading`, which
        # joining a thread takes too, and the process would stand still for ever.
        pool.shutdown(wait=False, cancel_futures=True)
