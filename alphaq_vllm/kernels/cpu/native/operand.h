// What blocks are multiplied with, by the way that is fastest for so many tokens.
#pragma once

#include <optional>

#include "slabs.h"
#include "tiles.h"

namespace alphaq {

// Rows `rows` of x as digits, and where it pays the same in tiles; tiles alone if they are of halves.
struct Operand {
  const Digits& x;
  const int32_t* rows;
  int64_t count;
  const Tiles* tiles;
};

// out [count, ROWS] = the operand times the transpose of the block.
template <int BITS, int DIGITS>
void multiply_block(const Block& block, const Operand& x, float* out) {
  // Up to two tokens, to take a code out of its word where it is multiplied costs less than a tile.
  if (x.count == 1) return multiply_few<BITS, DIGITS, 1>(block, x.x, x.rows, out);
  if (x.count == 2) return multiply_few<BITS, DIGITS, 2>(block, x.x, x.rows, out);
  // Of more, multiply_digits has pairs multiplied together.
  if constexpr (!(HAS_PAIRS && DIGITS == 2)) multiply_many<BITS, DIGITS>(block, x.x, x.rows, x.count, out);
}

template <int DIGITS>
INLINE void multiply_block(const Block& block, const Operand& x, float* out) {
  using Multiply = void (*)(const Block&, const Operand&, float*);
  constexpr Multiply functions[] = {multiply_block<1, DIGITS>, multiply_block<2, DIGITS>, multiply_block<3, DIGITS>,
                                    multiply_block<4, DIGITS>, multiply_block<5, DIGITS>, multiply_block<6, DIGITS>,
                                    multiply_block<7, DIGITS>, multiply_block<8, DIGITS>};
  functions[block.bits - 1](block, x, out);
}

// Up to two tokens, and what is left of blocks, are multiplied one block after the other.
template <int DIGITS, int BLOCKS>
INLINE void multiply_digits(const Block* blocks, const Operand& x, float* const* out) {
#if defined(__AVX2__)
  if constexpr (HAS_PAIRS ? DIGITS == 2 : BLOCKS > 1) {
    // Two parts of a block share a load as well as two blocks do.
    constexpr int TOGETHER = HAS_PAIRS && PARTS > 1 ? 1 : BLOCKS;
    if (x.count > 2) {
      for (int b = 0; b < BLOCKS; b += TOGETHER) {
        multiply_together<DIGITS, TOGETHER>(blocks + b, x.x, x.rows, x.count, out + b);
      }
      return;
    }
  }
#endif
  for (int b = 0; b < BLOCKS; ++b) multiply_block<DIGITS>(blocks[b], x, out[b]);
}

template <int BLOCKS>
INLINE void multiply_blocks(const Block* blocks, const Operand& x, float* const* out) {
#if defined(__AMX_INT8__)
  if (x.tiles) {
    if (x.tiles->digits == HALVES) return multiply_halves<BLOCKS>(blocks, *x.tiles, out);
    if (x.tiles->digits == 1) return multiply_tiles<1, BLOCKS>(blocks, *x.tiles, out);
    if (x.tiles->digits == 2) return multiply_tiles<2, BLOCKS>(blocks, *x.tiles, out);
    return multiply_tiles<3, BLOCKS>(blocks, *x.tiles, out);
  }
#endif
  if (x.x.count == 1) multiply_digits<1, BLOCKS>(blocks, x, out);
  if (x.x.count == 2) multiply_digits<2, BLOCKS>(blocks, x, out);
  if (x.x.count == 3) multiply_digits<3, BLOCKS>(blocks, x, out);
}

// out [count][tokens, ROWS] = the operand times the transposes of up to BLOCKS_AT_ONCE blocks. Of a thread that is Ready
// for it.
INLINE void multiply(const Block* blocks, int64_t count, const Operand& x, float* const* out) {
  int64_t done = 0;
  for (; done + BLOCKS_AT_ONCE <= count; done += BLOCKS_AT_ONCE) {
    multiply_blocks<BLOCKS_AT_ONCE>(blocks + done, x, out + done);
  }
  for (; done + 2 <= count; done += 2) multiply_blocks<2>(blocks + done, x, out + done);
  if (done < count) multiply_blocks<1>(blocks + done, x, out + done);
}

// Readies a thread for products with an operand while it lives.
class Ready {
 public:
  explicit Ready([[maybe_unused]] const Operand& x) {
#if defined(__AMX_INT8__)
    if (x.tiles) shapes_.emplace(x.tiles->height, x.tiles->step());
#endif
  }

#if defined(__AMX_INT8__)
 private:
  std::optional<TileShapes> shapes_;
#endif
};

}  // namespace alphaq
