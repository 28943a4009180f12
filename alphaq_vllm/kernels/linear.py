"""``linear`` and its opaque operator ``alphaq::linear``: layers of one width on CPUs. GPUs have vLLM's kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from alphaq_vllm.kernels.cpu import native
from alphaq_vllm.kernels.op import X_DTYPES

torch.library.define("alphaq::linear", "(Tensor x, Tensor packed, Tensor scales, int num_bits) -> Tensor")


@dataclass(frozen=True)
class PackedLinear:
    """A matrix ``[N, K]`` of one width, symmetric, in the order of ``linear_packing`` or, once prepared, of the CPU.

    packed: ``[N, K * num_bits / 32]`` int32. scales: ``[N, K / group_size]`` bfloat16.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    num_bits: int

    @property
    def N(self) -> int:
        """Output features."""
        return self.packed.shape[0]

    @property
    def K(self) -> int:
        """Input features."""
        return self.packed.shape[1] * 32 // self.num_bits

    def prepare_(self) -> None:
        """Bring the matrix into the order that ``linear`` takes, in its own memory.

        Raises ValueError for a number of rows that is not a multiple of 16, OSError or subprocess.SubprocessError if
        there is no kernel.
        """
        native.repack_linear_(self.packed, self.scales, self.num_bits)


def linear(x: torch.Tensor, weights: PackedLinear) -> torch.Tensor:
    """Multiply with the transpose of a prepared matrix.

    Args:
        x: ``[..., K]`` bfloat16, float16 or float32, on the CPU.
        weights: after ``prepare_``.

    Returns:
        ``[..., N]`` of x's dtype, a new tensor.

    Raises:
        TypeError: for other dtypes.
        ValueError: for another number of columns.
    """
    if x.dtype not in X_DTYPES:
        raise TypeError(f"x: expected one of {X_DTYPES}, got {x.dtype}")
    if x.shape[-1] != weights.K:
        raise ValueError(f"x: expected {weights.K} columns, got {x.shape[-1]}")
    return torch.ops.alphaq.linear(x, weights.packed, weights.scales, weights.num_bits)


@torch.library.impl("alphaq::linear", "cpu")
def _linear_cpu(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, num_bits: int) -> torch.Tensor:
    out = native.linear(x.reshape(-1, x.shape[-1]), packed, scales, num_bits)
    return out.view(*x.shape[:-1], packed.shape[0])


@torch.library.register_fake("alphaq::linear")
def _linear_fake(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, num_bits: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])
