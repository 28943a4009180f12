"""Linear layers of uniform width in vLLM: their loading, checked, and the kernels that compute them.

The checkpoint's layout is that of compressed-tensors, so on GPUs vLLM's scheme for it creates the parameters and
chooses the kernel, Machete or Marlin. On CPUs this project's own kernel computes, or where it cannot be built vLLM's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch

from alphaq_vllm.format import PACKED, PACKED_DTYPE, SCALE, SCALE_DTYPE, LinearFormat
from alphaq_vllm.plugin import cpu_linear
from alphaq_vllm.plugin._compat import (
    CompressedTensorsWNA16,
    LinearMethodBase,
    register_weight_loader_v2_supported_method,
    weight_loader,
)
from alphaq_vllm.plugin.cpu_linear import NativeLinear
from alphaq_vllm.plugin.report import LoadReport
from alphaq_vllm.plugin.support import check_linear_kernel
from alphaq_vllm.ranks import SHARE, in_smaller_groups, shared_group_size

DTYPES = {PACKED: PACKED_DTYPE, SCALE: SCALE_DTYPE}
QKV: dict[Any, Any] = {"q": 0, "k": 1, "v": 2}


def option_of(name: str) -> str:
    """The converter's option that decides the width of a linear layer.

    >>> option_of("language_model.lm_head")
    '--head-bits'
    """
    return "--head-bits" if name.rpartition(".")[2] == "lm_head" else "--linear-bits"


@register_weight_loader_v2_supported_method
class AlphaQLinearMethod(LinearMethodBase):
    """One linear layer, possibly fused from several of the checkpoint.

    parts: the checkpoint's names of what it is fused from (its own name alone if nothing), for messages.
    """

    def __init__(self, prefix: str, linear_format: LinearFormat, parts: Sequence[str]) -> None:
        self.prefix = prefix
        self.num_bits, self.group_size = linear_format.num_bits, linear_format.group_size
        self.seen_group_size = self.group_size
        self.parts = parts
        self.output_sizes: list[int] = []
        self.loaded: set[tuple[int, str]] = set()
        self.report: LoadReport | None = None
        self.dummy = False
        self.scheme: CompressedTensorsWNA16 | NativeLinear

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Choose a kernel and allocate this rank's part as it wants it.

        Raises ValueError if this rank's columns are no groups of any size, or there is no kernel for this width, dtype
        and device.
        """
        self.output_sizes = output_partition_sizes
        self.seen_group_size = self._check_groups(input_size, input_size_per_partition)
        if NativeLinear.takes(sum(output_partition_sizes)):
            self.scheme = NativeLinear(self.num_bits, self.seen_group_size)
        else:
            self._check_supported(params_dtype)
            self.scheme = CompressedTensorsWNA16("group", self.num_bits, self.seen_group_size, layer_name=self.prefix)
        columns = {PACKED: input_size * self.num_bits // 32, SCALE: input_size // self.group_size}
        try:
            self.scheme.create_weights(
                layer=layer,
                output_size=output_size,
                input_size=input_size,
                output_partition_sizes=output_partition_sizes,
                input_size_per_partition=input_size_per_partition,
                params_dtype=params_dtype,
                weight_loader=extra_weight_attrs["weight_loader"],
            )
        except ValueError as error:
            raise ValueError(
                f"{self.prefix}: vLLM has no kernel for a linear layer of {self.num_bits} bits with {output_size} rows "
                f"in groups of {self.seen_group_size} on this device: convert with another "
                f"{option_of(self.prefix)} (16 leaves them alone) or change --tensor-parallel-size. {error}"
            ) from error
        if isinstance(self.scheme, CompressedTensorsWNA16):
            # vLLM's name for the shape before packing, which the format does not repeat.
            del layer.weight_shape
        for suffix in DTYPES:
            loader = weight_loader(self._load, suffix, columns[suffix], extra_weight_attrs["weight_loader"])
            getattr(layer, suffix).weight_loader = loader

    def _check_groups(self, input_size: int, input_size_per_partition: int) -> int:
        """The size of this rank's groups."""
        if input_size % self.group_size:
            raise ValueError(
                f"{self.prefix}: in_features={input_size} is not divisible by group_size={self.group_size}: "
                "config.json does not belong to these weights, convert again"
            )
        seen = shared_group_size(input_size_per_partition, self.group_size)
        if seen is None:
            raise ValueError(
                f"{self.prefix}: in_features={input_size} is {input_size_per_partition} per rank, which is not "
                f"divisible by {SHARE}: lower --tensor-parallel-size or convert with {option_of(self.prefix)} 16"
            )
        return seen

    def _check_supported(self, dtype: torch.dtype) -> None:
        if dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"{self.prefix}: expected bfloat16 or float16 activations for a linear layer of {self.num_bits} bits, "
                f"got {dtype}: serve with --dtype bfloat16 or convert with {option_of(self.prefix)} 16"
            )
        check_linear_kernel(self.prefix, self.num_bits, option_of(self.prefix))

    def _load(
        self,
        suffix: str,
        columns: int,
        weight_loader: Callable[..., None],
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        *shard: Any,
    ) -> None:
        """Check one stored tensor and hand it to the layer's loader; called by vLLM's model loaders."""
        ids = self._part_ids(*shard)
        name, shape = f"{self._part_name(ids[0])}.{suffix}", tuple(loaded_weight.shape)
        if loaded_weight.dtype != DTYPES[suffix] or len(shape) != 2 or shape[1] != columns:
            raise ValueError(
                f"{name}: expected {DTYPES[suffix]} with {columns} columns for {self.num_bits} bits in groups of "
                f"{self.group_size}, got {loaded_weight.dtype} of shape {shape}: "
                "config.json does not belong to these weights, convert again"
            )
        if suffix == SCALE:
            loaded_weight = in_smaller_groups(loaded_weight, self.group_size, self.seen_group_size)
        weight_loader(param, loaded_weight, *shard)
        self.loaded |= {(i, suffix) for i in ids}

    def _part_ids(self, shard: Any = None) -> list[int]:
        """The fused parts that one stored tensor holds: all without a shard id, else one or several."""
        if shard is None:
            return list(range(len(self.output_sizes)))
        shards: tuple[Any, ...] = shard if isinstance(shard, tuple) else (shard,)
        return [QKV.get(i, i) for i in shards]

    def _part_name(self, part: int) -> str:
        return self.parts[part] if len(self.parts) == len(self.output_sizes) else self.prefix

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Refuse to serve a layer that was not loaded whole, then repack it for its kernel."""
        expected = {(i, suffix) for i in self._part_ids() for suffix in DTYPES}
        missing = [] if self.dummy else sorted(expected - self.loaded)
        self.loaded.clear()
        # What is loaded in the place of made-up weights is to be whole.
        self.dummy = False
        if missing:
            part, suffix = missing[0]
            raise ValueError(
                f"{self._part_name(part)}.{suffix}: expected in the checkpoint, got nothing: "
                "copy the checkpoint again or convert again"
            )
        finite = getattr(layer, SCALE).isfinite().all(1)
        if not finite.all():
            row = int((~finite).nonzero()[0])
            part = next(i for i, end in enumerate(accumulate(self.output_sizes)) if row < end)
            raise ValueError(
                f"{self._part_name(part)}.{SCALE}: expected finite values, got NaN or Inf: "
                "the checkpoint is damaged, convert again"
            )
        self.scheme.process_weights_after_loading(layer)
        if self.report:
            self.report.linear_loaded(self.prefix, self._kernel_name())

    def _kernel_name(self) -> str:
        if isinstance(self.scheme, NativeLinear):
            return cpu_linear.kernel_name()
        # vLLM 0.33 has none in its batch-invariant mode.
        return type(self.scheme.kernel).__name__ if self.scheme.kernel else "batch-invariant matmul"

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The layer's output for ``x [..., in_features]``."""
        return self.scheme.apply_weights(layer, x, bias)
