// How the rows of a step, and the outputs of its products, are shared out among threads.
#pragma once

#include <algorithm>

#include "network.h"
#include "threads.h"

namespace dijiang {

class StepRows {
 protected:
  StepRows(int64_t num_rows, int num_threads) : num_rows_(num_rows), threads_(num_threads) {}

  RowBuffer rows(Scratch& scratch, size_t which, int64_t width) const {
    float* values = scratch.floats(which, (num_rows_ + kTileRows - 1) / kTileRows * kTileRows * width);
    float* rounded = scratch.floats(which + 1, rounded_bytes(num_rows_, width) / 4 + 1);
    float* scales = scratch.floats(which + 2, num_rows_ * (padded_sums(width) + 1));
    return {values, reinterpret_cast<uint8_t*>(rounded), scales, scales + num_rows_, width};
  }

  // Work too small to share is done at once: handing it over takes about a microsecond.
  template <class Task>
  void for_rows(const Task& task) const {
    constexpr int64_t kRows = 8;
    Pool::instance().run((num_rows_ + kRows - 1) / kRows, num_rows_ >= 8 ? threads_ : 1, [&](int64_t block, int) {
      for (int64_t n = block * kRows; n < std::min(num_rows_, (block + 1) * kRows); ++n) task(n);
    });
  }

  // task(n) for each row, then what it has written made ready for the matrix that reads it.
  template <class Task>
  void for_prepared(const RowBuffer& out, const Matrix& reader, const Task& task) const {
    const int64_t together = rows_together(reader, num_rows_), parts = (num_rows_ + together - 1) / together;
    Pool::instance().run(parts, num_rows_ >= 8 ? threads_ : 1, [&](int64_t part, int) {
      const int64_t first = part * together, count = std::min(together, num_rows_ - first);
      for (int64_t n = first; n < first + count; ++n) task(n);
      out.prepare(first, count, num_rows_, reader);
    });
  }

  // Rows in blocks, for products with small matrices.
  template <class Task>
  void for_blocks(const Task& task) const {
    constexpr int64_t kRows = 4;
    const int64_t num_blocks = (num_rows_ + kRows - 1) / kRows;
    Pool::instance().run(num_blocks, num_rows_ >= 8 ? threads_ : 1, [&](int64_t block, int) {
      task(block * kRows, std::min(num_rows_, (block + 1) * kRows));
    });
  }

  template <class Task>
  void for_outputs(int64_t count, int64_t num_rows, const Task& task, int64_t panel = kPanelOutputs) const {
    if (num_rows == 0) return;
    const int64_t share = outputs_per_task(count, threads_, panel);
    Pool::instance().run((count + share - 1) / share, threads_, [&](int64_t index, int) {
      const int64_t first = index * share, last = first + share < count ? first + share : count;
      task(first, last);
    });
  }

  int64_t num_rows_;
  int threads_;
};

}  // namespace dijiang
