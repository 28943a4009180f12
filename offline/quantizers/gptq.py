"""GPTQ: rounding that makes up for itself, column by column, on the inputs that a matrix really sees.

Frantar et al., *GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers*, arXiv 2210.17323.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alphaq_vllm.packing import pack
from offline.quantizers import native
from offline.quantizers.grids import mse_grid
from offline.quantizers.groups import quantize_groups
from offline.quantizers.quantize import Quantized, check_matrix, chunks

# Share of the mean diagonal that is added to the diagonal of X^T X, and its growth until a factor exists.
DAMPING, DAMPING_GROWTH = 0.03, 10.0
# Of inputs, and of their products, that are looked at together; and of the blocks of a symmetric or triangular matrix.
_ROWS, _BLOCK = 1024, 512


def inverse_factor(inputs: Tensor) -> Tensor:
    """The upper triangular U with ``U.T @ U = inverse(H)``, where H is ``inputs.T @ inputs`` with less of what only a
    sample has off the diagonal, and damping on it.

    inputs: ``[tokens, in_features]`` float32; fewer tokens than features are enough.
    Returns ``[in_features, in_features]`` float32. Raises ValueError for NaN or Inf.
    """
    hessian = _products(inputs)
    diagonal = hessian.diagonal()
    squares = diagonal.clone()
    hessian.mul_(1 - sampling_share(inputs, hessian))
    diagonal.copy_(squares)
    damping = DAMPING * diagonal.mean()
    if not damping:
        return torch.eye(len(hessian), device=hessian.device)
    # L of the reversed matrix, reversed again, is an upper R with R @ R.T = hessian; the inverse of R is upper as well.
    # Each of them is let go as soon as the next is there.
    hessian = hessian.flip(0, 1)
    diagonal, failed = hessian.diagonal(), True
    while failed:
        if not bool(damping.isfinite()):
            raise ValueError("calibration: expected finite activations, got NaN or Inf: the source is damaged")
        diagonal.add_(damping)
        lower, info = torch.linalg.cholesky_ex(hessian)
        failed, damping = bool(info), damping * DAMPING_GROWTH
    del hessian, diagonal
    upper = lower.flip(0, 1)
    del lower
    _invert_upper_(upper)
    return upper


def _products(inputs: Tensor) -> Tensor:
    """``inputs.T @ inputs``, of which only one half is computed, and copied to the other."""
    products = inputs.new_empty(inputs.shape[1], inputs.shape[1])
    for start in range(0, len(products), _BLOCK):
        end = start + _BLOCK
        products[start:end, start:] = inputs[:, start:end].T @ inputs[:, start:]
        products[end:, start:end] = products[start:end, end:].T
    return products


def _invert_upper_(matrix: Tensor) -> None:
    """Invert an upper triangular matrix in its place, by its quarters: the general solver computes the zeros too."""
    if len(matrix) <= _BLOCK:
        eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        matrix.copy_(torch.linalg.solve_triangular(matrix, eye, upper=True))
        return
    half = len(matrix) // 2
    first, corner, second = matrix[:half, :half], matrix[:half, half:], matrix[half:, half:]
    _invert_upper_(first)
    _invert_upper_(second)
    corner.copy_((first @ corner @ second).neg_())


def sampling_share(inputs: Tensor, products: Tensor) -> float:
    """The share of the squared correlations between features that comes from having only these tokens: from 0, for very
    many, to 1. Without so much of each correlation their expected error is least.

    Schäfer and Strimmer, *A Shrinkage Approach to Large-Scale Covariance Matrix Estimation and Implications for
    Functional Genomics*, 2005, shrinking to the diagonal; moments are not centred here.
    inputs: ``[tokens, in_features]`` float32; products: ``inputs.T @ inputs``.
    """
    tokens = len(inputs)
    # A feature that is always 0 correlates with nothing.
    inverse = torch.where(products.diagonal() > 0, products.diagonal().rsqrt(), 0.0)
    squared, spread = -float((inverse > 0).sum()), 0.0
    # Few rows at a time, because the whole takes as much memory as all else.
    for part, own in zip(products.split(_ROWS), inverse.split(_ROWS), strict=True):
        correlations = part * own[:, None] * inverse
        squared += float(correlations.square_().sum(dtype=torch.float64))
    for part in inputs.split(_ROWS):
        shares = (part * inverse).square_()
        spread += float((shares.sum(1).square_() - shares.square_().sum(1)).sum(dtype=torch.float64))
    if tokens < 2 or not squared > 0:
        return 1.0
    variance = (spread * tokens - squared) / (tokens - 1)
    return min(1.0, max(0.0, variance / squared))


def gptq(weight: Tensor, factor: Tensor, num_bits: int, group_size: int) -> Quantized:
    """Quantize a matrix so that its outputs change little: the error of each column is made up for by those after it.

    weight: ``[out_features, in_features]``, any floating dtype; factor: ``inverse_factor`` of its inputs. The grid of
    a group is searched when its turn comes, for the least squared error of its weights as corrected until then.
    Raises ValueError for NaN or Inf and for a width or group size that the format does not have.
    """
    check_matrix(weight, [num_bits], group_size)
    top, in_features = 2**num_bits - 1, weight.shape[1]
    # Transposed, a column is contiguous.
    left = weight.float().T.clone(memory_format=torch.contiguous_format)
    codes = torch.empty(left.shape, dtype=torch.uint8, device=left.device)
    grids, sse = [], 0.0
    for start in range(0, in_features, group_size):
        end = start + group_size
        block, own = left[start:end], factor[start:end, start:end]
        scale, zero = _grid(block.T.contiguous(), top)
        grids.append((scale, zero))
        step, offset = scale.float(), zero.float()
        errors = _round_columns(block, own, step, offset, top, codes[start:end])
        left[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
        restored = (codes[start:end] - offset) * step
        sse += (restored - weight[:, start:end].T).double().square().sum().item()
    scale, zero = (torch.stack(tensors, 1) for tensors in zip(*grids, strict=True))
    return Quantized(pack(codes.T.contiguous(), num_bits), scale, zero, sse / weight.numel())


def _round_columns(block: Tensor, factor: Tensor, step: Tensor, offset: Tensor, top: int, codes: Tensor) -> Tensor:
    """Write the codes of a group's columns, ``block [group_size, out_features]``, which may be overwritten, and
    return the errors that are to be made up for in the columns after it.
    """
    if block.device.type == "cpu" and (code := native.library()):
        return native.round_columns(code, block, factor, step, offset, top, codes)
    errors = torch.empty_like(block)
    for j, row in enumerate(factor):
        rounded = (block[j] / step).add_(offset).clamp_(0, top).round_()
        codes[j] = rounded
        errors[j] = (block[j] - (rounded - offset) * step) / row[j]
        block[j + 1 :].addr_(row[j + 1 :], errors[j], alpha=-1)
    return errors


def _grid(weight: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Stored scale and zero point, ``[out_features]``, of one group in every row: ``[out_features, group_size]``."""
    parts = [quantize_groups(groups, top, mse_grid)[1:3] for _, groups in chunks(weight, weight.shape[1])]
    scale, zero = (torch.cat(tensors)[:, 0] for tensors in zip(*parts, strict=True))
    return scale, zero
