"""The grouped matrix product of the GPU path: one matrix of packed weights per expert times its routes' activations.

Of one group of columns, with codes q, scale s and zero point z of a row, a product is

    sum_k s * (q_k - z) * x_k  =  s * (sum_k q_k * x_k  -  z * sum_k x_k)

so codes go to the matrix unit as they are, and scale and zero point meet the float32 accumulator. Weights are the
first operand (``out.T = W @ x.T``): their rows fill the wide side of a matrix instruction, the few tokens of an expert
the narrow one. ``layout`` has the order of the words: in it, unpacking is masks and shifts within a thread.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from alphaq_vllm.kernels.launches import wait_for_previous_kernel

# Generations of NVIDIA GPUs whose matrix instructions (mma.sync) take both operands from registers.
QUADS_GENERATIONS = (8, 12)

# The bits of two floats of 128. An argument, not a constant of the code: of two constants in one operation the compiler
# would copy one into a register for every pair of weights.
BIASES = {torch.bfloat16: 0x43004300, torch.float16: 0x58005800}


@triton.jit
def _load_word(word_ptrs, WORD: tl.constexpr, NUM_BITS: tl.constexpr, GROUP_SIZE: tl.constexpr):
    """One of the NUM_BITS words of each lane and chunk, ``[BLOCK_N, GROUP_SIZE // 32]``; behind the last, nothing."""
    return tl.load(word_ptrs + WORD * GROUP_SIZE) if WORD < NUM_BITS else 0


@triton.jit
def _field(words, WIDTH: tl.constexpr, FIRST: tl.constexpr, TO: tl.constexpr):
    """The WIDTH bits from bit FIRST of both halves, moved to bit TO of both halves."""
    MASK: tl.constexpr = (((1 << WIDTH) - 1) * 0x00010001) << TO
    return ((words >> (FIRST - TO)) if FIRST > TO else (words << (TO - FIRST))) & MASK


@triton.jit
def _spare_bits(words, WORD: tl.constexpr, SLOT: tl.constexpr, NUM_BITS: tl.constexpr, TO: tl.constexpr):
    """What a word's spare bits hold of a slot that has no field of its own: its part of the stream of all such bits."""
    PER_WORD: tl.constexpr = 16 // NUM_BITS
    SPARE: tl.constexpr = 16 - PER_WORD * NUM_BITS
    START: tl.constexpr = (SLOT - PER_WORD * NUM_BITS) * NUM_BITS
    LOW: tl.constexpr = START if START > WORD * SPARE else WORD * SPARE
    HIGH: tl.constexpr = START + NUM_BITS if START + NUM_BITS < (WORD + 1) * SPARE else (WORD + 1) * SPARE
    FIRST: tl.constexpr = PER_WORD * NUM_BITS + LOW - WORD * SPARE
    return _field(words, HIGH - LOW, FIRST, TO + LOW - START) if LOW < HIGH else 0


@triton.jit
def _pair(bias, words, SLOT: tl.constexpr, NUM_BITS: tl.constexpr, LOW_BIT: tl.constexpr, MANTISSA: tl.constexpr):
    """The codes of a slot as two 16-bit floats ``128 + code``, one in each half of an int32, in a few operations.

    bias: two floats of 128, whose last 7 bits of the mantissa count ones. 8-bit codes need more bits than bfloat16 has:
    a half-code from bit LOW_BIT (0 or 4) yields ``2 ** LOW_BIT * (128 + half-code)``.
    """
    PER_WORD: tl.constexpr = 16 // NUM_BITS
    ONES: tl.constexpr = MANTISSA - 7
    pair = tl.full(words[0].shape, 0, tl.int32) | (bias + (LOW_BIT << MANTISSA) * 0x00010001)
    if NUM_BITS == 8:
        pair |= _field(words[SLOT // 2], 4, SLOT % 2 * 8 + LOW_BIT, ONES)
    elif SLOT < PER_WORD * NUM_BITS:
        pair |= _field(words[SLOT // PER_WORD], NUM_BITS, SLOT % PER_WORD * NUM_BITS, ONES)
    else:
        for i in tl.static_range(NUM_BITS):
            pair |= _spare_bits(words[i], i, SLOT, NUM_BITS, ONES)
    return pair


@triton.jit
def _two_rows(
    bias,
    words,
    S: tl.constexpr,
    HALF: tl.constexpr,
    NUM_BITS: tl.constexpr,
    LOW_BIT: tl.constexpr,
    MANTISSA: tl.constexpr,
):
    return tl.join(
        _pair(bias, words, 4 * S + 2 * HALF, NUM_BITS, LOW_BIT, MANTISSA),
        _pair(bias, words, 4 * S + 2 * HALF + 1, NUM_BITS, LOW_BIT, MANTISSA),
    )


@triton.jit
def _codes(
    bias,
    words,
    HALF: tl.constexpr,
    NUM_BITS: tl.constexpr,
    LOW_BIT: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    QUADS: tl.constexpr,
    dtype: tl.constexpr,
):
    """The biased codes of one group and half the rows, ``[BLOCK_N // 2, GROUP_SIZE]``, columns as in ``_columns``.

    Every 16 rows of the result are the first (HALF = 0) or last (HALF = 1) rows of a stripe: the matrix unit wants them
    in the registers of one warp, which is where they come from.
    """
    MANTISSA: tl.constexpr = 7 if dtype == tl.bfloat16 else 10
    even = tl.join(
        _two_rows(bias, words, 0, HALF, NUM_BITS, LOW_BIT, MANTISSA),
        _two_rows(bias, words, 2, HALF, NUM_BITS, LOW_BIT, MANTISSA),
    )
    odd = tl.join(
        _two_rows(bias, words, 1, HALF, NUM_BITS, LOW_BIT, MANTISSA),
        _two_rows(bias, words, 3, HALF, NUM_BITS, LOW_BIT, MANTISSA),
    )
    pairs = tl.join(even, odd)
    low = (pairs & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True)
    high = (pairs >> 16).to(tl.uint16).to(dtype, bitcast=True)
    # stripe, t // 4, t % 4, c, r % 2, s // 2, s % 2, h
    codes = tl.reshape(tl.join(low, high), [words[0].shape[0] // 32, 8, 4, GROUP_SIZE // 32, 2, 2, 2, 2])
    codes = tl.permute(codes, [0, 4, 1, 3, 5, 2, 6, 7] if QUADS else [0, 4, 1, 3, 5, 6, 2, 7])
    return tl.reshape(codes, [words[0].shape[0] // 2, GROUP_SIZE])


@triton.jit
def _columns(GROUP_SIZE: tl.constexpr, QUADS: tl.constexpr):
    """Which column of a group each column of a tile is: itself, or in fours as a lane holds them (QUADS).

    Where operands of a matrix instruction come from registers, Triton deals each lane four neighbours at a time
    instead of two if they were joined from halves of words.
    """
    i = tl.arange(0, GROUP_SIZE)
    return i // 16 * 16 + i // 2 % 2 * 8 + i // 4 % 4 * 2 + i % 2 if QUADS else i


@triton.jit
def _row_values(value_ptrs, BLOCK_M: tl.constexpr):
    """One value of each row, for both halves of the rows: two times ``[BLOCK_N // 2, BLOCK_M]`` float32.

    value_ptrs: ``[BLOCK_N, 4]``: what the four rows of each lane need, so that no value changes threads.
    """
    values = tl.load(value_ptrs).to(tl.float32)
    BLOCK_N: tl.constexpr = values.shape[0]
    first, last = tl.split(tl.permute(tl.reshape(values, [BLOCK_N, 2, 2]), [0, 2, 1]))
    return _spread(first, BLOCK_M), _spread(last, BLOCK_M)


@triton.jit
def _spread(values, BLOCK_M: tl.constexpr):
    """``[BLOCK_N, 2]`` over the columns that a lane holds of an accumulator: ``[BLOCK_N // 2, BLOCK_M]``."""
    STRIPES: tl.constexpr = values.shape[0] // 32
    # stripe, t // 4, t % 4, r % 2, and the lane's columns
    values = tl.broadcast_to(tl.reshape(values, [STRIPES, 8, 4, 2, 1, 1]), [STRIPES, 8, 4, 2, BLOCK_M // 8, 2])
    return tl.reshape(tl.permute(values, [0, 3, 1, 4, 2, 5]), [STRIPES * 16, BLOCK_M])


@triton.jit
def _accumulate(
    bias,
    acc,
    words,
    x,
    x_sum,
    scale,
    zero_point,
    HALF: tl.constexpr,
    NUM_BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    QUADS: tl.constexpr,
):
    BIAS: tl.constexpr = 128.0 * 17 if NUM_BITS == 8 else 128.0
    product = tl.dot(_codes(bias, words, HALF, NUM_BITS, 0, GROUP_SIZE, QUADS, x.dtype), x)
    if NUM_BITS == 8:
        product = tl.dot(_codes(bias, words, HALF, NUM_BITS, 4, GROUP_SIZE, QUADS, x.dtype), x, product)
    return acc + scale * (product - (zero_point + BIAS) * x_sum[None, :])


@triton.jit
def _project(
    bias,
    x_ptrs,
    x_mask,
    x_sums_ptr,
    x_sum_offsets,
    word_ptrs,
    scale_ptrs,
    zero_point_ptrs,
    first_group,
    end_group,
    NUM_BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    QUADS: tl.constexpr,
):
    """``W @ x.T`` over some groups of columns, for rows of one width: two ``[BLOCK_N // 2, BLOCK_M]`` float32."""
    BLOCK_N: tl.constexpr = word_ptrs.shape[0]
    BLOCK_M: tl.constexpr = x_ptrs.shape[1]
    first = tl.zeros([BLOCK_N // 2, BLOCK_M], tl.float32)
    last = tl.zeros([BLOCK_N // 2, BLOCK_M], tl.float32)
    for group in range(first_group, end_group):
        x = tl.load(x_ptrs + group * GROUP_SIZE, mask=x_mask, other=0.0)
        x_sum = tl.load(x_sums_ptr + (x_sum_offsets + group))
        ptrs = word_ptrs + group * (NUM_BITS * GROUP_SIZE)
        words = (
            _load_word(ptrs, 0, NUM_BITS, GROUP_SIZE),
            _load_word(ptrs, 1, NUM_BITS, GROUP_SIZE),
            _load_word(ptrs, 2, NUM_BITS, GROUP_SIZE),
            _load_word(ptrs, 3, NUM_BITS, GROUP_SIZE),
            _load_word(ptrs, 4, NUM_BITS, GROUP_SIZE),
            _load_word(ptrs, 5, NUM_BITS, GROUP_SIZE),
            _load_word(ptrs, 6, NUM_BITS, GROUP_SIZE),
            _load_word(ptrs, 7, NUM_BITS, GROUP_SIZE),
        )
        first_scale, last_scale = _row_values(scale_ptrs + group * 32, BLOCK_M)
        first_zero, last_zero = _row_values(zero_point_ptrs + group * 32, BLOCK_M)
        first = _accumulate(bias, first, words, x, x_sum, first_scale, first_zero, 0, NUM_BITS, GROUP_SIZE, QUADS)
        last = _accumulate(bias, last, words, x, x_sum, last_scale, last_zero, 1, NUM_BITS, GROUP_SIZE, QUADS)
    return first, last


@triton.jit(do_not_specialize=["num_routes", "num_splits", "routes_per_row", "bias"])
def moe_gemm_kernel(
    x_ptr,  # [rows, K] bfloat16 or float16; route r takes row r // routes_per_row
    x_sums_ptr,  # [rows, K / GROUP_SIZE] float32: of each group of x
    out_ptr,  # [num_splits, num_routes, P, N] float32 or x's dtype; rows of skipped routes are not written
    packed_ptr,  # [words] int32, tiled
    scales_ptr,  # [E, P, N, K / GROUP_SIZE] bfloat16, tiled
    zero_points_ptr,  # [E, P, N, K / GROUP_SIZE] float16, tiled
    num_bits_ptr,  # [E, P] int32
    offsets_ptr,  # [E, P] int64
    expert_ids_ptr,  # [num_blocks] int32, -1: no block
    route_ids_ptr,  # [num_blocks, BLOCK_M] int32, -1: padding
    num_routes,
    N,
    K,
    num_splits,
    routes_per_row,
    bias,  # the bits of two floats of 128: see BIASES
    P: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    WIDTHS: tl.constexpr,  # tuple of the widths that occur in num_bits, and maybe others
    QUADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # 32 rows for each warp
    OVERLAP: tl.constexpr,
):
    """One program per (block of routes, part of the columns, matrix, block of rows), the last one fastest."""
    wait_for_previous_kernel(OVERLAP)
    num_blocks_n = tl.cdiv(N, BLOCK_N)
    block_n = tl.program_id(0) % num_blocks_n
    projection = tl.program_id(0) // num_blocks_n % P
    split = tl.program_id(0) // (num_blocks_n * P) % num_splits
    block_m = tl.program_id(0) // (num_blocks_n * P * num_splits)
    expert = tl.load(expert_ids_ptr + block_m)
    if expert < 0:
        return
    routes = tl.load(route_ids_ptr + block_m * BLOCK_M + tl.arange(0, BLOCK_M))
    is_route = routes >= 0
    rows = tl.maximum(routes, 0) // routes_per_row
    x_ptrs = x_ptr + rows.to(tl.int64)[None, :] * K + _columns(GROUP_SIZE, QUADS)[:, None]
    num_groups = K // GROUP_SIZE

    matrix = expert * P + projection
    num_bits = tl.load(num_bits_ptr + matrix)
    thread = tl.arange(0, BLOCK_N)
    # Stripes behind the last one repeat it: they need no mask until they are stored.
    stripe = tl.minimum(block_n * (BLOCK_N // 32) + thread // 32, N // 32 - 1)
    chunk = tl.arange(0, GROUP_SIZE // 32)
    offset = tl.load(offsets_ptr + matrix)
    # Unchanged, for no offset is that large, but no longer known to be an argument: LOP3 does not take one beside a
    # mask, and would be two instructions on generation 8.
    bias += (offset >> 62).to(tl.int32)
    word_ptrs = packed_ptr + tl.multiple_of(offset, 4)
    word_ptrs = word_ptrs + (thread % 32 * (GROUP_SIZE // 32))[:, None] + chunk[None, :]
    row_values = (matrix.to(tl.int64) * N + stripe * 32) * num_groups + thread % 32 // 4 * 4
    row_values = row_values[:, None] + tl.arange(0, 4)[None, :]
    first_group = num_groups * split // num_splits
    end_group = num_groups * (split + 1) // num_splits

    first = tl.zeros([BLOCK_N // 2, BLOCK_M], tl.float32)
    last = tl.zeros([BLOCK_N // 2, BLOCK_M], tl.float32)
    for i in tl.static_range(len(WIDTHS)):
        if num_bits == WIDTHS[i]:
            first, last = _project(
                bias,
                x_ptrs,
                is_route[None, :],
                x_sums_ptr,
                rows * num_groups,
                word_ptrs + (stripe * K * WIDTHS[i])[:, None],
                scales_ptr + row_values,
                zero_points_ptr + row_values,
                first_group,
                end_group,
                WIDTHS[i],
                GROUP_SIZE,
                QUADS,
            )
    row = (split * num_routes + tl.maximum(routes, 0)).to(tl.int64) * P + projection
    i = tl.arange(0, BLOCK_N // 2)
    offs_n = block_n * BLOCK_N + i // 16 * 32 + i % 16
    out_ptrs = out_ptr + row[None, :] * N + offs_n[:, None]
    mask = is_route[None, :] & (offs_n < N)[:, None]
    tl.store(out_ptrs, first.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptrs + 16, last.to(out_ptr.dtype.element_ty), mask=mask)
