// One new token of one sequence, for one key-value head and the query heads that share it.
//
// The order is that of `ops/torch_attention.py`: rotate; the token that leaves the window goes over into the linear
// state; the new one takes its place; near tokens by softmax, far ones by phi(q)^T S, under one denominator.
#pragma once

#include "linear_state.h"
#include "rotary.h"
#include "window.h"

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
  const float* far_up;       // [far_rank, H * d], the far branch's update of the queries
  int64_t far_rank;          // 0: there is none
  int64_t table_entries;
  int64_t num_features;
  int64_t window;
  int64_t sinks;
  int64_t is_softmax;        // features: softmax, else exp
  int64_t has_denominator;
  Numbers near_numbers;      // of keys and values
  Numbers linear_numbers;    // of S, fp32 or bf16; the normaliser is fp32
  int64_t state_offset;      // bytes within a slot; -1: there is no such part
  int64_t normaliser_offset;
  int64_t keys_offset;
  int64_t values_offset;
  int64_t key_scales_offset;
  int64_t value_scales_offset;
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

// One key-value head's part of a state; null: there is no such part.
struct GroupState {
  uint8_t *keys, *values;            // [sinks + window, d]
  uint8_t* linear;                   // [K, d]
  float *key_scales, *value_scales;  // [sinks + window], for int8
  float* normaliser;                 // [K]
};

static inline int64_t bytes_of(Numbers numbers) {
  return numbers == Numbers::kFloat ? 4 : numbers == Numbers::kHalf ? 2 : 1;
}

// Bytes of each part of a group's state, in the order of `GroupState`; 0 where there is none.
struct GroupBytes {
  int64_t near, linear, scales, normaliser;

  GroupBytes(const Attention& a, const Heads& heads)
      : near((a.sinks + a.window) * heads.head_size * bytes_of(a.near_numbers)),
        linear(a.num_features * heads.head_size * bytes_of(a.linear_numbers)),
        scales((a.sinks + a.window) * static_cast<int64_t>(sizeof(float))),
        normaliser(a.num_features * static_cast<int64_t>(sizeof(float))) {}

  int64_t most() const { return 2 * near + linear + 2 * scales + normaliser + 6 * 64; }
};

// The part of group `group` in a slot.
static inline GroupState group_state(const Attention& a, const Heads& heads, uint8_t* slot, int64_t group) {
  const GroupBytes bytes(a, heads);
  auto at = [slot, group](int64_t offset, int64_t size) { return offset < 0 ? nullptr : slot + offset + group * size; };
  auto floats = [&at](int64_t offset, int64_t size) { return reinterpret_cast<float*>(at(offset, size)); };
  return {at(a.keys_offset, bytes.near),
          at(a.values_offset, bytes.near),
          at(a.state_offset, bytes.linear),
          floats(a.key_scales_offset, bytes.scales),
          floats(a.value_scales_offset, bytes.scales),
          floats(a.normaliser_offset, bytes.normaliser)};
}

// A copy of it in `memory`, of GroupBytes::most() bytes.
static inline GroupState copied(const Attention& a, const Heads& heads, const GroupState& from, uint8_t* memory) {
  const GroupBytes bytes(a, heads);
  auto copy = [&memory](const void* part, int64_t size) -> uint8_t* {
    if (part == nullptr) return nullptr;
    uint8_t* taken = memory;
    std::memcpy(taken, part, static_cast<size_t>(size));
    memory += (size + 63) / 64 * 64;
    return taken;
  };
  auto floats = [&copy](const float* part, int64_t size) { return reinterpret_cast<float*>(copy(part, size)); };
  GroupState to;
  to.keys = copy(from.keys, bytes.near);
  to.values = copy(from.values, bytes.near);
  to.linear = copy(from.linear, bytes.linear);
  to.key_scales = floats(from.key_scales, bytes.scales);
  to.value_scales = floats(from.value_scales, bytes.scales);
  to.normaliser = floats(from.normaliser, bytes.normaliser);
  return to;
}

// Calls body with a null pointer to the type that numbers are kept as.
template <class Body>
static inline void with_kept(Numbers numbers, const Body& body) {
  switch (numbers) {
    case Numbers::kFloat: body(static_cast<float*>(nullptr)); break;
    case Numbers::kHalf: body(static_cast<Half*>(nullptr)); break;
    case Numbers::kInt8: body(static_cast<int8_t*>(nullptr)); break;
  }
}

}  // namespace dijiang
