// Several blocks times many tokens, with x in integers: codes are taken out of their words once, into the first cache.
//
// Up to 4 bits a step times a code is a byte, too. Then one sum runs through all groups of a slab, and what a group
// costs beside is one multiply-add for its zero point.
#pragma once

#include "multiply.h"

namespace alphaq {

#if defined(__AVX2__)

// Widths whose codes are bytes also when they are multiplied with a step.
constexpr int WIDEST_IN_STEPS = 4;

// Codes of a slab of a block: code vectors in order. For products of pairs a code vector is two of 16-bit integers,
// first that of columns 0 and 2 of all rows, then that of 1 and 3.
constexpr int CODE_BYTES = HAS_PAIRS ? 2 : 1;
typedef uint8_t Codes[SLAB * ROWS * CODE_BYTES];

// Sums of products of a token: one for each digit, or for whole integers.
constexpr int sums_of(int digits) { return HAS_PAIRS ? 1 : digits; }

// Take the codes of a group out of their words, times steps or as they are.
template <int BITS, bool IN_STEPS>
void take_codes(const uint8_t* packed, [[maybe_unused]] const uint8_t* grids, int64_t group_size, uint8_t* codes) {
  [[maybe_unused]] U16 steps[PARTS];
  if constexpr (IN_STEPS) {
    // No byte carries into the other of its 16 bits.
    for (int part = 0; part < PARTS; ++part) {
      steps[part] = (U16)(((widen_bytes(grids + part * LANES) & 15) + 1) * 0x00010001);
    }
  }
  auto put = [&](int64_t vector, int part, U16 code) INLINE_LAMBDA {
    if constexpr (IN_STEPS) code = code * steps[part];
    uint8_t* to = codes + vector * CODE_BYTES * VECTOR + part * WIDTH;
    if (HAS_PAIRS) {
      store(to, code & 0x00ff);
      store(to + VECTOR, code >> 8);
    } else {
      store(to, code);
    }
  };
  unpack_group<BITS>(packed, group_size, put);
}

template <bool IN_STEPS>
INLINE void take_codes(const Block& block, int64_t group, int64_t group_size, uint8_t* codes) {
  using Take = void (*)(const uint8_t*, const uint8_t*, int64_t, uint8_t*);
  constexpr Take functions[] = {take_codes<1, IN_STEPS>, take_codes<2, IN_STEPS>, take_codes<3, IN_STEPS>,
                                take_codes<4, IN_STEPS>, take_codes<5, false>,    take_codes<6, false>,
                                take_codes<7, false>,    take_codes<8, false>};
  functions[block.bits - 1](block.packed + group * group_size * ROWS * block.bits / 8,
                            IN_STEPS ? block.grids + group * ROWS : nullptr, group_size, codes);
}

INLINE bool all_in_steps(const Block* blocks, int count) {
  bool all = true;
  for (int b = 0; b < count; ++b) all &= blocks[b].grids && blocks[b].bits <= WIDEST_IN_STEPS;
  return all;
}

// What some columns have for TOKENS tokens from `first` on: sums of products with the codes of BLOCKS blocks, which
// `add(block, part, sums, factors, out)` adds to the results.
template <int DIGITS, int BLOCKS, int TOKENS, typename Add>
INLINE void multiply_columns(const Codes* codes, int64_t first_group, int64_t columns, const Digits& x,
                             const int32_t* rows, int64_t first, float* const* out, Add add) {
  const float* factors[TOKENS];
#pragma GCC unroll 8
  for (int t = 0; t < TOKENS; ++t) factors[t] = x.row_factors(rows[first + t]) + first_group * 2;
  auto add_part = [&](int b, int part, int t, const I32* sums) INLINE_LAMBDA {
    float* at = out[b] + (first + t) * ROWS + part * LANES;
    F32 sum = load<F32>(at);
    add(b, part, sums, factors[t], sum);
    store(at, sum);
  };
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
  const int8_t* digits[TOKENS];
#pragma GCC unroll 4
  for (int t = 0; t < TOKENS; ++t) digits[t] = x.row(rows[first + t]) + first_group * DIGITS * x.group_size;
  for (int part = 0; part < PARTS; ++part) {
    I32 sums[BLOCKS][TOKENS * DIGITS] = {};
    for (int64_t unit = 0; unit < columns / UNIT; ++unit) {
      const int8_t* from[TOKENS];
#pragma GCC unroll 4
      for (int t = 0; t < TOKENS; ++t) from[t] = digits[t] + unit * DIGITS * UNIT;
      auto code = [&](int b, int q)
                      INLINE_LAMBDA { return load<U16>(codes[b] + (unit * VECTORS + q) * VECTOR + part * WIDTH); };
      multiply_units<DIGITS, BLOCKS, TOKENS * DIGITS>(code, from, sums);
    }
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; ++b) {
#pragma GCC unroll 4
      for (int t = 0; t < TOKENS; ++t) add_part(b, part, t, sums[b] + t * DIGITS);
    }
  }
#else
  static_assert(DIGITS == 2, "integers of 16 bits");
  const int16_t* wholes[TOKENS];
#pragma GCC unroll 8
  for (int t = 0; t < TOKENS; ++t) wholes[t] = x.row_wholes(rows[first + t]) + first_group * x.group_size;
  I32 sums[BLOCKS][PARTS][TOKENS] = {};
  for (int64_t pair = 0; pair < columns / 2; ++pair) {
    U16 code[BLOCKS][PARTS];
    for (int b = 0; b < BLOCKS; ++b) {
      for (int part = 0; part < PARTS; ++part) code[b][part] = load<U16>(codes[b] + pair * VECTOR + part * WIDTH);
    }
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t) {
      const int32_t two = four_bytes(wholes[t] + 2 * pair);
      for (int b = 0; b < BLOCKS; ++b) {
        for (int part = 0; part < PARTS; ++part) sums[b][part][t] += multiply_pairs(code[b][part], two);
      }
    }
  }
  for (int b = 0; b < BLOCKS; ++b) {
    for (int part = 0; part < PARTS; ++part) {
#pragma GCC unroll 8
      for (int t = 0; t < TOKENS; ++t) add_part(b, part, t, &sums[b][part][t]);
    }
  }
#endif
}

// The same for all tokens.
template <int DIGITS, int BLOCKS, typename Add>
INLINE void multiply_columns(const Codes* codes, int64_t first_group, int64_t columns, const Digits& x,
                             const int32_t* rows, int64_t count, float* const* out, Add add) {
  // Of digits, the registers hold 24 sums beside what they are made of, 12 where a register has half a code vector; of
  // pairs, 16 or 8.
  constexpr int OF_DIGITS = 6 * (WIDTH / 16) / (DIGITS * BLOCKS) >= 4 ? 4 : 2;
  constexpr int MOST = HAS_PAIRS ? WIDTH / 4 / (BLOCKS * PARTS) : OF_DIGITS;
  int64_t t = 0;
  for (; t + MOST <= count; t += MOST) {
    multiply_columns<DIGITS, BLOCKS, MOST>(codes, first_group, columns, x, rows, t, out, add);
  }
  if constexpr (HAS_PAIRS) {
    for (; t + 2 <= count; t += 2) {
      multiply_columns<DIGITS, BLOCKS, 2>(codes, first_group, columns, x, rows, t, out, add);
    }
  }
  for (; t < count; ++t) multiply_columns<DIGITS, BLOCKS, 1>(codes, first_group, columns, x, rows, t, out, add);
}

// Slab by slab of GROUPS groups, of blocks that have grids and few bits.
template <int DIGITS, int BLOCKS, int GROUPS>
void multiply_slabs(const Block* blocks, const Digits& x, const int32_t* rows, int64_t count, float* const* out) {
  alignas(64) Codes codes[BLOCKS];
  F32 offsets[BLOCKS][PARTS][GROUPS];
  for (int64_t group = 0; group < x.groups(); group += GROUPS) {
    for (int b = 0; b < BLOCKS; ++b) {
      for (int i = 0; i < GROUPS; ++i) {
        take_codes<true>(blocks[b], group + i, x.group_size, codes[b] + i * x.group_size * ROWS * CODE_BYTES);
        for (int part = 0; part < PARTS; ++part) {
          const Grid grid = load_grid(blocks[b], group + i, part);
          offsets[b][part][i] = grid.step * grid.zero;
        }
      }
    }
    auto add = [&](int b, int part, const I32* sums, const float* factors, F32& out) INLINE_LAMBDA {
      out += whole_sums<sums_of(DIGITS)>(sums) * factors[0];
#pragma GCC unroll 4
      for (int i = 0; i < GROUPS; ++i) out -= offsets[b][part][i] * factors[2 * i + 1];
    };
    multiply_columns<DIGITS, BLOCKS>(codes, group, GROUPS * x.group_size, x, rows, count, out, add);
  }
}

// Group by group, of any blocks.
template <int DIGITS, int BLOCKS>
void multiply_groups(const Block* blocks, const Digits& x, const int32_t* rows, int64_t count, float* const* out) {
  alignas(64) Codes codes[BLOCKS];
  Grid grids[BLOCKS][PARTS];
  for (int64_t group = 0; group < x.groups(); ++group) {
    for (int b = 0; b < BLOCKS; ++b) {
      take_codes<false>(blocks[b], group, x.group_size, codes[b]);
      for (int part = 0; part < PARTS; ++part) grids[b][part] = load_grid(blocks[b], group, part);
    }
    auto add = [&](int b, int part, const I32* sums, const float* factors, F32& out)
                   INLINE_LAMBDA { add_group_sum<sums_of(DIGITS)>(sums, factors, grids[b][part], out); };
    multiply_columns<DIGITS, BLOCKS>(codes, group, x.group_size, x, rows, count, out, add);
  }
}

// out [BLOCKS][count, ROWS] = rows of x times the transposes of the blocks.
template <int DIGITS, int BLOCKS>
void multiply_together(const Block* blocks, const Digits& x, const int32_t* rows, int64_t count, float* const* out) {
  for (int b = 0; b < BLOCKS; ++b) std::memset(out[b], 0, count * ROWS * sizeof **out);
  const int64_t groups = slab_of(x.columns, x.group_size) / x.group_size;
  if (!all_in_steps(blocks, BLOCKS)) return multiply_groups<DIGITS, BLOCKS>(blocks, x, rows, count, out);
  if (groups == 1) multiply_slabs<DIGITS, BLOCKS, 1>(blocks, x, rows, count, out);
  if (groups == 2) multiply_slabs<DIGITS, BLOCKS, 2>(blocks, x, rows, count, out);
  if (groups == 4) multiply_slabs<DIGITS, BLOCKS, 4>(blocks, x, rows, count, out);
}

#endif

}  // namespace alphaq
