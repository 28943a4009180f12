from __future__ import annotations

import torch

from alphaq_vllm.kernels import Routing


def test_local_expert_ids_skips_padding_and_foreign_experts():
    topk_ids = torch.tensor([[0, 5], [-1, 3]])
    expert_map = torch.tensor([1, -1, -1, 0, -1, -1], dtype=torch.int32)
    mapped = Routing(torch.rand(2, 2), topk_ids, expert_map).local_expert_ids()
    assert mapped.tolist() == [[1, -1], [-1, 0]]
    unmapped = Routing(torch.rand(2, 2), topk_ids).local_expert_ids()
    assert unmapped.tolist() == topk_ids.tolist()
    assert mapped.dtype == unmapped.dtype == torch.int32


def test_of_tokens_takes_the_routes_of_some():
    routing = Routing(torch.rand(5, 1), torch.arange(5)[:, None], torch.arange(5, dtype=torch.int32), True)
    some = routing.of_tokens(slice(1, 3))
    assert torch.equal(some.topk_weights, routing.topk_weights[1:3])
    assert some.topk_ids.tolist() == [[1], [2]]
    assert some.expert_map is routing.expert_map
    assert some.apply_router_weight_on_input
