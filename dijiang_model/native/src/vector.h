// Vectors of the widest kind that the compiler's target has, by GCC's vector extensions.
//
// Nothing here depends on how many rows a step has, and nothing is compiled with -ffast-math: the order of every
// sum is written out, so that a row's result is the same bit for bit in every batch.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace dijiang {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef float VecAt __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef float Vec4 __attribute__((vector_size(16)));

static inline Vec load(const float* from) { return *reinterpret_cast<const VecAt*>(from); }
static inline void store(float* to, Vec x) { *reinterpret_cast<VecAt*>(to) = x; }

// The first `count` lanes; the others are zero.
static inline Vec load_first(const float* from, int64_t count) {
  float lanes[kLanes] = {};
  std::memcpy(lanes, from, static_cast<size_t>(count) * sizeof(float));
  return load(lanes);
}

static inline Vec splat(float x) { return x - Vec{}; }

// The sum of all lanes: halves onto each other, always in this order.
static inline float sum(Vec x) {
  float lanes[kLanes];
  store(lanes, x);
#if defined(__AVX512F__)
  typedef float Vec8 __attribute__((vector_size(32)));
  Vec8 low8, high8;
  std::memcpy(&low8, &x, 32);
  std::memcpy(&high8, reinterpret_cast<const char*>(&x) + 32, 32);
  Vec8 eight = low8 + high8;
  Vec4 low, high;
  std::memcpy(&low, &eight, 16);
  std::memcpy(&high, reinterpret_cast<const char*>(&eight) + 16, 16);
  Vec4 four = low + high;
#elif defined(__AVX__)
  Vec4 low, high;
  std::memcpy(&low, lanes, 16);
  std::memcpy(&high, lanes + 4, 16);
  Vec4 four = low + high;
#else
  Vec4 four;
  std::memcpy(&four, lanes, 16);
#endif
  return (four[0] + four[2]) + (four[1] + four[3]);
}

static inline float largest(Vec x) {
  float lanes[kLanes];
  store(lanes, x);
  float result = lanes[0];
  for (int i = 1; i < kLanes; ++i) result = lanes[i] > result ? lanes[i] : result;
  return result;
}

// e^x to about one unit in the last place; 0 below -87.3, infinity above 88.7, NaN stays NaN.
static inline Vec exponential(Vec x) {
  const Vec low = splat(-87.3365f), high = splat(88.72283f);
  Vec clamped = x < low ? low : x;  // this way round a NaN stays
  clamped = clamped > high ? high : clamped;
  const Vec shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  Vec n = (clamped * splat(1.44269504088896341f) + shift) - shift;
  Vec r = clamped - n * splat(0.693359375f);
  r = r - n * splat(-2.12194440e-4f);
  Vec p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * (r * r) + r + splat(1.0f);
  // 2^n in two factors: n = 128 has no exponent of its own.
  IntVec whole = __builtin_convertvector(n, IntVec);
  IntVec half = whole >> 1;
  Vec first = reinterpret_cast<Vec>((half + 127) << 23);
  Vec second = reinterpret_cast<Vec>((whole - half + 127) << 23);
  Vec result = p * first * second;
  result = x < low ? splat(0.0f) : result;
  return x > high ? splat(std::numeric_limits<float>::infinity()) : result;
}

static inline float exponential(float x) { return exponential(splat(x))[0]; }

// sum_j a[j] b[j]
static inline float dot(const float* a, const float* b, int64_t size) {
  Vec total = splat(0.0f);
  int64_t j = 0;
  for (; j + kLanes <= size; j += kLanes) total += load(a + j) * load(b + j);
  if (j < size) total += load_first(a + j, size - j) * load_first(b + j, size - j);
  return sum(total);
}

}  // namespace dijiang
