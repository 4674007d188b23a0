// Rows made ready for products with weights that are not fp32.
#pragma once

#include "int4.h"
#include "operands.h"
#include "tile_rows.h"

namespace dijiang {

static inline int32_t bits_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

// put(j, code): x[j] / scale as the nearest integer, the largest of magnitude 32767. Returns the scale.
// A row that is not finite becomes zeros with the scale NaN.
template <class Put>
static inline DIJIANG_INLINE float round_to_codes(const float* x, int64_t columns, const Put& put) {
  int32_t bits = 0;
  for (int64_t j = 0; j < columns; ++j) {
    const int32_t magnitude = bits_of(x[j]) & 0x7fffffff;  // in the order of the numbers, and the compiler's vectors know it
    bits = magnitude > bits ? magnitude : bits;
  }
  float most;
  std::memcpy(&most, &bits, sizeof(most));
  if (bits >= 0x7f800000) {
    for (int64_t j = 0; j < columns; ++j) put(j, 0);
    return std::numeric_limits<float>::quiet_NaN();
  }
  const float inverse = most > 0.0f ? 32767.0f / most : 0.0f;
  for (int64_t j = 0; j < columns; ++j) {
    const float whole = (x[j] * inverse + 12582912.0f) - 12582912.0f;  // rounded to an integer
    put(j, static_cast<int32_t>(whole));
  }
  return most / 32767.0f;
}

// The nearest numbers in bf16, ties to even; a NaN stays one.
static inline void round_to_halves(const float* x, int64_t columns, uint16_t* halves) {
  for (int64_t j = 0; j < columns; ++j) {
    const auto bits = static_cast<uint32_t>(bits_of(x[j]));
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    halves[j] = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
  }
}

// A row of fp32 as a product with the matrix reads it: `Activations::rounded`, and `sums` for int4. Returns its scale.
static inline float round_row(const Matrix& reader, const float* x, int64_t columns, uint8_t* rounded, float* sums) {
  const int64_t size = padded(columns);
  std::memset(rounded, 0, static_cast<size_t>(2 * size));
  if (reader.halves != nullptr) {
    round_to_halves(x, columns, reinterpret_cast<uint16_t*>(rounded));
    return 1.0f;
  }
  if (reader.codes != nullptr) {
    auto* codes = reinterpret_cast<int16_t*>(rounded);
    return round_to_codes(x, columns, [=](int64_t j, int32_t code) { codes[j] = static_cast<int16_t>(code); });
  }
  uint8_t *high = rounded, *low = rounded + size;
  const float scale = round_to_codes(x, columns, [=](int64_t j, int32_t code) {
    high[j] = static_cast<uint8_t>((code + 32768) >> 8);
    low[j] = static_cast<uint8_t>(code);
  });
  group_sums(rounded, columns, reader.group_size, sums);
  return scale;
}

// Bytes of that for rows of so many columns; whole tiles of them.
static inline int64_t rounded_bytes(int64_t num_rows, int64_t columns) {
  return (num_rows + kTileRows - 1) / kTileRows * kTileRows * 2 * padded(columns);
}

// Rows n ... n + count - 1 of num_rows made ready, `rows_together` of them or what is left.
static inline void round_rows(const Matrix& reader, const float* values, int64_t num_rows, int64_t n, int64_t count,
                              uint8_t* rounded, float* scales, float* sums) {
  const int64_t columns = reader.columns;
#if DIJIANG_TILES
  if (takes_tiles(reader)) {
    uint8_t* to = rounded + n * 2 * padded(columns);
    if (num_rows == 1) {
      round_row_to_planes(reader, values, to, scales[0]);
    } else {
      round_rows_to_tiles(reader, values + n * columns, columns, count, to, scales + n);
    }
    return;
  }
#endif
  for (int64_t i = n; i < n + count; ++i)
    scales[i] = round_row(reader, values + i * columns, columns, rounded + i * 2 * padded(columns),
                          sums + i * padded_sums(columns));
}

}  // namespace dijiang
