"""Groups of weights and the grids that store them: what all quantizers share.

A grid is an affine map from codes to weights, stored as a scale and a zero point: a code means
``scale * (code - zero_point)``. Everything here works on the grid as stored, after rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from alphaq_vllm.format import SCALE_DTYPE, ZERO_DTYPE

SMALLEST_SCALE, LARGEST_SCALE = torch.finfo(SCALE_DTYPE).tiny, torch.finfo(SCALE_DTYPE).max
LARGEST_ZERO = torch.finfo(ZERO_DTYPE).max


@dataclass(frozen=True)
class Groups:
    """Groups as ``center + radius * x``, x in [-1, 1]: ``weight`` and ``x`` ``[groups, group_size]``, others
    ``[groups, 1]``, all float32. ``mean`` and ``variance`` are of x.
    """

    weight: Tensor
    x: Tensor
    center: Tensor
    radius: Tensor
    mean: Tensor
    variance: Tensor

    @property
    def sum_of_squares(self) -> Tensor:
        """Squared deviation from the groups' means, summed over everything: float64 scalar."""
        return (self.radius.double().square() * self.variance).sum() * self.x.shape[-1]


# From groups and the greatest code to the stored scale and zero point of each group, ``[groups, 1]``.
FindGrid = Callable[[Groups, int], tuple[Tensor, Tensor]]


def normalize(weight: Tensor) -> Groups:
    """Groups of ``weight``, ``[groups, group_size]`` float32. Raises ValueError for NaN or Inf."""
    high, low = weight.amax(-1, keepdim=True) / 2, weight.amin(-1, keepdim=True) / 2
    center, radius = high + low, high - low
    if not radius.isfinite().all():
        raise ValueError("weight: expected finite values, got NaN or Inf: repair the source checkpoint")
    x = (weight - center).div_(radius.where(radius > 0, 1))
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square_().mean(-1, keepdim=True)
    return Groups(weight, x, center, radius, mean, variance)


def stored_grid(groups: Groups, inverse_step: Tensor, zero: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point, as stored, of the grid ``code = inverse_step * x + zero``."""
    exact = groups.radius / inverse_step
    scale = exact.clamp(SMALLEST_SCALE, LARGEST_SCALE).to(SCALE_DTYPE)
    # The middle of the grid stays where it was, whatever rounding does to the scale.
    zero = top / 2 - (groups.center + (top / 2 - zero) * exact) / scale.float()
    return scale, zero.clamp(-LARGEST_ZERO, LARGEST_ZERO).to(ZERO_DTYPE)


def encode(weight: Tensor, scale: Tensor, zero: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Nearest codes as float32, and each group's squared error as float64, for a grid as stored."""
    exact = (weight / scale.float()).add_(zero.float())
    codes = exact.clamp(0, top).round_()
    sse = exact.sub_(codes).square_().sum(-1, keepdim=True)
    return codes, sse.double() * scale.double().square()


def quantize_groups(groups: Groups, top: int, find_grid: FindGrid) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes uint8 ``[groups, group_size]``, stored scale and zero point ``[groups, 1]``, squared error float64 scalar.

    A group for which the grid is worse than its mean alone is stored as its mean: constant groups are exact.
    """
    scale, zero = find_grid(groups, top)
    codes, sse = encode(groups.weight, scale, zero, top)
    mean = groups.center + groups.radius * groups.mean
    flat_scale, flat_zero = _flat_grid(mean)
    bias = (mean.double() + flat_zero.double() * flat_scale.double()).square()
    flat_sse = (groups.radius.double().square() * groups.variance + bias) * codes.shape[-1]
    # Negated so that the NaN of an overflow counts as worse.
    flat = ~(sse <= flat_sse)
    if flat.any():
        scale, zero = torch.where(flat, flat_scale, scale), torch.where(flat, flat_zero, zero)
        codes, sse = encode(groups.weight, scale, zero, top)
    return codes.to(torch.uint8), scale, zero, sse.sum()


def _flat_grid(mean: Tensor) -> tuple[Tensor, Tensor]:
    """The stored scale and zero whose code 0 is ``mean``: a power of two and the up to 11 significant bits."""
    _, exponent = torch.frexp(mean)
    scale = torch.ldexp(torch.ones_like(mean), exponent - 1).clamp(min=SMALLEST_SCALE).to(SCALE_DTYPE)
    return scale, (-mean / scale.float()).to(ZERO_DTYPE)
