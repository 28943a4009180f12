"""Statistics of expert matrices: what the allocation of bits is decided from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from offline.checkpoint import Checkpoint
from offline.families import ExpertMatrix
from offline.progress import Progress
from offline.quantize import quantization_mse
from offline.spectra import choose_block_size, hill_alpha
from offline.threads import one_thread


@dataclass(frozen=True)
class MatrixStats:
    """What is known of one matrix.

    alpha: Hill exponent of its spectrum; variance: of its weights; mse: mean squared quantization error by width,
    for the widths that were measured.
    """

    name: str
    alpha: float
    variance: float
    numel: int
    mse: Mapping[int, float]


@one_thread()
def measure(
    source: Checkpoint, matrices: Sequence[ExpertMatrix], widths: Sequence[int], group_size: int
) -> list[MatrixStats]:
    """Measure each matrix once, and its quantization error at each of ``widths`` (none: alpha and variance alone).

    Raises ValueError, naming the matrix, for NaN or infinite weights.
    """
    block_size = choose_block_size([matrix.shape for matrix in matrices])
    progress = Progress("measure", sum(source.spec(matrix.tensor).nbytes for matrix in matrices))
    stats = []
    for matrix in matrices:
        weight = load_weight(source, matrix)
        mse = quantization_mse(weight, widths, group_size) if widths else []
        stats.append(
            MatrixStats(
                name=matrix.name,
                alpha=hill_alpha(weight, block_size),
                variance=float(weight.var(correction=0)),
                numel=matrix.numel,
                mse=dict(zip(widths, mse, strict=True)),
            )
        )
        progress.advance(source.spec(matrix.tensor).nbytes)
    return stats


def load_weight(source: Checkpoint, matrix: ExpertMatrix) -> torch.Tensor:
    """A matrix of the source, ``[out_features, in_features]`` float32.

    Raises ValueError for NaN or infinite weights.
    """
    weight = source.load(matrix.tensor).float()
    if not bool(weight.isfinite().all()):
        bad = int((~weight.isfinite()).sum())
        raise ValueError(f"{matrix.tensor}: expected finite weights, got {bad} NaN or infinite: the source is damaged")
    return weight


def noise(stats: Sequence[MatrixStats], widths: Sequence[int], kind: str) -> np.ndarray:
    """Expected squared error per weight, ``[matrices, widths]`` float64.

    kind: ``measured``, the error of the quantizer itself; or ``analytic``, ``variance * 4 ** -width`` (AlphaQ, arXiv
    2606.04980).
    """
    if kind == "measured":
        return np.array([[matrix.mse[width] for width in widths] for matrix in stats])
    return np.outer([matrix.variance for matrix in stats], 4.0 ** -np.array(widths))
