"""What stands between and behind the matrix products on a GPU: activation, and the sum over a token's routes."""

from __future__ import annotations

import triton
import triton.language as tl

from alphaq_vllm.kernels.triton.blocks import UNALIGNED, local_experts
from alphaq_vllm.kernels.triton.launches import wait_for_previous_kernel

# Parts that are on their way at a time, before any is waited for.
LOADS_AT_A_TIME = tl.constexpr(4)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr, alpha):
    if ACTIVATION == "silu" or ACTIVATION == "swiglustep":
        activated = x * tl.sigmoid(alpha * x)
    elif ACTIVATION == "gelu":
        activated = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(y)) = sigmoid(2 * y)
        activated = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        tl.static_assert(ACTIVATION == "relu2")
        # NaN stays NaN.
        activated = tl.where(x < 0, 0.0, x * x)
    return activated


@triton.jit(do_not_specialize=["num_routes", "num_splits"], do_not_specialize_on_alignment=UNALIGNED)
def activate_kernel(
    partial_ptr,  # [num_splits, num_routes, P, N]: gate and up, or up alone, in parts to be summed
    hidden_ptr,  # [num_routes, N] of x's dtype
    hidden_sums_ptr,  # [num_routes, N / GROUP_SIZE] float32, or None
    topk_ids_ptr,  # [num_routes]
    expert_map_ptr,  # [global experts] int32, or None
    router_weights_ptr,  # [num_routes] float32
    bias_ptr,  # [E, P, N], or None
    limit,  # of the clamp, if CLAMP
    alpha,
    beta,
    num_routes,
    num_splits,
    N,
    P: tl.constexpr,  # 2, or 1 for experts without a gate
    IN_PARTS: tl.constexpr,  # whether num_splits may be more than 1
    ACTIVATION: tl.constexpr,
    CLAMP: tl.constexpr,
    MUL_ROUTER_WEIGHT: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,  # a multiple of GROUP_SIZE
    OVERLAP: tl.constexpr,
):
    """One program per (route, block of features)."""
    route = tl.program_id(0).to(tl.int64)
    expert = local_experts(tl.load(topk_ids_ptr + route), expert_map_ptr)
    wait_for_previous_kernel(OVERLAP)
    if expert < 0:
        return
    offs_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs_n < N
    first = tl.zeros([BLOCK], tl.float32)
    up = tl.zeros([BLOCK], tl.float32)
    # All of them are asked for before any is waited for.
    for first_split in range(0, num_splits if IN_PARTS else 1, LOADS_AT_A_TIME):
        for i in tl.static_range(LOADS_AT_A_TIME if IN_PARTS else 1):
            ptrs = partial_ptr + ((first_split + i) * num_routes + route) * P * N + offs_n
            is_part = offs_n < tl.where(first_split + i < num_splits, N, 0)
            first += tl.load(ptrs, mask=is_part, other=0.0).to(tl.float32)
            if P == 2:
                up += tl.load(ptrs + N, mask=is_part, other=0.0).to(tl.float32)
    if MUL_ROUTER_WEIGHT:
        router_weight = tl.load(router_weights_ptr + route)
        first *= router_weight
        up *= router_weight
    if bias_ptr is not None:
        bias_ptrs = bias_ptr + expert.to(tl.int64) * P * N + offs_n
        first += tl.load(bias_ptrs, mask=mask, other=0.0).to(tl.float32)
        if P == 2:
            up += tl.load(bias_ptrs + N, mask=mask, other=0.0).to(tl.float32)
    if CLAMP and ACTIVATION != "swiglustep":
        first = tl.minimum(first, limit)
    activated = _activate(first, ACTIVATION, alpha)
    if CLAMP and ACTIVATION == "swiglustep":
        activated = tl.minimum(activated, limit)
    if CLAMP:
        up = tl.minimum(tl.maximum(up, -limit), limit)
    if P == 2:
        activated *= up + beta
    hidden = tl.where(mask, activated, 0.0).to(hidden_ptr.dtype.element_ty)
    tl.store(hidden_ptr + route * N + offs_n, hidden, mask=mask)
    if hidden_sums_ptr is not None:
        group = tl.program_id(1) * (BLOCK // GROUP_SIZE) + tl.arange(0, BLOCK // GROUP_SIZE)
        sums = tl.sum(tl.reshape(hidden.to(tl.float32), [BLOCK // GROUP_SIZE, GROUP_SIZE]), 1)
        tl.store(hidden_sums_ptr + route * (N // GROUP_SIZE) + group, sums, mask=group < N // GROUP_SIZE)


@triton.jit(do_not_specialize=["num_tokens", "num_splits"], do_not_specialize_on_alignment=UNALIGNED)
def sum_routes_kernel(
    partial_ptr,  # [num_splits, num_tokens, TOP_K, N]
    out_ptr,  # [num_tokens, N]
    topk_ids_ptr,  # [num_tokens, TOP_K]
    expert_map_ptr,  # [global experts] int32, or None
    router_weights_ptr,  # [num_tokens, TOP_K] float32
    bias_ptr,  # [E, N], or None
    num_tokens,
    num_splits,
    N,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,  # TOP_K or more
    IN_PARTS: tl.constexpr,  # whether num_splits may be more than 1
    MUL_ROUTER_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program per (token, block of features); a fixed order of float32 additions, so no run differs."""
    token = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if IN_PARTS:
        # All of them are asked for before any is waited for.
        slot = tl.arange(0, SLOTS)
        is_slot = slot < TOP_K
        ids = tl.load(topk_ids_ptr + token * TOP_K + slot, mask=is_slot, other=-1)
        experts = local_experts(ids, expert_map_ptr)
        weights = tl.load(router_weights_ptr + token * TOP_K + slot, mask=is_slot, other=0.0)
        wait_for_previous_kernel(OVERLAP)
        routes = (token * TOP_K + slot)[:, None]
        # Rows of skipped routes were not written.
        mask = (experts >= 0)[:, None] & (offs_n < N)[None, :]
        routed = tl.zeros([SLOTS, BLOCK], tl.float32)
        for first_split in range(0, num_splits, LOADS_AT_A_TIME):
            for i in tl.static_range(LOADS_AT_A_TIME):
                ptrs = partial_ptr + ((first_split + i) * num_tokens * TOP_K + routes) * N + offs_n[None, :]
                is_part = (offs_n < tl.where(first_split + i < num_splits, N, 0))[None, :]
                routed += tl.load(ptrs, mask=mask & is_part, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            bias_ptrs = bias_ptr + experts.to(tl.int64)[:, None] * N + offs_n[None, :]
            routed += tl.load(bias_ptrs, mask=mask, other=0.0).to(tl.float32)
        if MUL_ROUTER_WEIGHT:
            routed *= weights[:, None]
        out = tl.sum(routed, 0)
    else:
        # Many tokens keep the memory busy, so that no route needs threads of its own, whose sums meet in shared memory.
        wait_for_previous_kernel(OVERLAP)
        out = tl.zeros([BLOCK], tl.float32)
        for slot in tl.static_range(TOP_K):
            route = token * TOP_K + slot
            expert = local_experts(tl.load(topk_ids_ptr + route), expert_map_ptr)
            mask = offs_n < tl.where(expert >= 0, N, 0)
            routed = tl.load(partial_ptr + route * N + offs_n, mask=mask, other=0.0).to(tl.float32)
            if bias_ptr is not None:
                routed += tl.load(bias_ptr + expert.to(tl.int64) * N + offs_n, mask=mask, other=0.0).to(tl.float32)
            if MUL_ROUTER_WEIGHT:
                routed *= tl.load(router_weights_ptr + route)
            out += routed
    tl.store(out_ptr + token * N + offs_n, out.to(out_ptr.dtype.element_ty), mask=offs_n < N)
