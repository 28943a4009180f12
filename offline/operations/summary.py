"""What a conversion did, for people and for programs."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from offline.progress import format_bytes

_BAR_WIDTH = 40
# Names of what stays behind that are printed; JSON has all.
_LEFT = 20


@dataclass(frozen=True)
class Summary:
    """Result of a conversion, or what it will be; sizes in bytes.

    layers: with quantized experts; experts: in each of them; bits: average width of a code; stored_bits: average bits
    of a weight on disk, grids and scales included; calibration_tokens: for gptq, own_text, whether the model wrote
    them itself, and starved, the experts that none of them reached, None before they are counted; size_before and
    size_after: of the weights' files; total_size: of all files; loaded_size: of all tensors; widths: number of matrices
    by width; mode, noise, alpha, gamma and gap: see ``Choice``; drafts: how many matrices of experts that only draft
    are quantized, to draft_bits; linear_layers: how many outside the experts are quantized, to linear_bits; head_bits:
    of the matrix that predicts tokens; code: the
    source's files of Python that are taken along; left: what lies beside its weights and stays behind; room: the limit
    that the sizes keep to; seconds: that it took, or will take about if it is a dry run; phases: how many of them by
    phase, and expected, what they were thought to be before the work began; found: what a user should know of the
    source's tensors, or nothing; source_method, source_bits: how the source is quantized itself, and the bits of its
    experts' codes, None if they are not; source_rounded: whether there is a model with more.
    """

    source: str
    family: str
    layers: int
    experts: int
    matrices: int
    group_size: int
    mode: str
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
    drafts: int = 0
    draft_bits: int = 16
    linear_layers: int = 0
    linear_bits: int = 16
    head_bits: int = 16
    code: Sequence[str] = ()
    left: Sequence[str] = ()
    quantizer: str = "mse"
    calibration_tokens: int = 0
    own_text: bool = False
    noise: str | None = None
    starved: int | None = None
    output: str = ""
    total_size: int = 0
    loaded_size: int = 0
    room: str | None = None
    memory: int = 0
    seconds: float = 0.0
    phases: Mapping[str, float] = field(default_factory=dict)
    expected: Mapping[str, float] = field(default_factory=dict)
    dry_run: bool = False
    found: str = ""
    source_method: str | None = None
    source_bits: int | None = None
    source_rounded: bool = False

    @property
    def serve(self) -> str:
        """The command that serves the result."""
        return f"vllm serve {shlex.quote(self.output)} --quantization alphaq"

    @property
    def how(self) -> str:
        """How widths were chosen: the mode, and the noise where it is not the measured one."""
        return f"{self.mode}, {self.noise} noise" if self.noise not in (None, "measured") else self.mode

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {**asdict(self), "serve": self.serve}

    def __str__(self) -> str:
        rows = [
            ("read", f"{self.source}: {self.family}, {self.layers} MoE layers of {self.experts} experts, "
                     f"{self.matrices} expert matrices"),
            *([("source weights", self.source_weights)] if self.source_method else []),
            ("average bits", f"{self.bits:.4f} by codes, {self.stored_bits:.4f} as stored "
                             f"(with the grids of groups of {self.group_size})"),
            ("size", f"{_change(self.size_before, self.size_after)}"),
            ("experts only", f"{_change(self.experts_before, self.experts_after)}"),
            *([("to draft", f"{self.drafts} expert matrices at {self.draft_bits} bits, by {self.data_free}")]
              if self.drafts else []),
            *([("linear layers", f"{self.linear_layers} at {self.linear_bits} bits")] if self.linear_layers else []),
            *([("head", f"{self.head_bits} bits")] if self.head_bits < 16 else []),
        ]  # fmt: skip
        sizes = f"{self.total_size} bytes, {format_bytes(self.loaded_size)} when loaded"
        rest = [("all files", sizes), *([("room", self.room)] if self.room else [])]
        rest += [("quantizer", self._quantizer()), ("widths", self.how)]
        if self.alpha is not None:
            least, median, greatest = self.alpha
            rest.append(("alpha", f"{least:.3f} to {greatest:.3f}, median {median:.3f}"))
        if self.gamma is not None and self.gap is not None:
            rest += [("gamma", f"{self.gamma:.4g}"), ("optimality gap", f"{self.gap:.2g} of the cost, proven")]
        rest += beside(self.code, self.left)
        if self.found:
            rest.append(("source holds", self.found))
        if self.dry_run:
            rest.append(("memory", f"about {format_bytes(self.memory)}"))
            rest += [("seconds", f"about {self.seconds:.0f}"), ("would write", f"{self.output}: this was a dry run")]
        else:
            rest += [("seconds", f"{self.seconds:.1f}"), ("written", self.output), ("serve with", self.serve)]
        return "\n".join([*_lines(rows), *histogram(self.widths), *_lines(rest)])

    @property
    def data_free(self) -> str:
        """The quantizer of what is not calibrated."""
        return "mse" if self.quantizer == "gptq" else self.quantizer

    @property
    def quantizer_and_text(self) -> str:
        """The quantizer, and what it was calibrated on."""
        if not self.calibration_tokens:
            return self.quantizer
        author = " that the model wrote itself" if self.own_text else ""
        return f"{self.quantizer}, calibrated on {self.calibration_tokens} tokens{author}"

    @property
    def source_weights(self) -> str:
        """How the source is quantized itself, and what follows from it."""
        if self.source_bits is None:
            return f"{self.source_method}, but not the experts"
        rows = [f"{self.source_method}, {self.source_bits} bits for a weight of the experts"]
        if self.bits > self.source_bits:
            rows.append("more bits than that add nothing")
        if self.source_rounded:
            rows.append("errors of both roundings add up: convert the model that it was made from if you can")
        return "; ".join([*rows, "what is not quantized again becomes bfloat16"])

    def _quantizer(self) -> str:
        text = self.quantizer_and_text
        if self.starved is None:
            return text
        return f"{text}; {self.starved} of {self.layers * self.experts} experts saw none of them: quantized by mse"


def beside(code: Sequence[str], left: Sequence[str]) -> list[tuple[str, str]]:
    """Rows on what lay beside the weights."""
    rows = [("code", f"{', '.join(code)}: taken along as files, never run")] if code else []
    more = f" and {len(left) - _LEFT} more" if len(left) > _LEFT else ""
    return rows + ([("left behind", f"{', '.join(left[:_LEFT])}{more}")] if left else [])


def _lines(rows: Sequence[tuple[str, str]]) -> list[str]:
    return [f"{name + ':':16}{value}" for name, value in rows]


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
