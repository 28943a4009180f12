"""Where the heavy work of the offline programs runs: on which device, in how many processes, on how many threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from alphaq_vllm.cores import available_cores

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
