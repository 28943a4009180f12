"""Where the heavy work of the offline programs runs: on which device, in how many processes, on how many threads."""

from __future__ import annotations

import ctypes
import math
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import torch

from alphaq_vllm.cores import available_cores

_C_LIBRARY = ctypes.CDLL(None)

Item = TypeVar("Item")
Result = TypeVar("Result")

# Starting processes takes two seconds, most of it the import of torch; measuring and quantizing this many weights takes
# one core five.
WORTH_PROCESSES = 2**26
# Each takes memory of its own. More than this, and than there are cores, help nobody.
MOST_PROCESSES = 64


@cache
def compute_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_workers(requested: int | None, numel: int) -> int:
    """The number of processes to spread work over; 1 stands for this process alone.

    requested: by the user, None for one per available core if ``numel`` weights make up for starting them. A GPU is
    driven by one process in any case.
    Raises ValueError for a number under 1, and for one that would exhaust the machine.
    """
    most = max(MOST_PROCESSES, available_cores())
    if requested is not None and not 1 <= requested <= most:
        raise ValueError(f"`workers`: expected a number of processes from 1 to {most}, got {requested}")
    if compute_device().type != "cpu":
        return 1
    return requested or (available_cores() if numel >= WORTH_PROCESSES else 1)


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


class SharedTensor:
    """A float32 tensor, ``tensor``, that other processes can have without a copy if it is on a CPU, under Linux: what
    is pickled is the place of its memory. So it has to live until they have unpickled it.
    """

    def __init__(self, shape: Sequence[int], device: torch.device) -> None:
        self._path, self._shape = "", tuple(shape)
        if device.type == "cpu" and hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("alphaq")
            weakref.finalize(self, os.close, descriptor)
            os.truncate(descriptor, math.prod(shape) * torch.float32.itemsize)
            self._path = f"/proc/{os.getpid()}/fd/{descriptor}"
            self._map()
        else:
            self.tensor = torch.empty(self._shape, dtype=torch.float32, device=device)

    def _map(self) -> None:
        size = math.prod(self._shape)
        self.tensor = torch.from_file(self._path, shared=True, size=size, dtype=torch.float32).view(self._shape)

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path, "_shape": self._shape} if self._path else self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._path:
            self._map()


def release_memory() -> None:
    """Give memory that is not in use back to the system.

    The allocator of glibc keeps what threads have freed: after a large layer, hundreds of megabytes for each.
    """
    if hasattr(_C_LIBRARY, "malloc_trim"):
        _C_LIBRARY.malloc_trim(0)


def _begin_thread() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
