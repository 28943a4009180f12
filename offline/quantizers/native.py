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

NOT_FINITE = "weight: expected finite values, got NaN or Inf: repair the source checkpoint"
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
    code: ctypes.CDLL, groups: Groups, top: int, attempts: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The search of ``grids.mse_grid``.

    code: ``library()``; attempts: of ``grids.grid_attempts``. All on the CPU, float32.
    Returns inverse steps and zero points, ``[groups, 1]``.
    """
    inverse_step, zero = torch.empty_like(groups.mean), torch.empty_like(groups.mean)
    code.alphaq_mse_grid(
        *map(_at, (groups.x, groups.mean, groups.variance)),
        *map(_int64, groups.x.shape),
        _float(top),
        *_attempts(*attempts),
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


def round_group(
    code: ctypes.CDLL,
    block: Tensor,
    moved: Tensor,
    scale: Tensor,
    num_bits: int,
    effects: tuple[Tensor, Tensor, Tensor],
    reach: int,
    improvements: int,
    attempts: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``columns.round_group`` computes.

    code: ``library()``; block, moved, improvements: as there; scale: ``[rows]`` float32; effects: ``factor``,
    ``to_gradient`` and ``own`` there; reach: ``REACH`` there; attempts: of ``grids.grid_attempts``. All on the CPU.
    """
    codes, errors = torch.empty_like(block, dtype=torch.uint8), torch.empty_like(block)
    grid = torch.empty_like(scale, dtype=GRID_DTYPE)
    finite = code.alphaq_round_group(
        *map(_at, (block, moved, scale)),
        *map(_int64, (*block.shape, num_bits)),
        *map(_at, effects),
        *map(_int64, (reach, improvements)),
        *_attempts(*attempts),
        *map(_at, (codes, grid, errors)),
    )
    if not finite:
        raise ValueError(NOT_FINITE)
    return codes, grid, errors


def _attempts(starts: Tensor, factors: Tensor, shifts: Tensor) -> tuple[object, ...]:
    return _at(starts), _int64(len(starts)), *map(_at, (factors, shifts)), *map(_int64, factors.shape)


def _at(tensor: Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    return _pointer(tensor.data_ptr())
