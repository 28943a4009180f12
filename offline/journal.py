"""A record of finished work that outlives any kill."""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

SECONDS_BETWEEN_COMMITS = 2.0
# A directory beside a journal, for files that its entries vouch for until the work is further.
KEPT = "kept"


class Journal:
    """Entries of JSON, one a line, appended durably every few seconds. What follows a torn line does not count.

    path: the file, made if there is none, and locked until ``close``; ``entries`` are those found in it.
    Raises ValueError if another process has it open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"{path.parent}: another run is writing it: wait for that one, or end it") from None
        self._file.seek(0)
        self.entries, length = _parse(self._file.read())
        self._file.truncate(length)
        self._pending: list[Any] = []
        self._unsynced: set[Path] = set()
        self._committed = time.monotonic()

    def record(self, entry: Any, written: Path | None = None) -> None:
        """Add an entry, which a kill in the next few seconds may lose.

        written: a file whose content the entry vouches for, made durable before it.
        """
        self._pending.append(entry)
        if written:
            self._unsynced.add(written)
        if time.monotonic() - self._committed >= SECONDS_BETWEEN_COMMITS:
            self.commit()

    def commit(self) -> None:
        """Make all entries durable."""
        content = b"".join(json.dumps(entry).encode() + b"\n" for entry in self._pending)
        unsynced = list(self._unsynced)
        # Before anything can fail: what once failed to become durable may be gone, and must not be vouched for later.
        self._pending.clear()
        self._unsynced.clear()
        for path in unsynced:
            sync(path)
        while content:
            content = content[self._file.write(content) :]
        os.fsync(self._file.fileno())
        self._committed = time.monotonic()

    def close(self) -> None:
        """Unlock the file."""
        self._file.close()


def sync(path: Path) -> None:
    """Make the content of a file, or the names in a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _parse(content: bytes) -> tuple[list[Any], int]:
    """The entries before the first torn line, and their length."""
    entries: list[Any] = []
    length = 0
    for line in content.splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n"):
            break
        entries.append(entry)
        length += len(line)
    return entries, length
