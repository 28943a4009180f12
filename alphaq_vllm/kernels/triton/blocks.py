"""What precedes the matrix products on a GPU: routes in blocks of one expert each, and sums of groups of activations.

A route is one (token, slot) pair of ``topk_ids [num_tokens, top_k]``; its id is ``token * top_k + slot``. Which
routes share a block, and in which order, changes no result: the matrix unit computes each route's column by itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from alphaq_vllm.kernels.triton.launches import APART, Launches, wait_for_previous_kernel

# Up to here every route looks at all others, and nothing is sorted: one launch instead of three.
MAX_DIRECT_ROUTES = 256
# May be parts of larger tensors, as with data parallel ranks: wherever they begin, no kernel is compiled once more.
UNALIGNED = ("topk_ids_ptr", "router_weights_ptr")


class Blocks(NamedTuple):
    """Blocks of routes, and the sums that the zero points are multiplied with.

    expert_ids: ``[num_blocks]`` int32, -1 for no block. route_ids: ``[num_blocks, block_m]`` int32, -1 for padding.
    x_sums: ``[num_tokens, hidden_size / group_size]`` float32, or None.
    """

    expert_ids: torch.Tensor
    route_ids: torch.Tensor
    x_sums: torch.Tensor | None


def max_blocks(num_routes: int, num_experts: int, block_m: int) -> int:
    """The most blocks that any routing needs: each expert that has a route pads up to block_m - 1 of its last block.

    >>> max_blocks(num_routes=4, num_experts=60, block_m=16), max_blocks(num_routes=4096, num_experts=8, block_m=128)
    (4, 39)
    """
    return (num_routes + min(num_routes, num_experts) * (block_m - 1)) // block_m


def make_blocks(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    num_experts: int,
    group_size: int | None,
    block_m: int,
    launches: Launches = APART,
) -> Blocks:
    """Put the routes into blocks, by launches and into tensors that depend on shapes alone.

    x: ``[num_tokens, hidden_size]``, contiguous. topk_ids: ``[num_tokens, top_k]``, contiguous; -1 is skipped.
    expert_map: global to local expert ids, -1 for experts of other ranks, which are skipped. group_size: of the columns
    that are summed, or None for no sums.
    """
    num_tokens, hidden_size = x.shape
    num_routes = topk_ids.numel()
    num_groups = hidden_size // group_size if group_size else 0
    x_sums = x.new_empty(num_tokens, num_groups, dtype=torch.float32) if group_size else None
    sums = (x, x_sums, hidden_size, group_size, triton.next_power_of_2(num_groups))
    num_blocks = max_blocks(num_routes, num_experts, block_m)
    if num_routes <= MAX_DIRECT_ROUTES:
        expert_ids = topk_ids.new_empty(num_blocks, dtype=torch.int32)
        route_ids = topk_ids.new_empty(num_blocks, block_m, dtype=torch.int32)
        num_sums = num_tokens if group_size else 0
        padded = max(16, triton.next_power_of_2(num_routes))
        direct_blocks_kernel[(num_sums + num_blocks,)](
            *sums, topk_ids, expert_map, expert_ids, route_ids, num_sums, num_routes, block_m, padded,
            min(padded, 16384 // padded), num_warps=4 if padded <= 64 else 8, **launches.first,
        )  # fmt: skip
        return Blocks(expert_ids, route_ids, x_sums)
    # Four at a time, so that every part of the buffer starts aligned and no kernel is compiled once more for another.
    num_blocks = (num_blocks + 3) // 4 * 4
    sizes = (num_blocks * block_m, num_blocks, num_experts)
    route_ids, expert_ids, last_ranks = topk_ids.new_full((sum(sizes),), -1, dtype=torch.int32).split(sizes)
    ranks = topk_ids.new_empty(num_routes, dtype=torch.int32)
    top_k = topk_ids.shape[1]
    rank_routes_kernel[(num_tokens,)](
        *sums, topk_ids, expert_map, last_ranks, ranks, top_k, triton.next_power_of_2(top_k), **launches.first
    )
    place_routes_kernel[(triton.cdiv(num_routes, 128),)](
        topk_ids, expert_map, last_ranks, ranks, expert_ids, route_ids, num_routes, num_experts, block_m,
        triton.next_power_of_2(num_experts), 128, **launches.next,
    )  # fmt: skip
    return Blocks(expert_ids, route_ids.view(num_blocks, block_m), x_sums)


@triton.jit
def local_experts(ids, expert_map_ptr):
    """Local expert ids of global ones, int32; -1 stays -1."""
    if expert_map_ptr is not None:
        ids = tl.load(expert_map_ptr + tl.maximum(ids, 0), mask=ids >= 0, other=-1)
    return ids.to(tl.int32)


@triton.jit
def _sum_groups(x_ptr, x_sums_ptr, K, GROUP_SIZE: tl.constexpr, NUM_GROUPS: tl.constexpr, row):
    group = tl.arange(0, NUM_GROUPS)
    is_group = group < K // GROUP_SIZE
    columns = group[:, None] * GROUP_SIZE + tl.arange(0, GROUP_SIZE)[None, :]
    x = tl.load(x_ptr + row.to(tl.int64) * K + columns, mask=is_group[:, None], other=0.0)
    tl.store(x_sums_ptr + row * (K // GROUP_SIZE) + group, tl.sum(x.to(tl.float32), 1), mask=is_group)


@triton.jit(do_not_specialize=["num_sums", "num_routes"], do_not_specialize_on_alignment=UNALIGNED)
def direct_blocks_kernel(
    x_ptr,  # [num_tokens, K]
    x_sums_ptr,  # [num_tokens, K / GROUP_SIZE] float32, or None
    K,
    GROUP_SIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,  # K / GROUP_SIZE or more
    topk_ids_ptr,  # [num_routes]
    expert_map_ptr,  # [global experts] int32, or None
    expert_ids_ptr,  # [num_blocks] int32
    route_ids_ptr,  # [num_blocks, BLOCK_M] int32
    num_sums,  # num_tokens, or 0
    num_routes,
    BLOCK_M: tl.constexpr,
    NUM_ROUTES: tl.constexpr,  # num_routes or more
    CHUNK: tl.constexpr,  # of NUM_ROUTES, to which all of these are compared at a time
    OVERLAP: tl.constexpr,
):
    """One program per token, for its sums, and one per block: every BLOCK_M-th route of an expert leads the next."""
    wait_for_previous_kernel(OVERLAP)
    if x_sums_ptr is not None:  # noqa: SIM102, for what is None must not be compiled
        if tl.program_id(0) < num_sums:
            _sum_groups(x_ptr, x_sums_ptr, K, GROUP_SIZE, NUM_GROUPS, tl.program_id(0))
            return
    block = tl.program_id(0) - num_sums
    route = tl.arange(0, NUM_ROUTES)
    experts = local_experts(tl.load(topk_ids_ptr + route, mask=route < num_routes, other=-1), expert_map_ptr)
    # How many of the expert's routes came before.
    rank = tl.zeros([NUM_ROUTES], tl.int32)
    for first in range(0, num_routes, CHUNK):
        other = first + tl.arange(0, CHUNK)
        others = local_experts(tl.load(topk_ids_ptr + other, mask=other < num_routes, other=-1), expert_map_ptr)
        comes_before = (others[None, :] == experts[:, None]) & (other[None, :] < route[:, None])
        rank += tl.sum(comes_before.to(tl.int32), 1)
    leads = (experts >= 0) & (rank % BLOCK_M == 0)
    is_leader = leads & (tl.cumsum(leads.to(tl.int32), 0) - 1 == block)
    expert = tl.max(tl.where(is_leader, experts, -1), 0)
    tl.store(expert_ids_ptr + block, expert)
    if expert >= 0:
        column = rank - tl.max(tl.where(is_leader, rank, 0), 0)
        is_member = (experts == expert) & (column >= 0) & (column < BLOCK_M)
        tl.store(route_ids_ptr + block * BLOCK_M + column, route, mask=is_member)
        padding = tl.arange(0, BLOCK_M)
        num_members = tl.sum(is_member.to(tl.int32), 0)
        tl.store(route_ids_ptr + block * BLOCK_M + padding, -1, mask=padding >= num_members)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def rank_routes_kernel(
    x_ptr,
    x_sums_ptr,
    K,
    GROUP_SIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    topk_ids_ptr,
    expert_map_ptr,
    last_ranks_ptr,  # [num_experts] int32, -1 at first; then the number of the expert's routes, less one
    ranks_ptr,  # [num_routes] int32: how many of the expert's routes came before
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,  # TOP_K or more
    OVERLAP: tl.constexpr,
):
    """One program per token: its sums, and the ranks of its routes."""
    wait_for_previous_kernel(OVERLAP)
    token = tl.program_id(0)
    if x_sums_ptr is not None:
        _sum_groups(x_ptr, x_sums_ptr, K, GROUP_SIZE, NUM_GROUPS, token)
    slot = tl.arange(0, SLOTS)
    ids = tl.load(topk_ids_ptr + token * TOP_K + slot, mask=slot < TOP_K, other=-1)
    expert = local_experts(ids, expert_map_ptr)
    # All at once, for each takes as long as a trip to the L2 cache.
    rank = tl.atomic_add(last_ranks_ptr + expert, 1, mask=expert >= 0, sem="relaxed") + 1
    tl.store(ranks_ptr + token * TOP_K + slot, rank, mask=expert >= 0)


@triton.jit(do_not_specialize=["num_routes"], do_not_specialize_on_alignment=UNALIGNED)
def place_routes_kernel(
    topk_ids_ptr,
    expert_map_ptr,
    last_ranks_ptr,
    ranks_ptr,
    expert_ids_ptr,  # [num_blocks] int32, -1 at first
    route_ids_ptr,  # [num_blocks, BLOCK_M] int32, -1 at first
    num_routes,
    num_experts,
    BLOCK_M: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,  # num_experts or more
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program per BLOCK routes, which go to the blocks of their experts; these follow one another."""
    wait_for_previous_kernel(OVERLAP)
    all_experts = tl.arange(0, NUM_EXPERTS)
    last_rank = tl.load(last_ranks_ptr + all_experts, mask=all_experts < num_experts, other=-1)
    num_blocks = (last_rank + BLOCK_M) // BLOCK_M
    first_blocks = tl.cumsum(num_blocks, 0) - num_blocks

    route = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = local_experts(tl.load(topk_ids_ptr + route, mask=route < num_routes, other=-1), expert_map_ptr)
    rank = tl.load(ranks_ptr + route, mask=expert >= 0, other=1)
    first_block = tl.sum(tl.where(expert[:, None] == all_experts[None, :], first_blocks[None, :], 0), 1)
    block = first_block + rank // BLOCK_M
    tl.store(route_ids_ptr + block * BLOCK_M + rank % BLOCK_M, route, mask=expert >= 0)
    tl.store(expert_ids_ptr + block, expert, mask=(expert >= 0) & (rank % BLOCK_M == 0))
