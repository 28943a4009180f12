"""The loops of quantization as native code, called through ctypes. See native/quantize.cpp for what they compute."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from alphaq_vllm import native_build
from alphaq_vllm.native_build import QUANTIZERS
from offline.quantizers.groups import Groups

_pointer, _int64, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


@cache
def library() -> ctypes.CDLL | None:
    """The code for this processor, compiled now if it was not before, or None if there is none: the log says why."""
    without = "AlphaQ quantizes with torch, many times slower than its native code"
    name = native_build.choose_instruction_set(QUANTIZERS, "AlphaQ's native code to quantize", without)
    return None if name == "none" else native_build.load(QUANTIZERS, name)


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
