// The order in which a CPU wants a matrix, and how it comes to be from that of the checkpoint.
//
// A block is ROWS consecutive rows; it keeps its bytes in memory. Its columns are cut into units of UNIT. Code vector q
// of a unit has the codes of columns 4 * q to 4 * q + 3 of all rows, byte 4 * row + column % 4 each: the operand of
// instructions that multiply bytes and sum them by fours. The VECTORS code vectors of a unit fill BITS stored vectors.
// Each of these holds, in every byte, 8 / BITS whole codes, from the lowest bit up; the bits that remain at the top of
// the bytes, in order, hold the last code vectors. So no bit is wasted, and few instructions take a code out.
//
// What a block has for each group and row, grids of experts and scales of linear layers, is stored [group, row].
#pragma once

#include "vectors.h"

namespace alphaq {

// Where the bits of a code vector lie: calls visit(stored vector, first bit there, first bit of the code, bits).
template <int BITS, typename Visit>
INLINE void visit_bits(int code, Visit visit) {
  constexpr int WHOLE = 8 / BITS, SPARE = 8 - BITS * WHOLE;
  if (code < BITS * WHOLE) return visit(code / WHOLE, code % WHOLE * BITS, 0, BITS);
  if constexpr (SPARE > 0) {
    const int first = (code - BITS * WHOLE) * BITS, end = first + BITS;
#pragma GCC unroll 8
    for (int stored = 0; stored < BITS; ++stored) {
      const int low = first > stored * SPARE ? first : stored * SPARE;
      const int high = end < (stored + 1) * SPARE ? end : (stored + 1) * SPARE;
      if (low < high) visit(stored, BITS * WHOLE + low - stored * SPARE, low - first, high - low);
    }
  }
}

// Code vector q of a unit, or the registers' part of it.
template <int BITS>
INLINE U16 unpack(const uint8_t* unit, int q) {
  U16 code{};
  visit_bits<BITS>(q, [&](int stored, int from, int to, int bits) INLINE_LAMBDA {
    const U16 bytes = load<U16>(unit + stored * VECTOR);
    const U16 moved = from >= to ? bytes >> (from - to) : bytes << (to - from);
    code |= BITS == 8 ? moved : moved & (uint16_t)((((1 << bits) - 1) << to) * 0x0101);
  });
  return code;
}

template <int BITS>
void pack_unit(const uint8_t (&codes)[VECTORS][VECTOR], uint8_t* packed) {
  std::memset(packed, 0, BITS * VECTOR);
#pragma GCC unroll 8
  for (int q = 0; q < VECTORS; ++q) {
    visit_bits<BITS>(q, [&](int i, int to, int from, int bits) INLINE_LAMBDA {
      for (int lane = 0; lane < VECTOR; ++lane) {
        packed[i * VECTOR + lane] |= (codes[q][lane] >> from & ((1 << bits) - 1)) << to;
      }
    });
  }
}

// The codes of one row and unit in the order of the checkpoint: see packing.py.
template <int BITS>
INLINE void read_unit(const uint32_t* words, uint8_t (&codes)[UNIT]) {
  uint32_t pairs[UNIT / 2] = {};
  int low_bit = 0;
#pragma GCC unroll 4
  for (int plane = 8; plane; plane /= 2) {
    if (!(BITS & plane)) continue;
    const uint32_t mask = ((1u << plane) - 1) * 0x00010001u;
#pragma GCC unroll 16
    for (int pair = 0; pair < UNIT / 2; ++pair) {
      pairs[pair] |= (words[low_bit + pair * plane / 16] >> pair * plane % 16 & mask) << low_bit;
    }
    low_bit += plane;
  }
  for (int pair = 0; pair < UNIT / 2; ++pair) {
    codes[2 * pair] = pairs[pair];
    codes[2 * pair + 1] = pairs[pair] >> 16;
  }
}

// Signed codes of linear layers: see linear_packing.py.
template <int BITS>
INLINE void read_linear_unit(const uint32_t* words, uint8_t (&codes)[UNIT]) {
  for (int k = 0; k < UNIT; ++k) codes[k] = words[k * BITS / 32] >> k * BITS % 32 & ((1 << BITS) - 1);
}

// Reorder the words of one block in place; scratch has its ROWS * columns * BITS / 8 bytes.
template <int BITS, bool LINEAR>
void reorder_block(uint8_t* block, uint8_t* scratch, int64_t columns) {
  std::memcpy(scratch, block, ROWS * columns * BITS / 8);
  for (int64_t unit = 0; unit < columns / UNIT; ++unit) {
    uint8_t vectors[VECTORS][VECTOR];
    for (int row = 0; row < ROWS; ++row) {
      uint32_t words[BITS];
      uint8_t codes[UNIT];
      std::memcpy(words, scratch + (row * columns / UNIT + unit) * sizeof words, sizeof words);
      if constexpr (LINEAR) {
        read_linear_unit<BITS>(words, codes);
      } else {
        read_unit<BITS>(words, codes);
      }
      for (int q = 0; q < VECTORS; ++q) std::memcpy(&vectors[q][4 * row], &codes[4 * q], 4);
    }
    pack_unit<BITS>(vectors, block + unit * BITS * VECTOR);
  }
}

// [row, group] to [group, row] in place; scratch has as many bytes as the block.
template <typename Value>
void reorder_block_groups(Value* block, Value* scratch, int64_t groups) {
  std::memcpy(scratch, block, ROWS * groups * sizeof *block);
  for (int64_t group = 0; group < groups; ++group) {
    for (int row = 0; row < ROWS; ++row) block[group * ROWS + row] = scratch[row * groups + group];
  }
}

}  // namespace alphaq
