"""Linear layers of uniform width on CPUs, by this project's kernel.

vLLM's own kernel for CPUs takes AVX-512 and 4 bits, and with AMX rounds activations to 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch

from alphaq_vllm.format import PACKED, PACKED_DTYPE, SCALE, SCALE_DTYPE
from alphaq_vllm.kernels.cpu import native
from alphaq_vllm.kernels.linear import PackedLinear, linear
from alphaq_vllm.plugin._compat import GroupQuantScaleParameter, PackedvLLMParameter, current_platform


def kernel_name() -> str:
    """What computes experts and linear layers on a CPU, for the log."""
    rounded = ", activations rounded to 8 bits" if native.chosen_activations() == "int8" else ""
    return f"the native CPU kernel ({native.best_instruction_set()}{rounded})"


class NativeLinear:
    """A counterpart of vLLM's CompressedTensorsWNA16, with parameters of the same names and shapes."""

    def __init__(self, num_bits: int, group_size: int) -> None:
        self.num_bits, self.group_size = num_bits, group_size

    @staticmethod
    def takes(rows: int) -> bool:
        """Whether layers of so many rows can be computed here: on a CPU that the kernel could be built for."""
        return current_platform.is_cpu() and rows % native.ROWS == 0 and native.library() is not None

    def create_weights(
        self,
        layer: torch.nn.Module,
        output_partition_sizes: list[int],
        input_size_per_partition: int,
        weight_loader: Callable[..., None],
        **_: Any,
    ) -> None:
        """Allocate this rank's part."""
        rows, columns = sum(output_partition_sizes), input_size_per_partition
        options = {"input_dim": 1, "output_dim": 0, "weight_loader": weight_loader}
        packed = torch.empty(rows, columns * self.num_bits // 32, dtype=PACKED_DTYPE)
        scales = torch.empty(rows, columns // self.group_size, dtype=SCALE_DTYPE)
        factor = Fraction(32, self.num_bits)
        layer.register_parameter(
            PACKED, PackedvLLMParameter(data=packed, packed_dim=1, packed_factor=factor, **options)
        )
        layer.register_parameter(SCALE, GroupQuantScaleParameter(data=scales, **options))

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Bring the parameters into the order of the kernel."""
        self._weights(layer).prepare_()

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The layer's output for ``x [..., in_features]``."""
        out = linear(x, self._weights(layer))
        return out if bias is None else out + bias

    def _weights(self, layer: torch.nn.Module) -> PackedLinear:
        return PackedLinear(getattr(layer, PACKED), getattr(layer, SCALE), self.num_bits)
