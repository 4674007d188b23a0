// One new token of one sequence, for one key-value head and the query heads that share it.
//
// The order is that of `ops/torch_attention.py`: rotate; the token that leaves the window goes over into the linear
// state (with anchors, whoever is evicted: `places.h`); the new one takes its place; exact tokens by softmax, others by
// phi(q)^T S, under one denominator.
#pragma once

#include <algorithm>

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
  const float* far_up;       // [far_rank, H * d], the linear branch's update of the queries
  const int64_t* first_place;  // [G + 1] of each head in the list of all heads' places; null: there are no anchors
  const int64_t* windows;      // [G] recent tokens among a head's places
  const float* log_decay;      // [G]
  const double* frequencies;   // [rotary_half]
  double age;                  // what a priority gains with each position
  double grid;                 // scores are multiples of it
  int64_t span;                // tokens on either side whose scores a token shares
  int64_t value_bits;          // of a value's number in a place, 8 or 4
  int64_t far_rank;          // 0: there is none
  int64_t table_entries;
  int64_t num_features;
  int64_t window;
  int64_t sinks;
  int64_t is_softmax;        // features: softmax, else exp
  int64_t has_denominator;
  Numbers exact_numbers;      // of keys and values
  Numbers linear_numbers;    // of S, fp32 or bf16; the normaliser is fp32
  int64_t state_offset;      // bytes within a slot; -1: there is no such part
  int64_t normaliser_offset;
  int64_t keys_offset;
  int64_t values_offset;
  int64_t key_scales_offset;
  int64_t value_scales_offset;
  int64_t positions_offset;
  int64_t scores_offset;
  int64_t recent_offset;

  bool has_anchors() const { return first_place != nullptr; }
  int64_t recent_window(int64_t group) const { return has_anchors() ? windows[group] : window; }
  // Tokens that a head has places for.
  int64_t places(int64_t group) const {
    return has_anchors() ? first_place[group + 1] - first_place[group] : window > 0 ? sinks + window : 0;
  }
  int64_t most_places(int64_t num_groups) const {
    int64_t most = 0;
    for (int64_t group = 0; group < num_groups; ++group) most = std::max(most, places(group));
    return most;
  }
};

struct Heads {
  int64_t num_heads, num_groups, head_size, rotary_half;
  int64_t query_start, query_step, key_start, key_step, value_start, value_step;  // in the projected row
  int64_t score_start, num_scores;  // scores of a token in each group, behind the rest of the row; 0: no layer has any
};

struct Token {
  int64_t position;
  uint8_t* slot;
  const float *cos, *sin, *sink_cos, *sink_sin;  // [rotary_half]
};

// One key-value head's part of a state; null: there is no such part.
struct GroupState {
  uint8_t *keys, *values;            // [places, d]; two numbers to a byte where values have 4 bits
  uint8_t* linear;                   // [K, d]
  float *key_scales, *value_scales;  // [places], for int8
  float* normaliser;                 // [K]
  int32_t* positions;                // [places], with anchors
  float* scores;                     // [places], with anchors
  float* recent;                     // [2 span + 1], with anchors
};

static inline int64_t bytes_of(Numbers numbers) {
  return numbers == Numbers::kFloat ? 4 : numbers == Numbers::kHalf ? 2 : 1;
}

// Bytes of each part of a group's state; 0 where there is none.
struct GroupBytes {
  int64_t keys, values, linear, scales, normaliser, recent;

  GroupBytes(const Attention& a, const Heads& heads, int64_t group)
      : keys(a.places(group) * heads.head_size * bytes_of(a.exact_numbers)),
        values(a.has_anchors() ? keys * a.value_bits / 8 : keys),
        linear(a.num_features * heads.head_size * bytes_of(a.linear_numbers)),
        scales(a.places(group) * static_cast<int64_t>(sizeof(float))),
        normaliser(a.num_features * static_cast<int64_t>(sizeof(float))),
        recent(a.has_anchors() ? (2 * a.span + 1) * static_cast<int64_t>(sizeof(float)) : 0) {}

  int64_t most() const { return keys + values + linear + 4 * scales + normaliser + recent + 9 * 64; }
};

// The part of group `group` in a slot.
static inline GroupState group_state(const Attention& a, const Heads& heads, uint8_t* slot, int64_t group) {
  const GroupBytes bytes(a, heads, group);
  auto at = [slot](int64_t offset, int64_t start) { return offset < 0 ? nullptr : slot + offset + start; };
  auto floats = [&at](int64_t offset, int64_t start) { return reinterpret_cast<float*>(at(offset, start)); };
  const int64_t first = a.has_anchors() ? a.first_place[group] : group * a.places(group);  // place
  const int64_t row = heads.head_size * bytes_of(a.exact_numbers), number = static_cast<int64_t>(sizeof(float));
  const int64_t value_row = a.has_anchors() ? row * a.value_bits / 8 : row;
  return {at(a.keys_offset, first * row),
          at(a.values_offset, first * value_row),
          at(a.state_offset, group * bytes.linear),
          floats(a.key_scales_offset, first * number),
          floats(a.value_scales_offset, first * number),
          floats(a.normaliser_offset, group * bytes.normaliser),
          reinterpret_cast<int32_t*>(at(a.positions_offset, first * number)),
          floats(a.scores_offset, first * number),
          floats(a.recent_offset, group * bytes.recent)};
}

// A copy of it in `memory`, of GroupBytes::most() bytes.
static inline GroupState copied(const Attention& a, const Heads& heads, int64_t group, const GroupState& from,
                                uint8_t* memory) {
  const GroupBytes bytes(a, heads, group);
  auto copy = [&memory](auto* part, int64_t size) -> decltype(part) {
    if (part == nullptr) return nullptr;
    uint8_t* taken = memory;
    std::memcpy(taken, part, static_cast<size_t>(size));
    memory += (size + 63) / 64 * 64;
    return reinterpret_cast<decltype(part)>(taken);
  };
  GroupState to;
  to.keys = copy(from.keys, bytes.keys);
  to.values = copy(from.values, bytes.values);
  to.linear = copy(from.linear, bytes.linear);
  to.key_scales = copy(from.key_scales, bytes.scales);
  to.value_scales = copy(from.value_scales, bytes.scales);
  to.normaliser = copy(from.normaliser, bytes.normaliser);
  to.positions = copy(from.positions, bytes.scales);
  to.scores = copy(from.scores, bytes.scales);
  to.recent = copy(from.recent, bytes.recent);
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
