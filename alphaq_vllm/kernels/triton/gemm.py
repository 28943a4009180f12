"""The grouped matrix product of the GPU path: one matrix of packed weights per expert times its routes' activations.

Weights are the first operand (``out.T = W @ x.T``): their rows fill the wide side of a matrix instruction, the few
tokens of an expert the narrow one. Of one group of columns, with codes q, step s and zero point z of a row, a product
is

    sum_k s * (q_k - z) * x_k  =  s * (sum_k q_k * x_k  -  z * sum_k x_k)

For few routes codes go to the matrix unit as they are, whose sum starts from the zero points' part, and steps meet the
float32 result: there are fewer of these than weights. For many routes weights get their steps before the product, and
are rounded to 16 bits; then one sum runs over all groups, beside which the next weights are unpacked. The scale of each
row meets the sum over all groups. A turn of the loop takes a slab of columns, one group or several, so that loads are
wide and what a turn itself costs is little.
"""

from __future__ import annotations

import triton
import triton.language as tl

from alphaq_vllm.kernels.triton.launches import wait_for_previous_kernel
from alphaq_vllm.kernels.triton.unpack import (
    biased_codes,
    dequantize,
    first_operand,
    halves,
    load_words,
    row_values,
    words_of_group,
)


@triton.jit
def _spread(values, BLOCK_M: tl.constexpr):
    """``[BLOCK_N // 4, 1, 2]`` over the columns of an accumulator: ``[BLOCK_N // 2, BLOCK_M]``."""
    STRIPES: tl.constexpr = values.shape[0] // 8
    # stripe, t // 4, t % 4, r % 2, and the lane's columns
    values = tl.broadcast_to(tl.reshape(values, [STRIPES, 8, 1, 2, 1, 1]), [STRIPES, 8, 4, 2, BLOCK_M // 8, 2])
    return tl.reshape(tl.permute(values, [0, 3, 1, 4, 2, 5]), [STRIPES * 16, BLOCK_M])


@triton.jit
def _add_codes(acc, bias, words, grids, x, x_sum, HALF: tl.constexpr, NUM_BITS: tl.constexpr, QUADS: tl.constexpr):
    """Add what one group of columns has, by products of codes that steps meet behind."""
    step, offset = row_values(grids, HALF, NUM_BITS, QUADS, x.dtype)
    product = -_spread(offset, x.shape[1]) * x_sum[None, :]
    codes = halves(biased_codes(bias, words, HALF, NUM_BITS, 0, x.dtype), x.dtype)
    product = tl.dot(first_operand(codes, QUADS), x, product)
    if NUM_BITS == 8:
        codes = halves(biased_codes(bias, words, HALF, NUM_BITS, 4, x.dtype), x.dtype)
        product = tl.dot(first_operand(codes, QUADS), x, product)
    return acc + _spread(step, x.shape[1]) * product


@triton.jit
def _add_weights(
    acc, bias, words, grids, x, HALF: tl.constexpr, NUM_BITS: tl.constexpr, QUADS: tl.constexpr, PTX: tl.constexpr
):
    """Add what a slab has, by products of weights."""
    step, offset = row_values(grids, HALF, NUM_BITS, QUADS, x.dtype)
    weights = dequantize(bias, words, step, offset, HALF, NUM_BITS, x.dtype, PTX)
    return tl.dot(first_operand(weights, QUADS), x, acc)


@triton.jit
def _opaque(number, PTX: tl.constexpr):
    """The same int32, but the compiler does not see that: of a loop's counter it would make a counter for each load."""
    if PTX:
        number = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [number], dtype=tl.int32, is_pure=True, pack=1)
    return number


@triton.jit
def _project(
    bias,
    x_ptr,
    x_offsets,
    x_mask,
    x_sum_ptrs,
    word_ptrs,
    grid_ptrs,
    first_slab,
    end_slab,
    NUM_BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    QUADS: tl.constexpr,
    SCALE_WEIGHTS: tl.constexpr,
    PTX: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """``W @ x.T`` over some slabs of columns, for rows of one width: two ``[BLOCK_N // 2, BLOCK_M]`` float32."""
    BLOCK_N: tl.constexpr = word_ptrs.shape[0]
    BLOCK_M: tl.constexpr = x_offsets.shape[1]
    GROUPS: tl.constexpr = COLUMNS // GROUP_SIZE
    first = tl.zeros([BLOCK_N // 2, BLOCK_M], tl.float32)
    last = tl.zeros([BLOCK_N // 2, BLOCK_M], tl.float32)
    x_ptrs = x_ptr + x_offsets.to(tl.int64)
    # As an option of the loop, unlike the kernel's own, it holds for loads that do not lead to a product as well: those
    # of grids and sums would otherwise be waited for in every turn.
    for slab in tl.range(first_slab, end_slab, num_stages=NUM_STAGES):
        slab = _opaque(slab, PTX)
        slab_64 = tl.cast(slab, tl.int64)
        words = load_words(word_ptrs + slab_64 * (NUM_BITS * COLUMNS), NUM_BITS, COLUMNS)
        if SCALE_WEIGHTS:
            # Offsets take half the registers of pointers, and padding, which is rare here, is the first row.
            x = tl.load(x_ptr + (x_offsets + slab * COLUMNS))
            grids = tl.load(grid_ptrs[:, None] + (slab_64 * (8 * GROUPS) + 8 * tl.arange(0, GROUPS)[None, :]))
            first = _add_weights(first, bias, words, grids, x, 0, NUM_BITS, QUADS, PTX)
            last = _add_weights(last, bias, words, grids, x, 1, NUM_BITS, QUADS, PTX)
        else:
            for i in tl.static_range(GROUPS):
                grids = tl.load(grid_ptrs + (slab_64 * (8 * GROUPS) + 8 * i))[:, None]
                x_sum = tl.load(x_sum_ptrs + (slab_64 * GROUPS + i))
                x = tl.load(x_ptrs + (slab * COLUMNS + i * GROUP_SIZE), mask=x_mask, other=0.0)
                of_group = words_of_group(words, i, GROUPS, NUM_BITS)
                first = _add_codes(first, bias, of_group, grids, x, x_sum, 0, NUM_BITS, QUADS)
                last = _add_codes(last, bias, of_group, grids, x, x_sum, 1, NUM_BITS, QUADS)
    return first, last


@triton.jit
def _prefetch(ptrs, num_steps, STEP: tl.constexpr):
    """Bring what is at ``ptrs``, and num_steps - 1 times STEP elements further on, into the L2 cache."""
    for i in range(num_steps):
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [(ptrs + i * STEP).to(tl.int64)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _place(BLOCKS_TOGETHER: tl.constexpr):
    """A program's place in the grid, along which programs start: some blocks of routes first, then the first axis."""
    x = tl.program_id(0)
    y = tl.program_id(1)
    z = tl.program_id(2)
    if BLOCKS_TOGETHER > 1:
        first = z // BLOCKS_TOGETHER * BLOCKS_TOGETHER
        together = tl.minimum(tl.num_programs(2) - first, BLOCKS_TOGETHER)
        place = ((z - first) * tl.num_programs(1) + y) * tl.num_programs(0) + x
        z = first + place % together
        x = place // together % tl.num_programs(0)
        y = place // together // tl.num_programs(0)
    return x, y, z


@triton.jit(do_not_specialize=["num_routes", "slabs_per_split", "bias"])
def moe_gemm_kernel(
    x_ptr,  # [rows, K] bfloat16 or float16; route r takes row r // ROUTES_PER_ROW
    x_sums_ptr,  # [rows, K / GROUP_SIZE] float32: of each group of x; None if SCALE_WEIGHTS
    out_ptr,  # [num_splits, num_routes, P, N] float32 or x's dtype; rows of skipped routes are not written
    packed_ptr,  # [words] int32, tiled
    scales_ptr,  # [E, P, N] bfloat16
    grids_ptr,  # [E, P, N, K / GROUP_SIZE] uint8, tiled
    num_bits_ptr,  # [E, P] int32
    offsets_ptr,  # [E, P] int64
    expert_ids_ptr,  # [num_blocks] int32, -1: no block
    route_ids_ptr,  # [num_blocks, BLOCK_M] int32, -1: padding
    num_routes,
    N,
    K,
    slabs_per_split,
    bias,  # the bits of two floats of 128: see BIASES
    ROUTES_PER_ROW: tl.constexpr,
    P: tl.constexpr,
    IS_DOWN: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,  # of a slab: one group or several
    WIDTHS: tl.constexpr,  # tuple of the widths that occur in num_bits, and maybe others
    QUADS: tl.constexpr,  # whether the words are in the order of quads
    SCALE_WEIGHTS: tl.constexpr,  # steps before the product, not after it: for many routes
    PTX: tl.constexpr,  # whether the code may contain PTX
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # 32 rows for each warp
    NUM_STAGES: tl.constexpr,  # groups of columns that are multiplied or on their way
    BLOCKS_TOGETHER: tl.constexpr,  # blocks of routes that take the same weights after one another
    OVERLAP: tl.constexpr,
):
    """One program per (block of rows, part of the columns and matrix, block of routes)."""
    # Before gate and up, the kernel ahead makes the blocks of routes; before down, it makes x.
    if not IS_DOWN:
        wait_for_previous_kernel(OVERLAP)
    block_n, part, block_m = _place(BLOCKS_TOGETHER)
    projection = part % P
    split = part // P
    expert = tl.load(expert_ids_ptr + block_m)
    if expert < 0:
        if IS_DOWN:
            wait_for_previous_kernel(OVERLAP)
        return
    routes = tl.load(route_ids_ptr + block_m * BLOCK_M + tl.arange(0, BLOCK_M))
    is_route = routes >= 0
    rows = tl.maximum(routes, 0) // ROUTES_PER_ROW
    x_offsets = (rows * K)[None, :] + tl.arange(0, COLUMNS if SCALE_WEIGHTS else GROUP_SIZE)[:, None]
    num_groups = K // GROUP_SIZE

    matrix = expert * P + projection
    num_bits = tl.load(num_bits_ptr + matrix)
    thread = tl.arange(0, BLOCK_N)
    # Stripes behind the last one repeat it: they need no mask until they are stored.
    stripe = tl.minimum(block_n * (BLOCK_N // 32) + thread // 32, N // 32 - 1)
    offset = tl.load(offsets_ptr + matrix)
    # Unchanged, for no offset is that large, but no longer known to be an argument: LOP3 does not take one beside a
    # mask, and would be two instructions on generation 8.
    bias += (offset >> 62).to(tl.int32)
    word_ptrs = packed_ptr + tl.multiple_of(offset, 4) + thread % 32 * (COLUMNS // 32)
    # The grids of four rows are one int32.
    four = tl.arange(0, BLOCK_N // 4)
    first_four = matrix.to(tl.int64) * (N // 4) + tl.minimum(block_n * (BLOCK_N // 32) + four // 8, N // 32 - 1) * 8
    grid_ptrs = grids_ptr.to(tl.pointer_type(tl.int32)) + first_four * num_groups + four % 8
    first_slab = split * slabs_per_split
    end_slab = tl.minimum(first_slab + slabs_per_split, K // COLUMNS)
    if IS_DOWN:
        if OVERLAP and PTX:
            GRIDS: tl.constexpr = 8 * (COLUMNS // GROUP_SIZE)
            num_ahead = tl.minimum(end_slab - first_slab, NUM_STAGES - 1)
            _prefetch(grid_ptrs + first_slab * GRIDS, num_ahead, GRIDS)
            first_word = (stripe * K + first_slab * COLUMNS) * num_bits
            _prefetch(word_ptrs + first_word, num_ahead * num_bits, COLUMNS)
        wait_for_previous_kernel(OVERLAP)
    word_ptrs = word_ptrs[:, None] + tl.arange(0, COLUMNS // 32)[None, :]

    first = tl.zeros([BLOCK_N // 2, BLOCK_M], tl.float32)
    last = tl.zeros([BLOCK_N // 2, BLOCK_M], tl.float32)
    for i in tl.static_range(len(WIDTHS)):
        if num_bits == WIDTHS[i]:
            first, last = _project(
                bias,
                x_ptr,
                x_offsets,
                is_route[None, :],
                None if SCALE_WEIGHTS else x_sums_ptr + rows * num_groups,
                word_ptrs + (stripe * K * WIDTHS[i])[:, None],
                grid_ptrs,
                first_slab,
                end_slab,
                WIDTHS[i],
                GROUP_SIZE,
                COLUMNS,
                QUADS,
                SCALE_WEIGHTS,
                PTX,
                NUM_STAGES,
            )
    if SCALE_WEIGHTS:
        # Loaded again, and not by the compiler's leave kept in registers, of which none are left.
        routes = tl.load(route_ids_ptr + (block_m * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]), volatile=True)
    else:
        routes = routes[None, :]
    row = (split * num_routes + tl.maximum(routes, 0)).to(tl.int64) * P + projection
    i = tl.arange(0, BLOCK_N // 2)[:, None]
    offs_n = block_n * BLOCK_N + i // 16 * 32 + i % 16
    out_ptrs = out_ptr + row * N + offs_n
    is_row = offs_n < N
    mask = (routes >= 0) & is_row
    # Only now, and not by the compiler's leave before the loop, for registers.
    expert = tl.load(expert_ids_ptr + block_m, volatile=True)
    scale_ptrs = scales_ptr + (expert * P + projection).to(tl.int64) * N + offs_n
    first *= tl.load(scale_ptrs, mask=is_row, other=0.0, volatile=True).to(tl.float32)
    last *= tl.load(scale_ptrs + 16, mask=is_row, other=0.0, volatile=True).to(tl.float32)
    tl.store(out_ptrs, first.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptrs + 16, last.to(out_ptr.dtype.element_ty), mask=mask)
