"""The CPU path: expert by expert, each matrix dequantized once, a cache-sized piece at a time."""

from __future__ import annotations

import torch

from alphaq_vllm.kernels.experts import PackedExperts
from alphaq_vllm.kernels.reference import ACTIVATIONS
from alphaq_vllm.kernels.routing import local_expert_ids

# Weights dequantized at a time: the intermediate tensors of more than this leave the L2 cache.
PIECE = 2**18


def fused_moe_cpu(
    x: torch.Tensor,
    w13: PackedExperts,
    w2: PackedExperts,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    activation: str,
    apply_router_weight_on_input: bool,
) -> torch.Tensor:
    """``fused_moe`` on CPU tensors: matrix products in bfloat16 for bfloat16 x, else float32; the rest in float32."""
    compute_dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    expert_ids = local_expert_ids(topk_ids, expert_map)
    out = torch.zeros(x.shape[0], w2.N, dtype=torch.float32)
    for expert in expert_ids[expert_ids >= 0].unique().tolist():
        tokens, slots = (expert_ids == expert).nonzero(as_tuple=True)
        router_weights = topk_weights[tokens, slots, None]
        hidden = x[tokens].to(compute_dtype)
        gate, up = (_linear(hidden, w13, expert, projection).float() for projection in (0, 1))
        if apply_router_weight_on_input:
            gate, up = gate * router_weights, up * router_weights
        hidden = ACTIVATIONS[activation](gate) * up
        routed = _linear(hidden.to(compute_dtype), w2, expert, 0).float()
        out.index_add_(0, tokens, routed if apply_router_weight_on_input else routed * router_weights)
    return out.to(x.dtype)


def _linear(x: torch.Tensor, experts: PackedExperts, expert: int, projection: int) -> torch.Tensor:
    """``x [M, K]`` times the transpose of one matrix: ``[M, N]`` of x's dtype."""
    out = x.new_empty(x.shape[0], experts.N)
    rows_per_piece = max(1, PIECE // experts.K)
    for start in range(0, experts.N, rows_per_piece):
        rows = slice(start, start + rows_per_piece)
        out[:, rows] = x @ experts.matrix(expert, projection, rows, x.dtype).T
    return out
