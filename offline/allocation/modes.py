"""The ways to choose widths: AlphaQ's allocation, and the simpler ones that it is compared with.

Every function takes the matrices whose widths are free and returns one width for each, in their order. An expert's
matrices are those whose names agree up to the last dot.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

import numpy as np

from offline.allocation.knapsack import Allocation, allocate

GRANULARITIES = ("projection", "expert")


class Sized(Protocol):
    """What has a name and a number of weights: an expert matrix or its statistics."""

    @property
    def name(self) -> str:
        """Of the matrix."""
        ...

    @property
    def numel(self) -> int:
        """Number of weights."""
        ...


def units(matrices: Sequence[Sized], granularity: str) -> np.ndarray:
    """The number of the unit that each matrix belongs to, ``[M]`` int64: all matrices of a unit share a width."""
    if granularity == "projection":
        return np.arange(len(matrices))
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(expert_of(matrix.name), len(numbers)) for matrix in matrices], np.int64)


def expert_of(name: str) -> str:
    """The expert that a matrix belongs to.

    >>> expert_of("model.layers.0.mlp.experts.7.gate_proj")
    'model.layers.0.mlp.experts.7'
    """
    return name.rpartition(".")[0]


def least_cost(
    matrices: Sequence[Sized], costs: np.ndarray, widths: Sequence[int], average_bits: float, granularity: str
) -> tuple[np.ndarray, Allocation]:
    """The widths of least total cost within the budget, and how good they are; costs: ``[M, W]``."""
    unit = units(matrices, granularity)
    sums = np.zeros((unit[-1] + 1, len(widths)))
    np.add.at(sums, unit, costs)
    allocation = allocate(sums, _numel(matrices, unit), widths, average_bits)
    return allocation.bits[unit], allocation


def uniform(matrices: Sequence[Sized], widths: Sequence[int], average_bits: float) -> np.ndarray:
    """Experts of the two candidates next to the budget, evenly mixed: of one width where that is the budget."""
    low = max(width for width in widths if width <= average_bits)
    high = min((width for width in widths if width > low), default=low)
    unit = units(matrices, "expert")
    budget = Fraction(str(average_bits))
    chosen, used, seen = [], 0, 0
    for numel in _numel(matrices, unit).tolist():
        seen += numel
        width = high if used + high * numel <= budget * seen else low
        used += width * numel
        chosen.append(width)
    return np.array(chosen)[unit]


def ratio(
    matrices: Sequence[Sized], alphas: np.ndarray, widths: Sequence[int], shares: tuple[float, float]
) -> np.ndarray:
    """The greatest of three widths for the share of experts of least mean alpha, the least for that of greatest.

    shares: of the greatest and of the least width, rounded to whole experts; all other experts have the middle one.
    """
    low, middle, high = widths
    unit = units(matrices, "expert")
    means = np.bincount(unit, alphas) / np.bincount(unit)
    order = np.argsort(means, kind="stable")
    top, bottom = (round(share * len(means)) for share in shares)
    chosen = np.full(len(means), middle)
    chosen[order[:top]] = high
    chosen[order[len(means) - bottom :]] = low
    return chosen[unit]


def randomly(
    matrices: Sequence[Sized], widths: Sequence[int], average_bits: float, granularity: str, seed: int
) -> np.ndarray:
    """Widths by chance: any candidate for each unit, then steps of random units until the budget is kept and filled."""
    unit = units(matrices, granularity)
    numel = _numel(matrices, unit).tolist()
    budget = Fraction(str(average_bits)) * sum(numel)
    # Python keeps the sequence of this generator from version to version; NumPy does not promise to.
    generator = random.Random(seed)
    column = [generator.randrange(len(widths)) for _ in numel]
    used = sum(widths[i] * size for i, size in zip(column, numel, strict=True))
    order = [number for number in range(len(numel)) for _ in widths[1:]]
    generator.shuffle(order)
    for number in order:
        if used > budget and column[number] > 0:
            column[number] -= 1
            used -= (widths[column[number] + 1] - widths[column[number]]) * numel[number]
    for number in order:
        if column[number] < len(widths) - 1:
            price = (widths[column[number] + 1] - widths[column[number]]) * numel[number]
            if used + price <= budget:
                column[number] += 1
                used += price
    return np.array(widths)[column][unit]


def _numel(matrices: Sequence[Sized], unit: np.ndarray) -> np.ndarray:
    totals = np.zeros(unit[-1] + 1, np.int64)
    np.add.at(totals, unit, [matrix.numel for matrix in matrices])
    return totals
