"""Where the heavy work of the offline programs runs: on which device, on how many cores, on how many threads."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

# Starting processes takes two seconds, most of it the import of torch; measuring and quantizing this many weights takes
# one core five.
WORTH_PROCESSES = 2**26


@cache
def compute_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_workers(requested: int | None, numel: int) -> int:
    """The number of processes to spread work over; 1 stands for this process alone.

    requested: by the user, None for one per available core if ``numel`` weights make up for starting them. A GPU is
    driven by one process in any case.
    Raises ValueError for a number under 1.
    """
    if requested is not None and requested < 1:
        raise ValueError(f"`workers`: expected a number of processes from 1 up, got {requested}")
    if compute_device().type != "cpu":
        return 1
    return requested or (available_cores() if numel >= WORTH_PROCESSES else 1)


def available_cores() -> int:
    """The number of cores that this process may use: by its affinity, and by the quotas of its control groups."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(cores, cpu_quota())))


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float:
    """Cores whose time this process may use, by the least quota of its control group and those above; inf for none.

    root, membership: where Linux mounts control groups, of version 2 or 1, and says which are this process's.
    """
    quota = math.inf
    for line in membership.read_text().splitlines() if membership.is_file() else ():
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        path = root / controllers / group.lstrip("/")
        # In a container its own group may be mounted in the place of the root.
        for directory in (path, *path.parents[: len(Path(group).parts)], root / controllers):
            quota = min(quota, _quota_in(directory))
    return quota


def _quota_in(directory: Path) -> float:
    try:
        if (directory / "cpu.max").is_file():
            limit, period = (directory / "cpu.max").read_text().split()
        else:
            limit, period = ((directory / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return math.inf if limit == "max" or int(limit) < 0 else int(limit) / int(period)
    except (OSError, ValueError):
        return math.inf


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one thread, as a decorator or in a with statement.

    Matrices are worked on in pieces that fit a cache. Shared among torch's threads, such pieces take longer than on
    one, and many times longer on a busy machine, because the threads wait for each other without sleeping.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_threads(function: Callable[[Item], Result], items: Iterable[Item], workers: int = 1) -> Iterator[Result]:
    """Call ``function``, which needs no gradients, on every item, and yield the results in order.

    workers: the number of threads; 1 calls in this thread. Each has one thread of torch, so that what is computed from
    an item does not depend on their number. Few results wait for those before them.
    """
    if workers == 1:
        with torch.no_grad():
            yield from map(function, items)
        return
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers, initializer=_begin_thread) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _begin_thread() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
