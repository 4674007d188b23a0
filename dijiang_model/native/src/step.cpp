// Steps behind a C interface.
#include <mutex>
#include <new>

#include "step.h"

namespace dijiang {

// Rows that go through the layers together: their inputs to a product fit in the second-level cache.
constexpr int64_t kMaxRows = 256;

Scratch& step_scratch() {
  static Scratch* scratch = new Scratch();
  return *scratch;
}

}  // namespace dijiang

extern "C" {

// Digest of the sources that this was built from.
const char* dijiang_source() { return DIJIANG_SOURCE; }

// Whether the system lets this process use all that the library was compiled for; 0 or 1.
int dijiang_is_ready() { return dijiang::is_unit_ready() ? 1 : 0; }

// Sizes of the structures that the caller lays out, so that a mismatch is found when the library is loaded.
int64_t dijiang_sizeof_model() { return sizeof(dijiang::Model); }
int64_t dijiang_sizeof_layer() { return sizeof(dijiang::Layer); }

// Feeds a segment of tokens to each of num_sequences sequences: hidden [num_rows, D] comes in as what the first block
// reads and is overwritten; the logits [num_wanted, vocab] of the wanted rows come out.
// Sequences first_uncommitted ... first_uncommitted + num_uncommitted - 1, of at most kMaxRows rows each, leave their
// slots as they are; what `dijiang_advance` needs of their rows goes to `kept` [L, uncommitted rows, projected width].
// Returns 0, or 1 when memory ran out (states may have moved).
int dijiang_step(const dijiang::Model* model, float* hidden, const int64_t* positions, int64_t num_rows,
                 const int64_t* slots, const int64_t* lengths, int64_t num_sequences, uint8_t* storage,
                 int64_t slot_bytes, const int64_t* wanted, int64_t num_wanted, float* logits,
                 int64_t first_uncommitted, int64_t num_uncommitted, float* kept, int num_threads) {
  using dijiang::Step;
  using dijiang::kMaxRows;
  std::lock_guard<std::mutex> turn(dijiang::Pool::instance().turn());
  dijiang::Scratch& scratch = dijiang::step_scratch();
  try {
    std::vector<uint8_t*> slot_of_row(static_cast<size_t>(num_rows));
    int64_t row = 0;
    for (int64_t i = 0; i < num_sequences; ++i)
      for (int64_t last = row + lengths[i]; row < last; ++row)
        slot_of_row[static_cast<size_t>(row)] = storage + slots[i] * slot_bytes;
    int64_t uncommitted_rows = 0, uncommitted_before = 0, sequence = 0, left = num_sequences > 0 ? lengths[0] : 0;
    for (int64_t i = first_uncommitted; i < first_uncommitted + num_uncommitted; ++i) uncommitted_rows += lengths[i];
    for (int64_t first = 0, count = 0; first < num_rows; first += count) {
      std::vector<dijiang::Segment> segments;
      int64_t uncommitted_here = 0;
      for (count = 0; sequence < num_sequences && count < kMaxRows;) {
        const bool is_uncommitted = sequence >= first_uncommitted && sequence < first_uncommitted + num_uncommitted;
        if (is_uncommitted && count + left > kMaxRows) break;  // its rows go together
        const int64_t taken = std::min(left, kMaxRows - count);
        segments.push_back({count, count + taken, is_uncommitted});
        uncommitted_here += is_uncommitted ? taken : 0;
        count += taken;
        left -= taken;
        if (left == 0 && ++sequence < num_sequences) left = lengths[sequence];
      }
      Step step(*model, scratch, hidden + first * model->hidden_size, count, num_threads);
      step.start(scratch, std::move(segments), positions + first, slot_of_row.data() + first);
      for (int64_t i = 0; i < model->num_layers; ++i)
        step.layer(model->layers[i], kept + (i * uncommitted_rows + uncommitted_before) * step.projected_width());
      uncommitted_before += uncommitted_here;
    }
    for (int64_t first = 0; first < num_wanted; first += kMaxRows) {
      const int64_t count = std::min(kMaxRows, num_wanted - first);
      Step step(*model, scratch, hidden, count, num_threads);
      step.logits(wanted + first, count, logits + first * model->head.rows);
    }
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

// Commits the first counts[i] rows of each uncommitted sequence i of a step: its slot gets the bits that the step
// would have left. `kept` is that step's; positions [num_rows], slots, lengths: of its uncommitted sequences.
// Returns 0, or 1 when memory ran out.
int dijiang_advance(const dijiang::Model* model, const float* kept, const int64_t* positions, int64_t num_rows,
                    const int64_t* slots, const int64_t* lengths, const int64_t* counts, int64_t num_sequences,
                    uint8_t* storage, int64_t slot_bytes, int num_threads) {
  using dijiang::Step;
  std::lock_guard<std::mutex> turn(dijiang::Pool::instance().turn());
  dijiang::Scratch& scratch = dijiang::step_scratch();
  try {
    int64_t first = 0;
    for (int64_t i = 0; i < num_sequences; first += lengths[i++]) {
      if (counts[i] == 0) continue;
      const std::vector<uint8_t*> slot(static_cast<size_t>(counts[i]), storage + slots[i] * slot_bytes);
      Step step(*model, scratch, nullptr, counts[i], num_threads);
      step.start(scratch, {{0, counts[i], false}}, positions + first, slot.data());
      step.advance(kept + first * step.projected_width(), num_rows);
    }
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

// y [num_rows, matrix.rows] = x [num_rows, matrix.columns] W^T + b.
int dijiang_linear(const dijiang::Matrix* matrix, const float* x, int64_t num_rows, float* y, int num_threads) {
  using namespace dijiang;
  Pool& pool = Pool::instance();
  std::lock_guard<std::mutex> turn(pool.turn());
  try {
    static Scratch* scratch = new Scratch();
    const int64_t columns = matrix->columns;
    Activations rows{x, columns, nullptr, nullptr, nullptr};
    if (matrix->reads_quantized()) {
      auto* rounded = reinterpret_cast<uint8_t*>(scratch->floats(0, rounded_bytes(num_rows, columns) / 4 + 1));
      float* scales = scratch->floats(1, num_rows);
      float* sums = scratch->floats(2, num_rows * padded_sums(columns));
      const int64_t together = rows_together(*matrix, num_rows), parts = (num_rows + together - 1) / together;
      pool.run(parts, num_rows >= 8 ? num_threads : 1, [&](int64_t part, int) {
        const int64_t n = part * together, count = num_rows - n < together ? num_rows - n : together;
        round_rows(*matrix, x, num_rows, n, count, rounded, scales, sums);
      });
      rows.rounded = rounded;
      rows.scales = scales;
      rows.sums = sums;
    }
    const int64_t share = outputs_per_task(matrix->rows, num_threads, panel_outputs(*matrix));
    pool.run((matrix->rows + share - 1) / share, num_threads, [&](int64_t index, int) {
      const int64_t first = index * share, last = first + share < matrix->rows ? first + share : matrix->rows;
      product(*matrix, rows, num_rows, first, last, y, matrix->rows, false);
    });
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
}
