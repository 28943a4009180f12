"""Which width each matrix gets: a multiple-choice knapsack under a budget of bits.

The Lagrangian relaxation with one price per bit is a bound on every allocation. An allocation lies above it by its
*excess*: the price of the bits that it leaves unused, and for each matrix how far its cost plus the price of its bits
lies above the least possible. The excess is the proven gap, and also says which choices cannot be part of anything
better (Pisinger, "A minimal algorithm for the multiple-choice knapsack problem", 1995).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from alphaq_vllm.format import SUPPORTED_BITS

# The best gammas in the AlphaQ paper (arXiv 2606.04980), about 12, 14 and 200, times the std of log alpha.
GAMMA_TIMES_SPREAD = 1.2
# Whatever the noise of alpha: about twice the largest of them.
MAX_GAMMA = 400.0
# Importances stay within exp(+-this), so that costs neither overflow nor vanish.
MAX_LOG_IMPORTANCE = 200.0
# The last improvement enumerates this many matrices, and keeps this many partial allocations.
CORE, STATES = 64, 2048


@dataclass(frozen=True)
class Allocation:
    """Widths, and how good they are.

    bits: ``[M]`` int64. average_bits: weighted by numel. cost: the sum of the chosen costs. lower_bound: no allocation
    within the budget costs less. gap: ``(cost - lower_bound) / cost``.
    """

    bits: np.ndarray
    average_bits: float
    cost: float
    lower_bound: float
    gap: float


def importance(alphas: np.ndarray, gamma: float) -> np.ndarray:
    """The weight of each matrix's error, ``(median(alphas) / alphas) ** gamma``, kept within exp(+-200).

    Source: AlphaQ, arXiv 2606.04980. Raises ValueError for an alpha that is not positive and finite.
    """
    if not math.isfinite(gamma) or gamma < 0:
        raise ValueError(f"gamma: expected a finite number of at least 0, got {gamma}: set `gamma=auto` or a number")
    log_alphas = _log(alphas)
    return np.exp(np.clip(gamma * (np.median(log_alphas) - log_alphas), -MAX_LOG_IMPORTANCE, MAX_LOG_IMPORTANCE))


def auto_gamma(alphas: np.ndarray, alpha_noise: float = 0.0) -> float:
    """The gamma that gives log importances the spread that served the paper's models best.

    That is ``1.2 / std(log alphas)``, at most 400. By ``alpha_noise``, the relative standard deviation of an estimate
    of alpha, log alphas are taken to be shrunk towards their mean by their reliability (true over observed variance)
    while their spread is that of the true ones: gamma falls to 0 where all spread is noise, and never exceeds
    ``0.6 / alpha_noise``. Without spread it is 0.
    """
    spread = float(np.std(_log(alphas)))
    # Rounding alone leaves equal alphas with a spread of this order.
    if spread <= 1e-12:
        return 0.0
    reliability = max(0.0, 1 - (alpha_noise / spread) ** 2)
    return min(MAX_GAMMA, GAMMA_TIMES_SPREAD / spread * math.sqrt(reliability))


def allocate(costs: np.ndarray, numel: np.ndarray, widths: Sequence[int], average_bits: float) -> Allocation:
    """Choose one width per matrix, with the least total cost within the budget.

    costs: ``[M, W]``, of giving matrix i the width ``widths[w]``; at least 0, of any scale, convex or not.
    numel: ``[M]``, weights per matrix, positive integers. widths: ascending. average_bits: the budget, weighted by
    numel; ``3.3`` means exactly 33/10.
    The gap is proven. A few dozen matrices are solved exactly. Ties go to the matrix of lower index.
    Raises ValueError for a budget outside the widths, an unsupported width, and a cost that is no number.
    """
    costs, numel = np.asarray(costs, np.float64), np.asarray(numel, np.int64)
    _check(costs, numel, widths, average_bits)
    sizes = numel[:, None] * np.asarray(widths, np.int64)
    budget = math.floor(Fraction(str(float(average_bits))) * int(numel.sum()))
    chosen, price = _greedy(costs, sizes, budget)
    priced = costs + price * sizes
    excess = priced - priced.min(1, keepdims=True)
    chosen, total_excess = _improve(excess, sizes, chosen, price, budget)
    rows = np.arange(len(costs))
    cost = float(costs[rows, chosen].sum())
    return Allocation(
        bits=np.asarray(widths, np.int64)[chosen],
        average_bits=int(sizes[rows, chosen].sum()) / int(numel.sum()),
        cost=cost,
        lower_bound=cost - total_excess,
        gap=total_excess / cost if cost else 0.0,
    )


def _log(alphas: np.ndarray) -> np.ndarray:
    alphas = np.asarray(alphas, np.float64)
    if not alphas.size or not np.all(np.isfinite(alphas) & (alphas > 0)):
        raise ValueError("alphas: expected positive finite numbers, got others: measure the model again")
    return np.log(alphas)


def _check(costs: np.ndarray, numel: np.ndarray, widths: Sequence[int], average_bits: float) -> None:
    unsupported = [b for b in widths if b not in SUPPORTED_BITS]
    if unsupported or not widths or list(widths) != sorted(set(widths)):
        raise ValueError(
            f"widths: expected some of {SUPPORTED_BITS}, ascending, got {list(widths)}: see `candidate_bits`"
        )
    if costs.ndim != 2 or costs.shape != (len(numel), len(widths)) or not costs.size:
        raise ValueError(f"costs: expected shape {(len(numel), len(widths))} and not empty, got {costs.shape}")
    if not np.all(np.isfinite(costs) & (costs >= 0)):
        row = int(np.argmin(np.all(np.isfinite(costs) & (costs >= 0), axis=1)))
        raise ValueError(f"costs: expected finite numbers of at least 0, got {costs[row].tolist()} for matrix {row}")
    if numel.min() <= 0:
        raise ValueError(f"numel: expected positive integers, got {int(numel.min())}")
    if not (math.isfinite(average_bits) and average_bits > 0):
        raise ValueError(f"average_bits: expected a positive number, got {average_bits}: set `bits`")
    if not widths[0] <= average_bits <= widths[-1]:
        raise ValueError(
            f"average_bits: expected {widths[0]} to {widths[-1]}, the range of the widths {list(widths)}, got "
            f"{average_bits}: change `bits`, or `candidate_bits` to include a width beyond it"
        )


def _greedy(costs: np.ndarray, sizes: np.ndarray, budget: int) -> tuple[np.ndarray, float]:
    """Widths (column numbers) from taking the steps along each lower convex hull while they fit, best gain per bit
    first, and the gain per bit of the first step that does not fit: the price that maximizes the Lagrangian bound.
    """
    matrix, column, size, rate = _hull_steps(costs, sizes)
    chosen = np.zeros(len(costs), np.int64)
    slack, price = budget - int(sizes[:, 0].sum()), None
    while len(matrix):
        fitting = int(np.searchsorted(np.cumsum(size), slack, side="right"))
        # Steps of one matrix are in order, and the last assignment to a repeated index is the one that stays.
        chosen[matrix[:fitting]] = column[:fitting]
        slack -= int(size[:fitting].sum())
        if price is None:
            price = float(rate[fitting]) if fitting < len(rate) else 0.0
        rest = slice(fitting, None)
        blocked = np.zeros(len(costs), bool)
        blocked[matrix[rest][size[rest] > slack]] = True
        keep = ~blocked[matrix[rest]]
        matrix, column, size = matrix[rest][keep], column[rest][keep], size[rest][keep]
    return chosen, price or 0.0


def _hull_steps(costs: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """All steps between neighbouring corners of the falling part of the lower hulls, by falling gain per bit:
    the matrix, the column stepped to, the bits it takes, the gain per bit."""
    rows, corner = np.arange(len(costs)), np.zeros(len(costs), np.int64)
    previous = np.full(len(costs), np.inf)
    steps: list[tuple[np.ndarray, ...]] = [(rows[:0], corner[:0], corner[:0], previous[:0])]
    for _ in range(costs.shape[1] - 1):
        bits = sizes[rows] - sizes[rows, corner][:, None]
        gains = costs[rows, corner][:, None] - costs[rows]
        rates = np.where(bits > 0, gains / np.where(bits > 0, bits, 1), -np.inf)
        # Of equal rates the farthest: the hull has no corner in between.
        corner = costs.shape[1] - 1 - np.argmax(rates[:, ::-1], axis=1)
        every = np.arange(len(rows))
        # Rounding must not let a later step of a matrix overtake an earlier one.
        rate, bits = np.minimum(rates[every, corner], previous), bits[every, corner]
        rising = rate > 0
        rows, corner, previous = rows[rising], corner[rising], rate[rising]
        steps.append((rows, corner, bits[rising], previous))
    matrix, column, size, rate = (np.concatenate(part) for part in zip(*steps, strict=True))
    order = np.argsort(-rate, kind="stable")
    return matrix[order], column[order], size[order], rate[order]


def _improve(
    excess: np.ndarray, sizes: np.ndarray, chosen: np.ndarray, price: float, budget: int
) -> tuple[np.ndarray, float]:
    """The best change of the matrices that are cheapest to change, by dynamic programming over partial allocations,
    and its excess. It is the best of all if no more than CORE matrices could change and STATES was enough."""
    rows = np.arange(len(excess))
    used = int(sizes[rows, chosen].sum())
    limit = float(excess[rows, chosen].sum() + price * (budget - used))
    allowed = excess <= limit
    allowed[rows, chosen] = False
    nearest = np.where(allowed, excess, np.inf).min(1)
    core = np.argsort(nearest, kind="stable")[:CORE]
    core = core[np.isfinite(nearest[core])]
    allowed[rows, chosen] = True

    # Bits relative to the incumbent, so that no precision is lost on those of the matrices that stay.
    change = sizes[core] - sizes[core, chosen[core]][:, None]
    least = np.append(np.where(allowed[core], change, 0).min(1, initial=0)[::-1].cumsum()[::-1], 0)
    most = np.append(np.where(allowed[core], change, 0).max(1, initial=0)[::-1].cumsum()[::-1], 0)
    slack = budget - used
    bits = np.zeros(1, np.int64)
    above = np.array([np.delete(excess[rows, chosen], core).sum()])
    history: list[tuple[np.ndarray, np.ndarray]] = []
    for k, matrix in enumerate(core):
        columns = np.flatnonzero(allowed[matrix])
        new_bits = (bits[:, None] + change[k, columns]).ravel()
        new_above = (above[:, None] + excess[matrix, columns]).ravel()
        unused = np.maximum(0, slack - new_bits - most[k + 1])
        hopeful = (new_bits + least[k + 1] <= slack) & (new_above + price * unused <= limit)
        kept = _undominated(new_bits, new_above, price, np.flatnonzero(hopeful))
        bits, above = new_bits[kept], new_above[kept]
        history.append((kept // len(columns), columns[kept % len(columns)]))
    totals = above + price * (slack - bits)
    if not len(totals) or totals.min() >= limit:
        return chosen, limit
    state, improved = int(np.argmin(totals)), chosen.copy()
    for matrix, (parents, columns) in zip(core[::-1], history[::-1], strict=True):
        improved[matrix], state = columns[state], parents[state]
    return improved, float(totals.min())


def _undominated(bits: np.ndarray, above: np.ndarray, price: float, states: np.ndarray) -> np.ndarray:
    """The states that no other one beats in both bits and cost, at most STATES, nearest to the bound first."""
    cost = above - price * bits
    states = states[np.lexsort((cost[states], bits[states]))]
    best_before = np.append(np.inf, np.minimum.accumulate(cost[states])[:-1])
    states = states[cost[states] < best_before]
    return states[np.argsort(above[states], kind="stable")[:STATES]]
