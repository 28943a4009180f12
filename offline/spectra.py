"""How heavy-tailed the spectrum of a weight is: PL_Alpha_Hill over FARMS blocks (AlphaQ, arXiv 2606.04980)."""

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
# Elements decomposed at a time: about what a CPU's cache holds, and what keeps a GPU busy.
CPU_CHUNK, GPU_CHUNK = 2**18, 2**26


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
    general approach to inference about the tail of a distribution", 1975).
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
    pool = torch.cat([torch.linalg.eigvalsh(blocks @ blocks.mT).flatten() for blocks in _blocks(weight, block_size)])
    tail = max(MIN_TAIL, int(tail_fraction * len(pool)))
    top = pool.topk(tail + 1).values.double()
    logs = top.clamp_min(EIGENVALUE_FLOOR * top[0]).log()
    mean_log_ratio = (logs[:tail].mean() - logs[tail]).item()
    # The comparison is false for the NaN of an all-zero matrix, and for a flat spectrum.
    return min(MAX_ALPHA, 1 + 1 / mean_log_ratio) if mean_log_ratio > 0 else MAX_ALPHA


def _blocks(weight: Tensor, block_size: int) -> Iterator[Tensor]:
    """The blocks, some at a time: ``[blocks, block_size, block_size]`` float32."""
    down, across = (side // block_size for side in weight.shape)
    tiles = weight[: down * block_size, : across * block_size].unflatten(0, (down, block_size))
    tiles = tiles.unflatten(2, (across, block_size)).transpose(1, 2)
    chunk = CPU_CHUNK if weight.device.type == "cpu" else GPU_CHUNK
    for rows in tiles.split(max(1, chunk // (across * block_size**2))):
        yield rows.reshape(-1, block_size, block_size).float()
