"""The columns of a group while it is quantized, and how they become better.

Both ways of it lower ``E.T @ H @ E`` for the errors E of each row, beside what pulls at them, and never raise it: the
grid that fits the codes best, by least squares, and each code in turn, by coordinate descent. H weighs errors as the
inputs do; data-free quantizers know only the case that it is the identity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alphaq_vllm.packing import grid_steps, grid_zero_points
from offline.quantizers import native
from offline.quantizers.grids import grid_attempts, mse_grid
from offline.quantizers.groups import quantize_groups, steps_around, stored_grid
from offline.quantizers.quantize import chunks

# How many steps, and parts of a zero point, the grids are away that are tried beside the one that was searched.
REACH = 2
# What is taken for no more than rounding in a determinant, by its terms. It stands in native/columns.h as well.
_ROUNDING = 1e-6


@dataclass
class Columns:
    """Columns of one group of every row: ``codes [group_size, rows]`` uint8 of ``num_bits``, the scales of the rows,
    ``[rows]`` float32, and the grids as stored, ``[rows]`` uint8.
    """

    codes: Tensor
    scale: Tensor
    grid: Tensor
    num_bits: int

    @property
    def step(self) -> Tensor:
        """Of the grids, ``[rows]`` float32."""
        return self.scale * grid_steps(self.grid)

    @property
    def zero(self) -> Tensor:
        """The grids' zero points, ``[rows]`` float32."""
        return grid_zero_points(self.grid, self.num_bits)

    @property
    def values(self) -> Tensor:
        """What they mean, ``[group_size, rows]`` float32."""
        return (self.codes - self.zero) * self.step

    def round(self, block: Tensor, corrected: Tensor, factor: Tensor, errors: Tensor) -> None:
        """Round columns from the last to the first, each moved by the errors of those after it, and write the errors.

        block: ``[group_size, rows]`` float32, of which the errors are; corrected: what is rounded, which is
        overwritten; factor: ``[group_size, group_size]``, of which row i above the diagonal says how errors move
        column i.
        """
        step, offset, top = self.step, self.zero, 2**self.num_bits - 1
        inverse = step.reciprocal()
        for j in reversed(range(len(block))):
            rounded = (corrected[j] * inverse).add_(offset).clamp_(0, top).round_()
            self.codes[j] = rounded
            errors[j] = block[j] - (rounded - offset) * step
            corrected[:j].addr_(factor[:j, j], errors[j])


def round_group(
    block: Tensor, moved: Tensor, scales: Tensor, factor: Tensor, costs: Tensor, num_bits: int, improvements: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize the columns of a group: each is moved by the errors of those after it, and then all become better.

    To begin with, the columns are rounded on each of several grids, and the best is kept. Those around the one with
    least error are nearly as good for single columns. But each sends the columns that follow another way, and the best
    of many ways is better than one.

    block: ``[group_size, rows]`` float32, the columns; moved: how those after the group, and what pulls at them, move
    them; scales: of the rows, as stored; factor: ``[group_size, group_size]``, and costs: of ``gptq.Feedback``, for
    these columns; improvements: how often they become better, 0 for columns as rounded on the grid that was searched.
    On a CPU native code does it where there is one.
    Returns codes uint8 and errors float32, as ``block``, and the grids as stored, ``[rows]``. Raises ValueError for NaN
    or Inf.
    """
    # Columns before the group will make up for what they can of its errors: the rest counts.
    factor, to_gradient = factor.contiguous(), (factor.T * costs).contiguous()
    own, scale = to_gradient @ factor, scales[:, 0].float()
    if block.device.type == "cpu" and (code := native.library()):
        some = (factor, to_gradient, own), REACH, improvements, grid_attempts(2**num_bits - 1, block.device)
        return native.round_group(code, block.contiguous(), moved, scale, num_bits, *some)
    grids = _best_grids(block + moved, scales, num_bits)[None]
    if improvements:
        grids = _around(grids[0])
    columns, errors = _round_on(grids, block, moved, scale, factor, costs, num_bits)
    if improvements:
        errors += improve(columns, to_gradient @ torch.addmm(moved, factor, errors), own, improvements)
    return columns.codes, columns.grid, errors


def _best_grids(columns: Tensor, scales: Tensor, num_bits: int) -> Tensor:
    """Grids for a group's columns, ``[rows]``."""
    found = []
    for rows, groups in chunks(columns.T.contiguous(), len(columns)):
        found.append(quantize_groups(groups, num_bits, mse_grid, scales[: len(rows)])[2])
        scales = scales[len(rows) :]
    return torch.cat(found)[:, 0]


def _around(grid: Tensor) -> Tensor:
    """Grids as stored, ``[rows]``, and then those up to ``REACH`` steps and parts away: ``[grids, rows]``."""
    away = torch.arange(-REACH, REACH + 1, device=grid.device)
    others = torch.cartesian_prod(away, away)
    steps, parts = others[others.any(1)][:, :, None].unbind(1)
    steps, parts = ((nibble + to).clamp(0, 15) for nibble, to in ((grid & 15, steps), (grid >> 4, parts)))
    return torch.cat((grid[None], (parts << 4 | steps).to(grid.dtype)))


def _round_on(
    grids: Tensor, block: Tensor, moved: Tensor, scale: Tensor, factor: Tensor, costs: Tensor, num_bits: int
) -> tuple[Columns, Tensor]:
    """Columns rounded on the best of some grids, ``[grids, rows]``, and their errors, as ``block``.

    A GPU takes all grids at once, for it can; a CPU one after the other, for memory.
    """
    rows = len(scale)
    least = torch.full_like(scale, torch.inf)
    best = Columns(torch.empty_like(block, dtype=torch.uint8), scale, torch.empty_like(grids[0]), num_bits)
    best_errors = torch.empty_like(block)
    for some in grids.split(1 if block.device.type == "cpu" else len(grids)):
        all_scales, all_blocks = scale.repeat(len(some)), block.repeat(1, len(some))
        columns = Columns(torch.empty_like(all_blocks, dtype=torch.uint8), all_scales, some.flatten(), num_bits)
        corrected, errors = all_blocks + moved.repeat(1, len(some)), torch.empty_like(all_blocks)
        columns.round(all_blocks, corrected, factor, errors)
        # Columns before the group cannot make up for what rounding left of each.
        left = corrected.sub_(all_blocks).add_(errors).square_().mul_(costs[:, None])
        loss, which = left.sum(0).view(-1, rows).nan_to_num_(torch.finfo(torch.float32).max).min(0)
        better, at = loss < least, which * rows + torch.arange(rows, device=which.device)
        least = torch.where(better, loss, least)
        best.grid = torch.where(better, columns.grid[at], best.grid)
        best.codes = torch.where(better, columns.codes[:, at], best.codes)
        best_errors = torch.where(better, errors[:, at], best_errors)
    return best, best_errors


def improve(columns: Columns, gradient: Tensor, own: Tensor, times: int) -> Tensor:
    """Fit the grid and then the codes, so many times, and the grid again.

    gradient: ``[group_size, rows]`` float32, the columns' part of ``H @ E``, and what pulls at them, which is
    overwritten; E is the weight less its value; own: ``[group_size, group_size]``, their part of H.
    Returns what is added to E, ``[group_size, rows]``.
    """
    before = columns.values
    for _ in range(times):
        _fit_grid(columns, gradient, own)
        _fit_codes(columns, gradient, own)
    _fit_grid(columns, gradient, own)
    return before.sub_(columns.values)


def _fit_codes(columns: Columns, gradient: Tensor, own: Tensor) -> None:
    """Choose each code anew, given the others."""
    diagonal = own.diagonal()[:, None]
    values = columns.values
    change = torch.empty_like(values)
    columns.round(values, torch.addcdiv(values, gradient, diagonal), own / diagonal, change)
    gradient.addmm_(own, change)


def _fit_grid(columns: Columns, gradient: Tensor, own: Tensor) -> None:
    """Fit the grid of each row to its codes, where that helps as it is stored."""
    codes, step, zero = columns.codes.float(), columns.step, columns.zero
    weighted, one = own @ codes, own.sum(1)
    # The least squares of the change ``codes * slope + shift``.
    a, b, c = (weighted * codes).sum(0), one @ codes, one.sum()
    p, q = (gradient * codes).sum(0), gradient.sum(0)
    determinant = a * c - b * b
    solvable = determinant > _ROUNDING * a * c
    determinant = torch.where(solvable, determinant, 1.0)
    exact = step + (p * c - q * b) / determinant
    solvable &= exact > 0
    most, slope, shift = (torch.zeros_like(step) for _ in range(3))
    for steps in steps_around(exact, columns.scale):
        new_step = steps * columns.scale
        slope_of = new_step - step
        # The best shift beside this slope.
        grid = stored_grid(steps, (zero * step - (q - b * slope_of) / c) / new_step, columns.num_bits)
        shift_of = zero * step - grid_zero_points(grid, columns.num_bits) * new_step
        gain = 2 * (p * slope_of + q * shift_of)
        gain -= a * slope_of * slope_of + 2 * b * slope_of * shift_of + c * shift_of * shift_of
        # NaN of what overflows is not better.
        better = solvable & (gain > most)
        columns.grid = torch.where(better, grid, columns.grid)
        most, slope = torch.where(better, gain, most), torch.where(better, slope_of, slope)
        shift = torch.where(better, shift_of, shift)
    gradient.sub_(weighted.mul_(slope)).addr_(one, shift, alpha=-1)
