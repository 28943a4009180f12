"""Progress lines on stderr, and sizes as people read and write them."""

from __future__ import annotations

import argparse
import re
import sys
import time

_SECONDS_BETWEEN_LINES = 2.0
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Progress:
    """Reports how much of ``total`` bytes is done, the rate and the time left, at most every two seconds."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._start = self._last = time.monotonic()

    def advance(self, amount: int) -> None:
        """Count ``amount`` more bytes as done."""
        self._done += amount
        now = time.monotonic()
        if now - self._last < _SECONDS_BETWEEN_LINES and self._done < self._total:
            return
        self._last = now
        rate = self._done / max(now - self._start, 1e-9)
        print(
            f"{self._what}: {self._done / self._total:4.0%} of {format_bytes(self._total)}, "
            f"{format_bytes(rate)}/s, {(self._total - self._done) / rate:.0f} s left",
            file=sys.stderr,
            flush=True,
        )


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


def parse_bytes(text: str) -> int:
    """The inverse, also of binary units.

    >>> parse_bytes("4GiB"), parse_bytes("1.5 MB"), parse_bytes("1024")
    (4294967296, 1500000, 1024)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B|)", text.strip().upper())
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"expected a size such as 4GiB or 500MB, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2]])
