"""Packed words to 16-bit floats in the registers of a matrix instruction: masks and shifts within a thread.

``layout`` has the order of the words.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

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
def load_words(word_ptrs, NUM_BITS: tl.constexpr, GROUP_SIZE: tl.constexpr):
    """The words of one group of columns, of each lane and chunk: NUM_BITS times ``[BLOCK_N, GROUP_SIZE // 32]``."""
    return (
        _load_word(word_ptrs, 0, NUM_BITS, GROUP_SIZE),
        _load_word(word_ptrs, 1, NUM_BITS, GROUP_SIZE),
        _load_word(word_ptrs, 2, NUM_BITS, GROUP_SIZE),
        _load_word(word_ptrs, 3, NUM_BITS, GROUP_SIZE),
        _load_word(word_ptrs, 4, NUM_BITS, GROUP_SIZE),
        _load_word(word_ptrs, 5, NUM_BITS, GROUP_SIZE),
        _load_word(word_ptrs, 6, NUM_BITS, GROUP_SIZE),
        _load_word(word_ptrs, 7, NUM_BITS, GROUP_SIZE),
    )


@triton.jit
def biased_codes(
    bias, words, HALF: tl.constexpr, NUM_BITS: tl.constexpr, LOW_BIT: tl.constexpr, MANTISSA: tl.constexpr
):
    """The codes of half the rows as pairs of floats, ``[BLOCK_N, GROUP_SIZE // 32, 2, 2, 2]`` int32: see ``_pair``.

    Behind lane and chunk: ``r % 2``, ``s // 2`` and ``s % 2`` of the slot. Rows are r // 2 = HALF of each lane's.
    """
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
    """Values as ``halves`` has them, in the order of rows and columns: ``[BLOCK_N // 2, GROUP_SIZE]``.

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
def dequantize(
    bias, words, scale, zero_point, HALF: tl.constexpr, NUM_BITS: tl.constexpr, dtype: tl.constexpr, PTX: tl.constexpr
):
    """The weights ``scale * (code - zero_point)`` of half the rows, as ``halves`` has them, rounded to dtype.

    scale, zero_point: ``[BLOCK_N, 2]`` float32, of a lane's rows in this half.
    """
    MANTISSA: tl.constexpr = 7 if dtype == tl.bfloat16 else 10
    MINUS_2048: tl.constexpr = -0x3AFF3B00 if dtype == tl.bfloat16 else -0x17FF1800
    pairs = biased_codes(bias, words, HALF, NUM_BITS, 0, MANTISSA)
    if PTX:
        # Rounded to dtype, 128 and the zero point are about a whole number: codes less that are exact, and what the
        # rounding took is small.
        offset = _twice(-128.0 - zero_point, dtype)
        rest = _low_half(offset, dtype) + 128.0 + zero_point
        codes = _add_pairs(pairs, _of_rows(offset, pairs), dtype)
        if NUM_BITS == 8:
            high = biased_codes(bias, words, HALF, NUM_BITS, 4, MANTISSA)
            high = _add_pairs(high, tl.full(pairs.shape, MINUS_2048, tl.int32), dtype)
            codes = _add_pairs(high, codes, dtype)
        weights = _fma_pairs(
            codes, _of_rows(_twice(scale, dtype), pairs), _of_rows(_twice(-scale * rest, dtype), pairs), dtype
        )
        return halves(weights, dtype)
    codes = halves(pairs, dtype).to(tl.float32) - 128.0
    if NUM_BITS == 8:
        codes += halves(biased_codes(bias, words, HALF, NUM_BITS, 4, MANTISSA), dtype).to(tl.float32) - 2048.0
    shape: tl.constexpr = [scale.shape[0], 1, 2, 1, 1, 1]
    return ((codes - tl.reshape(zero_point, shape)) * tl.reshape(scale, shape)).to(dtype)


@triton.jit
def _twice(values, dtype: tl.constexpr):
    """Two times the same 16-bit float, of one of 32 bits, as int32."""
    KIND: tl.constexpr = "bf16x2" if dtype == tl.bfloat16 else "f16x2"
    return tl.inline_asm_elementwise(
        "cvt.rn." + KIND + ".f32 $0, $1, $1;", "=r,f", [values], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _low_half(pairs, dtype: tl.constexpr):
    return (pairs & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def _of_rows(values, pairs):
    """One value of each row, ``[BLOCK_N, 2]``, for all of the row's pairs."""
    return tl.broadcast_to(tl.reshape(values, [pairs.shape[0], 1, 2, 1, 1]), pairs.shape)


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
