"""The GPU path of ``fused_moe``: blocks of routes, product, activation, product, sum: five launches for few tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton

from alphaq_vllm.kernels.experts import PackedExperts
from alphaq_vllm.kernels.routing import Routing
from alphaq_vllm.kernels.triton import devices
from alphaq_vllm.kernels.triton.blocks import MAX_DIRECT_ROUTES, Blocks, make_blocks
from alphaq_vllm.kernels.triton.elementwise import activate_kernel, sum_routes_kernel
from alphaq_vllm.kernels.triton.gemm import moe_gemm_kernel
from alphaq_vllm.kernels.triton.launches import Launches
from alphaq_vllm.kernels.triton.layout import columns_of_a_slab
from alphaq_vllm.kernels.triton.tiles import ROUTES_PER_EXPERT, Tiles, choose_slabs_per_split, choose_tiles
from alphaq_vllm.kernels.triton.unpack import BIASES
from alphaq_vllm.kernels.weights import MoEWeights

# Bytes of intermediate results at a time; more tokens than that are taken in turn.
MAX_WORKSPACE = 2**29


def fused_moe(x: torch.Tensor, weights: MoEWeights, routing: Routing) -> torch.Tensor:
    """Compute a layer's routed experts: launches depend on shapes alone, so it may be captured in a CUDA graph.

    Args:
        x: ``[num_tokens, hidden_size]`` bfloat16 or float16, as all tensors on one GPU.
        weights: the experts that this rank holds, in the order of ``triton.layout``.
        routing: the experts of each token.

    Returns:
        ``[num_tokens, hidden_size]`` of x's dtype, a new tensor.

    Raises:
        TypeError: for another dtype of x.
    """
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"x: expected bfloat16 or float16 on a GPU, got {x.dtype}: use --dtype bfloat16")
    x = x.contiguous()
    routing = Routing(
        routing.topk_weights.contiguous(),
        # Kernels are compiled for the ids' type, and warm_up has met this one.
        routing.topk_ids.to(torch.int32).contiguous(),
        routing.expert_map,
        routing.apply_router_weight_on_input,
    )
    out = torch.empty_like(x)
    piece = tokens_per_pass(routing.topk_ids.shape[1], weights.w13, x.element_size())
    for i in range(0, x.shape[0], piece):
        tokens = slice(i, i + piece)
        _moe_pass(x[tokens], out[tokens], weights, routing.of_tokens(tokens))
    return out


def num_routed_experts(w13: PackedExperts, expert_map: torch.Tensor | None) -> int:
    """Among how many experts the routes are shared, those of other ranks included."""
    return w13.num_experts if expert_map is None else len(expert_map)


def tokens_per_pass(top_k: int, w13: PackedExperts, itemsize: int) -> int:
    """How many tokens are taken at a time: gate and up, what they are activated to, and down fit the workspace."""
    row = (w13.num_projections + 1) * w13.N + w13.K
    return max(MAX_DIRECT_ROUTES, MAX_WORKSPACE // (top_k * row * itemsize) // 16 * 16)


def _moe_pass(x: torch.Tensor, out: torch.Tensor, weights: MoEWeights, routing: Routing) -> None:
    w13, w2, gate = weights.w13, weights.w2, weights.gate
    topk_ids, expert_map, router_weights = routing.topk_ids, routing.expert_map, routing.topk_weights
    on_input = routing.apply_router_weight_on_input
    num_tokens, top_k = topk_ids.shape
    num_routes = topk_ids.numel()
    in_parts = num_routes <= MAX_DIRECT_ROUTES
    widest = max(*w13.widths, *w2.widths)
    device = devices.device_of(x.device)
    launches = Launches(device.overlap)
    tiles = choose_tiles(num_routes, num_routed_experts(w13, expert_map), device.generation, widest)
    needs_sums = not tiles.scale_weights
    blocks = make_blocks(
        x, topk_ids, expert_map, w13.num_experts, w13.group_size if needs_sums else None, tiles.block_m, launches
    )
    first = _gemm(x, blocks.x_sums, w13, blocks, num_routes, in_parts, tiles, device, is_down=False)
    hidden = x.new_empty(num_routes, w13.N)
    hidden_sums = x.new_empty(num_routes, w13.N // w2.group_size, dtype=torch.float32) if needs_sums else None
    block = min(512, triton.next_power_of_2(w13.N))
    activate_kernel[(num_routes, triton.cdiv(w13.N, block))](
        first, hidden, hidden_sums, topk_ids, expert_map, router_weights, weights.w13_bias,
        0.0 if gate.limit is None else gate.limit, gate.alpha, gate.beta, num_routes, first.shape[0], w13.N,
        P=w13.num_projections, IN_PARTS=in_parts, ACTIVATION=gate.activation, CLAMP=gate.limit is not None,
        MUL_ROUTER_WEIGHT=on_input, GROUP_SIZE=w2.group_size, BLOCK=block, **launches.next,
    )  # fmt: skip
    routed = _gemm(hidden, hidden_sums, w2, blocks, num_routes, in_parts, tiles, device, is_down=True)
    slots = triton.next_power_of_2(top_k)
    block = min(max(1, 2048 // slots), 512) if in_parts else 1024
    block = min(block, triton.next_power_of_2(w2.N))
    sum_routes_kernel[(num_tokens, triton.cdiv(w2.N, block))](
        routed, out, topk_ids, expert_map, router_weights, weights.w2_bias, num_tokens, routed.shape[0], w2.N,
        TOP_K=top_k, SLOTS=slots, IN_PARTS=in_parts, MUL_ROUTER_WEIGHT=not on_input, BLOCK=block, **launches.next,
    )  # fmt: skip


def _gemm(
    x: torch.Tensor,
    x_sums: torch.Tensor | None,
    experts: PackedExperts,
    blocks: Blocks,
    num_routes: int,
    in_parts: bool,
    tiles: Tiles,
    device: devices.Device,
    is_down: bool,
) -> torch.Tensor:
    """Each route's products with its expert's matrices in parts to be summed: ``[num_splits, num_routes, P, N]``.

    in_parts: whether there may be more than one part.
    """
    P, tiles_n, num_blocks = experts.num_projections, triton.cdiv(experts.N, tiles.block_n), len(blocks.expert_ids)
    columns = columns_of_a_slab(experts.K)
    num_slabs = slabs_per_split = experts.K // columns
    # For few routes precision costs nothing; for many the results leave the cache, and parts of them would be too many.
    dtype = x.dtype
    if in_parts:
        busy = tiles_n * P * min(num_blocks, experts.num_experts)
        slabs_per_split = choose_slabs_per_split(busy, num_slabs, device.num_multiprocessors * tiles.programs)
        dtype = torch.float32
    num_splits = triton.cdiv(num_slabs, slabs_per_split)
    out = x.new_empty(num_splits, num_routes, P, experts.N, dtype=dtype)
    # Scales and sums meet in multiply-adds, which Triton 3.10 no longer makes by itself.
    options = {"maxnreg": tiles.maxnreg, "enable_fp_fusion": True} if device.ptx else {}
    moe_gemm_kernel[(tiles_n, P * num_splits, num_blocks)](
        x, x_sums, out, *experts.tensors, blocks.expert_ids, blocks.route_ids, num_routes, experts.N, experts.K,
        slabs_per_split, BIASES[x.dtype], ROUTES_PER_ROW=num_routes // x.shape[0], P=P, IS_DOWN=is_down,
        GROUP_SIZE=experts.group_size, COLUMNS=columns, WIDTHS=experts.widths, QUADS=device.quads,
        SCALE_WEIGHTS=tiles.scale_weights, PTX=device.ptx, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n,
        NUM_STAGES=tiles.num_stages, BLOCKS_TOGETHER=tiles.blocks_together,
        num_warps=tiles.num_warps, **options, **Launches(device.overlap).next,
    )  # fmt: skip
    return out


def every_tile(weights: MoEWeights, top_k: int, expert_map: torch.Tensor | None) -> Iterator[tuple[int, Tiles]]:
    """Find what needs kernels of its own when a layer is served.

    Args:
        weights: of the layer.
        top_k: how many experts a token goes to.
        expert_map: of the layer's ``Routing``.

    Yields:
        The fewest tokens that take such kernels, and their tiles.
    """
    w13, w2 = weights.w13, weights.w2
    generation, widest = devices.device_of(w13.packed.device).generation, max(*w13.widths, *w2.widths)
    num_experts = num_routed_experts(w13, expert_map)
    most = max(MAX_DIRECT_ROUTES, max(ROUTES_PER_EXPERT.values()) * num_experts) // top_k + 1
    done = set()
    for num_tokens in range(1, most + 1):
        routes = num_tokens * top_k
        padded = triton.next_power_of_2(routes) if routes <= MAX_DIRECT_ROUTES else 0
        bucket = (choose_tiles(routes, num_experts, generation, widest), padded)
        if bucket not in done:
            done.add(bucket)
            yield num_tokens, bucket[0]


def warm_up(
    weights: MoEWeights,
    top_k: int,
    dtype: torch.dtype,
    expert_map: torch.Tensor | None = None,
    apply_router_weight_on_input: bool = False,
) -> None:
    """Compile every kernel that serving a layer may need, for any number of tokens.

    Args:
        weights: of the layer, as it will be called.
        top_k: how many experts a token goes to.
        dtype: of the activations, bfloat16 or float16.
        expert_map: of the layer's ``Routing``.
        apply_router_weight_on_input: of the layer's ``Routing``.
    """
    for num_tokens, _ in every_tile(weights, top_k, expert_map):
        x = torch.zeros(num_tokens, weights.w13.K, dtype=dtype, device=weights.w13.packed.device)
        topk_ids = torch.full((num_tokens, top_k), -1, dtype=torch.int32, device=x.device)
        fused_moe(x, weights, Routing(topk_ids.float(), topk_ids, expert_map, apply_router_weight_on_input))
