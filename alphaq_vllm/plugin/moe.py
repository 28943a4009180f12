"""Routed experts of mixed widths in vLLM: parameters of exactly the stored size, their loading, and their use.

Experts differ in size, so the packed words of a layer lie one matrix after the other in one flat parameter; scales and
grids do not depend on the width and are ordinary tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from alphaq_vllm.format import GRID, PACKED, SCALE, matrix_tensors
from alphaq_vllm.kernels import Gate, MoEWeights, PackedExperts, Routing, expert_offsets, fused_moe, prepare_
from alphaq_vllm.kernels.choice import chosen_kernels
from alphaq_vllm.kernels.experts import Order
from alphaq_vllm.plugin import cpu_linear
from alphaq_vllm.plugin._compat import (
    FusedMoEConfig,
    FusedMoEMethodBase,
    RoutedExperts,
    local_expert_ids,
    set_weight_attrs,
    weight_loader,
)
from alphaq_vllm.plugin.gpu_kernels import Preparation, check_choice
from alphaq_vllm.plugin.modular import exchanges_tokens, modular_kernel
from alphaq_vllm.plugin.report import LoadReport
from alphaq_vllm.plugin.support import check_experts, gate_of
from alphaq_vllm.ranks import in_smaller_groups, shared_group_size

SUFFIXES = (PACKED, SCALE, GRID)
# Where a shard lies: the stem of its parameters, its place among the stem's projections, the dimension of the
# stored tensors that tensor parallelism cuts.
SHARDS = {"w1": ("w13", 0, 0), "w3": ("w13", 1, 0), "w2": ("w2", 0, 1)}


class AlphaQMoEMethod(FusedMoEMethodBase):
    """One layer of routed experts.

    group_size: as stored; a rank whose share of down's columns cuts groups sees smaller ones (``alphaq_vllm.ranks``).
    num_bits: widths of all experts of the model's layer by shard id (w1 gate, w3 up, w2 down; without a gate w1 up, w2
    down), also of those that other ranks hold. widths: all that occur in the model, ascending; not this layer's alone,
    so that every layer runs the same compiled kernels. projection_names: the checkpoint's names by shard id, for
    messages.
    """

    # Suffixes of the tensors that the checkpoint has of each matrix.
    stored: tuple[str, ...] = SUFFIXES

    def __init__(
        self,
        moe: FusedMoEConfig,
        prefix: str,
        group_size: int,
        num_bits: Mapping[str, tuple[int, ...]],
        widths: tuple[int, ...],
        projection_names: Mapping[str, str],
    ) -> None:
        check_experts(moe, prefix, group_size, len(num_bits["w1"]), has_gate="w3" in num_bits)
        check_choice()
        super().__init__(moe)
        self.prefix = prefix
        self.group_size = group_size
        self.num_bits = num_bits
        self.widths = widths
        self.projection_names = projection_names
        self.tp_size = moe.moe_parallel_config.tp_size
        self.tp_rank = moe.moe_parallel_config.tp_rank
        self.global_ids: list[int] = []
        self.shapes: dict[str, tuple[int, int]] = {}
        self.group_sizes: dict[str, int] = {}
        self.local_bits: dict[str, list[list[int]]] = {}
        self.offsets: dict[str, list[list[int]]] = {}
        self.loaded: set[str] = set()
        self.order: Order = "checkpoint"
        self.weights: MoEWeights | None = None
        self.report: LoadReport | None = None
        self.dummy = False

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Allocate what this rank's experts take, no byte more."""
        self.shapes = {
            "w13": (intermediate_size_per_partition, hidden_size),
            "w2": (hidden_size, intermediate_size_per_partition),
        }
        self.global_ids = local_expert_ids(layer.expert_map_manager, self.moe.num_experts)
        shards = {"w13": ("w1", "w3") if "w3" in self.num_bits else ("w1",), "w2": ("w2",)}
        for stem, (out_features, in_features) in self.shapes.items():
            group_size = self.group_sizes[stem] = shared_group_size(in_features, self.group_size) or self.group_size
            bits = [[self.num_bits[shard][expert] for shard in shards[stem]] for expert in self.global_ids]
            self.local_bits[stem] = bits
            self.offsets[stem], total = expert_offsets(bits, out_features, in_features)
            groups = matrix_tensors(out_features, in_features, 1, group_size)
            per_matrix = (len(bits), len(bits[0]))
            tensors = {
                PACKED: torch.empty(total, dtype=torch.int32),
                SCALE: torch.empty(*per_matrix, *groups[SCALE].shape, dtype=groups[SCALE].dtype),
                GRID: torch.empty(*per_matrix, *groups[GRID].shape, dtype=groups[GRID].dtype),
            }
            for suffix, data in tensors.items():
                param = torch.nn.Parameter(data, requires_grad=False)
                layer.register_parameter(f"{stem}_{suffix}", param)
                set_weight_attrs(param, {"weight_loader": weight_loader(self._load, layer, suffix)})
            layer.register_buffer(f"{stem}_num_bits", torch.tensor(bits, dtype=torch.int32), persistent=False)
            layer.register_buffer(f"{stem}_offsets", torch.tensor(self.offsets[stem]), persistent=False)

    def _load(
        self,
        layer: RoutedExperts,
        suffix: str,
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Copy this rank's slice of one stored tensor into its place; called by vLLM's model loaders."""
        local_id = layer.expert_map_manager.map_global_to_local(expert_id)
        if local_id == -1:
            return False if return_success else None
        name = self._tensor_name(expert_id, shard_id, suffix)
        stem, _, dim = SHARDS[shard_id]
        bits = self.num_bits[shard_id][expert_id]
        full = list(self.shapes[stem])
        full[dim] *= self.tp_size
        expected = matrix_tensors(full[0], full[1], bits, self.group_size)[suffix]
        if tuple(loaded_weight.shape) != expected.shape or loaded_weight.dtype != expected.dtype:
            raise ValueError(
                f"{name}: expected {expected.dtype} of shape {expected.shape} for {bits} bits, got "
                f"{loaded_weight.dtype} of shape {tuple(loaded_weight.shape)}: "
                "the bit map in config.json does not belong to these weights, convert again"
            )
        self._copy_share(param.data, suffix, shard_id, expert_id, local_id, loaded_weight)
        self.loaded.add(name)
        return True if return_success else None

    def _copy_share(
        self,
        data: torch.Tensor,
        suffix: str,
        shard_id: str,
        expert_id: int,
        local_id: int,
        stored: torch.Tensor,
        first: int = 0,
    ) -> None:
        """Copy this rank's share of one tensor of an expert into ``data``, that of the parameter for ``suffix``.

        first: the row or column of the whole matrix, whichever ranks share, at which ``stored`` begins.
        """
        stem, _, dim = SHARDS[shard_id]
        destination = self._place(data, suffix, shard_id, expert_id, local_id)
        if suffix == SCALE and dim == 1:
            # Of rows, which ranks that share columns have all.
            destination.copy_(stored)
            return
        if suffix == GRID:
            stored = in_smaller_groups(stored, self.group_size, self.group_sizes[stem])
        size, share = destination.shape[dim], self.shapes[stem][dim]
        destination.copy_(stored.narrow(dim, (self.tp_rank * share - first) * size // share, size))

    def _place(self, data: torch.Tensor, suffix: str, shard_id: str, expert_id: int, local_id: int) -> torch.Tensor:
        """Where this rank's slice of one tensor of an expert lies in ``data``, that of the parameter for ``suffix``."""
        stem, projection, _ = SHARDS[shard_id]
        if suffix != PACKED:
            return data[local_id, projection]
        out_features, in_features = self.shapes[stem]
        shape = (out_features, in_features * self.num_bits[shard_id][expert_id] // 32)
        offset = self.offsets[stem][local_id][projection]
        return data[offset : offset + shape[0] * shape[1]].view(shape)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Refuse to serve experts that were not loaded whole, and bring the others into their device's order.

        vLLM does not check the former for quantized models. The latter happens within the parameters' own memory: they
        stay what weights are loaded into, and loading them again, which is of all of them, starts over.
        """
        made_up = self.dummy
        missing = [] if made_up else sorted(self._expected() - self.loaded)
        self.loaded.clear()
        # What is loaded in the place of made-up weights is to be whole.
        self.dummy = False
        if missing:
            raise ValueError(
                f"{missing[0]}: expected in the checkpoint, got nothing ({len(missing)} tensors are missing in "
                f"{self.prefix}): copy the checkpoint again or convert again"
            )
        self._check_finite(layer)
        for stem in self.shapes:
            # Where vLLM loads weights again, buffers that no checkpoint has come with whatever lay in memory.
            getattr(layer, f"{stem}_num_bits").copy_(torch.tensor(self.local_bits[stem], dtype=torch.int32))
            getattr(layer, f"{stem}_offsets").copy_(torch.tensor(self.offsets[stem]))
        self.order = "checkpoint"
        preparation = None
        if layer.w13_weight_packed.is_cuda and chosen_kernels() != "torch":
            preparation = Preparation(self.moe, layer, self._put_together(layer), made_up)
        for stem in self.shapes:
            self.order = prepare_(self._experts(layer, stem, "checkpoint")).order
        weights = self._put_together(layer)
        if preparation:
            preparation.finish(weights)
        if self.weights is None:
            # Not again: what is loaded later, vLLM copies into these parameters, which it then puts back.
            self.weights = weights
        if exchanges_tokens(self.moe):
            self.moe_kernel = modular_kernel(self.moe, partial(self._compute, layer))
        if self.report:
            self._log(layer, self.report)

    def _expected(self) -> set[str]:
        """The names of all tensors that this rank loads."""
        return {
            self._tensor_name(e, shard, suffix)
            for e in self.global_ids
            for shard in self.num_bits
            for suffix in self.stored
        }

    def _check_finite(self, layer: RoutedExperts) -> None:
        for shard in self.num_bits:
            stem, projection, _ = SHARDS[shard]
            finite = getattr(layer, f"{stem}_{SCALE}")[:, projection].isfinite().flatten(1).all(1)
            if not finite.all():
                expert_id = self.global_ids[int((~finite).nonzero()[0])]
                raise ValueError(
                    f"{self._tensor_name(expert_id, shard, SCALE)}: expected finite values, got NaN or Inf: "
                    "the checkpoint is damaged, convert again"
                )

    def _log(self, layer: RoutedExperts, report: LoadReport) -> None:
        tensors = [getattr(layer, f"{stem}_{suffix}") for stem in self.shapes for suffix in SUFFIXES]
        report.experts_loaded(
            self.prefix,
            math.prod(self.shapes["w2"]),
            {shard: [bits[e] for e in self.global_ids] for shard, bits in self.num_bits.items()},
            sum(tensor.nbytes for tensor in tensors),
            _kernel_name(self.order),
        )

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        """None: vLLM's own kernels are not used."""

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """Routed experts' output for ``x [num_tokens, hidden_size]``, before the sum over ranks.

        Where ranks exchange tokens, ``x`` are this rank's, and so is the output, which may be summed already.
        """
        if self.moe_kernel is None:
            return self._compute(layer, x, topk_weights, topk_ids)
        return self.moe_kernel.apply(
            hidden_states=x,
            # Of the weights it asks how many experts there are.
            w1=layer.w13_weight_scale,
            w2=layer.w2_weight_scale,
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            activation=self.moe.activation,
            global_num_experts=self.moe.num_experts,
            expert_map=layer.expert_map,
            apply_router_weight_on_input=layer.apply_router_weight_on_input,
            shared_experts=shared_experts,
            shared_experts_input=shared_experts_input,
        )

    def _compute(
        self, layer: RoutedExperts, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> torch.Tensor:
        routing = Routing(topk_weights, topk_ids, layer.expert_map, layer.apply_router_weight_on_input)
        return fused_moe(x, self._current_weights(layer), routing)

    def _current_weights(self, layer: RoutedExperts) -> MoEWeights:
        """The weights that were loaded, or those that the layer has in their place during this call alone.

        Where vLLM offloads weights to a host whose memory the GPU cannot read, the layer gets copies of its parameters
        for each call. These must not be kept, or they would fill the GPU.
        """
        if self.weights is not None and self.weights.w13.packed is layer.w13_weight_packed:
            return self.weights
        return self._put_together(layer)

    def _put_together(self, layer: RoutedExperts) -> MoEWeights:
        return MoEWeights(
            self._experts(layer, "w13", self.order),
            self._experts(layer, "w2", self.order),
            getattr(layer, "w13_bias", None),
            getattr(layer, "w2_bias", None),
            self._gate(),
        )

    def _gate(self) -> Gate:
        return gate_of(self.moe, self.prefix)

    def _experts(self, layer: RoutedExperts, stem: str, order: Order) -> PackedExperts:
        packed, scales, grids = (getattr(layer, f"{stem}_{suffix}") for suffix in SUFFIXES)
        num_bits, offsets = getattr(layer, f"{stem}_num_bits"), getattr(layer, f"{stem}_offsets")
        group_size = self.group_sizes[stem]
        return PackedExperts(packed, scales, grids, num_bits, offsets, group_size, self.widths, order)

    def _tensor_name(self, expert_id: int, shard_id: str, suffix: str) -> str:
        return f"{self.prefix}.{expert_id}.{self.projection_names[shard_id]}.{suffix}"


def _kernel_name(order: Order) -> str:
    """What computes experts of an order, for the log."""
    if order == "cpu":
        return cpu_linear.kernel_name()
    if order == "gpu":
        return "Triton kernels" if chosen_kernels() == "fast" else f"Triton kernels, {chosen_kernels()}"
    return "torch"
