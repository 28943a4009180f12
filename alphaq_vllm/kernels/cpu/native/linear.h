// A layer of one matrix.
#pragma once

#include "result.h"
#include "routes.h"

namespace alphaq {

// A matrix [N, K] in the order of layout.h, with zero points of 2^(num_bits - 1).
struct Linear {
  const uint8_t* packed;
  const uint16_t* scales;
  int64_t num_bits;
  int64_t N;
  int64_t K;
  int64_t group_size;

  Block block(int64_t index) const {
    return {packed + index * ROWS * K * num_bits / 8, scales + index * ROWS * (K / group_size), nullptr};
  }
};

struct LinearCall {
  const float* x;
  float* out;
  int64_t num_tokens;
  int64_t digits;
  Threads threads;
};

inline Result linear(const Linear& weights, const LinearCall& call) {
  const Routes rows(call.num_tokens);
  Workspace& space = workspace();
  space.reserve(digit_bytes(call.num_tokens, weights.K, weights.group_size, call.digits) +
                Operands::bytes(rows, weights.K, weights.group_size, call.digits));
  const Digits x = take_digits(space, call.num_tokens, weights.K, weights.group_size, call.digits);
  quantize_rows(call.threads, call.x, call.num_tokens, x);
  const Operands operands(call.threads, rows, x, rows.index, space);
  const Multiply multiply = multiply_of(weights.num_bits, call.digits);
  const int64_t blocks = weights.N / ROWS, per_unit = blocks_per_unit(blocks, call.threads.count, blocks);
  const int64_t units = (blocks + per_unit - 1) / per_unit;
  parallel(call.threads, units * rows.pieces.size(), [&](int64_t unit) {
    const Routes::Piece& piece = rows.pieces[unit / units];
    const Operand operand = operands[unit / units];
    const Ready ready(operand);
    const int64_t first = unit % units * per_unit;
    for (int64_t block = first; block < std::min(first + per_unit, blocks); ++block) {
      alignas(64) float products[ROUTES_AT_ONCE * ROWS];
      multiply(weights.block(block), operand, products);
      for (int64_t i = 0; i < piece.count; ++i) {
        std::memcpy(call.out + (piece.first + i) * weights.N + block * ROWS, products + i * ROWS,
                    ROWS * sizeof *products);
      }
    }
  });
  return DONE;
}

}  // namespace alphaq
