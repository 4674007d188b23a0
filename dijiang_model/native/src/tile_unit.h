// The matrix unit of Intel's processors (AMX): eight tiles of 16 rows of 64 bytes, and their products.
//
// A product of tiles is C[o][n] += sum_k A[o][k] B[k][n], with k in units of 4 bytes: four numbers of 8 bits in sums of
// int32, or two bf16 in sums of fp32. No element of C depends on any but its own row of A and column of B.
#pragma once

#include <cstdint>

#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__AVX512F__) && defined(__linux__)
#define DIJIANG_TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#else
#define DIJIANG_TILES 0
#endif

namespace dijiang {

constexpr int64_t kTileRows = 16, kTileRowBytes = 64, kTileBytes = kTileRows * kTileRowBytes;

// Whether the system lets this process use what the library was compiled for. Tiles are asked for, once a process: their
// 8 KB belong to what the system saves of a thread.
static inline bool is_unit_ready() {
#if DIJIANG_TILES
  constexpr long kAskForFeature = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kAskForFeature, kTileData) == 0;
#else
  return true;
#endif
}

#if DIJIANG_TILES

// Tiles as a product wants them, until the end of a scope; afterwards the system has nothing of them to save.
// 0 to 3: sums; 4 and 5: weights, a row per output; 6 and 7: rows of activations, a column per row.
class TileSession {
 public:
  // right_bytes: of a row of tiles 6 and 7, 4 bytes for each column.
  explicit TileSession(int right_bytes) {
    alignas(64) Shape shape{};
    shape.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
      shape.row_bytes[tile] = static_cast<uint16_t>(tile == 4 || tile == 5 ? kTileRowBytes : right_bytes);
      shape.rows[tile] = static_cast<uint8_t>(kTileRows);
    }
    asm volatile("ldtilecfg %0" : : "m"(shape));
  }
  ~TileSession() { asm volatile("tilerelease" : : : "memory"); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;

 private:
  struct Shape {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
};

template <int kTile>
static inline void clear_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}

template <int kTile>
static inline void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
static inline void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(kTile) : "memory");
}

// bf16: a step of two columns adds the sum of its products, each in fp32.
template <int kSums, int kLeft, int kRight>
static inline void multiply_halves() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kLeft), "i"(kRight));
}

// Signed codes times signed, and times unsigned numbers.
template <int kSums, int kLeft, int kRight>
static inline void multiply_signed() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kLeft), "i"(kRight));
}

template <int kSums, int kLeft, int kRight>
static inline void multiply_unsigned() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kLeft), "i"(kRight));
}

#endif

}  // namespace dijiang
