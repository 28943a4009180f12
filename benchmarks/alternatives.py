"""Ways to quantize that the converter does not offer, as functions from a weight to what would be restored from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from alphaq_vllm.packing import grid_steps, grid_zero_points
from offline.quantizers import grids
from offline.quantizers.groups import FindGrid, Groups, normalize, quantize_groups

GROUP_SIZE = 64
# Least-squares steps of ``alternating_grid``, and Sinkhorn steps of ``column_scales``.
FITS, BALANCES = 12, 16
# What ``symmetric`` tries: the range, cut off by these factors.
SHRINKS = tuple(0.3 + 0.02 * i for i in range(36))

# From the groups of some rows and a width to the step and the zero point of each group, as other formats store them.
Stored = Callable[[Groups, int], tuple[Tensor, Tensor]]


def alternating_grid(groups: Groups, top: int) -> tuple[Tensor, Tensor]:
    """Nearest codes and the least-squares scale and zero point for them, in turn, from the range of the group on."""
    inverse_step = zero = torch.full_like(groups.radius, top / 2)
    for _ in range(FITS):
        inverse_step, zero = grids._refit(groups, inverse_step[None], zero[None], top)
    return inverse_step, zero


def symmetric(groups: Groups, num_bits: int) -> tuple[Tensor, Tensor]:
    """The best scale of 16 bits of a grid whose middle is 0, so that no zero point has to be stored."""
    top = 2**num_bits - 1
    peak = groups.weight.abs().amax(-1, keepdim=True).clamp_min(1e-12)
    zero = torch.full_like(peak, top / 2)
    scales = [(peak * shrink * 2 / top).bfloat16().float() for shrink in SHRINKS]
    errors = torch.stack([(_nearest(groups, s, zero, num_bits) - groups.weight).square().sum(-1, True) for s in scales])
    return torch.stack(scales).gather(0, errors.argmin(0, keepdim=True))[0], zero


def fine(groups: Groups, num_bits: int) -> tuple[Tensor, Tensor]:
    """The grid of least squared error with a scale and a zero point of 16 bits."""
    top = 2**num_bits - 1
    inverse_step, zero = grids.mse_grid(groups, top)
    exact = groups.radius / inverse_step
    scale = exact.bfloat16().float().clamp_min(1e-30)
    # The middle of the grid stays where it was, whatever rounding does to the scale.
    return scale, (top / 2 - (groups.center + (top / 2 - zero) * exact) / scale).half().float()


def coarse(scale_bits: int, zero_bits: int) -> Stored:
    """The grid of least squared error with its scale and zero point stored in fewer bits: scales on a logarithmic grid
    below the largest of their row, zero points in steps of a fraction of the range around its middle.
    """
    # Octaves below the largest scale that can be stored, and steps in each.
    steps = {8: 16, 6: 8, 4: 4}[scale_bits]

    def stored(groups: Groups, num_bits: int) -> tuple[Tensor, Tensor]:
        top = 2**num_bits - 1
        exact, zero = fine(groups, num_bits)
        by_row = exact.view(-1, groups.per_row)
        largest = by_row.amax(-1, keepdim=True)
        codes = (-(by_row / largest).log2() * steps).round().clamp(0, 2**scale_bits - 1)
        scale = (largest * 2 ** (-codes / steps)).view_as(exact)
        # The middle of the grid stays where it was, as far as its steps allow.
        step, reach = top / 2**zero_bits, 2 ** (zero_bits - 1)
        offset = ((top / 2 - zero) * exact / scale / step).round().clamp(-reach, reach - 1)
        return scale, top / 2 - offset * step

    return stored


def restored(weight: Tensor, num_bits: int, find_grid: FindGrid, group_size: int = GROUP_SIZE) -> Tensor:
    """What is restored from a matrix quantized on the grids that are found, stored as the format does: float32."""
    groups = normalize(weight.float(), group_size)
    codes, scales, grid, _ = quantize_groups(groups, num_bits, find_grid)
    step = scales.float().repeat_interleave(groups.per_row, 0) * grid_steps(grid)
    return ((codes - grid_zero_points(grid, num_bits)) * step).view_as(weight)


def restored_from(weight: Tensor, num_bits: int, stored: Stored, group_size: int) -> Tensor:
    """The same of grids that are stored in another way."""
    groups = normalize(weight.float(), group_size)
    return _nearest(groups, *stored(groups, num_bits), num_bits).view_as(weight)


def _nearest(groups: Groups, step: Tensor, zero: Tensor, num_bits: int) -> Tensor:
    codes = (groups.weight / step + zero).clamp_(0, 2**num_bits - 1).round_()
    return (codes - zero) * step


def column_scales(weights: list[Tensor]) -> Tensor:
    """The scale of every column that, with one for every row, evens out the standard deviations of the columns of all
    the matrices together: ``[in_features]`` (the idea of SINQ's Sinkhorn iteration, arXiv 2509.22944).
    """
    weight = torch.cat([weight.float() for weight in weights])
    columns = torch.ones(weight.shape[1])
    for _ in range(BALANCES):
        rows = (weight / columns).square().mean(1, keepdim=True).sqrt().clamp_min(1e-12)
        columns = (weight / rows).square().mean(0).sqrt().clamp_min(1e-12)
        columns = columns / columns.log().mean().exp()
    return columns


def hadamard(size: int) -> Tensor:
    """An orthogonal matrix of equal magnitudes, ``[size, size]``; size: a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / math.sqrt(size)


def rotated(weight: Tensor, restore: Callable[[Tensor], Tensor]) -> Tensor:
    """What is restored when the columns are mixed by Hadamard matrices of a group's size before, and back after."""
    rotation = hadamard(GROUP_SIZE)
    mixed = (weight.float().view(len(weight), -1, GROUP_SIZE) @ rotation).view_as(weight)
    return (restore(mixed).view(len(weight), -1, GROUP_SIZE) @ rotation).view_as(weight)


def balanced(expert: Mapping[str, Tensor], shared: Tensor, restore: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Gate, up and down of an expert restored from columns that were evened out: those of down by scales that fold
    into the rows of up, those of gate and up by ``shared``, which folds into the norm before the layer.
    """
    gate, up, down = expert.values()
    own = column_scales([down])
    restored = (
        restore(gate / shared) * shared,
        restore(up * own[:, None] / shared) * shared / own[:, None],
        restore(down / own) * own,
    )
    return dict(zip(expert, restored, strict=True))
