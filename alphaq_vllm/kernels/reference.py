"""What a Mixture-of-Experts layer means: float64, one expert after the other. Everything else is tested against it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from alphaq_vllm.kernels.experts import PackedExperts

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu}
SUPPORTED_ACTIVATIONS = tuple(ACTIVATIONS)


def fused_moe_reference(
    x: torch.Tensor,
    w13: PackedExperts,
    w2: PackedExperts,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None = None,
    activation: str = "silu",
    apply_router_weight_on_input: bool = False,
) -> torch.Tensor:
    """The same as ``fused_moe``, computed and returned in float64."""
    out = torch.zeros(x.shape[0], w2.N, dtype=torch.float64)
    for expert in range(w13.num_experts):
        gate_proj, up_proj, down_proj = (
            experts.matrix(expert, projection).double() for experts, projection in ((w13, 0), (w13, 1), (w2, 0))
        )
        global_id = expert if expert_map is None else (expert_map == expert).nonzero().item()
        for token, slot in (topk_ids == global_id).nonzero().tolist():
            router_weight = topk_weights[token, slot].double()
            hidden = x[token].double() * (router_weight if apply_router_weight_on_input else 1)
            hidden = ACTIVATIONS[activation](gate_proj @ hidden) * (up_proj @ hidden)
            out[token] += down_proj @ hidden * (1 if apply_router_weight_on_input else router_weight)
    return out
