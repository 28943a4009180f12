"""Statistics of expert matrices: what the allocation of bits is decided from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial

import torch

from offline.journal import Journal
from offline.parallel import run_all
from offline.progress import Progress
from offline.quantizers.quantize import quantization_mse
from offline.sensitivity.spectra import choose_block_size, hill_alpha, relative_noise
from offline.source.checkpoint import Checkpoint
from offline.source.families import ExpertMatrix, load_weight, matrix_nbytes


@dataclass(frozen=True)
class MatrixStats:
    """What is known of one matrix.

    alpha: Hill exponent of its spectrum; variance, kurtosis: of its weights; mse: mean squared quantization error by
    width, for the widths that were measured; gain: see ``error_gains``, None if it was not measured.
    """

    name: str
    alpha: float
    variance: float
    kurtosis: float
    numel: int
    mse: Mapping[int, float]
    gain: float | None = None

    @property
    def alpha_noise(self) -> float:
        """Relative standard deviation of the estimate of alpha."""
        return relative_noise(self.alpha, self.numel)


def measure_matrices(
    source: Checkpoint,
    matrices: Sequence[ExpertMatrix],
    widths: Sequence[int],
    group_size: int,
    workers: int = 1,
    journal: Journal | None = None,
    quantizer: str = "mse",
) -> list[MatrixStats]:
    """Measure each matrix once, and its quantization error at each of ``widths`` (none: the other statistics alone).

    quantizer: whose error, one of those that ``quantize`` has; workers: processes to use, which changes no result;
    journal: where statistics are kept, and found again.
    Raises ValueError, naming the matrix, for NaN or infinite weights.
    """
    known = _measured(journal, widths) if journal else {}
    unknown = [matrix for matrix in matrices if matrix.name not in known]
    block_size = choose_block_size(matrix.shape for matrix in matrices)
    measure = partial(_describe, source, tuple(widths), group_size, quantizer, block_size)
    total, left = (sum(matrix_nbytes(source, matrix) for matrix in some) for some in (matrices, unknown))
    with Progress("measure", total, total - left) as progress, closing(run_all(measure, unknown, workers)) as results:
        for matrix, stats in results:
            known[matrix.name] = stats
            if journal:
                journal.record({"stats": asdict(stats)})
            progress.advance(matrix_nbytes(source, matrix))
    return [known[matrix.name] for matrix in matrices]


def describe(
    source: Checkpoint, matrix: ExpertMatrix, widths: Sequence[int], group_size: int, quantizer: str = "mse"
) -> MatrixStats:
    """``measure_matrices`` of a matrix alone."""
    return _describe(source, tuple(widths), group_size, quantizer, choose_block_size([matrix.shape]), matrix)


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
        kurtosis=kurtosis(weight),
        numel=matrix.numel,
        mse=dict(zip(widths, mse, strict=True)),
    )


def kurtosis(weight: torch.Tensor) -> float:
    """The fourth standardized moment of a weight, any shape: 3 for Gaussian values, which is also what equal ones have.

    It does not depend on the weight's scale.
    """
    centred = weight.float() - weight.float().mean()
    peak = float(centred.abs().max())
    if not peak > 0:
        return 3.0
    squares = (centred / peak).square()
    return float(squares.square().mean()) / float(squares.mean()) ** 2


def _measured(journal: Journal, widths: Sequence[int]) -> dict[str, MatrixStats]:
    """The statistics in a journal, by name."""
    known = {}
    for entry in journal.entries:
        if "stats" in entry:
            mse = {int(width): error for width, error in entry["stats"]["mse"].items()}
            if list(mse) == list(widths):
                known[entry["stats"]["name"]] = MatrixStats(**{**entry["stats"], "mse": mse})
    return known
