// Products by the matrix unit, of int8 and bf16 weights as they lie and rows as `tile_rows.h` lays them out.
//
// int8: sums are exact integers, 256 times those of high bytes and those of low bytes, rounded to fp32 once. bf16: sums
// are the unit's, step after step of 32 columns. Neither depends on what else is computed.
#pragma once

#include "tile_rows.h"

namespace dijiang {

#if DIJIANG_TILES

// What a block of outputs reads: rows of weights, of which `outputs` are there, and one or two tiles a step of 64 bytes.
struct TileOperands {
  const uint8_t* weights;
  int64_t stride;  // bytes of a row of weights, all of them numbers
  int64_t outputs;
  const uint8_t* right;
  int64_t right_step, right_other, right_stride;  // bytes to the next step, to the second tile, between rows of a tile
  const uint8_t* behind;  // weights that are asked for meanwhile, or null
};

// Weights of fewer than 16 outputs or less than 64 bytes: zeros stand for the others.
template <int kTile>
static inline void load_part(const uint8_t* at, int64_t stride, int64_t outputs, int64_t bytes) {
  alignas(64) uint8_t part[kTileRows][kTileRowBytes] = {};
  const int64_t size = bytes < kTileRowBytes ? bytes : kTileRowBytes;
  for (int64_t o = 0; o < outputs && o < kTileRows; ++o) std::memcpy(part[o], at + o * stride, static_cast<size_t>(size));
  load_tile<kTile>(part, kTileRowBytes);
}

template <bool kIsHalf, int kSums, int kLeft, int kRight>
static inline DIJIANG_INLINE void multiply_tiles() {
  if constexpr (kIsHalf) {
    multiply_halves<kSums, kLeft, kRight>();
  } else if constexpr (kRight == 6) {
    multiply_signed<kSums, kLeft, kRight>();
  } else {
    multiply_unsigned<kSums, kLeft, kRight>();
  }
}

// Sums of kBlocks blocks of 16 outputs with kRights tiles: tile block * kRights + right, 4 tiles at most.
template <bool kIsHalf, int kBlocks, int kRights>
static inline DIJIANG_INLINE void sum_tiles(const TileOperands& t) {
  each<kBlocks * kRights>([&](auto tile) DIJIANG_INLINE { clear_tile<tile>(); });
  const int64_t steps = (t.stride + kTileRowBytes - 1) / kTileRowBytes;
  const int64_t whole = t.outputs < kBlocks * kTileRows ? 0 : t.stride / kTileRowBytes;
  auto step = [&](int64_t j, auto is_whole) DIJIANG_INLINE {
    const uint8_t* right = t.right + j * t.right_step;
    load_tile<6>(right, t.right_stride);
    if constexpr (kRights == 2) load_tile<7>(right + t.right_other, t.right_stride);
    each<kBlocks>([&](auto block) DIJIANG_INLINE {
      constexpr int kLeft = 4 + block % 2;
      const uint8_t* left = t.weights + block * kTileRows * t.stride + j * kTileRowBytes;
      if constexpr (is_whole) {
        load_tile<kLeft>(left, t.stride);
      } else {
        load_part<kLeft>(left, t.stride, t.outputs - block * kTileRows, t.stride - j * kTileRowBytes);
      }
      each<kRights>([&](auto r) DIJIANG_INLINE { multiply_tiles<kIsHalf, block * kRights + r, kLeft, 6 + r>(); });
    });
  };
  int64_t j = 0;
  if (t.behind != nullptr)
    for (; j < whole; ++j) {
      for (int64_t line = 0; line < kBlocks * kTileRows; ++line)
        fetch(t.behind + (j * kBlocks * kTileRows + line) * kTileRowBytes);
      step(j, std::true_type{});
    }
  for (; j < whole; ++j) step(j, std::true_type{});
  for (; j < steps; ++j) step(j, std::false_type{});
}

// 256 high + low in fp32, rounded once: in int32 where all of a tile have room in it, else in fp64. `low` is below 2^30.
static inline DIJIANG_INLINE void join_planes(const int32_t* high, const int32_t* low, __m512 (&sums)[16], int count) {
  __m512i most = _mm512_setzero_si512();
  for (int i = 0; i < count; ++i) most = _mm512_or_si512(most, _mm512_abs_epi32(_mm512_load_si512(high + i * kLanes)));
  const bool has_room = _mm512_cmpge_epu32_mask(most, _mm512_set1_epi32(1 << 22)) == 0;
  for (int i = 0; i < count; ++i) {
    const __m512i upper = _mm512_load_si512(high + i * kLanes), lower = _mm512_load_si512(low + i * kLanes);
    if (has_room) {
      sums[i] = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(upper, 8), lower));
      continue;
    }
    const __m512d factor = _mm512_set1_pd(256.0);
    auto join = [&](__m256i upper_half, __m256i lower_half) DIJIANG_INLINE {
      return _mm512_cvtpd_ps(_mm512_fmadd_pd(factor, _mm512_cvtepi32_pd(upper_half), _mm512_cvtepi32_pd(lower_half)));
    };
    const __m256 first = join(_mm512_castsi512_si256(upper), _mm512_castsi512_si256(lower));
    const __m256 second = join(_mm512_extracti64x4_epi64(upper, 1), _mm512_extracti64x4_epi64(lower, 1));
    sums[i] = _mm512_insertf32x8(_mm512_castps256_ps512(first), second, 1);
  }
}

// Where 16 outputs go, of which the lanes of `mask` are there.
struct TileTarget {
  const Matrix& m;
  const Activations& x;
  float* y;
  int64_t y_stride, row;
  __mmask16 mask;
  bool add;

  template <bool kIsHalf>
  DIJIANG_INLINE void put(int64_t n, __m512 value) const {
    if constexpr (!kIsHalf) {
      const __m512 scales = _mm512_maskz_loadu_ps(mask, m.scales + row);
      value = _mm512_mul_ps(value, _mm512_mul_ps(scales, _mm512_set1_ps(x.scales[n])));
    }
    if (m.bias != nullptr) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, m.bias + row));
    float* target = y + n * y_stride + row;
    if (add) value = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, target), value);
    _mm512_mask_storeu_ps(target, mask, value);
  }
};

// The sums of one block of outputs to rows n ... n + count - 1; `low` of int8 alone.
template <bool kIsHalf>
static inline void put_sums(const TileTarget& target, const int32_t* sums, const int32_t* low, int64_t n, int64_t count) {
  __m512 values[16];
  if constexpr (kIsHalf) {
    each<16>([&](auto i) DIJIANG_INLINE { values[i] = _mm512_load_ps(sums + i * kLanes); });
  } else {
    join_planes(sums, low, values, 16);
  }
  transpose(reinterpret_cast<__m512i*>(values));
  for (int64_t i = 0; i < count; ++i) target.put<kIsHalf>(n + i, values[i]);
}

// One row: a tile of sums is a column, hence 16 outputs side by side.
template <bool kIsHalf, int kBlocks>
static inline void put_column(const Matrix& m, const Activations& x, int64_t row, int64_t last, float* y, bool add) {
  alignas(64) int32_t sums[4][kLanes];
  each<kIsHalf ? kBlocks : 2 * kBlocks>([&](auto tile) DIJIANG_INLINE { store_tile<tile>(sums[tile], sizeof(int32_t)); });
  each<kBlocks>([&](auto block) DIJIANG_INLINE {
    __m512 value[16];
    if constexpr (kIsHalf) {
      value[0] = _mm512_load_ps(sums[block]);
    } else {
      join_planes(sums[2 * block], sums[2 * block + 1], value, 1);
    }
    const int64_t at = row + block * kTileRows;
    const TileTarget target{m, x, y, 0, at, first_lanes(last - at), add};
    target.put<kIsHalf>(0, value[0]);
  });
}

template <bool kIsHalf>
static inline TileOperands operands_of(const Matrix& m, const Activations& x, int64_t row, int64_t last, int64_t n) {
  const int64_t size = padded(m.columns);
  const auto* weights = reinterpret_cast<const uint8_t*>(m.codes);
  if constexpr (kIsHalf) weights = reinterpret_cast<const uint8_t*>(m.halves);
  const int64_t stride = kIsHalf ? 2 * m.columns : size, tile_rows = kTileRows * 2 * size;
  return {weights + row * stride, stride, last - row, x.rounded + n / kTileRows * tile_rows,
          kIsHalf ? kTileBytes : 2 * kTileBytes, kIsHalf ? tile_rows : kTileBytes, kTileRowBytes, nullptr};
}

// Where the weights behind a panel lie that are asked for while the first rows meet it: none behind the last output.
template <bool kIsHalf>
static inline const uint8_t* panel_behind(const TileOperands& t, int64_t panel, int64_t row, int64_t last) {
  return row + 2 * panel <= last ? t.weights + panel * t.stride : nullptr;
}

template <bool kIsHalf>
static void multiply_row(const Matrix& m, const Activations& x, int64_t first, int64_t last, float* y, bool add) {
  constexpr int kBlocks = kIsHalf ? 4 : 2;
  const TileSession session(sizeof(int32_t));
  for (int64_t row = first; row < last; row += kBlocks * kTileRows) {
    TileOperands t = operands_of<kIsHalf>(m, x, row, last, 0);
    t.right_step = kTileRowBytes;
    t.right_other = padded(m.columns);
    t.right_stride = sizeof(int32_t);
    t.behind = panel_behind<kIsHalf>(t, kBlocks * kTileRows, row, last);
    sum_tiles<kIsHalf, kBlocks, kIsHalf ? 1 : 2>(t);
    put_column<kIsHalf, kBlocks>(m, x, row, last, y, add);
  }
}

// Outputs row ... of rows n ...: kBlocks blocks of 16, and in bf16 kRights tiles of rows.
template <bool kIsHalf, int kBlocks, int kRights>
static inline void multiply_block(const Matrix& m, const Activations& x, int64_t num_rows, int64_t n, int64_t row,
                                  int64_t last, float* y, int64_t y_stride, bool add, bool is_first) {
  TileOperands t = operands_of<kIsHalf>(m, x, row, last, n);
  if (is_first) t.behind = panel_behind<kIsHalf>(t, kBlocks * kTileRows, row, last);
  sum_tiles<kIsHalf, kBlocks, kRights>(t);
  alignas(64) int32_t sums[4][kTileRows * kLanes];
  each<kBlocks * kRights>([&](auto tile) DIJIANG_INLINE { store_tile<tile>(sums[tile], kTileRowBytes); });
  each<kBlocks>([&](auto block) DIJIANG_INLINE {
    const int64_t at = row + block * kTileRows;
    if (at >= last) return;
    const TileTarget target{m, x, y, y_stride, at, first_lanes(last - at), add};
    each<kIsHalf ? kRights : 1>([&](auto r) DIJIANG_INLINE {
      const int64_t from = n + r * kTileRows, count = num_rows - from < kTileRows ? num_rows - from : kTileRows;
      put_sums<kIsHalf>(target, sums[block * kRights + r], sums[block * kRights + kRights - 1], from, count);
    });
  });
}

template <bool kIsHalf>
__attribute__((noinline)) static void multiply_range(const Matrix& m, const Activations& x, int64_t num_rows,
                                                     int64_t first, int64_t last, float* y, int64_t y_stride, bool add) {
  if (num_rows == 1) return multiply_row<kIsHalf>(m, x, first, last, y, add);
  const TileSession session(kTileRowBytes);
  if (kIsHalf && num_rows <= kTileRows) {
    for (int64_t row = first; row < last; row += 4 * kTileRows)
      multiply_block<kIsHalf, kIsHalf ? 4 : 2, kIsHalf ? 1 : 2>(m, x, num_rows, 0, row, last, y, y_stride, add, true);
    return;
  }
  for (int64_t row = first; row < last; row += 2 * kTileRows) {
    for (int64_t n = 0; n < num_rows;) {
      if (kIsHalf && num_rows - n <= kTileRows) {
        multiply_block<kIsHalf, 2, kIsHalf ? 1 : 2>(m, x, num_rows, n, row, last, y, y_stride, add, n == 0);
        n += kTileRows;
      } else {
        multiply_block<kIsHalf, 2, 2>(m, x, num_rows, n, row, last, y, y_stride, add, n == 0);
        n += kIsHalf ? 2 * kTileRows : kTileRows;
      }
    }
  }
}

// Outputs first ... last - 1 of all rows: y[n][o] (+)= W[o] . x[n] + b[o].
static inline void tile_product(const Matrix& m, const Activations& x, int64_t num_rows, int64_t first, int64_t last,
                                float* y, int64_t y_stride, bool add) {
  if (m.halves != nullptr) {
    multiply_range<true>(m, x, num_rows, first, last, y, y_stride, add);
  } else {
    multiply_range<false>(m, x, num_rows, first, last, y, y_stride, add);
  }
}

#endif

}  // namespace dijiang
