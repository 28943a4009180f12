"""How long a conversion will take."""

from __future__ import annotations

import time

from offline.operations.plan import Plan
from offline.quantizers.quantize import quantize
from offline.source.families import load_weight
from offline.threads import one_thread

# A group's search takes the same time whatever is in it, so few rows tell.
_ROWS = 64


@one_thread()
def estimate_seconds(plan: Plan) -> float:
    """Seconds that quantizing will take, from quantizing some rows of a matrix at every width here and now."""
    job, matrices = plan.job, plan.job.experts.matrices
    rows = load_weight(job.source, matrices[0])[:_ROWS]
    seconds = 0.0
    for num_bits in plan.summary.widths:
        start = time.monotonic()
        quantize(rows, num_bits, job.group_size, job.data_free_quantizer)
        per_weight = (time.monotonic() - start) / rows.numel()
        seconds += per_weight * sum(matrix.numel for matrix in matrices if plan.bits[matrix.name] == num_bits)
    return seconds / job.workers
