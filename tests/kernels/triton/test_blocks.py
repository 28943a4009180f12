from __future__ import annotations

import pytest
import torch

from alphaq_vllm.kernels import Routing
from alphaq_vllm.kernels.triton.blocks import MAX_DIRECT_ROUTES, make_blocks, max_blocks
from alphaq_vllm.kernels.triton.tiles import OTHER_TILES, TILES, choose_slabs_per_split, choose_tiles

ROUTINGS = {
    "one route": [[3]],
    "in order": [[0, 1], [2, 3], [4, 0]],
    "with empty experts": [[4, 1], [1, 4], [4, 4]],
    "one expert": [[2]] * 17,
    "full blocks": [[0]] * 8 + [[3]] * 4,
    "some skipped": [[-1, 2], [0, -1], [-1, -1], [2, 2]],
    "all skipped": [[-1, -1], [-1, -1]],
    "last direct": torch.randint(-1, 5, (128, 2), generator=torch.Generator().manual_seed(0)).tolist(),
    "many": torch.randint(-1, 5, (131, 2), generator=torch.Generator().manual_seed(0)).tolist(),
    "many on one expert": [[1]] * 257,
    "many skipped": [[-1]] * 257,
}


@pytest.mark.parametrize("block_m", [8, 16])
@pytest.mark.parametrize("name", ROUTINGS)
def test_make_blocks_puts_each_route_into_one_block_of_its_expert(name, block_m, interpreter):
    ids = torch.tensor(ROUTINGS[name], dtype=torch.int32)
    x = torch.randn(len(ids), 96).half()
    blocks = interpreter.submit(make_blocks, x, ids, None, 5, 32, block_m).result()
    direct = ids.numel() <= MAX_DIRECT_ROUTES
    most = max_blocks(ids.numel(), 5, block_m)
    assert len(blocks.expert_ids) == (most if direct else -(-most // 4) * 4)
    assert blocks.route_ids.shape == (len(blocks.expert_ids), block_m)
    found, used = [], 0
    for expert, routes in zip(blocks.expert_ids.tolist(), blocks.route_ids.tolist(), strict=True):
        if expert >= 0:
            used += 1
            routes = [route for route in routes if route >= 0]
            assert routes
            found += [(expert, route) for route in routes]
    wanted = [(expert, route) for route, expert in enumerate(ids.flatten().tolist()) if expert >= 0]
    assert sorted(found) == sorted(wanted)
    assert used == sum(-(-(ids == expert).sum().item() // block_m) for expert in range(5))
    torch.testing.assert_close(blocks.x_sums, x.float().view(len(ids), 3, 32).sum(-1))
    without_sums = interpreter.submit(make_blocks, x, ids, None, 5, None, block_m).result()
    assert without_sums.x_sums is None
    assert torch.equal(without_sums.expert_ids, blocks.expert_ids)
    assert torch.equal(without_sums.route_ids >= 0, blocks.route_ids >= 0)


@pytest.mark.parametrize("num_tokens", [3, 150])
def test_make_blocks_skips_experts_of_other_ranks(num_tokens, interpreter):
    torch.manual_seed(0)
    ids = torch.randint(-1, 6, (num_tokens, 2))
    expert_map = torch.tensor([1, -1, -1, 0, -1, 2], dtype=torch.int32)
    x = torch.zeros(num_tokens, 32, dtype=torch.float16)
    blocks = interpreter.submit(make_blocks, x, ids, expert_map, 3, 32, 16).result()
    local = Routing(torch.rand(ids.shape), ids, expert_map).local_expert_ids().flatten()
    for expert, routes in zip(blocks.expert_ids, blocks.route_ids, strict=True):
        if expert >= 0:
            assert (local[routes[routes >= 0].long()] == expert).all()
    used = blocks.route_ids[blocks.expert_ids >= 0]
    assert (used >= 0).sum() == (local >= 0).sum()


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


@pytest.mark.parametrize("generation", [*TILES, 0])
def test_choose_tiles_grows_with_the_routes_per_expert(generation):
    chosen = [choose_tiles(num_routes, 8, generation, 4) for num_routes in (1, 40, 41, 88, 89, 320, 321, 1536, 1537)]
    assert [tiles.block_m for tiles in chosen] == sorted(tiles.block_m for tiles in chosen)
    assert set(chosen) == set(TILES.get(generation, OTHER_TILES))
    assert choose_tiles(10**6, 8, generation, widest=8).block_m == 64


def test_choose_slabs_per_split_fills_the_chip_once_and_no_more():
    def choose(num_tiles, num_slabs, num_programs=528):
        return choose_slabs_per_split(num_tiles, num_slabs, num_programs)

    assert choose(num_tiles=448, num_slabs=32) == 32
    assert choose(num_tiles=64, num_slabs=112) == 14
    assert choose(num_tiles=64, num_slabs=112, num_programs=264) == 28
    assert choose(num_tiles=1, num_slabs=8) == 2
    assert choose(num_tiles=1, num_slabs=1) == 1
