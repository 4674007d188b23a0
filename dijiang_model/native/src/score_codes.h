// Places read in whole numbers: queries and weights are rounded to 16 bits, keys and values are codes of 8 bits (values
// perhaps of 4), and the sums are exact, so that their order does not matter: a block of rows and a single one give the same bits.
//
// A number of 16 bits is 256 high + low, both signed bytes; codes are shifted by 128 to be unsigned, as the instruction
// (vpdpbusd) wants one of each, and 128 times the sum of the other side is taken off in the end.
#pragma once

#include "window.h"

namespace dijiang {

constexpr int64_t kCodeChannels = 64;  // of a row at once, zeros behind its end
constexpr float kLargestWord = 32639.0f;  // 256 * 127 + 127
static inline int64_t padded_codes(int64_t d) { return (d + kCodeChannels - 1) / kCodeChannels * kCodeChannels; }

// Whether places are read so: elsewhere codes are widened to fp32.
constexpr bool kReadsCodes = DIJIANG_VNNI != 0;

// Numbers in 16 bits: x[i] / scale as 256 high[i] + low[i], and their sums.
struct Words {
  int8_t *high, *low;
  float scale;  // NaN if a number is not finite
  int32_t high_sum, low_sum;
};

// Bytes of the two planes of `count` numbers, padded to whole vectors of any kind.
static inline int64_t plane_bytes(int64_t count) { return (count + kCodeChannels - 1) / kCodeChannels * kCodeChannels; }

#if DIJIANG_VNNI

typedef int32_t FourBytes __attribute__((aligned(1), may_alias));

// Numbers of up to 64 places from `at` on in 16 bits, in two vectors; those from `count` on are zero. A number that is not
// finite becomes some integer.
static inline DIJIANG_INLINE void round_sixty_four(const float* at, int64_t count, __m512 inverse, __m512i& high, __m512i& low) {
  __m512i word[4];
  if (count >= kCodeChannels) {
    each<4>([&](auto k) DIJIANG_INLINE {
      word[k] = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(at + 16 * k), inverse));
    });
  } else {
    each<4>([&](auto k) DIJIANG_INLINE {
      const int64_t left = count - 16 * k;
      const __mmask16 here = left >= 16 ? 0xffffu : left > 0 ? (1u << left) - 1u : 0u;
      word[k] = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(here, at + 16 * k), inverse));
    });
  }
  __m512i above[2], below[2];
  each<2>([&](auto k) DIJIANG_INLINE {
    const __m512i pair = _mm512_packs_epi32(word[2 * k], word[2 * k + 1]);
    above[k] = _mm512_srai_epi16(_mm512_add_epi16(pair, _mm512_set1_epi16(128)), 8);
    below[k] = _mm512_sub_epi16(pair, _mm512_slli_epi16(above[k], 8));
  });
  // Packing goes quarter by quarter: fours of places come out as 0 4 8 12, 1 5 9 13 and so on.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  high = _mm512_permutexvar_epi32(order, _mm512_packs_epi16(above[0], above[1]));
  low = _mm512_permutexvar_epi32(order, _mm512_packs_epi16(below[0], below[1]));
}

// The first `count` numbers of x in 16 bits, zeros up to the planes' end; `most`: the largest magnitude, or NaN. The
// matrix unit needs no sums.
template <bool kSums = true>
static inline void round_words(const float* x, int64_t count, float most, Words& words) {
  const __m512 inverse = _mm512_set1_ps(most > 0.0f ? kLargestWord / most : 0.0f);
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i high_sum = _mm512_setzero_si512(), low_sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += kCodeChannels) {
    __m512i high, low;
    round_sixty_four(x + i, count - i, inverse, high, low);
    if (kSums) high_sum = _mm512_dpbusd_epi32(high_sum, ones, high);
    if (kSums) low_sum = _mm512_dpbusd_epi32(low_sum, ones, low);
    _mm512_storeu_si512(words.high + i, high);
    _mm512_storeu_si512(words.low + i, low);
  }
  words.scale = most / kLargestWord;
  if (!kSums) return;
  words.high_sum = _mm512_reduce_add_epi32(high_sum);
  words.low_sum = _mm512_reduce_add_epi32(low_sum);
}

template <bool kSums = true>
static inline void round_words(const float* x, int64_t count, Words& words) {
  round_words<kSums>(x, count, magnitude(x, count), words);
}

// 2^t to 2e-7 of it, for t of at most 1; 0 below -120, NaN stays NaN.
static inline DIJIANG_INLINE __m512 power_of_two(__m512 t) {
  constexpr int kDown = 9;  // towards minus infinity, without a flag
  const __m512 part = _mm512_reduce_ps(t, kDown);
  __m512 p = _mm512_set1_ps(1.8775767e-3f);
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(8.9893397e-3f));
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(5.5826318e-2f));
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(2.4015361e-1f));
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(6.9315308e-1f));
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(9.9999994e-1f));
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(t, _mm512_set1_ps(-120.0f), _CMP_NLT_UQ), p, t);
}

// Scores of `count` places become weights in 16 bits: w[j] = exp(x[j] - max x) scales[j]. x [padded to vectors, -inf
// behind the end] holds w then. Returns the sum of the exponentials.
template <bool kSums = true>
static inline float weigh_words(float* x, int64_t count, const float* scales, Words& words) {
  constexpr float kPowers = 1.44269504088896341f;  // of two in e
  const int64_t size = padded_rows(count);
  const __m512 powers = _mm512_set1_ps(kPowers), top = _mm512_set1_ps(most_of(x, size) * kPowers);
  __m512 total = _mm512_setzero_ps();
  __m512i most = _mm512_setzero_si512();  // no weight is negative: they are in the order of their bits, NaN behind all
  auto weigh = [&](int64_t j, __m512 own) DIJIANG_INLINE {
    const __m512 e = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(x + j), powers, top));
    const __m512 w = _mm512_mul_ps(e, own);
    total += e;
    most = _mm512_max_epu32(most, _mm512_castps_si512(w));
    _mm512_storeu_ps(x + j, w);
  };
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) weigh(j, _mm512_loadu_ps(scales + j));
  if (j < count) weigh(j, _mm512_maskz_loadu_ps((1u << (count - j)) - 1u, scales + j));
  round_words<kSums>(x, count, magnitude_of(_mm512_reduce_max_epu32(most)), words);
  return sum(total);
}

// total += four unsigned codes in each lane times the four signed bytes at `bytes`, in every lane. Not the intrinsic: the
// compiler loads the bytes apart and moves the sums about, for want of registers.
static inline DIJIANG_INLINE void add_four(__m512i& total, __m512i codes, const int8_t* bytes) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(total) : "v"(codes), "m"(*reinterpret_cast<const FourBytes*>(bytes)));
}

static inline DIJIANG_INLINE __m512i row_codes(const int8_t* row, int64_t channels) {
  const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
  if (channels >= kCodeChannels) return _mm512_xor_si512(_mm512_loadu_si512(row), sign);
  return _mm512_xor_si512(_mm512_maskz_loadu_epi8((1ull << channels) - 1ull, row), sign);
}

// 64 channels from `c` on of a row of values, unsigned: of 8 bits with 128 added, or of 4 with 8.
template <int Bits>
static inline DIJIANG_INLINE __m512i value_codes(const uint8_t* row, int64_t c, int64_t d) {
  if (Bits == 8) return row_codes(reinterpret_cast<const int8_t*>(row) + c, d - c);
  const __mmask32 here = d - c >= kCodeChannels ? 0xffffffffu : (1u << ((d - c) / 2)) - 1u;
  const __m512i pairs = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(here, row + c / 2));
  return _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi16(pairs, 4)), _mm512_set1_epi8(15));
}

// scores[r][j] = q[r] . keys[j] scales[j] for up to sixteen keys.
template <int R>
static inline DIJIANG_INLINE void score_sixteen(const Words* queries, int64_t d, const int8_t* keys,
                                                const float* scales, int64_t count, float* scores, int64_t stride) {
  __m512i high[R], low[R];
  each<R>([&](auto r) DIJIANG_INLINE { high[r] = low[r] = _mm512_setzero_si512(); });
  for (int64_t c = 0; c < d; c += kCodeChannels) {
    __m512i x[16];
    if (count >= 16) {
      each<16>([&](auto j) DIJIANG_INLINE { x[j] = row_codes(keys + j * d + c, d - c); });
    } else {
      for (int64_t j = 0; j < 16; ++j) x[j] = j < count ? row_codes(keys + j * d + c, d - c) : _mm512_setzero_si512();
    }
    transpose(x);
    each<16>([&](auto i) DIJIANG_INLINE {
      each<R>([&](auto r) DIJIANG_INLINE {
        add_four(high[r], x[i], queries[r].high + c + 4 * i);
        add_four(low[r], x[i], queries[r].low + c + 4 * i);
      });
    });
  }
  const __mmask16 here = count >= 16 ? 0xffffu : (1u << count) - 1u;
  const __m512 key_scales = _mm512_maskz_loadu_ps(here, scales);
  each<R>([&](auto r) DIJIANG_INLINE {
    const int32_t shift = -128 * (256 * queries[r].high_sum + queries[r].low_sum);
    const __m512i whole = _mm512_add_epi32(_mm512_add_epi32(_mm512_slli_epi32(high[r], 8), low[r]),
                                           _mm512_set1_epi32(shift));  // modulo 2^32, in which it has room
    const __m512 score = _mm512_mul_ps(_mm512_cvtepi32_ps(whole), _mm512_set1_ps(queries[r].scale));
    _mm512_mask_storeu_ps(scores + r * stride, here, _mm512_mul_ps(score, key_scales));
  });
}

template <int R>
static inline void score_code_rows(const Words* queries, int64_t d, const int8_t* keys, const float* scales,
                                   int64_t first, int64_t last, float* scores, int64_t stride, const Behind& behind) {
  for (int64_t j = first; j < last; j += 16) {
    behind.ask(j, j + 16);
    score_sixteen<R>(queries, d, keys + j * d, scales + j, last - j, scores + j, stride);
  }
}

// out[r] = sum_j w[r][j] rows[j] for `num_rows` rows, up to 64 channels from `c` on.
template <int R, int Bits>
static inline void weigh_channels(const Words* weights, const uint8_t* rows, int64_t d, int64_t c, int64_t num_rows,
                                  float* out, int64_t stride, const Behind& behind) {
  constexpr int32_t kShift = Bits == 8 ? 128 : 8;
  const int64_t bytes = d * Bits / 8;
  __m512i high[R][4], low[R][4];
  each<R>([&](auto r) DIJIANG_INLINE {
    each<4>([&](auto k) DIJIANG_INLINE { high[r][k] = low[r][k] = _mm512_setzero_si512(); });
  });
  for (int64_t j = 0; j < num_rows; j += 4) {
    behind.ask(j, j + 4);
    __m512i row[4];
    each<4>([&](auto o) DIJIANG_INLINE {  // rows behind the last one have no weight
      row[o] = value_codes<Bits>(rows + (j + o < num_rows ? j + o : j) * bytes, c, d);
    });
    const __m512i a = _mm512_unpacklo_epi8(row[0], row[1]), b = _mm512_unpackhi_epi8(row[0], row[1]);
    const __m512i e = _mm512_unpacklo_epi8(row[2], row[3]), f = _mm512_unpackhi_epi8(row[2], row[3]);
    // Four rows to a lane: lane p of quarter L has channel 16 L + 4 k + p.
    const __m512i four[4] = {_mm512_unpacklo_epi16(a, e), _mm512_unpackhi_epi16(a, e), _mm512_unpacklo_epi16(b, f),
                             _mm512_unpackhi_epi16(b, f)};
    each<R>([&](auto r) DIJIANG_INLINE {
      each<4>([&](auto k) DIJIANG_INLINE {
        add_four(high[r][k], four[k], weights[r].high + j);
        add_four(low[r][k], four[k], weights[r].low + j);
      });
    });
  }
  each<R>([&](auto r) DIJIANG_INLINE {
    const __m512i high_shift = _mm512_set1_epi32(-kShift * weights[r].high_sum);
    const __m512i low_shift = _mm512_set1_epi32(-kShift * weights[r].low_sum);
    const __m512 scale = _mm512_set1_ps(weights[r].scale);
    each<4>([&](auto k) DIJIANG_INLINE {
      const __m512 above = _mm512_cvtepi32_ps(_mm512_add_epi32(high[r][k], high_shift));
      const __m512 below = _mm512_cvtepi32_ps(_mm512_add_epi32(low[r][k], low_shift));
      float lanes[16];
      _mm512_storeu_ps(lanes, _mm512_mul_ps(_mm512_fmadd_ps(above, _mm512_set1_ps(256.0f), below), scale));
      for (int64_t quarter = 0; quarter < 4 && c + 16 * quarter < d; ++quarter)
        std::memcpy(out + r * stride + c + 16 * quarter + 4 * k, lanes + 4 * quarter, 4 * sizeof(float));
    });
  });
}

template <int R>
static inline void weigh_code_rows(const Words* weights, const uint8_t* rows, int64_t bits, int64_t d, int64_t num_rows,
                                   float* out, int64_t stride, const Behind& behind) {
  for (int64_t c = 0; c < d; c += kCodeChannels) {
    const Behind some = c == 0 ? behind : Behind();
    if (bits == 8) {
      weigh_channels<R, 8>(weights, rows, d, c, num_rows, out, stride, some);
    } else {
      weigh_channels<R, 4>(weights, rows, d, c, num_rows, out, stride, some);
    }
  }
}

#else

template <bool kSums = true>
static inline void round_words(const float*, int64_t, Words&) {}
template <bool kSums = true>
static inline float weigh_words(float*, int64_t, const float*, Words&) { return 0.0f; }
template <int R>
static inline void score_code_rows(const Words*, int64_t, const int8_t*, const float*, int64_t, int64_t, float*,
                                   int64_t, const Behind&) {}
template <int R>
static inline void weigh_code_rows(const Words*, const uint8_t*, int64_t, int64_t, int64_t, float*, int64_t,
                                   const Behind&) {}

#endif

// body(r, std::integral_constant<int, R>) for queries r ... r + R - 1, as many as registers have room for.
template <class Body>
static inline void by_threes(int64_t num_queries, const Body& body) {
  for (int64_t r = 0; r < num_queries; r += 3) {
    switch (num_queries - r) {
      case 1: body(r, std::integral_constant<int, 1>{}); break;
      case 2: body(r, std::integral_constant<int, 2>{}); break;
      default: body(r, std::integral_constant<int, 3>{}); break;
    }
  }
}

// scores[r][j] = q[r] . keys[j] scales[j] for rows first ... last - 1.
static inline void score_codes(int64_t num_queries, const Words* queries, int64_t d, const int8_t* keys,
                               const float* scales, int64_t first, int64_t last, float* out, int64_t stride,
                               const Behind& behind) {
  by_threes(num_queries, [&](int64_t r, auto some) {
    score_code_rows<some>(queries + r, d, keys, scales, first, last, out + r * stride, stride,
                          r == 0 ? behind : Behind());
  });
}

// out[r] = sum_j w[r][j] rows[j] for values of `bits`.
static inline void weigh_codes(int64_t num_queries, const Words* weights, const uint8_t* rows, int64_t bits, int64_t d,
                               int64_t num_rows, float* out, int64_t stride, const Behind& behind) {
  by_threes(num_queries, [&](int64_t r, auto some) {
    weigh_code_rows<some>(weights + r, rows, bits, d, num_rows, out + r * stride, stride, r == 0 ? behind : Behind());
  });
}

// The same in fp32 for values of 4 bits, one row at a time; `row` [d] is scratch.
static inline void weigh_nibbles(int64_t num_queries, const float* weights, int64_t weight_stride, const uint8_t* rows,
                                 int64_t d, int64_t num_rows, float* out, int64_t stride, float* row) {
  for (int64_t r = 0; r < num_queries; ++r) std::memset(out + r * stride, 0, static_cast<size_t>(d) * sizeof(float));
  for (int64_t j = 0; j < num_rows; ++j) {
    take_nibbles(rows + j * d / 2, d, 1.0f, row);
    for (int64_t r = 0; r < num_queries; ++r) {
      const Vec weight = splat(weights[r * weight_stride + j]);
      float* to = out + r * stride;
      for (int64_t i = 0; i < d; i += kLanes) store(to + i, fma(weight, load(row + i), load(to + i)));
    }
  }
}

}  // namespace dijiang
