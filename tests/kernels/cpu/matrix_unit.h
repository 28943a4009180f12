// The instructions of AMX that tiles.h has, computed without them: included before all else, on processors with
// AVX-512 and VNNI.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define __AMX_INT8__ 1
#define __AMX_BF16__ 1

namespace matrix_unit {

struct alignas(64) Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

inline thread_local Config config;
inline thread_local uint8_t tiles[8][16][64];

inline void load_config(const void* from) { std::memcpy(&config, from, sizeof config); }
inline void store_config(void* to) { std::memcpy(to, &config, sizeof config); }
inline void release() { config = {}; }
inline void zero(int tile) { std::memset(tiles[tile], 0, sizeof tiles[tile]); }

inline void load(int tile, const void* from, int64_t stride) {
  zero(tile);
  for (int row = 0; row < config.rows[tile]; ++row) {
    std::memcpy(tiles[tile][row], (const uint8_t*)from + row * stride, config.row_bytes[tile]);
  }
}

inline void store(int tile, void* to, int64_t stride) {
  for (int row = 0; row < config.rows[tile]; ++row) {
    std::memcpy((uint8_t*)to + row * stride, tiles[tile][row], config.row_bytes[tile]);
  }
}

// Signed bytes of `a` times unsigned ones of `b`, by fours.
inline void multiply_bytes(int sums, int a, int b) {
  for (int m = 0; m < config.rows[sums]; ++m) {
    for (int k = 0; k < config.rows[b]; ++k) {
      for (int n = 0; n < config.row_bytes[sums] / 4; ++n) {
        int32_t sum;
        std::memcpy(&sum, tiles[sums][m] + 4 * n, 4);
        for (int i = 0; i < 4; ++i) sum += (int8_t)tiles[a][m][4 * k + i] * tiles[b][k][4 * n + i];
        std::memcpy(tiles[sums][m] + 4 * n, &sum, 4);
      }
    }
  }
}

inline float bfloat16(const uint8_t* from) {
  uint32_t bits = 0;
  std::memcpy((uint8_t*)&bits + 2, from, 2);
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline void multiply_bfloat16(int sums, int a, int b) {
  for (int m = 0; m < config.rows[sums]; ++m) {
    for (int k = 0; k < config.rows[b]; ++k) {
      for (int n = 0; n < config.row_bytes[sums] / 4; ++n) {
        float sum;
        std::memcpy(&sum, tiles[sums][m] + 4 * n, 4);
        for (int i = 0; i < 2; ++i) {
          sum += bfloat16(tiles[a][m] + 4 * k + 2 * i) * bfloat16(tiles[b][k] + 4 * n + 2 * i);
        }
        std::memcpy(tiles[sums][m] + 4 * n, &sum, 4);
      }
    }
  }
}

// To nearest even, `low` first.
inline __m512i to_bfloat16(__m512 high, __m512 low) {
  auto rounded = [](__m512 values) {
    const __m512i bits = (__m512i)values, odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_cvtepi32_epi16(
        _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16));
  };
  return _mm512_inserti64x4(_mm512_castsi256_si512(rounded(low)), rounded(high), 1);
}

}  // namespace matrix_unit

#undef _tile_loadconfig
#undef _tile_storeconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbsud
#undef _tile_dpbf16ps
#define _tile_loadconfig(from) matrix_unit::load_config(from)
#define _tile_storeconfig(to) matrix_unit::store_config(to)
#define _tile_release() matrix_unit::release()
#define _tile_zero(tile) matrix_unit::zero(tile)
#define _tile_loadd(tile, from, stride) matrix_unit::load(tile, from, stride)
#define _tile_stored(tile, to, stride) matrix_unit::store(tile, to, stride)
#define _tile_dpbsud(sums, a, b) matrix_unit::multiply_bytes(sums, a, b)
#define _tile_dpbf16ps(sums, a, b) matrix_unit::multiply_bfloat16(sums, a, b)
#define _mm512_cvtne2ps_pbh(high, low) matrix_unit::to_bfloat16(high, low)
