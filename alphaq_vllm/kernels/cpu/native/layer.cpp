// A layer's routed experts on packed weights, linear layers, and the order that both want: to be called through ctypes.
#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "operand.h"
#include "threads.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace alphaq {
namespace {

// Bytes of activations that are kept at a time: tokens are computed in so many pieces as this takes.
constexpr int64_t WORKSPACE = 64 << 20;
// Routes of an expert that are multiplied with a block at once: their activations stay in the second cache.
constexpr int64_t ROUTES_AT_ONCE = 128;

// One stem's matrices [N, K] of all experts, `projections` each, in the order of layout.h.
struct Experts {
  const uint8_t* packed;
  const uint16_t* scales;
  const uint16_t* zero_points;
  const int32_t* num_bits;
  const int64_t* offsets;
  // [E, projections, N] of bias_dtype, or null.
  const void* bias;
  int64_t bias_dtype;
  int64_t projections;
  int64_t N;
  int64_t K;
  int64_t group_size;

  int bits(int64_t expert, int64_t projection) const { return num_bits[expert * projections + projection]; }

  Block block(int64_t expert, int64_t projection, int64_t index) const {
    const int64_t matrix = expert * projections + projection, groups = K / group_size;
    const int64_t first_group = (matrix * N + index * ROWS) * groups;
    return {packed + 4 * offsets[matrix] + index * ROWS * K * num_bits[matrix] / 8, scales + first_group,
            zero_points + first_group};
  }

  // The biases of a block's rows, zeros if there are none.
  void load_bias(int64_t expert, int64_t projection, int64_t index, float (&to)[ROWS]) const {
    const int64_t first = (expert * projections + projection) * N + index * ROWS;
    for (int row = 0; row < ROWS; row += LANES) {
      F32 values{};
      if (bias && bias_dtype == 0) values = load<F32>((const float*)bias + first + row);
      if (bias && bias_dtype == 1) values = widen_bfloat16((const uint16_t*)bias + first + row);
      if (bias && bias_dtype == 2) values = widen_float16((const uint16_t*)bias + first + row);
      store(to + row, values);
    }
  }
};

// One call. Ids are local, below 0 for routes to be skipped.
struct Call {
  const float* x;
  const float* topk_weights;
  const int32_t* expert_ids;
  float* out;
  int64_t num_tokens;
  int64_t top_k;
  int64_t num_experts;
  int64_t weight_on_input;
  int64_t digits;
  Gate gate;
  Threads threads;
};

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

enum Result { DONE, UNKNOWN_EXPERT, OUT_OF_MEMORY };

// Memory of one thread, kept from call to call.
class Workspace {
 public:
  template <typename Value>
  Value* take(int64_t count) {
    used_ = (used_ + 63) / 64 * 64;
    Value* taken = reinterpret_cast<Value*>(memory_.get() + used_);
    used_ += count * sizeof(Value);
    return taken;
  }

  void reserve(int64_t bytes) {
    used_ = 0;
    if (bytes <= size_) return;
    memory_.reset();
    size_ = 0;
    memory_.reset(static_cast<uint8_t*>(::operator new(bytes, std::align_val_t{64})));
    size_ = bytes;
  }

 private:
  struct Free {
    void operator()(uint8_t* memory) const { ::operator delete(memory, std::align_val_t{64}); }
  };
  std::unique_ptr<uint8_t, Free> memory_;
  int64_t size_ = 0, used_ = 0;
};

Workspace& workspace() {
  static thread_local Workspace workspace;
  return workspace;
}

// What take_digits takes, and what Tiles take for so many padded tokens.
int64_t digit_bytes(int64_t rows, int64_t columns, int64_t group_size, int64_t digits) {
  return rows * (columns * digits + columns / group_size * 2 * sizeof(float)) + 128;
}

Digits take_digits(Workspace& from, int64_t rows, int64_t columns, int64_t group_size, int64_t count) {
  Digits digits{nullptr, nullptr, columns, group_size, (int)count};
  digits.digits = from.take<int8_t>(rows * columns * count);
  digits.factors = from.take<float>(rows * digits.groups() * 2);
  return digits;
}

void quantize_rows(const Threads& threads, const float* x, int64_t rows, const Digits& to) {
  // So many rows are work for a thread.
  const int64_t piece = std::max<int64_t>(1, 16384 / to.columns);
  parallel(threads, (rows + piece - 1) / piece, [&](int64_t unit) {
    for (int64_t i = unit * piece; i < std::min(rows, (unit + 1) * piece); ++i) {
      const float* row = x + i * to.columns;
      if (to.count == 1) quantize_row<1>(row, to, i);
      if (to.count == 2) quantize_row<2>(row, to, i);
      if (to.count == 3) quantize_row<3>(row, to, i);
    }
  });
}

// The routes of some tokens, expert by expert.
struct Routes {
  // Of each route.
  std::vector<int32_t> token;
  std::vector<int32_t> index;
  std::vector<float> weight;
  struct Piece {
    int32_t expert;
    int32_t first;
    int32_t count;
  };
  // Routes of one expert, ROUTES_AT_ONCE at most, ascending.
  std::vector<Piece> pieces;

  // All rows, of the one matrix that there is.
  explicit Routes(int64_t rows) : index(rows) {
    for (int64_t i = 0; i < rows; ++i) index[i] = i;
    add_pieces(0, 0, rows);
  }

  Routes(const Call& call, int64_t first, int64_t count) {
    std::vector<int32_t> end(call.num_experts + 1);
    const int32_t* ids = call.expert_ids + first * call.top_k;
    for (int64_t i = 0; i < count * call.top_k; ++i) {
      if (ids[i] >= 0) ++end[ids[i] + 1];
    }
    for (int64_t expert = 0; expert < call.num_experts; ++expert) {
      add_pieces(expert, end[expert], end[expert + 1]);
      end[expert + 1] += end[expert];
    }
    token.resize(end[call.num_experts]);
    index.resize(token.size());
    weight.resize(token.size());
    for (int64_t i = 0; i < count * call.top_k; ++i) {
      if (ids[i] < 0) continue;
      const int32_t route = end[ids[i]]++;
      token[route] = i / call.top_k;
      index[route] = route;
      weight[route] = call.topk_weights[first * call.top_k + i];
    }
  }

 private:
  void add_pieces(int32_t expert, int32_t first, int32_t count) {
    for (int32_t done = 0; done < count; done += ROUTES_AT_ONCE) {
      pieces.push_back({expert, first + done, std::min<int32_t>(count - done, ROUTES_AT_ONCE)});
    }
  }
};

// What the experts are multiplied with, piece by piece.
class Operands {
 public:
  // rows: of x, for each route.
  Operands(const Threads& threads, const Routes& routes, const Digits& x, const std::vector<int32_t>& rows,
           Workspace& space)
      : routes_(routes), x_(x), rows_(rows) {
    if (!HAS_TILES) return;
    struct Tile {
      int64_t piece;
      int64_t index;
    };
    std::vector<Tile> all;
    for (const Routes::Piece& piece : routes.pieces) {
      Tiles tiles(x, piece.count);
      if (piece.count >= FEWEST_IN_TILES) {
        tiles.digits = space.take<int8_t>(tiles.padded * x.columns * x.count);
        tiles.factors = space.take<float>(tiles.padded * x.groups() * 2);
        for (int64_t i = 0; i < tiles.padded / tiles.height; ++i) all.push_back({(int64_t)tiles_.size(), i});
      }
      tiles_.push_back(tiles);
    }
    parallel(threads, all.size(), [&](int64_t i) {
      const Routes::Piece& piece = routes.pieces[all[i].piece];
      tiles_[all[i].piece].gather(x, &rows[piece.first], piece.count, all[i].index);
    });
  }

  Operand operator[](int64_t piece) const {
    const Routes::Piece& routes = routes_.pieces[piece];
    const Tiles* tiles = HAS_TILES && tiles_[piece].digits ? &tiles_[piece] : nullptr;
    return {x_, &rows_[routes.first], routes.count, tiles};
  }

  // What the constructor takes from the workspace.
  static int64_t bytes(const Routes& routes, int64_t columns, int64_t group_size, int64_t digits) {
    int64_t total = 0;
    for (const Routes::Piece& piece : routes.pieces) {
      if (HAS_TILES && piece.count >= FEWEST_IN_TILES) {
        const Tiles tiles({nullptr, nullptr, columns, group_size, (int)digits}, piece.count);
        total += digit_bytes(tiles.padded, columns, group_size, digits);
      }
    }
    return total;
  }

 private:
  const Routes& routes_;
  const Digits& x_;
  const std::vector<int32_t>& rows_;
  std::vector<Tiles> tiles_;
};

// How many blocks of rows make a unit of work, if there are so many of them in all.
int64_t blocks_per_unit(int64_t blocks, int64_t threads, int64_t most) {
  return std::clamp<int64_t>(blocks / (threads * 8), 1, most);
}

// hidden [routes, N of w13] = gated products of x with gate and up.
void multiply_gate_up(const Experts& w13, const Call& call, const Routes& routes, const Operands& x, float* hidden) {
  const int64_t blocks = w13.N / ROWS;
  const int64_t per_unit = blocks_per_unit(blocks * routes.pieces.size(), call.threads.count, 4);
  const int64_t units = (blocks + per_unit - 1) / per_unit;
  parallel(call.threads, units * routes.pieces.size(), [&](int64_t unit) {
    const Routes::Piece piece = routes.pieces[unit / units];
    const Operand operand = x[unit / units];
    const Ready ready(operand);
    const int64_t first = unit % units * per_unit;
    Multiply multiply[2];
    for (int p = 0; p < 2; ++p) multiply[p] = multiply_of(w13.bits(piece.expert, p), call.digits);
    for (int64_t block = first; block < std::min(first + per_unit, blocks); ++block) {
      alignas(64) float products[2][ROUTES_AT_ONCE * ROWS], biases[2][ROWS];
      for (int p = 0; p < 2; ++p) {
        multiply[p](w13.block(piece.expert, p, block), operand, products[p]);
        w13.load_bias(piece.expert, p, block, biases[p]);
      }
      for (int64_t i = 0; i < piece.count; ++i) {
        const float weight = call.weight_on_input ? routes.weight[piece.first + i] : 1;
        float* to = hidden + (piece.first + i) * w13.N + block * ROWS;
        for (int row = 0; row < ROWS; row += LANES) {
          const F32 gate = load<F32>(products[0] + i * ROWS + row) * weight + load<F32>(biases[0] + row);
          const F32 up = load<F32>(products[1] + i * ROWS + row) * weight + load<F32>(biases[1] + row);
          store(to + row, call.gate.apply(gate, up));
        }
      }
    }
  });
}

// out [tokens, N of w2] = sum over each token's routes of weight * (products of hidden with down).
//
// A thread has the same rows of all experts, which it takes in order, so that sums do not depend on the threads.
void multiply_down(const Experts& w2, const Call& call, const Routes& routes, const Operands& hidden, float* out,
                   int64_t num_tokens) {
  const int64_t blocks = w2.N / ROWS;
  const int64_t per_unit = blocks_per_unit(blocks, call.threads.count, blocks);
  parallel(call.threads, (blocks + per_unit - 1) / per_unit, [&](int64_t unit) {
    const int64_t first = unit * per_unit, last = std::min(first + per_unit, blocks);
    for (int64_t token = 0; token < num_tokens; ++token) {
      std::memset(out + token * w2.N + first * ROWS, 0, (last - first) * ROWS * sizeof *out);
    }
    for (size_t i = 0; i < routes.pieces.size(); ++i) {
      const Routes::Piece& piece = routes.pieces[i];
      const Operand operand = hidden[i];
      const Ready ready(operand);
      const Multiply multiply = multiply_of(w2.bits(piece.expert, 0), call.digits);
      for (int64_t block = first; block < last; ++block) {
        alignas(64) float products[ROUTES_AT_ONCE * ROWS], bias[ROWS];
        multiply(w2.block(piece.expert, 0, block), operand, products);
        w2.load_bias(piece.expert, 0, block, bias);
        for (int64_t i = 0; i < piece.count; ++i) {
          const int64_t route = piece.first + i;
          const float weight = call.weight_on_input ? 1 : routes.weight[route];
          float* to = out + routes.token[route] * w2.N + block * ROWS;
          for (int row = 0; row < ROWS; row += LANES) {
            store(to + row, load<F32>(to + row) + (load<F32>(products + i * ROWS + row) + load<F32>(bias + row)) * weight);
          }
        }
      }
    }
  });
}

Result linear(const Linear& weights, const LinearCall& call) {
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
        std::memcpy(call.out + (piece.first + i) * weights.N + block * ROWS, products + i * ROWS, ROWS * sizeof *products);
      }
    }
  });
  return DONE;
}

template <bool LINEAR>
void reorder(uint8_t* packed, int64_t rows, int64_t columns, int bits, const Threads& threads) {
  parallel(threads, rows / ROWS, [&](int64_t block) {
    const int64_t bytes = ROWS * columns * bits / 8;
    std::vector<uint8_t> scratch(bytes);
    uint8_t* at = packed + block * bytes;
    if constexpr (LINEAR) {
      return bits == 4 ? reorder_block<4, true>(at, scratch.data(), columns)
                       : reorder_block<8, true>(at, scratch.data(), columns);
    } else {
      using Reorder = void (*)(uint8_t*, uint8_t*, int64_t);
      constexpr Reorder functions[] = {reorder_block<1, false>, reorder_block<2, false>, reorder_block<3, false>,
                                       reorder_block<4, false>, reorder_block<5, false>, reorder_block<6, false>,
                                       reorder_block<7, false>, reorder_block<8, false>};
      functions[bits - 1](at, scratch.data(), columns);
    }
  });
}

// What `work` returns, for callers that know no exceptions.
template <typename Work>
Result result_of(Work work) {
  try {
    return work();
  } catch (const std::bad_alloc&) {
    return OUT_OF_MEMORY;
  }
}

Result fused_moe(const Experts& w13, const Experts& w2, const Call& call) {
  for (int64_t i = 0; i < call.num_tokens * call.top_k; ++i) {
    if (call.expert_ids[i] >= call.num_experts) return UNKNOWN_EXPERT;
  }
  const int64_t copies = HAS_TILES ? call.top_k : 0;
  const int64_t per_token = w13.K * (call.digits + 1) * (1 + copies) +
                            w13.N * (call.top_k * (int64_t)(sizeof(float) + call.digits + 1) + copies * (call.digits + 1));
  const int64_t piece = std::clamp<int64_t>(WORKSPACE / per_token, 1, std::max<int64_t>(call.num_tokens, 1));
  for (int64_t first = 0; first < call.num_tokens; first += piece) {
    const int64_t count = std::min(piece, call.num_tokens - first);
    const Routes routes(call, first, count);
    const int64_t num_routes = routes.token.size();
    Workspace& space = workspace();
    space.reserve(digit_bytes(count, w13.K, w13.group_size, call.digits) + num_routes * w13.N * sizeof(float) + 64 +
                  digit_bytes(num_routes, w2.K, w2.group_size, call.digits) +
                  Operands::bytes(routes, w13.K, w13.group_size, call.digits) +
                  Operands::bytes(routes, w2.K, w2.group_size, call.digits));
    const Digits x = take_digits(space, count, w13.K, w13.group_size, call.digits);
    const Digits h = take_digits(space, num_routes, w2.K, w2.group_size, call.digits);
    float* hidden = space.take<float>(num_routes * w13.N);
    quantize_rows(call.threads, call.x + first * w13.K, count, x);
    multiply_gate_up(w13, call, routes, Operands(call.threads, routes, x, routes.token, space), hidden);
    quantize_rows(call.threads, hidden, num_routes, h);
    const Operands h_operands(call.threads, routes, h, routes.index, space);
    multiply_down(w2, call, routes, h_operands, call.out + first * w2.N, count);
  }
  return DONE;
}

}  // namespace
}  // namespace alphaq

using namespace alphaq;

// Compute a layer, as fused_moe of op.py says; shapes are the caller's to check.
EXPORT int alphaq_fused_moe(const Experts* w13, const Experts* w2, const Call* call) {
  return result_of([&] { return fused_moe(*w13, *w2, *call); });
}

// Compute a linear layer, as linear of op.py says.
EXPORT int alphaq_linear(const Linear* weights, const LinearCall* call) {
  return result_of([&] { return linear(*weights, *call); });
}

// Bring a matrix [rows, columns] from the order of packing.py (linear: of linear_packing.py) into that of layout.h.
EXPORT int alphaq_reorder(uint8_t* packed, int64_t rows, int64_t columns, int64_t bits, int64_t linear,
                          const Threads* threads) {
  return result_of([&] {
    linear ? reorder<true>(packed, rows, columns, bits, *threads) : reorder<false>(packed, rows, columns, bits, *threads);
    return DONE;
  });
}

// Bring scales or zero points [rows, groups] into the order of layout.h.
EXPORT int alphaq_reorder_groups(uint16_t* values, int64_t rows, int64_t groups, const Threads* threads) {
  return result_of([&] {
    parallel(*threads, rows / ROWS, [&](int64_t block) {
      std::vector<uint16_t> scratch(ROWS * groups);
      reorder_groups(values + block * ROWS * groups, scratch.data(), groups);
    });
    return DONE;
  });
}
