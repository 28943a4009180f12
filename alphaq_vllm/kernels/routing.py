"""Which experts each token goes to, as the router says."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Routing:
    """The experts of each token, and their weights in the sum.

    Args:
        topk_weights: ``[num_tokens, top_k]`` float32.
        topk_ids: ``[num_tokens, top_k]`` int32 or int64, global expert ids; -1 marks padding, which is skipped.
        expert_map: ``[global_num_experts]`` int32, global to local id, -1 for experts of other ranks, which are
            skipped. None if this rank holds all experts.
        apply_router_weight_on_input: the router's weight multiplies x, not the expert's output; needs top_k = 1.
    """

    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    expert_map: torch.Tensor | None = None
    apply_router_weight_on_input: bool = False

    def of_tokens(self, tokens: slice) -> Routing:
        """Take the routes of some tokens.

        Args:
            tokens: which ones.

        Returns:
            Views of the same tensors.
        """
        return Routing(
            self.topk_weights[tokens], self.topk_ids[tokens], self.expert_map, self.apply_router_weight_on_input
        )

    def local_expert_ids(self) -> torch.Tensor:
        """Find the local expert of each route.

        Returns:
            ``[num_tokens, top_k]`` int32, -1 for routes to be skipped (padding, and experts of other ranks).
        """
        if self.expert_map is None:
            return self.topk_ids.to(torch.int32)
        local_ids = self.expert_map[self.topk_ids.clamp(min=0)]
        return torch.where(self.topk_ids < 0, -1, local_ids).to(torch.int32)
