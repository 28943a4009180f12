"""Fused expert tensors: one three-dimensional tensor that holds a projection of all experts of a block."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class FusedLayout:
    """How the experts lie in their fused tensors.

    gate_up, down: names of the two tensors below the block; the first is of up alone if there is no gate. transposed:
    an expert's matrix is stored as ``[in_features, out_features]``. interleaved: output features of gate and up
    alternate, the first being gate's; otherwise all of gate's come first.
    """

    gate_up: str = "experts.gate_up_proj"
    down: str = "experts.down_proj"
    transposed: bool = False
    interleaved: bool = False


@dataclass(frozen=True)
class FusedPart:
    """Where a projection lies in a fused tensor; ``half`` is 0 for gate, 1 for up, None if it has none."""

    tensor: str
    layout: FusedLayout
    half: int | None

    def view(self, expert: torch.Tensor) -> torch.Tensor:
        """The projection's matrix ``[out_features, in_features]``, a view of its expert's slice of the tensor."""
        weight = expert.T if self.layout.transposed else expert
        if self.half is None:
            return weight
        return weight[self.half :: 2] if self.layout.interleaved else weight.chunk(2)[self.half]

    @property
    def order(self) -> str:
        """What the three dimensions of the tensor are, for messages."""
        return "(expert, in, out)" if self.layout.transposed else "(expert, out, in)"

    def matrix_shape(self, fused: tuple[int, ...]) -> tuple[int, int]:
        """The shape of the projection's matrix in a fused tensor of this shape.

        Raises ValueError if the tensor should hold both gate and up, but does not divide into halves.
        """
        out_features, in_features = (fused[2], fused[1]) if self.layout.transposed else (fused[1], fused[2])
        if self.half is None:
            return out_features, in_features
        if out_features % 2:
            raise ValueError(
                f"{self.tensor}: expected the output features of gate and up, an even number, got {out_features}"
            )
        return out_features // 2, in_features

    def fused_shape(self, num_experts: int, matrix: tuple[int, int]) -> tuple[int, int, int]:
        """The shape of the fused tensor of ``num_experts`` experts whose projection has a matrix of this shape."""
        out_features, in_features = matrix[0] * (1 if self.half is None else 2), matrix[1]
        shape = (in_features, out_features) if self.layout.transposed else (out_features, in_features)
        return num_experts, *shape
