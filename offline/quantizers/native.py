"""The loops of quantization as native code, called through ctypes. See native/quantize.cpp for what they compute."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alphaq_vllm import native_build
from alphaq_vllm.format import GRID_DTYPE, PACKED_DTYPE
from alphaq_vllm.native_build import QUANTIZERS
from alphaq_vllm.packing import UNIT

if TYPE_CHECKING:
    from offline.quantizers.groups import Groups

_pointer, _int64, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


@cache
def library() -> ctypes.CDLL | None:
    """The code for this processor, compiled now if it was not before, or None if there is none: the log says why."""
    without = "AlphaQ quantizes with torch, many times slower than its native code"
    name = native_build.choose_instruction_set(QUANTIZERS, "AlphaQ's native code to quantize", without)
    return None if name == "none" else native_build.load(QUANTIZERS, name)


def normalize(code: ctypes.CDLL, weight: Tensor) -> tuple[Tensor, ...]:
    """What ``groups.normalize`` computes: x, ``[groups, group_size]``, and center, radius, mean and variance,
    ``[groups, 1]``, all float32. The radius of a group that is not finite is not either.

    code: ``library()``; weight: ``[groups, group_size]`` float32 on the CPU.
    """
    x, values = torch.empty_like(weight), [weight.new_empty(len(weight), 1) for _ in range(4)]
    code.alphaq_normalize(_at(weight), *map(_int64, weight.shape), *map(_at, (x, *values)))
    return x, *values


def mse_grid(
    code: ctypes.CDLL, groups: Groups, top: int, starts: Tensor, factors: Tensor, shifts: Tensor
) -> tuple[Tensor, Tensor]:
    """The search of ``grids.mse_grid``.

    code: ``library()``; starts: inverse steps of the first grids; factors, shifts: ``[rounds, directions]``, what
    disturbs a grid, the identity first. All on the CPU, float32.
    Returns inverse steps and zero points, ``[groups, 1]``.
    """
    count, size = groups.x.shape
    inverse_step, zero = torch.empty_like(groups.mean), torch.empty_like(groups.mean)
    code.alphaq_mse_grid(
        *map(_at, (groups.x, groups.mean, groups.variance)),
        *map(_int64, (count, size)),
        _float(top),
        _at(starts),
        _int64(len(starts)),
        *map(_at, (factors, shifts)),
        *map(_int64, factors.shape),
        *map(_at, (inverse_step, zero)),
    )
    return inverse_step, zero


def store_groups(
    code: ctypes.CDLL, groups: Groups, num_bits: int, scale: Tensor, inverse_step: Tensor, zero: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The choice of ``groups.quantize_groups`` among the grids that can be stored.

    code: ``library()``; scale: of the groups' rows; inverse_step, zero: of the grids to come near to; all on the CPU,
    ``[groups, 1]`` float32.
    Returns codes uint8 ``[groups, group_size]``, and ``[groups, 1]`` the grids as stored and squared errors, float64.
    """
    codes = torch.empty_like(groups.weight, dtype=torch.uint8)
    grid, sse = (torch.empty_like(scale, dtype=dtype) for dtype in (GRID_DTYPE, torch.float64))
    code.alphaq_store_groups(
        *map(_at, (groups.weight, groups.center, groups.radius, groups.mean, groups.variance, scale)),
        *map(_int64, (*groups.weight.shape, num_bits)),
        *map(_at, (inverse_step, zero, codes, grid, sse)),
    )
    return codes, grid, sse


def pack(code: ctypes.CDLL, codes: Tensor, num_bits: int) -> Tensor:
    """``packing.pack`` of ``[rows, in_features]``, whose codes are not checked.

    code: ``library()``; codes: uint8 on the CPU, whole units.
    """
    rows, units = len(codes), codes.shape[1] // UNIT
    words = codes.new_empty(rows, units * num_bits, dtype=PACKED_DTYPE)
    code.alphaq_pack(_at(codes), *map(_int64, (rows * units, num_bits)), _at(words))
    return words


def round_columns(
    code: ctypes.CDLL,
    block: Tensor,
    corrected: Tensor,
    factor: Tensor,
    step: Tensor,
    offset: Tensor,
    top: int,
    codes: Tensor,
    errors: Tensor,
) -> None:
    """The loop of ``gptq`` over the columns of one group.

    code: ``library()``; block, corrected: ``[size, rows]``, the columns; factor: ``[size, size]``, of contiguous rows;
    step, offset: ``[rows]``; codes, errors: ``[size, rows]``, which are written, uint8 and float32. All on the CPU, the
    others float32.
    """
    assert factor.stride(1) == 1
    code.alphaq_gptq_columns(
        *map(_at, (block, corrected)),
        _pointer(factor.data_ptr()),
        _int64(factor.stride(0)),
        *map(_at, (step, offset)),
        *map(_int64, block.shape),
        _float(top),
        *map(_at, (codes, errors)),
    )


def _at(tensor: Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    return _pointer(tensor.data_ptr())
