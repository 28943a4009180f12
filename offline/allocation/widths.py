"""How many bits each expert matrix gets: chosen from its statistics under a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from types import MappingProxyType

import numpy as np

from alphaq_vllm.format import SUPPORTED_BITS
from offline.allocation import modes
from offline.allocation.costs import Sensitivity, noise
from offline.allocation.knapsack import auto_gamma, importance
from offline.allocation.modes import GRANULARITIES, Sized

NOISE_KINDS = ("propagated", "expert", "measured", "analytic")
MODES = ("alphaq", "uniform", "ratio", "random")
# Of gamma, beside noise that is an opinion of its own on how sensitive a matrix is, and a better one: alpha misled on
# all models that were measured (see docs/quality.md).
GAMMA_SHARES = {"propagated": 0.0, "expert": 0.0}


@dataclass(frozen=True)
class Budget:
    """What the widths may take, and how they are chosen.

    average_bits: greatest average width, weighted by numel (mode ``ratio`` follows ``shares`` instead); widths: the
    candidates; gamma: exponent of the importance ``(alpha_median / alpha) ** gamma``, None to derive it from the spread
    of alpha, times the share of the noise in ``GAMMA_SHARES``; noise: one of ``NOISE_KINDS``; granularity:
    what shares a width, one of ``GRANULARITIES``; mode: one of ``MODES``; shares: of experts with the greatest and the
    least width, for mode ``ratio``; seed: for ``random``.
    """

    average_bits: float = 3.5
    widths: tuple[int, ...] = (2, 3, 4)
    gamma: float | None = None
    noise: str = "measured"
    granularity: str = "projection"
    mode: str = "alphaq"
    shares: tuple[float, float] = (0.25, 0.25)
    seed: int = 0

    def __post_init__(self) -> None:
        unsupported = sorted(set(self.widths) - set(SUPPORTED_BITS))
        if not self.widths or unsupported or sorted(set(self.widths)) != list(self.widths):
            raise ValueError(
                f"`candidate_bits`: expected ascending widths out of {SUPPORTED_BITS}, "
                f"got {','.join(map(str, self.widths))}"
            )
        if not self.widths[0] <= self.average_bits <= self.widths[-1]:
            raise ValueError(
                f"`bits`: expected an average from {self.widths[0]} to {self.widths[-1]}, the least and the greatest "
                f"candidate, got {self.average_bits:g}: change `bits` or `candidate_bits`"
            )
        if self.gamma is not None and not 0 <= self.gamma < math.inf:
            raise ValueError(f"`gamma`: expected 'auto' or a finite number from 0 up, got {self.gamma:g}")
        choices = {"noise": NOISE_KINDS, "granularity": GRANULARITIES, "mode": MODES}
        for field, allowed in choices.items():
            given = getattr(self, field)
            if given not in allowed:
                raise ValueError(f"`{field}`: expected one of {allowed}, got {given!r}")
        if not (min(self.shares) >= 0 and sum(self.shares) <= 1):
            raise ValueError(f"`shares`: expected two shares from 0 up with a sum of at most 1, got {self.shares}")
        if self.mode == "ratio" and len(self.widths) != 3:
            raise ValueError(
                f"`candidate_bits`: `mode=ratio` expects three widths, got {','.join(map(str, self.widths))}"
            )

    @property
    def needs_alpha(self) -> bool:
        """Whether the matrices have to be measured."""
        return self.mode in ("alphaq", "ratio")

    @property
    def measured_widths(self) -> tuple[int, ...]:
        """The widths whose quantization error has to be measured."""
        return self.widths if self.mode == "alphaq" and self.noise != "analytic" else ()

    @property
    def needs_gains(self) -> bool:
        """Whether it has to be measured how errors propagate."""
        return self.mode == "alphaq" and self.noise == "propagated"


@dataclass(frozen=True)
class Choice:
    """Bits by matrix name, and how they came about.

    mode: one of ``MODES``, or ``manual``; alpha: the least, median and greatest, where they decided; noise, gamma, cost
    and gap (to the proven least cost, relative), where widths were allocated.
    """

    bits: Mapping[str, int]
    mode: str = "manual"
    alpha: tuple[float, float, float] | None = None
    noise: str | None = None
    gamma: float | None = None
    cost: float | None = None
    gap: float | None = None


def choose(matrices: Sequence[Sized], budget: Budget, fixed: Mapping[str, int] = MappingProxyType({})) -> Choice:
    """Choose a width for every matrix.

    matrices: their statistics where ``budget.needs_alpha``; fixed: bits by name of those that are decided already,
    which count towards the budget.
    Raises ValueError if the fixed ones leave an average that the candidates cannot have.
    """
    free = [matrix for matrix in matrices if matrix.name not in fixed]
    bits = dict(fixed)
    result = Choice(bits, budget.mode)
    if budget.needs_alpha:
        alphas = np.array([matrix.alpha for matrix in _measured(matrices)])
        result = replace(result, alpha=(float(alphas.min()), float(np.median(alphas)), float(alphas.max())))
    if not free:
        return result
    average = budget.average_bits if budget.mode == "ratio" else average_left(matrices, fixed, budget)
    if budget.mode == "alphaq":
        chosen, result = _allocate(_measured(matrices), _measured(free), budget, average, result)
    elif budget.mode == "uniform":
        chosen = modes.uniform(free, budget.widths, average)
    elif budget.mode == "ratio":
        alphas = np.array([matrix.alpha for matrix in _measured(free)])
        chosen = modes.ratio(free, alphas, budget.widths, budget.shares)
    else:
        chosen = modes.randomly(free, budget.widths, average, budget.granularity, budget.seed)
    bits |= {matrix.name: int(width) for matrix, width in zip(free, chosen, strict=True)}
    return replace(result, bits={matrix.name: bits[matrix.name] for matrix in matrices})


def _allocate(
    matrices: Sequence[Sensitivity], free: Sequence[Sensitivity], budget: Budget, average_bits: float, result: Choice
) -> tuple[np.ndarray, Choice]:
    """The widths of ``free`` whose sum of importance times noise times numel is least."""
    alphas = np.array([matrix.alpha for matrix in matrices])
    gamma = budget.gamma
    if gamma is None:
        gamma = auto_gamma(alphas, _alpha_noise(matrices)) * GAMMA_SHARES.get(budget.noise, 1.0)
    weights = dict(zip((matrix.name for matrix in matrices), importance(alphas, gamma), strict=True))
    weighted = np.array([weights[matrix.name] * matrix.numel for matrix in free])
    costs = weighted[:, None] * noise(free, budget.widths, budget.noise)
    chosen, allocation = modes.least_cost(free, costs, budget.widths, average_bits, budget.granularity)
    return chosen, replace(result, noise=budget.noise, gamma=gamma, cost=allocation.cost, gap=allocation.gap)


def _alpha_noise(matrices: Sequence[Sensitivity]) -> float:
    """The relative standard deviation of the estimate of a typical alpha."""
    return float(np.median([matrix.alpha_noise for matrix in matrices]))


def _measured(matrices: Sequence[Sized]) -> list[Sensitivity]:
    measured = [matrix for matrix in matrices if isinstance(matrix, Sensitivity)]
    if len(measured) != len(matrices):
        raise TypeError("matrices: expected their statistics, got only names and sizes: measure them first")
    return measured


def average_left(matrices: Sequence[Sized], fixed: Mapping[str, int], budget: Budget) -> float:
    """The average that the budget leaves to matrices that are not fixed, rounded down, at most the greatest candidate.

    Raises ValueError if it is below the least candidate.
    """
    free = sum(matrix.numel for matrix in matrices if matrix.name not in fixed)
    if not fixed or not free:
        return budget.average_bits
    total = sum(matrix.numel for matrix in matrices)
    spent = sum(fixed[matrix.name] * matrix.numel for matrix in matrices if matrix.name in fixed)
    left = (Fraction(str(budget.average_bits)) * total - spent) / free
    if left < budget.widths[0]:
        raise ValueError(
            f"`override`: expected to leave the other matrices an average of at least {budget.widths[0]} bits, the "
            f"least candidate, got {float(left):.4g}: raise `bits`, lower `candidate_bits` or change the overrides"
        )
    return min(math.floor(left * 10**9) / 10**9, float(budget.widths[-1]))
