// What is done to each row by itself: norms, activations, the released read-out.
#pragma once

#include "vector.h"

namespace dijiang {

struct Norm {
  const float* weight;
  const float* bias;  // null: RMS norm
  double eps;
};

enum ActivationKind : int64_t { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3 };

static inline float total(const float* x, int64_t size) {
  Vec sums = splat(0.0f);
  int64_t j = 0;
  for (; j + kLanes <= size; j += kLanes) sums += load(x + j);
  if (j < size) sums += load_first(x + j, size - j);
  return sum(sums);
}

// The mean of (x - centre)^2.
static inline float spread(const float* x, float centre, int64_t size) {
  Vec squares = splat(0.0f);
  int64_t j = 0;
  for (; j + kLanes <= size; j += kLanes) {
    const Vec off = load(x + j) - splat(centre);
    squares = fma(off, off, squares);
  }
  float rest = 0.0f;
  for (; j < size; ++j) rest += (x[j] - centre) * (x[j] - centre);
  return (sum(squares) + rest) / static_cast<float>(size);
}

static inline void apply(const Norm& norm, const float* x, int64_t size, float* out) {
  const bool is_rms = norm.bias == nullptr;
  const float centre = is_rms ? 0.0f : total(x, size) / static_cast<float>(size);
  const float factor = 1.0f / std::sqrt(spread(x, centre, size) + static_cast<float>(norm.eps));
  for (int64_t j = 0; j < size; ++j) {
    const float scaled = (x[j] - centre) * factor * norm.weight[j];
    out[j] = is_rms ? scaled : scaled + norm.bias[j];
  }
}

static inline Vec silu(Vec x) { return x / (splat(1.0f) + exponential(-x)); }

// x <- f(x), f(x) * gate's partner afterwards. Written without regard to where a range begins: lanes are independent.
static inline void activate(ActivationKind kind, float* x, int64_t size) {
  if (kind == kSilu) {
    int64_t j = 0;
    for (; j + kLanes <= size; j += kLanes) store(x + j, silu(load(x + j)));
    for (; j < size; ++j) x[j] = x[j] / (1.0f + exponential(-x[j]));
    return;
  }
  for (int64_t j = 0; j < size; ++j) {
    const float v = x[j];
    if (kind == kGelu) {
      x[j] = 0.5f * v * (1.0f + std::erf(v * 0.70710678118654752f));
    } else if (kind == kGeluTanh) {
      x[j] = 0.5f * v * (1.0f + std::tanh(0.79788456080286536f * (v + 0.044715f * v * v * v)));
    } else {
      x[j] = v < 0.0f ? 0.0f : v;
    }
  }
}

// The released read-out: x <- silu(gate) * GroupNorm(x), `num_groups` groups of neighbouring channels.
static inline void gated_group_norm(const Norm& norm, int64_t num_groups, int64_t width, float* gate, float* x) {
  const int64_t size = width / num_groups;
  activate(kSilu, gate, width);
  for (int64_t g = 0; g < num_groups; ++g) {
    float* part = x + g * size;
    const float centre = total(part, size) / static_cast<float>(size);
    const float factor = 1.0f / std::sqrt(spread(part, centre, size) + static_cast<float>(norm.eps));
    for (int64_t j = 0; j < size; ++j) {
      const int64_t channel = g * size + j;
      part[j] = ((part[j] - centre) * factor * norm.weight[channel] + norm.bias[channel]) * gate[channel];
    }
  }
}

}  // namespace dijiang
