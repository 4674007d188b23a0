// Rotary position embedding of one head's query or key: channel c is paired with c + half.
#pragma once

#include <cstdint>

namespace dijiang {

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

}  // namespace dijiang
