"""How heavy-tailed the spectrum of a weight is: PL_Alpha_Hill over FARMS blocks (AlphaQ, arXiv 2606.04980).

Only the largest tenth of the eigenvalues matters, so few blocks need a full decomposition: a Chebyshev polynomial that
is small over the rest of the spectrum turns random vectors towards the wanted eigenvectors, and the block's eigenvalues
within the span of those vectors are the wanted ones (Zhou, Saad, Tiago and Chelikowsky, "Self-consistent-field
calculations using Chebyshev-filtered subspace iteration", 2006). Blocks that this cannot separate are decomposed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

BLOCK_SIZES = (128, 64, 32)
# A tail of fewer eigenvalues says nothing.
MIN_TAIL = 10
# Eigenvalues below this fraction of the largest are rounding errors of a float32 decomposition, and count as it.
EIGENVALUE_FLOOR = 1e-6
# A rank-deficient matrix tends to the lower bound; an all-zero matrix and a flat spectrum have the upper.
MIN_ALPHA, MAX_ALPHA = 1 - 1 / math.log(EIGENVALUE_FLOOR), 100.0
# Beyond these the squares of weights leave the range of float32.
SAFE_PEAKS = (1e-10, 1e10)
# The filter: its degree, the least number of vectors as a fraction of the block size and per wanted eigenvalue, and the
# upper end of what it damps in mean eigenvalues (in a Gaussian block about as many lie above as there are vectors).
DEGREE, VECTORS, VECTORS_PER_EIGENVALUE, EDGE = 4, 0.3, 3, 1.3
# It separates eigenvalues this many times as large as what it damps, where they take up half the vectors at most.
MARGIN = 1.5
# It raises the largest eigenvalue over the least wanted one by their ratio to the power DEGREE: float32 bears this.
MAX_AMPLIFICATION = 1e5
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


def hill_alpha(weight: Tensor, block_size: int = 128, tail_fraction: float = 0.1) -> float:
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


def _largest_eigenvalues(weight: Tensor, block_size: int, wanted: int) -> Tensor:
    """The ``wanted`` largest of the eigenvalues of all ``B @ B.T``, largest first."""
    num_blocks = math.prod(side // block_size for side in weight.shape)
    num_vectors = 8 * math.ceil(max(VECTORS * block_size, VECTORS_PER_EIGENVALUE * wanted / num_blocks) / 8)
    # Where the filter would save little, and on a GPU, whose library decomposes all blocks at once.
    if 2 * num_vectors > block_size or weight.is_cuda:
        pool = [torch.linalg.eigvalsh(blocks @ blocks.mT).flatten() for blocks in _blocks(weight, block_size)]
        return torch.cat(pool).topk(wanted).values
    filtered = [_filtered_eigenvalues(blocks @ blocks.mT, num_vectors) for blocks in _blocks(weight, block_size)]
    values, edges = (torch.cat(parts) for parts in zip(*filtered, strict=True))
    least = values.flatten().topk(wanted).values[-1]
    separated = (least > MARGIN * edges) & (values[:, num_vectors // 2] < least)
    separated &= (values[:, -1] / least) ** DEGREE < MAX_AMPLIFICATION
    pool, rest = [values[separated].flatten()], ~separated
    if rest.any():
        for blocks, chosen in zip(_blocks(weight, block_size), rest.split([len(v) for v, _ in filtered]), strict=True):
            blocks = blocks[chosen]
            pool.append(torch.linalg.eigvalsh(blocks @ blocks.mT).flatten())
    return torch.cat(pool).topk(wanted).values


def _filtered_eigenvalues(gram: Tensor, num_vectors: int) -> tuple[Tensor, Tensor]:
    """Lower bounds of the largest eigenvalues, ``[blocks, num_vectors]`` ascending, and the upper ends of the damped
    parts of the spectra, ``[blocks]``. gram: ``[blocks, n, n]`` float32, overwritten."""
    edges = EDGE * gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(gram.dtype).tiny)
    # The damped part becomes [-1, 1], where Chebyshev polynomials are small.
    mapped = gram.mul_((2 / edges)[:, None, None])
    mapped.diagonal(dim1=-2, dim2=-1).sub_(1)
    start = torch.randn(gram.shape[-1], num_vectors, generator=torch.Generator().manual_seed(0))
    previous = start.repeat(len(gram), 1, 1)
    vectors = torch.bmm(mapped, previous)
    for _ in range(DEGREE - 1):
        previous, vectors = vectors, previous.baddbmm_(mapped, vectors, beta=-1, alpha=2)
    basis = torch.linalg.qr(vectors).Q
    values = torch.linalg.eigvalsh(basis.mT @ torch.bmm(mapped, basis))
    return (values + 1) * (edges / 2)[:, None], edges


def _blocks(weight: Tensor, block_size: int) -> Iterator[Tensor]:
    """The blocks, some at a time: ``[blocks, block_size, block_size]`` float32."""
    down, across = (side // block_size for side in weight.shape)
    tiles = weight[: down * block_size, : across * block_size].unflatten(0, (down, block_size))
    tiles = tiles.unflatten(2, (across, block_size)).transpose(1, 2)
    chunk = CPU_CHUNK if weight.device.type == "cpu" else GPU_CHUNK
    for rows in tiles.split(max(1, chunk // (across * block_size**2))):
        yield rows.reshape(-1, block_size, block_size).float()
