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
    for token, slot in torch.cartesian_prod(torch.arange(x.shape[0]), torch.arange(topk_ids.shape[1])).tolist():
        expert = int(topk_ids[token, slot])
        if expert >= 0 and expert_map is not None:
            expert = int(expert_map[expert])
        if expert < 0:
            continue
        gate_proj, up_proj, down_proj = (
            experts.matrix(expert, p).double() for experts, p in ((w13, 0), (w13, 1), (w2, 0))
        )
        router_weight = topk_weights[token, slot].double()
        hidden = x[token].double() * (router_weight if apply_router_weight_on_input else 1)
        hidden = ACTIVATIONS[activation](gate_proj @ hidden) * (up_proj @ hidden)
        out[token] += down_proj @ hidden * (1 if apply_router_weight_on_input else router_weight)
    return out
