"""From a job to a plan: measured or given statistics, widths within the budget, and sizes that keep to a limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from alphaq_vllm.format import stored_bits_per_weight
from offline.allocation.modes import Sized
from offline.allocation.sizes import Room
from offline.allocation.widths import Budget, Choice, choose
from offline.journal import Journal
from offline.operations.measure import take_statistics
from offline.operations.plan import Job, Plan, plan
from offline.sensitivity.stats import STATS, Statistics
from offline.source.fingerprint import fingerprint


def choose_widths(
    job: Job,
    widths: Budget | Mapping[str, int],
    fixed: Mapping[str, int],
    room: Room | None,
    stats: Statistics | None,
    journal: Journal | None = None,
    text: Callable[[], Tensor] | None = None,
) -> Plan:
    """Decide on the width of every matrix.

    widths: a budget, or bits by name; fixed: bits of some matrices that a budget leaves alone; room: takes the place of
    the budget's average; stats: measured before, None to measure where need be; journal: see ``measure_matrices``;
    text: see ``error_gains``. Whatever statistics there are go with the checkpoint.
    """
    budget = widths if isinstance(widths, Budget) else None
    if budget and room:
        # Refuses what cannot be reached before anything is measured.
        others = _others_at_least(job, budget, fixed, room, {})
        room.average_bits(others, job.experts.numel, job.group_size, budget.widths[0], budget.widths[-1])
    statistics = None
    if stats or (budget and budget.needs_alpha):
        statistics = _statistics(job, budget, stats, journal, text)
    extra = {STATS: str(statistics)} if statistics else {}
    if not isinstance(widths, Budget):
        return plan(job, Choice(widths), extra)
    matrices: Sequence[Sized] = statistics.matrices if statistics else job.experts.matrices
    if room:
        return _fill(job, matrices, widths, fixed, room, extra)
    return plan(job, choose(matrices, widths, fixed), extra)


def _statistics(
    job: Job,
    budget: Budget | None,
    given: Statistics | None,
    journal: Journal | None,
    text: Callable[[], Tensor] | None,
) -> Statistics:
    """Statistics of the matrices of this job alone, measured unless they are given; budget: what must be known for."""
    widths, gains = (budget.measured_widths, budget.needs_gains) if budget else ((), False)
    if given is None:
        return take_statistics(job, widths, journal, gains, text)
    given.check(fingerprint(job.source), job.group_size, widths, job.data_free_quantizer, gains)
    matrices = given.of(matrix.name for matrix in job.experts.matrices)
    return Statistics(replace(given.origin, matrices=len(matrices)), matrices)


def _fill(
    job: Job,
    matrices: Sequence[Sized],
    budget: Budget,
    fixed: Mapping[str, int],
    room: Room,
    extra: Mapping[str, str],
) -> Plan:
    """The plan of the greatest average width that keeps to the room."""
    others = _others_at_least(job, budget, fixed, room, extra)
    while True:
        average_bits = room.average_bits(others, job.experts.numel, job.group_size, budget.widths[0], budget.widths[-1])
        planned = plan(job, choose(matrices, replace(budget, average_bits=average_bits), fixed), extra)
        # The numbers in headers and in the card are longer for some widths than for others.
        excess = planned.bytes_of(room) - room.limit
        if excess <= 0:
            return planned
        others += excess


def _others_at_least(job: Job, budget: Budget, fixed: Mapping[str, int], room: Room, extra: Mapping[str, str]) -> int:
    """Bytes of all but the experts where the least widths leave the most room."""
    bits = {**{matrix.name: budget.widths[0] for matrix in job.experts.matrices}, **fixed}
    planned = plan(job, Choice(bits), extra)
    return planned.bytes_of(room) - round(
        job.experts.numel * stored_bits_per_weight(planned.summary.bits, job.group_size) / 8
    )
