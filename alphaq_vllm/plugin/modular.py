"""AlphaQ's experts within vLLM's modular kernel, which brings tokens to the ranks of their experts and back.

Where ranks have tokens of their own (data parallel attention, sequence parallelism), ``--all2all-backend`` says how
vLLM exchanges them around the experts. What it hands to the experts are rows of activations with ids of experts: the
sizes of the experts do not matter to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from alphaq_vllm.plugin._compat import (
    FUSED_MOE_UNQUANTIZED_CONFIG,
    FusedMoEActivationFormat,
    FusedMoEConfig,
    FusedMoEExpertsModular,
    FusedMoEKernel,
    TopKWeightAndReduceNoOP,
    maybe_make_prepare_finalize,
)

# What vLLM's names of activations end in where there is no gate.
UNGATED = "_no_mul"
Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def exchanges_tokens(moe: FusedMoEConfig) -> bool:
    """Whether ranks have tokens of their own, which must reach the experts of other ranks."""
    return bool(moe.moe_parallel_config.dp_size > 1 or moe.moe_parallel_config.is_sequence_parallel)


def is_gated(moe: FusedMoEConfig) -> bool:
    """Whether vLLM's model has experts with a gate."""
    return not moe.activation.value.endswith(UNGATED)


def modular_kernel(moe: FusedMoEConfig, compute: Compute) -> FusedMoEKernel:
    """vLLM's exchange of tokens around a rank's experts.

    compute: ``(x, topk_weights, topk_ids)`` to this rank's part of the sum over a token's experts, all
    ``[num_tokens, ...]``.
    """
    exchange = maybe_make_prepare_finalize(moe, FUSED_MOE_UNQUANTIZED_CONFIG, allow_new_interface=True)
    return FusedMoEKernel(exchange, MixedExperts(moe, compute))


class MixedExperts(FusedMoEExpertsModular):
    """One rank's experts of mixed widths; they weight and sum their outputs themselves."""

    def __init__(self, moe: FusedMoEConfig, compute: Compute) -> None:
        super().__init__(moe, FUSED_MOE_UNQUANTIZED_CONFIG)
        self.compute = compute

    @staticmethod
    def activation_format() -> FusedMoEActivationFormat:
        """Rows of tokens, not batches of one size per expert."""
        return FusedMoEActivationFormat.Standard

    def moe_problem_size(
        self, a1: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, topk_ids: torch.Tensor
    ) -> tuple[int, int, int, int, int]:
        """Experts, tokens, rows of w1, columns of w1, experts of a token; w1 and w2 are any that have these experts."""
        moe = self.moe_config
        # Gate and up, or up alone.
        rows = moe.intermediate_size_per_partition * (2 if is_gated(moe) else 1)
        return len(w1), len(a1), rows, moe.hidden_dim, topk_ids.shape[1]

    def workspace_shapes(self, M: int, N: int, K: int, *args: Any, **kwargs: Any) -> tuple[tuple[int, ...], ...]:
        """No workspaces, and the output ``[M, K]``: the operator allocates its own."""
        return (0,), (0,), (M, K)

    def finalize_weight_and_reduce_impl(self) -> TopKWeightAndReduceNoOP:
        """Nothing is left to be weighted and summed over a token's experts of this rank."""
        return TopKWeightAndReduceNoOP()

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *args: Any,
        apply_router_weight_on_input: bool,
        **kwargs: Any,
    ) -> None:
        """Write the sum over each token's experts of this rank to ``output``."""
        if apply_router_weight_on_input:
            # vLLM has multiplied the activations already.
            topk_weights = torch.ones_like(topk_weights)
        output.copy_(self.compute(hidden_states, topk_weights, topk_ids))

    # vLLM asks the following when it chooses among its own experts. What AlphaQ serves is checked in ``support``.

    @staticmethod
    def _supports_current_device() -> bool:
        return True

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return True

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return False

    @staticmethod
    def _supports_activation(activation: Any) -> bool:
        return True

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        return True
