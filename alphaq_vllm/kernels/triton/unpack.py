"""Packed words to 16-bit floats in the registers of a matrix instruction: masks and shifts within a thread.

``layout`` has the order of the words.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# The bits of two floats of 1 or 8, to which ``_pair`` adds to the exponent. An argument, not a constant of the code: of
# two constants in one operation the compiler would copy one into a register for every pair of weights.
BIASES = {torch.bfloat16: 0x3F803F80, torch.float16: 0x48004800}


@triton.jit
def _load_word(word_ptrs, WORD: tl.constexpr, NUM_BITS: tl.constexpr, COLUMNS: tl.constexpr):
    """One of the NUM_BITS words of each lane and chunk, ``[BLOCK_N, COLUMNS // 32]``; behind the last, nothing."""
    return tl.load(word_ptrs + WORD * COLUMNS) if WORD < NUM_BITS else 0


@triton.jit
def _field(words, WIDTH: tl.constexpr, FIRST: tl.constexpr, TO: tl.constexpr):
    """The WIDTH bits from bit FIRST of both halves, moved to bit TO of both halves, by turning the words."""
    MASK: tl.constexpr = (((1 << WIDTH) - 1) * 0x00010001) << TO
    TURN: tl.constexpr = (FIRST - TO) % 32
    if TURN:
        words = (words.to(tl.uint32, bitcast=True) >> TURN).to(tl.int32, bitcast=True) | (words << (32 - TURN))
    return words & MASK


@triton.jit
def _spare_bits(words, WORD: tl.constexpr, SLOT: tl.constexpr, NUM_BITS: tl.constexpr):
    """What a word's spare bits hold of a slot that has no field of its own: its part of the stream of all such bits."""
    PER_WORD: tl.constexpr = 16 // NUM_BITS
    SPARE: tl.constexpr = 16 - PER_WORD * NUM_BITS
    START: tl.constexpr = (SLOT - PER_WORD * NUM_BITS) * NUM_BITS
    LOW: tl.constexpr = START if START > WORD * SPARE else WORD * SPARE
    HIGH: tl.constexpr = START + NUM_BITS if START + NUM_BITS < (WORD + 1) * SPARE else (WORD + 1) * SPARE
    FIRST: tl.constexpr = PER_WORD * NUM_BITS + LOW - WORD * SPARE + 7 - NUM_BITS
    return _field(words, HIGH - LOW, FIRST, 7 - NUM_BITS + LOW - START) if LOW < HIGH else 0


@triton.jit
def _pair(bias, words, SLOT: tl.constexpr, NUM_BITS: tl.constexpr, LOW_BIT: tl.constexpr, MANTISSA: tl.constexpr):
    """The codes of a slot as two 16-bit floats, plus a bias, one in each half of an int32, in a few operations.

    The code is the last of the first 7 bits of the mantissa: the bias is ``2 ** NUM_BITS`` in bfloat16, 8 times that in
    float16. 8-bit codes need more bits than bfloat16 has: a half-code from bit LOW_BIT (0 or 4) yields ``2 ** LOW_BIT``
    times what a 4-bit code does, of which both are added.
    """
    PER_WORD: tl.constexpr = 16 // NUM_BITS
    EXPONENT: tl.constexpr = 4 + LOW_BIT if NUM_BITS == 8 else NUM_BITS
    pair = tl.full(words[0].shape, 0, tl.int32) | (bias + (EXPONENT << MANTISSA) * 0x00010001)
    if NUM_BITS == 8:
        pair |= _field(words[SLOT // 2], 4, SLOT % 2 * 8 + LOW_BIT + 3, 3)
    elif SLOT < PER_WORD * NUM_BITS:
        pair |= _field(words[SLOT // PER_WORD], NUM_BITS, SLOT % PER_WORD * NUM_BITS + 7 - NUM_BITS, 7 - NUM_BITS)
    else:
        # Of a chain of like operations the compiler makes a tree, which takes one instruction more.
        for i in tl.static_range(NUM_BITS):
            if i % 2:
                pair ^= _spare_bits(words[i], i, SLOT, NUM_BITS)
            else:
                pair |= _spare_bits(words[i], i, SLOT, NUM_BITS)
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
def load_words(word_ptrs, NUM_BITS: tl.constexpr, COLUMNS: tl.constexpr):
    """The words of a slab, of each lane and chunk: NUM_BITS times ``[BLOCK_N, COLUMNS // 32]``."""
    return (
        _load_word(word_ptrs, 0, NUM_BITS, COLUMNS),
        _load_word(word_ptrs, 1, NUM_BITS, COLUMNS),
        _load_word(word_ptrs, 2, NUM_BITS, COLUMNS),
        _load_word(word_ptrs, 3, NUM_BITS, COLUMNS),
        _load_word(word_ptrs, 4, NUM_BITS, COLUMNS),
        _load_word(word_ptrs, 5, NUM_BITS, COLUMNS),
        _load_word(word_ptrs, 6, NUM_BITS, COLUMNS),
        _load_word(word_ptrs, 7, NUM_BITS, COLUMNS),
    )


@triton.jit
def _half(values, WHICH: tl.constexpr):
    """The first or second half of the columns of ``[rows, columns]``."""
    first, last = tl.split(tl.permute(tl.reshape(values, [values.shape[0], 2, values.shape[1] // 2]), [0, 2, 1]))
    return last if WHICH else first


@triton.jit
def _word_of_group(words, WORD: tl.constexpr, NUM_BITS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    if WORD >= NUM_BITS or GROUPS == 1:
        return words
    else:  # noqa: RET505, for there may be no words, and then this must not be compiled
        words = _half(words, GROUP * 2 // GROUPS)
        return words if GROUPS == 2 else _half(words, GROUP % 2)


@triton.jit
def words_of_group(words, GROUP: tl.constexpr, GROUPS: tl.constexpr, NUM_BITS: tl.constexpr):
    """What one of a slab's groups of columns has of the words that ``load_words`` loaded."""
    return (
        _word_of_group(words[0], 0, NUM_BITS, GROUP, GROUPS),
        _word_of_group(words[1], 1, NUM_BITS, GROUP, GROUPS),
        _word_of_group(words[2], 2, NUM_BITS, GROUP, GROUPS),
        _word_of_group(words[3], 3, NUM_BITS, GROUP, GROUPS),
        _word_of_group(words[4], 4, NUM_BITS, GROUP, GROUPS),
        _word_of_group(words[5], 5, NUM_BITS, GROUP, GROUPS),
        _word_of_group(words[6], 6, NUM_BITS, GROUP, GROUPS),
        _word_of_group(words[7], 7, NUM_BITS, GROUP, GROUPS),
    )


@triton.jit
def biased_codes(bias, words, HALF: tl.constexpr, NUM_BITS: tl.constexpr, LOW_BIT: tl.constexpr, dtype: tl.constexpr):
    """The codes of half the rows as pairs of floats, ``[BLOCK_N, chunks, 2, 2, 2]`` int32: see ``_pair``.

    Behind lane and chunk: ``r % 2``, ``s // 2`` and ``s % 2`` of the slot. Rows are r // 2 = HALF of each lane's.
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
    return tl.join(even, odd)


@triton.jit
def halves(pairs, dtype: tl.constexpr):
    """Both 16-bit floats of each pair, behind all other dimensions."""
    low = (pairs & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True)
    high = (pairs >> 16).to(tl.uint16).to(dtype, bitcast=True)
    return tl.join(low, high)


@triton.jit
def first_operand(values, QUADS: tl.constexpr):
    """Values as ``halves`` has them, in the order of rows and columns: ``[BLOCK_N // 2, 32 * chunks]``.

    Every 16 rows of the result are the first (HALF = 0) or last (HALF = 1) rows of a stripe: the matrix unit wants them
    in the registers of one warp, which is where they come from.
    """
    BLOCK_N: tl.constexpr = values.shape[0]
    CHUNKS: tl.constexpr = values.shape[1]
    # stripe, t // 4, t % 4, c, r % 2, s // 2, s % 2, h
    values = tl.reshape(values, [BLOCK_N // 32, 8, 4, CHUNKS, 2, 2, 2, 2])
    values = tl.permute(values, [0, 4, 1, 3, 5, 2, 6, 7] if QUADS else [0, 4, 1, 3, 5, 6, 2, 7])
    return tl.reshape(values, [BLOCK_N // 2, CHUNKS * 32])


@triton.jit
def row_values(grids, HALF: tl.constexpr, NUM_BITS: tl.constexpr, QUADS: tl.constexpr, dtype: tl.constexpr):
    """What the grids of half the rows say: ``[BLOCK_N // 4, groups, 2]`` float32, steps, and zero points plus the bias.

    grids: ``[BLOCK_N // 4, groups]`` int32, of four rows each. The bias is that of codes: see ``_pair``.
    """
    ONE: tl.constexpr = 1 if dtype == tl.bfloat16 else 8
    BIAS: tl.constexpr = ONE * (272 if NUM_BITS == 8 else 2**NUM_BITS)
    PART: tl.constexpr = 2.0 ** (NUM_BITS - 5)
    step = _numbers(grids, 8 * HALF, 1.0, 1.0, QUADS)
    return step, _numbers(grids, 8 * HALF + 4, PART, 6 * PART + BIAS, QUADS)


@triton.jit
def _numbers(grids, FIRST: tl.constexpr, FACTOR: tl.constexpr, SUMMAND: tl.constexpr, QUADS: tl.constexpr):
    """FACTOR times the 4 bits from bit FIRST of both halves, plus SUMMAND: ``[BLOCK_N // 4, groups, 2]`` float32."""
    # As a float16 so small that it has no exponent, 4 bits are whatever place they have.
    TO: tl.constexpr = FIRST % 8
    half = (16 * tl.arange(0, 2))[None, None, :]
    # If a lane has both rows, one mask does for both. On generation 10 it has one: there one shift does for all masks.
    if QUADS:
        numbers = _field(grids, 4, FIRST, TO)[:, :, None] >> half
    else:
        numbers = (grids[:, :, None] >> half) >> FIRST - TO & 15 << TO
    numbers = numbers.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    UNIT: tl.constexpr = 2.0 ** (24 - TO) * FACTOR
    return (numbers + SUMMAND / UNIT) * UNIT


@triton.jit
def dequantize(
    bias, words, step, offset, HALF: tl.constexpr, NUM_BITS: tl.constexpr, dtype: tl.constexpr, PTX: tl.constexpr
):
    """The weights ``step * (biased code - offset)`` of half the rows, as ``halves`` has them, rounded once to dtype.

    step, offset: as ``row_values`` has them. Both are numbers of dtype, and so is a code less the zero point.
    """
    pairs = biased_codes(bias, words, HALF, NUM_BITS, 0, dtype)
    high = biased_codes(bias, words, HALF, NUM_BITS, 4, dtype) if NUM_BITS == 8 else pairs
    if PTX:
        codes = _add_pairs(high, _of_rows(_twice(-offset, dtype), pairs), dtype)
        if NUM_BITS == 8:
            codes = _add_pairs(pairs, codes, dtype)
        zeros = tl.full(pairs.shape, 0, tl.int32)
        return halves(_fma_pairs(codes, _of_rows(_twice(step, dtype), pairs), zeros, dtype), dtype)
    codes = halves(high, dtype).to(tl.float32) - tl.expand_dims(_of_rows(offset, pairs), 5)
    if NUM_BITS == 8:
        codes += halves(pairs, dtype).to(tl.float32)
    return (codes * tl.expand_dims(_of_rows(step, pairs), 5)).to(dtype)


@triton.jit
def _twice(values, dtype: tl.constexpr):
    """Two times the same 16-bit float, of one of 32 bits, as int32."""
    KIND: tl.constexpr = "bf16x2" if dtype == tl.bfloat16 else "f16x2"
    return tl.inline_asm_elementwise(
        "cvt.rn." + KIND + ".f32 $0, $1, $1;", "=r,f", [values], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _of_rows(values, pairs):
    """One value of each row and group, ``[BLOCK_N // 4, groups, 2]``, for all pairs of the row in the group."""
    LANES: tl.constexpr = values.shape[0]
    GROUPS: tl.constexpr = values.shape[1]
    values = tl.reshape(values, [LANES, 1, GROUPS, 1, 2, 1, 1])
    values = tl.broadcast_to(values, [LANES, 4, GROUPS, pairs.shape[1] // GROUPS, 2, 2, 2])
    return tl.reshape(values, pairs.shape)


@triton.jit
def _fma_pairs(a, b, c, dtype: tl.constexpr):
    """``a * b + c`` of both 16-bit floats at once, rounded once. Left to itself, the compiler also exchanges them."""
    KIND: tl.constexpr = "bf16x2" if dtype == tl.bfloat16 else "f16x2"
    return tl.inline_asm_elementwise(
        "fma.rn." + KIND + " $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _add_pairs(a, b, dtype: tl.constexpr):
    ONES: tl.constexpr = 0x3F803F80 if dtype == tl.bfloat16 else 0x3C003C00
    return _fma_pairs(a, tl.full(a.shape, ONES, tl.int32), b, dtype)
