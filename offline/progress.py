"""Progress on stderr, and sizes as people read and write them."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType

_SECONDS_BETWEEN_LINES, _SECONDS_BETWEEN_UPDATES = 5.0, 0.2
_CLEAR_REST_OF_LINE = "\x1b[K"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass
class Course:
    """The phases of a job by the names of their progress: seconds that each is expected to take, in order, and has."""

    expected: dict[str, float] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=dict)

    def left(self, phase: str, spent: float, left: float) -> float:
        """Seconds until the job is done, ``spent`` seconds after a part of a phase began that needs ``left`` more."""
        phases = list(self.expected)
        # A phase may come in several parts.
        parts = self.expected[phase] - self.spent.get(phase, 0.0) - spent
        return max(left, parts) + sum(self.expected[name] for name in phases[phases.index(phase) + 1 :])


_course = Course()


@contextmanager
def course() -> Iterator[Course]:
    """Have every progress within tell the time that is left of the whole job too, once it is known what to expect."""
    global _course
    before, _course = _course, Course()
    try:
        yield _course
    finally:
        _course = before


class Progress:
    """Reports how much of ``total`` bytes is done, the rate and the time left, within a with statement.

    On a terminal that is one line that changes; elsewhere it is a line every five seconds, and one at the end.
    done: bytes that were done before, which do not count for the rate. brief: say nothing if it ends sooner.
    """

    def __init__(self, what: str, total: int, done: int = 0, brief: bool = False) -> None:
        self._what, self._total, self._before, self._done = what, total, done, done
        self._start = self._last = time.monotonic()
        self._on_terminal, self._in_line, self._brief = sys.stderr.isatty(), False, brief
        self._course = _course

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._in_line:
            print(file=sys.stderr, flush=True)
        spent = self._course.spent
        spent[self._what] = spent.get(self._what, 0.0) + time.monotonic() - self._start

    def advance(self, amount: int) -> None:
        """Count ``amount`` more bytes as done."""
        self._done += amount
        now = time.monotonic()
        interval = _SECONDS_BETWEEN_UPDATES if self._on_terminal else _SECONDS_BETWEEN_LINES
        if now - self._last < interval and (self._done < self._total or self._brief):
            return
        self._last, self._brief = now, False
        rate = max(self._done - self._before, 1) / max(now - self._start, 1e-9)
        left = (self._total - self._done) / rate
        line = (
            f"{self._what}: {self._done / self._total:4.0%} of {format_bytes(self._total)}, "
            f"{format_bytes(rate)}/s, {format_seconds(left)} left"
        )
        if self._what in self._course.expected:
            line += f"; {format_seconds(self._course.left(self._what, now - self._start, left))} of the whole job"
        start, end = ("\r", _CLEAR_REST_OF_LINE) if self._on_terminal else ("", "\n")
        print(start + line, end=end, file=sys.stderr, flush=True)
        self._in_line = self._on_terminal


def format_bytes(number: float) -> str:
    """A number of bytes in decimal units.

    >>> format_bytes(12_345_678)
    '12.3 MB'
    """
    for unit in ("B", "KB", "MB"):
        if number < 999.95:
            return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} GB"


def parse_bytes(size: str | int) -> int:
    """The inverse, also of binary units; a number stays as it is.

    >>> parse_bytes("4GiB"), parse_bytes("1.5 MB"), parse_bytes("1024")
    (4294967296, 1500000, 1024)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B|)", str(size).strip().upper())
    if not match or not float(match[1]):
        raise ValueError(f"expected a size such as 4GiB or 500MB, got {size!r}")
    return int(float(match[1]) * _UNITS[match[2]])


def format_seconds(seconds: float) -> str:
    """A time in its two largest units.

    >>> format_seconds(42), format_seconds(605), format_seconds(7260)
    ('42 s', '10 min 5 s', '2 h 1 min')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
