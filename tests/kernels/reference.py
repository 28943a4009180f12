"""What a Mixture-of-Experts layer means: float64, one expert after the other. Everything else is tested against it."""

from __future__ import annotations

import torch

from alphaq_vllm.kernels import MoEWeights, Routing


def fused_moe_reference(x: torch.Tensor, weights: MoEWeights, routing: Routing) -> torch.Tensor:
    """The same as ``fused_moe``, computed and returned in float64."""
    out = torch.zeros(x.shape[0], weights.w2.N, dtype=torch.float64)
    for expert in range(weights.w13.num_experts):
        # Gate and up, or up alone.
        first = [weights.w13.matrix(expert, p).double() for p in range(weights.w13.num_projections)]
        down_proj = weights.w2.matrix(expert, 0).double()
        biases = [0] * len(first) if weights.w13_bias is None else weights.w13_bias[expert].double()
        down_bias = 0 if weights.w2_bias is None else weights.w2_bias[expert].double()
        global_id = expert if routing.expert_map is None else (routing.expert_map == expert).nonzero().item()
        for token, slot in (routing.topk_ids == global_id).nonzero().tolist():
            router_weight = routing.topk_weights[token, slot].double()
            on_input = routing.apply_router_weight_on_input
            hidden = x[token].double() * (router_weight if on_input else 1)
            products = [proj @ hidden + bias for proj, bias in zip(first, biases, strict=True)]
            hidden = weights.gate.apply(*products)
            out[token] += (down_proj @ hidden + down_bias) * (1 if on_input else router_weight)
    return out
