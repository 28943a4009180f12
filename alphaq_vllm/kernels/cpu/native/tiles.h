// Products by the matrix unit (AMX): up to 16 tokens, 16 rows and 64 columns an instruction, the same integers as
// always.
//
// What it takes from a matrix is what layout.h has: 64 columns are 16 code vectors.
#pragma once

#include "multiply.h"

#if defined(__AMX_INT8__)

namespace alphaq {

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

// sums [TILES * DIGITS, height, ROWS] of one group: products of so many tiles of tokens, `stride` bytes apart.
template <int DIGITS, int TILES>
INLINE void multiply_tiles_of_group(const uint8_t* codes, const int8_t* digits, int64_t stride, int64_t height,
                                    int64_t step, int64_t steps, int32_t* sums) {
  _tile_zero(0);
  if (TILES * DIGITS > 1) _tile_zero(1);
  if (TILES * DIGITS > 2) _tile_zero(2);
  if (TILES * DIGITS > 3) _tile_zero(3);
  if (TILES * DIGITS > 4) _tile_zero(4);
  if (TILES * DIGITS > 5) _tile_zero(5);
  const int64_t size = height * step;
  for (int64_t s = 0; s < steps; ++s, codes += step * ROWS, digits += DIGITS * size) {
    _tile_loadd(7, codes, 4 * ROWS);
#define ALPHAQ_MULTIPLY(i)                                                  \
  if (TILES * DIGITS > i) {                                                 \
    _tile_loadd(6, digits + i / DIGITS * stride + i % DIGITS * size, step); \
    _tile_dpbsud(i, 6, 7);                                                  \
  }
    ALPHAQ_MULTIPLY(0)
    ALPHAQ_MULTIPLY(1)
    ALPHAQ_MULTIPLY(2)
    ALPHAQ_MULTIPLY(3)
    ALPHAQ_MULTIPLY(4)
    ALPHAQ_MULTIPLY(5)
#undef ALPHAQ_MULTIPLY
  }
  _tile_stored(0, sums, 4 * ROWS);
  if (TILES * DIGITS > 1) _tile_stored(1, sums + height * ROWS, 4 * ROWS);
  if (TILES * DIGITS > 2) _tile_stored(2, sums + 2 * height * ROWS, 4 * ROWS);
  if (TILES * DIGITS > 3) _tile_stored(3, sums + 3 * height * ROWS, 4 * ROWS);
  if (TILES * DIGITS > 4) _tile_stored(4, sums + 4 * height * ROWS, 4 * ROWS);
  if (TILES * DIGITS > 5) _tile_stored(5, sums + 5 * height * ROWS, 4 * ROWS);
  settle();
}

// Add a group's part to `out` [TILES * height, ROWS].
template <int DIGITS, int TILES>
INLINE void add_tiles(const int32_t* sums, int64_t height, const float* factors, F32 scale, F32 zero, float* out) {
  const int64_t size = height * ROWS;
  for (int tile = 0; tile < TILES; ++tile, sums += DIGITS * size) {
    for (int64_t i = 0; i < size; i += ROWS, factors += 2, out += ROWS) {
      I32 of_token[DIGITS];
      for (int d = 0; d < DIGITS; ++d) of_token[d] = load<I32>(sums + d * size + i);
      F32 sum = load<F32>(out);
      add_group_sum<DIGITS>(of_token, factors, scale, zero, sum);
      store(out, sum);
    }
  }
}

// out [padded tokens, ROWS] = tiles times the transpose of the block.
template <int BITS, int DIGITS>
void multiply_tiles(const Block& block, const Tiles& x, float* out) {
  alignas(64) uint8_t codes[LARGEST_GROUP * ROWS];
  alignas(64) int32_t sums[6 * TILE * ROWS];
  const int64_t columns = x.columns, group_size = x.group_size, step = x.step(), steps = group_size / step;
  const int64_t height = x.height, stride = height * columns * DIGITS, tiles = x.padded / height;
  std::memset(out, 0, x.padded * ROWS * sizeof *out);
  const uint8_t* packed = block.packed;
  for (int64_t group = 0; group < columns / group_size; ++group, packed += group_size * ROWS * BITS / 8) {
    unpack_group<BITS>(packed, group_size, codes);
    settle();
    const F32 scale = widen_bfloat16(block.scales + group * ROWS), zero = zero_point<BITS>(block, group, 0);
    const int8_t* digits = x.digits + group * height * group_size * DIGITS;
    const float* factors = x.factors + group * x.padded * 2;
    int64_t tile = 0;
    for (; tile + 2 <= tiles; tile += 2) {
      multiply_tiles_of_group<DIGITS, 2>(codes, digits + tile * stride, stride, height, step, steps, sums);
      add_tiles<DIGITS, 2>(sums, height, factors + tile * height * 2, scale, zero, out + tile * height * ROWS);
    }
    if (tile < tiles) {
      multiply_tiles_of_group<DIGITS, 1>(codes, digits + tile * stride, stride, height, step, steps, sums);
      add_tiles<DIGITS, 1>(sums, height, factors + tile * height * 2, scale, zero, out + tile * height * ROWS);
    }
  }
}

}  // namespace alphaq

#endif
