// Vectors of numbers that have nothing to do with each other: one for each of some groups of weights, or for each of
// some rows of a matrix.
//
// No lane adds up what belongs to another, and nothing is contracted to fused operations. So every instruction set, of
// any width, computes the same bits.
#pragma once

#include <algorithm>
#include <cstdint>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Floats __attribute__((vector_size(LANES * sizeof(float))));
typedef double Doubles __attribute__((vector_size(LANES * sizeof(double))));
typedef int32_t Ints __attribute__((vector_size(LANES * sizeof(int32_t))));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

inline Floats spread(float value) { return Floats{} + value; }

// To the nearest integer, ties to even, of values in the range of codes.
inline Floats nearest(Floats codes) {
  constexpr float WHOLE = 0x1.8p23f;
  return (codes + WHOLE) - WHOLE;
}

// To the next integer below, of the same.
inline Floats floored(Floats codes) {
  const Floats whole = nearest(codes);
  return whole > codes ? whole - 1.0f : whole;
}

inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// NaN becomes low.
inline Floats clamped(Floats values, float low, Floats top) { return smaller(larger(values, spread(low)), top); }

inline Doubles doubles(Floats values) { return __builtin_convertvector(values, Doubles); }

// In two steps, because GCC makes one conversion of this kind a lane at a time.
inline Bytes bytes(Floats codes) { return __builtin_convertvector(__builtin_convertvector(codes, Ints), Bytes); }

// Groups that are worked on together, one in each lane. Lanes without a group repeat the last one.
struct Lanes {
  int64_t first, count;

  int64_t group(int64_t lane) const { return first + std::min(lane, count - 1); }

  // A value of each group.
  Floats values(const float* from) const {
    Floats found;
    for (int64_t lane = 0; lane < LANES; ++lane) found[lane] = from[group(lane)];
    return found;
  }

  // A vector for each place in a group.
  void columns(const float* from, int64_t size, Floats* to) const {
    for (int64_t lane = 0; lane < LANES; ++lane)
      for (int64_t k = 0; k < size; ++k) to[k][lane] = from[group(lane) * size + k];
  }

  void store(Floats values, float* to) const {
    for (int64_t lane = 0; lane < count; ++lane) to[first + lane] = values[lane];
  }
};

// Calls work with all groups, some at a time.
template <typename Work>
inline void by_lanes(int64_t groups, Work work) {
  for (int64_t first = 0; first < groups; first += LANES) work(Lanes{first, std::min<int64_t>(LANES, groups - first)});
}

}  // namespace
