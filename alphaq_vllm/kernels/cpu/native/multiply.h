// One block of rows of a matrix times some rows of x: the products that the time of a layer goes into.
//
// With a weight of `step * (code - zero)` and x as integers with a factor per group, a group's part of a product is
// `step * factor * (sum of code * integer - zero * sum of integers)`. The first sum is exact in int32; the second is
// made with the integers.
#pragma once

#include "activations.h"
#include "layout.h"

namespace alphaq {

constexpr int LARGEST_GROUP = 128;

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

// Blocks that many tokens are multiplied with together. Where one instruction makes a product, loads of x are as many as
// products, and a load for several blocks is worth its registers. With AMX there are two: see tiles.h.
#if defined(__AVX512VNNI__) && !defined(__AMX_INT8__)
constexpr int BLOCKS_AT_ONCE = 4;
#else
constexpr int BLOCKS_AT_ONCE = 2;
#endif

// Bytes by which words are fetched ahead of their use: across the pages at which processors stop doing so themselves.
constexpr int PREFETCHED = 4096;

// Add a group's part to `out`, from the sums of products of each digit.
template <int DIGITS>
INLINE void add_group_sum(const I32* sums, const float* factors, const Grid& grid, F32& out) {
  // Two digits fit int32 together, three do not.
  F32 sum = to_float(DIGITS == 1 ? sums[0] : sums[0] + (sums[1 % DIGITS] << 8));
  if (DIGITS == 3) sum += 65536.0f * to_float(sums[2 % DIGITS]);
  out += (sum - grid.zero * factors[1]) * (grid.step * factors[0]);
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
#pragma GCC unroll 4
    for (int part = 0; part < PARTS; ++part) {
      auto code = [&](int64_t unit, int q) INLINE_LAMBDA {
        const uint8_t* from = packed + unit * BITS * VECTOR + part * WIDTH;
        if (q < BITS && part == 0) __builtin_prefetch(from + q * VECTOR + PREFETCHED);
        return unpack<BITS>(from, q);
      };
      const Grid grid = load_grid(block, group, part);
      add_group<BITS, DIGITS, TOKENS>(code, group_size, digits, factors, grid, sums[part]);
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

// Take the codes of a group out of their words: code vectors in order.
template <int BITS>
void unpack_group(const uint8_t* packed, int64_t group_size, uint8_t* codes) {
  for (int64_t unit = 0; unit < group_size / UNIT; ++unit, packed += BITS * VECTOR, codes += VECTORS * VECTOR) {
    for (int part = 0; part < PARTS; ++part) {
#pragma GCC unroll 8
      for (int q = 0; q < VECTORS; ++q) {
        if (q < BITS && part == 0) __builtin_prefetch(packed + q * VECTOR + PREFETCHED);
        store(codes + q * VECTOR + part * WIDTH, unpack<BITS>(packed + part * WIDTH, q));
      }
    }
  }
}

INLINE void unpack_group(const Block& block, int64_t group, int64_t group_size, uint8_t* codes) {
  using Unpack = void (*)(const uint8_t*, int64_t, uint8_t*);
  constexpr Unpack functions[] = {unpack_group<1>, unpack_group<2>, unpack_group<3>, unpack_group<4>,
                                  unpack_group<5>, unpack_group<6>, unpack_group<7>, unpack_group<8>};
  functions[block.bits - 1](block.packed + group * group_size * ROWS * block.bits / 8, group_size, codes);
}

// Many tokens: the codes of a group are taken out of their words once, into the first cache.
template <int BITS, int DIGITS>
void multiply_many(const Block& block, const Digits& x, const int32_t* rows, int64_t count, float* out) {
  alignas(64) uint8_t tile[LARGEST_GROUP * ROWS];
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

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)

// A group's part for TOKENS tokens and BLOCKS blocks, from codes that were taken out of their words.
template <int DIGITS, int BLOCKS, int TOKENS>
INLINE void multiply_tiles_of(const uint8_t (*tiles)[LARGEST_GROUP * ROWS], const Grid (*grids)[PARTS], int64_t group,
                              const Digits& x, const int32_t* rows, int64_t first, float* const* out) {
  const int8_t* digits[TOKENS];
  const float* factors[TOKENS];
#pragma GCC unroll 4
  for (int t = 0; t < TOKENS; ++t) {
    digits[t] = x.row(rows[first + t]) + group * DIGITS * x.group_size;
    factors[t] = x.row_factors(rows[first + t]) + group * 2;
  }
  for (int part = 0; part < PARTS; ++part) {
    I32 sums[BLOCKS][TOKENS * DIGITS] = {};
    for (int64_t unit = 0; unit < x.group_size / UNIT; ++unit) {
      const int8_t* from[TOKENS];
#pragma GCC unroll 4
      for (int t = 0; t < TOKENS; ++t) from[t] = digits[t] + unit * DIGITS * UNIT;
      auto code = [&](int b, int q) INLINE_LAMBDA {
        return load<U16>(tiles[b] + (unit * VECTORS + q) * VECTOR + part * WIDTH);
      };
      multiply_units<DIGITS, BLOCKS, TOKENS * DIGITS>(code, from, sums);
    }
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; ++b) {
#pragma GCC unroll 4
      for (int t = 0; t < TOKENS; ++t) {
        float* at = out[b] + (first + t) * ROWS + part * LANES;
        F32 sum = load<F32>(at);
        add_group_sum<DIGITS>(sums[b] + t * DIGITS, factors[t], grids[b][part], sum);
        store(at, sum);
      }
    }
  }
}

// The same as multiply_many of several blocks, of any widths.
template <int DIGITS, int BLOCKS>
void multiply_together(const Block* blocks, const Digits& x, const int32_t* rows, int64_t count, float* const* out) {
  alignas(64) uint8_t tiles[BLOCKS][LARGEST_GROUP * ROWS];
  Grid grids[BLOCKS][PARTS];
  for (int b = 0; b < BLOCKS; ++b) std::memset(out[b], 0, count * ROWS * sizeof **out);
  for (int64_t group = 0; group < x.groups(); ++group) {
    for (int b = 0; b < BLOCKS; ++b) {
      unpack_group(blocks[b], group, x.group_size, tiles[b]);
      for (int part = 0; part < PARTS; ++part) grids[b][part] = load_grid(blocks[b], group, part);
    }
    // The registers hold 24 sums beside what they are made of, 12 where a register has half a code vector.
    constexpr int MOST = 6 * (WIDTH / 16) / (DIGITS * BLOCKS) >= 4 ? 4 : 2;
    int64_t t = 0;
    for (; t + MOST <= count; t += MOST) multiply_tiles_of<DIGITS, BLOCKS, MOST>(tiles, grids, group, x, rows, t, out);
    for (; t < count; ++t) multiply_tiles_of<DIGITS, BLOCKS, 1>(tiles, grids, group, x, rows, t, out);
  }
}

#endif

}  // namespace alphaq
