"""How heavy-tailed the spectrum of a weight is: PL_Alpha_Hill over FARMS blocks (AlphaQ, arXiv 2606.04980).

Only the largest tenth of the eigenvalues matters, so few blocks need a full decomposition: a Chebyshev polynomial that
is small over the rest of the spectrum turns random vectors towards the wanted eigenvectors, and the block's eigenvalues
within the span of those vectors are the wanted ones (Zhou, Saad, Tiago and Chelikowsky, "Self-consistent-field
calculations using Chebyshev-filtered subspace iteration", 2006). A few decomposed blocks of the matrix tell which
polynomial suits it; blocks that it does not separate are decomposed too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

BLOCK_SIZES = (128, 64, 32)
# A tail of fewer eigenvalues says nothing.
TAIL_FRACTION, MIN_TAIL = 0.1, 10
# Of Hill's standard deviation for independent values: for Gaussian blocks, and such with columns of different scale.
EIGENVALUE_NOISE = 0.3
# Eigenvalues below this fraction of the largest are rounding errors of a float32 decomposition, and count as it.
EIGENVALUE_FLOOR = 1e-6
# A rank-deficient matrix tends to the lower bound; an all-zero matrix and a flat spectrum have the upper.
MIN_ALPHA, MAX_ALPHA = 1 - 1 / math.log(EIGENVALUE_FLOOR), 100.0
# Beyond these the squares of weights leave the range of float32.
SAFE_PEAKS = (1e-10, 1e10)
# One block in so many is decomposed to choose the filter.
SAMPLE_STRIDE = 32
# The filter: the least number of vectors, per wanted eigenvalue of a block and as a fraction of the block size, and the
# degrees of the polynomial to choose from. A high degree separates what lies close together, and costs time.
VECTORS_PER_EIGENVALUE, VECTORS, DEGREES = 2.4, 0.25, range(3, 7)
# How many times the filter must raise the least wanted eigenvalue over the unwanted: in the sample, and in each block.
AIMED_GAIN, LEAST_GAIN = 300, 50
# How many times it may raise the largest eigenvalue over the least wanted: float32 bears this.
MAX_AMPLIFICATION = 3e5
# Elements decomposed at a time: about what a CPU's cache holds, and what keeps a GPU busy.
CPU_CHUNK, GPU_CHUNK = 2**17, 2**26


def choose_block_size(shapes: Iterable[tuple[int, int]]) -> int:
    """The largest block size that fits every matrix: alphas of different block sizes do not compare.

    Raises ValueError if there are no shapes, or a side is under 32.
    """
    smallest = min((min(shape) for shape in shapes), default=0)
    for block_size in BLOCK_SIZES:
        if block_size <= smallest:
            return block_size
    raise ValueError(
        f"shapes: expected matrices with sides of at least {BLOCK_SIZES[-1]}, got {smallest or 'no matrix'}: "
        "leave smaller matrices out of the conversion"
    )


def hill_alpha(weight: Tensor, block_size: int = 128, tail_fraction: float = TAIL_FRACTION) -> float:
    """The exponent of the power law that the largest eigenvalues of a matrix's blocks follow.

    weight: ``[out_features, in_features]``, any floating dtype, any device. It is cut into whole squares B of side
    ``block_size``, the remainder dropped (FARMS), and the n eigenvalues of all ``B @ B.T`` are pooled, largest first.
    With k = ``tail_fraction * n``, at least 10: ``alpha = 1 + k / sum(log(pool[:k] / pool[k]))`` (Hill, "A simple
    general approach to inference about the tail of a distribution", 1975), to about 3e-4 of its value, a thirtieth of
    what it varies by between Gaussian matrices of 176 blocks.
    Returns a number from MIN_ALPHA to MAX_ALPHA that does not depend on the weight's scale.
    Raises ValueError for NaN or Inf, and for a matrix with a side under ``block_size``.
    """
    if weight.dim() != 2 or min(weight.shape) < block_size:
        raise ValueError(f"weight: expected a matrix with sides of at least {block_size}, got {tuple(weight.shape)}")
    peak = torch.maximum(weight.amax(), -weight.amin()).float()
    if not peak.isfinite():
        raise ValueError("weight: expected finite values, got NaN or Inf: repair the source checkpoint")
    if not SAFE_PEAKS[0] < peak < SAFE_PEAKS[1]:
        weight = weight.float() / peak.where(peak > 0, 1)
    eigenvalues = math.prod(side // block_size for side in weight.shape) * block_size
    tail = max(MIN_TAIL, int(tail_fraction * eigenvalues))
    top = _largest_eigenvalues(weight, block_size, tail + 1).double()
    logs = top.clamp_min(EIGENVALUE_FLOOR * top[0]).log()
    mean_log_ratio = (logs[:tail].mean() - logs[tail]).item()
    # The comparison is false for the NaN of an all-zero matrix, and for a flat spectrum.
    return min(MAX_ALPHA, 1 + 1 / mean_log_ratio) if mean_log_ratio > 0 else MAX_ALPHA


def relative_noise(alpha: float, numel: int) -> float:
    """The standard deviation of ``hill_alpha`` over random matrices of one kind, relative to it, about.

    numel: of the matrix. Hill's own, for k independent values, is ``(alpha - 1) / sqrt(k)``; eigenvalues of a matrix
    keep a distance from each other and leave a share of it.
    """
    tail = max(MIN_TAIL, TAIL_FRACTION * numel / BLOCK_SIZES[0])
    return EIGENVALUE_NOISE * (alpha - 1) / alpha / math.sqrt(tail)


def _largest_eigenvalues(weight: Tensor, block_size: int, wanted: int) -> Tensor:
    """The ``wanted`` largest of the eigenvalues of all ``B @ B.T``, largest first."""
    down, across = (side // block_size for side in weight.shape)
    tiles = weight[: down * block_size, : across * block_size].unflatten(0, (down, block_size))
    tiles = tiles.unflatten(2, (across, block_size)).transpose(1, 2)
    numbers = torch.arange(down * across)
    num_vectors = 8 * math.ceil(max(VECTORS * block_size, VECTORS_PER_EIGENVALUE * wanted / len(numbers)) / 8)
    # Where the filter would save nothing, and on a GPU, whose library decomposes all blocks at once.
    if 2 * num_vectors > block_size or len(numbers) < SAMPLE_STRIDE or weight.is_cuda:
        return _decompose(tiles, numbers).flatten().topk(wanted).values
    sampled = numbers % SAMPLE_STRIDE == 0
    sample = _decompose(tiles, numbers[sampled])
    pool, rest = [sample.flatten()], numbers[~sampled]
    chosen = _choose_filter(sample, num_vectors, wanted / (len(numbers) * block_size))
    if chosen and len(rest):
        values, separated = _filter(tiles, rest, num_vectors, *chosen, pool[0], wanted)
        pool.append(values[separated].flatten())
        rest = rest[~separated]
    if len(rest):
        pool.append(_decompose(tiles, rest).flatten())
    return torch.cat(pool).topk(wanted).values


def _grams(tiles: Tensor, numbers: Tensor) -> Iterator[Tensor]:
    """``B @ B.T`` of the blocks of these numbers, some at a time: ``[blocks, block_size, block_size]`` float32."""
    chunk = CPU_CHUNK if tiles.device.type == "cpu" else GPU_CHUNK
    across, block_size = tiles.shape[1:3]
    for some in numbers.split(max(1, chunk // block_size**2)):
        blocks = tiles[some // across, some % across].float()
        yield blocks @ blocks.mT


def _decompose(tiles: Tensor, numbers: Tensor) -> Tensor:
    """All eigenvalues of these blocks, ``[blocks, block_size]`` ascending."""
    return torch.cat([torch.linalg.eigvalsh(gram) for gram in _grams(tiles, numbers)])


def _choose_filter(sample: Tensor, num_vectors: int, tail_fraction: float) -> tuple[float, int] | None:
    """The upper end of what to damp, as a multiple of a block's mean eigenvalue, and the degree of the polynomial; None
    if no filter separates the wanted eigenvalues. sample: ``[blocks, n]`` eigenvalues, ascending."""
    means = sample.mean(1)
    edge = (sample[:, -num_vectors] / means).median().item()
    least = sample.flatten().topk(math.ceil(tail_fraction * sample.numel())).values[-1]
    least, largest = ((value / means).median() / edge for value in (least, sample[:, -1]))
    gains = {degree: _gain(least, degree) for degree in DEGREES}
    degrees = [d for d in DEGREES if gains[d] > LEAST_GAIN and _gain(largest, d) / gains[d] < MAX_AMPLIFICATION]
    if not degrees:
        return None
    return edge, next((d for d in degrees if gains[d] > AIMED_GAIN), degrees[-1])


def _gain(ratio: Tensor, degree: int) -> Tensor:
    """How many times the filter raises an eigenvalue of this ratio to the upper end of the damped part."""
    return (degree * (2 * ratio - 1).clamp_min(1).acosh()).cosh()


def _filter(
    tiles: Tensor, numbers: Tensor, num_vectors: int, edge: float, degree: int, known: Tensor, wanted: int
) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues of these blocks, ``[blocks, num_vectors]`` ascending, and which blocks can be relied on.

    known: eigenvalues of other blocks, which are among the ``wanted`` largest too if they are large enough.
    """
    parts = [_filtered_eigenvalues(gram, num_vectors, edge, degree) for gram in _grams(tiles, numbers)]
    values, edges = (torch.cat(part) for part in zip(*parts, strict=True))
    least = torch.cat([known, values.flatten()]).topk(wanted).values[-1]
    gain = _gain(least / edges, degree)
    # There may be more eigenvalues above the edge than vectors: what the filter must beat is then the first left out.
    separated = gain / _gain(values[:, 0] / edges, degree) > LEAST_GAIN
    return values, separated & (_gain(values[:, -1] / edges, degree) / gain < MAX_AMPLIFICATION)


def _filtered_eigenvalues(gram: Tensor, num_vectors: int, edge: float, degree: int) -> tuple[Tensor, Tensor]:
    """Lower bounds of the largest eigenvalues, ``[blocks, num_vectors]`` ascending, and the upper ends of the damped
    parts of the spectra, ``[blocks]``. gram: ``[blocks, n, n]`` float32, overwritten."""
    edges = edge * gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(gram.dtype).tiny)
    # The damped part becomes [-1, 1], where Chebyshev polynomials are small.
    mapped = gram.mul_((2 / edges)[:, None, None])
    mapped.diagonal(dim1=-2, dim2=-1).sub_(1)
    start = torch.randn(gram.shape[-1], num_vectors, generator=torch.Generator().manual_seed(0))
    previous, vectors = start.repeat(len(gram), 1, 1), mapped @ start
    for _ in range(degree - 1):
        previous, vectors = vectors, previous.baddbmm_(mapped, vectors, beta=-1, alpha=2)
    basis = torch.linalg.qr(vectors).Q
    values = torch.linalg.eigvalsh(basis.mT @ torch.bmm(mapped, basis))
    return (values + 1) * (edges / 2)[:, None], edges
