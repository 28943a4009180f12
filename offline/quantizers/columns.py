"""The columns of a group while it is quantized, and how they become better.

Both ways of it lower ``E.T @ H @ E`` for the errors E of each row, and never raise it: the grid that fits the codes
best, by least squares, and each code in turn, by coordinate descent. H weighs errors as the inputs do; data-free
quantizers know only the case that it is the identity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alphaq_vllm.format import SCALE_DTYPE, ZERO_DTYPE
from offline.quantizers import native
from offline.quantizers.groups import LARGEST_SCALE, LARGEST_ZERO, SMALLEST_SCALE

# What is taken for no more than rounding in a determinant, by its terms.
_ROUNDING = 1e-6


@dataclass
class Columns:
    """Columns of one group of every row: ``codes [group_size, rows]`` uint8, up to ``top``, and the grid as stored,
    ``scale`` and ``zero [rows]``.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    top: int

    @property
    def values(self) -> Tensor:
        """What they mean, ``[group_size, rows]`` float32."""
        return (self.codes - self.zero.float()) * self.scale.float()

    def round(self, block: Tensor, corrected: Tensor, factor: Tensor, errors: Tensor) -> None:
        """Round columns from the last to the first, each moved by the errors of those after it, and write the errors.

        block: ``[group_size, rows]`` float32, of which the errors are; corrected: what is rounded, which may be
        overwritten; factor: ``[group_size, group_size]`` with contiguous rows, of which row i above the diagonal says
        how errors move column i.
        """
        step, offset = self.scale.float(), self.zero.float()
        if block.device.type == "cpu" and (code := native.library()):
            native.round_columns(code, block, corrected, factor, step, offset, self.top, self.codes, errors)
            return
        for j in reversed(range(len(block))):
            rounded = (corrected[j] / step).add_(offset).clamp_(0, self.top).round_()
            self.codes[j] = rounded
            errors[j] = block[j] - (rounded - offset) * step
            corrected[:j].addr_(factor[:j, j], errors[j])


def improve(columns: Columns, gradient: Tensor, own: Tensor, times: int) -> Tensor:
    """Fit the grid and then the codes, so many times, and the grid again.

    gradient: ``[group_size, rows]`` float32, the columns' part of ``H @ E``, which is overwritten; E is the weight less
    its value; own: ``[group_size, group_size]``, their part of H.
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
    """Fit the grid of each row to its codes, where that helps after rounding it."""
    codes, scale, zero = columns.codes.float(), columns.scale.float(), columns.zero.float()
    weighted, one = own @ codes, own.sum(1)
    # The least squares of the change ``codes * step + shift``.
    a, b, c = (weighted * codes).sum(0), one @ codes, one.sum()
    p, q = (gradient * codes).sum(0), gradient.sum(0)
    determinant = a * c - b * b
    solvable = determinant > _ROUNDING * a * c
    determinant = torch.where(solvable, determinant, 1.0)
    exact = scale + (p * c - q * b) / determinant
    start = (a * q - b * p) / determinant - zero * scale
    new_scale = exact.clamp(SMALLEST_SCALE, LARGEST_SCALE).to(SCALE_DTYPE)
    new_zero = (-start / new_scale.float()).clamp(-LARGEST_ZERO, LARGEST_ZERO).to(ZERO_DTYPE)
    step = new_scale.float() - scale
    shift = zero * scale - new_zero.float() * new_scale.float()
    gain = 2 * (p * step + q * shift) - (a * step * step + 2 * b * step * shift + c * shift * shift)
    # NaN of what overflows is not better.
    better = solvable & (exact > 0) & (gain > 0)
    columns.scale = torch.where(better, new_scale, columns.scale)
    columns.zero = torch.where(better, new_zero, columns.zero)
    step, shift = step.where(better, 0.0), shift.where(better, 0.0)
    gradient.sub_(weighted.mul_(step)).addr_(one, shift, alpha=-1)
