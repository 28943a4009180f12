"""Statistics of expert matrices: what the allocation of bits is decided from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial

from offline.journal import Journal
from offline.parallel import run_all
from offline.progress import Progress
from offline.quantizers.quantize import quantization_mse
from offline.sensitivity.reach import activation_of, reaches
from offline.sensitivity.spectra import choose_block_size, hill_alpha, relative_noise
from offline.source.checkpoint import Checkpoint
from offline.source.families import ExpertMatrix, by_expert, load_weight, matrix_nbytes


@dataclass(frozen=True)
class MatrixStats:
    """What is known of one matrix.

    alpha: Hill exponent of its spectrum; variance: of its weights; reach: see ``reaches``; mse: mean squared
    quantization error by width, for the widths that were measured; gain: see ``error_gains``, None if it was not
    measured.
    """

    name: str
    alpha: float
    variance: float
    reach: float
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
    experts = by_expert(matrices)
    unknown = [expert for expert in experts if any(matrix.name not in known for matrix in expert)]
    block_size = choose_block_size(matrix.shape for matrix in matrices)
    measure = partial(_describe, source, tuple(widths), group_size, quantizer, block_size)
    total, left = (_nbytes(source, some) for some in (experts, unknown))
    with Progress("measure", total, total - left) as progress, closing(run_all(measure, unknown, workers)) as results:
        for expert, measured in results:
            known.update((stats.name, stats) for stats in measured)
            if journal:
                for stats in measured:
                    journal.record({"stats": asdict(stats)})
            progress.advance(_nbytes(source, [expert]))
    return [known[matrix.name] for matrix in matrices]


def _nbytes(source: Checkpoint, experts: Iterable[Sequence[ExpertMatrix]]) -> int:
    return sum(matrix_nbytes(source, matrix) for expert in experts for matrix in expert)


def describe(
    source: Checkpoint, expert: Sequence[ExpertMatrix], widths: Sequence[int], group_size: int, quantizer: str = "mse"
) -> list[MatrixStats]:
    """``measure_matrices`` of an expert alone."""
    block_size = choose_block_size(matrix.shape for matrix in expert)
    return _describe(source, tuple(widths), group_size, quantizer, block_size, expert)


def _describe(
    source: Checkpoint,
    widths: tuple[int, ...],
    group_size: int,
    quantizer: str,
    block_size: int,
    expert: Sequence[ExpertMatrix],
) -> list[MatrixStats]:
    weights = [load_weight(source, matrix) for matrix in expert]
    described = []
    for matrix, weight, reach in zip(expert, weights, reaches(weights, activation_of(source.config)), strict=True):
        mse = quantization_mse(weight, widths, group_size, quantizer) if widths else []
        described.append(
            MatrixStats(
                name=matrix.name,
                alpha=hill_alpha(weight, block_size),
                variance=float(weight.var(correction=0)),
                reach=reach,
                numel=matrix.numel,
                mse=dict(zip(widths, mse, strict=True)),
            )
        )
    return described


def _measured(journal: Journal, widths: Sequence[int]) -> dict[str, MatrixStats]:
    """The statistics in a journal, by name."""
    known = {}
    for entry in journal.entries:
        if "stats" in entry:
            mse = {int(width): error for width, error in entry["stats"]["mse"].items()}
            if list(mse) == list(widths):
                known[entry["stats"]["name"]] = MatrixStats(**{**entry["stats"], "mse": mse})
    return known
