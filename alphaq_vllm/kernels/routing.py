"""Grouping of routes by expert, on the device and with shapes that depend on shapes alone.

A route is one (token, slot) pair of ``topk_ids [num_tokens, top_k]``; its id is ``token * top_k + slot``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F


class RouteBlocks(NamedTuple):
    """Routes in blocks of one expert each.

    sorted_route_ids: ``[max_blocks, block_m]`` int32; the number of routes stands for padding.
    expert_ids: ``[max_blocks]`` int32; -1 for a block without routes.
    """

    sorted_route_ids: torch.Tensor
    expert_ids: torch.Tensor


def local_expert_ids(topk_ids: torch.Tensor, expert_map: torch.Tensor | None) -> torch.Tensor:
    """The local expert of each route, -1 for routes to be skipped (padding, and experts of other ranks).

    topk_ids: ``[num_tokens, top_k]`` global ids or -1. expert_map: ``[global_num_experts]`` local ids or -1.
    Returns ``[num_tokens, top_k]`` int32.
    """
    if expert_map is None:
        return topk_ids.to(torch.int32)
    return torch.where(topk_ids < 0, -1, expert_map[topk_ids.clamp(min=0)]).to(torch.int32)


def max_blocks(num_routes: int, num_experts: int, block_m: int) -> int:
    """The most blocks that any routing needs: each expert that has a route pads up to block_m - 1 of its last block.

    >>> max_blocks(num_routes=4, num_experts=60, block_m=16), max_blocks(num_routes=4096, num_experts=8, block_m=128)
    (4, 39)
    """
    return (num_routes + min(num_routes, num_experts) * (block_m - 1)) // block_m


def group_routes(expert_ids: torch.Tensor, num_experts: int, block_m: int) -> RouteBlocks:
    """Sort routes by expert and cut each expert's routes into blocks of block_m.

    expert_ids: ``[num_tokens, top_k]`` int32 local ids, -1 to skip the route; at least one route.
    """
    num_routes, device = expert_ids.numel(), expert_ids.device
    skipped_last = torch.where(expert_ids < 0, num_experts, expert_ids).flatten()
    sorted_experts, order = skipped_last.sort(stable=True)
    first_route = torch.searchsorted(
        sorted_experts, torch.arange(num_experts + 1, dtype=sorted_experts.dtype, device=device)
    )
    last_block = ((first_route.diff() + block_m - 1) // block_m).cumsum(0)
    first_block = F.pad(last_block, (1, 0))

    block = torch.arange(max_blocks(num_routes, num_experts, block_m), device=device)
    expert = torch.searchsorted(last_block, block, right=True)
    # A block behind the last expert's counts as that expert's; no route is left for it.
    owner = expert.clamp(max=num_experts - 1)
    position = (first_route[owner] + (block - first_block[owner]) * block_m)[:, None] + torch.arange(
        block_m, device=device
    )
    has_route = position < first_route[owner + 1][:, None]
    route = torch.where(has_route, order[position.clamp(max=num_routes - 1)], num_routes)
    return RouteBlocks(route.to(torch.int32), torch.where(expert < num_experts, expert, -1).to(torch.int32))
