// Products with int4 weights in groups of columns: a weight is code * scale + minimum, or (code - 8) * scale.
//
// Within a block of columns the sums of codes times 16-bit activations are exact integers; blocks are added up in fp32,
// lane by lane, in an order that depends neither on how many rows there are nor on which outputs are asked for.
#pragma once

#include "operands.h"

namespace dijiang {

// kLanes numbers in fp16, none of them infinite; those from `count` on are 0 and not read.
static inline Vec load_halves(const uint16_t* from, int64_t count) {
#if defined(__AVX512F__)
  const auto mask = static_cast<__mmask16>((1u << count) - 1u);
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from));
#else
  uint16_t halves[kLanes] = {};
  std::memcpy(halves, from, static_cast<size_t>(count) * sizeof(uint16_t));
#if defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves)));
#else
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t magnitude = static_cast<uint32_t>(halves[i] & 0x7fff) << 13;
    std::memcpy(lanes + i, &magnitude, sizeof(float));
    lanes[i] *= 0x1p112f;  // the exponents' difference; subnormal halves come out right too
    if (halves[i] & 0x8000) lanes[i] = -lanes[i];
  }
  return load(lanes);
#endif
#endif
}

// What `Activations::sums` says, from a row's planes.
static inline void group_sums(const uint8_t* planes, int64_t columns, int64_t group_size, float* sums) {
  const uint8_t *high = planes, *low = planes + padded(columns);
  std::memset(sums, 0, static_cast<size_t>(padded_sums(columns)) * sizeof(float));
  for (int64_t first = 0; first < columns; first += group_size) {
    const int64_t last = first + group_size < columns ? first + group_size : columns;
    int32_t total = 0;
    for (int64_t j = first; j < last; ++j) total += 256 * static_cast<int32_t>(high[j]) + low[j];
    sums[first / group_size] = static_cast<float>(total - 32768 * static_cast<int32_t>(last - first));
  }
}

// Codes of one row in the order of memory are asked for so far ahead: measured, 1.17 times as fast as without, for the
// work on a line takes about as long as its way from memory.
constexpr int kInOrder = -1;
constexpr int64_t kPairsAheadBytes = 4096;

// The groups of O rows that one vector of scales covers.
template <int O>
struct GroupRange {
  int64_t first, first_column, last_column;
  Vec scales[O];
};

#if DIJIANG_VNNI
// total[o][n] += scale * (codes . activations) over the columns of a range.
template <int O, int N, int kFetch>
static inline DIJIANG_INLINE void add_range(const Matrix& m, const uint8_t* pairs, const uint8_t* behind, int64_t size,
                                            const uint8_t* planes, const GroupRange<O>& range, Vec (&total)[O][N]) {
  constexpr int kFetched = kFetch > 0 ? kFetch / 2 : 0;
  const __m512i low_half = _mm512_set1_epi8(15), sign = _mm512_set1_epi8(-128), zero = _mm512_setzero_si512();
  const bool is_small = m.group_size == kSmallestGroup;
  const __m512i step = _mm512_set1_epi32(is_small ? 2 : 1);
  __m512i lanes = is_small ? _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1) : zero;
  for (int64_t j = range.first_column; j < range.last_column; j += kCodeBlock) {
    __m512i codes[O];
    each<O / 2>([&](auto p) DIJIANG_INLINE {
      const __m512i both = _mm512_loadu_si512(pairs + p * size + j);
      codes[2 * p] = _mm512_and_si512(both, low_half);
      codes[2 * p + 1] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low_half);
      if (p < kFetched) fetch(behind + j * kFetched + p * kCodeBlock);
      if (kFetch == kInOrder) __builtin_prefetch(pairs + p * size + j + kPairsAheadBytes);
    });
    __m512 scales[O];
    each<O>([&](auto o) DIJIANG_INLINE { scales[o] = _mm512_permutexvar_ps(lanes, range.scales[o]); });
    lanes = _mm512_add_epi32(lanes, step);
    each<N>([&](auto n) DIJIANG_INLINE {
      const uint8_t* row = planes + n * 2 * size + j;
      const __m512i upper = _mm512_xor_si512(_mm512_loadu_si512(row), sign), lower = _mm512_loadu_si512(row + size);
      each<O>([&](auto o) DIJIANG_INLINE {
        __m512i sums = _mm512_slli_epi32(_mm512_dpbusd_epi32(zero, codes[o], upper), 8);
        sums = _mm512_dpbusd_epi32(sums, lower, codes[o]);
        total[o][n] = fma(scales[o], _mm512_cvtepi32_ps(sums), total[o][n]);
      });
    });
  }
}
#else
// Sums of 32 codes times activations, in the lanes or all in the first one.
static inline DIJIANG_INLINE Vec unit_sums(const uint8_t* codes, const uint8_t* upper, const uint8_t* lower) {
#if defined(__AVX2__)
  const __m256i code = _mm256_load_si256(reinterpret_cast<const __m256i*>(codes));
  const __m256i high = _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(upper)),
                                        _mm256_set1_epi8(-128));
  const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lower)), ones = _mm256_set1_epi16(1);
  const __m256i highs = _mm256_madd_epi16(_mm256_maddubs_epi16(code, high), ones);
  const __m256i lows = _mm256_madd_epi16(_mm256_maddubs_epi16(low, code), ones);
  return _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_slli_epi32(highs, 8), lows));
#else
  int32_t highs = 0, lows = 0;
  for (int i = 0; i < kSmallestGroup; ++i) {
    highs += (static_cast<int32_t>(upper[i]) - 128) * codes[i];
    lows += static_cast<int32_t>(lower[i]) * codes[i];
  }
  Vec sums = splat(0.0f);
  sums[0] = static_cast<float>(256 * highs + lows);
  return sums;
#endif
}

template <int O, int N, int kFetch>
static inline DIJIANG_INLINE void add_range(const Matrix& m, const uint8_t* pairs, const uint8_t* behind, int64_t size,
                                            const uint8_t* planes, const GroupRange<O>& range, Vec (&total)[O][N]) {
  constexpr int kFetched = kFetch > 0 ? kFetch / 2 : 0;
  float scales[O][kLanes];
  each<O>([&](auto o) DIJIANG_INLINE { store(scales[o], range.scales[o]); });
  for (int64_t j = range.first_column; j < range.last_column; j += kSmallestGroup) {
    alignas(32) uint8_t codes[O][kSmallestGroup];
    each<O / 2>([&](auto p) DIJIANG_INLINE {
      const uint8_t* both = pairs + p * size + j;
      for (int i = 0; i < kSmallestGroup; ++i) {
        codes[2 * p][i] = both[i] & 15;
        codes[2 * p + 1][i] = static_cast<uint8_t>(both[i] >> 4);
      }
      if (p < kFetched && j % kCodeBlock == 0) fetch(behind + j * kFetched + p * kCodeBlock);
    });
    const int64_t group = j / m.group_size - range.first;
    each<N>([&](auto n) DIJIANG_INLINE {
      const uint8_t* row = planes + n * 2 * size + j;
      each<O>([&](auto o) DIJIANG_INLINE {
        total[o][n] = fma(splat(scales[o][group]), unit_sums(codes[o], row, row + size), total[o][n]);
      });
    });
  }
}
#endif

// totals[o][n], whose lanes add up to W[row + o] . x[n] / x.scales[n]. `row` is even; a row behind the last one, which
// there may be with O = 2, means nothing. With kFetch, a share of kFetch / O of as many weights that lie `ahead` bytes
// behind is asked for, the `part`-th one; with kInOrder, the next lines.
template <int O, int N, int kFetch>
static inline void dot_pairs(const Matrix& m, const Activations& x, int64_t row, int64_t n, Vec (&totals)[O][N],
                             int64_t part = 0, int64_t ahead = 0) {
  const int64_t size = padded(m.columns), groups = m.num_groups(), stride = padded_sums(m.columns);
  const uint8_t* pairs = m.pairs + row / 2 * size;
  const uint8_t* behind = pairs + part * (kFetch > 0 ? kFetch / 2 : 0) * size + ahead;
  Vec total[O][N];
  each<O>([&](auto o) DIJIANG_INLINE { each<N>([&](auto i) DIJIANG_INLINE { total[o][i] = splat(0.0f); }); });
  for (int64_t first = 0; first < groups; first += kLanes) {
    const int64_t count = groups - first < kLanes ? groups - first : kLanes;
    const int64_t last_column = (first + kLanes) * m.group_size;
    GroupRange<O> range;
    range.first = first;
    range.first_column = first * m.group_size;
    range.last_column = last_column < size ? last_column : size;
    each<O>([&](auto o) DIJIANG_INLINE {
      const int64_t at = (O == 2 && row + o >= m.rows ? row : row + o) * groups + first;
      range.scales[o] = load_halves(m.group_scales + at, count);
      Vec minimums = range.scales[o] * splat(-8.0f);
      if (m.group_minimums != nullptr) minimums = load_halves(m.group_minimums + at, count);
      each<N>([&](auto i) DIJIANG_INLINE {
        total[o][i] = fma(minimums, load(x.sums + (n + i) * stride + first), total[o][i]);
      });
    });
    add_range<O, N, kFetch>(m, pairs, behind, size, x.rounded + n * 2 * size, range, total);
  }
  each<O>([&](auto o) DIJIANG_INLINE { each<N>([&](auto i) DIJIANG_INLINE { totals[o][i] = total[o][i]; }); });
}

// The same for one row, pair of outputs after pair in the order of memory.
template <int O>
static inline void pairs_in_order(const Matrix& m, const Activations& x, int64_t row, int64_t n, Vec (&totals)[O][1]) {
  const int64_t size = padded(m.columns), scale_bytes = O * m.num_groups() * static_cast<int64_t>(sizeof(uint16_t));
  fetch_next_pages(m.pairs + row / 2 * size, O / 2 * size);
  fetch_next_pages(m.group_scales + row * m.num_groups(), scale_bytes);
  if (m.group_minimums != nullptr) fetch_next_pages(m.group_minimums + row * m.num_groups(), scale_bytes);
  each<O / 2>([&](auto p) DIJIANG_INLINE {
    Vec pair[2][1];
    dot_pairs<2, 1, kInOrder>(m, x, row + 2 * p, n, pair);
    totals[2 * p][0] = pair[0][0];
    totals[2 * p + 1][0] = pair[1][0];
  });
}

}  // namespace dijiang
