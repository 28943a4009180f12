"""What a Mixture-of-Experts layer means: float64, one expert after the other. Everything else is tested against it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from alphaq_vllm.kernels.experts import PackedExperts

SUPPORTED_ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


class Gate(NamedTuple):
    """How gate and up become one: ``act(gate) * (up + beta)`` with ``gate <= limit`` and ``-limit <= up <= limit``.

    activation: one of SUPPORTED_ACTIVATIONS; silu is ``gate * sigmoid(alpha * gate)``, the others know no alpha.
    """

    activation: str = "silu"
    limit: float | None = None
    alpha: float = 1.0
    beta: float = 0.0

    def apply(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Any shape and floating dtype; returns the same."""
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        if self.activation == "silu":
            activated = gate * (self.alpha * gate).sigmoid()
        else:
            activated = F.gelu(gate, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        return activated * (up + self.beta)


SILU = Gate()
GPT_OSS = Gate("silu", limit=7.0, alpha=1.702, beta=1.0)


def fused_moe_reference(
    x: torch.Tensor,
    w13: PackedExperts,
    w2: PackedExperts,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    gate: Gate = SILU,
    apply_router_weight_on_input: bool = False,
) -> torch.Tensor:
    """The same as ``fused_moe``, computed and returned in float64."""
    out = torch.zeros(x.shape[0], w2.N, dtype=torch.float64)
    for expert in range(w13.num_experts):
        gate_proj, up_proj, down_proj = (
            experts.matrix(expert, projection).double() for experts, projection in ((w13, 0), (w13, 1), (w2, 0))
        )
        gate_bias, up_bias = (0, 0) if w13_bias is None else w13_bias[expert].double()
        down_bias = 0 if w2_bias is None else w2_bias[expert].double()
        global_id = expert if expert_map is None else (expert_map == expert).nonzero().item()
        for token, slot in (topk_ids == global_id).nonzero().tolist():
            router_weight = topk_weights[token, slot].double()
            hidden = x[token].double() * (router_weight if apply_router_weight_on_input else 1)
            hidden = gate.apply(gate_proj @ hidden + gate_bias, up_proj @ hidden + up_bias)
            out[token] += (down_proj @ hidden + down_bias) * (1 if apply_router_weight_on_input else router_weight)
    return out
