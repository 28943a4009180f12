"""How many bits each expert matrix gets: chosen from its statistics under a budget, or read from a file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alphaq_vllm.format import SUPPORTED_BITS, SUPPORTED_GROUP_SIZES, AlphaQSpec
from offline.allocate import allocate, auto_gamma, importance
from offline.checkpoint import some
from offline.families import ExpertMatrix, Experts
from offline.header import unique
from offline.measure import MatrixStats, noise

NOISE_KINDS = ("measured", "analytic")


@dataclass(frozen=True)
class Budget:
    """What the allocation may spend, and how it weighs the matrices.

    average_bits: greatest average width, weighted by numel; widths: the candidates; gamma: exponent of the importance
    ``(alpha_median / alpha) ** gamma``, None to derive it from the spread of alpha; noise: one of ``NOISE_KINDS``.
    """

    average_bits: float = 3.5
    widths: tuple[int, ...] = (2, 3, 4)
    gamma: float | None = None
    noise: str = "measured"

    def __post_init__(self) -> None:
        unsupported = sorted(set(self.widths) - set(SUPPORTED_BITS))
        if not self.widths or unsupported or sorted(set(self.widths)) != list(self.widths):
            raise ValueError(
                f"--candidate-bits: expected ascending widths out of {SUPPORTED_BITS}, "
                f"got {','.join(map(str, self.widths))}"
            )
        if not self.widths[0] <= self.average_bits <= self.widths[-1]:
            raise ValueError(
                f"--bits: expected an average from {self.widths[0]} to {self.widths[-1]}, the least and the greatest "
                f"candidate, got {self.average_bits:g}: change --bits or --candidate-bits"
            )
        if self.gamma is not None and not 0 <= self.gamma < math.inf:
            raise ValueError(f"--gamma: expected 'auto' or a finite number from 0 up, got {self.gamma:g}")
        if self.noise not in NOISE_KINDS:
            raise ValueError(f"--noise: expected one of {NOISE_KINDS}, got {self.noise!r}")

    @property
    def measured_widths(self) -> tuple[int, ...]:
        """The widths whose quantization error has to be measured."""
        return self.widths if self.noise == "measured" else ()


@dataclass(frozen=True)
class Choice:
    """Bits by matrix name; where they were allocated, the least, median and greatest alpha, the gamma used, and the
    proven relative gap to the optimum.
    """

    bits: Mapping[str, int]
    alpha: tuple[float, float, float] | None = None
    gamma: float | None = None
    gap: float | None = None


def choose(stats: Sequence[MatrixStats], budget: Budget) -> Choice:
    """Allocate ``budget`` so that the sum of importance times noise times numel is least."""
    alphas = np.array([matrix.alpha for matrix in stats])
    numel = np.array([matrix.numel for matrix in stats])
    gamma = auto_gamma(alphas) if budget.gamma is None else budget.gamma
    costs = (importance(alphas, gamma) * numel)[:, None] * noise(stats, budget.widths, budget.noise)
    allocation = allocate(costs, numel, budget.widths, budget.average_bits)
    bits = {matrix.name: int(width) for matrix, width in zip(stats, allocation.bits, strict=True)}
    spread = float(alphas.min()), float(np.median(alphas)), float(alphas.max())
    return Choice(bits, spread, gamma, allocation.gap)


def read_bit_map(path: Path) -> dict[str, int]:
    """Read ``{"<matrix name>": bits}``. Raises ValueError for anything but names, each once, and supported widths."""
    try:
        bits = json.loads(path.read_bytes(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON object of matrix names and widths, got {error}") from error
    if not isinstance(bits, dict):
        raise ValueError(f"{path}: expected a JSON object of matrix names and widths, got {bits!r:.80}")
    for name, width in bits.items():
        if type(width) is not int or width not in SUPPORTED_BITS:
            raise ValueError(f"{path}: {name}: expected one of the widths {SUPPORTED_BITS}, got {width!r:.80}")
    return bits


def check_bit_map(bits: Mapping[str, int], matrices: Sequence[ExpertMatrix]) -> None:
    """Raise ValueError unless the bit map names every expert matrix and nothing else."""
    names = {matrix.name: None for matrix in matrices}
    missing, unknown = [name for name in names if name not in bits], [name for name in bits if name not in names]
    if missing:
        raise ValueError(f"bit map: expected all {len(names)} expert matrices, got no width for {some(missing)}")
    if unknown:
        raise ValueError(f"bit map: expected only the expert matrices of this model, got also {some(unknown)}")


def average_bits(bits: Mapping[str, int], matrices: Sequence[ExpertMatrix]) -> float:
    """The average width, weighted by numel."""
    return sum(bits[m.name] * m.numel for m in matrices) / sum(m.numel for m in matrices)


def check_group_size(group_size: int, matrices: Sequence[ExpertMatrix]) -> None:
    """Raise ValueError unless ``group_size`` is supported and divides the rows of every matrix."""
    if group_size not in SUPPORTED_GROUP_SIZES:
        raise ValueError(f"--group-size: expected one of {SUPPORTED_GROUP_SIZES}, got {group_size}")
    for matrix in matrices:
        if matrix.shape[1] % group_size:
            fitting = [g for g in SUPPORTED_GROUP_SIZES if all(m.shape[1] % g == 0 for m in matrices)]
            raise ValueError(
                f"{matrix.name}: in_features={matrix.shape[1]} is not divisible by group_size={group_size}: "
                + (f"convert with --group-size {max(fitting)}" if fitting else "no supported group size divides it")
            )


def to_spec(bits: Mapping[str, int], experts: Experts, group_size: int) -> AlphaQSpec:
    """The checkpoint's ``quantization_config`` for these widths."""
    num_bits: dict[str, dict[str, tuple[int, ...]]] = {module: {} for module in experts.modules}
    for matrix in experts.matrices:
        projections = num_bits[matrix.module]
        projections[matrix.projection] = (*projections.get(matrix.projection, ()), bits[matrix.name])
    return AlphaQSpec(group_size, num_bits)
