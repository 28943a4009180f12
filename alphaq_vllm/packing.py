"""Codes of 1 to 8 bits in 32-bit words, without a wasted bit, and what they mean.

A row is cut into units of 32 consecutive codes; a unit of b-bit codes fills b consecutive words. b is written as a sum
of powers of two, largest first (7 = 4 + 2 + 1). Each power p is a *plane* of p words that holds p bits of each of the
unit's codes, the first plane the lowest bits. Code k of a unit has its field in word ``(k // 2) * p // 16`` of the
plane, starting at bit ``16 * (k % 2) + (k // 2) * p % 16``.

Even codes fill the low half of every word and odd codes the high half at the same places, so one mask yields two
neighbours, one in each half of a register: the operand layout of 16-bit matrix instructions.

A grid is a byte. Its lower half is the step less one: from 1 to 16, in scales of the row. Steps that are equally far
apart lose as much of every group, and most groups have large ones. Its upper half is the zero point in parts of a 32nd
of the number of codes, from the 6th to the 21st: about the middle, where those of weights are. Some of them are codes,
so that 0 can be a value of a grid, and others lie between two codes.
"""

from __future__ import annotations

import torch

from alphaq_vllm.format import PACKED_DTYPE, SUPPORTED_BITS

UNIT = 32


def planes(num_bits: int) -> tuple[int, ...]:
    """The widths of the planes of a ``num_bits``-bit code, from the lowest bits up.

    >>> planes(7), planes(8)
    ((4, 2, 1), (8,))
    """
    if num_bits not in SUPPORTED_BITS:
        raise ValueError(f"num_bits: expected one of {SUPPORTED_BITS}, got {num_bits!r}")
    return tuple(p for p in (8, 4, 2, 1) if num_bits & p)


def pack(codes: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Pack codes along the last dimension.

    codes: ``[..., in_features]`` uint8, each below ``2 ** num_bits``; in_features a multiple of 32.
    Returns ``[..., in_features * num_bits // 32]`` int32.
    Raises ValueError if a code needs more bits or in_features is not a multiple of 32.
    """
    in_features = codes.shape[-1]
    if in_features % UNIT:
        raise ValueError(f"in_features: expected a multiple of {UNIT}, got {in_features}")
    plane_widths = planes(num_bits)
    if codes.numel() and int(codes.max()) >> num_bits:
        raise ValueError(f"codes: expected values below 2**{num_bits}, got {int(codes.max())}")
    units = codes.reshape(*codes.shape[:-1], in_features // UNIT, UNIT).to(PACKED_DTYPE)
    words, low_bit = [], 0
    for p in plane_widths:
        fields = (units >> low_bit) & (2**p - 1)
        fields = fields.view(*units.shape[:-1], p, 16 // p, 2) << _field_offsets(p, codes.device)
        words.append(fields.sum((-2, -1), dtype=PACKED_DTYPE))
        low_bit += p
    return torch.cat(words, -1).flatten(-2)


def unpack(packed: torch.Tensor, num_bits: int) -> torch.Tensor:
    """The inverse of ``pack``.

    packed: ``[..., words]`` int32, words a multiple of num_bits.
    Returns ``[..., 32 * words // num_bits]`` uint8.
    """
    units = packed.reshape(*packed.shape[:-1], packed.shape[-1] // num_bits, num_bits)
    pairs = torch.zeros((*units.shape[:-1], UNIT // 2), dtype=PACKED_DTYPE, device=packed.device)
    low_bit = 0
    for p in planes(num_bits):
        slots = torch.arange(0, 16, p, dtype=PACKED_DTYPE, device=packed.device)
        fields = (units[..., low_bit : low_bit + p, None] >> slots) & (2**p - 1) * 0x00010001
        pairs |= fields.flatten(-2) << low_bit
        low_bit += p
    return pairs.view(torch.int16).flatten(-2).to(torch.uint8)


def grid_steps(grid: torch.Tensor) -> torch.Tensor:
    """The steps of grids, in scales of their rows: float32.

    >>> grid_steps(torch.tensor([0x00, 0x80, 0x0F], dtype=torch.uint8)).tolist()
    [1.0, 1.0, 16.0]
    """
    return (grid & 15).float() + 1


def grid_zero_points(grid: torch.Tensor, num_bits: int) -> torch.Tensor:
    """The zero points of grids, in codes: float32.

    >>> grid_zero_points(torch.tensor([0x00, 0x80, 0xF0], dtype=torch.uint8), 3).tolist()
    [1.5, 3.5, 5.25]
    """
    return ((grid >> 4).float() + 6) * 2.0 ** (num_bits - 5)


def dequantize(
    packed: torch.Tensor,
    scale: torch.Tensor,
    grid: torch.Tensor,
    num_bits: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The weight that a stored matrix means: ``scale * (step * (code - zero_point))``, computed in float32.

    packed: ``[out_features, words]`` int32; scale: ``[out_features, 1]``; grid: ``[out_features, groups]`` uint8.
    Returns ``[out_features, in_features]``, rounded once to ``dtype``.
    """
    codes = unpack(packed, num_bits)
    grouped = codes.view(*grid.shape, codes.shape[-1] // grid.shape[-1]).float()
    weight = (grouped - grid_zero_points(grid, num_bits)[..., None]) * grid_steps(grid)[..., None]
    return (weight.flatten(-2) * scale.float()).to(dtype)


def _field_offsets(p: int, device: torch.device) -> torch.Tensor:
    """First bit of the field in slot s, half h of a word in a plane of p-bit fields: ``[16 // p, 2]`` int32."""
    slots = torch.arange(0, 16, p, dtype=PACKED_DTYPE, device=device)
    return torch.stack((slots, slots + 16), -1)
