// Drawn tokens behind a C interface.
#include <new>

#include "draw.h"
#include "threads.h"

namespace dijiang {

// A thread's own for each of `num_threads`, kept from call to call: new memory for each would cost a third of the time.
std::vector<Drawing>& drawings(int64_t vocab_size, int num_threads) {
  static auto* kept = new std::vector<Drawing>();
  if (!kept->empty() && kept->front().count() != vocab_size) kept->clear();
  while (kept->size() < static_cast<size_t>(num_threads)) kept->emplace_back(vocab_size);
  return *kept;
}

}  // namespace dijiang

extern "C" {

int64_t dijiang_sizeof_draw() { return sizeof(dijiang::DrawRules); }

// tokens [num_rows]: one of each row of logits [num_rows, vocab_size], by its `rules`. A row without a temperature, or
// whose token is below 0, keeps its own.
// Returns 0, or 1 when memory ran out.
int dijiang_draw(const float* logits, int64_t num_rows, int64_t vocab_size, const dijiang::DrawRules* rules,
                 int64_t* tokens, int num_threads) {
  using namespace dijiang;
  Pool& pool = Pool::instance();
  std::lock_guard<std::mutex> turn(pool.turn());
  try {
    const int most = num_threads < kMaxThreads ? num_threads : kMaxThreads;
    std::vector<Drawing>& own = drawings(vocab_size, most);
    pool.run(num_rows, most, [&](int64_t row, int thread) {
      if (!(rules[row].temperature > 0.0f) || tokens[row] < 0) return;
      tokens[row] = own[static_cast<size_t>(thread)].draw(logits + row * vocab_size, rules[row]);
    });
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
}
