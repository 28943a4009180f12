"""Ways to quantize that the converter does not offer, as functions from a weight to what would be restored from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from offline.quantizers import grids
from offline.quantizers.groups import FindGrid, Groups, encode, normalize, quantize_groups, stored_grid

GROUP_SIZE = 128
# Least-squares steps of ``alternating_grid``, and Sinkhorn steps of ``column_scales``.
FITS, BALANCES = 12, 16
# What ``symmetric_grid`` tries: the range, cut off by these factors.
SHRINKS = tuple(0.3 + 0.02 * i for i in range(36))


def alternating_grid(groups: Groups, top: int) -> tuple[Tensor, Tensor]:
    """Nearest codes and the least-squares scale and zero point for them, in turn, from the range of the group on."""
    inverse_step = zero = torch.full_like(groups.radius, top / 2)
    for _ in range(FITS):
        inverse_step, zero = grids._refit(groups, inverse_step[None], zero[None], top)
    return stored_grid(groups, inverse_step, zero, top)


def symmetric_grid(groups: Groups, top: int) -> tuple[Tensor, Tensor]:
    """The best scale of a grid whose middle is 0, so that no zero point has to be stored."""
    peak = groups.weight.abs().amax(-1, keepdim=True).clamp_min(1e-12)
    zero = torch.full_like(peak, top / 2).half()
    scales = [(peak * shrink * 2 / top).bfloat16() for shrink in SHRINKS]
    errors = torch.stack([encode(groups.weight, scale, zero, top)[1] for scale in scales])
    return torch.stack(scales).gather(0, errors.argmin(0, keepdim=True))[0], zero


def coarse_grid(scale_bits: int, zero_bits: int, rows: int) -> FindGrid:
    """The grid of least squared error with its scale and zero point stored in fewer bits: scales on a logarithmic grid
    below the largest of their row, zero points in steps of a fraction of the range around its middle.

    rows: of the matrix whose groups are given.
    """
    # Octaves below the largest scale that can be stored, and steps in each.
    steps = {8: 16, 6: 8, 4: 4}[scale_bits]

    def find(groups: Groups, top: int) -> tuple[Tensor, Tensor]:
        exact, zero = (tensor.float() for tensor in grids.mse_grid(groups, top))
        largest = exact.view(rows, -1).amax(-1, keepdim=True)
        codes = (-(exact.view(rows, -1) / largest).log2() * steps).round().clamp(0, 2**scale_bits - 1)
        scale = (largest * 2 ** (-codes / steps)).view_as(exact)
        # The middle of the grid stays where it was, as far as its steps allow.
        step, reach = top / 2**zero_bits, 2 ** (zero_bits - 1)
        offset = ((top / 2 - zero) * exact / scale / step).round().clamp(-reach, reach - 1)
        return scale, top / 2 - offset * step

    return find


def restored(weight: Tensor, num_bits: int, find_grid: FindGrid, group_size: int = GROUP_SIZE) -> Tensor:
    """What is restored from a matrix quantized on the grids that are found, float32."""
    groups = normalize(weight.float().reshape(-1, group_size))
    codes, scale, zero, _ = quantize_groups(groups, 2**num_bits - 1, find_grid)
    return ((codes.float() - zero.float()) * scale.float()).view_as(weight)


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
