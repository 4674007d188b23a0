// One new token of one sequence, for one key-value head and the query heads that share it.
//
// The order is that of `ops/torch_attention.py`: rotate; the token that leaves the window goes over into the linear
// state; the new one takes its place; near tokens by softmax, far ones by phi(q)^T S, under one denominator.
#pragma once

#include "matrix.h"
#include "narrow.h"

namespace dijiang {

struct Attention {
  const float* basis;        // [d, K]
  const float* nodes;        // [G, K] radii times scale
  const float* log_weights;  // [G, K]
  const float* decay;        // [G]; with tables [entries, H]
  const float* late;         // [G] decay^window; null without a window
  const float* table_write;  // [entries, H]; null without tables
  const float* table_read;   // [entries, H]
  const float* mix_bias;     // [H]; null without a window
  const float* mix_weight;   // [H, d]
  const float* late_cos;     // [rotary_half] of the window's length; null: features of rotated queries and keys
  const float* late_sin;     // [rotary_half]
  int64_t table_entries;
  int64_t num_features;
  int64_t window;
  int64_t sinks;
  int64_t is_softmax;        // features: softmax, else exp
  int64_t has_denominator;
  int64_t state_offset;      // bytes within a slot
  int64_t normaliser_offset;
  int64_t keys_offset;
  int64_t values_offset;
  int64_t is_narrow;         // all parts of a state but the normaliser are bf16
};

struct Heads {
  int64_t num_heads, num_groups, head_size, rotary_half;
  int64_t query_start, query_step, key_start, key_step, value_start, value_step;  // in the projected row
};

struct Token {
  int64_t position;
  uint8_t* slot;
  const float *cos, *sin, *sink_cos, *sink_sin;  // [rotary_half]
};

// Where one key-value head's part of a state lies; null: there is no such part.
struct GroupState {
  float* keys;        // [sinks + window, d]
  float* values;      // [sinks + window, d]
  float* linear;      // [K, d]
  float* normaliser;  // [K]
};

// The part of group `group` in a slot.
static inline GroupState group_state(const Attention& a, const Heads& heads, uint8_t* slot, int64_t group) {
  const int64_t d = heads.head_size, near = a.window + a.sinks;
  auto at = [slot](int64_t offset, int64_t floats) {
    return offset < 0 ? nullptr : reinterpret_cast<float*>(slot + offset) + floats;
  };
  return {at(a.keys_offset, group * near * d), at(a.values_offset, group * near * d),
          at(a.state_offset, group * a.num_features * d), at(a.normaliser_offset, group * a.num_features)};
}

// A part of a narrow state: where each tensor of group `group` lies, and how many numbers it has.
struct NarrowGroup {
  uint8_t *keys, *values, *linear;
  float* normaliser;
  int64_t num_near, num_linear, num_features;
};

static inline NarrowGroup narrow_group(const Attention& a, const Heads& heads, uint8_t* slot, int64_t group) {
  const int64_t near = (a.window + a.sinks) * heads.head_size, linear = a.num_features * heads.head_size;
  auto at = [slot](int64_t offset, int64_t bytes) { return offset < 0 ? nullptr : slot + offset + bytes; };
  uint8_t* normaliser = at(a.normaliser_offset, group * a.num_features * static_cast<int64_t>(sizeof(float)));
  return {at(a.keys_offset, 2 * group * near), at(a.values_offset, 2 * group * near),
          at(a.state_offset, 2 * group * linear), reinterpret_cast<float*>(normaliser),
          a.keys_offset < 0 ? 0 : near,            linear,
          normaliser == nullptr ? 0 : a.num_features};
}

// It in fp32, in `memory` of `group_state_size` floats.
static inline GroupState widened(const NarrowGroup& part, float* memory) {
  const GroupState state{memory, memory + part.num_near, memory + 2 * part.num_near,
                         part.normaliser == nullptr ? nullptr : memory + 2 * part.num_near + part.num_linear};
  widen(part.keys, part.num_near, state.keys);
  widen(part.values, part.num_near, state.values);
  widen(part.linear, part.num_linear, state.linear);
  for (int64_t j = 0; j < part.num_features; ++j) state.normaliser[j] = part.normaliser[j];
  return state;
}

// And back, after steps whose numbers are in bf16 already.
static inline void put_back(const GroupState& state, const NarrowGroup& part) {
  narrow(state.keys, part.num_near, part.keys);
  narrow(state.values, part.num_near, part.values);
  narrow(state.linear, part.num_linear, part.linear);
  for (int64_t j = 0; j < part.num_features; ++j) part.normaliser[j] = state.normaliser[j];
}

// Floats of such a part.
static inline int64_t group_state_size(const Attention& a, const Heads& heads) {
  return (2 * (a.window + a.sinks) + a.num_features) * heads.head_size + a.num_features;
}

// A copy of it in `memory`.
static inline GroupState copied(const Attention& a, const Heads& heads, const GroupState& from, float* memory) {
  auto copy = [&memory](const float* part, int64_t count) -> float* {
    if (part == nullptr) return nullptr;
    float* taken = memory;
    std::memcpy(taken, part, static_cast<size_t>(count) * sizeof(float));
    memory += count;
    return taken;
  };
  const int64_t near = (a.window + a.sinks) * heads.head_size;
  GroupState to;
  to.keys = copy(from.keys, near);
  to.values = copy(from.values, near);
  to.linear = copy(from.linear, a.num_features * heads.head_size);
  to.normaliser = copy(from.normaliser, a.num_features);
  return to;
}

constexpr int kTile = kLanes == 16 ? 4 : 2;  // vectors of the value width at once
constexpr int kHeads = 4;                    // query heads at once

// out[r] = sum_j x[r][j] rows[j]. With `update`, rows[j] <- decay rows[j] + keys[j] value first, in place.
template <int R, int T, bool kUpdate>
static inline void weighted_tile(const float* x, int64_t x_stride, float* rows, int64_t stride, int64_t num_rows,
                                 float* out, int64_t out_stride, float decay, const float* keys, const float* value) {
  Vec total[R > 0 ? R : 1][T];
  Vec added[T];
  each<T>([&](auto t) DIJIANG_INLINE {
    each<R>([&](auto r) DIJIANG_INLINE { total[r][t] = splat(0.0f); });
    if (kUpdate) added[t] = load(value + t * kLanes);
  });
  for (int64_t j = 0; j < num_rows; ++j) {
    float* row = rows + j * stride;
    each<T>([&](auto t) DIJIANG_INLINE {
      Vec entry = load(row + t * kLanes);
      if (kUpdate) {
        entry = fma(splat(keys[j]), added[t], entry * splat(decay));
        store(row + t * kLanes, entry);
      }
      each<R>([&](auto r) DIJIANG_INLINE {
        total[r][t] = fma(splat(x[r * x_stride + j]), entry, total[r][t]);
      });
    });
  }
  each<R>([&](auto r) DIJIANG_INLINE {
    each<T>([&](auto t) DIJIANG_INLINE { store(out + r * out_stride + t * kLanes, total[r][t]); });
  });
}

template <int R, bool kUpdate>
static inline void weighted_heads(const float* x, int64_t x_stride, float* rows, int64_t width, int64_t num_rows,
                                  float* out, int64_t out_stride, float decay, const float* keys, const float* value) {
  int64_t v = 0;
  for (; v + kTile * kLanes <= width; v += kTile * kLanes)
    weighted_tile<R, kTile, kUpdate>(x, x_stride, rows + v, width, num_rows, out + v, out_stride, decay, keys,
                                     value + v);
  for (; v < width; v += kLanes)
    weighted_tile<R, 1, kUpdate>(x, x_stride, rows + v, width, num_rows, out + v, out_stride, decay, keys, value + v);
}

template <bool kUpdate>
static inline void weighted_some(int64_t num_heads, const float* x, int64_t x_stride, float* rows, int64_t width,
                                 int64_t num_rows, float* out, int64_t out_stride, float decay, const float* keys,
                                 const float* value) {
#define DIJIANG_HEADS(R) \
  weighted_heads<R, kUpdate>(x, x_stride, rows, width, num_rows, out, out_stride, decay, keys, value)
  switch (num_heads) {
    case 0: DIJIANG_HEADS(0); break;
    case 1: DIJIANG_HEADS(1); break;
    case 2: DIJIANG_HEADS(2); break;
    case 3: DIJIANG_HEADS(3); break;
    default: DIJIANG_HEADS(4); break;
  }
#undef DIJIANG_HEADS
}

// out[r] = sum_j x[r][j] rows[j] for any number of heads.
static inline void weighted(int64_t num_heads, const float* x, int64_t x_stride, const float* rows, int64_t width,
                            int64_t num_rows, float* out, int64_t out_stride) {
  for (int64_t r = 0; r < num_heads; r += kHeads)
    weighted_some<false>(num_heads - r < kHeads ? num_heads - r : kHeads, x + r * x_stride, x_stride,
                         const_cast<float*>(rows), width, num_rows, out + r * out_stride, out_stride, 0.0f, x, x);
}

// S <- decay S + keys value^T; out[r] = x[r]^T S for the first `num_heads` heads. S [num_rows, width].
static inline void update_and_read(int64_t num_heads, const float* x, int64_t x_stride, float* state, int64_t width,
                                   int64_t num_rows, float* out, int64_t out_stride, float decay, const float* keys,
                                   const float* value) {
  const int64_t first = num_heads < kHeads ? num_heads : kHeads;
  weighted_some<true>(first, x, x_stride, state, width, num_rows, out, out_stride, decay, keys, value);
  if (num_heads > first)
    weighted(num_heads - first, x + first * x_stride, x_stride, state, width, num_rows, out + first * out_stride,
             out_stride);
}

static inline void rotate(const float* x, int64_t size, int64_t half, const float* cos, const float* sin, float* out) {
  for (int64_t i = 0; i < half; ++i) {
    const float first = x[i], second = x[half + i];
    out[i] = first * cos[i] - second * sin[i];
    out[half + i] = second * cos[i] + first * sin[i];
  }
  for (int64_t i = 2 * half; i < size; ++i) out[i] = x[i];
}

// Undoes `rotate` in place; cos and sin of the difference of two angles, given those of each.
static inline void rotate_back(float* x, int64_t half, const float* cos, const float* sin, const float* late_cos,
                               const float* late_sin) {
  for (int64_t i = 0; i < half; ++i) {
    const float c = cos[i] * late_cos[i] + sin[i] * late_sin[i];
    const float s = sin[i] * late_cos[i] - cos[i] * late_sin[i];
    const float first = x[i], second = x[half + i];
    x[i] = first * c + second * s;
    x[half + i] = second * c - first * s;
  }
}

// x <- softmax(x) or exp(x), `size` a multiple of the lanes.
static inline void normalise(float* x, int64_t size, bool is_softmax) {
  float most = 0.0f;
  if (is_softmax) {
    Vec top = load(x);
    for (int64_t j = kLanes; j < size; j += kLanes) {
      const Vec next = load(x + j);
      top = next > top ? next : top;
    }
    most = largest(top);
  }
  Vec total = splat(0.0f);
  for (int64_t j = 0; j < size; j += kLanes) {
    const Vec e = exponential(load(x + j) - splat(most));
    store(x + j, e);
    total += e;
  }
  if (is_softmax) {
    const Vec all = splat(sum(total));
    for (int64_t j = 0; j < size; j += kLanes) store(x + j, load(x + j) / all);
  }
}

static inline int64_t modulo(int64_t a, int64_t b) {
  const int64_t rest = a % b;
  return rest < 0 ? rest + b : rest;
}

static inline int64_t padded_near(int64_t near) { return (near + kLanes - 1) / kLanes * kLanes; }

// Floats of scratch that `attend` needs.
static inline int64_t attention_scratch(const Heads& heads, const Attention& a) {
  const int64_t shared = heads.num_heads / heads.num_groups, d = heads.head_size;
  return (8 * shared + 5) * d + (shared + 1) * a.num_features + shared * padded_near(a.window + a.sinks) + 64;
}

// w[r][j] = exp(q[r] . k[j] - max) over visible near rows, 0 elsewhere; sums[r] their sum.
static inline void near_weights(const Attention& a, int64_t shared, int64_t d, int64_t position, const float* query,
                                const float* sink_query, const float* keys, float* weights, float* sums) {
  const int64_t near = a.window + a.sinks, stride = padded_near(near), ring = modulo(position, a.window);
  for (int64_t r = 0; r < shared; ++r) {
    float* w = weights + r * stride;
    int64_t j = 0;
    const float infinity = std::numeric_limits<float>::infinity();
    auto scores = [&](const float* q, int64_t last) {
      for (; j + 4 <= last; j += 4) {
        Vec4 four[1][1];
        dot_block<4, 1>(keys + j * d, d, q, d, d, four);
        store4(w + j, four[0][0]);
      }
      for (; j < last; ++j) w[j] = dot(keys + j * d, q, d);
    };
    scores(sink_query + r * d, a.sinks);
    scores(query + r * d, near);
    for (; j < stride; ++j) w[j] = -infinity;
    for (int64_t z = position + 1; z < a.sinks; ++z) w[z] = -infinity;
    if (position - a.window + 1 < a.sinks) {
      for (int64_t c = 0; c < a.window; ++c) {
        if (position - modulo(ring - c, a.window) < a.sinks) w[a.sinks + c] = -infinity;
      }
    }
    float most = w[0];
    for (int64_t i = 1; i < near; ++i) most = w[i] > most ? w[i] : most;
    Vec total = splat(0.0f);
    for (int64_t i = 0; i < stride; i += kLanes) {
      const Vec e = exponential(load(w + i) - splat(most));
      store(w + i, e);
      total += e;
    }
    sums[r] = sum(total);
  }
}

// Attention of token `token` for group `group`: reads the projected row, moves the state on, writes heads of `out`.
// `far_queries` [H, d], not rotated yet, read the linear part; null: the window's queries do.
// Without `out` nothing is asked of the state; it is moved on to the same bits.
static void attend(const Attention& a, const Heads& heads, const Token& token, int64_t group, const GroupState& at,
                   const float* projected, const float* far_queries, float* out, float* scratch) {
  const bool is_asked = out != nullptr;
  const int64_t shared = heads.num_heads / heads.num_groups, d = heads.head_size, features = a.num_features;
  const int64_t near = a.window + a.sinks, first_head = group * shared;
  auto take = [&scratch](int64_t count) {
    float* taken = scratch;
    scratch += count;
    return taken;
  };
  float* far_rows = take((shared + 1) * d);  // the far queries, then the key that enters the state
  float *new_key = take(d), *far_value = take(d);
  float *near_query = take(shared * d), *sink_query = take(shared * d);
  float *far = take(shared * d), *close = take(shared * d);
  float *phi = take((shared + 1) * features), *weights = take(shared * padded_near(near));
  float *sums = take(shared), *mix = take(shared);
  const bool is_rotated = a.late_cos == nullptr;
  float* near_rotated = far_queries == nullptr && is_rotated ? far_rows : take(shared * d);
  float *far_key = far_rows + shared * d, *phi_key = phi + shared * features;

  const float* value = projected + heads.value_start + group * heads.value_step;
  rotate(projected + heads.key_start + group * heads.key_step, d, heads.rotary_half, token.cos, token.sin, new_key);
  if (a.is_narrow != 0 && a.window > 0) {
    float* rounded = take(d);
    std::memcpy(rounded, value, static_cast<size_t>(d) * sizeof(float));
    round_to_nearest(rounded, d);
    round_to_nearest(new_key, d);
    value = rounded;
  }
  for (int64_t r = 0; is_asked && r < shared; ++r) {
    const float* query = projected + heads.query_start + (first_head + r) * heads.query_step;
    rotate(query, d, heads.rotary_half, token.cos, token.sin, near_rotated + r * d);
    const float* far_query = far_queries == nullptr ? query : far_queries + (first_head + r) * d;
    if (!is_rotated)
      std::memcpy(far_rows + r * d, far_query, static_cast<size_t>(d) * sizeof(float));
    else if (far_queries != nullptr)
      rotate(far_query, d, heads.rotary_half, token.cos, token.sin, far_rows + r * d);
    if (a.sinks > 0) rotate(query, d, heads.rotary_half, token.sink_cos, token.sink_sin, sink_query + r * d);
  }

  bool leaves = true, reads = is_asked;
  if (a.window > 0) {
    float *keys = at.keys, *values = at.values;
    const size_t bytes = static_cast<size_t>(d) * sizeof(float);
    const int64_t row = a.sinks + modulo(token.position, a.window);
    const int64_t sink_row = token.position < a.sinks ? token.position : row;
    leaves = token.position - a.window >= a.sinks;
    std::memcpy(far_key, keys + row * d, bytes);
    std::memcpy(far_value, values + row * d, bytes);
    if (!is_rotated && leaves)
      rotate_back(far_key, heads.rotary_half, token.cos, token.sin, a.late_cos, a.late_sin);
    for (int64_t written : {row, sink_row}) {
      std::memcpy(keys + written * d, new_key, bytes);
      std::memcpy(values + written * d, value, bytes);
    }
    const float scale = 1.0f / std::sqrt(static_cast<float>(d));
    for (int64_t i = 0; is_asked && i < shared * d; ++i) near_query[i] = near_rotated[i] * scale;
    for (int64_t i = 0; is_asked && a.sinks > 0 && i < shared * d; ++i) sink_query[i] *= scale;
    if (is_asked) {
      near_weights(a, shared, d, token.position, near_query, sink_query, keys, weights, sums);
      weighted(shared, weights, padded_near(near), values, d, near, close, d);
    }
    reads = false;
    for (int64_t r = 0; is_asked && r < shared; ++r) {
      const float bias = a.mix_bias[first_head + r];
      const float* read = is_rotated ? near_rotated + r * d
                                     : projected + heads.query_start + (first_head + r) * heads.query_step;
      const float weight = dot(read, a.mix_weight + (first_head + r) * d, d);
      mix[r] = static_cast<float>(features) * exponential(bias + weight);
      // A silent head (bias -inf) needs nothing of the state: its features and its read-out are left out.
      reads = reads || bias != -std::numeric_limits<float>::infinity();
    }
  } else {
    const float* key = is_rotated ? new_key : projected + heads.key_start + group * heads.key_step;
    std::memcpy(far_key, key, static_cast<size_t>(d) * sizeof(float));
    std::memcpy(far_value, value, static_cast<size_t>(d) * sizeof(float));
  }

  const int64_t first = reads ? 0 : shared, last = leaves ? shared + 1 : shared;
  weighted(last - first, far_rows + first * d, d, a.basis, features, d, phi + first * features, features);
  const float *nodes = a.nodes + group * features, *log_weights = a.log_weights + group * features;
  for (int64_t i = first; i < last; ++i) {
    float* row = phi + i * features;
    for (int64_t j = 0; j < features; ++j) row[j] = row[j] * nodes[j] + log_weights[j];
    normalise(row, features, a.is_softmax != 0);
  }
  float decay = 0.0f, write = 1.0f;
  if (a.table_write != nullptr) {
    const int64_t entry = token.position < a.table_entries ? token.position : a.table_entries - 1;
    const int64_t entry_at = entry * heads.num_heads + group;
    decay = a.decay[entry_at];
    write = a.table_write[entry_at];
    for (int64_t j = 0; is_asked && j < features; ++j) phi[j] *= a.table_read[entry_at];
  } else {
    decay = a.decay[group];
    if (a.late != nullptr) write = a.late[group];
  }
  for (int64_t j = 0; j < features; ++j) phi_key[j] = leaves ? phi_key[j] * write : 0.0f;

  const int64_t num_read = reads ? shared : 0;
  update_and_read(num_read, phi, features, at.linear, d, features, far, d, decay, phi_key, far_value);
  if (a.is_narrow != 0) round_by_chance(at.linear, features * d, token.position);
  float* normaliser = at.normaliser;
  if (a.has_denominator != 0) {
    for (int64_t j = 0; j < features; ++j) normaliser[j] = phi_key[j] + normaliser[j] * decay;
  }
  if (!is_asked) return;
  float* target = out + first_head * d;
  if (a.has_denominator == 0) {
    std::memcpy(target, far, static_cast<size_t>(shared * d) * sizeof(float));
    return;
  }
  for (int64_t r = 0; r < shared; ++r) {
    const float below = reads ? dot(phi + r * features, normaliser, features) : 0.0f;
    for (int64_t i = 0; i < d; ++i) {
      const float above = reads ? far[r * d + i] : 0.0f;
      target[r * d + i] = a.window > 0 ? (close[r * d + i] + mix[r] * above) / (sums[r] + mix[r] * below)
                                       : above / below;
    }
  }
}

}  // namespace dijiang
