// Memory to work in, and the activations of a layer as digits in it.
#pragma once

#include <algorithm>
#include <memory>
#include <new>
#include <type_traits>

#include "activations.h"
#include "threads.h"

namespace alphaq {

// Bytes of activations that are kept at a time: tokens are computed in so many pieces as this takes.
constexpr int64_t WORKSPACE = 128 << 20;

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
    memory_.reset(static_cast<uint8_t*>(::operator new (bytes, std::align_val_t{64})));
    size_ = bytes;
  }

 private:
  struct Free {
    void operator()(uint8_t* memory) const { ::operator delete (memory, std::align_val_t{64}); }
  };
  std::unique_ptr<uint8_t, Free> memory_;
  int64_t size_ = 0, used_ = 0;
};

// This thread's: 0 for a whole call, 1 for the product of a block.
inline Workspace& workspace(int which = 0) {
  static thread_local Workspace workspaces[2];
  return workspaces[which];
}

// What take_digits takes, and what Tiles take for so many padded tokens.
inline int64_t digit_bytes(int64_t rows, int64_t columns, int64_t group_size, int64_t digits) {
  const int64_t wholes = HAS_PAIRS && digits == 2 ? 2 : 0;
  return rows * (columns * (digits + wholes) + columns / group_size * 2 * sizeof(float)) + 192;
}

inline Digits take_digits(Workspace& from, int64_t rows, int64_t columns, int64_t group_size, int64_t count) {
  Digits digits{nullptr, nullptr, nullptr, columns, group_size, (int)count};
  digits.digits = from.take<int8_t>(rows * columns * count);
  if (HAS_PAIRS && count == 2) digits.wholes = from.take<int16_t>(rows * columns);
  digits.factors = from.take<float>(rows * digits.groups() * 2);
  return digits;
}

// Write digits of rows of x, [rows, columns].
inline void quantize_rows(const Threads& threads, Dtype dtype, const void* x, int64_t rows, const Digits& to) {
  // So many rows are work for a thread.
  const int64_t piece = std::max<int64_t>(1, 16384 / to.columns);
  parallel(threads, (rows + piece - 1) / piece, [&](int64_t unit) {
    for (int64_t i = unit * piece; i < std::min(rows, (unit + 1) * piece); ++i) {
      if (to.count == 1) quantize_row<1>(dtype, x, to, i);
      if (to.count == 2) quantize_row<2>(dtype, x, to, i);
      if (to.count == 3) quantize_row<3>(dtype, x, to, i);
    }
  });
}

// Row i of a tensor of a dtype.
template <typename Data>
Data* row_of(Dtype dtype, Data* data, int64_t i, int64_t columns) {
  using Byte = std::conditional_t<std::is_const_v<Data>, const uint8_t, uint8_t>;
  return (Byte*)data + i * columns * (dtype == FLOAT32 ? 4 : 2);
}

}  // namespace alphaq
