"""Quantization of a matrix without data: every group of weights on its own uniform grid, packed as it is stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alphaq_vllm import packing
from alphaq_vllm.format import GRID, PACKED, SCALE, SUPPORTED_BITS, SUPPORTED_GROUP_SIZES, matrix_tensors
from offline.quantizers import native
from offline.quantizers.grids import GRIDS, hqq_grid, mse_grid
from offline.quantizers.groups import FindGrid, Groups, normalize, quantize_groups, row_scales

QUANTIZERS = (*GRIDS, "gptq")
# Weights searched at a time: what keeps the disturbed copies in a CPU's cache, what makes the calls of native code few,
# which has no copies, and what keeps a GPU busy.
CPU_CHUNK, NATIVE_CHUNK, GPU_CHUNK = 2**16, 2**20, 2**22
# Rows that are packed or unpacked together.
_PACKED_ROWS = 256
# ``quantization_mse`` quantizes about this many groups, and no fewer rows.
SAMPLED_GROUPS, SAMPLED_ROWS = 4096, 64


@dataclass(frozen=True)
class Quantized:
    """One matrix as the format stores it, and the mean squared error of what is stored, in squared units of weight."""

    packed: Tensor
    scale: Tensor
    grid: Tensor
    mse: float

    @classmethod
    def joined(cls, parts: Sequence[Quantized]) -> Quantized:
        """A matrix of whole groups of its columns, one part after the other, which have its scales."""
        if len(parts) == 1:
            return parts[0]
        packed, grid = (torch.cat([getattr(part, name) for part in parts], 1) for name in ("packed", "grid"))
        columns = [part.grid.shape[1] for part in parts]
        mse = sum(part.mse * share for part, share in zip(parts, columns, strict=True)) / sum(columns)
        return cls(packed, parts[0].scale, grid, mse)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The stored tensors of the matrix ``name``, by their names."""
        return {f"{name}.{PACKED}": self.packed, f"{name}.{SCALE}": self.scale, f"{name}.{GRID}": self.grid}

    def dequantize(self, num_bits: int) -> Tensor:
        """The matrix that is stored, ``[out_features, in_features]`` float32, in little more memory than that."""
        parts = (tensor.split(_PACKED_ROWS) for tensor in (self.packed, self.scale, self.grid))
        stored = zip(*parts, strict=True)
        return torch.cat([packing.dequantize(packed, scale, grid, num_bits) for packed, scale, grid in stored])


def pack(codes: Tensor, num_bits: int) -> Tensor:
    """``packing.pack`` of a matrix of codes, ``[out_features, in_features]``, in little more memory than the result."""
    return torch.cat([_pack(some.contiguous(), num_bits) for some in codes.split(_PACKED_ROWS)])


def _pack(codes: Tensor, num_bits: int) -> Tensor:
    if codes.device.type == "cpu" and (code := native.library()):
        return native.pack(code, codes, num_bits)
    return packing.pack(codes, num_bits)


def quantize(
    weight: Tensor, num_bits: int, group_size: int, quantizer: str = "mse", scales: Tensor | None = None
) -> Quantized:
    """Quantize a matrix without data.

    weight: ``[out_features, in_features]``, any floating dtype, any device; quantizer: how grids are found, one of
    ``GRIDS``; scales: as of ``scales_of`` a matrix of which these are some columns, by default of this one.
    The error is that of the stored values against the weight in float32. Rows do not depend on others.
    Raises ValueError for NaN or Inf, for a width or group size that the format does not have, and for an unknown
    quantizer.
    """
    check_matrix(weight, [num_bits], group_size)
    find_grid = _find_grid(quantizer)
    specs = matrix_tensors(weight.shape[0], weight.shape[1], num_bits, group_size)
    error = torch.zeros((), dtype=torch.float64, device=weight.device)
    parts: list[tuple[Tensor, ...]] = []
    for rows, groups in chunks(weight, group_size, find_grid):
        given, scales = (None, None) if scales is None else (scales[: len(rows)], scales[len(rows) :])
        codes, scale, grid, sse = quantize_groups(groups, num_bits, find_grid, given)
        parts.append((_pack(codes.view(rows.shape), num_bits), scale, grid))
        error += sse
    packed, scale, grid = (
        torch.cat(tensors).view(spec.shape)
        for tensors, spec in zip(zip(*parts, strict=True), specs.values(), strict=True)
    )
    return Quantized(packed, scale, grid, error.item() / weight.numel())


def scales_of(weight: Tensor, num_bits: int, group_size: int) -> Tensor:
    """The scales of the rows of a matrix, as stored, ``[out_features, 1]``. Raises ValueError for NaN or Inf."""
    return torch.cat([row_scales(groups, num_bits) for _, groups in chunks(weight, group_size)])


def quantization_mse(weight: Tensor, widths: Sequence[int], group_size: int, quantizer: str = "mse") -> list[float]:
    """The mean squared error that ``quantize`` would leave at each width, to about one percent.

    weight: as for ``quantize``, which is run on evenly spaced rows only; their error relative to their squared
    deviation from the groups' means is multiplied with that of the whole matrix.
    Raises as ``quantize`` does, for NaN or Inf in any row.
    """
    check_matrix(weight, widths, group_size)
    find_grid = _find_grid(quantizer)
    out_features, in_features = weight.shape
    total = sum(groups.sum_of_squares.item() for _, groups in chunks(weight, group_size))
    rows = max(SAMPLED_ROWS, SAMPLED_GROUPS * group_size // in_features)
    step = max(1, out_features // rows)
    sampled, errors = _sum_errors(weight[step // 2 :: step], widths, group_size, find_grid)
    # Constant groups say nothing of the others.
    if sampled == 0:
        sampled, errors = _sum_errors(weight, widths, group_size, find_grid)
    scale = total / sampled if sampled else 1.0
    return [error * scale / weight.numel() for error in errors]


def _sum_errors(
    weight: Tensor, widths: Sequence[int], group_size: int, find_grid: FindGrid
) -> tuple[float, list[float]]:
    """Squared deviation from the groups' means, and squared quantization error at each width."""
    deviation, errors = 0.0, [0.0] * len(widths)
    for _, groups in chunks(weight, group_size, find_grid):
        deviation += groups.sum_of_squares.item()
        for i, num_bits in enumerate(widths):
            errors[i] += quantize_groups(groups, num_bits, find_grid)[-1].item()
    return deviation, errors


def prepare() -> None:
    """Compile what quantizers run on this machine, so that processes which use it at once find it ready, and so that
    the lack of a compiler is told once.
    """
    if not torch.cuda.is_available():
        native.library()


def check_matrix(weight: Tensor, widths: Sequence[int], group_size: int) -> None:
    """Raise ValueError unless the format can store the matrix at each of the widths."""
    if weight.dim() != 2 or not weight.numel() or not weight.is_floating_point():
        raise ValueError(
            f"weight: expected floating point [out_features, in_features], got {weight.dtype} {tuple(weight.shape)}"
        )
    if group_size not in SUPPORTED_GROUP_SIZES:
        raise ValueError(f"group_size: expected one of {SUPPORTED_GROUP_SIZES}, got {group_size!r}")
    for num_bits in widths:
        if num_bits not in SUPPORTED_BITS:
            raise ValueError(f"num_bits: expected one of {SUPPORTED_BITS}, got {num_bits!r}")
        matrix_tensors(weight.shape[0], weight.shape[1], num_bits, group_size)


def _find_grid(quantizer: str) -> FindGrid:
    if quantizer not in GRIDS:
        raise ValueError(f"quantizer: expected one of {', '.join(GRIDS)}, got {quantizer!r}")
    return GRIDS[quantizer]


def chunks(weight: Tensor, group_size: int, find_grid: FindGrid = mse_grid) -> Iterator[tuple[Tensor, Groups]]:
    """Groups of as many whole rows at a time as are searched quickly, with those rows."""
    if weight.device.type != "cpu":
        chunk = GPU_CHUNK
    else:
        # HQQ is torch everywhere.
        chunk = NATIVE_CHUNK if find_grid is not hqq_grid and native.library() else CPU_CHUNK
    for rows in weight.split(max(1, chunk // weight.shape[1])):
        yield rows, normalize(rows.float(), group_size)
