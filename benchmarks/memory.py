"""How much memory processes take while something runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil


def children_bytes() -> int:
    """Resident bytes of all descendants of this process together; one that ends meanwhile counts for nothing."""
    resident = 0
    for process in psutil.Process().children(recursive=True):
        try:
            resident += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return resident


def allocated_bytes() -> int:
    """Resident bytes of this process without files mapped into memory, which can be dropped at any moment."""
    with Path("/proc/self/status").open() as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))


@contextmanager
def sampled(measure: Callable[[], int], interval: float) -> Iterator[list[tuple[float, int]]]:
    """Samples of ``measure`` every ``interval`` seconds for as long as the block runs, each with its second.

    There is one at the start and one at the end. A thread takes them: a busy event loop does not delay it.
    """
    start, samples, done = time.monotonic(), [], threading.Event()

    def sample() -> None:
        samples.append((time.monotonic() - start, measure()))

    def watch() -> None:
        while not done.wait(interval):
            sample()

    sample()
    with ThreadPoolExecutor(1, thread_name_prefix="memory") as pool:
        watcher = pool.submit(watch)
        try:
            yield samples
        finally:
            done.set()
            # Raises what the thread died of: samples that are missing must not look like memory that does not grow.
            watcher.result()
            sample()
