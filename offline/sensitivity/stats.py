"""Statistics of expert matrices in a file.

The first line is a comment with a JSON object that says what was measured and how, so that statistics are never used
for another source or other settings than theirs. A table follows, one line per matrix.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from offline import VERSION
from offline.messages import some
from offline.sensitivity.matrices import MatrixStats

STATS = "alphaq_stats.csv"

_COLUMNS = ("name", "alpha", "variance", "reach", "numel")
_GAIN = "gain"
_START = "# alphaq statistics "


@dataclass(frozen=True)
class Origin:
    """What statistics are of.

    source: its name, for people; fingerprint: of it; group_size, quantizer, version: that errors were measured with;
    matrices: how many; other_files: bytes of all files of a converted checkpoint but for the experts' tensors, at most;
    other_tensors: bytes of the tensors among them.
    """

    source: str
    fingerprint: str
    group_size: int
    matrices: int
    other_files: int
    other_tensors: int
    quantizer: str = "mse"
    version: str = VERSION


@dataclass(frozen=True)
class Statistics:
    """Statistics of expert matrices, what they are of, and the file that they were read from, if any."""

    origin: Origin
    matrices: Sequence[MatrixStats]
    path: Path | None = field(default=None, compare=False)

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths whose quantization error was measured."""
        return tuple(self.matrices[0].mse)

    @property
    def has_gains(self) -> bool:
        """Whether it was measured how errors propagate."""
        return self.matrices[0].gain is not None

    @property
    def digest(self) -> str:
        """A digest of all of it."""
        return hashlib.sha256(str(self).encode()).hexdigest()

    def __str__(self) -> str:
        text = io.StringIO()
        print(_START + json.dumps(asdict(self.origin)), file=text)
        writer = csv.writer(text, lineterminator="\n")
        gain = (_GAIN,) if self.has_gains else ()
        writer.writerow([*_COLUMNS, *gain, *(f"mse_{width}" for width in self.widths)])
        # repr of a float is read back as the same float.
        for m in self.matrices:
            known = [m.name, m.alpha, m.variance, m.reach, m.numel]
            writer.writerow([*known, *([m.gain] if gain else []), *m.mse.values()])
        return text.getvalue()

    def check(
        self, fingerprint: str, group_size: int, widths: Sequence[int], quantizer: str = "mse", gains: bool = False
    ) -> None:
        """Raise ValueError unless they are of this source and these settings, and the errors of this quantizer; gains:
        whether it must be known how errors propagate.
        """
        expected = {"fingerprint": fingerprint, "group_size": group_size, "version": VERSION}
        if widths:
            expected["quantizer"] = quantizer
        for name, value in expected.items():
            if (found := getattr(self.origin, name)) != value:
                raise ValueError(
                    f"{self.path}: these statistics are out of date: {name}: expected {value}, got {found} (measured "
                    f"from {self.origin.source}): measure the model again, into another file"
                )
        if missing := [width for width in widths if width not in self.widths]:
            raise ValueError(
                f"{self.path}: expected the errors at {', '.join(map(str, widths))} bits, got none at "
                f"{', '.join(map(str, missing))}: measure again with `candidate_bits`, or use `noise=analytic`"
            )

        if gains and not self.has_gains:
            raise ValueError(
                f"{self.path}: expected the column {_GAIN} for `noise=propagated`, got none: measure again with "
                "`noise=propagated`"
            )

    def of(self, names: Iterable[str]) -> list[MatrixStats]:
        """The statistics of some matrices. Raises ValueError for one that is missing."""
        by_name = {matrix.name: matrix for matrix in self.matrices}
        names = list(names)
        if missing := [name for name in names if name not in by_name]:
            raise ValueError(
                f"{self.path}: expected statistics of all {len(names)} matrices, got none of {some(missing)}"
            )
        return [by_name[name] for name in names]


def read_statistics(path: Path) -> Statistics:
    """Read what ``str(statistics)`` wrote. Raises ValueError, naming the line, for anything else."""
    if path.is_dir():
        raise ValueError(f"{path}: expected a file of statistics, got a directory: name a file")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file: make it with python -m offline.measure MODEL -o {path}")
    first, *lines = path.read_bytes().decode(errors="replace").splitlines() or [""]
    origin = _read_origin(path, first)
    reader = csv.reader(lines)
    header = next(reader, [])
    widths = [int(column[4]) for column in header[len(_COLUMNS) :] if re.fullmatch("mse_[1-8]", column)]
    gain = [_GAIN] if _GAIN in header else []
    if header != [*_COLUMNS, *gain, *(f"mse_{width}" for width in widths)]:
        raise ValueError(f"{path}: expected the columns {','.join(_COLUMNS)} and mse_<bits>, got {','.join(header)}")
    matrices = [_read_row(path, number, row, widths, bool(gain)) for number, row in enumerate(reader, 3)]
    if len({matrix.name for matrix in matrices}) != len(matrices) or len(matrices) != origin.matrices:
        raise ValueError(
            f"{path}: expected one line for each of {origin.matrices} matrices, got {len(matrices)}: measure again"
        )
    return Statistics(origin, matrices, path)


def _read_origin(path: Path, line: str) -> Origin:
    try:
        if not line.startswith(_START):
            raise ValueError(f"{line[:40]!r}")
        entries = json.loads(line.removeprefix(_START))
        wrong = [f.name for f in fields(Origin) if type(entries.get(f.name)).__name__ != f.type]
        if wrong or len(entries) != len(fields(Origin)):
            raise ValueError(f"{wrong or sorted(entries)}")
        return Origin(**entries)
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path}: line 1: expected '{_START}' and a JSON object of what was measured, got {error}: measure again"
        ) from error


def _read_row(path: Path, number: int, row: Sequence[str], widths: Sequence[int], has_gain: bool) -> MatrixStats:
    try:
        name, alpha, variance, reach, numel, *rest = row
        gain = float(rest.pop(0)) if has_gain else None
        mse = dict(zip(widths, map(float, rest), strict=True))
        stats = MatrixStats(name, float(alpha), float(variance), float(reach), int(numel), mse, gain)
    except ValueError as error:
        raise ValueError(f"{path}: line {number}: expected a name and numbers, got {error}: measure again") from error
    numbers = (stats.alpha, stats.variance, stats.reach, stats.gain or 0.0, *stats.mse.values())
    if not (all(0 <= value < math.inf for value in numbers) and stats.alpha > 0 and stats.numel > 0):
        raise ValueError(f"{path}: line {number}: expected positive finite numbers, got {','.join(row)}: measure again")
    return stats
