"""Work spread over processes, each with one thread of torch and a few tasks at a time.

Processes come from a server that has imported torch once, so all but the first start in milliseconds and share its
memory. None outlives the process that it works for, however that ends.
"""

from __future__ import annotations

import io
import logging
import os
import pickle
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from multiprocessing import context, forkserver, get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.pool import ExceptionWithTraceback  # type: ignore[attr-defined]
from queue import SimpleQueue
from types import ModuleType
from typing import Any, TypeVar

import torch

from offline.threads import one_thread

Item = TypeVar("Item")
Result = TypeVar("Result")

# One that is worked on and one that waits, so that a worker is not idle while its result is dealt with. Of tasks that
# take many seconds none waits, because another worker may come to it first.
TASKS_IN_FLIGHT, LONG_SECONDS = 2, 2.0
_SAFE_PATH = "PYTHONSAFEPATH"


def run_all(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int = 1, shared: object = None
) -> Generator[tuple[Item, Result], None, None]:
    """Call ``function`` on every item and yield each with its result as soon as there is one.

    workers: the number of processes; 1 calls in this process and in order. With more, function and items must be
    picklable, ``items`` are drawn as they are needed, and the order of the results is any.
    shared: a large object that items refer to, sent to each process once instead of with every item.
    Raises what ``function`` raises, and ChildProcessError if a process dies.
    """
    if workers == 1:
        with one_thread():
            for item in items:
                yield item, function(item)
    else:
        with _started(workers, _dumps(function, shared), shared) as processes:
            yield from _distribute(processes, iter(items), shared)


def _distribute(
    processes: dict[Connection, context.ForkServerProcess], items: Iterator[Item], shared: object
) -> Iterator[tuple[Item, Any]]:
    busy: dict[Connection, deque[Item]] = {connection: deque() for connection in processes}
    ready, in_flight, start = list(busy), 1, time.monotonic()
    while True:
        for connection in ready:
            try:
                for item in islice(items, max(0, in_flight - len(busy[connection]))):
                    busy[connection].append(item)
                    connection.send_bytes(_dumps(item, shared))
            except ConnectionError:
                raise _death(processes[connection]) from None
        working = [connection for connection in busy if busy[connection]]
        if not working:
            return
        ready = [connection for connection in wait(working) if isinstance(connection, Connection)]
        # The first results tell how long all take.
        if in_flight < TASKS_IN_FLIGHT and time.monotonic() - start < LONG_SECONDS:
            in_flight = TASKS_IN_FLIGHT
        for connection in ready:
            try:
                result, error = pickle.loads(connection.recv_bytes())
            except (EOFError, ConnectionError):
                raise _death(processes[connection]) from None
            if error:
                raise error
            yield busy[connection].popleft(), result


def _death(process: context.ForkServerProcess) -> ChildProcessError:
    process.join()
    code = process.exitcode or 0
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
    hint = ", as happens when memory runs out: set `workers` lower" if code == -signal.SIGKILL else ""
    return ChildProcessError(f"a worker process {how}{hint}")


@contextmanager
def _started(workers: int, function: bytes, shared: object) -> Iterator[dict[Connection, context.ForkServerProcess]]:
    """Idle workers by the connections to them, killed at the end."""
    forked = get_context("forkserver")
    _start_server()
    start = pickle.dumps(shared), function
    processes: dict[Connection, context.ForkServerProcess] = {}
    try:
        for _ in range(workers):
            ours, theirs = forked.Pipe()
            process = forked.Process(target=_work, args=(theirs, *start), daemon=True)
            processes[ours] = process
            with _without_main(), _interrupted_later():
                process.start()
            theirs.close()
        yield processes
    finally:
        for connection, process in processes.items():
            connection.close()
            if process.pid:
                process.kill()
                process.join()


def _start_server() -> None:
    """Start the server of processes with SIGINT blocked, as they inherit it: this process decides when to end."""
    # The server looks for modules in the working directory first, unless it is told not to, which older versions of
    # Python cannot be: there each process imports torch itself.
    if sys.version_info >= (3, 11):
        forkserver.set_forkserver_preload(["offline.sensitivity.matrices", "offline.writing.writer"])
    # Once it has been started: starting it unblocks SIGINT.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    safe = os.environ.get(_SAFE_PATH)
    os.environ[_SAFE_PATH] = "1"
    try:
        forkserver.ensure_running()
    finally:
        if safe is None:
            del os.environ[_SAFE_PATH]
        else:
            os.environ[_SAFE_PATH] = safe
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _without_main() -> Iterator[None]:
    """Let processes start without running the user's script, which need not have a main guard: nothing of it is sent
    to them.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def _interrupted_later() -> Iterator[None]:
    """Put off SIGINT to the end: a process that is given half of what it starts with prints a traceback."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


def _work(connection: Connection, shared_bytes: bytes, function_bytes: bytes) -> None:
    """What a process does: call the function on each item that comes, until the connection ends."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    # What concerns all of them is told by the process that they work for.
    logging.getLogger("alphaq_vllm").setLevel(logging.ERROR)
    shared = pickle.loads(shared_bytes)
    function = _loads(function_bytes, shared)
    items: SimpleQueue[bytes | None] = SimpleQueue()
    threading.Thread(target=_receive, args=(connection, items), daemon=True).start()
    while (content := items.get()) is not None:
        item = _loads(content, shared)
        try:
            outcome = function(item), None
        except Exception as error:
            outcome = None, ExceptionWithTraceback(error, error.__traceback__)
        # Not connection.send, which leaves tensors to be fetched from a process that may be gone by then.
        connection.send_bytes(pickle.dumps(outcome))


def _receive(connection: Connection, items: SimpleQueue[bytes | None]) -> None:
    """Take items as they come, and None for the end.

    What does not fit the connection's buffer is only sent while somebody receives. Without this, a process that sends a
    large result and one that sends it a large item would wait for each other for ever.
    """
    try:
        while True:
            items.put(connection.recv_bytes())
    except (EOFError, OSError):
        items.put(None)


def _end_with_parent() -> None:
    """End at once with the process that this one works for: another may take up the work again."""
    parent = parent_process()
    if parent:
        parent.join()
        os._exit(1)


def _dumps(item: object, shared: object) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, shared).dump(item)
    return buffer.getvalue()


def _loads(content: bytes, shared: object) -> Any:
    return _Unpickler(io.BytesIO(content), shared).load()


class _Pickler(pickle.Pickler):
    """Leaves the shared object out."""

    def __init__(self, buffer: io.BytesIO, shared: object) -> None:
        super().__init__(buffer)
        self._shared = shared

    def persistent_id(self, obj: object) -> str | None:
        return "shared" if obj is self._shared and obj is not None else None


class _Unpickler(pickle.Unpickler):
    """Puts the shared object in its place."""

    def __init__(self, buffer: io.BytesIO, shared: object) -> None:
        super().__init__(buffer)
        self._shared = shared

    def persistent_load(self, pid: str) -> object:
        return self._shared
