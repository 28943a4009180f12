"""The expert matrices of one layer in memory: packed words of mixed widths in one flat tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from alphaq_vllm.format import PACKED_DTYPE, SUPPORTED_GROUP_SIZES
from alphaq_vllm.packing import UNIT, dequantize

# (packed, scale, grid, num_bits) of one matrix, as a checkpoint stores it.
StoredMatrix = tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]
# How a matrix's words and grids are ordered: as packing.py has them, or as triton.layout or
# cpu/native/layout.h do.
Order = Literal["checkpoint", "gpu", "cpu"]


@dataclass(frozen=True)
class PackedExperts:
    """The matrices ``[N, K]`` of E experts with P projections each (w13: gate, then up, or up alone; w2: down).

    packed: flat int32; the words of matrix (e, p) start at ``offsets[e, p]`` and mean ``[N, K * bits / 32]``.
    scales: ``[E, P, N, 1]`` bfloat16. grids: ``[E, P, N, K / group_size]`` uint8.
    num_bits: ``[E, P]`` int32. offsets: ``[E, P]`` int64, in words, multiples of 4 (16 bytes).
    widths: at least every width that occurs in num_bits, ascending; known to the host so that nothing waits for a GPU.
    order: of packed and grids within a matrix; ``prepare_`` changes it.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    grids: torch.Tensor
    num_bits: torch.Tensor
    offsets: torch.Tensor
    group_size: int
    widths: tuple[int, ...]
    order: Order = "checkpoint"

    @property
    def num_experts(self) -> int:
        """E, the number of local experts."""
        return self.scales.shape[0]

    @property
    def num_projections(self) -> int:
        """P, the matrices of one expert."""
        return self.scales.shape[1]

    @property
    def N(self) -> int:
        """Rows of a matrix: output features."""
        return self.scales.shape[2]

    @property
    def K(self) -> int:
        """Columns of a matrix: input features."""
        return self.grids.shape[3] * self.group_size

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors, in the order in which the constructor takes them."""
        return [self.packed, self.scales, self.grids, self.num_bits, self.offsets]

    def matrix(
        self, expert: int, projection: int, rows: slice = slice(None), dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """The weights of some rows of a matrix in the order of the checkpoint, ``[rows, K]``; waits for the device."""
        num_bits = int(self.num_bits[expert, projection])
        words_per_row = self.K * num_bits // 32
        start = int(self.offsets[expert, projection])
        packed = self.packed[start : start + self.N * words_per_row].view(self.N, words_per_row)
        scale, grid = self.scales[expert, projection], self.grids[expert, projection]
        return dequantize(packed[rows], scale[rows], grid[rows], num_bits, dtype)

    @classmethod
    def from_matrices(cls, matrices: Sequence[Sequence[StoredMatrix]]) -> PackedExperts:
        """Put stored matrices together: ``matrices[expert][projection]``, all of one shape, group size and device.

        Raises ValueError if a group size results that the format does not know.
        """
        packed, _, grid, num_bits = matrices[0][0]
        in_features = packed.shape[-1] * 32 // num_bits
        group_size = in_features // grid.shape[-1]
        if group_size not in SUPPORTED_GROUP_SIZES:
            raise ValueError(f"group_size: expected one of {SUPPORTED_GROUP_SIZES}, got {group_size}")
        bits = [[matrix[3] for matrix in projections] for projections in matrices]
        offsets, _ = expert_offsets(bits, grid.shape[0], in_features)
        flat = [matrix for projections in matrices for matrix in projections]
        places = (len(matrices), len(matrices[0]))
        return cls(
            packed=torch.cat([matrix[0].flatten() for matrix in flat]),
            scales=torch.stack([matrix[1] for matrix in flat]).unflatten(0, places),
            grids=torch.stack([matrix[2] for matrix in flat]).unflatten(0, places),
            num_bits=torch.tensor(bits, dtype=torch.int32, device=packed.device),
            offsets=torch.tensor(offsets, dtype=torch.int64, device=packed.device),
            group_size=group_size,
            widths=tuple(sorted({b for projections in bits for b in projections})),
        )


def expert_offsets(num_bits: Sequence[Sequence[int]], N: int, K: int) -> tuple[list[list[int]], int]:
    """Lay matrices ``[N, K]`` of mixed widths one after the other, expert by expert.

    num_bits: ``[E][P]``. Returns the first word of each matrix, ``[E][P]``, and the number of words in all.
    Raises ValueError if K is not a multiple of 32 or a matrix would not end on a 16-byte boundary.

    >>> expert_offsets([[2, 3], [4, 4]], 64, 128)
    ([[0, 512], [1280, 2304]], 3328)
    """
    if K % UNIT or N * K % 128:
        raise ValueError(f"matrices [{N}, {K}]: expected K a multiple of {UNIT} and N * K a multiple of 128")
    offsets: list[list[int]] = []
    end = 0
    for projections in num_bits:
        offsets.append([])
        for bits in projections:
            offsets[-1].append(end)
            end += N * K * bits // (8 * PACKED_DTYPE.itemsize)
    return offsets, end
