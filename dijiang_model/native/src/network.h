// A network's weights and the memory of its steps.
#pragma once

#include <vector>

#include "attention.h"
#include "matrix.h"
#include "rows.h"

namespace dijiang {

struct Layer {
  Norm input_norm, mlp_norm;      // weight = null: what is read is not normed
  Matrix query, key, value;       // a fused projection: all of it is `query`
  Matrix gate;                    // of the released read-out; rows = 0 without
  Norm group_norm;
  Matrix output;
  Matrix mlp_gate, mlp_up, mlp_down;  // an ungated MLP has mlp_gate.rows = 0
  Attention attention;
  Matrix far_down;                // [far_rank, H * d], the first half of the linear branch's update; rows = 0 without
  Matrix priority;                // [G, D] fp32, scores of the normed input; rows = 0 without anchors
  Norm query_norm, key_norm;      // of each head, or of all together, before it is rotated; weight = null without
  Norm attention_output_norm, mlp_output_norm;  // of what is added to the hidden state; weight = null without
  int64_t is_local;               // rotates by the model's local frequencies
  int64_t norms_all_heads;        // query_norm and key_norm are over all heads together
};

struct Model {
  const Layer* layers;
  int64_t num_layers;
  Norm final_norm;
  Matrix head;
  Heads heads;
  const double* frequencies;      // [rotary_half]
  const double* local_frequencies;  // [rotary_half] of local layers; null: there are none
  int64_t hidden_size, inner_size;
  int64_t last_sink_position;     // sinks are seen from no further away
  int64_t activation;
  int64_t is_parallel;            // attention and MLP both read the layer's input
};

// Memory of steps, grown to the largest one so far.
class Scratch {
 public:
  float* floats(size_t which, int64_t count) {
    if (buffers_.size() <= which) buffers_.resize(which + 1);
    if (buffers_[which].size() < static_cast<size_t>(count) + kAlign) buffers_[which].resize(static_cast<size_t>(count) + kAlign);
    const auto address = reinterpret_cast<uintptr_t>(buffers_[which].data());
    return reinterpret_cast<float*>((address + 63) / 64 * 64);
  }

 private:
  static constexpr size_t kAlign = 16;
  std::vector<std::vector<float>> buffers_;
};

// Rows that products read: fp32 and, where weights are not fp32, rounded to 16 bits.
struct RowBuffer {
  float* values;
  uint8_t* rounded;
  float* scales;
  float* sums;
  int64_t width;

  Activations activations() const { return {values, width, rounded, scales, sums}; }

  // Makes rows ready for a matrix that is going to read all num_rows: `rows_together` of them from row n, or the rest.
  void prepare(int64_t n, int64_t count, int64_t num_rows, const Matrix& reader) const {
    if (reader.reads_quantized()) round_rows(reader, values, num_rows, n, count, rounded, scales, sums);
  }
};

}  // namespace dijiang
