"""Widths from statistics, in seconds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from offline.allocation.widths import Choice, choose
from offline.operations.options import with_options
from offline.operations.width_options import WidthOptions
from offline.sensitivity.stats import Statistics, read_statistics


@with_options(WidthOptions)
def allocate(statistics: Statistics | str | Path, output: str | Path | None, options: WidthOptions) -> Choice:
    """Choose a width for every matrix.

    Args:
        statistics: What ``measure`` returned, or wrote to a file.
        output: A JSON file for the bit map ``{"<matrix name>": bits}``, or None.
        options: The fields of ``WidthOptions``, as keywords.

    Returns:
        The choice. Its ``bits`` are what the option ``bit_map`` of ``convert`` takes.

    Raises:
        ValueError: If the statistics lack the errors at a candidate width, and for a room that is too small.
        OSError: For files that cannot be read or written.
    """
    if not isinstance(statistics, Statistics):
        statistics = read_statistics(Path(statistics))
    budget, room = options.budget(statistics.has_gains), options.room()
    origin, matrices = statistics.origin, statistics.matrices
    statistics.check(
        origin.fingerprint, origin.group_size, budget.measured_widths, origin.quantizer, budget.needs_gains
    )
    if room:
        others = origin.other_tensors if room.in_memory else origin.other_files
        numel = sum(matrix.numel for matrix in matrices)
        bits = room.average_bits(others, numel, origin.group_size, budget.widths[0], budget.widths[-1])
        budget = replace(budget, average_bits=bits)
    choice = choose(matrices, budget)
    if output:
        Path(output).write_text(json.dumps(choice.bits, indent=0) + "\n")
    return choice
