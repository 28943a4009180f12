"""The layer in torch, on any device: expert by expert, each matrix dequantized once, a cache-sized piece at a time."""

from __future__ import annotations

import torch

from alphaq_vllm.kernels.experts import PackedExperts
from alphaq_vllm.kernels.routing import Routing
from alphaq_vllm.kernels.weights import MoEWeights

# Weights dequantized at a time: the intermediate tensors of more than this leave the L2 cache.
PIECE = 2**18


def fused_moe(x: torch.Tensor, weights: MoEWeights, routing: Routing) -> torch.Tensor:
    """Compute a layer's routed experts: matrix products in bfloat16 for bfloat16 x, else float32; the rest in float32.

    Args:
        x: ``[num_tokens, hidden_size]`` of any floating dtype, as all tensors on one device, which it waits for.
        weights: the experts that this rank holds, in the order of the checkpoint.
        routing: the experts of each token.

    Returns:
        ``[num_tokens, hidden_size]`` of x's dtype, a new tensor.
    """
    compute_dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    expert_ids = routing.local_expert_ids()
    out = torch.zeros(x.shape[0], weights.w2.N, dtype=torch.float32, device=x.device)
    for expert in expert_ids[expert_ids >= 0].unique().tolist():
        tokens, slots = (expert_ids == expert).nonzero(as_tuple=True)
        router_weights = routing.topk_weights[tokens, slots, None]
        hidden = x[tokens].to(compute_dtype)
        products = [_linear(hidden, weights.w13, expert, p).float() for p in range(weights.w13.num_projections)]
        if routing.apply_router_weight_on_input:
            products = [product * router_weights for product in products]
        if weights.w13_bias is not None:
            products = [product + bias for product, bias in zip(products, weights.w13_bias[expert], strict=True)]
        hidden = weights.gate.apply(*products)
        routed = _linear(hidden.to(compute_dtype), weights.w2, expert, 0).float()
        if weights.w2_bias is not None:
            routed += weights.w2_bias[expert]
        out.index_add_(0, tokens, routed if routing.apply_router_weight_on_input else routed * router_weights)
    return out.to(x.dtype)


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
