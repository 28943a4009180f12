// One vector register of the instruction set that the compiler was told to use, and the one operation on it that
// compilers do not find by themselves: products of bytes, summed by fours.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace alphaq {

// Rows of a matrix that are computed together, and columns whose codes are packed together.
constexpr int ROWS = 16;
constexpr int UNIT = 32;
// Four columns of all rows of a block: the bytes of one code vector.
constexpr int VECTOR = 4 * ROWS;
constexpr int VECTORS = UNIT / 4;

#if defined(__AVX512BW__)
constexpr int WIDTH = 64;
#elif defined(__AVX2__)
constexpr int WIDTH = 32;
#else
constexpr int WIDTH = 16;
#endif

// Registers that hold one code vector, and rows in each.
constexpr int PARTS = VECTOR / WIDTH;
constexpr int LANES = WIDTH / 4;

typedef uint16_t U16 __attribute__((vector_size(WIDTH)));
typedef int32_t I32 __attribute__((vector_size(WIDTH)));
typedef uint32_t U32 __attribute__((vector_size(WIDTH)));
typedef float F32 __attribute__((vector_size(WIDTH)));

template <typename Vector, typename Value>
INLINE Vector load(const Value* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

template <typename Vector, typename Value>
INLINE void store(Value* to, Vector vector) {
  std::memcpy(to, &vector, sizeof vector);
}

template <typename Vector, typename Value>
INLINE Vector spread(Value value) {
  return Vector{} + value;
}

INLINE F32 to_float(I32 values) { return __builtin_convertvector(values, F32); }

// Widen LANES bytes, which compilers do one by one.
INLINE I32 widen_bytes(const uint8_t* from) {
#if defined(__AVX512BW__)
  return (I32)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif defined(__AVX2__)
  return (I32)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
  typedef uint8_t Bytes __attribute__((vector_size(LANES)));
  return __builtin_convertvector(load<Bytes>(from), I32);
#endif
}

// Widen LANES bfloat16.
INLINE F32 widen_bfloat16(const uint16_t* from) {
  typedef uint16_t Halves __attribute__((vector_size(WIDTH / 2)));
  return (F32)(__builtin_convertvector(load<Halves>(from), U32) << 16);
}

// Widen LANES float16, without arithmetic on subnormal numbers, which a process may have set to flush to zero.
INLINE F32 widen_float16(const uint16_t* from) {
#if defined(__AVX512BW__)
  return (F32)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__AVX2__)
  return (F32)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#else
  typedef uint16_t Halves __attribute__((vector_size(WIDTH / 2)));
  const U32 halves = __builtin_convertvector(load<Halves>(from), U32);
  const U32 magnitude = (halves & 0x7fff) << 13, sign = (halves & 0x8000) << 16;
  const U32 normal = magnitude + (112u << 23);
  const U32 infinite = normal + (112u << 23);
  const F32 subnormal = (F32)(magnitude + (113u << 23)) - 6.103515625e-05f;
  const U32 finite = magnitude < (1u << 23) ? (U32)subnormal : normal;
  return (F32)((magnitude >= (0x7c00u << 13) ? infinite : finite) | sign);
#endif
}

// Round LANES float32 to bfloat16, to nearest even.
INLINE void narrow_bfloat16(uint16_t* to, F32 values) {
  typedef uint16_t Halves __attribute__((vector_size(WIDTH / 2)));
  const U32 bits = (U32)values;
  const U32 rounded = values == values ? bits + (0x7fff + (bits >> 16 & 1)) : bits | (1u << 22);
  store(to, __builtin_convertvector(rounded >> 16, Halves));
}

// Round LANES float32 to float16, to nearest even.
INLINE void narrow_float16(uint16_t* to, F32 values) {
#if defined(__AVX512BW__)
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)values, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)values, _MM_FROUND_TO_NEAREST_INT));
#else
  typedef uint16_t Halves __attribute__((vector_size(WIDTH / 2)));
  const U32 bits = (U32)values, size = bits & 0x7fffffff;
  const U32 normal = (size + (0xfff + (size >> 13 & 1)) - (112u << 23)) >> 13;
  // Beside 0.5 there is room for the bits that a subnormal number has.
  const U32 subnormal = (U32)((F32)size + 0.5f) - (126u << 23);
  U32 half = size < (113u << 23) ? subnormal : normal;
  half = size >= 0x477ff000 ? spread<U32>(0x7c00u) : half;
  half = values == values ? half : spread<U32>(0x7e00u);
  store(to, __builtin_convertvector(half | (bits >> 16 & 0x8000), Halves));
#endif
}

// The dtypes of tensors that come and go.
enum Dtype : int64_t { FLOAT32, BFLOAT16, FLOAT16 };

// LANES values of a tensor from its value i on.
INLINE F32 load_as(Dtype dtype, const void* from, int64_t i) {
  if (dtype == FLOAT32) return load<F32>((const float*)from + i);
  const uint16_t* halves = (const uint16_t*)from + i;
  return dtype == BFLOAT16 ? widen_bfloat16(halves) : widen_float16(halves);
}

INLINE void store_as(Dtype dtype, void* to, int64_t i, F32 values) {
  if (dtype == FLOAT32) return store((float*)to + i, values);
  uint16_t* halves = (uint16_t*)to + i;
  dtype == BFLOAT16 ? narrow_bfloat16(halves, values) : narrow_float16(halves, values);
}

// Four integers of 8 bits, or two of 16.
INLINE int32_t four_bytes(const void* from) {
  int32_t four;
  std::memcpy(&four, from, 4);
  return four;
}

// Where nothing multiplies bytes and adds up four products, many tokens are multiplied in pairs of 16-bit integers.
#if defined(__AVX2__) && !defined(__AVX512VNNI__) && !defined(__AVXVNNI__)
#define ALPHAQ_PAIRS
constexpr bool HAS_PAIRS = true;
#else
constexpr bool HAS_PAIRS = false;
#endif

// Write LANES integers of 16 bits, of each four the second after the third.
INLINE void store_wholes([[maybe_unused]] int16_t* to, [[maybe_unused]] I32 values) {
#if defined(ALPHAQ_PAIRS)
  typedef int16_t Wholes __attribute__((vector_size(WIDTH / 2)));
#if defined(__AVX512BW__)
  const I32 swapped = (I32)_mm512_shuffle_epi32((__m512i)values, (_MM_PERM_ENUM)0xd8);
#else
  const I32 swapped = (I32)_mm256_shuffle_epi32((__m256i)values, 0xd8);
#endif
  store(to, __builtin_convertvector(swapped, Wholes));
#endif
}

// The products of a unit: sums[s] += the unit's codes times x[s / DIGITS]'s digit s % DIGITS, one sum for each row.
//
// code(q) yields code vector q, or the registers' part of it: bytes below 2^BITS. x has [digit, column of the unit],
// bytes from -128 to 127.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)

#if defined(__AVX512VNNI__)
INLINE I32 add_fours(I32 sum, U16 codes, int32_t four) {
  return (I32)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32(four));
}
#else
INLINE I32 add_fours(I32 sum, U16 codes, int32_t four) {
  return (I32)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)codes, _mm256_set1_epi32(four));
}
#endif

template <int BITS, int DIGITS, int SUMS, typename Code>
INLINE void multiply_unit(Code code, const int8_t* const (&x)[SUMS / DIGITS], I32 (&sums)[SUMS]) {
  // Sums of their own where few would wait for each other.
  I32 parts[SUMS] = {};
#pragma GCC unroll 8
  for (int q = 0; q < VECTORS; ++q) {
    const U16 codes = code(q);
#pragma GCC unroll 24
    for (int s = 0; s < SUMS; ++s) {
      I32& sum = SUMS < 8 ? parts[s] : sums[s];
      sum = add_fours(sum, codes, four_bytes(x[s / DIGITS] + s % DIGITS * UNIT + 4 * q));
    }
  }
  if (SUMS < 8) {
    for (int s = 0; s < SUMS; ++s) sums[s] += parts[s];
  }
}

// The same of several blocks: sums[b][s] of code(b, q). Each piece of x is loaded once for all of them.
template <int DIGITS, int BLOCKS, int SUMS, typename Code>
INLINE void multiply_units(Code code, const int8_t* const (&x)[SUMS / DIGITS], I32 (&sums)[BLOCKS][SUMS]) {
#pragma GCC unroll 8
  for (int q = 0; q < VECTORS; ++q) {
    U16 codes[BLOCKS];
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; ++b) codes[b] = code(b, q);
#pragma GCC unroll 12
    for (int s = 0; s < SUMS; ++s) {
      const int32_t four = four_bytes(x[s / DIGITS] + s % DIGITS * UNIT + 4 * q);
#pragma GCC unroll 4
      for (int b = 0; b < BLOCKS; ++b) sums[b][s] = add_fours(sums[b][s], codes[b], four);
    }
  }
}

#elif defined(ALPHAQ_PAIRS)

#if defined(__AVX512BW__)
INLINE U16 multiply_bytes(U16 codes, int32_t four) {
  return (U16)_mm512_maddubs_epi16((__m512i)codes, _mm512_set1_epi32(four));
}
INLINE I32 multiply_pairs(U16 codes, int32_t two) {
  return (I32)_mm512_madd_epi16((__m512i)codes, _mm512_set1_epi32(two));
}
#else
INLINE U16 multiply_bytes(U16 codes, int32_t four) {
  return (U16)_mm256_maddubs_epi16((__m256i)codes, _mm256_set1_epi32(four));
}
INLINE I32 multiply_pairs(U16 codes, int32_t two) {
  return (I32)_mm256_madd_epi16((__m256i)codes, _mm256_set1_epi32(two));
}
#endif

// Add now. Left alone, compilers make all products first, and add them up from the stack.
INLINE void add_to(U16& sum, U16 products) {
  sum += products;
  asm("" : "+v"(sum));
}

// The same of several parts of code vectors, code(part, q): each piece of x is loaded once for all.
//
// Sums of two products have 16 bits, so that only so many may be added before they are widened. Codes of 8 bits are
// multiplied as two of 4.
template <int BITS, int DIGITS, int COUNT, int SUMS, typename Code>
INLINE void multiply_parts(Code code, const int8_t* const (&x)[SUMS / DIGITS], I32 (&sums)[COUNT][SUMS]) {
  constexpr int HALF = BITS == 8 ? 4 : BITS;
  constexpr int ADDED = HALF <= 4 ? 8 : HALF == 5 ? 4 : HALF == 6 ? 2 : 1;
  static_assert(ADDED * 2 * 128 * ((1 << HALF) - 1) < 1 << 15, "sums fit 16 bits");
#pragma GCC unroll 8
  for (int first = 0; first < VECTORS; first += ADDED) {
    U16 low[COUNT][SUMS] = {}, high[COUNT][SUMS] = {};
#pragma GCC unroll 8
    for (int q = first; q < first + ADDED; ++q) {
      U16 codes[COUNT];
#pragma GCC unroll 2
      for (int part = 0; part < COUNT; ++part) codes[part] = code(part, q);
#pragma GCC unroll 8
      for (int s = 0; s < SUMS; ++s) {
        const int32_t four = four_bytes(x[s / DIGITS] + s % DIGITS * UNIT + 4 * q);
#pragma GCC unroll 2
        for (int part = 0; part < COUNT; ++part) {
          add_to(low[part][s], multiply_bytes(BITS == 8 ? codes[part] & 0x0f0f : codes[part], four));
          if (BITS == 8) add_to(high[part][s], multiply_bytes((codes[part] >> 4) & 0x0f0f, four));
        }
      }
    }
#pragma GCC unroll 2
    for (int part = 0; part < COUNT; ++part) {
#pragma GCC unroll 8
      for (int s = 0; s < SUMS; ++s) {
        sums[part][s] += multiply_pairs(low[part][s], 0x00010001);
        if (BITS == 8) sums[part][s] += multiply_pairs(high[part][s], 0x00100010);
      }
    }
  }
}

template <int BITS, int DIGITS, int SUMS, typename Code>
INLINE void multiply_unit(Code code, const int8_t* const (&x)[SUMS / DIGITS], I32 (&sums)[SUMS]) {
  auto of_part = [&](int, int q) INLINE_LAMBDA { return code(q); };
  multiply_parts<BITS, DIGITS, 1, SUMS>(of_part, x, reinterpret_cast<I32(&)[1][SUMS]>(sums));
}

#elif defined(__ARM_FEATURE_DOTPROD)

// Its bytes are signed: codes of 8 bits are multiplied as two of 4.
template <int BITS, int DIGITS, int SUMS, typename Code>
INLINE void multiply_unit(Code code, const int8_t* const (&x)[SUMS / DIGITS], I32 (&sums)[SUMS]) {
  U16 codes[VECTORS];
#pragma GCC unroll 8
  for (int q = 0; q < VECTORS; ++q) codes[q] = code(q);
#pragma GCC unroll 24
  for (int s = 0; s < SUMS; ++s) {
    const int8_t* from = x[s / DIGITS] + s % DIGITS * UNIT;
    const int8x16_t first = vld1q_s8(from), second = vld1q_s8(from + 16);
    auto add = [&](int32x4_t sum, auto part) __attribute__((always_inline)) {
      sum = vdotq_laneq_s32(sum, (int8x16_t)part(codes[0]), first, 0);
      sum = vdotq_laneq_s32(sum, (int8x16_t)part(codes[1]), first, 1);
      sum = vdotq_laneq_s32(sum, (int8x16_t)part(codes[2]), first, 2);
      sum = vdotq_laneq_s32(sum, (int8x16_t)part(codes[3]), first, 3);
      sum = vdotq_laneq_s32(sum, (int8x16_t)part(codes[4]), second, 0);
      sum = vdotq_laneq_s32(sum, (int8x16_t)part(codes[5]), second, 1);
      sum = vdotq_laneq_s32(sum, (int8x16_t)part(codes[6]), second, 2);
      return vdotq_laneq_s32(sum, (int8x16_t)part(codes[7]), second, 3);
    };
    if (BITS < 8) {
      sums[s] = (I32)add((int32x4_t)sums[s], [](U16 codes) { return codes; });
    } else {
      sums[s] = (I32)add((int32x4_t)sums[s], [](U16 codes) { return codes & 0x0f0f; });
      sums[s] += (I32)add(vdupq_n_s32(0), [](U16 codes) { return (codes >> 4) & 0x0f0f; }) << 4;
    }
  }
}

#else

template <int BITS, int DIGITS, int SUMS, typename Code>
INLINE void multiply_unit(Code code, const int8_t* const (&x)[SUMS / DIGITS], I32 (&sums)[SUMS]) {
  for (int q = 0; q < VECTORS; ++q) {
    uint8_t codes[WIDTH];
    store(codes, code(q));
    for (int s = 0; s < SUMS; ++s) {
      const int8_t* four = x[s / DIGITS] + s % DIGITS * UNIT + 4 * q;
      for (int row = 0; row < LANES; ++row) {
        for (int k = 0; k < 4; ++k) sums[s][row] += codes[4 * row + k] * four[k];
      }
    }
  }
}

#endif

}  // namespace alphaq
