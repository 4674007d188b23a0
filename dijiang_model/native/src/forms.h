// What a product reads of weights and rows in each form, and how it adds up: a step of columns at a time, in lanes.
#pragma once

#include "operands.h"

#if defined(__AVX512BF16__) && defined(__AVX512F__)
#define DIJIANG_BF16 1
#else
#define DIJIANG_BF16 0
#endif

namespace dijiang {

// fp32, used where it lies.
struct FloatForm {
  using Element = float;  // of a weight
  using Right = float;    // of a row
  using Sum = Vec;
  static constexpr int64_t kStep = kLanes, kMostColumns = std::numeric_limits<int64_t>::max();
  static constexpr int kChains = 1;
  static constexpr bool kIsPadded = false;  // rows of weights end with the columns
  static const Element* weights(const Matrix& m) { return m.weight; }
  static int64_t width(const Matrix& m) { return m.columns; }
  static const Right* right(const Activations& x, const Matrix&) { return x.values; }
  static int64_t right_stride(const Activations& x, const Matrix&) { return x.stride; }
  static DIJIANG_INLINE Vec whole(const float* at) { return load(at); }
  static DIJIANG_INLINE Vec first(const float* at, int64_t count) { return load_first(at, count); }
  static DIJIANG_INLINE Vec whole_right(const float* at) { return load(at); }
  static DIJIANG_INLINE Vec first_right(const float* at, int64_t count) { return load_first(at, count); }
  static DIJIANG_INLINE Sum add(Vec w, Vec x, Sum sum) { return fma(w, x, sum); }
  static DIJIANG_INLINE Vec finish(Sum sum) { return sum; }
};

// bf16 times rows rounded to bf16, in sums of fp32.
struct HalfForm {
  using Element = uint16_t;
  using Right = uint16_t;
  using Sum = Vec;
  static constexpr int64_t kStep = 2 * kLanes, kMostColumns = std::numeric_limits<int64_t>::max();
  static constexpr int kChains = 1;
  static constexpr bool kIsPadded = false;
  static const Element* weights(const Matrix& m) { return m.halves; }
  static int64_t width(const Matrix& m) { return m.columns; }
  static const Right* right(const Activations& x, const Matrix&) {
    return reinterpret_cast<const uint16_t*>(x.rounded);
  }
  static int64_t right_stride(const Activations&, const Matrix& m) { return padded(m.columns); }
#if DIJIANG_BF16
  using Pairs = __m512bh;
  static DIJIANG_INLINE Pairs whole(const uint16_t* at) { return reinterpret_cast<Pairs>(_mm512_loadu_si512(at)); }
  static DIJIANG_INLINE Pairs first(const uint16_t* at, int64_t count) {
    return reinterpret_cast<Pairs>(_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1u << count) - 1u), at));
  }
  static DIJIANG_INLINE Sum add(Pairs w, Pairs x, Sum sum) { return _mm512_dpbf16_ps(sum, w, x); }
#else
  // Two numbers to a lane: the even column in the lower half.
  typedef int32_t IntVecAt __attribute__((vector_size(kLanes * 4), aligned(2), may_alias));
  struct Pairs {
    Vec even, odd;
  };
  static DIJIANG_INLINE Pairs split(IntVec both) {
    return {reinterpret_cast<Vec>(both << 16), reinterpret_cast<Vec>(both & static_cast<int32_t>(0xffff0000u))};
  }
  static DIJIANG_INLINE Pairs whole(const uint16_t* at) { return split(*reinterpret_cast<const IntVecAt*>(at)); }
  static DIJIANG_INLINE Pairs first(const uint16_t* at, int64_t count) {
    uint16_t lanes[kStep] = {};
    std::memcpy(lanes, at, static_cast<size_t>(count) * sizeof(uint16_t));
    return whole(lanes);
  }
  static DIJIANG_INLINE Sum add(const Pairs& w, const Pairs& x, Sum sum) {
    return fma(w.odd, x.odd, fma(w.even, x.even, sum));
  }
#endif
  static DIJIANG_INLINE Pairs whole_right(const uint16_t* at) { return whole(at); }
  static DIJIANG_INLINE Pairs first_right(const uint16_t* at, int64_t) { return whole(at); }
  static DIJIANG_INLINE Vec finish(Sum sum) { return sum; }
};

// int8 codes times rows of 16 bits: exact integers, as long as a lane has room for them.
struct CodeForm {
  using Element = int8_t;
  using Right = int16_t;
  using Sum = IntVec;
  static constexpr int64_t kStep = 2 * kLanes;
  static constexpr int64_t kMostColumns = 255 * kStep / 64 * 64;  // 255 * 2 * 32767 * 128 < 2^31
  static constexpr int kChains = 2;  // sums side by side, of one row: integers may be added in any order
  static constexpr bool kIsPadded = true;
  static const Element* weights(const Matrix& m) { return m.codes; }
  static int64_t width(const Matrix& m) { return padded(m.columns); }
  static const Right* right(const Activations& x, const Matrix&) { return reinterpret_cast<const int16_t*>(x.rounded); }
  static int64_t right_stride(const Activations&, const Matrix& m) { return padded(m.columns); }
#if DIJIANG_VNNI
  static DIJIANG_INLINE __m512i whole(const int8_t* at) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
  }
  static DIJIANG_INLINE __m512i whole_right(const int16_t* at) { return _mm512_loadu_si512(at); }
  static DIJIANG_INLINE Sum add(__m512i w, __m512i x, Sum sum) {
    return reinterpret_cast<IntVec>(_mm512_dpwssd_epi32(reinterpret_cast<__m512i>(sum), w, x));
  }
#elif defined(__AVX2__)
  static DIJIANG_INLINE __m256i whole(const int8_t* at) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  }
  static DIJIANG_INLINE __m256i whole_right(const int16_t* at) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  }
  static DIJIANG_INLINE Sum add(__m256i w, __m256i x, Sum sum) {
    return sum + reinterpret_cast<IntVec>(_mm256_madd_epi16(w, x));
  }
#else
  struct Codes {
    int32_t lanes[kStep];
  };
  static DIJIANG_INLINE Codes whole(const int8_t* at) {
    Codes codes;
    for (int i = 0; i < kStep; ++i) codes.lanes[i] = at[i];
    return codes;
  }
  static DIJIANG_INLINE const int16_t* whole_right(const int16_t* at) { return at; }
  static DIJIANG_INLINE Sum add(const Codes& w, const int16_t* x, Sum sum) {
    for (int i = 0; i < kLanes; ++i) sum[i] += w.lanes[2 * i] * x[2 * i] + w.lanes[2 * i + 1] * x[2 * i + 1];
    return sum;
  }
#endif
  static DIJIANG_INLINE auto first(const int8_t* at, int64_t) { return whole(at); }  // never: rows are padded
  static DIJIANG_INLINE auto first_right(const int16_t* at, int64_t) { return whole_right(at); }
  static DIJIANG_INLINE Vec finish(Sum sum) { return __builtin_convertvector(sum, Vec); }
};

}  // namespace dijiang
