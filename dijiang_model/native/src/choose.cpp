// The greedy token of each row of logits, in one pass over what was just computed.
#include "threads.h"
#include "vector.h"

namespace dijiang {

constexpr int kChains = 4;  // vectors that are compared independently of each other

// Place of the first of the largest numbers; -1 if any number is not finite.
static inline int64_t greedy(const float* logits, int64_t count) {
  Vec best[kChains], spoilt[kChains];
  each<kChains>([&](auto c) {
    best[c] = splat(-std::numeric_limits<float>::infinity());
    spoilt[c] = Vec{};
  });
  int64_t i = 0;
  for (; i + kChains * kLanes <= count; i += kChains * kLanes) {
    each<kChains>([&](auto c) {
      const Vec x = load(logits + i + c * kLanes);
      best[c] = x > best[c] ? x : best[c];
      spoilt[c] += x * 0.0f;  // 0, but NaN for NaN and infinities
    });
  }
  float most = -std::numeric_limits<float>::infinity(), spoilt_any = 0.0f;
  each<kChains>([&](auto c) {
    const float here = largest(best[c]);
    most = here > most ? here : most;
    spoilt_any += sum(spoilt[c]);
  });
  for (int64_t k = i; k < count; ++k) {
    most = logits[k] > most ? logits[k] : most;
    spoilt_any += logits[k] * 0.0f;
  }
  if (!(spoilt_any == 0.0f)) return -1;
  int64_t first = 0;
  for (; first + kChains * kLanes <= count; first += kChains * kLanes) {
    IntVec found{};
    each<kChains>([&](auto c) { found |= load(logits + first + c * kLanes) == splat(most); });
    int32_t any = 0;
    for (int lane = 0; lane < kLanes; ++lane) any |= found[lane];
    if (any != 0) break;
  }
  for (; first < count; ++first)
    if (logits[first] == most) return first;
  return -1;
}

}  // namespace dijiang

extern "C" {

// tokens [num_rows]: of each row of logits [num_rows, vocab_size] the first of its largest numbers, or -1 where not all
// of them are finite.
void dijiang_greedy(const float* logits, int64_t num_rows, int64_t vocab_size, int64_t* tokens, int num_threads) {
  dijiang::Pool& pool = dijiang::Pool::instance();
  std::lock_guard<std::mutex> turn(pool.turn());
  pool.run(num_rows, num_threads, [&](int64_t row, int) {
    tokens[row] = dijiang::greedy(logits + row * vocab_size, vocab_size);
  });
}
}
