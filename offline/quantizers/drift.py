"""What a matrix has to make up for when its own inputs have changed: down gets what quantized gate and up make.

Its output for its inputs should be what it was for those before, ``(inputs + differences) @ weight.T``. A part of that
is a matter of its weights: where an input is too large now, they should be smaller. Li et al., *GPTAQ: Efficient
Finetuning-Free Quantization for Asymmetric Calibration*, arXiv 2504.02692, make up for all layers before in this way.
Here it is done within an expert, where it needs no second pass, and without what only a sample shows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from offline.quantizers.gptq import NOT_FINITE, Feedback, share_of_chance

# What became of each feature alone is seen in so many tokens at most.
FEW = 2048
# What became of a feature in a few tokens is chance. So many more, in which nothing became of it, are thought of.
_UNCHANGED = 8
# Tokens that are looked at together, and rows of a matrix.
_TOKENS, _ROWS = 2048, 512
_TINY = torch.finfo(torch.float32).tiny


def tells_all(tokens: int, features: int) -> bool:
    """Whether so many tokens say of more than each feature alone what became of it."""
    return tokens >= features


def looked_at(tokens: int) -> slice:
    """Those of so many tokens, evenly spread, that tell what became of each feature alone."""
    return slice(0, tokens, -(-tokens // FEW))


def drift(inputs: Tensor, wanted: Callable[[slice], Tensor], counts: Tensor) -> Tensor:
    """``differences.T @ counts.diag() @ inputs``, ``[in_features, in_features]``, with less of what only a sample has
    off the diagonal, and less of all where tokens are few; or the diagonal, ``[in_features]``, from ``FEW`` tokens at
    most, where it takes more to ``tells_all``.

    inputs: ``[tokens, in_features]`` float32, as they are; wanted: some of them as they were; counts: as of
    ``feedback``. Raises ValueError for NaN or Inf.
    """
    tokens, features = inputs.shape
    parts = [slice(start, start + _TOKENS) for start in range(0, tokens, _TOKENS)]
    if not tells_all(tokens, features):
        few = looked_at(tokens)
        given, some = inputs[few], counts[few]
        for_all = counts.sum() / some.sum() if bool(some.any()) else 0.0
        return _finite(some @ (wanted(few) - given).mul_(given) * (for_all * _trust(some)))
    energy = sum(counts[part] @ inputs[part].square() for part in parts)
    products = inputs.new_zeros(features, features)
    change, spread, own = (inputs.new_zeros(features) for _ in range(3))
    inverse = energy.clamp(min=_TINY).reciprocal()  # type: ignore[union-attr]
    for part in parts:
        given, some = inputs[part], counts[part, None]
        differences = wanted(part) - given
        products.addmm_((differences * some).T, given)
        given, differences = given.square().mul_(some), differences.square_().mul_(some)
        change += differences.sum(0)
        spread += (given @ inverse) @ differences
        own += given.mul_(inverse).mul_(differences).sum(0)
    # As of ``sampling_share``, of correlations between the differences and the inputs.
    diagonal, changed = _finite(products.diagonal().clone()), change.clamp(min=_TINY).reciprocal()
    # Divided before they are squared, which would be too much for float32.
    root = inverse.sqrt()
    squares = torch.cat([(part * root).square_().sum(1) for part in products.split(_ROWS)])
    squares -= (diagonal * root).square()
    share = share_of_chance(tokens, float(squares @ changed), float((spread - own) @ changed))
    products.mul_(1 - share)
    products.diagonal().copy_(diagonal)
    return products.mul_(_trust(counts))


def _trust(counts: Tensor) -> float:
    """How much of what tokens that count so much show is believed."""
    number = counts.sum().square() / counts.square().sum().clamp(_TINY)
    return float(number / (number + _UNCHANGED))


def _finite(diagonal: Tensor) -> Tensor:
    if not bool(diagonal.isfinite().all()):
        raise ValueError(NOT_FINITE)
    return diagonal


def pull(weight: Tensor, back: Feedback, drifted: Tensor) -> Tensor:
    """How far each column should be from its weights for the sake of what its inputs were: ``[in_features,
    out_features]`` float32, in the order of ``back``.

    With E the errors of the weights, ``E @ H @ E.T + 2 * E @ drifted.T @ weight.T`` is to be least. It is the sum of
    ``costs`` times the square of ``factor @ E.T + pull``.
    weight: ``[out_features, in_features]``; drifted: of ``drift``.
    """
    found = weight.new_empty(weight.shape[::-1], dtype=torch.float32)
    whole = weight.float() if drifted.ndim == 2 else weight
    # Some at a time: down's matrices are the largest, and each copy of one counts.
    for into, some in zip(found.split(_ROWS), back.order.split(_ROWS), strict=True):
        if drifted.ndim == 2:
            torch.mm(drifted[:, some].T, whole.T, out=into)
        else:
            torch.mul(whole[:, some].T, drifted[some, None], out=into)
    del whole
    for part in found.split(_ROWS, 1):
        part.copy_(torch.linalg.solve_triangular(back.factor.T, part, upper=False, unitriangular=True))
    return found.div_(back.costs[:, None])
