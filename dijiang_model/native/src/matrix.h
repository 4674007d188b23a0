// y = W x + b for many rows x at once: each weight is read from memory once for all of them.
//
// Weights are fp32, used where they lie, or int8 with one scale per output. Int8 weights meet activations of 16
// bits (a scale per row, two planes of 8 bits), whose sums are exact integers: only the weights' rounding is felt.
#pragma once

#include "threads.h"
#include "vector.h"

#if defined(__AVX512VNNI__) && defined(__AVX512F__)
#include <immintrin.h>
#define DIJIANG_VNNI 1
#else
#define DIJIANG_VNNI 0
#endif

namespace dijiang {

struct Matrix {
  const float* weight;    // [rows, columns]; null with codes
  const int8_t* codes;    // [rows, padded(columns)], zeros behind the columns; null with fp32 weights
  const float* scales;    // [rows]
  const int32_t* totals;  // [rows] sum of the row's codes
  const float* bias;      // [rows] or null
  int64_t rows;           // 0: there is no such matrix
  int64_t columns;
};

constexpr int64_t kCodeBlock = 64;
static inline int64_t padded(int64_t columns) { return (columns + kCodeBlock - 1) / kCodeBlock * kCodeBlock; }

// The right-hand sides of one product: N rows in fp32, and the same in 16 bits for int8 weights.
struct Activations {
  const float* values;    // [N, stride]
  int64_t stride;
  const uint8_t* planes;  // [N, 2 * padded(columns)]: high bytes, low bytes of value / scale + 32768
  const float* scales;    // [N]
};

#define DIJIANG_UNROLL _Pragma("GCC unroll 8")

// sums[o][n] = w[o] . x[n]. Every sum is one vector accumulator over the columns in order, whatever O and N.
template <int O, int N>
static inline void dot_block(const float* w, int64_t w_stride, const float* x, int64_t x_stride, int64_t size,
                             float (&sums)[O][N]) {
  Vec total[O][N] = {};
  int64_t j = 0;
  for (; j + kLanes <= size; j += kLanes) {
    Vec weights[O];
    DIJIANG_UNROLL for (int o = 0; o < O; ++o) weights[o] = load(w + o * w_stride + j);
    DIJIANG_UNROLL for (int n = 0; n < N; ++n) {
      const Vec value = load(x + n * x_stride + j);
      DIJIANG_UNROLL for (int o = 0; o < O; ++o) total[o][n] += weights[o] * value;
    }
  }
  if (j < size) {
    for (int o = 0; o < O; ++o)
      for (int n = 0; n < N; ++n)
        total[o][n] += load_first(w + o * w_stride + j, size - j) * load_first(x + n * x_stride + j, size - j);
  }
  DIJIANG_UNROLL for (int o = 0; o < O; ++o) DIJIANG_UNROLL for (int n = 0; n < N; ++n) sums[o][n] = sum(total[o][n]);
}

#if DIJIANG_VNNI
static inline int32_t total_of(__m512i x) {
  typedef int32_t Int8Vec __attribute__((vector_size(32)));
  typedef int32_t Int4Vec __attribute__((vector_size(16)));
  Int8Vec halves[2];
  std::memcpy(halves, &x, 64);
  const Int8Vec eight = halves[0] + halves[1];
  Int4Vec quarters[2];
  std::memcpy(quarters, &eight, 32);
  const Int4Vec four = quarters[0] + quarters[1];
  return (four[0] + four[2]) + (four[1] + four[3]);
}
#endif

// An integer dot product of int8 codes and 16-bit activations, exact.
template <int O, int N>
static inline void dot_block(const int8_t* codes, int64_t size, const uint8_t* planes, const int32_t* totals,
                             int64_t (&sums)[O][N]) {
#if DIJIANG_VNNI
  __m512i high[O][N], low[O][N];
  DIJIANG_UNROLL for (int o = 0; o < O; ++o) DIJIANG_UNROLL for (int n = 0; n < N; ++n) {
    high[o][n] = low[o][n] = _mm512_setzero_si512();
  }
  for (int64_t j = 0; j < size; j += kCodeBlock) {
    __m512i weights[O];
    DIJIANG_UNROLL for (int o = 0; o < O; ++o) weights[o] = _mm512_loadu_si512(codes + o * size + j);
    DIJIANG_UNROLL for (int n = 0; n < N; ++n) {
      const uint8_t* row = planes + n * 2 * size + j;
      const __m512i upper = _mm512_loadu_si512(row), lower = _mm512_loadu_si512(row + size);
      DIJIANG_UNROLL for (int o = 0; o < O; ++o) {
        high[o][n] = _mm512_dpbusd_epi32(high[o][n], upper, weights[o]);
        low[o][n] = _mm512_dpbusd_epi32(low[o][n], lower, weights[o]);
      }
    }
  }
  for (int o = 0; o < O; ++o)
    for (int n = 0; n < N; ++n)
      sums[o][n] = 256 * static_cast<int64_t>(total_of(high[o][n])) +
                   total_of(low[o][n]) - 32768 * static_cast<int64_t>(totals[o]);
#else
  constexpr int64_t kExact = 512;  // 512 * 127 * 32768 < 2^31
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
      sums[o][n] = total - 32768 * static_cast<int64_t>(totals[o]);
    }
#endif
}

template <int O, int N>
static inline void product_block(const Matrix& m, const Activations& x, int64_t row, int64_t n, float* y,
                                 int64_t y_stride, bool add) {
  float values[O][N];
  if (m.codes != nullptr) {
    const int64_t size = padded(m.columns);
    int64_t sums[O][N];
    dot_block<O, N>(m.codes + row * size, size, x.planes + n * 2 * size, m.totals + row, sums);
    for (int o = 0; o < O; ++o)
      for (int i = 0; i < N; ++i)
        values[o][i] = static_cast<float>(sums[o][i]) * (m.scales[row + o] * x.scales[n + i]);
  } else {
    dot_block<O, N>(m.weight + row * m.columns, m.columns, x.values + n * x.stride, x.stride, m.columns, values);
  }
  for (int i = 0; i < N; ++i)
    for (int o = 0; o < O; ++o) {
      float value = values[o][i];
      if (m.bias != nullptr) value += m.bias[row + o];
      float& target = y[(n + i) * y_stride + row + o];
      target = add ? target + value : value;
    }
}

constexpr int kBlockOutputs = kLanes == 16 ? 4 : 2;
constexpr int kBlockRows = 4;
constexpr int kSingleOutputs = kLanes == 16 ? 8 : 4;

template <int O>
static inline void product_rows(const Matrix& m, const Activations& x, int64_t num_rows, int64_t row, float* y,
                                int64_t y_stride, bool add) {
  int64_t n = 0;
  for (; n + kBlockRows <= num_rows; n += kBlockRows) product_block<O, kBlockRows>(m, x, row, n, y, y_stride, add);
  for (; n + 2 <= num_rows; n += 2) product_block<O, 2>(m, x, row, n, y, y_stride, add);
  for (; n < num_rows; ++n) product_block<O, 1>(m, x, row, n, y, y_stride, add);
}

// Outputs first ... last - 1 of all rows: y[n][o] (+)= W[o] . x[n] + b[o].
static inline void product(const Matrix& m, const Activations& x, int64_t num_rows, int64_t first, int64_t last,
                           float* y, int64_t y_stride, bool add) {
  int64_t row = first;
  if (num_rows == 1) {
    for (; row + kSingleOutputs <= last; row += kSingleOutputs)
      product_block<kSingleOutputs, 1>(m, x, row, 0, y, y_stride, add);
  } else {
    for (; row + kBlockOutputs <= last; row += kBlockOutputs)
      product_rows<kBlockOutputs>(m, x, num_rows, row, y, y_stride, add);
  }
  for (; row < last; ++row) product_rows<1>(m, x, num_rows, row, y, y_stride, add);
}

// One row of `columns` values in 16 bits; returns the scale. A row that is not finite gets the scale NaN.
static inline float quantize(const float* x, int64_t columns, uint8_t* planes) {
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
