"""Signed codes of linear layers in 32-bit words, in the order that vLLM's own kernels load.

A word holds ``32 // num_bits`` consecutive codes of a row, the first in its lowest bits, each increased by
``2 ** (num_bits - 1)`` so that it is not negative. Source: the ``pack-quantized`` format of compressed-tensors.
"""

from __future__ import annotations

import torch

from alphaq_vllm.format import LINEAR_BITS, PACKED_DTYPE


def pack(codes: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Pack codes along the last dimension.

    codes: ``[..., in_features]`` int8, from ``-2 ** (num_bits - 1)`` to ``2 ** (num_bits - 1) - 1``; in_features a
    multiple of 32.
    Returns ``[..., in_features * num_bits // 32]`` int32.
    Raises ValueError for another width, for a code that needs more bits, and for another in_features.
    """
    offsets = _field_offsets(num_bits, codes.device)
    half = 2 ** (num_bits - 1)
    if codes.shape[-1] % 32:
        raise ValueError(f"in_features: expected a multiple of 32, got {codes.shape[-1]}")
    if codes.numel() and not -half <= int(codes.min()) <= int(codes.max()) < half:
        raise ValueError(f"codes: expected {-half} to {half - 1}, got {int(codes.min())} to {int(codes.max())}")
    fields = (codes.to(PACKED_DTYPE) + half).unflatten(-1, (-1, len(offsets)))
    return (fields << offsets).sum(-1, dtype=PACKED_DTYPE)


def unpack(packed: torch.Tensor, num_bits: int) -> torch.Tensor:
    """The inverse of ``pack``: ``[..., words]`` int32 to ``[..., words * 32 // num_bits]`` int8."""
    fields = (packed[..., None] >> _field_offsets(num_bits, packed.device)) & (2**num_bits - 1)
    return (fields - 2 ** (num_bits - 1)).to(torch.int8).flatten(-2)


def dequantize(
    packed: torch.Tensor, scale: torch.Tensor, num_bits: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The weight that a stored linear layer means: ``scale * code``, computed in float32.

    packed: ``[out_features, words]`` int32; scale: ``[out_features, groups]``.
    Returns ``[out_features, in_features]``, rounded once to ``dtype``.
    """
    codes = unpack(packed, num_bits)
    grouped = codes.view(*scale.shape, codes.shape[-1] // scale.shape[-1]).float()
    return (grouped * scale.float()[..., None]).flatten(-2).to(dtype)


def _field_offsets(num_bits: int, device: torch.device) -> torch.Tensor:
    """First bit of each code in a word."""
    if num_bits not in LINEAR_BITS:
        raise ValueError(f"num_bits: expected one of {LINEAR_BITS}, got {num_bits!r}")
    return torch.arange(0, 32, num_bits, dtype=PACKED_DTYPE, device=device)
