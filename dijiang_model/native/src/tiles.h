// Sums by the matrix unit, of int8 and bf16 weights as they lie and rows as `tile_rows.h` lays them out; one row's product.
//
// int8: sums are exact integers, 256 times those of high bytes and those of low bytes, rounded to fp32 once. bf16: sums
// are the unit's, step after step of 32 columns. Neither depends on what else is computed.
#pragma once

#include "tile_rows.h"

namespace dijiang {

#if DIJIANG_TILES

// What blocks of 16 outputs read: rows of weights, of which `outputs` are there, and one or two tiles a step of 64 bytes.
struct TileOperands {
  const uint8_t* weights[4];  // of each block
  int64_t stride;             // bytes of a row of weights, all of them numbers
  int64_t outputs;
  const uint8_t* right;
  int64_t right_step, right_other, right_stride;  // bytes to the next step, to the second tile, between rows of a tile
  const uint8_t* behind[2];  // weights that are asked for meanwhile, so many lines of either with each step
  int64_t behind_lines[2];
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
// between(j) is called behind step j.
template <bool kIsHalf, int kBlocks, int kRights, class Between>
static inline DIJIANG_INLINE void sum_tiles(const TileOperands& t, const Between& between) {
  each<kBlocks * kRights>([&](auto tile) DIJIANG_INLINE { clear_tile<tile>(); });
  const int64_t steps = (t.stride + kTileRowBytes - 1) / kTileRowBytes;
  const int64_t whole = t.outputs < kBlocks * kTileRows ? 0 : t.stride / kTileRowBytes;
  auto step = [&](int64_t j, auto is_whole) DIJIANG_INLINE {
    const uint8_t* right = t.right + j * t.right_step;
    load_tile<6>(right, t.right_stride);
    if constexpr (kRights == 2) load_tile<7>(right + t.right_other, t.right_stride);
    each<kBlocks>([&](auto block) DIJIANG_INLINE {
      constexpr int kLeft = 4 + block % 2;
      const uint8_t* left = t.weights[block] + j * kTileRowBytes;
      if constexpr (is_whole) {
        load_tile<kLeft>(left, t.stride);
      } else {
        load_part<kLeft>(left, t.stride, t.outputs - block * kTileRows, t.stride - j * kTileRowBytes);
      }
      each<kRights>([&](auto r) DIJIANG_INLINE { multiply_tiles<kIsHalf, block * kRights + r, kLeft, 6 + r>(); });
    });
    between(j);
  };
  int64_t j = 0;
  if (t.behind_lines[0] + t.behind_lines[1] > 0)
    for (; j < whole; ++j) {
      for (int either = 0; either < 2; ++either)
        for (int64_t line = 0; line < t.behind_lines[either]; ++line)
          fetch(t.behind[either] + (j * t.behind_lines[either] + line) * kTileRowBytes);
      step(j, std::true_type{});
    }
  for (; j < whole; ++j) step(j, std::true_type{});
  for (; j < steps; ++j) step(j, std::false_type{});
}

// 256 high + low in fp32, rounded once: in int32 where all of them have room in it, else in fp64. `low` is below 2^30.
template <int kCount>
static inline DIJIANG_INLINE void join_planes(const int32_t* high, const int32_t* low, __m512* sums) {
  __m512i most = _mm512_setzero_si512();
  each<kCount>([&](auto i) DIJIANG_INLINE {
    most = _mm512_or_si512(most, _mm512_abs_epi32(_mm512_load_si512(high + i * kLanes)));
  });
  if (__builtin_expect(_mm512_cmpge_epu32_mask(most, _mm512_set1_epi32(1 << 22)) == 0, 1)) {
    each<kCount>([&](auto i) DIJIANG_INLINE {
      const __m512i upper = _mm512_slli_epi32(_mm512_load_si512(high + i * kLanes), 8);
      sums[i] = _mm512_cvtepi32_ps(_mm512_add_epi32(upper, _mm512_load_si512(low + i * kLanes)));
    });
    return;
  }
  const __m512d factor = _mm512_set1_pd(256.0);
  auto join = [&](__m256i upper, __m256i lower) DIJIANG_INLINE {
    return _mm512_cvtpd_ps(_mm512_fmadd_pd(factor, _mm512_cvtepi32_pd(upper), _mm512_cvtepi32_pd(lower)));
  };
  for (int i = 0; i < kCount; ++i) {
    const __m512i upper = _mm512_load_si512(high + i * kLanes), lower = _mm512_load_si512(low + i * kLanes);
    const __m256 first = join(_mm512_castsi512_si256(upper), _mm512_castsi512_si256(lower));
    const __m256 second = join(_mm512_extracti64x4_epi64(upper, 1), _mm512_extracti64x4_epi64(lower, 1));
    sums[i] = _mm512_insertf32x8(_mm512_castps256_ps512(first), second, 1);
  }
}

// 16 outputs of a matrix from `row` on, of which the lanes of `mask` are there.
struct TileOutputs {
  const Matrix& m;
  const Activations& x;
  int64_t row;
  __mmask16 mask;

  // What a sum of row n becomes.
  template <bool kIsHalf>
  DIJIANG_INLINE __m512 finished(int64_t n, __m512 value) const {
    if constexpr (!kIsHalf) {
      const __m512 scales = _mm512_maskz_loadu_ps(mask, m.scales + row);
      value = _mm512_mul_ps(value, _mm512_mul_ps(scales, _mm512_set1_ps(x.scales[n])));
    }
    if (m.bias != nullptr) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, m.bias + row));
    return value;
  }

  DIJIANG_INLINE void put(float* target, __m512 value, bool add) const {
    if (add) value = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, target), value);
    _mm512_mask_storeu_ps(target, mask, value);
  }
};

// kCount outputs' sums of 16 rows each in fp32; `low` of int8 alone.
template <bool kIsHalf, int kCount>
static inline DIJIANG_INLINE void joined_sums(const int32_t* sums, const int32_t* low, __m512* values) {
  if constexpr (kIsHalf) {
    each<kCount>([&](auto i) DIJIANG_INLINE { values[i] = _mm512_load_ps(sums + i * kLanes); });
  } else {
    join_planes<kCount>(sums, low, values);
  }
}

// One row: a tile of sums is a column, hence 16 outputs side by side.
template <bool kIsHalf, int kBlocks>
static inline void put_column(const Matrix& m, const Activations& x, int64_t row, int64_t last, float* y, bool add) {
  alignas(64) int32_t sums[4][kLanes];
  each<kIsHalf ? kBlocks : 2 * kBlocks>([&](auto tile) DIJIANG_INLINE { store_tile<tile>(sums[tile], sizeof(int32_t)); });
  each<kBlocks>([&](auto block) DIJIANG_INLINE {
    __m512 value[1];
    joined_sums<kIsHalf, 1>(sums[kIsHalf ? block : 2 * block], sums[kIsHalf ? block : 2 * block + 1], value);
    const int64_t at = row + block * kTileRows;
    const TileOutputs outputs{m, x, at, first_lanes(last - at)};
    if (at < last) outputs.put(y + at, outputs.finished<kIsHalf>(0, value[0]), add);
  });
}

// Bytes of a row of weights, all of them numbers.
template <bool kIsHalf>
static inline int64_t weight_stride(const Matrix& m) {
  return kIsHalf ? 2 * m.columns : padded(m.columns);
}

template <bool kIsHalf>
static inline const uint8_t* weights_of(const Matrix& m, int64_t row) {
  const auto* weights = reinterpret_cast<const uint8_t*>(m.codes);
  if constexpr (kIsHalf) weights = reinterpret_cast<const uint8_t*>(m.halves);
  return weights + row * weight_stride<kIsHalf>(m);
}

// Outputs from `row` on in blocks one behind the other, with rows from n on.
template <bool kIsHalf>
static inline TileOperands operands_of(const Matrix& m, const Activations& x, int64_t row, int64_t last, int64_t n) {
  const int64_t size = padded(m.columns), stride = weight_stride<kIsHalf>(m), tile_rows = kTileRows * 2 * size;
  const uint8_t* weights = weights_of<kIsHalf>(m, row);
  TileOperands t{{}, stride, last - row, x.rounded + n / kTileRows * tile_rows, kIsHalf ? kTileBytes : 2 * kTileBytes,
                 kIsHalf ? tile_rows : kTileBytes, kTileRowBytes, {}, {}};
  each<4>([&](auto block) DIJIANG_INLINE { t.weights[block] = weights + block * kTileRows * stride; });
  return t;
}

template <bool kIsHalf>
static void multiply_row(const Matrix& m, const Activations& x, int64_t first, int64_t last, float* y, bool add) {
  constexpr int64_t kBlocks = kIsHalf ? 4 : 2, kPanel = kBlocks * kTileRows;
  const TileSession session(sizeof(int32_t));
  for (int64_t row = first; row < last; row += kPanel) {
    TileOperands t = operands_of<kIsHalf>(m, x, row, last, 0);
    t.right_step = kTileRowBytes;
    t.right_other = padded(m.columns);
    t.right_stride = sizeof(int32_t);
    if (row + 2 * kPanel <= last) {  // the panel behind is asked for
      t.behind[0] = t.weights[0] + kPanel * t.stride;
      t.behind_lines[0] = kPanel;
    }
    sum_tiles<kIsHalf, kBlocks, kIsHalf ? 1 : 2>(t, [](int64_t) {});
    put_column<kIsHalf, kBlocks>(m, x, row, last, y, add);
  }
}

#endif

}  // namespace dijiang
