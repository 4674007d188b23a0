// What products read: matrices in each of their forms, and the rows that they are multiplied with.
#pragma once

#include "vector.h"

#if defined(__AVX512VNNI__) && defined(__AVX512F__)
#define DIJIANG_VNNI 1
#else
#define DIJIANG_VNNI 0
#endif

namespace dijiang {

constexpr int64_t kCodeBlock = 64;
constexpr int64_t kSmallestGroup = 32;
static inline int64_t padded(int64_t columns) { return (columns + kCodeBlock - 1) / kCodeBlock * kCodeBlock; }

struct Matrix {
  const float* weight;             // fp32: [rows, columns]; else null
  const uint16_t* halves;          // bf16: [rows, columns]; else null
  const int8_t* codes;             // int8: [rows, padded(columns)], zeros behind the columns; else null
  const float* scales;             // [rows]
  const uint8_t* pairs;            // int4: [(rows + 1) / 2, padded(columns)], a row in each half of a byte; else null
  const uint16_t* group_scales;    // [rows, num_groups] fp16
  const uint16_t* group_minimums;  // [rows, num_groups] fp16; null: a code stands for code - 8
  const float* bias;               // [rows] or null
  int64_t rows;                    // 0: there is no such matrix
  int64_t columns;
  int64_t group_size;              // int4: columns under one scale, 32 or 64

  // Whether the rows that it is multiplied with are rounded before (`round_row`).
  bool reads_quantized() const { return weight == nullptr && rows > 0; }
  int64_t num_groups() const { return (columns + group_size - 1) / group_size; }
};

// Sums of groups of a row, padded to whole vectors of any kind.
static inline int64_t padded_sums(int64_t columns) { return (columns / kSmallestGroup + 1 + 15) / 16 * 16; }

// The right-hand sides of one product: N rows in fp32, and the same in 16 bits for weights that are not.
struct Activations {
  const float* values;    // [N, stride]
  int64_t stride;
  // [N, 2 * padded(columns)] bytes, zeros behind the columns. For int8: int16 of value / scale; for bf16: bf16;
  // for int4: planes, high bytes and low bytes of value / scale + 32768. For the matrix unit: see `tile_rows.h`.
  const uint8_t* rounded;
  const float* scales;    // [N]
  const float* sums;      // [N, padded_sums(columns)] sums of value / scale over int4 groups, zeros behind them
};

// Weights come from memory once a step. A block of outputs reads several rows side by side, which the processor's own
// prefetching does not follow well, least of all in short rows: so the blocks behind are asked for line by line.
constexpr int64_t kAheadBytes = 32768;
static inline DIJIANG_INLINE void fetch(const void* at) {
#if defined(__x86_64__) || defined(__i386__)
  // Not the builtin: the compiler takes a function of nothing else for one without effect, and leaves calls of it out.
  asm volatile("prefetcht1 %0" : : "m"(*static_cast<const char*>(at)));
#else
  __builtin_prefetch(at, 0, 2);
#endif
}

// Weights that are read in the order of memory are followed well, at a third more bytes a second than can be asked for,
// but only to the end of a page: the first lines of the page behind each one that ends within `bytes` are asked for.
static inline void fetch_next_pages(const void* at, int64_t bytes) {
  constexpr uintptr_t kPage = 4096;
  constexpr int kLines = 4;
  const auto start = reinterpret_cast<uintptr_t>(at), end = start + static_cast<uintptr_t>(bytes);
  for (uintptr_t page = (start + kPage - 1) / kPage * kPage; page < end; page += kPage)
    for (int line = 0; line < kLines; ++line) fetch(reinterpret_cast<const void*>(page + kPage + 64 * line));
}

typedef float Vec4At __attribute__((vector_size(16), aligned(4), may_alias));
static inline Vec4 load4(const float* from) { return *reinterpret_cast<const Vec4At*>(from); }
static inline void store4(float* to, Vec4 x) { *reinterpret_cast<Vec4At*>(to) = x; }

}  // namespace dijiang
