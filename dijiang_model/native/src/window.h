// The window of one key-value head: exact softmax over recent tokens in a ring and the first ones (sinks).
#pragma once

#include <algorithm>
#include <type_traits>

#include "rounding.h"
#include "operands.h"

namespace dijiang {

constexpr int kTile = kLanes == 16 ? 4 : 2;  // vectors of the value width at once
constexpr int kHeads = 4;                    // query heads at once
constexpr int kScored = kLanes == 16 ? 4 : 2;  // ... where scores are made: four keys beside each

static inline int64_t modulo(int64_t a, int64_t b) {
  const int64_t rest = a % b;
  return rest < 0 ? rest + b : rest;
}

static inline int64_t padded_rows(int64_t num_rows) { return (num_rows + kLanes - 1) / kLanes * kLanes; }

// Memory that is read next, and asked for while rows of something else are read, a part with each row.
struct Behind {
  const uint8_t* at = nullptr;
  int64_t bytes = 0, step = 0;

  Behind() = default;  // nothing
  Behind(const void* memory, int64_t size, int64_t num_rows)
      : at(static_cast<const uint8_t*>(memory)), bytes(memory == nullptr ? 0 : size),
        step(num_rows > 0 ? (size + num_rows - 1) / num_rows : size) {}

  // With rows first ... last - 1.
  DIJIANG_INLINE void ask(int64_t first, int64_t last) const {
    const int64_t end = std::min(last * step, bytes);
    for (int64_t i = (first * step + 63) / 64 * 64; i < end; i += 64) fetch(at + i);
  }
};

// out[r] = sum_j x[r][j] rows[j] over T vectors of the width.
template <int R, int T, class Kept>
static inline void weighted_tile(const float* x, int64_t x_stride, const Kept* rows, int64_t width, int64_t num_rows,
                                 float* out, int64_t out_stride, const Behind& behind) {
  Vec total[R][T];
  each<R>([&](auto r) DIJIANG_INLINE { each<T>([&](auto t) DIJIANG_INLINE { total[r][t] = splat(0.0f); }); });
  for (int64_t j = 0; j < num_rows; ++j) {
    behind.ask(j, j + 1);
    Vec entry[T];
    each<T>([&](auto t) DIJIANG_INLINE { entry[t] = load(rows + j * width + t * kLanes); });
    each<R>([&](auto r) DIJIANG_INLINE {
      const Vec weight = splat(x[r * x_stride + j]);
      each<T>([&](auto t) DIJIANG_INLINE { total[r][t] = fma(weight, entry[t], total[r][t]); });
    });
  }
  each<R>([&](auto r) DIJIANG_INLINE {
    each<T>([&](auto t) DIJIANG_INLINE { store(out + r * out_stride + t * kLanes, total[r][t]); });
  });
}

template <int R, class Kept>
static inline void weighted_heads(const float* x, int64_t x_stride, const Kept* rows, int64_t width, int64_t num_rows,
                                  float* out, int64_t out_stride, const Behind& behind) {
  int64_t v = 0;
  const auto first = [&behind](int64_t at) { return at == 0 ? behind : Behind(); };
  for (; v + kTile * kLanes <= width; v += kTile * kLanes)
    weighted_tile<R, kTile>(x, x_stride, rows + v, width, num_rows, out + v, out_stride, first(v));
  for (; v < width; v += kLanes)
    weighted_tile<R, 1>(x, x_stride, rows + v, width, num_rows, out + v, out_stride, first(v));
}

// out[r] = sum_j x[r][j] rows[j] for any number of heads, row after row in the order of memory. `behind` is asked
// for meanwhile.
template <class Kept>
static inline void weighted(int64_t num_heads, const float* x, int64_t x_stride, const Kept* rows, int64_t width,
                            int64_t num_rows, float* out, int64_t out_stride, const Behind& behind = {}) {
  for (int64_t r = 0; r < num_heads; r += kHeads, x += kHeads * x_stride, out += kHeads * out_stride) {
    auto some = [&](auto heads) DIJIANG_INLINE {
      weighted_heads<heads>(x, x_stride, rows, width, num_rows, out, out_stride, r == 0 ? behind : Behind());
    };
    switch (num_heads - r) {
      case 1: some(std::integral_constant<int, 1>{}); break;
      case 2: some(std::integral_constant<int, 2>{}); break;
      case 3: some(std::integral_constant<int, 3>{}); break;
      default: some(std::integral_constant<int, 4>{}); break;
    }
  }
}

// scores[r][j] = q[r] . k[j] scale[j] for rows first ... last - 1 and R queries; each key is read once for all of them.
template <int R, class Kept>
static inline void score_rows(const float* queries, int64_t d, const Kept* keys, const float* scales, int64_t first,
                              int64_t last, float* scores, int64_t stride, const Behind& behind) {
  constexpr bool kIsScaled = std::is_same_v<Kept, int8_t>;
  int64_t j = first;
  for (; j + 4 <= last; j += 4) {
    behind.ask(j, j + 4);
    Vec total[R][4];
    each<R>([&](auto r) DIJIANG_INLINE { each<4>([&](auto o) DIJIANG_INLINE { total[r][o] = splat(0.0f); }); });
    for (int64_t i = 0; i < d; i += kLanes) {
      Vec key[4];
      each<4>([&](auto o) DIJIANG_INLINE { key[o] = load(keys + (j + o) * d + i); });
      each<R>([&](auto r) DIJIANG_INLINE {
        const Vec query = load(queries + r * d + i);
        each<4>([&](auto o) DIJIANG_INLINE { total[r][o] = fma(key[o], query, total[r][o]); });
      });
    }
    each<R>([&](auto r) DIJIANG_INLINE {
      Vec4 four = sum4(total[r][0], total[r][1], total[r][2], total[r][3]);
      if (kIsScaled) four *= load4(scales + j);
      store4(scores + r * stride + j, four);
    });
  }
  for (; j < last; ++j)
    for (int r = 0; r < R; ++r) {
      Vec total = splat(0.0f);
      for (int64_t i = 0; i < d; i += kLanes) total = fma(load(keys + j * d + i), load(queries + r * d + i), total);
      scores[r * stride + j] = kIsScaled ? sum(total) * scales[j] : sum(total);
    }
}

template <class Kept>
static inline void scores(int64_t num_queries, const float* queries, int64_t d, const Kept* keys, const float* scales,
                          int64_t first, int64_t last, float* out, int64_t stride, const Behind& behind) {
  for (int64_t r = 0; r < num_queries; r += kScored) {
    auto some = [&](auto heads) DIJIANG_INLINE {
      score_rows<heads>(queries + r * d, d, keys, scales, first, last, out + r * stride, stride,
                        r == 0 ? behind : Behind());
    };
    switch (num_queries - r) {
      case 1: some(std::integral_constant<int, 1>{}); break;
      case 2: some(std::integral_constant<int, 2>{}); break;
      case 3: some(std::integral_constant<int, kScored < 3 ? kScored : 3>{}); break;
      default: some(std::integral_constant<int, kScored>{}); break;
    }
  }
}

// -inf where a row holds nothing that is to be seen at `position`, each token once: unwritten rows, and sinks that
// are in the ring as well.
static inline void hide(int64_t position, int64_t window, int64_t sinks, float* scores) {
  const float hidden = -std::numeric_limits<float>::infinity();
  const int64_t num_rows = sinks + window, ring = modulo(position, window);
  for (int64_t j = num_rows; j < padded_rows(num_rows); ++j) scores[j] = hidden;
  for (int64_t z = position + 1; z < sinks; ++z) scores[z] = hidden;
  if (position - window + 1 >= sinks) return;
  for (int64_t c = 0; c < window; ++c)
    if (position - modulo(ring - c, window) < sinks) scores[sinks + c] = hidden;
}

// The largest of x, `size` a multiple of the lanes.
static inline float most_of(const float* x, int64_t size) {
  Vec top[2] = {load(x), load(x)};
  auto take = [&](Vec& most, int64_t i) DIJIANG_INLINE {
    const Vec next = load(x + i);
    most = next > most ? next : most;
  };
  int64_t i = kLanes;
  for (; i + kLanes < size; i += 2 * kLanes) {
    take(top[0], i);
    take(top[1], i + kLanes);
  }
  if (i < size) take(top[0], i);
  return largest(top[1] > top[0] ? top[1] : top[0]);
}

// x <- exp(x - max x); returns the sum. `size` a multiple of the lanes.
static inline float exponentials(float* x, int64_t size) {
  const Vec most = splat(most_of(x, size));
  Vec total = splat(0.0f);
  for (int64_t i = 0; i < size; i += kLanes) {
    const Vec e = falling_exponential(load(x + i) - most);
    store(x + i, e);
    total += e;
  }
  return sum(total);
}

// x <- softmax(x) or exp(x), `size` a multiple of the lanes.
static inline void normalise(float* x, int64_t size, bool is_softmax) {
  if (!is_softmax) {
    for (int64_t j = 0; j < size; j += kLanes) store(x + j, exponential(load(x + j)));
    return;
  }
  const Vec total = splat(exponentials(x, size));
  for (int64_t j = 0; j < size; j += kLanes) store(x + j, load(x + j) / total);
}

}  // namespace dijiang
