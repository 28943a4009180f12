"""How much of a matrix's error arrives at the output of its expert, from the expert's weights alone.

Inputs are taken for independent Gaussian ones of variance 1. All that has to be averaged then are functions of one
Gaussian variable, the gate's, because up's is Gaussian too where the gate's is known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offline.source.architectures import text_config

# Points of the Gauss-Hermite quadrature.
_POINTS = 32
_ACTIVATION_KEYS = ("hidden_act", "hidden_activation", "mlp_hidden_act")

Activation = Callable[[Tensor], Tensor]


def activation_of(config: Mapping[str, Any]) -> Activation:
    """The activation of a model's experts, SiLU where the config names none that transformers has.

    What a family does besides, as clamping, changes little of how errors compare.
    """
    from transformers.activations import ACT2FN

    text = text_config(config)
    named = (text.get(key) for key in _ACTIVATION_KEYS)
    known = (name for name in named if isinstance(name, str) and name in ACT2FN)
    return ACT2FN[next(known, "silu")]


def reaches(weights: Sequence[Tensor], activation: Activation) -> list[float]:
    """The squared error of an expert's output that a mean squared error of 1 in each of its matrices causes, relative
    to the square of that output.

    weights: gate and up ``[inner, features]`` and down ``[features, inner]``, or up and down; activation: applied to
    gate, or to up without one. An expert without any output has zeros.
    """
    *first, down = weights
    norms = [_norms(weight, 1) for weight in first]
    node, share = _quadrature(down.device)
    value = norms[0][:, None] * node
    activated, slope = _with_slope(activation, value)
    if len(first) == 2:
        # Up's state is what the gate's tells of it, and an independent rest.
        cosine = _cosines(first, norms)[:, None]
        known = cosine * norms[1][:, None] * node
        other = known.square() + (1 - cosine.square()).clamp_min(0) * norms[1].square()[:, None]
        mean = (activated * known) @ share
        squares = [slope.square() * other, activated.square(), activated.square() * other]
    else:
        mean = activated @ share
        squares = [slope.square(), activated.square()]
    *through, inner = (square @ share for square in squares)
    columns = _norms(down, 0).square()
    # Neurons depend on each other by their means alone, nearly.
    energy = float((inner - mean.square()) @ columns) + float((down.double() @ mean).square().sum())
    if not energy > 0:
        return [0.0] * len(weights)
    gains = [*(float(square @ columns) for square in through), float(inner.sum())]
    return [len(down) * gain / energy for gain in gains]


def _norms(weight: Tensor, dim: int) -> Tensor:
    return torch.linalg.vector_norm(weight, dim=dim, dtype=torch.float64)


def _cosines(pair: Sequence[Tensor], norms: Sequence[Tensor]) -> Tensor:
    """Between rows of two matrices; 0 for rows of zeros."""
    first, second = (
        weight / norm.clamp_min(torch.finfo(weight.dtype).tiny).to(weight.dtype)[:, None]
        for weight, norm in zip(pair, norms, strict=True)
    )
    return first.mul_(second).sum(1, dtype=torch.float64)


def _with_slope(activation: Activation, value: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        value = value.detach().requires_grad_()
        activated = activation(value).double()
        (slope,) = torch.autograd.grad(activated.sum(), value)
    return activated.detach(), slope


@cache
def _quadrature(device: torch.device) -> tuple[Tensor, Tensor]:
    """Points and weights of the mean over a Gaussian variable of variance 1."""
    points, weights = np.polynomial.hermite_e.hermegauss(_POINTS)
    return torch.from_numpy(points).to(device), torch.from_numpy(weights / weights.sum()).to(device)
