// Products of several rows by the matrix unit, two blocks of 16 outputs at a time for all rows.
//
// The unit and the vectors work side by side: while the unit multiplies a pair of blocks, the sums of the pair before
// become numbers and go where they belong, part by part. The next weights are asked for meanwhile, a few with each pair.
#pragma once

#include "rows.h"
#include "tiles.h"

namespace dijiang {

#if DIJIANG_TILES

// 32 outputs of a matrix, to rows of y.
struct RowTarget {
  static constexpr int64_t kOutputs = 2 * kTileRows, kParts = 1;
  const Matrix& m;
  const Activations& x;
  float* y;
  int64_t y_stride, num_rows, last;
  bool add;

  const Matrix& matrix(int64_t) const { return m; }
  static int64_t row_of(int64_t row, int64_t block) { return row + block * kTileRows; }

  // The sums of a block with one tile of rows, those from n on.
  template <bool kIsHalf>
  DIJIANG_INLINE void put(int64_t row, int64_t block, int64_t n, int64_t, const int32_t* sums) {
    row += block * kTileRows;
    if (row >= last) return;
    const TileOutputs outputs{m, x, row, first_lanes(last - row)};
    __m512 values[16];
    joined_sums<kIsHalf, 16>(sums, sums + kTileBytes / 4, values);
    transpose(reinterpret_cast<__m512i*>(values));
    auto one = [&](int64_t i) DIJIANG_INLINE {
      outputs.put(y + (n + i) * y_stride + row, outputs.finished<kIsHalf>(n + i, values[i]), add);
    };
    if (num_rows - n >= kTileRows) {
      each<16>(one);
    } else {
      for (int64_t i = 0; i < num_rows - n; ++i) one(i);
    }
  }
};

// 16 outputs of an MLP, up times the activation of gate, as tiles of rows are packed from: [rows / 16][outputs][16 rows].
struct ColumnTarget {
  static constexpr int64_t kOutputs = kTileRows, kParts = 4;
  const Matrix &up, &gate;
  const Activations& x;
  ActivationKind kind;
  float* columns;
  int64_t num_rows;
  alignas(64) float ups[2][kTileRows][kLanes];

  const Matrix& matrix(int64_t block) const { return block == 0 ? up : gate; }
  static int64_t row_of(int64_t row, int64_t) { return row; }

  // A quarter of that.
  template <bool kIsHalf>
  DIJIANG_INLINE void put(int64_t row, int64_t block, int64_t n, int64_t part, const int32_t* sums) {
    const Matrix& m = matrix(block);
    constexpr int kCount = kTileRows / kParts;
    const int64_t first = part * kCount;
    const __m512 scales = kIsHalf ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(first_lanes(num_rows - n), x.scales + n);
    float(*own)[kLanes] = ups[n / kTileRows % 2] + first;
    float* to = columns + (n * up.rows / kTileRows + row + first) * kLanes;
    __m512 values[kCount];
    joined_sums<kIsHalf, kCount>(sums + first * kLanes, sums + kTileBytes / 4 + first * kLanes, values);
    each<kCount>([&](auto i) DIJIANG_INLINE {
      const int64_t at = row + first + i;
      if constexpr (!kIsHalf) values[i] = _mm512_mul_ps(values[i], _mm512_mul_ps(_mm512_set1_ps(m.scales[at]), scales));
      if (m.bias != nullptr) values[i] = _mm512_add_ps(values[i], _mm512_set1_ps(m.bias[at]));
      if (block == 0) {
        _mm512_store_ps(own[i], values[i]);
      } else {
        _mm512_storeu_ps(to + i * kLanes, _mm512_mul_ps(_mm512_load_ps(own[i]), activated(values[i])));
      }
    });
  }

  DIJIANG_INLINE __m512 activated(__m512 x) const {
    if (kind == kSilu) return silu(x);
    alignas(64) float lanes[kLanes];
    _mm512_store_ps(lanes, x);
    activate(kind, lanes, kLanes);
    return _mm512_load_ps(lanes);
  }
};

// Multiplies pairs one after the other; the last one's sums wait for `finish`.
template <bool kIsHalf, class Target>
class RowPanels {
 public:
  RowPanels(Target& target, int64_t num_rows, int64_t last) : target_(target), num_rows_(num_rows), last_(last) {}

  // Outputs from `row` on for all rows. Meanwhile the weights behind are asked for, a share with each pair.
  void panel(int64_t row) {
    const int64_t num_pairs = (num_rows_ + kTogether - 1) / kTogether, lines = (2 * kTileRows + num_pairs - 1) / num_pairs;
    const bool is_last = row + 2 * Target::kOutputs > last_;
    for (int64_t n = 0, pair = 0; n < num_rows_; n += kTogether, ++pair) {
      TileOperands t = operands_of<kIsHalf>(target_.matrix(0), target_.x, row, last_, n);
      t.weights[1] = weights_of<kIsHalf>(target_.matrix(1), Target::row_of(row, 1));
      t.outputs = std::min(Target::kOutputs, last_ - row) * 2 * kTileRows / Target::kOutputs;
      if (!is_last) ask_behind(t, pair * lines, (pair + 1) * lines);
      if (!kIsHalf || num_rows_ - n > kTileRows) {
        multiply<2>(t, row, n);
      } else {
        multiply<kIsHalf ? 1 : 2>(t, row, n);
      }
    }
  }

  void finish() {
    while (unit_ < num_units_) put_unit();
  }

 private:
  static constexpr int64_t kTogether = kIsHalf ? 2 * kTileRows : kTileRows;

  // Rows first ... last - 1 of the next pair of blocks.
  static void ask_behind(TileOperands& t, int64_t first, int64_t last) {
    for (int64_t block = 0; block < 2; ++block) {
      const int64_t start = block * kTileRows, from = std::max(first, start), to = std::min(last, start + kTileRows);
      if (from >= to) continue;
      t.behind[block] = t.weights[block] + (Target::kOutputs + from - start) * t.stride;
      t.behind_lines[block] = to - from;
    }
  }

  template <int kRights>
  void multiply(const TileOperands& t, int64_t row, int64_t n) {
    sum_tiles<kIsHalf, 2, kRights>(t, [&](int64_t) DIJIANG_INLINE {
      if (unit_ < num_units_) put_unit();
    });
    finish();
    each<2 * kRights>([&](auto tile) DIJIANG_INLINE { store_tile<tile>(sums_[tile], kTileRowBytes); });
    row_ = row;
    n_ = n;
    rights_ = kIsHalf ? kRights : 1;
    unit_ = 0;
    num_units_ = 2 * rights_ * Target::kParts;
    if (!kIsHalf && Target::kParts == 1) finish();  // turning them round takes the unit's own port: nothing is gained
  }

  // A part of a block with one tile of rows.
  __attribute__((noinline)) void put_unit() {
    const int64_t tile = unit_ / Target::kParts, part = unit_ % Target::kParts;
    const int64_t block = tile / rights_, right = tile % rights_;
    target_.template put<kIsHalf>(row_, block, n_ + right * kTileRows, part, sums_[kIsHalf ? tile : 2 * tile]);
    ++unit_;
  }

  Target& target_;
  const int64_t num_rows_, last_;
  int64_t row_ = 0, n_ = 0, rights_ = 1, unit_ = 0, num_units_ = 0;
  alignas(64) int32_t sums_[4][kTileBytes / 4];
};

template <bool kIsHalf, class Target>
__attribute__((noinline)) static void multiply_panels(Target& target, int64_t num_rows, int64_t first, int64_t last) {
  const TileSession session(kTileRowBytes);
  RowPanels<kIsHalf, Target> panels(target, num_rows, last);
  for (int64_t row = first; row < last; row += Target::kOutputs) panels.panel(row);
  panels.finish();
}

// Outputs first ... last - 1 of all rows: y[n][o] (+)= W[o] . x[n] + b[o].
static inline void tile_product(const Matrix& m, const Activations& x, int64_t num_rows, int64_t first, int64_t last,
                                float* y, int64_t y_stride, bool add) {
  const bool is_half = m.halves != nullptr;
  if (num_rows == 1)
    return is_half ? multiply_row<true>(m, x, first, last, y, add) : multiply_row<false>(m, x, first, last, y, add);
  RowTarget target{m, x, y, y_stride, num_rows, last, add};
  is_half ? multiply_panels<true>(target, num_rows, first, last) : multiply_panels<false>(target, num_rows, first, last);
}

// Whether an MLP's inner rows of several tokens are made by `tile_columns`, and packed by `round_columns_to_tiles`.
static inline bool takes_columns(const Matrix& up, const Matrix& gate, const Matrix& down, int64_t num_rows) {
  const bool is_half = up.halves != nullptr;
  return num_rows > 1 && up.rows % kCodeBlock == 0 && takes_tiles(up) && takes_tiles(gate) && takes_tiles(down) &&
         (gate.halves != nullptr) == is_half && (down.halves != nullptr) == is_half;
}

// Outputs first ... last - 1, multiples of 16, of an MLP's inner rows: up times the activation of gate.
static inline void tile_columns(const Matrix& up, const Matrix& gate, ActivationKind kind, const Activations& x,
                                int64_t num_rows, int64_t first, int64_t last, float* columns) {
  ColumnTarget target{up, gate, x, kind, columns, num_rows, {}};
  up.halves != nullptr ? multiply_panels<true>(target, num_rows, first, last)
                       : multiply_panels<false>(target, num_rows, first, last);
}

#endif

}  // namespace dijiang
