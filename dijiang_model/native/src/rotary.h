// Rotary position embedding of one head's query or key: channel c is paired with c + half.
#pragma once

#include "vector.h"

namespace dijiang {

typedef double Wide __attribute__((vector_size(kLanes * 4)));  // half as many lanes as of floats
typedef double WideAt __attribute__((vector_size(kLanes * 4), aligned(8), may_alias));
typedef int64_t WideInt __attribute__((vector_size(kLanes * 4)));
typedef float Part __attribute__((vector_size(kLanes * 2)));
typedef float PartAt __attribute__((vector_size(kLanes * 2), aligned(4), may_alias));
constexpr int kWide = kLanes / 2;

static inline Wide wide(double x) { return x - Wide{}; }

// Cosines and negative sines of position * frequencies, right to 1e-9 for angles up to 1e8: reduced in fp64 to an eighth
// of a turn around 0, and from there by their series.
static inline void back_angles(int64_t position, const double* frequencies, int64_t half, float* cos, float* sin) {
  const double turns = 0.63661977236758134308;  // 2 / pi, and pi / 2 in two parts
  const double high = 1.57079632673412561417, low = 6.07710050650619224932e-11;
  const Wide shift = wide(6755399441055744.0);  // 1.5 * 2^52: adding it rounds to an integer
  int64_t i = 0;
  for (; i + kWide <= half; i += kWide) {
    const Wide angle = *reinterpret_cast<const WideAt*>(frequencies + i) * static_cast<double>(position);
    const Wide quarter = (angle * turns + shift) - shift;
    const Wide r = (angle - quarter * high) - quarter * low, r2 = r * r;
    const Wide s = r + r * r2 * (wide(-1.0 / 6) + r2 * (wide(1.0 / 120) + r2 * (wide(-1.0 / 5040) + r2 / 362880.0)));
    const Wide c = wide(1.0) - r2 * (wide(0.5) - r2 * (wide(1.0 / 24) - r2 * (wide(1.0 / 720) -
                   r2 * (wide(1.0 / 40320) - r2 / 3628800.0))));
    const WideInt number = __builtin_convertvector(quarter, WideInt);
    const WideInt is_odd = (number & 1) != 0;
    const Wide cosine = is_odd ? s : c, sine = is_odd ? c : s;
    const WideInt flips_cosine = ((number + 1) & 2) != 0, flips_sine = (number & 2) != 0;
    *reinterpret_cast<PartAt*>(cos + i) = __builtin_convertvector(flips_cosine ? -cosine : cosine, Part);
    *reinterpret_cast<PartAt*>(sin + i) = __builtin_convertvector(flips_sine ? sine : -sine, Part);
  }
  for (; i < half; ++i) {
    const double angle = static_cast<double>(position) * frequencies[i];
    cos[i] = static_cast<float>(std::cos(angle));
    sin[i] = static_cast<float>(-std::sin(angle));
  }
}

static inline void rotate(const float* x, int64_t size, int64_t half, const float* cos, const float* sin, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const Vec first = load(x + i), second = load(x + half + i), c = load(cos + i), s = load(sin + i);
    store(out + i, first * c - second * s);
    store(out + half + i, second * c + first * s);
  }
  for (; i < half; ++i) {
    const float first = x[i], second = x[half + i];
    out[i] = first * cos[i] - second * sin[i];
    out[half + i] = second * cos[i] + first * sin[i];
  }
  for (i = 2 * half; i < size; ++i) out[i] = x[i];
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

// cos and sin of a position's angles, in fp64: in fp32 a position of 10^6 is off by 0.06 rad. `out` [2, half].
static inline void fill_angles(const double* frequencies, int64_t half, int64_t position, float* out) {
  for (int64_t i = 0; i < half; ++i) {
    const double angle = static_cast<double>(position) * frequencies[i];
    out[i] = static_cast<float>(std::cos(angle));
    out[half + i] = static_cast<float>(std::sin(angle));
  }
}

}  // namespace dijiang
