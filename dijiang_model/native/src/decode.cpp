// Steps in which every sequence feeds its last token, from token to token in one call.
#include <cstring>

#include "step.h"

extern "C" int dijiang_step(const dijiang::Model*, float*, const int64_t*, int64_t, const int64_t*, const int64_t*,
                            int64_t, uint8_t*, int64_t, const int64_t*, int64_t, float*, int64_t, int64_t, float*, int);
extern "C" void dijiang_greedy(const float*, int64_t, int64_t, int64_t*, int);

namespace dijiang {

// A row of a token table, in fp32.
static inline void look_up(const Matrix& table, int64_t token, float* out) {
  const int64_t width = table.columns;
  if (table.codes != nullptr) {
    const int8_t* codes = table.codes + token * padded(width);
    for (int64_t i = 0; i < width; ++i) out[i] = static_cast<float>(codes[i]) * table.scales[token];
  } else if (table.halves != nullptr) {
    for (int64_t i = 0; i < width; ++i) {
      const uint32_t bits = static_cast<uint32_t>(table.halves[token * width + i]) << 16;
      std::memcpy(out + i, &bits, sizeof(bits));
    }
  } else {
    std::memcpy(out, table.weight + token * width, static_cast<size_t>(width) * sizeof(float));
  }
}

}  // namespace dijiang

extern "C" {

// Feeds the last token of each of num_rows sequences: tokens [slots of the storage] has it at the place of its slot.
// `table` has the rows that the first block reads; positions [num_rows] go on by one; row_numbers [num_rows] are 0, 1,
// ..., and ones [num_rows] 1s; hidden [num_rows, D] is overwritten; the logits [num_rows, vocab] come out. Unless
// `chosen` [num_rows] is null, it gets what `dijiang_greedy` says, and `tokens` too, but 0 in the place of -1.
// Returns 0, or 1 when memory ran out (states may have moved).
int dijiang_decode(const dijiang::Model* model, const dijiang::Matrix* table, int64_t* tokens, int64_t* positions,
                   const int64_t* slots, const int64_t* row_numbers, const int64_t* ones, int64_t num_rows,
                   uint8_t* storage, int64_t slot_bytes, float* hidden, float* logits, int64_t* chosen,
                   int num_threads) {
  for (int64_t n = 0; n < num_rows; ++n) dijiang::look_up(*table, tokens[slots[n]], hidden + n * table->columns);
  if (dijiang_step(model, hidden, positions, num_rows, slots, ones, num_rows, storage, slot_bytes, row_numbers,
                   num_rows, logits, 0, 0, nullptr, num_threads) != 0)
    return 1;
  for (int64_t n = 0; n < num_rows; ++n) ++positions[n];
  if (chosen == nullptr) return 0;
  dijiang_greedy(logits, num_rows, model->head.rows, chosen, num_threads);
  for (int64_t n = 0; n < num_rows; ++n) tokens[slots[n]] = chosen[n] > 0 ? chosen[n] : 0;
  return 0;
}
}
