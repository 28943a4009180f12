// What a block is multiplied with, by the way that is fastest for so many tokens.
#pragma once

#include <optional>

#include "multiply.h"
#include "tiles.h"

namespace alphaq {

// Rows `rows` of x, and where it pays the same in tiles.
struct Operand {
  const Digits& x;
  const int32_t* rows;
  int64_t count;
  const Tiles* tiles;
};

// out [count, ROWS] = the operand times the transpose of the block. With tiles: [padded, ROWS], within TileShapes.
template <int BITS, int DIGITS>
void multiply_block(const Block& block, const Operand& x, float* out) {
#if defined(__AMX_INT8__)
  if (x.tiles) return multiply_tiles<BITS, DIGITS>(block, *x.tiles, out);
#endif
  // Up to two tokens, to take a code out of its word where it is multiplied costs less than a tile.
  if (x.count == 1) return multiply_few<BITS, DIGITS, 1>(block, x.x, x.rows, out);
  if (x.count == 2) return multiply_few<BITS, DIGITS, 2>(block, x.x, x.rows, out);
  multiply_many<BITS, DIGITS>(block, x.x, x.rows, x.count, out);
}

using Multiply = void (*)(const Block&, const Operand&, float*);

template <int DIGITS>
Multiply multiply_of(int bits) {
  constexpr Multiply functions[] = {multiply_block<1, DIGITS>, multiply_block<2, DIGITS>, multiply_block<3, DIGITS>,
                                    multiply_block<4, DIGITS>, multiply_block<5, DIGITS>, multiply_block<6, DIGITS>,
                                    multiply_block<7, DIGITS>, multiply_block<8, DIGITS>};
  return functions[bits - 1];
}

INLINE Multiply multiply_of(int bits, int digits) {
  return digits == 1 ? multiply_of<1>(bits) : digits == 2 ? multiply_of<2>(bits) : multiply_of<3>(bits);
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
