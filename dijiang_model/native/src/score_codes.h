// Scores of int8 keys in whole numbers: a query rounded to 16 bits times the codes of a key, exact in 32.
//
// The sums are the same in whatever order they are made, so a block of keys and a single one give the same bits.
#pragma once

#include "window.h"

namespace dijiang {

constexpr int64_t kCodeStep = 32;  // numbers of a query at once, zeros behind its end
static inline int64_t padded_codes(int64_t d) { return (d + kCodeStep - 1) / kCodeStep * kCodeStep; }

// Whether scores are made so: elsewhere codes are widened to fp32.
constexpr bool kScoresCodes = DIJIANG_VNNI != 0;
constexpr int64_t kMostCodeChannels = 512;  // 512 * 127 * 32767 < 2^31

// A query as codes of 16 bits and their scale, NaN if it is not finite.
static inline float round_query(const float* query, int64_t d, int16_t* codes) {
  const float most = magnitude(query, d);
  const float inverse = most > 0.0f ? 32767.0f / most : 0.0f;
  for (int64_t i = 0; i < d; ++i) {
    const float whole = (query[i] * inverse + 12582912.0f) - 12582912.0f;  // rounded to an integer
    codes[i] = most > 0.0f ? static_cast<int16_t>(static_cast<int32_t>(whole)) : static_cast<int16_t>(0);
  }
  for (int64_t i = d; i < padded_codes(d); ++i) codes[i] = 0;
  return most / 32767.0f;
}

#if DIJIANG_VNNI

// The sums of the lanes of eight vectors, in order.
static inline DIJIANG_INLINE __m256i sums_of_eight(const __m512i* x) {
  __m512i pair[4], four[2];
  for (int i = 0; i < 4; ++i)
    pair[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]),
                               _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]));
  for (int i = 0; i < 2; ++i)
    four[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(pair[2 * i], pair[2 * i + 1]),
                               _mm512_unpackhi_epi64(pair[2 * i], pair[2 * i + 1]));
  const __m512i both = _mm512_add_epi32(_mm512_shuffle_i32x4(four[0], four[1], 0x88),
                                        _mm512_shuffle_i32x4(four[0], four[1], 0xdd));
  return _mm512_castsi512_si256(_mm512_add_epi32(_mm512_shuffle_i32x4(both, both, 0x88),
                                                 _mm512_shuffle_i32x4(both, both, 0xdd)));
}

constexpr int64_t kKeys = 8;

template <int R>
static inline DIJIANG_INLINE void score_eight(const int16_t* queries, const float* query_scales, int64_t d,
                                              const int8_t* keys, const float* scales, float* scores,
                                              int64_t stride) {
  const int64_t width = padded_codes(d);
  __m512i total[R][kKeys];
  each<R>([&](auto r) DIJIANG_INLINE {
    each<kKeys>([&](auto o) DIJIANG_INLINE { total[r][o] = _mm512_setzero_si512(); });
  });
  for (int64_t i = 0; i < d; i += kCodeStep) {
    const __mmask32 here = d - i >= kCodeStep ? 0xffffffffu : (1u << (d - i)) - 1u;
    __m512i query[R];
    each<R>([&](auto r) DIJIANG_INLINE { query[r] = _mm512_loadu_si512(queries + r * width + i); });
    each<kKeys>([&](auto o) DIJIANG_INLINE {
      const __m512i key = _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(here, keys + o * d + i));
      each<R>([&](auto r) DIJIANG_INLINE { total[r][o] = _mm512_dpwssd_epi32(total[r][o], key, query[r]); });
    });
  }
  const __m256 key_scales = _mm256_loadu_ps(scales);
  each<R>([&](auto r) DIJIANG_INLINE {
    const __m256 whole = _mm256_cvtepi32_ps(sums_of_eight(total[r]));
    _mm256_storeu_ps(scores + r * stride, (whole * query_scales[r]) * key_scales);
  });
}

template <int R>
static inline void score_code_rows(const int16_t* queries, const float* query_scales, int64_t d, const int8_t* keys,
                                   const float* scales, int64_t first, int64_t last, float* scores, int64_t stride,
                                   const uint8_t* behind) {
  int64_t j = first;
  for (; j + kKeys <= last; j += kKeys) {
    fetch_bytes(behind, j * d, (j + kKeys) * d);
    score_eight<R>(queries, query_scales, d, keys + j * d, scales + j, scores + j, stride);
  }
  for (; j < last; ++j)
    for (int r = 0; r < R; ++r) {
      int32_t total = 0;
      for (int64_t i = 0; i < d; ++i) total += queries[r * padded_codes(d) + i] * keys[j * d + i];
      scores[r * stride + j] = (static_cast<float>(total) * query_scales[r]) * scales[j];
    }
}

#else

template <int R>
static inline void score_code_rows(const int16_t*, const float*, int64_t, const int8_t*, const float*, int64_t,
                                   int64_t, float*, int64_t, const uint8_t*) {}

#endif

// scores[r][j] = q[r] . k[j] for rows first ... last - 1, of any number of queries.
static inline void score_codes(int64_t num_queries, const int16_t* queries, const float* query_scales, int64_t d,
                               const int8_t* keys, const float* scales, int64_t first, int64_t last, float* out,
                               int64_t stride, const uint8_t* behind) {
  constexpr int kTogether = 3;
  for (int64_t r = 0; r < num_queries; r += kTogether) {
    auto some = [&](auto heads) DIJIANG_INLINE {
      score_code_rows<heads>(queries + r * padded_codes(d), query_scales + r, d, keys, scales, first, last,
                             out + r * stride, stride, r == 0 ? behind : nullptr);
    };
    switch (num_queries - r) {
      case 1: some(std::integral_constant<int, 1>{}); break;
      case 2: some(std::integral_constant<int, 2>{}); break;
      default: some(std::integral_constant<int, kTogether>{}); break;
    }
  }
}

}  // namespace dijiang
