// The linear part of one key-value head: S <- g S + phi(k) v^T and phi(q)^T S, in one pass over S [K, width].
#pragma once

#include "window.h"

namespace dijiang {

static inline void keep(float* at, Vec entry, int64_t, uint32_t) { store(at, entry); }
static inline void keep(Half* at, Vec entry, int64_t place, uint32_t salt) {
  store(at, rounded_stochastically(entry, static_cast<uint32_t>(place), salt));
}

// What a token does to S.
struct Update {
  float decay;
  const float* keys;   // [K], write factors folded in
  const float* value;  // [width]
  uint32_t salt;       // of the token's position: `random_salt`
  Behind behind;  // asked for with the rows of S
};

// out[r] = sum_j x[r][j] S[j] over T vectors of the width from channel `v` on, after the update and before any rounding.
// Without kKeep S stays as it is.
template <int R, int T, bool kKeep, class Kept>
static inline void update_tile(const float* x, int64_t x_stride, Kept* state, int64_t v, int64_t width,
                               int64_t num_rows, float* out, int64_t out_stride, const Update& update) {
  Vec total[R > 0 ? R : 1][T], added[T];
  each<T>([&](auto t) DIJIANG_INLINE {
    each<R>([&](auto r) DIJIANG_INLINE { total[r][t] = splat(0.0f); });
    added[t] = load(update.value + v + t * kLanes);
  });
  const Vec decay = splat(update.decay);
  for (int64_t j = 0; j < num_rows; ++j) {
    const int64_t place = j * width + v;
    if (kKeep && v == 0) update.behind.ask(j, j + 1);
    Vec entry[T];
    each<T>([&](auto t) DIJIANG_INLINE {
      entry[t] = fma(splat(update.keys[j]), added[t], load(state + place + t * kLanes) * decay);
      if (kKeep) keep(state + place + t * kLanes, entry[t], place + t * kLanes, update.salt);
    });
    each<R>([&](auto r) DIJIANG_INLINE {
      const Vec weight = splat(x[r * x_stride + j]);
      each<T>([&](auto t) DIJIANG_INLINE { total[r][t] = fma(weight, entry[t], total[r][t]); });
    });
  }
  each<R>([&](auto r) DIJIANG_INLINE {
    each<T>([&](auto t) DIJIANG_INLINE { store(out + v + r * out_stride + t * kLanes, total[r][t]); });
  });
}

template <int R, bool kKeep, class Kept>
static inline void update_heads(const float* x, int64_t x_stride, Kept* state, int64_t width, int64_t num_rows,
                                float* out, int64_t out_stride, const Update& update) {
  int64_t v = 0;
  for (; v + kTile * kLanes <= width; v += kTile * kLanes)
    update_tile<R, kTile, kKeep>(x, x_stride, state, v, width, num_rows, out, out_stride, update);
  for (; v < width; v += kLanes)
    update_tile<R, 1, kKeep>(x, x_stride, state, v, width, num_rows, out, out_stride, update);
}

template <bool kKeep, class Kept>
static inline void update_some(int64_t num_heads, const float* x, int64_t x_stride, Kept* state, int64_t width,
                               int64_t num_rows, float* out, int64_t out_stride, const Update& update) {
  auto some = [&](auto heads) DIJIANG_INLINE {
    update_heads<heads, kKeep>(x, x_stride, state, width, num_rows, out, out_stride, update);
  };
  switch (num_heads) {
    case 0: some(std::integral_constant<int, 0>{}); break;
    case 1: some(std::integral_constant<int, 1>{}); break;
    case 2: some(std::integral_constant<int, 2>{}); break;
    case 3: some(std::integral_constant<int, 3>{}); break;
    default: some(std::integral_constant<int, 4>{}); break;
  }
}

// The update, and phi(q)^T S for any number of heads: all but the first kHeads read what S is going to be.
template <class Kept>
static inline void update_and_read(int64_t num_heads, const float* x, int64_t x_stride, Kept* state, int64_t width,
                                   int64_t num_rows, float* out, int64_t out_stride, const Update& update) {
  for (int64_t r = kHeads; r < num_heads; r += kHeads)
    update_some<false>(num_heads - r, x + r * x_stride, x_stride, state, width, num_rows, out + r * out_stride,
                       out_stride, update);
  update_some<true>(num_heads, x, x_stride, state, width, num_rows, out, out_stride, update);
}

// The linear branch's query of one head, q + U D q, before the rotary embedding. `low` [rank] is D q; null: q itself.
// U^T's rows `up` are `stride` apart.
static inline void far_query(const float* own, const float* low, const float* up, int64_t rank, int64_t stride, int64_t d,
                             float* to) {
  for (int64_t i = 0; i < d; i += kLanes) {
    Vec update = splat(0.0f);
    for (int64_t j = 0; low != nullptr && j < rank; ++j) update = fma(splat(low[j]), load(up + j * stride + i), update);
    store(to + i, low == nullptr ? load(own + i) : load(own + i) + update);
  }
}

// What is exact and the linear part (null: it counts nothing) under one denominator; `linear` may be the target itself.
static inline void join_parts(const float* linear, const float* exact, int64_t d, float sum, float mix, float below,
                              float* target) {
  const Vec by = splat(mix), all = splat(sum + mix * below);
  for (int64_t i = 0; i < d; i += kLanes) {
    const Vec above = linear != nullptr ? load(linear + i) : splat(0.0f);
    store(target + i, (load(exact + i) + by * above) / all);
  }
}

}  // namespace dijiang
