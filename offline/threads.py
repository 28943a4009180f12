"""How the offline programs use cores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
