// States kept in bf16: half the memory of a conversation. Steps compute in fp32 as ever, on a widened copy.
//
// A key or a value is rounded once, when it enters the window. S is rounded after every token, for thousands of tokens:
// to the nearest number, whatever is less than half a unit in the last place would never be added or never decay.
// So the last bits decide by chance whether to go up, and the mean stays right. The chance is a function of position
// and place alone: a state is the same bit for bit in any company and however its prompt was cut.
#pragma once

#include <cstdint>
#include <cstring>

namespace dijiang {

typedef uint32_t Bits __attribute__((may_alias));
typedef uint16_t HalfBits __attribute__((may_alias));
constexpr uint32_t kExponent = 0x7f800000u;

static inline void widen(const uint8_t* from, int64_t count, float* to) {
  const auto* narrow = reinterpret_cast<const HalfBits*>(from);
  auto* wide = reinterpret_cast<Bits*>(to);
  for (int64_t i = 0; i < count; ++i) wide[i] = static_cast<uint32_t>(narrow[i]) << 16;
}

// Of numbers that are in bf16 already; a NaN stays one.
static inline void narrow(const float* from, int64_t count, uint8_t* to) {
  const auto* wide = reinterpret_cast<const Bits*>(from);
  auto* narrow = reinterpret_cast<HalfBits*>(to);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t quiet = (wide[i] & ~(1u << 31)) > kExponent ? 1u << 22 : 0u;
    narrow[i] = static_cast<uint16_t>((wide[i] | quiet) >> 16);
  }
}

// To the nearest number in bf16, ties to even.
static inline void round_to_nearest(float* x, int64_t count) {
  auto* bits = reinterpret_cast<Bits*>(x);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t rounded = (bits[i] + 0x7fffu + ((bits[i] >> 16) & 1u)) & 0xffff0000u;
    bits[i] = (bits[i] & kExponent) == kExponent ? bits[i] : rounded;
  }
}

// Up or down to a neighbour in bf16, with chances that keep the mean: see `ops/narrow.py`.
static inline void round_by_chance(float* x, int64_t count, int64_t position) {
  auto* bits = reinterpret_cast<Bits*>(x);
  const uint32_t salt = static_cast<uint32_t>(position) * 0x85ebca6bu;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t chance = static_cast<uint32_t>(i) * 0x9e3779b1u + salt;
    chance = (chance ^ (chance >> 16)) * 0x7feb352du;
    chance = (chance ^ (chance >> 15)) * 0x846ca68bu;
    const uint32_t rounded = (bits[i] + (chance >> 16)) & 0xffff0000u;
    bits[i] = (bits[i] & kExponent) == kExponent ? bits[i] : rounded;
  }
}

}  // namespace dijiang
