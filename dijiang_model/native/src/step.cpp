// One step of a whole network, behind a C interface: packed segments of N sequences, states moved on in place.
//
// A segment's attention goes token by token, as in decoding: the state of a head stays in the cache meanwhile, and a
// prompt leaves the same state and logits, bit for bit, however it is cut into segments.
#include <algorithm>
#include <new>
#include <utility>
#include <vector>

#include "attention.h"
#include "matrix.h"
#include "rows.h"
#include "threads.h"

namespace dijiang {

struct Layer {
  Norm input_norm, mlp_norm;
  Matrix query, key, value;       // a fused projection: all of it is `query`
  Matrix gate;                    // of the released read-out; rows = 0 without
  Norm group_norm;
  Matrix output;
  Matrix mlp_gate, mlp_up, mlp_down;  // an ungated MLP has mlp_gate.rows = 0
  Attention attention;
  Matrix far_down, far_up;        // the far branch's update of the queries; rows = 0 without
};

struct Model {
  const Layer* layers;
  int64_t num_layers;
  Norm final_norm;
  Matrix head;
  Heads heads;
  const double* frequencies;      // [rotary_half]
  int64_t hidden_size, inner_size;
  int64_t last_sink_position;     // sinks are seen from no further away
  int64_t activation;
  int64_t is_parallel;            // attention and MLP both read the layer's input
};

// Memory of steps, grown to the largest one so far.
class Scratch {
 public:
  float* floats(size_t which, int64_t count) {
    if (buffers_.size() <= which) buffers_.resize(which + 1);
    if (buffers_[which].size() < static_cast<size_t>(count) + kAlign) buffers_[which].resize(static_cast<size_t>(count) + kAlign);
    const auto address = reinterpret_cast<uintptr_t>(buffers_[which].data());
    return reinterpret_cast<float*>((address + 63) / 64 * 64);
  }

 private:
  static constexpr size_t kAlign = 16;
  std::vector<std::vector<float>> buffers_;
};

// Rows that products read: fp32 and, where weights are not fp32, rounded to 16 bits.
struct RowBuffer {
  float* values;
  uint8_t* rounded;
  float* scales;
  float* sums;
  int64_t width;

  Activations activations() const { return {values, width, rounded, scales, sums}; }

  // Makes a row ready for a matrix that is going to read it.
  void prepare_row(int64_t n, const Matrix& reader) const {
    if (!reader.reads_rounded()) return;
    scales[n] = round_row(reader, values + n * width, width, rounded + n * 2 * padded(width),
                          sums + n * padded_sums(width));
  }
};

class Step {
 public:
  // Rows first ... last - 1 belong to one sequence, in order. A held one leaves its slot as it is.
  struct Segment {
    int64_t first, last;
    bool is_held;
  };

  Step(const Model& model, Scratch& scratch, float* hidden, int64_t num_rows, int num_threads)
      : model_(model), num_rows_(num_rows), threads_(num_threads), hidden_(hidden) {
    const Heads& heads = model.heads;
    const Layer& layer = model.layers[0];
    projected_width_ = layer.query.rows + layer.key.rows + layer.value.rows;
    const int64_t width = heads.num_heads * heads.head_size;
    normed_ = rows(scratch, 1, model.hidden_size);
    mlp_normed_ = rows(scratch, 4, model.hidden_size);
    attended_ = rows(scratch, 7, width);
    inner_ = rows(scratch, 10, model.inner_size);
    gate_ = scratch.floats(13, num_rows * width);
    inner_gate_ = scratch.floats(14, num_rows * model.inner_size);
    projected_ = scratch.floats(15, num_rows * projected_width_);
    far_queries_ = scratch.floats(18, num_rows * width);
    int64_t rank = 0;
    for (int64_t i = 0; i < model.num_layers; ++i) rank = std::max(rank, model.layers[i].far_down.rows);
    far_low_ = scratch.floats(19, num_rows * rank);
    angles_ = scratch.floats(16, num_rows * 4 * heads.rotary_half + 1);
    for (int64_t i = 0; i < model.num_layers; ++i) {
      const int64_t wanted = (attention_scratch(heads, model.layers[i].attention) + 15) / 16 * 16;
      arena_size_ = wanted > arena_size_ ? wanted : arena_size_;
      held_size_ = std::max(held_size_, (group_state_size(model.layers[i].attention, heads) + 15) / 16 * 16);
    }
    arenas_ = scratch.floats(17, arena_size_ * kMaxThreads);
  }

  void start(Scratch& scratch, std::vector<Segment> segments, const int64_t* positions, uint8_t* const* slots) {
    const int64_t half = model_.heads.rotary_half;
    segments_ = std::move(segments);
    const bool holds = std::any_of(segments_.begin(), segments_.end(), [](const Segment& s) { return s.is_held; });
    if (holds || model_.layers[0].attention.is_narrow != 0) held_ = scratch.floats(20, held_size_ * kMaxThreads);
    tokens_.resize(static_cast<size_t>(num_rows_));
    for_rows([&](int64_t n) {
      float* angles = angles_ + n * 4 * half;
      const int64_t position = positions[n];
      const int64_t sink_position = position < model_.last_sink_position ? position : model_.last_sink_position;
      fill_angles(position, angles);
      if (sink_position == position) {
        std::memcpy(angles + 2 * half, angles, static_cast<size_t>(2 * half) * sizeof(float));
      } else {
        fill_angles(sink_position, angles + 2 * half);
      }
      tokens_[static_cast<size_t>(n)] = {position,          slots[n],         angles, angles + half,
                                         angles + 2 * half, angles + 3 * half};
    });
  }

  // Projected rows of held segments go to `kept` [held rows, projected width] too: `advance` reads them.
  void layer(const Layer& layer, float* kept) {
    const bool is_parallel = model_.is_parallel != 0;
    norm(layer.input_norm, normed_, layer.query);
    if (is_parallel) norm(layer.mlp_norm, mlp_normed_, layer.mlp_up);
    project(layer);
    for (const Segment& segment : segments_) {
      if (!segment.is_held) continue;
      const int64_t count = (segment.last - segment.first) * projected_width_;
      std::memcpy(kept, projected_ + segment.first * projected_width_, static_cast<size_t>(count) * sizeof(float));
      kept += count;
    }
    attend_all(layer);
    add_product(layer.output, attended_);
    if (!is_parallel) norm(layer.mlp_norm, mlp_normed_, layer.mlp_up);
    mlp(layer);
    if (layer.mlp_down.reads_rounded()) for_rows([&](int64_t n) { inner_.prepare_row(n, layer.mlp_down); });
    add_product(layer.mlp_down, inner_);
  }

  // Moves the slot of the one segment on by its rows, from what `layer` kept: [L, row_stride, projected width].
  void advance(const float* kept, int64_t row_stride) const {
    const int64_t num_groups = model_.heads.num_groups;
    Pool::instance().run(model_.num_layers * num_groups, threads_, [&](int64_t index, int thread) {
      const int64_t layer = index / num_groups, group = index % num_groups;
      const Attention& attention = model_.layers[layer].attention;
      const float* rows = kept + layer * row_stride * projected_width_;
      const bool is_narrow = attention.is_narrow != 0;
      const NarrowGroup part = is_narrow ? narrow_group(attention, model_.heads, tokens_[0].slot, group) : NarrowGroup{};
      const GroupState state = is_narrow ? widened(part, held_ + thread * held_size_)
                                         : group_state(attention, model_.heads, tokens_[0].slot, group);
      for (int64_t n = 0; n < num_rows_; ++n)
        attend(attention, model_.heads, tokens_[static_cast<size_t>(n)], group, state, rows + n * projected_width_,
               nullptr, nullptr, arenas_ + thread * arena_size_);
      if (is_narrow) put_back(state, part);
    });
  }

  int64_t projected_width() const { return projected_width_; }

  void logits(const int64_t* wanted, int64_t num_wanted, float* out) {
    const int64_t size = model_.hidden_size;
    for (int64_t i = 0; i < num_wanted; ++i) {
      apply(model_.final_norm, hidden_ + wanted[i] * size, size, normed_.values + i * size);
      normed_.prepare_row(i, model_.head);
    }
    const Activations x = normed_.activations();
    for_outputs(model_.head.rows, num_wanted, [&](int64_t first, int64_t last) {
      product(model_.head, x, num_wanted, first, last, out, model_.head.rows, false);
    });
  }

 private:
  RowBuffer rows(Scratch& scratch, size_t which, int64_t width) const {
    float* values = scratch.floats(which, num_rows_ * width);
    float* rounded = scratch.floats(which + 1, num_rows_ * padded(width) / 2 + 1);
    float* scales = scratch.floats(which + 2, num_rows_ * (padded_sums(width) + 1));
    return {values, reinterpret_cast<uint8_t*>(rounded), scales, scales + num_rows_, width};
  }

  // Angles in fp64: in fp32 a position of 10^6 is off by 0.06 rad.
  void fill_angles(int64_t position, float* out) const {
    const int64_t half = model_.heads.rotary_half;
    for (int64_t i = 0; i < half; ++i) {
      const double angle = static_cast<double>(position) * model_.frequencies[i];
      out[i] = static_cast<float>(std::cos(angle));
      out[half + i] = static_cast<float>(std::sin(angle));
    }
  }

  // Work too small to share is done at once: handing it over takes about a microsecond.
  template <class Task>
  void for_rows(const Task& task) const {
    Pool::instance().run(num_rows_, num_rows_ >= 8 ? threads_ : 1, [&](int64_t n, int) { task(n); });
  }

  template <class Task>
  void for_outputs(int64_t count, int64_t num_rows, const Task& task) const {
    if (num_rows == 0) return;
    const int64_t share = outputs_per_task(count, threads_);
    Pool::instance().run((count + share - 1) / share, threads_, [&](int64_t index, int) {
      const int64_t first = index * share, last = first + share < count ? first + share : count;
      task(first, last);
    });
  }

  void norm(const Norm& norm, const RowBuffer& out, const Matrix& reader) const {
    for_rows([&](int64_t n) {
      apply(norm, hidden_ + n * model_.hidden_size, model_.hidden_size, out.values + n * out.width);
      out.prepare_row(n, reader);
    });
  }

  // q, k, v and the read-out's gate side by side, as if they were one matrix.
  void project(const Layer& layer) const {
    const Matrix* parts[] = {&layer.query, &layer.key, &layer.value, &layer.gate};
    const Activations x = normed_.activations();
    for_outputs(projected_width_ + layer.gate.rows, num_rows_, [&](int64_t first, int64_t last) {
      int64_t start = 0;
      for (const Matrix* part : parts) {
        const int64_t from = first > start ? first - start : 0;
        const int64_t to = last - start < part->rows ? last - start : part->rows;
        const bool is_gate = part == &layer.gate;
        float* target = is_gate ? gate_ : projected_ + start;
        if (from < to)
          product(*part, x, num_rows_, from, to, target, is_gate ? layer.gate.rows : projected_width_, false);
        start += part->rows;
      }
    });
  }

  // q + U D q over all heads.
  void update_far_queries(const Layer& layer) const {
    const Heads& heads = model_.heads;
    const int64_t width = attended_.width, rank = layer.far_down.rows, d = heads.head_size;
    for_rows([&](int64_t n) {
      for (int64_t h = 0; h < heads.num_heads; ++h)
        std::memcpy(far_queries_ + n * width + h * d,
                    projected_ + n * projected_width_ + heads.query_start + h * heads.query_step,
                    static_cast<size_t>(d) * sizeof(float));
    });
    const Activations queries{far_queries_, width, nullptr, nullptr, nullptr};
    const Activations low{far_low_, rank, nullptr, nullptr, nullptr};
    for_outputs(rank, num_rows_, [&](int64_t first, int64_t last) {
      product(layer.far_down, queries, num_rows_, first, last, far_low_, rank, false);
    });
    for_outputs(width, num_rows_, [&](int64_t first, int64_t last) {
      product(layer.far_up, low, num_rows_, first, last, far_queries_, width, true);
    });
  }

  void attend_all(const Layer& layer) const {
    const Heads& heads = model_.heads;
    const bool has_far = layer.far_down.rows > 0;
    if (has_far) update_far_queries(layer);
    const int64_t num_segments = static_cast<int64_t>(segments_.size());
    Pool::instance().run(num_segments * heads.num_groups, threads_, [&](int64_t index, int thread) {
      const Segment segment = segments_[static_cast<size_t>(index / heads.num_groups)];
      const int64_t group = index % heads.num_groups;
      uint8_t* slot = tokens_[static_cast<size_t>(segment.first)].slot;
      const bool is_narrow = layer.attention.is_narrow != 0;
      const NarrowGroup part = is_narrow ? narrow_group(layer.attention, heads, slot, group) : NarrowGroup{};
      GroupState state{};
      if (is_narrow) {
        state = widened(part, held_ + thread * held_size_);
      } else {
        state = group_state(layer.attention, heads, slot, group);
        if (segment.is_held) state = copied(layer.attention, heads, state, held_ + thread * held_size_);
      }
      for (int64_t n = segment.first; n < segment.last; ++n) {
        const float* far_queries = has_far ? far_queries_ + n * attended_.width : nullptr;
        attend(layer.attention, heads, tokens_[static_cast<size_t>(n)], group, state,
               projected_ + n * projected_width_, far_queries, attended_.values + n * attended_.width, arenas_ + thread * arena_size_);
      }
      if (is_narrow && !segment.is_held) put_back(state, part);
    });
    const bool is_gated = layer.gate.rows > 0;
    if (!is_gated && !layer.output.reads_rounded()) return;
    for_rows([&](int64_t n) {
      float* row = attended_.values + n * attended_.width;
      if (is_gated)
        gated_group_norm(layer.group_norm, heads.head_size, attended_.width, gate_ + n * attended_.width, row);
      attended_.prepare_row(n, layer.output);
    });
  }

  void mlp(const Layer& layer) const {
    const Activations x = mlp_normed_.activations();
    const int64_t width = inner_.width;
    const auto kind = static_cast<ActivationKind>(model_.activation);
    const bool is_gated = layer.mlp_gate.rows > 0;
    for_outputs(width, num_rows_, [&](int64_t first, int64_t last) {
      product(layer.mlp_up, x, num_rows_, first, last, inner_.values, width, false);
      if (is_gated) product(layer.mlp_gate, x, num_rows_, first, last, inner_gate_, width, false);
      for (int64_t n = 0; n < num_rows_; ++n) {
        float *up = inner_.values + n * width, *gate = inner_gate_ + n * width;
        activate(kind, (is_gated ? gate : up) + first, last - first);
        for (int64_t j = first; is_gated && j < last; ++j) up[j] *= gate[j];
      }
    });
  }

  void add_product(const Matrix& matrix, const RowBuffer& x) const {
    for_outputs(matrix.rows, num_rows_, [&](int64_t first, int64_t last) {
      product(matrix, x.activations(), num_rows_, first, last, hidden_, model_.hidden_size, true);
    });
  }

  const Model& model_;
  int64_t num_rows_;
  int threads_;
  float* hidden_;  // [N, D], each layer adds to it
  int64_t projected_width_ = 0, arena_size_ = 0, held_size_ = 0;
  float* held_ = nullptr;  // by thread: a copy of a group's state
  float *gate_, *inner_gate_, *projected_, *far_queries_, *far_low_, *angles_, *arenas_;
  RowBuffer normed_, mlp_normed_, attended_, inner_;
  std::vector<Token> tokens_;
  std::vector<Segment> segments_;
};

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

// Sizes of the structures that the caller lays out, so that a mismatch is found when the library is loaded.
int64_t dijiang_sizeof_model() { return sizeof(dijiang::Model); }
int64_t dijiang_sizeof_layer() { return sizeof(dijiang::Layer); }

// Feeds a segment of tokens to each of num_sequences sequences: hidden [num_rows, D] comes in as what the first block
// reads and is overwritten; the logits [num_wanted, vocab] of the wanted rows come out.
// Sequences first_held ... first_held + num_held - 1, of at most kMaxRows rows each, leave their slots as they are;
// what `dijiang_advance` needs to know of their rows goes to `kept` [L, held rows, width of a projected row].
// Returns 0, or 1 when memory ran out (states may have moved).
int dijiang_step(const dijiang::Model* model, float* hidden, const int64_t* positions, int64_t num_rows,
                 const int64_t* slots, const int64_t* lengths, int64_t num_sequences, uint8_t* storage,
                 int64_t slot_bytes, const int64_t* wanted, int64_t num_wanted, float* logits, int64_t first_held,
                 int64_t num_held, float* kept, int num_threads) {
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
    int64_t held_rows = 0, held_before = 0, sequence = 0, left = num_sequences > 0 ? lengths[0] : 0;
    for (int64_t i = first_held; i < first_held + num_held; ++i) held_rows += lengths[i];
    for (int64_t first = 0, count = 0; first < num_rows; first += count) {
      std::vector<Step::Segment> segments;
      int64_t held_here = 0;
      for (count = 0; sequence < num_sequences && count < kMaxRows;) {
        const bool is_held = sequence >= first_held && sequence < first_held + num_held;
        if (is_held && count + left > kMaxRows) break;  // its rows go together: none finds the others in the slot
        const int64_t taken = std::min(left, kMaxRows - count);
        segments.push_back({count, count + taken, is_held});
        held_here += is_held ? taken : 0;
        count += taken;
        left -= taken;
        if (left == 0 && ++sequence < num_sequences) left = lengths[sequence];
      }
      Step step(*model, scratch, hidden + first * model->hidden_size, count, num_threads);
      step.start(scratch, std::move(segments), positions + first, slot_of_row.data() + first);
      for (int64_t i = 0; i < model->num_layers; ++i)
        step.layer(model->layers[i], kept + (i * held_rows + held_before) * step.projected_width());
      held_before += held_here;
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

// Moves the slots of the held sequences of a step on, sequence i by its first counts[i] rows, to the bits that the step
// would have left. `kept` is that step's; positions [num_rows], slots, lengths: of its held sequences.
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
    if (matrix->reads_rounded()) {
      auto* rounded = reinterpret_cast<uint8_t*>(scratch->floats(0, num_rows * padded(columns) / 2 + 1));
      float* scales = scratch->floats(1, num_rows);
      float* sums = scratch->floats(2, num_rows * padded_sums(columns));
      pool.run(num_rows, num_rows >= 8 ? num_threads : 1, [&](int64_t n, int) {
        scales[n] = round_row(*matrix, x + n * columns, columns, rounded + n * 2 * padded(columns),
                              sums + n * padded_sums(columns));
      });
      rows.rounded = rounded;
      rows.scales = scales;
      rows.sums = sums;
    }
    const int64_t share = outputs_per_task(matrix->rows, num_threads);
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
