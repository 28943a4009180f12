// Activations as digits, and the gate between the two products of an expert.
#pragma once

#include <cfloat>
#include <cmath>

#include "vectors.h"

namespace alphaq {

// Columns of x that become integers with one factor: a slab, of one group or several.
constexpr int SLAB = 128;

// Where slabs do not divide the columns, they are groups.
INLINE int64_t slab_of(int64_t columns, int64_t group_size) { return columns % SLAB ? group_size : SLAB; }

// What a matrix is multiplied with: rows of x, each slab of columns as integers with a factor of its own.
//
// An integer is DIGITS bytes from -128 to 127, `sum of digit[d] * 256^d`. Of a row, `digits` has [unit, digit, column
// of the unit], and `factors` [group, 2]: what one step of the integers means, and what the group's integers mean in
// sum. Integers of two digits are there in one piece too, where products of them are made (HAS_PAIRS): `wholes` has of
// four columns the first, the third, the second, the fourth.
struct Digits {
  int8_t* digits;
  int16_t* wholes;
  float* factors;
  int64_t columns;
  int64_t group_size;
  int count;

  int64_t groups() const { return columns / group_size; }
  int8_t* row(int64_t i) const { return digits + i * columns * count; }
  int16_t* row_wholes(int64_t i) const { return wholes + i * columns; }
  float* row_factors(int64_t i) const { return factors + i * groups() * 2; }
};

// The largest integer of so many digits, less one where float32 might round it up.
constexpr int32_t largest(int digits) { return digits == 1 ? 127 : digits == 2 ? 32639 : 8355710; }

// Write row i of `to` from row i of x. A slab with a number that is not finite yields NaN.
template <int DIGITS, Dtype DTYPE>
void quantize_row(const void* x, const Digits& to, int64_t i) {
  typedef int8_t Bytes __attribute__((vector_size(LANES)));
  int8_t* digits = to.row(i);
  float* factors = to.row_factors(i);
  int64_t first = i * to.columns;
  const int64_t slab = slab_of(to.columns, to.group_size), end = first + to.columns;
  for (; first < end; first += slab) {
    F32 most{};
    I32 finite = (I32)spread<U32>(~0u);
    for (int64_t k = 0; k < slab; k += LANES) {
      const F32 values = load_as(DTYPE, x, first + k);
      const F32 sizes = values < 0 ? -values : values;
      finite &= sizes <= FLT_MAX;
      most = sizes > most ? sizes : most;
    }
    float size = 0;
    bool all_finite = true;
    for (int lane = 0; lane < LANES; ++lane) {
      size = most[lane] > size ? most[lane] : size;
      all_finite &= finite[lane] != 0;
    }
    const float step = size / largest(DIGITS);
    // Numbers so small that a step would be subnormal count as nothing.
    const float inverse = all_finite && step >= FLT_MIN ? largest(DIGITS) / size : 0;
    const float factor = all_finite ? step : NAN;
    for (int64_t group = first; group < first + slab; group += to.group_size, digits += DIGITS * to.group_size) {
      I32 sums{};
      for (int64_t k = 0; k < to.group_size; k += LANES) {
        const F32 values = inverse ? load_as(DTYPE, x, group + k) * inverse : F32{};
        I32 rest = __builtin_convertvector(values + (values < 0 ? spread<F32>(-0.5f) : spread<F32>(0.5f)), I32);
        sums += rest;
        if (HAS_PAIRS && DIGITS == 2) store_wholes(to.wholes + group + k, rest);
#pragma GCC unroll 3
        for (int d = 0; d < DIGITS; ++d) {
          const I32 digit = ((rest + 128) & 255) - 128;
          store(digits + k / UNIT * UNIT * DIGITS + d * UNIT + k % UNIT, __builtin_convertvector(digit, Bytes));
          rest = (rest - digit) >> 8;
        }
      }
      int32_t sum = 0;
      for (int lane = 0; lane < LANES; ++lane) sum += sums[lane];
      *factors++ = factor;
      *factors++ = factor * sum;
    }
  }
}

template <int DIGITS>
void quantize_row(Dtype dtype, const void* x, const Digits& to, int64_t i) {
  if (dtype == FLOAT32) quantize_row<DIGITS, FLOAT32>(x, to, i);
  if (dtype == BFLOAT16) quantize_row<DIGITS, BFLOAT16>(x, to, i);
  if (dtype == FLOAT16) quantize_row<DIGITS, FLOAT16>(x, to, i);
}

// e^x to about one unit in the last place; 0 and infinity beyond float32's range, NaN for NaN.
INLINE F32 exp(F32 x) {
  x = x < -104.0f ? spread<F32>(-104.0f) : x;
  x = x > 89.0f ? spread<F32>(89.0f) : x;
  // Adding it leaves no bit for a fraction.
  const float rounding = 12582912.0f;
  const F32 n = (x * 1.44269504f + rounding) - rounding;
  const F32 r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  F32 p = spread<F32>(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // In two steps, because 2^n alone may not be a float32.
  const I32 power = __builtin_convertvector(n == n ? n : F32{}, I32), half = power >> 1;
  return p * (F32)((half + 127) << 23) * (F32)((power - half + 127) << 23);
}

enum Activation { SILU, GELU, GELU_TANH, RELU2, SWIGLUSTEP };

// act(gate) * (up + beta), both clamped first, or act(up) of experts without a gate: see gate.py.
struct Gate {
  int activation;
  float limit;
  float alpha;
  float beta;

  INLINE F32 apply(F32 gate, F32 up) const {
    up = up > limit ? spread<F32>(limit) : up;
    up = up < -limit ? spread<F32>(-limit) : up;
    F32 activated;
    if (activation == SWIGLUSTEP) {
      activated = activate(gate);
      activated = activated > limit ? spread<F32>(limit) : activated;
    } else {
      activated = activate(gate > limit ? spread<F32>(limit) : gate);
    }
    return activated * (up + beta);
  }

  // NaN stays NaN.
  INLINE F32 activate(F32 x) const {
    if (activation == SILU || activation == SWIGLUSTEP) return x / (1.0f + exp(x * -alpha));
    if (activation == RELU2) return x < 0 ? F32{} : x * x;
    if (activation == GELU_TANH) {
      // 1 + tanh(u) is 2 * sigmoid(2 * u).
      const F32 twice = 1.5957691216f * (x + 0.044715f * x * x * x);
      return x / (1.0f + exp(-twice));
    }
    F32 activated;
    for (int lane = 0; lane < LANES; ++lane) {
      activated[lane] = x[lane] * 0.5f * (1.0f + std::erf(x[lane] * 0.70710678f));
    }
    return activated;
  }
};

}  // namespace alphaq
