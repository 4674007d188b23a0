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

// 64 bytes from 32 numbers, of which `count` are there: the nearest in bf16, ties to even; a NaN stays one.
static inline DIJIANG_INLINE void put_halves(const float* x, int64_t count, uint8_t* to) {
  each<2>([&](auto i) DIJIANG_INLINE {
    const __m512 values = _mm512_maskz_loadu_ps(first_lanes(count - i * kLanes), x + i * kLanes);
    const __m512i bits = _mm512_castps_si512(values), upper = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    const __m512i halves = _mm512_mask_or_epi32(_mm512_srli_epi32(rounded, 16), is_nan, upper, _mm512_set1_epi32(64));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32 * i), _mm512_cvtepi32_epi16(halves));
  });
}

// What a row is multiplied with to become codes, and its scale: NaN for a row that is not finite.
static inline float inverse_of_row(const float* x, int64_t columns, float& scale) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);  // in the order of the numbers
  __m512i most = _mm512_setzero_si512();
  for (int64_t j = 0; j < columns; j += kLanes) {
    const __m512i bits = _mm512_castps_si512(_mm512_maskz_loadu_ps(first_lanes(columns - j), x + j));
    most = _mm512_max_epi32(most, _mm512_and_si512(bits, magnitude));
  }
  const int32_t bits = _mm512_reduce_max_epi32(most);
  float largest;
  std::memcpy(&largest, &bits, sizeof(largest));
  const bool is_finite = bits < 0x7f800000;
  scale = is_finite ? largest / 32767.0f : std::numeric_limits<float>::quiet_NaN();
  return is_finite && largest > 0.0f ? 32767.0f / largest : 0.0f;
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

#endif

}  // namespace dijiang
