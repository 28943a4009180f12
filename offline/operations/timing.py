"""How long a conversion will take."""

from __future__ import annotations

import time

import torch

from offline.operations.plan import Plan
from offline.quantizers.quantize import quantize
from offline.source.families import load_weight
from offline.threads import compute_device, one_thread

# A group's search takes the same time whatever is in it, so few rows tell.
_ROWS, _RUNS = 64, 3


def estimate_seconds(plan: Plan) -> float:
    """Seconds that quantizing will take, from quantizing some rows of a matrix at every width here and now."""
    job, matrices = plan.job, plan.job.experts.matrices
    rows = load_weight(job.source, matrices[0])[:_ROWS]
    seconds = 0.0
    for num_bits in plan.summary.widths:
        per_weight = _seconds_per_weight(rows, num_bits, job.group_size, job.data_free_quantizer)
        seconds += per_weight * sum(matrix.numel for matrix in matrices if plan.bits[matrix.name] == num_bits)
    return seconds / job.workers


def seconds_without_weights(columns: int, numel: int, bits: float, group_size: int, workers: int) -> float:
    """Seconds that quantizing by ``mse`` will take, from quantizing random rows here and now.

    columns: of a row; numel: weights to quantize; bits: their average width, which is taken for that of all.
    """
    rows = torch.randn(_ROWS, columns, device=compute_device())
    return _seconds_per_weight(rows, max(1, round(bits)), group_size, "mse") * numel / workers


@one_thread()
def _seconds_per_weight(rows: torch.Tensor, num_bits: int, group_size: int, quantizer: str) -> float:
    seconds = []
    # The first run also sets things up.
    for _ in range(_RUNS):
        start = time.monotonic()
        quantize(rows, num_bits, group_size, quantizer)
        seconds.append(time.monotonic() - start)
    return min(seconds) / rows.numel()
