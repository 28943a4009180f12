// Products by the matrix unit (AMX): up to 16 tokens, 16 rows and 64 bytes of columns an instruction.
//
// Few tokens are digits, and their products the same integers as always. What the unit takes from a matrix then is what
// layout.h has: 64 columns are 16 code vectors. Many tokens are bfloat16, multiplied with weights that are rounded to
// it as in any other program: then nothing is left to do for each group of columns.
#pragma once

#include "slabs.h"
#include "workspace.h"

namespace alphaq {

#if defined(__AMX_INT8__)
constexpr bool HAS_TILES = true;
#else
constexpr bool HAS_TILES = false;
#endif

// In place of a number of digits: bfloat16.
constexpr int64_t HALVES = 0;

// Tokens that a tile holds. How few of an expert's tokens are not worth one, and how few on average not worth halves.
constexpr int64_t TILE = 16;
constexpr int64_t FEWEST_IN_TILES = 3;
constexpr int64_t FEWEST_IN_HALVES = 48;

// Some tokens as the matrix unit takes them: in tiles of `height` tokens, the last one filled up with anything.
struct Tiles {
  // [tile, step of columns, digit, token of the tile, byte of the step]
  int8_t* bytes;
  // Of digits: [group, token, 2], as in Digits.
  float* factors;
  int64_t columns;
  int64_t group_size;
  int64_t digits;
  int64_t height;
  // Tokens with those that fill up the last tile.
  int64_t padded;

  Tiles(int64_t count, int64_t columns, int64_t group_size, int64_t digits)
      : bytes(nullptr), factors(nullptr), columns(columns), group_size(group_size), digits(digits) {
    height = (count + number(count) - 1) / number(count);
    padded = height * number(count);
  }

  static int64_t number(int64_t count) { return (count + TILE - 1) / TILE; }

  // Bytes of a token that an instruction takes.
  int64_t step() const { return digits == HALVES || group_size >= 64 ? 64 : group_size; }

  void take(Workspace& from) {
    bytes = from.take<int8_t>(padded * columns * (digits == HALVES ? 2 : digits));
    if (digits != HALVES) factors = from.take<float>(padded * columns / group_size * 2);
  }

  // What `take` takes.
  int64_t taken() const {
    return digits == HALVES ? padded * columns * 2 + 64 : digit_bytes(padded, columns, group_size, digits);
  }

  // Fill tile `tile` from the rows of x that `rows` names.
  void gather(const Digits& x, const int32_t* rows, int64_t count, int64_t tile) const {
    const int64_t units = step() / UNIT, steps = columns / step();
    const int64_t first = tile * height, last = std::min(first + height, count);
    for (int64_t i = first; i < last; ++i) {
      const int8_t* from = x.row(rows[i]);
      int8_t* to = bytes + first * columns * digits + (i - first) * step();
      for (int64_t s = 0; s < steps; ++s) {
        for (int64_t d = 0; d < digits; ++d, to += height * step()) {
          for (int64_t u = 0; u < units; ++u) {
            std::memcpy(to + u * UNIT, from + ((s * units + u) * digits + d) * UNIT, UNIT);
          }
        }
      }
      const float* of_row = x.row_factors(rows[i]);
      for (int64_t group = 0; group < x.groups(); ++group) {
        std::memcpy(factors + (group * padded + i) * 2, of_row + group * 2, 2 * sizeof *factors);
      }
    }
  }

  void gather(const uint16_t* x, const int32_t* rows, int64_t count, int64_t tile) const {
    const int64_t first = tile * height, last = std::min(first + height, count);
    for (int64_t i = first; i < last; ++i) {
      int8_t* to = bytes + first * columns * 2 + (i - first) * 64;
      for (int64_t k = 0; k < columns; k += 32, to += height * 64) std::memcpy(to, x + rows[i] * columns + k, 64);
    }
  }
};

#if defined(__AMX_INT8__)

// Some compilers do not know that instructions on tiles read and write memory: here all that was written is there.
INLINE void settle() { asm volatile("" ::: "memory"); }

// The matrix unit's configuration of this thread: shapes for tiles of so many tokens, put back afterwards.
class TileShapes {
 public:
  TileShapes(int64_t height, int64_t step) {
    _tile_storeconfig(&before_);
    settle();
    Config config{};
    config.palette = 1;
    // Six of sums, one of activations, one of codes.
    for (int t = 0; t < 7; ++t) config.rows[t] = height, config.row_bytes[t] = t < 6 ? 4 * ROWS : step;
    config.rows[7] = step / 4, config.row_bytes[7] = 4 * ROWS;
    settle();
    _tile_loadconfig(&config);
  }
  ~TileShapes() {
    settle();
    if (before_.palette) {
      _tile_loadconfig(&before_);
    } else {
      _tile_release();
    }
  }
  TileShapes(const TileShapes&) = delete;
  TileShapes& operator=(const TileShapes&) = delete;

 private:
  struct alignas(64) Config {
    uint8_t palette;
    uint8_t start_row;
    uint8_t reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  Config before_;
};

// Each of the six tiles that sums are in.
#define ALPHAQ_SUMS(do) \
  do (0) do(1) do(2) do(3) do(4) do(5)

// sums [BLOCKS, DIGITS, height, ROWS] of some columns and one tile of tokens; codes [BLOCKS, SLAB].
template <int DIGITS, int BLOCKS>
INLINE void multiply_columns(const uint8_t* codes, const int8_t* x, int64_t height, int64_t step, int64_t steps,
                             int32_t* sums) {
  const int64_t size = height * step;
#define ALPHAQ_ZERO(i) \
  if (BLOCKS * DIGITS > i) _tile_zero(i);
#define ALPHAQ_MULTIPLY(i)                                                           \
  if (BLOCKS * DIGITS > i) {                                                         \
    if (i % DIGITS == 0) _tile_loadd(7, codes + i / DIGITS * SLAB * ROWS, 4 * ROWS); \
    _tile_loadd(6, x + i % DIGITS * size, step);                                     \
    _tile_dpbsud(i, 6, 7);                                                           \
  }
#define ALPHAQ_STORE(i) \
  if (BLOCKS * DIGITS > i) _tile_stored(i, sums + i * height * ROWS, 4 * ROWS);
  ALPHAQ_SUMS(ALPHAQ_ZERO)
  for (int64_t s = 0; s < steps; ++s, codes += step * ROWS, x += DIGITS * size) {
    ALPHAQ_SUMS(ALPHAQ_MULTIPLY)
  }
  ALPHAQ_SUMS(ALPHAQ_STORE)
  settle();
#undef ALPHAQ_STORE
#undef ALPHAQ_MULTIPLY
#undef ALPHAQ_ZERO
}

// out [BLOCKS][padded tokens, ROWS] = tiles of digits times the transposes of the blocks.
//
// GROUPS: so many groups are summed together, of blocks with grids and few bits; 0: one at a time, of any blocks.
template <int DIGITS, int BLOCKS, int GROUPS>
void multiply_tiles(const Block* blocks, const Tiles& x, float* const* out) {
  constexpr int AT_ONCE = GROUPS ? GROUPS : 1;
  alignas(64) uint8_t codes[BLOCKS][SLAB * ROWS];
  alignas(64) int32_t sums[BLOCKS * DIGITS * TILE * ROWS];
  const int64_t group_size = x.group_size, step = x.step(), steps = AT_ONCE * group_size / step;
  const int64_t height = x.height, stride = height * x.columns * DIGITS, tiles = x.padded / height;
  for (int b = 0; b < BLOCKS; ++b) std::memset(out[b], 0, x.padded * ROWS * sizeof(float));
  for (int64_t group = 0; group < x.columns / group_size; group += AT_ONCE) {
    Grid grids[BLOCKS][AT_ONCE];
    F32 offsets[BLOCKS][AT_ONCE];
    for (int b = 0; b < BLOCKS; ++b) {
      for (int i = 0; i < AT_ONCE; ++i) {
        uint8_t* to = codes[b] + i * group_size * ROWS;
        take_codes<GROUPS != 0>(blocks[b], group + i, group_size, to);
        grids[b][i] = load_grid(blocks[b], group + i, 0);
        offsets[b][i] = grids[b][i].step * grids[b][i].zero;
      }
    }
    settle();
    const int8_t* digits = x.bytes + group * height * group_size * DIGITS;
    const float* factors = x.factors + group * x.padded * 2;
    for (int64_t tile = 0; tile < tiles; ++tile, digits += stride, factors += height * 2) {
      multiply_columns<DIGITS, BLOCKS>(codes[0], digits, height, step, steps, sums);
      for (int b = 0; b < BLOCKS; ++b) {
        const int32_t* from = sums + b * DIGITS * height * ROWS;
        for (int64_t i = 0; i < height; ++i) {
          I32 of_token[DIGITS];
          for (int d = 0; d < DIGITS; ++d) of_token[d] = load<I32>(from + (d * height + i) * ROWS);
          float* at = out[b] + (tile * height + i) * ROWS;
          F32 sum = load<F32>(at);
          if (GROUPS) {
            sum += whole_sums<DIGITS>(of_token) * factors[2 * i];
            for (int g = 0; g < AT_ONCE; ++g) sum -= offsets[b][g] * factors[2 * (g * x.padded + i) + 1];
          } else {
            add_group_sum<DIGITS>(of_token, factors + 2 * i, grids[b][0], sum);
          }
          store(at, sum);
        }
      }
    }
  }
}

template <int DIGITS, int BLOCKS>
INLINE void multiply_tiles(const Block* blocks, const Tiles& x, float* const* out) {
  const int64_t groups = slab_of(x.columns, x.group_size) / x.group_size;
  if (!all_in_steps(blocks, BLOCKS)) return multiply_tiles<DIGITS, BLOCKS, 0>(blocks, x, out);
  if (groups == 1) multiply_tiles<DIGITS, BLOCKS, 1>(blocks, x, out);
  if (groups == 2) multiply_tiles<DIGITS, BLOCKS, 2>(blocks, x, out);
  if (groups == 4) multiply_tiles<DIGITS, BLOCKS, 4>(blocks, x, out);
}

// Tiles of weights rounded to bfloat16, [step of 32 columns, pair of columns, row, column of the pair].
template <int BITS>
void dequantize_block(const Block& block, int64_t columns, int64_t group_size, uint16_t* weights) {
  // A code in the digits of 256 + code.
  const __m512i digits = _mm512_set1_epi32(0x007f8000), base = _mm512_set1_epi32(0x43800000);
  __m512i pairs;
  {
    uint16_t order[32];
    for (int row = 0; row < ROWS; ++row) order[2 * row] = row, order[2 * row + 1] = ROWS + row;
    pairs = _mm512_loadu_si512(order);
  }
  const uint8_t* packed = block.packed;
  for (int64_t group = 0; group < columns / group_size; ++group) {
    const Grid grid = load_grid(block, group, 0);
    const __m512 step = (__m512)grid.step, offset = (__m512)(-(256.0f + grid.zero) * grid.step);
    for (int64_t unit = 0; unit < group_size / UNIT; ++unit, packed += BITS * VECTOR) {
#pragma GCC unroll 8
      for (int q = 0; q < VECTORS; ++q, weights += 2 * VECTOR / 2) {
        if (q < BITS) __builtin_prefetch(packed + q * VECTOR + PREFETCHED);
        const __m512i codes = (__m512i)unpack<BITS>(packed, q);
        auto weight = [&](__m512i moved) INLINE_LAMBDA {
          // (moved & digits) | base
          return _mm512_fmadd_ps((__m512)_mm512_ternarylogic_epi32(moved, digits, base, 0xea), step, offset);
        };
        auto pair = [&](__m512 first, __m512 second) INLINE_LAMBDA {
          return _mm512_permutexvar_epi16(pairs, (__m512i)_mm512_cvtne2ps_pbh(second, first));
        };
        const __m512 first = weight(_mm512_slli_epi32(codes, 15)), second = weight(_mm512_slli_epi32(codes, 7));
        const __m512 third = weight(_mm512_srli_epi32(codes, 1)), fourth = weight(_mm512_srli_epi32(codes, 9));
        store(weights, pair(first, second));
        store(weights + 2 * ROWS, pair(third, fourth));
      }
    }
  }
}

using Dequantize = void (*)(const Block&, int64_t, int64_t, uint16_t*);

// out [BLOCKS][TILES, height, ROWS] = so many tiles of tokens, `stride` bytes apart, times the transposes of weights.
template <int BLOCKS, int TILES>
INLINE void multiply_tiles_of_halves(const uint16_t* const* weights, const int8_t* x, int64_t stride, int64_t height,
                                     int64_t steps, float* const* out) {
#define ALPHAQ_ZERO(i) \
  if (BLOCKS * TILES > i) _tile_zero(i);
#define ALPHAQ_MULTIPLY(i)                                                               \
  if (BLOCKS * TILES > i) {                                                              \
    if (i % TILES == 0) _tile_loadd(7, weights[i / TILES % BLOCKS] + s * 32 * ROWS, 64); \
    _tile_loadd(6, x + i % TILES * stride, 64);                                          \
    _tile_dpbf16ps(i, 6, 7);                                                             \
  }
#define ALPHAQ_STORE(i) \
  if (BLOCKS * TILES > i) _tile_stored(i, out[i / TILES % BLOCKS] + i % TILES * height * ROWS, 4 * ROWS);
  ALPHAQ_SUMS(ALPHAQ_ZERO)
  for (int64_t s = 0; s < steps; ++s, x += height * 64) {
    ALPHAQ_SUMS(ALPHAQ_MULTIPLY)
  }
  ALPHAQ_SUMS(ALPHAQ_STORE)
  settle();
#undef ALPHAQ_STORE
#undef ALPHAQ_MULTIPLY
#undef ALPHAQ_ZERO
}

// out [BLOCKS][padded tokens, ROWS] = tiles of halves times the transposes of the blocks.
template <int BLOCKS>
void multiply_halves(const Block* blocks, const Tiles& x, float* const* out) {
  constexpr Dequantize dequantize[] = {dequantize_block<1>, dequantize_block<2>, dequantize_block<3>,
                                       dequantize_block<4>, dequantize_block<5>, dequantize_block<6>,
                                       dequantize_block<7>, dequantize_block<8>};
  const int64_t size = x.columns * ROWS;
  Workspace& space = workspace(1);
  space.reserve(BLOCKS * size * 2);
  const uint16_t* weights[BLOCKS];
  for (int b = 0; b < BLOCKS; ++b) {
    uint16_t* to = space.take<uint16_t>(size);
    dequantize[blocks[b].bits - 1](blocks[b], x.columns, x.group_size, to);
    weights[b] = to;
  }
  settle();
  const int64_t height = x.height, stride = height * x.columns * 2, steps = x.columns / 32, tiles = x.padded / height;
  for (int64_t tile = 0; tile < tiles; tile += 3) {
    const int8_t* from = x.bytes + tile * stride;
    float* to[BLOCKS];
    for (int b = 0; b < BLOCKS; ++b) to[b] = out[b] + tile * height * ROWS;
    if (tile + 3 <= tiles) multiply_tiles_of_halves<BLOCKS, 3>(weights, from, stride, height, steps, to);
    if (tile + 2 == tiles) multiply_tiles_of_halves<BLOCKS, 2>(weights, from, stride, height, steps, to);
    if (tile + 1 == tiles) multiply_tiles_of_halves<BLOCKS, 1>(weights, from, stride, height, steps, to);
  }
}

#endif

}  // namespace alphaq
