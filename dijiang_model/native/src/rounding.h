// How the numbers of a state are kept: fp32, bf16 (half the memory) or, for the window, int8 with a scale per row.
// Steps compute in fp32 as ever; rows are widened on their way from memory.
//
// A key or a value is rounded once, when it enters the window. S is rounded after every token, for thousands of tokens:
// to the nearest number, whatever is less than half a unit in the last place would never be added or never decay.
// So the last bits decide at random whether to go up, and the mean stays right. The random bits are a function of
// position and place alone: a state is the same bit for bit in any batch and however its prompt was cut.
#pragma once

#include "vector.h"

namespace dijiang {

enum class Numbers : int64_t { kFloat = 0, kHalf = 1, kInt8 = 2 };

struct Half {
  uint16_t bits;  // of a bf16
};

typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfBits __attribute__((vector_size(kLanes * 2)));
typedef uint16_t HalfBitsAt __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
typedef int8_t Codes __attribute__((vector_size(kLanes)));
typedef int8_t CodesAt __attribute__((vector_size(kLanes), aligned(1), may_alias));

constexpr uint32_t kExponent = 0x7f800000u;

static inline Bits bits_of(Vec x) { return reinterpret_cast<Bits>(x); }
static inline Bits all(uint32_t x) { return x - Bits{}; }

// A vector of a row, in fp32; int8 without its row's scale.
static inline Vec load(const Half* from) {
  const Bits wide = __builtin_convertvector(*reinterpret_cast<const HalfBitsAt*>(from), Bits);
  return reinterpret_cast<Vec>(wide << 16);
}

static inline Vec load(const int8_t* from) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const CodesAt*>(from), IntVec), Vec);
#endif
}

// Of numbers that are in bf16 already; a NaN stays one.
static inline void store(Half* to, Vec x) {
  const Bits bits = bits_of(x);
  const Bits quiet = (bits & all(~(1u << 31))) > all(kExponent) ? all(1u << 22) : all(0);
  *reinterpret_cast<HalfBitsAt*>(to) = __builtin_convertvector((bits | quiet) >> 16, HalfBits);
}

// To the nearest number in bf16, ties to even; what is not finite stays what it is.
static inline Vec to_nearest(Vec x) {
  const Bits bits = bits_of(x), rounded = (bits + all(0x7fffu) + ((bits >> 16) & all(1u))) & all(0xffff0000u);
  return reinterpret_cast<Vec>((bits & all(kExponent)) == all(kExponent) ? bits : rounded);
}

// Up or down to a neighbour in bf16, so that the mean stays (`ops/torch/rounding.py`). `place`: of the first lane.
static inline Vec rounded_stochastically(Vec x, uint32_t place, uint32_t salt) {
  Bits random;
  for (int i = 0; i < kLanes; ++i) random[i] = static_cast<uint32_t>(i);
  random = (random + all(place)) * all(0x9e3779b1u) + all(salt);
  random = (random ^ (random >> 16)) * all(0x7feb352du);
  random = (random ^ (random >> 15)) * all(0x846ca68bu);
  const Bits bits = bits_of(x), rounded = (bits + (random >> 16)) & all(0xffff0000u);
  return reinterpret_cast<Vec>((bits & all(kExponent)) == all(kExponent) ? bits : rounded);
}

static inline uint32_t random_salt(int64_t position) { return static_cast<uint32_t>(position) * 0x85ebca6bu; }

// The number of those bits without a sign, and NaN if it is not finite.
static inline float magnitude_of(uint32_t bits) {
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return bits < kExponent ? result : std::numeric_limits<float>::quiet_NaN();
}

// The largest magnitude, and NaN if anything is not finite.
static inline float magnitude(const float* x, int64_t size) {
  Bits most = all(0);  // magnitudes are in the order of their bits
  auto take = [&most](Vec values) DIJIANG_INLINE {
    const Bits next = bits_of(values) & all(~(1u << 31));
    most = next > most ? next : most;
  };
  int64_t j = 0;
  for (; j + kLanes <= size; j += kLanes) take(load(x + j));
  if (j < size) take(load_first(x + j, size - j));
#if defined(__AVX512F__)
  return magnitude_of(_mm512_reduce_max_epu32(reinterpret_cast<__m512i>(most)));
#else
  uint32_t lanes[kLanes], largest = 0;
  std::memcpy(lanes, &most, sizeof(lanes));
  for (uint32_t lane : lanes) largest = lane > largest ? lane : largest;
  return magnitude_of(largest);
#endif
}

// A row of keys or values comes in. Returns its scale: 1, or for int8 the largest magnitude over 127; a row that is not
// finite has the scale NaN.
static inline float put_row(const float* x, int64_t size, float* to) {
  std::memcpy(to, x, static_cast<size_t>(size) * sizeof(float));
  return 1.0f;
}

static inline float put_row(const float* x, int64_t size, Half* to) {
  for (int64_t j = 0; j < size; j += kLanes) store(to + j, to_nearest(load(x + j)));
  return 1.0f;
}

static inline float put_row(const float* x, int64_t size, int8_t* to) {
  const float most = magnitude(x, size);
  const Vec inverse = splat(most > 0.0f ? 127.0f / most : 0.0f), shift = splat(12582912.0f);
  for (int64_t j = 0; j < size; j += kLanes) {
    Vec code = (load(x + j) * inverse + shift) - shift;  // rounded to an integer, ties to even
    if (!(most > 0.0f)) code = splat(0.0f);
    *reinterpret_cast<CodesAt*>(to + j) = __builtin_convertvector(__builtin_convertvector(code, IntVec), Codes);
  }
  return most / 127.0f;
}

// The same in 4 bits, two numbers to a byte, the even one below; a code stands for code - 8, the scale is the largest
// magnitude over 7.
static inline float put_nibbles(const float* x, int64_t size, uint8_t* to) {
  const float most = magnitude(x, size), inverse = most > 0.0f ? 7.0f / most : 0.0f;
  auto code = [&](float value) {
    const float whole = (value * inverse + 12582912.0f) - 12582912.0f;
    return static_cast<uint8_t>(most > 0.0f ? static_cast<int32_t>(whole) + 8 : 8);
  };
  for (int64_t j = 0; j < size; j += 2) to[j / 2] = static_cast<uint8_t>(code(x[j]) | code(x[j + 1]) << 4);
  return most / 7.0f;
}

static inline void take_nibbles(const uint8_t* from, int64_t size, float scale, float* to) {
  for (int64_t j = 0; j < size; j += 2) {
    to[j] = static_cast<float>((from[j / 2] & 15) - 8) * scale;
    to[j + 1] = static_cast<float>((from[j / 2] >> 4) - 8) * scale;
  }
}

template <class T>
static inline void take_row(const T* from, int64_t size, float scale, float* to) {
  for (int64_t j = 0; j < size; j += kLanes) store(to + j, load(from + j) * splat(scale));
}

}  // namespace dijiang
