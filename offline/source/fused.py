"""Fused expert tensors: one three-dimensional tensor that holds a projection of all experts of a block."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class FusedLayout:
    """How the experts lie in their fused tensors.

    gate_up, down: names of the two tensors below the block; the first is of up alone if there is no gate. up: that of a
    third one, in which case ``gate_up`` holds gate alone. transposed: an expert's matrix is stored as
    ``[in_features, out_features]``. interleaved: output features of gate and up alternate, the first being gate's;
    otherwise all of gate's come first.
    """

    gate_up: str = "experts.gate_up_proj"
    down: str = "experts.down_proj"
    up: str | None = None
    transposed: bool = False
    interleaved: bool = False

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of all tensors."""
        return (self.gate_up, self.up, self.down) if self.up else (self.gate_up, self.down)

    def place(self, projection: int) -> tuple[str, int | None]:
        """The tensor that holds a projection, 0 for gate, 1 for up and 2 for down, and the half of it, if not all."""
        if self.up or projection == 2:
            return self.tensors[projection if self.up else 1], None
        return self.gate_up, projection

    def oriented(self, first: tuple[int, ...], down: tuple[int, ...], size: int, gated: bool = True) -> FusedLayout:
        """The layout with the orientation that the shapes of the two tensors show, or as it is if they show none.

        first: of the one for gate, and up if it holds that too, or for up without a gate; size: features that experts
        take and give.
        Models are published in one orientation and saved by transformers in the other. Where gate and up alternate,
        the one that is known holds.
        """
        if self.interleaved or len(first) != 3 or len(down) != 3:
            return self
        halves = 2 if gated and not self.up else 1
        straight = first[2] == down[1] == size and first[1] == halves * down[2]
        turned = first[1] == down[2] == size and first[2] == halves * down[1]
        return replace(self, transposed=turned) if straight != turned else self


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
