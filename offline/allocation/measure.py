"""Statistics of expert matrices: what the allocation of bits is decided from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch

from offline.allocation.spectra import choose_block_size, hill_alpha
from offline.parallel import run_all
from offline.progress import Progress
from offline.quantizers.quantize import quantization_mse
from offline.source.checkpoint import Checkpoint
from offline.source.families import ExpertMatrix, load_matrix, matrix_nbytes
from offline.threads import compute_device
from offline.writing.journal import Journal


@dataclass(frozen=True)
class MatrixStats:
    """What is known of one matrix.

    alpha: Hill exponent of its spectrum; variance: of its weights; mse: mean squared quantization error by width,
    for the widths that were measured; gain: see ``error_gains``, None if it was not measured.
    """

    name: str
    alpha: float
    variance: float
    numel: int
    mse: Mapping[int, float]
    gain: float | None = None


def measure(
    source: Checkpoint,
    matrices: Sequence[ExpertMatrix],
    widths: Sequence[int],
    group_size: int,
    workers: int = 1,
    journal: Journal | None = None,
    quantizer: str = "mse",
) -> list[MatrixStats]:
    """Measure each matrix once, and its quantization error at each of ``widths`` (none: alpha and variance alone).

    quantizer: whose error, one of those that ``quantize`` has; workers: processes to use, which changes no result;
    journal: where statistics are kept, and found again.
    Raises ValueError, naming the matrix, for NaN or infinite weights.
    """
    known = _measured(journal, widths) if journal else {}
    unknown = [matrix for matrix in matrices if matrix.name not in known]
    block_size = choose_block_size(matrix.shape for matrix in matrices)
    describe = partial(_describe, source, tuple(widths), group_size, quantizer, block_size)
    total, left = (sum(matrix_nbytes(source, matrix) for matrix in some) for some in (matrices, unknown))
    with Progress("measure", total, total - left) as progress, closing(run_all(describe, unknown, workers)) as results:
        for matrix, stats in results:
            known[matrix.name] = stats
            if journal:
                journal.record({"stats": asdict(stats)})
            progress.advance(matrix_nbytes(source, matrix))
    return [known[matrix.name] for matrix in matrices]


def _describe(
    source: Checkpoint,
    widths: tuple[int, ...],
    group_size: int,
    quantizer: str,
    block_size: int,
    matrix: ExpertMatrix,
) -> MatrixStats:
    weight = load_weight(source, matrix)
    mse = quantization_mse(weight, widths, group_size, quantizer) if widths else []
    return MatrixStats(
        name=matrix.name,
        alpha=hill_alpha(weight, block_size),
        variance=float(weight.var(correction=0)),
        numel=matrix.numel,
        mse=dict(zip(widths, mse, strict=True)),
    )


def _measured(journal: Journal, widths: Sequence[int]) -> dict[str, MatrixStats]:
    """The statistics in a journal, by name."""
    known = {}
    for entry in journal.entries:
        if "stats" in entry:
            mse = {int(width): error for width, error in entry["stats"]["mse"].items()}
            if list(mse) == list(widths):
                known[entry["stats"]["name"]] = MatrixStats(**{**entry["stats"], "mse": mse})
    return known


def load_weight(source: Checkpoint, matrix: ExpertMatrix) -> torch.Tensor:
    """A matrix of the source, ``[out_features, in_features]`` float32, on the device that computes.

    Raises ValueError for NaN or infinite weights.
    """
    weight = load_matrix(source, matrix).to(compute_device())
    # Unlike isfinite of all of it, this takes no memory.
    if not bool(torch.stack(weight.aminmax()).isfinite().all()):
        bad = int((~weight.isfinite()).sum())
        raise ValueError(
            f"{matrix.name}.weight: expected finite weights, got {bad} NaN or infinite: the source is damaged"
        )
    return weight


def noise(stats: Sequence[MatrixStats], widths: Sequence[int], kind: str) -> np.ndarray:
    """Expected squared error per weight, ``[matrices, widths]`` float64.

    kind: ``measured``, the error of the quantizer itself; ``propagated``, as much of it as arrives at the output of the
    layer; or ``analytic``, ``variance * 4 ** -width`` (AlphaQ, arXiv 2606.04980).
    """
    if kind in ("measured", "propagated"):
        mse = np.array([[matrix.mse[width] for width in widths] for matrix in stats])
        # Gains are of whole matrices.
        return mse if kind == "measured" else mse * [[(m.gain or 0.0) / m.numel] for m in stats]
    return np.outer([matrix.variance for matrix in stats], 4.0 ** -np.array(widths))
