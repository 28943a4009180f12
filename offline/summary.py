"""What a conversion did, for people and for programs."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from offline.progress import format_bytes

_BAR_WIDTH = 40


@dataclass(frozen=True)
class Summary:
    """Result of a conversion; sizes in bytes.

    layers: with routed experts; experts: in each of them; bits: average width of a code; stored_bits: average bits
    of a weight on disk, scale and zero point included; widths: number of matrices by width; alpha, gamma and gap: see
    ``Choice``.
    """

    source: str
    output: str
    family: str
    layers: int
    experts: int
    matrices: int
    group_size: int
    bits: float
    stored_bits: float
    size_before: int
    size_after: int
    experts_before: int
    experts_after: int
    widths: Mapping[int, int]
    alpha: tuple[float, float, float] | None
    gamma: float | None
    gap: float | None
    seconds: float

    @property
    def serve(self) -> str:
        """The command that serves the result."""
        return f"vllm serve {shlex.quote(self.output)} --quantization alphaq"

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {**asdict(self), "serve": self.serve}

    def __str__(self) -> str:
        rows = [
            ("read", f"{self.source}: {self.family}, {self.layers} MoE layers of {self.experts} experts, "
                     f"{self.matrices} expert matrices"),
            ("average bits", f"{self.bits:.4f} by codes, {self.stored_bits:.4f} as stored "
                             f"(with scales and zero points of groups of {self.group_size})"),
            ("size", f"{_change(self.size_before, self.size_after)}"),
            ("experts only", f"{_change(self.experts_before, self.experts_after)}"),
        ]  # fmt: skip
        if self.alpha is not None and self.gamma is not None and self.gap is not None:
            least, median, greatest = self.alpha
            rows += [
                ("alpha", f"{least:.3f} to {greatest:.3f}, median {median:.3f}"),
                ("gamma", f"{self.gamma:.4g}"),
                ("optimality gap", f"{self.gap:.2g} of the cost, proven"),
            ]
        rows += [("seconds", f"{self.seconds:.1f}"), ("written", self.output), ("serve with", self.serve)]
        lines = [f"{name + ':':16}{value}" for name, value in rows]
        return "\n".join(lines[:4] + histogram(self.widths) + lines[4:])


def histogram(widths: Mapping[int, int]) -> list[str]:
    """A bar for each width, as long as its share of the matrices.

    >>> print(*histogram({2: 1, 3: 3}), sep="\\n")
      2 bits: ##########                               1 (25 %)
      3 bits: ##############################           3 (75 %)
    """
    total = sum(widths.values())
    return [
        f"{width:3} bits: {'#' * round(_BAR_WIDTH * count / total):{_BAR_WIDTH}} {count} ({100 * count / total:.0f} %)"
        for width, count in sorted(widths.items())
    ]


def count_widths(bits: Mapping[str, int]) -> dict[int, int]:
    """Number of matrices by width, ascending."""
    return dict(sorted(Counter(bits.values()).items()))


def _change(before: int, after: int) -> str:
    return f"{format_bytes(before)} -> {format_bytes(after)} ({after / before:.0%})"
