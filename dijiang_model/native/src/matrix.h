// y = W x + b for many rows x at once: each weight is read from memory once for all of them.
//
// Weights are fp32, used where they lie; int8 with one scale per output; or int4 in groups (`int4.h`). Codes meet
// activations of 16 bits (a scale per row, two planes of 8 bits), whose sums are exact integers: only the weights'
// rounding is felt.
#pragma once

#include "int4.h"
#include "operands.h"
#include "threads.h"

namespace dijiang {

// sums[o / 4][n] = w[o] . x[n]. Every sum is one vector accumulator over the columns in order, whatever O and N.
// With kFetch, a share of kFetch / O of as many weights from `behind` on is asked for.
template <int O, int N, int kFetch = 0>
static inline void dot_block(const float* w, int64_t w_stride, const float* x, int64_t x_stride, int64_t size,
                             Vec4 (&sums)[O / 4][N], [[maybe_unused]] const float* behind = nullptr) {
  Vec total[O][N];
  each<O>([&](auto o) DIJIANG_INLINE { each<N>([&](auto n) DIJIANG_INLINE { total[o][n] = splat(0.0f); }); });
  auto add = [&](auto from, int64_t j) DIJIANG_INLINE {
    Vec weights[O];
    each<O>([&](auto o) DIJIANG_INLINE {
      weights[o] = from(w + o * w_stride + j);
      if (o < kFetch) fetch(behind + j * kFetch + o * kLanes);
    });
    each<N>([&](auto n) DIJIANG_INLINE {
      const Vec value = from(x + n * x_stride + j);
      each<O>([&](auto o) DIJIANG_INLINE { total[o][n] = fma(weights[o], value, total[o][n]); });
    });
  };
  int64_t j = 0;
  for (; j + kLanes <= size; j += kLanes) add([](const float* at) { return load(at); }, j);
  if (j < size) add([size, j](const float* at) { return load_first(at, size - j); }, j);
  each<O / 4>([&](auto o) DIJIANG_INLINE {
    each<N>([&](auto n) DIJIANG_INLINE {
      sums[o][n] = sum4(total[4 * o][n], total[4 * o + 1][n], total[4 * o + 2][n], total[4 * o + 3][n]);
    });
  });
}

// The same for few rows of x, output after output in the order of memory.
template <int O, int N>
static inline void dot_in_order(const float* w, const float* x, int64_t x_stride, int64_t size,
                                Vec4 (&sums)[O / 4][N]) {
  fetch_next_pages(w, O * size * static_cast<int64_t>(sizeof(float)));
  Vec total[O][N];
  each<O>([&](auto o) DIJIANG_INLINE {
    Vec sum[N];
    each<N>([&](auto n) DIJIANG_INLINE { sum[n] = splat(0.0f); });
    auto add = [&](auto from, int64_t j) DIJIANG_INLINE {
      const Vec weights = from(w + o * size + j);
      each<N>([&](auto n) DIJIANG_INLINE { sum[n] = fma(weights, from(x + n * x_stride + j), sum[n]); });
    };
    int64_t j = 0;
    for (; j + kLanes <= size; j += kLanes) add([](const float* at) { return load(at); }, j);
    if (j < size) add([size, j](const float* at) { return load_first(at, size - j); }, j);
    each<N>([&](auto n) DIJIANG_INLINE { total[o][n] = sum[n]; });
  });
  each<O / 4>([&](auto o) DIJIANG_INLINE {
    each<N>([&](auto n) DIJIANG_INLINE {
      sums[o][n] = sum4(total[4 * o][n], total[4 * o + 1][n], total[4 * o + 2][n], total[4 * o + 3][n]);
    });
  });
}

#if DIJIANG_VNNI
// Halves of each 128 bits of a and b, added: a's sums in the even pair of lanes, b's in the odd one.
static inline __m512i fold(__m512i a, __m512i b) {
  return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
}

// The sums of all lanes of four vectors.
static inline __m512i fold4(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = fold(a, b), cd = fold(c, d);
  return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}

// ... of four `high` ones in the lower half, of four `low` ones in the upper half.
static inline __m256i sum8(const __m512i (&high)[4], const __m512i (&low)[4]) {
  const __m512i h = fold4(high[0], high[1], high[2], high[3]), l = fold4(low[0], low[1], low[2], low[3]);
  const __m512i four = _mm512_add_epi32(_mm512_shuffle_i64x2(h, l, 0x44), _mm512_shuffle_i64x2(h, l, 0xee));
  const __m256i front = _mm512_castsi512_si256(four), back = _mm512_extracti64x4_epi64(four, 1);
  return _mm256_add_epi32(_mm256_permute2x128_si256(front, back, 0x20), _mm256_permute2x128_si256(front, back, 0x31));
}
#endif

typedef int64_t Long4 __attribute__((vector_size(32)));
typedef int32_t Int4At __attribute__((vector_size(16), aligned(4), may_alias));

#if DIJIANG_VNNI
// From vectors of sums to sums: high * 256 + low, less what the activations' offset of 32768 added.
template <int O, int N>
static inline void combine_codes(const __m512i (&high)[O][N], const __m512i (&low)[O][N], const int32_t* totals,
                                 Long4 (&sums)[O / 4][N]) {
  each<O / 4>([&](auto block) DIJIANG_INLINE {
    constexpr int o = 4 * block;
    const Long4 offset = __builtin_convertvector(*reinterpret_cast<const Int4At*>(totals + o), Long4) * 32768;
    each<N>([&](auto n) DIJIANG_INLINE {
      const __m256i both = sum8({high[o][n], high[o + 1][n], high[o + 2][n], high[o + 3][n]},
                                {low[o][n], low[o + 1][n], low[o + 2][n], low[o + 3][n]});
      const auto upper = reinterpret_cast<Long4>(_mm256_cvtepi32_epi64(_mm256_castsi256_si128(both)));
      const auto lower = reinterpret_cast<Long4>(_mm256_cvtepi32_epi64(_mm256_extracti128_si256(both, 1)));
      sums[block][n] = upper * 256 + lower - offset;
    });
  });
}
#endif

// Integer dot products of int8 codes and 16-bit activations, exact: sums[o / 4][n].
template <int O, int N, int kFetch>
static inline void dot_codes(const int8_t* codes, int64_t size, const uint8_t* planes, const int32_t* totals,
                             Long4 (&sums)[O / 4][N], [[maybe_unused]] const int8_t* behind) {
#if DIJIANG_VNNI
  __m512i high[O][N], low[O][N];
  each<O>([&](auto o) DIJIANG_INLINE {
    each<N>([&](auto n) DIJIANG_INLINE { high[o][n] = low[o][n] = _mm512_setzero_si512(); });
  });
  for (int64_t j = 0; j < size; j += kCodeBlock) {
    __m512i weights[O];
    each<O>([&](auto o) DIJIANG_INLINE {
      weights[o] = _mm512_loadu_si512(codes + o * size + j);
      if (o < kFetch) fetch(behind + j * kFetch + o * kCodeBlock);
    });
    each<N>([&](auto n) DIJIANG_INLINE {
      const uint8_t* row = planes + n * 2 * size + j;
      const __m512i upper = _mm512_loadu_si512(row), lower = _mm512_loadu_si512(row + size);
      each<O>([&](auto o) DIJIANG_INLINE {
        high[o][n] = _mm512_dpbusd_epi32(high[o][n], upper, weights[o]);
        low[o][n] = _mm512_dpbusd_epi32(low[o][n], lower, weights[o]);
      });
    });
  }
  combine_codes<O, N>(high, low, totals, sums);
#else
  constexpr int64_t kExact = 32768;  // 32768 * 255 * 127 < 2^31
  for (int o = 0; o < O; ++o)
    for (int n = 0; n < N; ++n) {
      const uint8_t *upper = planes + n * 2 * size, *lower = upper + size;
      int64_t total = 0;
      for (int64_t first = 0; first < size; first += kExact) {
        const int64_t last = first + kExact < size ? first + kExact : size;
        int32_t high = 0, low = 0;
        for (int64_t j = first; j < last; ++j) {
          high += static_cast<int32_t>(upper[j]) * codes[o * size + j];
          low += static_cast<int32_t>(lower[j]) * codes[o * size + j];
        }
        total += 256 * static_cast<int64_t>(high) + low;
      }
      sums[o / 4][n][o % 4] = total - 32768 * static_cast<int64_t>(totals[o]);
    }
#endif
}

#if DIJIANG_VNNI
// The same for one row, output after output in the order of memory.
template <int O>
static inline void codes_in_order(const int8_t* codes, int64_t size, const uint8_t* planes, const int32_t* totals,
                                  Long4 (&sums)[O / 4][1]) {
  fetch_next_pages(codes, O * size);
  __m512i high[O][1], low[O][1];
  each<O>([&](auto o) DIJIANG_INLINE {
    const int8_t* row = codes + o * size;
    __m512i upper = _mm512_setzero_si512(), lower = upper;
    for (int64_t j = 0; j < size; j += kCodeBlock) {
      const __m512i weights = _mm512_loadu_si512(row + j);
      upper = _mm512_dpbusd_epi32(upper, _mm512_loadu_si512(planes + j), weights);
      lower = _mm512_dpbusd_epi32(lower, _mm512_loadu_si512(planes + size + j), weights);
    }
    high[o][0] = upper;
    low[o][0] = lower;
  });
  combine_codes<O, 1>(high, low, totals, sums);
}
#else
template <int O>
static inline void codes_in_order(const int8_t* codes, int64_t size, const uint8_t* planes, const int32_t* totals,
                                  Long4 (&sums)[O / 4][1]) {
  dot_codes<O, 1, 0>(codes, size, planes, totals, sums, nullptr);
}
#endif

// How a block is read: with kInOrder one output after the other, else all side by side, asking for a share of
// kFetch / O of as many weights, the `part`-th one, which lie `ahead` bytes behind the block.

enum class Kind { kFloat, kInt8, kInt4 };

// y[n ... n + N - 1][row ... row + O - 1] (+)= W x + b, O a multiple of 4.
template <int O, int N, Kind kKind, int kFetch>
static inline void product_block(const Matrix& m, const Activations& x, int64_t row, int64_t n, float* y,
                                 int64_t y_stride, bool add, int64_t part = 0, int64_t ahead = kAheadBytes) {
  Vec4 values[O / 4][N];
  if constexpr (kKind == Kind::kInt8) {
    const int64_t size = padded(m.columns);
    const int8_t* codes = m.codes + row * size;
    const uint8_t* planes = x.planes + n * 2 * size;
    Long4 sums[O / 4][N];
    if constexpr (kFetch == kInOrder) {
      static_assert(N == 1);
      codes_in_order<O>(codes, size, planes, m.totals + row, sums);
    } else {
      dot_codes<O, N, kFetch>(codes, size, planes, m.totals + row, sums, codes + part * kFetch * size + ahead);
    }
    each<O / 4>([&](auto o) DIJIANG_INLINE {
      const Vec4 scales = load4(m.scales + row + 4 * o);
      each<N>([&](auto i) DIJIANG_INLINE {
        values[o][i] = __builtin_convertvector(sums[o][i], Vec4) * (scales * x.scales[n + i]);
      });
    });
  } else if constexpr (kKind == Kind::kInt4) {
    Vec totals[O][N];
    if constexpr (kFetch == kInOrder) {
      static_assert(N == 1);
      pairs_in_order<O>(m, x, row, n, totals);
    } else {
      dot_pairs<O, N, kFetch>(m, x, row, n, totals, part, ahead);
    }
    each<O / 4>([&](auto block) DIJIANG_INLINE {
      constexpr int o = 4 * block;
      each<N>([&](auto i) DIJIANG_INLINE {
        values[block][i] = sum4(totals[o][i], totals[o + 1][i], totals[o + 2][i], totals[o + 3][i]) * x.scales[n + i];
      });
    });
  } else {
    const float *weight = m.weight + row * m.columns, *right = x.values + n * x.stride;
    if constexpr (kFetch == kInOrder) {
      dot_in_order<O, N>(weight, right, x.stride, m.columns, values);
    } else {
      const float* behind = weight + part * kFetch * m.columns + ahead / static_cast<int64_t>(sizeof(float));
      dot_block<O, N, kFetch>(weight, m.columns, right, x.stride, m.columns, values, behind);
    }
  }
  each<N>([&](auto i) DIJIANG_INLINE {
    each<O / 4>([&](auto o) DIJIANG_INLINE {
      Vec4 value = values[o][i];
      if (m.bias != nullptr) value += load4(m.bias + row + 4 * o);
      float* target = y + (n + i) * y_stride + row + 4 * o;
      store4(target, add ? load4(target) + value : value);
    });
  });
}

// One output of one row, in the same order as in blocks: for the last few outputs of a matrix.
static inline void product_single(const Matrix& m, const Activations& x, int64_t row, int64_t n, float& y, bool add) {
  float value;
  if (m.codes != nullptr) {
    const int64_t size = padded(m.columns);
    const int8_t* codes = m.codes + row * size;
    const uint8_t *upper = x.planes + n * 2 * size, *lower = upper + size;
    int64_t total = -32768 * static_cast<int64_t>(m.totals[row]);
    for (int64_t j = 0; j < size; ++j) total += (256 * static_cast<int64_t>(upper[j]) + lower[j]) * codes[j];
    value = static_cast<float>(total) * (m.scales[row] * x.scales[n]);
  } else if (m.pairs != nullptr) {
    Vec totals[2][1];
    dot_pairs<2, 1, 0>(m, x, row - row % 2, n, totals);
    value = sum(totals[row % 2][0]) * x.scales[n];
  } else {
    value = dot(m.weight + row * m.columns, x.values + n * x.stride, m.columns);
  }
  if (m.bias != nullptr) value += m.bias[row];
  y = add ? y + value : value;
}

// Blocks that fill the registers: accumulators, the weights of a block and one row's values.
constexpr bool kIsWide = kLanes == 16;
template <Kind kKind>
constexpr int kBlockRows = kIsWide && kKind == Kind::kFloat ? 4 : 2;

// O outputs of rows n ... last_n - 1; the first O / kFetch blocks of all rows ask for weights behind, a share each.
template <int O, Kind kKind, int kFetch>
static inline void product_outputs(const Matrix& m, const Activations& x, int64_t n, int64_t last_n, int64_t row,
                                   float* y, int64_t y_stride, bool add, int64_t ahead = kAheadBytes) {
  constexpr int kRows = kBlockRows<kKind>;
  int64_t part = n / kRows;
  auto block = [&](auto rows) DIJIANG_INLINE {
    if (part < O / kFetch) {
      product_block<O, rows, kKind, kFetch>(m, x, row, n, y, y_stride, add, part++, ahead);
    } else {
      product_block<O, rows, kKind, 0>(m, x, row, n, y, y_stride, add);
    }
    n += rows;
  };
  while (n + kRows <= last_n) block(std::integral_constant<int, kRows>{});
  while (kRows > 2 && n + 2 <= last_n) block(std::integral_constant<int, 2>{});
  while (n < last_n) block(std::integral_constant<int, 1>{});
}

// Many rows do not fit in the first-level cache beside the weights. So some rows meet a panel of outputs, then the next
// rows the same panel, which waits in the second-level cache; meanwhile the next panel is asked for.
constexpr int64_t kPanelOutputs = 32, kPanelRows = 8;

template <Kind kKind>
static inline int64_t product_panels(const Matrix& m, const Activations& x, int64_t num_rows, int64_t row, int64_t last,
                                     float* y, int64_t y_stride, bool add) {
  const int64_t bytes = m.bytes_per_output();
  for (; row + kPanelOutputs <= last; row += kPanelOutputs)
    for (int64_t n = 0; n < num_rows; n += kPanelRows)
      for (int64_t o = 0; o < kPanelOutputs; o += 4)
        product_outputs<4, kKind, 1>(m, x, n, n + kPanelRows < num_rows ? n + kPanelRows : num_rows, row + o, y,
                                     y_stride, add, kPanelOutputs * bytes);
  return row;
}

template <Kind kKind>
static inline void product_range(const Matrix& m, const Activations& x, int64_t num_rows, int64_t first, int64_t last,
                                 float* y, int64_t y_stride, bool add) {
  // Spread over all rows where that was measured to be faster: not for codes, whose rows are short.
  const int64_t num_blocks = kKind != Kind::kFloat ? 1 : num_rows / kBlockRows<kKind>;
  int64_t row = first;
  auto single = [&] {
    for (int64_t n = 0; n < num_rows; ++n) product_single(m, x, row, n, y[n * y_stride + row], add);
  };
  if (kKind == Kind::kInt4 && row < last && row % 2 != 0) single(), ++row;  // a byte holds rows of both parities
  for (; num_rows == 1 && row + 8 <= last; row += 8)
    product_block<8, 1, kKind, kInOrder>(m, x, row, 0, y, y_stride, add);
  if constexpr (kKind == Kind::kFloat)
    for (; num_rows == 2 && row + 4 <= last; row += 4)
      product_block<4, 2, kKind, kInOrder>(m, x, row, 0, y, y_stride, add);
  if (num_blocks >= 4) row = product_panels<kKind>(m, x, num_rows, row, last, y, y_stride, add);
  for (; row + 4 <= last; row += 4) {
    if (num_blocks < 2) {
      product_outputs<4, kKind, 4>(m, x, 0, num_rows, row, y, y_stride, add);
    } else if (num_blocks < 4) {
      product_outputs<4, kKind, 2>(m, x, 0, num_rows, row, y, y_stride, add);
    } else {
      product_outputs<4, kKind, 1>(m, x, 0, num_rows, row, y, y_stride, add);
    }
  }
  for (; row < last; ++row) single();
}

// Outputs first ... last - 1 of all rows: y[n][o] (+)= W[o] . x[n] + b[o].
static inline void product(const Matrix& m, const Activations& x, int64_t num_rows, int64_t first, int64_t last,
                           float* y, int64_t y_stride, bool add) {
  if (m.codes != nullptr) {
    product_range<Kind::kInt8>(m, x, num_rows, first, last, y, y_stride, add);
  } else if (m.pairs != nullptr) {
    product_range<Kind::kInt4>(m, x, num_rows, first, last, y, y_stride, add);
  } else {
    product_range<Kind::kFloat>(m, x, num_rows, first, last, y, y_stride, add);
  }
}

// One row of `columns` values in 16 bits; returns the scale. A row that is not finite gets the scale NaN.
// With a group size, `sums` gets what `Activations::sums` says.
static inline float quantize(const float* x, int64_t columns, uint8_t* planes, int64_t group_size, float* sums) {
  const int64_t size = padded(columns);
  float most = 0.0f, finite = 0.0f;
  for (int64_t j = 0; j < columns; ++j) {
    const float magnitude = std::fabs(x[j]);
    most = magnitude > most ? magnitude : most;
  }
  for (int64_t j = 0; j < columns; ++j) finite += x[j] * 0.0f;
  const float inverse = most > 0.0f ? 32767.0f / most : 0.0f;
  uint8_t *high = planes, *low = planes + size;
  if (finite == 0.0f) {
    for (int64_t j = 0; j < columns; ++j) {
      const float shifted = (x[j] * inverse + 12582912.0f) - 12582912.0f;  // rounded to an integer
      const uint32_t code = static_cast<uint32_t>(static_cast<int32_t>(shifted) + 32768);
      high[j] = static_cast<uint8_t>(code >> 8);
      low[j] = static_cast<uint8_t>(code);
    }
  } else {
    std::memset(planes, 0, static_cast<size_t>(2 * size));
  }
  std::memset(high + columns, 0, static_cast<size_t>(size - columns));
  std::memset(low + columns, 0, static_cast<size_t>(size - columns));
  if (group_size > 0) group_sums(planes, columns, group_size, sums);
  return most / 32767.0f + finite;
}

// How many outputs one task computes: a few tasks for each thread, whole blocks.
static inline int64_t outputs_per_task(int64_t rows, int num_threads) {
  constexpr int64_t kBlock = 16;
  if (num_threads <= 1) return rows;
  const int64_t wanted = (rows + num_threads * 6 - 1) / (num_threads * 6);
  return (wanted + kBlock - 1) / kBlock * kBlock;
}

}  // namespace dijiang
