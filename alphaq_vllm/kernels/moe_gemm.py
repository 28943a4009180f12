"""The GPU path: two grouped matrix products over routes sorted by expert, and a sum over each token's routes.

Of one group of columns, with codes q, scale s and zero point z of a row, a product is

    sum_k s * (q_k - z) * x_k  =  s * (sum_k q_k * x_k  -  z * sum_k x_k)

so codes go to the matrix unit as they are, and scale and zero point meet the float32 accumulator. Weights are the
first operand (``out.T = W @ x.T``): their rows fill the wide side of a matrix instruction, the few tokens of an expert
the narrow one. Layouts: ``packing`` (codes), ``experts`` (matrices), ``routing`` (routes).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from alphaq_vllm.kernels.experts import PackedExperts
from alphaq_vllm.kernels.routing import RouteBlocks, group_routes, local_expert_ids
from alphaq_vllm.kernels.tiles import Tiles, choose_tiles


@triton.jit
def _load_plane(row_ptrs, WIDTH: tl.constexpr, NUM_BITS: tl.constexpr, BLOCK_K: tl.constexpr):
    """The fields of one plane, as bits of the code, in pairs: ``[BLOCK_N, BLOCK_K // 2]`` int32.

    WIDTH: of the plane. row_ptrs: ``[BLOCK_N]``, each row's first word.
    """
    LOW_BIT: tl.constexpr = NUM_BITS & ~(2 * WIDTH - 1)
    PAIR_MASK: tl.constexpr = ((1 << WIDTH) - 1) * 0x00010001
    i = tl.arange(0, BLOCK_K // 32 * WIDTH)
    words = tl.load(row_ptrs[:, None] + (i // WIDTH * NUM_BITS + LOW_BIT + i % WIDTH)[None, :])
    fields = (words[:, :, None] >> (tl.arange(0, 16 // WIDTH) * WIDTH)[None, None, :]) & PAIR_MASK
    return tl.reshape(fields, [row_ptrs.shape[0], BLOCK_K // 2]) << LOW_BIT


@triton.jit
def _load_codes(row_ptrs, NUM_BITS: tl.constexpr, BLOCK_K: tl.constexpr):
    """The codes of BLOCK_K columns, in pairs: ``[BLOCK_N, BLOCK_K // 2]`` int32, even k in the low half."""
    pairs = tl.full([row_ptrs.shape[0], BLOCK_K // 2], 0, tl.int32)
    for i in tl.static_range(4):
        if NUM_BITS & (8 >> i):
            pairs |= _load_plane(row_ptrs, 8 >> i, NUM_BITS, BLOCK_K)
    return pairs


@triton.jit
def _biased_floats(pairs, NUM_BITS: tl.constexpr, dtype: tl.constexpr):
    """Codes as floats, ``[BLOCK_N, BLOCK_K]`` of dtype, and the bias that each of them carries.

    A code in the top bits of the mantissa of ``2 ** NUM_BITS`` is ``2 ** NUM_BITS + code``, exactly, for two
    neighbours in one operation. bfloat16 has 7 such bits, so 8-bit codes are converted one by one.
    """
    MANTISSA: tl.constexpr = 7 if dtype == tl.bfloat16 else 10
    EXPONENT: tl.constexpr = (127 if dtype == tl.bfloat16 else 15) + NUM_BITS
    if NUM_BITS > MANTISSA:
        low, high = (pairs & 0xFFFF).to(tl.float32).to(dtype), (pairs >> 16).to(tl.float32).to(dtype)
        bias = 0.0
    else:
        floats = (pairs << (MANTISSA - NUM_BITS)) | ((EXPONENT << MANTISSA) * 0x00010001)
        low = (floats & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True)
        high = (floats >> 16).to(tl.uint16).to(dtype, bitcast=True)
        bias = 1.0 * (1 << NUM_BITS)
    return tl.reshape(tl.join(low, high), [pairs.shape[0], 2 * pairs.shape[1]]), bias


@triton.jit
def _project_width(
    x_ptrs,
    x_mask,
    row_ptrs,
    scale_ptrs,
    zero_point_ptrs,
    K,
    NUM_BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``W @ x.T`` for rows of one width: ``[BLOCK_N, BLOCK_M]`` float32."""
    acc = tl.zeros([row_ptrs.shape[0], x_ptrs.shape[1]], tl.float32)
    for block in range(K // BLOCK_K):
        x = tl.load(x_ptrs + block * BLOCK_K, mask=x_mask, other=0.0)
        pairs = _load_codes(row_ptrs + block * (BLOCK_K // 32 * NUM_BITS), NUM_BITS, BLOCK_K)
        codes, bias = _biased_floats(pairs, NUM_BITS, x.dtype)
        group = block // (GROUP_SIZE // BLOCK_K)
        scale = tl.load(scale_ptrs + group).to(tl.float32)
        zero_point = tl.load(zero_point_ptrs + group).to(tl.float32) + bias
        x_sum = tl.sum(x.to(tl.float32), 0)
        acc += scale[:, None] * (tl.dot(codes, x) - zero_point[:, None] * x_sum[None, :])
    return acc


@triton.jit
def _project(
    x_ptrs,
    x_mask,
    packed_ptr,
    scales_ptr,
    zero_points_ptr,
    num_bits_ptr,
    offsets_ptr,
    matrix,
    rows,
    N,
    K,
    GROUP_SIZE: tl.constexpr,
    WIDTHS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``W @ x.T`` for some rows of one matrix, whatever its width: ``[BLOCK_N, BLOCK_M]`` float32."""
    num_bits = tl.load(num_bits_ptr + matrix)
    words_ptr = packed_ptr + tl.load(offsets_ptr + matrix)
    groups = (matrix.to(tl.int64) * N + rows) * (K // GROUP_SIZE)
    acc = tl.zeros([rows.shape[0], x_ptrs.shape[1]], tl.float32)
    for i in tl.static_range(len(WIDTHS)):
        if num_bits == WIDTHS[i]:
            row_ptrs = words_ptr + rows * (K // 32 * WIDTHS[i])
            acc = _project_width(
                x_ptrs,
                x_mask,
                row_ptrs,
                scales_ptr + groups,
                zero_points_ptr + groups,
                K,
                WIDTHS[i],
                GROUP_SIZE,
                BLOCK_K,
            )
    return acc


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    tl.static_assert(ACTIVATION == "silu" or ACTIVATION == "gelu")
    return x * tl.sigmoid(x) if ACTIVATION == "silu" else 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit(do_not_specialize=["num_routes"])
def moe_gemm_kernel(
    x_ptr,  # [num_routes // ROUTES_PER_ROW, K] bfloat16 or float16
    out_ptr,  # [num_routes, N] of x's dtype; rows of skipped routes are not written
    packed_ptr,  # [words] int32
    scales_ptr,  # [E, P, N, K / GROUP_SIZE] bfloat16
    zero_points_ptr,  # [E, P, N, K / GROUP_SIZE] float16
    num_bits_ptr,  # [E, P] int32
    offsets_ptr,  # [E, P] int64
    router_weights_ptr,  # [num_routes] float32
    sorted_route_ids_ptr,  # [max_blocks, BLOCK_M] int32
    expert_ids_ptr,  # [max_blocks] int32
    num_routes,
    N,
    K,
    ROUTES_PER_ROW: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    WIDTHS: tl.constexpr,  # tuple of the widths that occur in num_bits
    ACTIVATION: tl.constexpr,  # None: P = 1 and out = W x; else P = 2 and out = act(W_0 x) * (W_1 x)
    MUL_ROUTER_WEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # divides GROUP_SIZE
):
    """One program per (block of routes, block of output features), the latter fastest: neighbours share x."""
    num_blocks_n = tl.cdiv(N, BLOCK_N)
    block_m, block_n = tl.program_id(0) // num_blocks_n, tl.program_id(0) % num_blocks_n
    expert = tl.load(expert_ids_ptr + block_m)
    if expert < 0:
        return
    routes = tl.load(sorted_route_ids_ptr + block_m * BLOCK_M + tl.arange(0, BLOCK_M))
    is_route = (routes < num_routes)[None, :]
    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows behind the last one repeat it: they need no mask until they are stored.
    rows = tl.minimum(offs_n, N - 1)
    x_ptrs = x_ptr + (routes // ROUTES_PER_ROW).to(tl.int64)[None, :] * K + tl.arange(0, BLOCK_K)[:, None]
    NUM_PROJECTIONS: tl.constexpr = 1 if ACTIVATION is None else 2

    acc = _project(
        x_ptrs, is_route, packed_ptr, scales_ptr, zero_points_ptr, num_bits_ptr, offsets_ptr,
        expert * NUM_PROJECTIONS, rows, N, K, GROUP_SIZE, WIDTHS, BLOCK_K,
    )  # fmt: skip
    router_weights = tl.load(router_weights_ptr + routes, mask=routes < num_routes, other=0.0)[None, :]
    if MUL_ROUTER_WEIGHT:
        acc *= router_weights
    if ACTIVATION is not None:
        up = _project(
            x_ptrs, is_route, packed_ptr, scales_ptr, zero_points_ptr, num_bits_ptr, offsets_ptr,
            expert * NUM_PROJECTIONS + 1, rows, N, K, GROUP_SIZE, WIDTHS, BLOCK_K,
        )  # fmt: skip
        if MUL_ROUTER_WEIGHT:
            up *= router_weights
        acc = _activate(acc, ACTIVATION) * up
    out_ptrs = out_ptr + routes.to(tl.int64)[None, :] * N + offs_n[:, None]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=is_route & (offs_n < N)[:, None])


@triton.jit
def sum_routes_kernel(
    routed_ptr,  # [num_tokens, TOP_K, N]
    expert_ids_ptr,  # [num_tokens, TOP_K] int32, -1: the route was skipped and its row not written
    out_ptr,  # [num_tokens, N]
    N,
    TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per (token, block of features); a fixed order of float32 additions, so no run differs."""
    token = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_N], tl.float32)
    for slot in range(TOP_K):
        route = token * TOP_K + slot
        num_written = tl.where(tl.load(expert_ids_ptr + route) >= 0, N, 0)
        acc += tl.load(routed_ptr + route * N + offs_n, mask=offs_n < num_written, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * N + offs_n, acc.to(out_ptr.dtype.element_ty), mask=offs_n < N)


def fused_moe_triton(
    x: torch.Tensor,
    w13: PackedExperts,
    w2: PackedExperts,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    activation: str,
    apply_router_weight_on_input: bool,
) -> torch.Tensor:
    """``fused_moe`` on GPU tensors: launches depend on shapes alone, so it may be captured in a CUDA graph."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"x: expected bfloat16 or float16 on a GPU, got {x.dtype}: use --dtype bfloat16")
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    num_tokens, top_k = topk_ids.shape
    if num_tokens == 0:
        return out
    expert_ids = local_expert_ids(topk_ids, expert_map).contiguous()
    tiles = choose_tiles(num_tokens * top_k, w13.num_experts)
    blocks = group_routes(expert_ids, w13.num_experts, tiles.block_m)
    router_weights = topk_weights.contiguous()
    hidden = x.new_empty(num_tokens * top_k, w13.N)
    routed = x.new_empty(num_tokens * top_k, w2.N)
    _launch_gemm(x.contiguous(), hidden, w13, router_weights, blocks, tiles, activation, apply_router_weight_on_input)
    _launch_gemm(hidden, routed, w2, router_weights, blocks, tiles, None, not apply_router_weight_on_input)
    block_n = min(1024, triton.next_power_of_2(w2.N))
    sum_routes_kernel[(num_tokens, triton.cdiv(w2.N, block_n))](routed, expert_ids, out, w2.N, top_k, block_n)
    return out


def _launch_gemm(
    x: torch.Tensor,
    out: torch.Tensor,
    experts: PackedExperts,
    router_weights: torch.Tensor,
    blocks: RouteBlocks,
    tiles: Tiles,
    activation: str | None,
    mul_router_weight: bool,
) -> None:
    num_routes = out.shape[0]
    grid = (blocks.expert_ids.numel() * triton.cdiv(experts.N, tiles.block_n),)
    moe_gemm_kernel[grid](
        x,
        out,
        *experts.tensors,
        router_weights,
        *blocks,
        num_routes,
        experts.N,
        experts.K,
        ROUTES_PER_ROW=num_routes // x.shape[0],
        GROUP_SIZE=experts.group_size,
        WIDTHS=experts.widths,
        ACTIVATION=activation,
        MUL_ROUTER_WEIGHT=mul_router_weight,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_K=min(tiles.block_k, experts.group_size),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
