// One block of rows of a matrix times some rows of x: the products that the time of a layer goes into.
//
// With a weight of `step * (code - zero)` and x as integers with a factor, a group's part of a product is
// `step * (factor * sum of code * integer - zero * sum of x)`. The first sum is exact in int32; the second is made with
// the integers.
#pragma once

#include "activations.h"
#include "layout.h"

namespace alphaq {

// ROWS rows of a matrix. Those of an expert have grids: see packing.py. The scales of its rows come after the products.
// Those of a linear layer have scales for each group instead, and zero points of 2^(bits - 1).
struct Block {
  int bits;
  const uint8_t* packed;
  const uint8_t* grids;
  const uint16_t* scales;
};

// Of one group and the rows of a register: a code means `step * (code - zero)`.
struct Grid {
  F32 step;
  F32 zero;
};

INLINE Grid load_grid(const Block& block, int64_t group, int part) {
  const int64_t at = group * ROWS + part * LANES;
  // A 32nd of the number of codes.
  const F32 part_of_codes = spread<F32>((1 << block.bits) / 32.0f);
  if (block.scales) return {widen_bfloat16(block.scales + at), 16 * part_of_codes};
  const I32 grids = widen_bytes(block.grids + at);
  return {to_float((grids & 15) + 1), to_float(grids >> 4) * part_of_codes + 6 * part_of_codes};
}

// Tokens whose sums the registers hold beside a unit's codes.
constexpr int tokens_at_once(int digits) {
  const int sums = WIDTH == 64 ? 16 : WIDTH == 32 ? 4 : 8;
  return sums / digits >= 8 ? 8 : sums / digits >= 4 ? 4 : sums / digits >= 2 ? 2 : 1;
}

// Blocks that many tokens are multiplied with together. Where one instruction makes a product, loads of x are as many
// as products, and a load for several blocks is worth its registers. With AMX there are two: see tiles.h.
#if defined(__AVX512VNNI__) && !defined(__AMX_INT8__)
constexpr int BLOCKS_AT_ONCE = 4;
#else
constexpr int BLOCKS_AT_ONCE = 2;
#endif

// Bytes by which words are fetched ahead of their use: across the pages at which processors stop doing so themselves.
constexpr int PREFETCHED = 4096;

// Sums of products with integers, from those with each digit.
template <int DIGITS>
INLINE F32 whole_sums(const I32* sums) {
  // Two digits fit int32 together, three do not.
  const F32 low = to_float(DIGITS == 1 ? sums[0] : sums[0] + (sums[1 % DIGITS] << 8));
  return DIGITS == 3 ? low + 65536.0f * to_float(sums[2 % DIGITS]) : low;
}

// Add a group's part to `out`, from the sums of products with each digit.
template <int DIGITS>
INLINE void add_group_sum(const I32* sums, const float* factors, const Grid& grid, F32& out) {
  out += (whole_sums<DIGITS>(sums) * factors[0] - grid.zero * factors[1]) * grid.step;
}

// Add a group's part to `out` of TOKENS tokens. code(unit, q) yields code vector q of a unit.
template <int BITS, int DIGITS, int TOKENS, typename Code>
INLINE void add_group(Code code, int64_t group_size, const int8_t* const (&digits)[TOKENS],
                      const float* const (&factors)[TOKENS], const Grid& grid, F32 (&out)[TOKENS]) {
  I32 sums[TOKENS * DIGITS] = {};
  for (int64_t unit = 0; unit < group_size / UNIT; ++unit) {
    const int8_t* x[TOKENS];
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t) x[t] = digits[t] + unit * DIGITS * UNIT;
    multiply_unit<BITS, DIGITS, TOKENS * DIGITS>([&](int q) INLINE_LAMBDA { return code(unit, q); }, x, sums);
  }
#pragma GCC unroll 8
  for (int t = 0; t < TOKENS; ++t) add_group_sum<DIGITS>(sums + t * DIGITS, factors[t], grid, out[t]);
}

// TOKENS tokens: codes go from their word to their product.
template <int BITS, int DIGITS, int TOKENS>
void multiply_few(const Block& block, const Digits& x, const int32_t* rows, float* out) {
  const int64_t group_size = x.group_size;
  F32 sums[PARTS][TOKENS] = {};
  const int8_t* digits[TOKENS];
  const float* factors[TOKENS];
  for (int t = 0; t < TOKENS; ++t) digits[t] = x.row(rows[t]), factors[t] = x.row_factors(rows[t]);
  const uint8_t* packed = block.packed;
  for (int64_t group = 0; group < x.groups(); ++group, packed += group_size * ROWS * BITS / 8) {
    auto code = [&](int64_t unit, int part, int q) INLINE_LAMBDA {
      const uint8_t* from = packed + unit * BITS * VECTOR + part * WIDTH;
      if (q < BITS && part == 0) __builtin_prefetch(from + q * VECTOR + PREFETCHED);
      return unpack<BITS>(from, q);
    };
#if defined(ALPHAQ_PAIRS)
    // The registers hold eight sums beside what they are made of.
    if constexpr (PARTS == 2 && TOKENS * DIGITS <= 4 && BITS < 8) {
      I32 of_group[PARTS][TOKENS * DIGITS] = {};
      for (int64_t unit = 0; unit < group_size / UNIT; ++unit) {
        const int8_t* from[TOKENS];
        for (int t = 0; t < TOKENS; ++t) from[t] = digits[t] + unit * DIGITS * UNIT;
        auto of_unit = [&](int part, int q) INLINE_LAMBDA { return code(unit, part, q); };
        multiply_parts<BITS, DIGITS, PARTS, TOKENS * DIGITS>(of_unit, from, of_group);
      }
      for (int part = 0; part < PARTS; ++part) {
        const Grid grid = load_grid(block, group, part);
        for (int t = 0; t < TOKENS; ++t) {
          add_group_sum<DIGITS>(of_group[part] + t * DIGITS, factors[t], grid, sums[part][t]);
        }
      }
    } else
#endif
    {
#pragma GCC unroll 4
      for (int part = 0; part < PARTS; ++part) {
        auto of_part = [&](int64_t unit, int q) INLINE_LAMBDA { return code(unit, part, q); };
        add_group<BITS, DIGITS, TOKENS>(of_part, group_size, digits, factors, load_grid(block, group, part),
                                        sums[part]);
      }
    }
    for (int t = 0; t < TOKENS; ++t) digits[t] += DIGITS * group_size, factors[t] += 2;
  }
  for (int t = 0; t < TOKENS; ++t) {
    for (int part = 0; part < PARTS; ++part) store(out + t * ROWS + part * LANES, sums[part][t]);
  }
}

// A group's part for TOKENS tokens, from codes that were taken out of their words.
template <int BITS, int DIGITS, int TOKENS>
INLINE void multiply_tile(const uint8_t* tile, const Grid* grids, int64_t group, const Digits& x, const int32_t* rows,
                          float* out) {
  const int8_t* digits[TOKENS];
  const float* factors[TOKENS];
#pragma GCC unroll 8
  for (int t = 0; t < TOKENS; ++t) {
    digits[t] = x.row(rows[t]) + group * DIGITS * x.group_size;
    factors[t] = x.row_factors(rows[t]) + group * 2;
  }
  for (int part = 0; part < PARTS; ++part) {
    auto code = [&](int64_t unit, int q)
                    INLINE_LAMBDA { return load<U16>(tile + (unit * VECTORS + q) * VECTOR + part * WIDTH); };
    F32 sums[TOKENS];
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t) sums[t] = load<F32>(out + t * ROWS + part * LANES);
    add_group<BITS, DIGITS, TOKENS>(code, x.group_size, digits, factors, grids[part], sums);
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t) store(out + t * ROWS + part * LANES, sums[t]);
  }
}

// Take the codes of a group out of their words: `put(vector, part, code)` has the code vectors in order.
template <int BITS, typename Put>
INLINE void unpack_group(const uint8_t* packed, int64_t group_size, Put put) {
  for (int64_t unit = 0; unit < group_size / UNIT; ++unit, packed += BITS * VECTOR) {
    for (int part = 0; part < PARTS; ++part) {
#pragma GCC unroll 8
      for (int q = 0; q < VECTORS; ++q) {
        if (q < BITS && part == 0) __builtin_prefetch(packed + q * VECTOR + PREFETCHED);
        put(unit * VECTORS + q, part, unpack<BITS>(packed + part * WIDTH, q));
      }
    }
  }
}

template <int BITS>
void unpack_group(const uint8_t* packed, int64_t group_size, uint8_t* codes) {
  auto put = [&](int64_t vector, int part, U16 code)
                 INLINE_LAMBDA { store(codes + vector * VECTOR + part * WIDTH, code); };
  unpack_group<BITS>(packed, group_size, put);
}

// Many tokens, where slabs.h has nothing for them: the codes of a group are taken out of their words once, into the
// first cache.
template <int BITS, int DIGITS>
void multiply_many(const Block& block, const Digits& x, const int32_t* rows, int64_t count, float* out) {
  alignas(64) uint8_t tile[SLAB * ROWS];
  Grid grids[PARTS];
  std::memset(out, 0, count * ROWS * sizeof *out);
  const uint8_t* packed = block.packed;
  for (int64_t group = 0; group < x.groups(); ++group, packed += x.group_size * ROWS * BITS / 8) {
    unpack_group<BITS>(packed, x.group_size, tile);
    for (int part = 0; part < PARTS; ++part) grids[part] = load_grid(block, group, part);
    constexpr int MOST = tokens_at_once(DIGITS);
    int64_t t = 0;
    for (; t + MOST <= count; t += MOST) {
      multiply_tile<BITS, DIGITS, MOST>(tile, grids, group, x, rows + t, out + t * ROWS);
    }
    if constexpr (MOST > 2) {
      for (; t + 2 <= count; t += 2) multiply_tile<BITS, DIGITS, 2>(tile, grids, group, x, rows + t, out + t * ROWS);
    }
    for (; t < count; ++t) multiply_tile<BITS, DIGITS, 1>(tile, grids, group, x, rows + t, out + t * ROWS);
  }
}

}  // namespace alphaq
