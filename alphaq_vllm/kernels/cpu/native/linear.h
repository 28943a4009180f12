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
    return {(int)num_bits, packed + index * ROWS * K * num_bits / 8, nullptr, scales + index * ROWS * (K / group_size)};
  }
};

// x and out are of `dtype`.
struct LinearCall {
  const void* x;
  void* out;
  Dtype dtype;
  int64_t num_tokens;
  int64_t digits;
  Threads threads;
};

// out [rows, N] = x [rows, K] times the transpose of the matrix.
inline void multiply_rows(const Linear& weights, const LinearCall& call, const void* x, int64_t num_rows, void* out) {
  const Routes rows(num_rows);
  const int64_t digits = rows.digits(call.dtype, call.digits);
  Workspace& space = workspace();
  space.reserve(Operands::bytes(rows, num_rows, weights.K, weights.group_size, digits));
  const Source source{call.dtype, x, num_rows, weights.K, weights.group_size};
  const Operands operands(call.threads, rows, source, rows.index, digits, space);
  const int64_t blocks = weights.N / ROWS, per_unit = blocks_per_unit(blocks, call.threads.count, blocks);
  const int64_t units = (blocks + per_unit - 1) / per_unit;
  parallel(call.threads, units * rows.pieces.size(), [&](int64_t unit) {
    const Routes::Piece& piece = rows.pieces[unit / units];
    const Operand operand = operands[unit / units];
    const Ready ready(operand);
    const int64_t first = unit % units * per_unit, last = std::min(first + per_unit, blocks);
    for (int64_t block = first; block < last; block += BLOCKS_AT_ONCE) {
      const int64_t count = std::min<int64_t>(last - block, BLOCKS_AT_ONCE);
      alignas(64) float products[BLOCKS_AT_ONCE][ROUTES_AT_ONCE * ROWS];
      float* to[BLOCKS_AT_ONCE];
      Block together[BLOCKS_AT_ONCE];
      for (int64_t b = 0; b < count; ++b) to[b] = products[b], together[b] = weights.block(block + b);
      multiply(together, count, operand, to);
      for (int64_t b = 0; b < count; ++b) {
        for (int64_t i = 0; i < piece.count; ++i) {
          for (int row = 0; row < ROWS; row += LANES) {
            const int64_t at = (piece.first + i) * weights.N + (block + b) * ROWS + row;
            store_as(call.dtype, out, at, load<F32>(products[b] + i * ROWS + row));
          }
        }
      }
    }
  });
}

inline Result linear(const Linear& weights, const LinearCall& call) {
  const int64_t most = std::max<int64_t>(1, WORKSPACE / (weights.K * (call.digits + 1) * 2));
  for (int64_t first = 0; first < call.num_tokens; first += most) {
    multiply_rows(weights, call, row_of(call.dtype, call.x, first, weights.K), std::min(most, call.num_tokens - first),
                  row_of(call.dtype, call.out, first, weights.N));
  }
  return DONE;
}

}  // namespace alphaq
