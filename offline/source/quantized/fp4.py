"""Weights of 4 bits in floating point (E2M1), a scale for each group in a row: MXFP4, NVFP4 and DeepSeek-V4's.

MXFP4 has groups of 32 and exponents as scales (OCP Microscaling Formats, version 1.0), NVFP4 groups of 16, scales in
float8, and a second scale for the whole tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from offline.source.quantized.joining import Parts
from offline.source.quantized.tensor import QuantizedTensor, decode_bytes, halves, load_scale
from offline.source.stored import StoredTensor

_POSITIVE = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_TABLE = halves(torch.cat((_POSITIVE, -_POSITIVE)))
_GROUPS = {torch.uint8: 32, torch.float8_e8m0fnu: 32, torch.float8_e4m3fn: 16}


@dataclass(frozen=True)
class Fp4Tensor(QuantizedTensor):
    """A stored tensor ``codes * scale``, or with a second scale ``codes * (scale * second)`` or ``(scale / second)``.

    packed: ``[..., out_features, in_features / 2]`` bytes, or the same with the last dimension divided in groups.
    scale: ``[..., out_features, groups]``. second: one float32. divided: whether it divides. transposed:
    whether the numbers are ``[..., in_features, out_features]``.
    """

    packed: StoredTensor
    scale: StoredTensor
    second: StoredTensor | None = None
    divided: bool = False
    transposed: bool = False

    def load_float32(self, index: int | None = None) -> torch.Tensor:
        """As ``QuantizedTensor`` says."""
        scales = self._scales(index)
        values = decode_bytes(self.packed.load(index), _TABLE).view(*scales.shape, -1)
        values = values.mul_(scales.unsqueeze(-1)).flatten(-2)
        return values.transpose(-1, -2) if self.transposed else values

    def bound(self) -> float:
        """As ``QuantizedTensor`` says."""
        return 6 * float(self._scales().abs().max())

    def _scales(self, index: int | None = None) -> torch.Tensor:
        scales = load_scale(self.scale, index)
        if self.second:
            second = self.second.load_float32().view(())
            scales = scales / second if self.divided else scales * second
        return scales


def read_mxfp4(name: str, parts: Parts) -> tuple[str, Fp4Tensor] | None:
    """As ``Reader`` says: ``*_blocks`` and ``*_scales`` as gpt-oss has them, which transformers holds transposed."""
    stem = name.removesuffix("_blocks")
    packed = parts.tensors[name]
    if stem == name or packed.spec.dtype != torch.uint8:
        return None
    parts.used.add(name)
    return stem, _join(name, packed, parts.take(f"{stem}_scales", name), transposed=True)


def read_nvfp4(name: str, parts: Parts) -> tuple[str, Fp4Tensor] | None:
    """As ``Reader`` says: ``weight`` and ``weight_scale`` as ModelOpt has them, with ``weight_scale_2``.

    Quark has MXFP4 so, without that.
    """
    packed = parts.tensors[name]
    if not name.endswith(".weight") or packed.spec.dtype != torch.uint8:
        return None
    scale, second = parts.take(f"{name}_scale", name), parts.find([f"{name}_scale_2"])
    return name, _join(name, packed, scale, second)


def read_packed_fp4(name: str, parts: Parts) -> tuple[str, Fp4Tensor] | None:
    """As ``Reader`` says: ``weight_packed`` and ``weight_scale`` as compressed-tensors has them.

    NVFP4 comes with ``weight_global_scale``, which divides.
    """
    packed, stem = parts.tensors[name], name.removesuffix("_packed")
    if stem == name or packed.spec.dtype != torch.uint8:
        return None
    parts.used.add(name)
    scale, second = parts.take(f"{stem}_scale", name), parts.find([f"{stem}_global_scale"])
    return stem, _join(name, packed, scale, second, divided=True)


def read_deepseek_fp4(name: str, parts: Parts) -> tuple[str, Fp4Tensor] | None:
    """As ``Reader`` says: ``weight`` in int8 and ``scale`` in E8M0, as DeepSeek-V4 has its experts."""
    packed, scale = parts.tensors[name], parts.tensors.get(f"{name.removesuffix('.weight')}.scale")
    if packed.spec.dtype != torch.int8 or scale is None or scale.spec.dtype != torch.float8_e8m0fnu:
        return None
    parts.find([f"{name.removesuffix('.weight')}.scale"])
    return name, _join(name, packed, scale)


def _join(
    name: str,
    packed: StoredTensor,
    scale: StoredTensor,
    second: StoredTensor | None = None,
    divided: bool = False,
    transposed: bool = False,
) -> Fp4Tensor:
    """The tensor whose codes have this name. Raises ValueError unless its parts fit together."""
    codes, scales = packed.spec, scale.spec
    if scales.dtype not in _GROUPS or len(scales.shape) < 2:
        raise ValueError(
            f"{name}: expected scales of each row in uint8, float8_e8m0fnu or float8_e4m3fn, got {scales.dtype} of "
            f"shape {scales.shape}"
        )
    (*experts, rows, groups), size = scales.shape, _GROUPS[scales.dtype]
    if codes.shape not in ((*experts, rows, groups * size // 2), (*experts, rows, groups, size // 2)):
        raise ValueError(
            f"{name}: expected two codes in a byte, in groups of {size} for scales of shape {scales.shape}, got "
            f"shape {codes.shape}: download the checkpoint again"
        )
    if scales.dtype == torch.float8_e4m3fn and second is None:
        raise ValueError(
            f"{name}: expected a second scale, of the whole tensor, got none: download the checkpoint again"
        )
    if second and (second.spec.dtype != torch.float32 or prod(second.spec.shape) != 1):
        raise ValueError(
            f"{name}: expected one float32 as the scale of the whole tensor, got {second.spec.dtype} of shape "
            f"{second.spec.shape}: download the checkpoint again"
        )
    matrix = (groups * size, rows) if transposed else (rows, groups * size)
    return Fp4Tensor((*experts, *matrix), 4, packed, scale, second, divided, transposed)
