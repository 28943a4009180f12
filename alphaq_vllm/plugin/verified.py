"""Sums of a checkpoint's files that earlier starts computed, so that no start reads again what has not changed.

A file counts as unchanged while its size, its time of modification and the time that the system keeps of any change to
it are the same. Programs can set the second of them back, but not the third. Nothing else is trusted: what is kept are
numbers and sums in JSON, and anything else there counts as nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from alphaq_vllm.cache import cache_directory
from alphaq_vllm.checksums import sha256

FOLDER = "verified"
# A file that was changed this short a time ago could change again under the same time, for some file systems count time
# in steps of this many nanoseconds.
STEP = 2 * 10**9


class VerifiedSums:
    """The sums of the files in one directory, by how the files were when they were read.

    reuse: whether sums of earlier starts count. ``read`` are the files that this start had to read.
    """

    def __init__(self, directory: Path, reuse: bool) -> None:
        self.directory = directory
        self.real = str(directory.resolve())
        self.reuse = reuse
        self.read: set[str] = set()
        self.found: dict[str, list[Any]] = {}
        self.known = self._load()

    def sum_of(self, path: Path) -> str:
        """The SHA-256 sum of a file in the directory, read if it changed since that was last computed."""
        name, before = path.relative_to(self.directory).as_posix(), _state(path)
        known = self.known.get(name)
        if self.reuse and isinstance(known, list) and known[:-1] == before and isinstance(known[-1], str):
            self.found[name] = known
            return known[-1]
        self.read.add(name)
        settled = time.time_ns() - before[-1] >= STEP
        digest = sha256(path)
        # A settled file that changed while it was read is in another state by now.
        if settled:
            self.found[name] = [*before, digest]
        return digest

    def save(self, names: Iterable[str]) -> str | None:
        """Keep the sums of these files for the next start; return why that is impossible, None if it was done.

        Processes may do so at once: the last of them wins, and each writes what is true.
        """
        kept = {name: self.found[name] for name in names if name in self.found}
        if kept == self.known:
            return None
        try:
            path = self._path()
            path.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=path.parent) as folder:
                whole = Path(folder, path.name)
                whole.write_text(json.dumps({"directory": self.real, "files": kept}))
                whole.replace(path)
        except (OSError, ValueError) as error:
            return str(error)
        return None

    def _path(self) -> Path:
        return cache_directory() / FOLDER / f"{hashlib.sha256(os.fsencode(self.real)).hexdigest()[:32]}.json"

    def _load(self) -> dict[str, Any]:
        try:
            files = json.loads(self._path().read_bytes())["files"]
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return {}
        return files if isinstance(files, dict) else {}


def _state(path: Path) -> list[int]:
    """What changes with a file's contents: its size, and two times in nanoseconds, the system's own last."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
