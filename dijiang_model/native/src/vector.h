// Vectors of the widest kind that the compiler's target has, by GCC's vector extensions.
//
// Nothing here depends on how many rows a step has, and nothing is compiled with -ffast-math or contracted by the
// compiler: the order and the rounding of every sum are written out, so that a row's result is the same bit for bit
// in every batch.
#pragma once

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#define DIJIANG_INLINE __attribute__((always_inline))

namespace dijiang {

template <class Body, int... I>
static inline DIJIANG_INLINE void each(const Body& body, std::integer_sequence<int, I...>) {
  (body(std::integral_constant<int, I>{}), ...);
}

// body(0) ... body(N - 1), written out: arrays indexed by it become registers, which they do not in a loop that the
// compiler unrolls (it does so after it has decided what stays in memory).
template <int N, class Body>
static inline DIJIANG_INLINE void each(const Body& body) {
  each(body, std::make_integer_sequence<int, N>{});
}

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

// a b + c, rounded once where the target can.
static inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX__) && defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

#if defined(__clang__)
#define DIJIANG_PICK(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int32_t Int4 __attribute__((vector_size(16)));
#define DIJIANG_PICK(a, b, i, j, k, l) __builtin_shuffle(a, b, Int4{i, j, k, l})
#endif

// The lanes added up to four: halves onto each other.
static inline Vec4 quarter(Vec x) {
#if defined(__AVX512F__)
  const __m256 eight = _mm512_castps512_ps256(x) + _mm512_extractf32x8_ps(x, 1);
  return _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
#elif defined(__AVX__)
  return _mm256_castps256_ps128(x) + _mm256_extractf128_ps(x, 1);
#else
  return x;
#endif
}

// The sum of all lanes, always in this order.
static inline float sum(Vec x) {
  const Vec4 four = quarter(x);
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// Four such sums at once, each in the same order.
static inline Vec4 sum4(Vec a, Vec b, Vec c, Vec d) {
  const Vec4 a4 = quarter(a), b4 = quarter(b), c4 = quarter(c), d4 = quarter(d);
  const Vec4 ab = DIJIANG_PICK(a4, b4, 0, 4, 1, 5) + DIJIANG_PICK(a4, b4, 2, 6, 3, 7);
  const Vec4 cd = DIJIANG_PICK(c4, d4, 0, 4, 1, 5) + DIJIANG_PICK(c4, d4, 2, 6, 3, 7);
  return DIJIANG_PICK(ab, cd, 0, 1, 4, 5) + DIJIANG_PICK(ab, cd, 2, 3, 6, 7);
}

static inline float largest(Vec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(x);
#else
  float lanes[kLanes];
  store(lanes, x);
  float result = lanes[0];
  for (int i = 1; i < kLanes; ++i) result = lanes[i] > result ? lanes[i] : result;
  return result;
#endif
}

constexpr float kLeastPower = -87.3365f, kMostPower = 88.72283f;

// e^x for x between those two; what it is for others is for the caller to say.
static inline Vec exponential_between(Vec x) {
  const Vec shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec n = fma(x, splat(1.44269504088896341f), shift) - shift;
  Vec r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  Vec p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + splat(1.0f);
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, n);
#else
  // 2^n in two factors: n = 128 has no exponent of its own.
  IntVec whole = __builtin_convertvector(n, IntVec);
  IntVec half = whole >> 1;
  Vec first = reinterpret_cast<Vec>((half + 127) << 23);
  Vec second = reinterpret_cast<Vec>((whole - half + 127) << 23);
  return p * first * second;
#endif
}

// e^x to about one unit in the last place for x of at most kMostPower; 0 below kLeastPower, NaN stays NaN.
static inline Vec falling_exponential(Vec x) {
#if defined(__AVX512F__)
  const Vec power = exponential_between(_mm512_max_ps(splat(kLeastPower), x));  // this way round a NaN stays
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, splat(kLeastPower), _CMP_NLT_UQ), power);
#else
  const Vec low = splat(kLeastPower);
  return x < low ? splat(0.0f) : exponential_between(x < low ? low : x);
#endif
}

// The same for any x: infinity above kMostPower.
static inline Vec exponential(Vec x) {
  const Vec high = splat(kMostPower);
  return x > high ? splat(std::numeric_limits<float>::infinity()) : falling_exponential(x > high ? high : x);
}

static inline float exponential(float x) { return exponential(splat(x))[0]; }

// sum_j a[j] b[j]
static inline float dot(const float* a, const float* b, int64_t size) {
  Vec total = splat(0.0f);
  int64_t j = 0;
  for (; j + kLanes <= size; j += kLanes) total = fma(load(a + j), load(b + j), total);
  if (j < size) total = fma(load_first(a + j, size - j), load_first(b + j, size - j), total);
  return sum(total);
}

#if defined(__AVX512F__)
// Sixteen rows of sixteen 32-bit numbers the other way round.
static inline DIJIANG_INLINE void transpose(__m512i* x) {
  __m512i y[16];
  each<8>([&](auto i) DIJIANG_INLINE {
    y[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
    y[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
  });
  each<4>([&](auto i) DIJIANG_INLINE {
    x[4 * i] = _mm512_unpacklo_epi64(y[4 * i], y[4 * i + 2]);
    x[4 * i + 1] = _mm512_unpackhi_epi64(y[4 * i], y[4 * i + 2]);
    x[4 * i + 2] = _mm512_unpacklo_epi64(y[4 * i + 1], y[4 * i + 3]);
    x[4 * i + 3] = _mm512_unpackhi_epi64(y[4 * i + 1], y[4 * i + 3]);
  });
  each<4>([&](auto i) DIJIANG_INLINE {
    y[i] = _mm512_shuffle_i32x4(x[i], x[4 + i], 0x88);
    y[4 + i] = _mm512_shuffle_i32x4(x[i], x[4 + i], 0xdd);
    y[8 + i] = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0x88);
    y[12 + i] = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0xdd);
  });
  each<4>([&](auto i) DIJIANG_INLINE {
    x[i] = _mm512_shuffle_i32x4(y[i], y[8 + i], 0x88);
    x[8 + i] = _mm512_shuffle_i32x4(y[i], y[8 + i], 0xdd);
    x[4 + i] = _mm512_shuffle_i32x4(y[4 + i], y[12 + i], 0x88);
    x[12 + i] = _mm512_shuffle_i32x4(y[4 + i], y[12 + i], 0xdd);
  });
}
#endif

}  // namespace dijiang
