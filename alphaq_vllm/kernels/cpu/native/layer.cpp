// The library's functions: a layer's routed experts, linear layers, and the order that both want. Called through
// ctypes.
#include "linear.h"
#include "moe.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace alphaq {
namespace {

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

template <typename Value>
void reorder_groups(Value* values, int64_t rows, int64_t groups, const Threads& threads) {
  parallel(threads, rows / ROWS, [&](int64_t block) {
    std::vector<Value> scratch(ROWS * groups);
    reorder_block_groups(values + block * ROWS * groups, scratch.data(), groups);
  });
}

}  // namespace
}  // namespace alphaq

using namespace alphaq;

// Compute a layer, as fused_moe of op.py says; shapes are the caller's to check.
EXPORT int alphaq_fused_moe(const Experts* w13, const Experts* w2, const Call* call) {
  return result_of([&] { return fused_moe(*w13, *w2, *call); });
}

// Compute a linear layer, as linear of linear.py says.
EXPORT int alphaq_linear(const Linear* weights, const LinearCall* call) {
  return result_of([&] { return linear(*weights, *call); });
}

// Bring a matrix [rows, columns] from the order of packing.py (linear: of linear_packing.py) into that of layout.h.
EXPORT int alphaq_reorder(uint8_t* packed, int64_t rows, int64_t columns, int64_t bits, int64_t linear,
                          const Threads* threads) {
  return result_of([&] {
    linear ? reorder<true>(packed, rows, columns, bits, *threads)
           : reorder<false>(packed, rows, columns, bits, *threads);
    return DONE;
  });
}

// Bring values [rows, groups] of 1 or 2 bytes, grids or a linear layer's scales, into the order of layout.h.
EXPORT int alphaq_reorder_groups(void* values, int64_t rows, int64_t groups, int64_t itemsize, const Threads* threads) {
  return result_of([&] {
    itemsize == 1 ? reorder_groups((uint8_t*)values, rows, groups, *threads)
                  : reorder_groups((uint16_t*)values, rows, groups, *threads);
    return DONE;
  });
}
