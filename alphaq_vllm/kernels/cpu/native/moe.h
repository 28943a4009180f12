// The routed experts of one layer.
#pragma once

#include "result.h"
#include "routes.h"

namespace alphaq {

// One stem's matrices [N, K] of all experts, `projections` each, in the order of layout.h.
struct Experts {
  const uint8_t* packed;
  const uint16_t* scales;
  const uint8_t* grids;
  const int32_t* num_bits;
  const int64_t* offsets;
  // [E, projections, N] of bias_dtype, or null.
  const void* bias;
  Dtype bias_dtype;
  int64_t projections;
  int64_t N;
  int64_t K;
  int64_t group_size;

  Block block(int64_t expert, int64_t projection, int64_t index) const {
    const int64_t matrix = expert * projections + projection;
    return {num_bits[matrix], packed + 4 * offsets[matrix] + index * ROWS * K * num_bits[matrix] / 8,
            grids + (matrix * N + index * ROWS) * (K / group_size), nullptr};
  }

  // The scales of a block's rows, and their biases: zeros if there are none.
  void load_rows(int64_t expert, int64_t projection, int64_t index, float (&row_scales)[ROWS],
                 float (&row_biases)[ROWS]) const {
    const int64_t first = (expert * projections + projection) * N + index * ROWS;
    for (int row = 0; row < ROWS; row += LANES) {
      store(row_scales + row, widen_bfloat16(scales + first + row));
      store(row_biases + row, bias ? load_as(bias_dtype, bias, first + row) : F32{});
    }
  }
};

// One call. Ids are local, below 0 for routes to be skipped. x and out are of `dtype`.
struct Call {
  const void* x;
  const float* topk_weights;
  const int32_t* expert_ids;
  void* out;
  Dtype dtype;
  int64_t num_tokens;
  int64_t top_k;
  int64_t num_experts;
  int64_t weight_on_input;
  int64_t digits;
  Gate gate;
  Threads threads;
};

// hidden [routes, N of w13] of a dtype = activated products of x with gate and up, or with up alone.
//
// Blocks are multiplied together: gate's and up's of the same rows, or those of up.
template <bool GATED>
void multiply_first(const Experts& w13, const Call& call, const Routes& routes, const Operands& x, Dtype hidden_dtype,
                    void* hidden) {
  const int64_t blocks = w13.N / ROWS;
  const int64_t per_unit = blocks_per_unit(blocks * routes.pieces.size(), call.threads.count, 4);
  const int64_t units = (blocks + per_unit - 1) / per_unit;
  parallel(call.threads, units * routes.pieces.size(), [&](int64_t unit) {
    const Routes::Piece piece = routes.pieces[unit / units];
    const Operand operand = x[unit / units];
    const Ready ready(operand);
    const int64_t first = unit % units * per_unit, last = std::min(first + per_unit, blocks);
    constexpr int64_t STEMS = GATED ? 2 : 1;
    for (int64_t block = first; block < last; block += BLOCKS_AT_ONCE / STEMS) {
      const int64_t count = std::min<int64_t>(last - block, BLOCKS_AT_ONCE / STEMS);
      alignas(64) float products[BLOCKS_AT_ONCE][ROUTES_AT_ONCE * ROWS];
      alignas(64) float scales[BLOCKS_AT_ONCE][ROWS], biases[BLOCKS_AT_ONCE][ROWS];
      float* to[BLOCKS_AT_ONCE];
      Block together[BLOCKS_AT_ONCE];
      for (int64_t b = 0; b < count * STEMS; ++b) {
        const int64_t projection = b % STEMS, index = block + b / STEMS;
        to[b] = products[b];
        together[b] = w13.block(piece.expert, projection, index);
        w13.load_rows(piece.expert, projection, index, scales[b], biases[b]);
      }
      multiply(together, count * STEMS, operand, to);
      for (int64_t i = 0; i < piece.count; ++i) {
        const float weight = call.weight_on_input ? routes.weight[piece.first + i] : 1;
        const int64_t at = (piece.first + i) * w13.N + block * ROWS;
        auto product = [&](int64_t b, int row) INLINE_LAMBDA {
          const F32 scale = load<F32>(scales[b] + row) * weight;
          return load<F32>(products[b] + i * ROWS + row) * scale + load<F32>(biases[b] + row);
        };
        for (int64_t b = 0; b < count; ++b) {
          for (int row = 0; row < ROWS; row += LANES) {
            if constexpr (GATED) {
              const F32 value = call.gate.apply(product(2 * b, row), product(2 * b + 1, row));
              store_as(hidden_dtype, hidden, at + b * ROWS + row, value);
            } else {
              store_as(hidden_dtype, hidden, at + b * ROWS + row, call.gate.activate(product(b, row)));
            }
          }
        }
      }
    }
  });
}

// Add to `sums` [tokens, N of w2] what up to BLOCKS_AT_ONCE blocks have for one piece's tokens.
inline void add_down(const Experts& w2, const Call& call, const Routes& routes, const Routes::Piece& piece,
                     const Operand& hidden, int64_t first, int64_t count, float* sums) {
  alignas(64) float products[BLOCKS_AT_ONCE][ROUTES_AT_ONCE * ROWS], scales[ROWS], biases[ROWS];
  float* to[BLOCKS_AT_ONCE];
  Block blocks[BLOCKS_AT_ONCE];
  for (int64_t b = 0; b < count; ++b) to[b] = products[b], blocks[b] = w2.block(piece.expert, 0, first + b);
  multiply(blocks, count, hidden, to);
  for (int64_t block = 0; block < count; ++block) {
    w2.load_rows(piece.expert, 0, first + block, scales, biases);
    for (int64_t i = 0; i < piece.count; ++i) {
      const int64_t route = piece.first + i;
      const float weight = call.weight_on_input ? 1 : routes.weight[route];
      float* at = sums + routes.token[route] * w2.N + (first + block) * ROWS;
      for (int row = 0; row < ROWS; row += LANES) {
        const F32 product = load<F32>(products[block] + i * ROWS + row);
        const F32 scaled = product * load<F32>(scales + row) + load<F32>(biases + row);
        store(at + row, load<F32>(at + row) + scaled * weight);
      }
    }
  }
}

// out [tokens, N of w2] = sum over each token's routes of weight * (products of hidden with down), added up in `sums`.
//
// A thread has the same rows of all experts, which it takes in order, so that sums do not depend on the threads.
inline void multiply_down(const Experts& w2, const Call& call, const Routes& routes, const Operands& hidden,
                          int64_t num_tokens, float* sums, void* out) {
  const int64_t blocks = w2.N / ROWS;
  const int64_t per_unit = blocks_per_unit(blocks, call.threads.count, blocks);
  parallel(call.threads, (blocks + per_unit - 1) / per_unit, [&](int64_t unit) {
    const int64_t first = unit * per_unit, last = std::min(first + per_unit, blocks);
    for (int64_t token = 0; token < num_tokens; ++token) {
      std::memset(sums + token * w2.N + first * ROWS, 0, (last - first) * ROWS * sizeof *sums);
    }
    for (size_t piece = 0; piece < routes.pieces.size(); ++piece) {
      const Operand operand = hidden[piece];
      const Ready ready(operand);
      for (int64_t block = first; block < last; block += BLOCKS_AT_ONCE) {
        const int64_t count = std::min<int64_t>(last - block, BLOCKS_AT_ONCE);
        add_down(w2, call, routes, routes.pieces[piece], operand, block, count, sums);
      }
    }
    for (int64_t token = 0; token < num_tokens; ++token) {
      for (int64_t i = token * w2.N + first * ROWS; i < token * w2.N + last * ROWS; i += LANES) {
        store_as(call.dtype, out, i, load<F32>(sums + i));
      }
    }
  });
}

// What a token takes of the workspace, about.
inline int64_t bytes_per_token(const Experts& w13, const Call& call) {
  // Digits and factors, and where there are, whole integers.
  const int64_t top_k = call.top_k, floats = sizeof(float), digits = call.digits + 1 + (HAS_PAIRS ? 2 : 0);
  if (!HAS_TILES) return w13.K * (digits + floats) + w13.N * top_k * (floats + digits);
  const bool halves = call.dtype == BFLOAT16 && call.num_tokens * top_k >= FEWEST_IN_HALVES * call.num_experts;
  if (halves) return w13.K * (top_k * 2 + floats) + w13.N * top_k * (2 + 2);
  return w13.K * (digits * (1 + top_k) + floats) + w13.N * top_k * (floats + 2 * digits);
}

inline Result fused_moe(const Experts& w13, const Experts& w2, const Call& call) {
  for (int64_t i = 0; i < call.num_tokens * call.top_k; ++i) {
    if (call.expert_ids[i] >= call.num_experts) return UNKNOWN_EXPERT;
  }
  const int64_t per_token = bytes_per_token(w13, call);
  const int64_t most = std::max<int64_t>(1, WORKSPACE / per_token);
  for (int64_t first = 0; first < call.num_tokens; first += most) {
    const int64_t count = std::min(most, call.num_tokens - first);
    const Routes routes(call.expert_ids + first * call.top_k, call.topk_weights + first * call.top_k, count, call.top_k,
                        call.num_experts);
    const int64_t num_routes = routes.token.size(), digits = routes.digits(call.dtype, call.digits);
    Workspace& space = workspace();
    space.reserve(Operands::bytes(routes, count, w13.K, w13.group_size, digits) +
                  Operands::bytes(routes, num_routes, w2.K, w2.group_size, digits) +
                  num_routes * w13.N * (digits == HALVES ? 2 : 4) + count * w2.N * sizeof(float) + 128);
    const Source x{call.dtype, row_of(call.dtype, call.x, first, w13.K), count, w13.K, w13.group_size};
    const Dtype hidden_dtype = digits == HALVES ? BFLOAT16 : FLOAT32;
    void* hidden = space.take<uint8_t>(num_routes * w13.N * (digits == HALVES ? 2 : 4));
    const Operands first_operands(call.threads, routes, x, routes.token, digits, space);
    const auto multiply_first_of = w13.projections == 2 ? multiply_first<true> : multiply_first<false>;
    multiply_first_of(w13, call, routes, first_operands, hidden_dtype, hidden);
    const Source h{hidden_dtype, hidden, num_routes, w2.K, w2.group_size};
    float* sums = space.take<float>(count * w2.N);
    multiply_down(w2, call, routes, Operands(call.threads, routes, h, routes.index, digits, space), count, sums,
                  row_of(call.dtype, call.out, first, w2.N));
  }
  return DONE;
}

}  // namespace alphaq
