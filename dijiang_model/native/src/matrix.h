// y = W x + b for many rows x at once: each weight is read from memory once for all of them.
//
// Weights are fp32 or bf16, used where they lie; int8 with one scale per output; or int4 in groups (`int4.h`). What is
// not fp32 meets rows of 16 bits (`round_rows.h`).
#pragma once

#include "forms.h"
#include "int4.h"
#include "operands.h"
#include "round_rows.h"
#include "threads.h"
#include "tile_panels.h"

namespace dijiang {

constexpr int64_t kLineBytes = 64;

// Columns first ... last - 1 of O outputs and N rows: totals[o][n], whose lanes add up to w[o] . x[n].
// Every sum is one vector accumulator over the columns in order, whatever O and N.
// With kFetch, a share of kFetch / O of as many weights from `behind` on is asked for.
template <class Form, int O, int N, int kFetch>
static inline DIJIANG_INLINE void add_columns(const typename Form::Element* w, int64_t w_stride,
                                              const typename Form::Right* x, int64_t x_stride, int64_t first,
                                              int64_t last, [[maybe_unused]] const typename Form::Element* behind,
                                              Vec (&totals)[O][N]) {
  constexpr int64_t kLine = kLineBytes / static_cast<int64_t>(sizeof(typename Form::Element));
  typename Form::Sum sums[O][N];
  each<O>([&](auto o) DIJIANG_INLINE { each<N>([&](auto n) DIJIANG_INLINE { sums[o][n] = typename Form::Sum{}; }); });
  auto add = [&](auto weights, auto right, int64_t j, auto fetched) DIJIANG_INLINE {
    decltype(weights(w)) values[O];
    each<O>([&](auto o) DIJIANG_INLINE {
      values[o] = weights(w + o * w_stride + j);
      if (o < fetched) fetch(behind + j * kFetch + o * kLine);
    });
    each<N>([&](auto n) DIJIANG_INLINE {
      const auto value = right(x + n * x_stride + j);
      each<O>([&](auto o) DIJIANG_INLINE { sums[o][n] = Form::add(values[o], value, sums[o][n]); });
    });
  };
  constexpr std::integral_constant<int, 0> nothing{};
  auto add_whole = [&](int64_t j, auto fetched) DIJIANG_INLINE {
    add([](auto at) DIJIANG_INLINE { return Form::whole(at); },
        [](auto at) DIJIANG_INLINE { return Form::whole_right(at); }, j, fetched);
  };
  int64_t j = first;
  for (; j + kLine <= last; j += kLine)
    each<kLine / Form::kStep>([&](auto step) DIJIANG_INLINE {
      add_whole(j + step * Form::kStep, std::integral_constant<int, step == 0 ? kFetch : 0>{});
    });
  for (; j + Form::kStep <= last; j += Form::kStep) add_whole(j, nothing);
  if (!Form::kIsPadded && j < last) {
    const int64_t count = last - j;
    add([count](auto at) DIJIANG_INLINE { return Form::first(at, count); },
        [count](auto at) DIJIANG_INLINE { return Form::first_right(at, count); }, j, nothing);
  }
  each<O>([&](auto o) DIJIANG_INLINE {
    each<N>([&](auto n) DIJIANG_INLINE { totals[o][n] = Form::finish(sums[o][n]); });
  });
}

// The same over all columns, as many at a time as a sum has room for.
template <class Form, int O, int N, int kFetch = 0>
static inline DIJIANG_INLINE void dot_columns(const typename Form::Element* w, const typename Form::Right* x,
                                              int64_t x_stride, int64_t width, Vec (&totals)[O][N],
                                              const typename Form::Element* behind = nullptr) {
  const int64_t most = width < Form::kMostColumns ? width : Form::kMostColumns;
  add_columns<Form, O, N, kFetch>(w, width, x, x_stride, 0, most, behind, totals);
  for (int64_t first = most; Form::kIsPadded && first < width; first += Form::kMostColumns) {
    const int64_t last = first + Form::kMostColumns < width ? first + Form::kMostColumns : width;
    Vec more[O][N];
    add_columns<Form, O, N, kFetch>(w, width, x, x_stride, first, last, behind, more);
    each<O>([&](auto o) DIJIANG_INLINE { each<N>([&](auto n) DIJIANG_INLINE { totals[o][n] += more[o][n]; }); });
  }
}

// w . x in sums side by side, where their order makes no difference: each waits for its own last addition alone.
template <class Form>
static inline DIJIANG_INLINE Vec dot_in_chains(const typename Form::Element* w, const typename Form::Right* x,
                                               int64_t width) {
  constexpr int kChains = Form::kChains;
  constexpr int64_t kStep = Form::kStep;
  Vec total = splat(0.0f);
  for (int64_t j = 0; j < width;) {
    const int64_t last = width - j > Form::kMostColumns ? j + Form::kMostColumns : width;
    typename Form::Sum sums[kChains] = {};
    for (; j + kChains * kStep <= last; j += kChains * kStep)
      each<kChains>([&](auto c) DIJIANG_INLINE {
        sums[c] = Form::add(Form::whole(w + j + c * kStep), Form::whole_right(x + j + c * kStep), sums[c]);
      });
    for (; j < last; j += kStep) sums[0] = Form::add(Form::whole(w + j), Form::whole_right(x + j), sums[0]);
    each<kChains - 1>([&](auto c) DIJIANG_INLINE { sums[0] += sums[c + 1]; });
    total += Form::finish(sums[0]);
  }
  return total;
}

// The same for few rows of x, output after output in the order of memory.
template <class Form, int O, int N>
static inline DIJIANG_INLINE void dot_in_order(const typename Form::Element* w, const typename Form::Right* x,
                                               int64_t x_stride, int64_t width, Vec (&totals)[O][N]) {
  fetch_next_pages(w, O * width * static_cast<int64_t>(sizeof(*w)));
  each<O>([&](auto o) DIJIANG_INLINE {
    if constexpr (Form::kChains > 1 && N == 1) {
      totals[o][0] = dot_in_chains<Form>(w + o * width, x, width);
    } else {
      Vec total[1][N];
      dot_columns<Form, 1, N>(w + o * width, x, x_stride, width, total);
      each<N>([&](auto n) DIJIANG_INLINE { totals[o][n] = total[0][n]; });
    }
  });
}

// sums[o / 4][n] = w[o] . x[n] in fp32, in the order of products.
template <int O, int N>
static inline void dot_block(const float* w, int64_t w_stride, const float* x, int64_t x_stride, int64_t size,
                             Vec4 (&sums)[O / 4][N]) {
  Vec totals[O][N];
  add_columns<FloatForm, O, N, 0>(w, w_stride, x, x_stride, 0, size, nullptr, totals);
  each<O / 4>([&](auto block) DIJIANG_INLINE {
    constexpr int o = 4 * block;
    each<N>([&](auto n) DIJIANG_INLINE {
      sums[block][n] = sum4(totals[o][n], totals[o + 1][n], totals[o + 2][n], totals[o + 3][n]);
    });
  });
}

enum class Kind { kFloat, kHalf, kInt8, kInt4 };

template <Kind kKind>
using FormOf = std::conditional_t<kKind == Kind::kFloat, FloatForm,
                                  std::conditional_t<kKind == Kind::kHalf, HalfForm, CodeForm>>;

// How a block is read: with kInOrder one output after the other, else all side by side, asking for a share of
// kFetch / O of as many weights, the `part`-th one, which lie `ahead` bytes behind the block.
template <int O, int N, Kind kKind, int kFetch>
static inline DIJIANG_INLINE void block_totals(const Matrix& m, const Activations& x, int64_t row, int64_t n,
                                               int64_t part, int64_t ahead, Vec (&totals)[O][N]) {
  if constexpr (kKind == Kind::kInt4) {
    if constexpr (kFetch == kInOrder) {
      static_assert(N == 1);
      pairs_in_order<O>(m, x, row, n, totals);
    } else {
      dot_pairs<O, N, kFetch>(m, x, row, n, totals, part, ahead);
    }
  } else {
    using Form = FormOf<kKind>;
    const int64_t width = Form::width(m), stride = Form::right_stride(x, m);
    const auto* weights = Form::weights(m) + row * width;
    const auto* right = Form::right(x, m) + n * stride;
    if constexpr (kFetch == kInOrder) {
      dot_in_order<Form, O, N>(weights, right, stride, width, totals);
    } else {
      const auto* behind = weights + part * kFetch * width + ahead / static_cast<int64_t>(sizeof(*weights));
      dot_columns<Form, O, N, kFetch>(weights, right, stride, width, totals, behind);
    }
  }
}

// y[n ... n + N - 1][row ... row + O - 1] (+)= W x + b, O even; a multiple of 4 unless all is fp32.
template <int O, int N, Kind kKind, int kFetch>
static inline void product_block(const Matrix& m, const Activations& x, int64_t row, int64_t n, float* y,
                                 int64_t y_stride, bool add, int64_t part = 0, int64_t ahead = kAheadBytes) {
  static_assert(O % 4 == 0 || (O % 2 == 0 && kKind == Kind::kFloat));
  Vec totals[O][N];
  block_totals<O, N, kKind, kFetch>(m, x, row, n, part, ahead, totals);
  each<O / 4>([&](auto block) DIJIANG_INLINE {
    constexpr int o = 4 * block;
    each<N>([&](auto i) DIJIANG_INLINE {
      Vec4 value = sum4(totals[o][i], totals[o + 1][i], totals[o + 2][i], totals[o + 3][i]);
      if constexpr (kKind == Kind::kInt8) value *= load4(m.scales + row + o) * x.scales[n + i];
      if constexpr (kKind == Kind::kInt4) value *= x.scales[n + i];
      if (m.bias != nullptr) value += load4(m.bias + row + o);
      float* target = y + (n + i) * y_stride + row + o;
      store4(target, add ? load4(target) + value : value);
    });
  });
  each<O % 4>([&](auto rest) DIJIANG_INLINE {
    constexpr int o = O / 4 * 4 + rest;
    each<N>([&](auto i) DIJIANG_INLINE {
      float value = sum(totals[o][i]);
      if (m.bias != nullptr) value += m.bias[row + o];
      float& target = y[(n + i) * y_stride + row + o];
      target = add ? target + value : value;
    });
  });
}

// One output of one row, in the same order as in blocks: for the last few outputs of a matrix.
template <Kind kKind>
static inline void product_single(const Matrix& m, const Activations& x, int64_t row, int64_t n, float& y, bool add) {
  float value;
  if constexpr (kKind == Kind::kInt4) {
    Vec totals[2][1];
    dot_pairs<2, 1, 0>(m, x, row - row % 2, n, totals);
    value = sum(totals[row % 2][0]) * x.scales[n];
  } else {
    Vec totals[1][1];
    block_totals<1, 1, kKind, 0>(m, x, row, n, 0, 0, totals);
    value = sum(totals[0][0]);
    if (kKind == Kind::kInt8) value *= m.scales[row] * x.scales[n];
  }
  if (m.bias != nullptr) value += m.bias[row];
  y = add ? y + value : value;
}

// Blocks that fill the registers: accumulators, the weights of a block and one row's values.
constexpr bool kIsWide = kLanes == 16;
template <Kind kKind>
constexpr int kBlockRows = kIsWide && kKind != Kind::kInt4 ? 4 : 2;

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

static inline int64_t bytes_of_columns(const Matrix& m, Kind kind) {
  switch (kind) {
    case Kind::kFloat: return m.columns * 4;
    case Kind::kHalf: return m.columns * 2;
    case Kind::kInt8: return padded(m.columns);
    default: return padded(m.columns) / 2;
  }
}

// Many rows do not fit in the first-level cache beside the weights. So some rows meet a panel of outputs, then the next
// rows the same panel, which waits in the second-level cache; meanwhile the next panel is asked for.
constexpr int64_t kPanelOutputs = 32, kPanelRowBytes = 20480;

// Where eight rows of fp32 do not fit either, what a block reads comes from the second-level cache: blocks are larger
// then, hence read less, and panels smaller.
constexpr int64_t kLongPanelOutputs = 24, kLongPanelRows = 8;

static inline bool has_long_rows(const Matrix& m) {
  return kIsWide && m.weight != nullptr && kLongPanelRows * m.columns * 4 > kPanelRowBytes;
}

// How many outputs are best computed by one task, or a multiple.
static inline int64_t panel_outputs(const Matrix& m) { return has_long_rows(m) ? kLongPanelOutputs : kPanelOutputs; }

// Panels of kOutputs outputs in blocks of O, `together` rows at a time; the rows' first O / kFetch blocks fetch.
template <Kind kKind, int64_t kOutputs, int O, int kFetch>
static inline int64_t product_panels(const Matrix& m, const Activations& x, int64_t num_rows, int64_t row, int64_t last,
                                     float* y, int64_t y_stride, bool add, int64_t together) {
  const int64_t ahead = kOutputs * bytes_of_columns(m, kKind);
  for (; row + kOutputs <= last; row += kOutputs)
    for (int64_t n = 0; n < num_rows; n += together)
      for (int64_t o = 0; o < kOutputs; o += O)
        product_outputs<O, kKind, kFetch>(m, x, n, n + together < num_rows ? n + together : num_rows, row + o, y,
                                          y_stride, add, ahead);
  return row;
}

template <Kind kKind>
static inline int64_t product_panels(const Matrix& m, const Activations& x, int64_t num_rows, int64_t row, int64_t last,
                                     float* y, int64_t y_stride, bool add) {
  constexpr int kRows = kBlockRows<kKind>;
  if constexpr (kKind == Kind::kFloat)
    if (has_long_rows(m))
      return product_panels<kKind, kLongPanelOutputs, 6, 2>(m, x, num_rows, row, last, y, y_stride, add,
                                                            kLongPanelRows);
  const int64_t right_bytes = m.columns * (kKind == Kind::kFloat ? 4 : 2);
  const int64_t fitting = kPanelRowBytes / right_bytes / kRows * kRows;
  return product_panels<kKind, kPanelOutputs, 4, 1>(m, x, num_rows, row, last, y, y_stride, add,
                                                    fitting > kRows ? fitting : kRows);
}

template <Kind kKind>
__attribute__((noinline)) static void product_range(const Matrix& m, const Activations& x, int64_t num_rows,
                                                    int64_t first, int64_t last, float* y, int64_t y_stride, bool add) {
  const int64_t num_blocks = num_rows / kBlockRows<kKind>;
  int64_t row = first;
  auto single = [&] {
    for (int64_t n = 0; n < num_rows; ++n) product_single<kKind>(m, x, row, n, y[n * y_stride + row], add);
  };
  if (kKind == Kind::kInt4 && row < last && row % 2 != 0) single(), ++row;  // a byte holds rows of both parities
  for (; num_rows == 1 && row + 8 <= last; row += 8)
    product_block<8, 1, kKind, kInOrder>(m, x, row, 0, y, y_stride, add);
  if constexpr (kKind == Kind::kFloat)
    for (; num_rows == 2 && row + 4 <= last; row += 4)
      product_block<4, 2, kKind, kInOrder>(m, x, row, 0, y, y_stride, add);
  // Spread over all rows where that was measured to be faster: not for int4.
  const bool is_spread = kKind != Kind::kInt4;
  if (is_spread && num_blocks >= 4) row = product_panels<kKind>(m, x, num_rows, row, last, y, y_stride, add);
  for (; row + 4 <= last; row += 4) {
    if (!is_spread || num_blocks < 2) {
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
#if DIJIANG_TILES
  if (takes_tiles(m)) return tile_product(m, x, num_rows, first, last, y, y_stride, add);
#endif
  if (m.codes != nullptr) {
    product_range<Kind::kInt8>(m, x, num_rows, first, last, y, y_stride, add);
  } else if (m.pairs != nullptr) {
    product_range<Kind::kInt4>(m, x, num_rows, first, last, y, y_stride, add);
  } else if (m.halves != nullptr) {
    product_range<Kind::kHalf>(m, x, num_rows, first, last, y, y_stride, add);
  } else {
    product_range<Kind::kFloat>(m, x, num_rows, first, last, y, y_stride, add);
  }
}

// How many outputs one task computes: a few tasks for each thread, whole panels.
static inline int64_t outputs_per_task(int64_t rows, int num_threads, int64_t panel = kPanelOutputs) {
  if (num_threads <= 1) return rows;
  const int64_t wanted = (rows + num_threads * 6 - 1) / (num_threads * 6);
  return (wanted + panel - 1) / panel * panel;
}

}  // namespace dijiang
