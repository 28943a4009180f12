"""GPTQ: rounding that makes up for itself, column by column, on the inputs that a matrix really sees.

Frantar et al., *GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers*, arXiv 2210.17323,
in the form of Chee et al., *QuIP: 2-Bit Quantization of Large Language Models With Guarantees*, arXiv 2307.13304, which
needs no inverse: the errors of the columns that are done move what the next one is rounded from.

That is greedy, on grids that are searched without the inputs. So the columns of each group are improved, as
``columns.improve`` says, by what those after them cannot make up for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from offline.quantizers.columns import round_group
from offline.quantizers.quantize import Quantized, check_matrix, pack, scales_of

# How often the columns of a group are improved: more changes little.
IMPROVEMENTS = 3
# Share of the mean diagonal that is added to the diagonal of X^T X, and its growth until a factor exists.
DAMPING, DAMPING_GROWTH = 0.03, 10.0
# Inputs that are looked at together, and rows and columns of their products.
_ROWS, _BLOCK = 1024, 512
# Whole groups that are moved together by those after them.
_COLUMNS = 512
# Tokens for each feature of a block, and features that a block may have in any case: see ``blocks``.
_TOKENS_EACH, _FEWEST = 2, 512
NOT_FINITE = "calibration: expected finite activations, got NaN or Inf: the source is damaged"


@dataclass(frozen=True)
class Feedback:
    """How errors of some columns of a matrix are made up for in others.

    order: ``[in_features]`` int64, the columns, whole groups one after another; factor: ``[in_features, in_features]``
    float32, upper triangular with ones on its diagonal: after an error of the column in place j, from the last to the
    first, the one in place i is moved by ``factor[i, j]`` times that error. What cannot be made up for then, squared,
    counts ``costs [in_features]``.
    """

    order: Tensor
    factor: Tensor
    costs: Tensor


def blocks(tokens: int, features: int, group_size: int) -> list[slice]:
    """Which columns of down make up for each other's errors: all, or where tokens are fewer than features, blocks of
    them with two tokens for each feature, unless tokens are very few.

    Of fewer tokens than features most of what these seem to have in common is chance, so little is lost, and factors of
    blocks take a fraction of the time and memory (docs/quality.md, "How much text"). What gate and up are given, the
    stream between layers, is so strongly correlated that this holds of down alone.

    >>> blocks(8192, 14336, 64)[:2], len(blocks(8192, 14336, 64)), blocks(8192, 4096, 64)
    ([slice(0, 3584, None), slice(3584, 7168, None)], 4, [slice(0, 4096, None)])
    """
    most = features if tokens >= features else max(_FEWEST, -(-tokens // _TOKENS_EACH))
    number = -(-features // most)
    size = -(-features // (number * group_size)) * group_size
    return [slice(start, min(start + size, features)) for start in range(0, features, size)]


def feedback(inputs: Tensor, group_size: int, counts: Tensor | None = None) -> Feedback:
    """That of the inputs of a matrix: ``factor.T @ costs.diag() @ factor = H``, where H is, in that order,
    ``inputs.T @ counts.diag() @ inputs`` with less of what only a sample has off the diagonal, and damping on it.

    What the largest inputs meet needs most others to make up for it. So the groups with most energy, and the columns
    with most in each, come last in the order, and are quantized first.
    inputs: ``[tokens, in_features]`` float32; fewer tokens than features are enough; counts: ``[tokens]``, how much
    each counts, 1 if not given.
    Raises ValueError for NaN or Inf.
    """
    counts = inputs.new_ones(len(inputs)) if counts is None else counts
    order, damping = _order(inputs, counts, group_size), DAMPING
    while True:
        hessian = _products(inputs, counts, order)
        diagonal = hessian.diagonal()
        squares = diagonal.clone()
        hessian.mul_(1 - sampling_share(inputs, hessian, order, counts))
        added = damping * squares.mean()
        if not added:
            return Feedback(order, torch.eye(len(hessian), device=hessian.device), torch.ones_like(squares))
        if not bool(added.isfinite()):
            raise ValueError(NOT_FINITE)
        diagonal.copy_(squares + added)
        # Columns lie as LAPACK wants them, so that the factor takes the place of the matrix.
        lower, info = hessian.mT, torch.empty((), dtype=torch.int32, device=hessian.device)
        torch.linalg.cholesky_ex(lower, out=(lower, info))
        if not bool(info):
            scales = diagonal.clone()
            return Feedback(order, hessian.div_(scales[:, None]), scales.square())
        damping *= DAMPING_GROWTH


def _order(inputs: Tensor, counts: Tensor, group_size: int) -> Tensor:
    """Of ``Feedback``, by the energy of columns and of groups."""
    energy = sum(part.square().sum(0) for part in _parts(inputs, counts)).view(-1, group_size)  # type: ignore[union-attr]
    columns = energy.argsort(1) + group_size * torch.arange(len(energy), device=inputs.device)[:, None]
    return columns[energy.sum(1).argsort()].flatten()


def _parts(inputs: Tensor, counts: Tensor) -> Iterator[Tensor]:
    """Tokens that are looked at together, so that the square of each counts as much as it shall."""
    for part, some in zip(inputs.split(_ROWS), counts.split(_ROWS), strict=True):
        yield part * some.sqrt()[:, None]


def _products(inputs: Tensor, counts: Tensor, order: Tensor) -> Tensor:
    """``inputs.T @ counts.diag() @ inputs`` of columns in an order, one half of which is computed and then copied."""
    products = inputs.new_zeros(len(order), len(order))
    blocks = [slice(start, start + _BLOCK) for start in range(0, len(order), _BLOCK)]
    for part in _parts(inputs, counts):
        ordered = part[:, order]
        for block in blocks:
            products[block, block.start :].addmm_(ordered[:, block].T, ordered[:, block.start :])
    for block in blocks:
        products[block.stop :, block] = products[block, block.stop :].T
    return products


def sampling_share(
    inputs: Tensor, products: Tensor, order: Tensor | None = None, counts: Tensor | None = None
) -> float:
    """The share of the squared correlations between features that comes from having only these tokens: from 0, for very
    many, to 1. Without so much of each correlation their expected error is least.

    Schäfer and Strimmer, *A Shrinkage Approach to Large-Scale Covariance Matrix Estimation and Implications for
    Functional Genomics*, 2005, shrinking to the diagonal; moments are not centred here.
    inputs, counts: as of ``feedback``; products: ``inputs.T @ counts.diag() @ inputs``, whose columns may be in an
    ``order``.
    """
    counts = inputs.new_ones(len(inputs)) if counts is None else counts
    # A feature that is always 0 correlates with nothing.
    inverse = torch.where(products.diagonal() > 0, products.diagonal().rsqrt(), 0.0)
    squared, spread = -float((inverse > 0).sum()), 0.0
    # Few rows at a time, because the whole takes as much memory as all else.
    for part, own in zip(products.split(_BLOCK), inverse.split(_BLOCK), strict=True):
        correlations = part * own[:, None] * inverse
        squared += float(correlations.square_().sum(dtype=torch.float64))
    if order is not None:
        inverse = torch.empty_like(inverse).index_copy_(0, order, inverse)
    for part in _parts(inputs, counts):
        shares = (part * inverse).square_()
        spread += float((shares.sum(1).square_() - shares.square_().sum(1)).sum(dtype=torch.float64))
    return share_of_chance(len(inputs), squared, spread)


def share_of_chance(tokens: int, squared: float, spread: float) -> float:
    """The share of the squares of mean products that comes from having only so many tokens, by the sum of these squares
    and that of the squares of the products of each token, both by the square of the number of tokens.
    """
    if tokens < 2 or not squared > 0:
        return 1.0
    variance = (spread * tokens - squared) / (tokens - 1)
    return min(1.0, max(0.0, variance / squared))


def gptq(
    weight: Tensor,
    back: Feedback,
    num_bits: int,
    group_size: int,
    improvements: int = IMPROVEMENTS,
    pull: Tensor | None = None,
    scales: Tensor | None = None,
) -> Quantized:
    """Quantize a matrix so that its outputs change little: the error of each column is made up for by those after it.

    weight: ``[out_features, in_features]``, any floating dtype; back: ``feedback`` of its inputs. The grid of a group
    is searched when its turn comes, for the least squared error of its weights as corrected until then, and the best of
    those around it is kept; improvements: how often the group is improved then, 0 for the grid that was searched; pull:
    of ``drift.pull``, which is overwritten; scales: as of ``scales_of`` a matrix of which these are some columns, by
    default of this one.
    Raises ValueError for NaN or Inf and for a width or group size that the format does not have.
    """
    check_matrix(weight, [num_bits], group_size)
    out_features, in_features = weight.shape
    scales = scales_of(weight, num_bits, group_size) if scales is None else scales
    # Transposed, a column is contiguous. Errors take the place of what pulls at the columns before they have any.
    errors = torch.zeros(in_features, out_features, device=weight.device) if pull is None else pull
    codes = torch.empty(in_features, out_features, dtype=torch.uint8, device=weight.device)
    grids: dict[int, Tensor] = {}
    for begin in reversed(range(0, in_features, _COLUMNS)):
        # What comes after moves many columns at once: products of few rows take longer for each.
        end = min(begin + _COLUMNS, in_features)
        moved_by_others = torch.addmm(errors[begin:end], back.factor[begin:end, end:], errors[end:])
        for start in reversed(range(begin, end, group_size)):
            stop = start + group_size
            group, after = slice(start, stop), slice(stop, end)
            order = back.order[group]
            first = int(order.min())
            block = weight[:, first : first + group_size].float().T.contiguous()[order - first]
            moved = torch.addmm(moved_by_others[start - begin : stop - begin], back.factor[group, after], errors[after])
            some = back.factor[group, group], back.costs[group], num_bits, improvements
            codes[order], grids[first], errors[group] = round_group(block, moved, scales, *some)
    grid = torch.stack([grids[first] for first in sorted(grids)], 1)
    sse = float(sum(part.double().square_().sum() for part in errors.split(group_size)))
    # Before codes are packed, which takes memory as well.
    del errors, pull
    return Quantized(pack(codes.T, num_bits), scales, grid, sse / weight.numel())
