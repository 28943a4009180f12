"""Groups of weights and the grids that store them: what all quantizers share.

A grid is an affine map from codes to weights: a code means ``step * (code - zero_point)``. What is stored of it is
coarse (see ``alphaq_vllm.packing``): 16 steps, in scales of the row, and 16 zero points. Everything here works on grids
as they are stored, and float32 holds them exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from alphaq_vllm.format import GRID_DTYPE, SCALE_DTYPE
from alphaq_vllm.packing import grid_steps, grid_zero_points
from offline.quantizers import native

SMALLEST_SCALE, LARGEST_SCALE = torch.finfo(SCALE_DTYPE).tiny, torch.finfo(SCALE_DTYPE).max / 16
# Of a grid: steps are 1 to 16 scales, zero points 6 to 21 thirty-seconds of the number of codes. This, and how many
# bits are few, stands in native/grids.h as well.
_STEPS, _FIRST_ZERO, _LAST_ZERO, _ZERO_PARTS = 16, 6, 21, 32
# In scales of its row, the step with which the widest group's grid reaches all its weights. Of few codes the best grids
# are finer than that, so it may be the largest; of many they are about as wide, and zero points leave less room.
_FULL_STEP, _FEW_BITS, _FULL_STEP_OF_MANY = 16, 4, 13


@dataclass(frozen=True)
class Groups:
    """Groups as ``center + radius * x``, x in [-1, 1]: ``weight`` and ``x`` ``[groups, group_size]``, others
    ``[groups, 1]``, all float32. ``mean`` and ``variance`` are of x. ``per_row``: groups of a row, one after another.
    """

    weight: Tensor
    x: Tensor
    center: Tensor
    radius: Tensor
    mean: Tensor
    variance: Tensor
    per_row: int

    @property
    def sum_of_squares(self) -> Tensor:
        """Squared deviation from the groups' means, summed over everything: float64 scalar."""
        return (self.radius.double().square() * self.variance).sum() * self.x.shape[-1]


# From groups and the greatest code to a grid for each group, ``code = inverse_step * x + zero_point``: ``[groups, 1]``.
FindGrid = Callable[[Groups, int], tuple[Tensor, Tensor]]


def normalize(weight: Tensor, group_size: int) -> Groups:
    """The groups of ``weight``, ``[rows, columns]`` float32. Raises ValueError for NaN or Inf."""
    per_row, weight = weight.shape[1] // group_size, weight.reshape(-1, group_size).contiguous()
    if weight.device.type == "cpu" and (code := native.library()):
        x, center, radius, mean, variance = native.normalize(code, weight)
    else:
        high, low = weight.amax(-1, keepdim=True) / 2, weight.amin(-1, keepdim=True) / 2
        center, radius = high + low, high - low
        x = (weight - center).div_(radius.where(radius > 0, 1))
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).square_().mean(-1, keepdim=True)
    if not radius.isfinite().all():
        raise ValueError(native.NOT_FINITE)
    return Groups(weight, x, center, radius, mean, variance, per_row)


def row_scales(groups: Groups, num_bits: int) -> Tensor:
    """The scale of each row, as stored, ``[rows, 1]``: every group's weights, and 0, are within reach of its steps."""
    widest = _reaching(groups, num_bits).view(-1, groups.per_row).amax(1, keepdim=True)
    full = _FULL_STEP if num_bits <= _FEW_BITS else _FULL_STEP_OF_MANY
    return (widest / full).clamp(SMALLEST_SCALE, LARGEST_SCALE).to(SCALE_DTYPE)


def _reaching(groups: Groups, num_bits: int) -> Tensor:
    """The smallest step of grids that reach all of a group's weights, and 0, ``[groups, 1]``."""
    up, down = ((groups.radius + side).clamp_(min=0) for side in (groups.center, -groups.center))
    return reaching_step(up, down, num_bits)


def reaching_step(up: Tensor, down: Tensor, num_bits: int) -> Tensor:
    """The same for weights that lie between ``-down`` and ``up``."""
    codes = 2**num_bits
    most_up, most_down = codes - 1 - codes * _FIRST_ZERO / _ZERO_PARTS, codes * _LAST_ZERO / _ZERO_PARTS
    return (up / (codes - 1) + down / (codes - 1)).maximum(up / most_up).maximum(down / most_down)


def stored_grid(steps: Tensor, zero: Tensor, num_bits: int) -> Tensor:
    """The byte of a grid; steps: whole numbers, in scales of the row; zero: a zero point, in codes, of which it has the
    nearest that it can.
    """
    parts = (zero * (_ZERO_PARTS / 2**num_bits)).round_().clamp_(_FIRST_ZERO, _LAST_ZERO)
    return (parts - _FIRST_ZERO).to(GRID_DTYPE) << 4 | (steps - 1).to(GRID_DTYPE)


def steps_around(step: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The two whole numbers of scales between which a step lies, or the nearest."""
    lower = (step / scale).nan_to_num_(0).floor_()
    return lower.clamp(1, _STEPS), (lower + 1).clamp_(1, _STEPS)


def _grids(scale: Tensor, step: Tensor, middle: Tensor, num_bits: int) -> Iterator[Tensor]:
    """Grids as stored whose steps are about the given one, and whose middles are as near as can be.

    scale, step, middle: of one shape, float32; step and middle: of a grid, and what lies between its two middle codes.
    """
    half = (2**num_bits - 1) / 2
    # Where no zero point has such a middle, a grid reaches as far with larger steps.
    reaching = reaching_step(half * step + middle, half * step - middle, num_bits)
    lower, upper = steps_around(step, scale)[0], steps_around(reaching, scale)[1]
    # Of many codes, a middle that is not met leaves the last ones outside.
    wider = () if num_bits <= _FEW_BITS else ((upper + 1).clamp_(max=_STEPS),)
    for steps in (lower, upper, *wider):
        # Weights that are small beside the smallest step are nearest to 0, which is a value of this grid.
        zero = torch.where(step < scale, 2.0 ** (num_bits - 1), half - middle / (scale * steps))
        yield stored_grid(steps, zero.nan_to_num_(half), num_bits)


def encode(weight: Tensor, scale: Tensor, grid: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
    """Nearest codes as float32, and each group's squared error as float64, for a grid as stored.

    weight: ``[groups, group_size]`` float32; scale, of the group's row, float32, and grid: ``[groups, 1]``.
    """
    step = scale * grid_steps(grid)
    exact = (weight / step).add_(grid_zero_points(grid, num_bits))
    codes = exact.clamp(0, 2**num_bits - 1).round_()
    sse = exact.sub_(codes).square_().sum(-1, keepdim=True)
    return codes, sse.double() * step.double().square()


def quantize_groups(
    groups: Groups, num_bits: int, find_grid: FindGrid, scales: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes uint8 ``[groups, group_size]``, scales of rows ``[rows, 1]`` and grids ``[groups, 1]`` as stored, squared
    error float64 scalar.

    scales: of rows, by default those of ``row_scales``.
    """
    top = 2**num_bits - 1
    scales = row_scales(groups, num_bits) if scales is None else scales
    scale = scales.float().repeat_interleave(groups.per_row, 0)
    inverse_step, zero = find_grid(groups, top)
    if scale.device.type == "cpu" and (code := native.library()):
        codes, grid, sse = native.store_groups(code, groups, num_bits, scale, inverse_step, zero)
        return codes, scales, grid, sse.sum()
    step = groups.radius / inverse_step
    grids = _grids(scale, step, groups.center + (top / 2 - zero) * step, num_bits)
    best = _Best(groups.weight, scale, num_bits, *grids)
    # Where the grid is far from all that can be stored, these are not: the range of the group in equal steps, and 0.
    step = _reaching(groups, num_bits)
    mean, size = groups.center + groups.radius * groups.mean, groups.x.shape[-1]
    square = mean.double().square() + groups.radius.double().square() * groups.variance
    far = (best.sse > size * torch.minimum(square, step.double().square() / 4))[:, 0].nonzero()[:, 0]
    if len(far):
        scale, step, center, nothing = scale[far], step[far], groups.center[far], torch.zeros_like(step[far])
        ranges, zeros = (_grids(scale, *grid, num_bits) for grid in ((step, center), (nothing, nothing)))
        other = _Best(groups.weight[far], scale, num_bits, *ranges, *zeros)
        better = (other.sse < best.sse[far])[:, 0]
        for name in ("codes", "grid", "sse"):
            getattr(best, name)[far[better]] = getattr(other, name)[better]
    return best.codes.to(torch.uint8), scales, best.grid, best.sse.sum()


class _Best:
    """Of some grids the one with the least error of each group: codes, bytes and squared errors, as of ``encode``."""

    def __init__(self, weight: Tensor, scale: Tensor, num_bits: int, first: Tensor, *others: Tensor) -> None:
        self.grid = first
        self.codes, self.sse = encode(weight, scale, first, num_bits)
        for grid in others:
            codes, sse = encode(weight, scale, grid, num_bits)
            better = sse < self.sse
            self.codes, self.sse = torch.where(better, codes, self.codes), torch.where(better, sse, self.sse)
            self.grid = torch.where(better, grid, self.grid)
