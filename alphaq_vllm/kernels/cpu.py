"""The CPU path: expert by expert, each matrix dequantized once, a cache-sized piece at a time."""

from __future__ import annotations

import torch

from alphaq_vllm.kernels.experts import PackedExperts
from alphaq_vllm.kernels.reference import Gate

# Weights dequantized at a time: the intermediate tensors of more than this leave the L2 cache.
PIECE = 2**18


def fused_moe_cpu(
    x: torch.Tensor,
    w13: PackedExperts,
    w2: PackedExperts,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    expert_map: torch.Tensor | None,
    gate: Gate,
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
        projections = [_linear(hidden, w13, expert, projection).float() for projection in (0, 1)]
        if apply_router_weight_on_input:
            projections = [projection * router_weights for projection in projections]
        if w13_bias is not None:
            projections = [p + bias for p, bias in zip(projections, w13_bias[expert], strict=True)]
        hidden = gate.apply(*projections)
        routed = _linear(hidden.to(compute_dtype), w2, expert, 0).float()
        if w2_bias is not None:
            routed += w2_bias[expert]
        out.index_add_(0, tokens, routed if apply_router_weight_on_input else routed * router_weights)
    return out.to(x.dtype)


def local_expert_ids(topk_ids: torch.Tensor, expert_map: torch.Tensor | None) -> torch.Tensor:
    """The local expert of each route, -1 for routes to be skipped (padding, and experts of other ranks).

    topk_ids: ``[num_tokens, top_k]`` global ids or -1. expert_map: ``[global_num_experts]`` local ids or -1.
    Returns ``[num_tokens, top_k]`` int32.
    """
    if expert_map is None:
        return topk_ids.to(torch.int32)
    return torch.where(topk_ids < 0, -1, expert_map[topk_ids.clamp(min=0)]).to(torch.int32)


def _linear(x: torch.Tensor, experts: PackedExperts, expert: int, projection: int) -> torch.Tensor:
    """``x [M, K]`` times the transpose of one matrix: ``[M, N]`` of x's dtype."""
    num_rows = x.shape[0]
    x = torch.nn.functional.pad(x, (0, 0, 0, padded_rows(num_rows) - num_rows))
    out = x.new_empty(x.shape[0], experts.N)
    rows_per_piece = max(1, PIECE // experts.K)
    for start in range(0, experts.N, rows_per_piece):
        rows = slice(start, start + rows_per_piece)
        out[:, rows] = x @ experts.matrix(expert, projection, rows, x.dtype).T
    return out[:num_rows]


def padded_rows(num_rows: int) -> int:
    """The least of few numbers that is not less than ``num_rows``, and at most an eighth more.

    For matrix products in bfloat16, oneDNN keeps the code of each shape, half a megabyte and up to 1024 of them.

    >>> [padded_rows(n) for n in (1, 15, 17, 100, 1000)]
    [1, 15, 18, 104, 1024]
    """
    step = 1 << max(0, num_rows.bit_length() - 4)
    return -(-num_rows // step) * step
