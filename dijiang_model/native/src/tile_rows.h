// Rows as the matrix unit reads them, rounded to 16 bits on the way.
//
// One row lies as it is: bf16, or int8's two planes: signed high bytes and unsigned low bytes of value / scale. Of
// several, 16 go together, in tiles [k][16 rows][4 bytes]; behind the last row there are zeros.
#pragma once

#include "operands.h"
#include "tile_unit.h"

namespace dijiang {

// Whether products with a matrix are the matrix unit's, for any number of rows: a row's bits are those of one unit.
// In int32 there is room for the sums of 32,768 columns (`join_planes`).
static inline bool takes_tiles(const Matrix& m) {
  return DIJIANG_TILES && m.rows > 0 && (m.halves != nullptr || (m.codes != nullptr && padded(m.columns) <= 32768));
}

// How many rows are made ready together.
static inline int64_t rows_together(const Matrix& reader, int64_t num_rows) {
  return takes_tiles(reader) && num_rows > 1 ? kTileRows : 1;
}

#if DIJIANG_TILES

static inline __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count >= kLanes ? 0xffffu : (1u << (count < 0 ? 0 : count)) - 1u);
}

// 64 bytes of each plane from 64 numbers, of which `count` are there.
static inline DIJIANG_INLINE void put_codes(const float* x, int64_t count, __m512 inverse, uint8_t* high, uint8_t* low) {
  each<4>([&](auto i) DIJIANG_INLINE {
    const __m512 values = _mm512_maskz_loadu_ps(first_lanes(count - i * kLanes), x + i * kLanes);
    const __m512i codes = _mm512_cvtps_epi32(_mm512_mul_ps(values, inverse));
    const __m128i lows = _mm512_cvtepi32_epi8(codes), highs = _mm512_cvtepi32_epi8(_mm512_srai_epi32(codes, 8));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(low + i * kLanes), lows);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(high + i * kLanes), highs);
  });
}

// The nearest numbers in bf16, ties to even; a NaN stays one.
static inline DIJIANG_INLINE __m512i nearest_halves(__m512 values) {
  const __m512i bits = _mm512_castps_si512(values), upper = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(_mm512_srli_epi32(rounded, 16), is_nan, upper, _mm512_set1_epi32(64));
}

// 64 bytes from 32 numbers, of which `count` are there.
static inline DIJIANG_INLINE void put_halves(const float* x, int64_t count, uint8_t* to) {
  each<2>([&](auto i) DIJIANG_INLINE {
    const __m512 values = _mm512_maskz_loadu_ps(first_lanes(count - i * kLanes), x + i * kLanes);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32 * i), _mm512_cvtepi32_epi16(nearest_halves(values)));
  });
}

// What a row is multiplied with to become codes, from the bits of its largest magnitude, and its scale: NaN for a row
// that is not finite.
static inline float inverse_of_largest(int32_t bits, float& scale) {
  float largest;
  std::memcpy(&largest, &bits, sizeof(largest));
  const bool is_finite = bits < 0x7f800000;
  scale = is_finite ? largest / 32767.0f : std::numeric_limits<float>::quiet_NaN();
  return is_finite && largest > 0.0f ? 32767.0f / largest : 0.0f;
}

static inline float inverse_of_row(const float* x, int64_t columns, float& scale) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);  // in the order of the numbers
  __m512i most = _mm512_setzero_si512();
  for (int64_t j = 0; j < columns; j += kLanes) {
    const __m512i bits = _mm512_castps_si512(_mm512_maskz_loadu_ps(first_lanes(columns - j), x + j));
    most = _mm512_max_epi32(most, _mm512_and_si512(bits, magnitude));
  }
  return inverse_of_largest(_mm512_reduce_max_epi32(most), scale);
}

// One row as it lies.
static inline void round_row_to_planes(const Matrix& reader, const float* x, uint8_t* to, float& scale) {
  const int64_t columns = reader.columns, size = padded(columns);
  if (reader.halves != nullptr) {
    for (int64_t j = 0; j < size; j += 32) put_halves(x + j, columns - j, to + 2 * j);
    return;
  }
  const __m512 inverse = _mm512_set1_ps(inverse_of_row(x, columns, scale));
  const int64_t last = scale == scale ? columns : 0;  // infinity times 0 is no code
  for (int64_t j = 0; j < size; j += kCodeBlock) put_codes(x + j, last - j, inverse, to + j, to + size + j);
}

static inline void put_tile(const uint8_t (&rows)[kTileRows][kTileRowBytes], uint8_t* to) {
  __m512i lines[16];
  each<16>([&](auto n) DIJIANG_INLINE { lines[n] = _mm512_load_si512(rows[n]); });
  transpose(lines);
  each<16>([&](auto k) DIJIANG_INLINE { _mm512_storeu_si512(to + k * kTileRowBytes, lines[k]); });
}

// `count` rows of fp32, 16 at most, as tiles: for int8 one of high and one of low bytes in turn.
static inline void round_rows_to_tiles(const Matrix& reader, const float* x, int64_t stride, int64_t count, uint8_t* to,
                                       float* scales) {
  const int64_t columns = reader.columns;
  alignas(64) uint8_t high[kTileRows][kTileRowBytes] = {}, low[kTileRows][kTileRowBytes] = {};
  if (reader.halves != nullptr) {
    for (int64_t j = 0; j < columns; j += 32, to += kTileBytes) {
      for (int64_t n = 0; n < count; ++n) put_halves(x + n * stride + j, columns - j, high[n]);
      put_tile(high, to);
    }
    return;
  }
  float inverses[kTileRows];
  for (int64_t n = 0; n < count; ++n) inverses[n] = inverse_of_row(x + n * stride, columns, scales[n]);
  for (int64_t j = 0; j < columns; j += kCodeBlock, to += 2 * kTileBytes) {
    for (int64_t n = 0; n < count; ++n) {
      const int64_t last = scales[n] == scales[n] ? columns : 0;  // infinity times 0 is no code
      put_codes(x + n * stride + j, last - j, _mm512_set1_ps(inverses[n]), high[n], low[n]);
    }
    put_tile(high, to);
    put_tile(low, to + kTileBytes);
  }
}

// Four numbers to each lane: the low bytes of their codes, and the high bytes.
static inline DIJIANG_INLINE void put_four_codes(const __m512i (&codes)[4], uint8_t* high, uint8_t* low) {
  // A lane's bytes: low, low, high, high of two codes.
  const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15));
  constexpr __mmask32 kOdd = 0xaaaaaaaau;
  __m512i pairs[2];
  each<2>([&](auto i) DIJIANG_INLINE {
    pairs[i] = _mm512_mask_blend_epi16(kOdd, codes[2 * i], _mm512_slli_epi32(codes[2 * i + 1], 16));
    pairs[i] = _mm512_shuffle_epi8(pairs[i], order);
  });
  _mm512_storeu_si512(low, _mm512_mask_blend_epi16(kOdd, pairs[0], _mm512_slli_epi32(pairs[1], 16)));
  _mm512_storeu_si512(high, _mm512_mask_blend_epi16(kOdd, _mm512_srli_epi32(pairs[0], 16), pairs[1]));
}

// The same from columns [columns][16 rows], a multiple of 64 of them, to the same bits.
static inline void round_columns_to_tiles(const Matrix& reader, const float* x, int64_t count, uint8_t* to, float* scales) {
  const int64_t columns = reader.columns;
  if (reader.halves != nullptr) {
    for (int64_t j = 0; j < columns; j += 2, x += 2 * kLanes, to += kTileRowBytes) {
      const __m512i even = nearest_halves(_mm512_loadu_ps(x)), odd = nearest_halves(_mm512_loadu_ps(x + kLanes));
      _mm512_storeu_si512(to, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
    return;
  }
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i most[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
  for (int64_t j = 0; j < columns; j += 2)
    each<2>([&](auto i) DIJIANG_INLINE {
      const __m512i bits = _mm512_castps_si512(_mm512_loadu_ps(x + (j + i) * kLanes));
      most[i] = _mm512_max_epi32(most[i], _mm512_and_si512(bits, magnitude));
    });
  alignas(64) int32_t largest[kLanes];
  alignas(64) float inverses[kLanes] = {};
  _mm512_store_si512(largest, _mm512_max_epi32(most[0], most[1]));
  for (int64_t n = 0; n < count; ++n) inverses[n] = inverse_of_largest(largest[n], scales[n]);
  const __m512 inverse = _mm512_load_ps(inverses);
  const __mmask16 is_there = _mm512_cmp_ps_mask(inverse, _mm512_setzero_ps(), _CMP_NEQ_UQ);  // infinity times 0 is no code
  for (int64_t j = 0; j < columns; j += kCodeBlock, to += 2 * kTileBytes)
    for (int64_t k = 0; k < kTileRows; ++k, x += 4 * kLanes) {
      __m512i codes[4];
      each<4>([&](auto i) DIJIANG_INLINE {
        codes[i] = _mm512_maskz_cvtps_epi32(is_there, _mm512_mul_ps(_mm512_loadu_ps(x + i * kLanes), inverse));
      });
      put_four_codes(codes, to + k * kTileRowBytes, to + kTileBytes + k * kTileRowBytes);
    }
}

#endif

}  // namespace dijiang
