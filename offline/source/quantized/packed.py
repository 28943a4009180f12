"""Weights as whole numbers, several in a word of 32 bits, a scale for each group in a row: of 4 bits, but others too.

compressed-tensors calls it pack-quantized. AWQ and GPTQ have the transpose, and zero points.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from offline.source.quantized.joining import Parts
from offline.source.quantized.tensor import SCALE_DTYPES, QuantizedTensor, decode_bytes, halves
from offline.source.stored import StoredTensor

# Where AWQ has the first to the last of eight codes in a word: the order suits its kernels.
_AWQ_FIELDS = [0, 4, 1, 5, 2, 6, 3, 7]
_TABLE = halves(torch.arange(16))


def unpack(words: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Codes from 0 up, in float32, of int32 words with as many as there is room for, the first in the lowest bits.

    The last dimension becomes as many times longer.
    """
    if num_bits == 4:
        return decode_bytes(words, _TABLE)
    shifts = torch.arange(32 // num_bits, dtype=torch.int32) * num_bits
    return ((words.unsqueeze(-1) >> shifts) & (2**num_bits - 1)).flatten(-2).float()


@dataclass(frozen=True)
class PackedTensor(QuantizedTensor):
    """Stored tensors that mean ``(code - 2 ** (num_bits - 1)) * scale``, or ``(code - zero_point) * scale``.

    packed: ``[..., out_features, words]`` int32. scale: ``[..., out_features, groups]``. zero_point: ``[..., words,
    groups]`` int32. order: ``[in_features]``, the group of each column. stated: two integers, the shape.
    """

    packed: StoredTensor
    scale: StoredTensor
    zero_point: StoredTensor | None = None
    order: StoredTensor | None = None
    stated: StoredTensor | None = None

    def load_float32(self, index: int | None = None) -> torch.Tensor:
        """As ``QuantizedTensor`` says. Raises ValueError for another shape or other groups than there are."""
        self._check_shape()
        # The last word need not be full.
        codes = unpack(self.packed.load(index), self.num_bits)[..., : self.shape[-1]]
        scales = self.scale.load_float32(index)
        zero_points: torch.Tensor | int = 2 ** (self.num_bits - 1)
        if self.zero_point:
            packed = self.zero_point.load(index).transpose(-1, -2)
            zero_points = unpack(packed, self.num_bits)[..., : scales.shape[-2]].transpose(-1, -2)
        return _scaled(codes, zero_points, scales, _groups(self.order, scales.shape[-1]))

    def bound(self) -> float:
        """As ``QuantizedTensor`` says."""
        self._check_shape()
        _groups(self.order, self.scale.spec.shape[-1])
        return _bound(self.scale, self.num_bits)

    def _check_shape(self) -> None:
        if self.stated and tuple(self.stated.load().tolist()) != self.shape:
            raise ValueError(
                f"{self.stated.file}: expected weight_shape {self.shape} as the codes have it, got "
                f"{self.stated.load().tolist()}: download the checkpoint again"
            )


@dataclass(frozen=True)
class TransposedTensor(QuantizedTensor):
    """AWQ's and GPTQ's: the same as ``(code - zero_point) * scale``, with input features first.

    packed: int32, ``[in_features, out_features / 8]`` of AWQ, ``[in_features / (32 / bits), out_features]`` of GPTQ.
    scale: ``[groups, out_features]``. zero_point: ``[groups, out_features / (32 / bits)]`` int32, to which ``offset``
    is added. order: ``[in_features]``, the group of each.
    """

    packed: StoredTensor
    scale: StoredTensor
    zero_point: StoredTensor
    awq: bool = False
    offset: int = 0
    order: StoredTensor | None = None

    def load_float32(self, index: int | None = None) -> torch.Tensor:
        """As ``QuantizedTensor`` says. Raises ValueError for groups that are not there."""
        packed, zero_points = self.packed.load(), unpack(self.zero_point.load(), self.num_bits)
        if self.awq:
            codes, zero_points = _awq_ordered(unpack(packed, self.num_bits)).T, _awq_ordered(zero_points)
        else:
            codes = unpack(packed.T, self.num_bits)
        scales = self.scale.load_float32().T
        # The last word of a row need not be full.
        zeros = zero_points.T[: len(scales)] + self.offset
        values = _scaled(codes, zeros, scales, _groups(self.order, scales.shape[-1])).contiguous()
        return values if index is None else values[index]

    def bound(self) -> float:
        """As ``QuantizedTensor`` says."""
        _groups(self.order, self.scale.spec.shape[0])
        return _bound(self.scale, self.num_bits)


def _bound(scale: StoredTensor, num_bits: int) -> float:
    """No code is further from its zero point than there are codes."""
    return 2**num_bits * float(scale.load_float32().abs().max())


def _groups(order: StoredTensor | None, number: int) -> torch.Tensor | None:
    """The group of each column where they are not in order. Raises ValueError unless all are below ``number``."""
    if order is None:
        return None
    groups = order.load().long()
    least, greatest = (int(bound) for bound in groups.aminmax())
    if greatest == -1:
        # compressed-tensors' word for columns in order.
        return None
    if least < 0 or greatest >= number:
        raise ValueError(
            f"{order.file}: g_idx: expected groups from 0 to {number - 1}, got {least if least < 0 else greatest}: "
            "download the checkpoint again"
        )
    return groups


def _scaled(
    codes: torch.Tensor, zero_points: torch.Tensor | int, scales: torch.Tensor, groups: torch.Tensor | None
) -> torch.Tensor:
    """``(code - zero_point) * scale`` in float32, ``groups`` of equal size if there is no list of those of columns."""
    if groups is None:
        zeros = zero_points.unsqueeze(-1) if isinstance(zero_points, torch.Tensor) else zero_points
        return codes.unflatten(-1, (scales.shape[-1], -1)).sub(zeros).mul_(scales.unsqueeze(-1)).flatten(-2)
    zeros = zero_points[..., groups] if isinstance(zero_points, torch.Tensor) else zero_points
    return codes.sub(zeros).mul_(scales[..., groups])


def _awq_ordered(fields: torch.Tensor) -> torch.Tensor:
    return fields.unflatten(-1, (-1, 8))[..., _AWQ_FIELDS].flatten(-2)


@dataclass(frozen=True)
class PackedReader:
    """Joins what compressed-tensors packs; schemes: bits of a code, and columns of a group or None for whole rows."""

    schemes: tuple[tuple[int, int | None], ...]

    def __call__(self, name: str, parts: Parts) -> tuple[str, PackedTensor] | None:
        """As ``Reader`` says."""
        packed, stem = parts.tensors[name], name.removesuffix("_packed")
        if stem == name or packed.spec.dtype != torch.int32:
            return None
        parts.used.add(name)
        scale = parts.take(f"{stem}_scale", name)
        rows, words = packed.spec.shape[:-1], packed.spec.shape[-1] if packed.spec.shape else 0
        groups = scale.spec.shape[-1] if scale.spec.shape else 0
        fitting = {
            (bits, columns)
            for bits, size in self.schemes
            for columns in [groups * size if size else words * (32 // bits)]
            if groups == (groups if size else 1) and columns and words == -(-columns // (32 // bits))
        }
        if len(rows) < 1 or scale.spec.shape[:-1] != rows or scale.spec.dtype not in SCALE_DTYPES or len(fitting) != 1:
            schemes = " or ".join(f"{bits} bits in groups of {size or 'a row'}" for bits, size in self.schemes)
            raise ValueError(
                f"{name}: expected int32 words of {schemes or 'no kind'} with a scale for each group, as the config "
                f"says, got shape {packed.spec.shape} with {scale.spec.dtype} scales of shape {scale.spec.shape}"
            )
        ((bits, columns),) = fitting
        zero_point, order = parts.find([f"{stem}_zero_point"]), parts.find([f"{stem}_g_idx"])
        shape = *rows, columns
        joined = PackedTensor(shape, bits, packed, scale, zero_point, order, parts.find([f"{stem}_shape"]))
        packed_rows = -(-rows[-1] // (32 // bits))
        _check(name, "zero points", zero_point, (torch.int32,), (*rows[:-1], packed_rows, groups))
        _check(name, "g_idx", order, (torch.int32, torch.int64), shape[-1:])
        _check(name, "weight_shape", joined.stated, (torch.int32, torch.int64), (len(shape),))
        return stem, joined


@dataclass(frozen=True)
class TransposedReader:
    """Joins what AWQ and GPTQ pack: see ``TransposedTensor``."""

    bits: int
    awq: bool = False
    offset: int = 0

    def __call__(self, name: str, parts: Parts) -> tuple[str, TransposedTensor] | None:
        """As ``Reader`` says."""
        packed, stem = parts.tensors[name], name.removesuffix(".qweight")
        if stem == name or packed.spec.dtype != torch.int32 or len(packed.spec.shape) != 2:
            return None
        parts.used.add(name)
        scale, zero_point = (parts.take(f"{stem}.{part}", name) for part in ("scales", "qzeros"))
        order = None if self.awq else parts.find([f"{stem}.g_idx"])
        (rows, columns), count = packed.spec.shape, 32 // self.bits
        out_features, in_features = (columns * count, rows) if self.awq else (columns, rows * count)
        groups = scale.spec.shape[0] if scale.spec.shape else 0
        _check(name, "scales", scale, SCALE_DTYPES, (groups, out_features))
        _check(name, "zero points", zero_point, (torch.int32,), (groups, -(-out_features // count)))
        _check(name, "g_idx", order, (torch.int32,), (in_features,))
        if not groups or (order is None and in_features % groups):
            raise ValueError(f"{name}: expected whole groups in {in_features} input features, got {groups} groups")
        shape = out_features, in_features
        return f"{stem}.weight", TransposedTensor(
            shape, self.bits, packed, scale, zero_point, self.awq, self.offset, order
        )


def _check(
    name: str, what: str, part: StoredTensor | None, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]
) -> None:
    if part and (part.spec.dtype not in dtypes or part.spec.shape != shape):
        raise ValueError(
            f"{name}: expected its {what} of shape {shape} in {' or '.join(str(d) for d in dtypes)}, got "
            f"{part.spec.dtype} of shape {part.spec.shape}: download the checkpoint again"
        )
