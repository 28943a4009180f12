"""What a Mixture-of-Experts layer means: float64, one expert after the other. Everything else is tested against it."""

from __future__ import annotations

import torch

from alphaq_vllm.kernels import MoEWeights, Routing


def fused_moe_reference(x: torch.Tensor, weights: MoEWeights, routing: Routing) -> torch.Tensor:
    """The same as ``fused_moe``, computed and returned in float64."""
    out = torch.zeros(x.shape[0], weights.w2.N, dtype=torch.float64)
    for expert in range(weights.w13.num_experts):
        gate_proj, up_proj, down_proj = (
            experts.matrix(expert, projection).double()
            for experts, projection in ((weights.w13, 0), (weights.w13, 1), (weights.w2, 0))
        )
        gate_bias, up_bias = (0, 0) if weights.w13_bias is None else weights.w13_bias[expert].double()
        down_bias = 0 if weights.w2_bias is None else weights.w2_bias[expert].double()
        global_id = expert if routing.expert_map is None else (routing.expert_map == expert).nonzero().item()
        for token, slot in (routing.topk_ids == global_id).nonzero().tolist():
            router_weight = routing.topk_weights[token, slot].double()
            on_input = routing.apply_router_weight_on_input
            hidden = x[token].double() * (router_weight if on_input else 1)
            hidden = weights.gate.apply(gate_proj @ hidden + gate_bias, up_proj @ hidden + up_bias)
            out[token] += (down_proj @ hidden + down_bias) * (1 if on_input else router_weight)
    return out
