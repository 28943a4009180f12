from __future__ import annotations

import pytest
import torch

from alphaq_vllm.kernels.routing import group_routes, local_expert_ids, max_blocks
from alphaq_vllm.kernels.tiles import TILES, choose_tiles

ROUTINGS = {
    "one route": [[3]],
    "in order": [[0, 1], [2, 3], [4, 0]],
    "with empty experts": [[4, 1], [1, 4], [4, 4]],
    "one expert": [[2]] * 17,
    "full blocks": [[0]] * 8 + [[3]] * 4,
    "some skipped": [[-1, 2], [0, -1], [-1, -1], [2, 2]],
    "all skipped": [[-1, -1], [-1, -1]],
    "many": torch.randint(-1, 5, (63, 3), generator=torch.Generator().manual_seed(0)).tolist(),
}


@pytest.mark.parametrize("block_m", [1, 4, 16])
@pytest.mark.parametrize("name", ROUTINGS)
def test_group_routes_puts_each_route_into_one_block_of_its_expert(name, block_m):
    ids = torch.tensor(ROUTINGS[name], dtype=torch.int32)
    blocks = group_routes(ids, num_experts=5, block_m=block_m)
    assert blocks.sorted_route_ids.shape == (max_blocks(ids.numel(), 5, block_m), block_m)
    found = []
    for expert, routes in zip(blocks.expert_ids.tolist(), blocks.sorted_route_ids.tolist(), strict=True):
        routes = [route for route in routes if route != ids.numel()]
        assert (expert == -1) == (not routes), "every block has either an expert and routes or neither"
        found += [(expert, route) for route in routes]
    # By expert, then in the order of the tokens: the sums of a kernel do not depend on the run.
    expected = sorted((expert, route) for route, expert in enumerate(ids.flatten().tolist()) if expert >= 0)
    assert found == expected


@pytest.mark.parametrize(("num_routes", "num_experts", "block_m"), [(1, 60, 16), (40, 3, 16), (17, 8, 4), (64, 1, 64)])
def test_max_blocks_is_reached_by_the_worst_routing(num_routes, num_experts, block_m):
    experts = min(num_routes, num_experts)
    # One route for every expert but the last, which takes the rest; then whole blocks move to the others.
    worst = max(
        (experts - 1) * ((1 + extra * block_m + block_m - 1) // block_m)
        + -(-(num_routes - (experts - 1) * (1 + extra * block_m)) // block_m)
        for extra in range(num_routes // block_m + 1)
        if num_routes - (experts - 1) * (1 + extra * block_m) >= 1
    )
    assert worst <= max_blocks(num_routes, num_experts, block_m) <= worst + 1


def test_local_expert_ids_skips_padding_and_foreign_experts():
    topk_ids = torch.tensor([[0, 5], [-1, 3]])
    expert_map = torch.tensor([1, -1, -1, 0, -1, -1], dtype=torch.int32)
    assert local_expert_ids(topk_ids, expert_map).tolist() == [[1, -1], [-1, 0]]
    assert local_expert_ids(topk_ids, None).tolist() == topk_ids.tolist()
    assert local_expert_ids(topk_ids, expert_map).dtype == local_expert_ids(topk_ids, None).dtype == torch.int32


def test_choose_tiles_grows_with_the_routes_per_expert():
    chosen = [choose_tiles(num_routes, num_experts=8) for num_routes in (0, 1, 128, 129, 256, 512, 513, 10**6)]
    assert [tiles.block_m for tiles in chosen] == [16, 16, 16, 32, 32, 64, 128, 128]
    assert set(chosen) == set(TILES)
