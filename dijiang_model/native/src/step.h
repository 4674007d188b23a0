// One step of a whole network: packed segments of N sequences, states moved on in place.
//
// A segment's attention goes token by token, as in decoding, or by blocks to the same bits (`block_attention.h`): the
// state of a head stays in the cache meanwhile, and a prompt leaves the same state and logits, bit for bit, however it is
// cut into segments.
#pragma once

#include <algorithm>
#include <utility>

#include "head_group.h"
#include "network.h"
#include "shares.h"
#include "step_rows.h"

namespace dijiang {

class Step : private StepRows {
 public:
  Step(const Model& model, Scratch& scratch, float* hidden, int64_t num_rows, int num_threads)
      : StepRows(num_rows, num_threads), model_(model), hidden_(hidden) {
    const Heads& heads = model.heads;
    const Layer& layer = model.layers[0];
    projected_width_ = layer.query.rows + layer.key.rows + layer.value.rows + heads.num_scores;
    const int64_t width = heads.num_heads * heads.head_size;
    normed_ = rows(scratch, 1, model.hidden_size);
    mlp_normed_ = rows(scratch, 4, model.hidden_size);
    attended_ = rows(scratch, 7, width);
    inner_ = rows(scratch, 10, model.inner_size);
    gate_ = scratch.floats(13, num_rows * width);
    inner_gate_ = scratch.floats(14, num_rows * model.inner_size);
    projected_ = scratch.floats(15, num_rows * projected_width_);
    far_queries_ = scratch.floats(18, num_rows * width);
    angles_ = scratch.floats(16, num_rows * 8 * heads.rotary_half + 1);
    int64_t rank = 0;
    for (int64_t i = 0; i < model.num_layers; ++i) {
      const Attention& attention = model.layers[i].attention;
      rank = std::max(rank, attention.far_rank);
      arena_size_ = std::max(arena_size_, (HeadGroup::scratch_size(attention, heads) + 15) / 16 * 16);
      for (int64_t group = 0; group < heads.num_groups; ++group)
        copy_bytes_ = std::max(copy_bytes_, (GroupBytes(attention, heads, group).most() + 63) / 64 * 64);
    }
    far_low_ = scratch.floats(19, num_rows * rank);
    arenas_ = scratch.floats(17, arena_size_ * std::min(num_threads, kMaxThreads));
  }

  void start(Scratch& scratch, std::vector<Segment> segments, const int64_t* positions, uint8_t* const* slots) {
    const int64_t half = model_.heads.rotary_half;
    segments_ = std::move(segments);
    if (std::any_of(segments_.begin(), segments_.end(), [](const Segment& s) { return s.is_uncommitted; }))
      copies_ = reinterpret_cast<uint8_t*>(scratch.floats(20, copy_bytes_ / 4 * kMaxThreads));
    shares_ = Shares(segments_, model_.heads.num_groups, threads_);
    shared_copies_ = reinterpret_cast<uint8_t*>(scratch.floats(21, copy_bytes_ / 4 * shares_.num_copies()));
    const int64_t sets = model_.local_frequencies == nullptr ? 1 : 2;
    for (int64_t set = 0; set < sets; ++set) {
      std::vector<Token>& tokens = set == 0 ? tokens_ : local_tokens_;
      const double* frequencies = set == 0 ? model_.frequencies : model_.local_frequencies;
      tokens.resize(static_cast<size_t>(num_rows_));
      for_rows([&](int64_t n) {
        float* angles = angles_ + (set * num_rows_ + n) * 4 * half;
        const int64_t position = positions[n];
        const int64_t sink_position = position < model_.last_sink_position ? position : model_.last_sink_position;
        fill_angles(frequencies, half, position, angles);
        if (sink_position == position) {
          std::memcpy(angles + 2 * half, angles, static_cast<size_t>(2 * half) * sizeof(float));
        } else {
          fill_angles(frequencies, half, sink_position, angles + 2 * half);
        }
        tokens[static_cast<size_t>(n)] = {position,          slots[n],         angles, angles + half,
                                          angles + 2 * half, angles + 3 * half};
      });
    }
  }

  // Projected rows of uncommitted segments go to `kept` [uncommitted rows, projected width] too: `advance` reads them.
  void layer(const Layer& layer, float* kept) {
    const bool is_parallel = model_.is_parallel != 0;
    norm(layer.input_norm, normed_, layer.query);
    if (is_parallel) norm(layer.mlp_norm, mlp_normed_, layer.mlp_up);
    project(layer);
    score(layer);
    if (layer.query_norm.weight != nullptr) norm_heads(layer);
    for (const Segment& segment : segments_) {
      if (!segment.is_uncommitted) continue;
      const int64_t count = (segment.last - segment.first) * projected_width_;
      std::memcpy(kept, projected_ + segment.first * projected_width_, static_cast<size_t>(count) * sizeof(float));
      kept += count;
    }
    attend_all(layer);
    add_product(layer.output, attended_, layer.attention_output_norm);
    if (!is_parallel) norm(layer.mlp_norm, mlp_normed_, layer.mlp_up);
    mlp(layer);
    add_product(layer.mlp_down, inner_, layer.mlp_output_norm);
  }

  // Moves the slot of the one segment on by its rows, from what `layer` kept: [L, row_stride, projected width].
  void advance(const float* kept, int64_t row_stride) const {
    const int64_t num_groups = model_.heads.num_groups;
    Pool::instance().run(model_.num_layers * num_groups, threads_, [&](int64_t index, int thread) {
      const int64_t layer = index / num_groups, group = index % num_groups;
      const Attention& attention = model_.layers[layer].attention;
      const float* rows = kept + layer * row_stride * projected_width_;
      HeadGroup head(attention, model_.heads, group, group_state(attention, model_.heads, tokens_[0].slot, group),
                     arenas_ + thread * arena_size_, NextGroup());
      for (int64_t n = 0; n < num_rows_; ++n)
        head.feed(tokens_of(model_.layers[layer])[static_cast<size_t>(n)], rows + n * projected_width_, nullptr, nullptr);
    });
  }

  int64_t projected_width() const { return projected_width_; }

  void logits(const int64_t* wanted, int64_t num_wanted, float* out) {
    const int64_t size = model_.hidden_size;
    for (int64_t i = 0; i < num_wanted; ++i)
      apply(model_.final_norm, hidden_ + wanted[i] * size, size, normed_.values + i * size);
    const int64_t together = rows_together(model_.head, num_wanted);
    for (int64_t i = 0; i < num_wanted; i += together)
      normed_.prepare(i, std::min(together, num_wanted - i), num_wanted, model_.head);
    const Activations x = normed_.activations();
    for_outputs(model_.head.rows, num_wanted, [&](int64_t first, int64_t last) {
      product(model_.head, x, num_wanted, first, last, out, model_.head.rows, false);
    });
  }

 private:
  void norm(const Norm& norm, const RowBuffer& out, const Matrix& reader) const {
    for_prepared(out, reader, [&](int64_t n) {
      const float* hidden = hidden_ + n * model_.hidden_size;
      if (norm.weight == nullptr) {
        std::memcpy(out.values + n * out.width, hidden, static_cast<size_t>(model_.hidden_size) * sizeof(float));
      } else {
        apply(norm, hidden, model_.hidden_size, out.values + n * out.width);
      }
    });
  }

  // q, k, v and the read-out's gate side by side, as if they were one matrix.
  void project(const Layer& layer) const {
    const Matrix* parts[] = {&layer.query, &layer.key, &layer.value, &layer.gate};
    const Activations x = normed_.activations();
    const int64_t count = projected_width_ - model_.heads.num_scores + layer.gate.rows;
    for_outputs(count, num_rows_, [&](int64_t first, int64_t last) {
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

  // Scores of the tokens, behind their projected rows; on a grid, so that sums in another order choose alike.
  void score(const Layer& layer) const {
    if (layer.priority.rows == 0) return;
    const Matrix& priority = layer.priority;
    const double grid = layer.attention.grid;
    for_rows([&](int64_t n) {
      float* scores = projected_ + n * projected_width_ + model_.heads.score_start;
      for (int64_t g = 0; g < priority.rows; ++g) {
        const float* weight = priority.weight + g * priority.columns;
        const float sum = dot(normed_.values + n * normed_.width, weight, priority.columns) + priority.bias[g];
        scores[g] = static_cast<float>(std::nearbyint(static_cast<double>(sum) / grid) * grid);
      }
    });
  }

  // Each head's query and key, or all heads' together, in place.
  void norm_heads(const Layer& layer) const {
    const Heads& heads = model_.heads;
    for_rows([&](int64_t n) {
      float* row = projected_ + n * projected_width_;
      if (layer.norms_all_heads != 0) {
        float *queries = row + heads.query_start, *keys = row + heads.key_start;
        apply(layer.query_norm, queries, heads.num_heads * heads.head_size, queries);
        apply(layer.key_norm, keys, heads.num_groups * heads.head_size, keys);
        return;
      }
      for (int64_t h = 0; h < heads.num_heads; ++h) {
        float* query = row + heads.query_start + h * heads.query_step;
        apply(layer.query_norm, query, heads.head_size, query);
      }
      for (int64_t g = 0; g < heads.num_groups; ++g) {
        float* key = row + heads.key_start + g * heads.key_step;
        apply(layer.key_norm, key, heads.head_size, key);
      }
    });
  }

  // D q over all heads, by rows.
  void lower_queries(const Layer& layer) const {
    const Heads& heads = model_.heads;
    const int64_t width = attended_.width, rank = layer.far_down.rows, d = heads.head_size;
    const bool is_packed = heads.query_step == d;
    for_blocks([&](int64_t first, int64_t last) {
      for (int64_t n = first; n < last && !is_packed; ++n)
        for (int64_t h = 0; h < heads.num_heads; ++h)
          std::memcpy(far_queries_ + n * width + h * d,
                      projected_ + n * projected_width_ + heads.query_start + h * heads.query_step,
                      static_cast<size_t>(d) * sizeof(float));
      const float* packed = far_queries_ + first * width;
      const float* queries = is_packed ? projected_ + first * projected_width_ + heads.query_start : packed;
      const Activations x{queries, is_packed ? projected_width_ : width, nullptr, nullptr, nullptr};
      product(layer.far_down, x, last - first, 0, rank, far_low_ + first * rank, rank, false);
    });
  }

  const std::vector<Token>& tokens_of(const Layer& layer) const { return layer.is_local != 0 ? local_tokens_ : tokens_; }

  // The state that a segment's group works on: its slot's, or a copy.
  GroupState state_of(const Attention& attention, const Segment& segment, int64_t group, int thread) const {
    uint8_t* slot = tokens_[static_cast<size_t>(segment.first)].slot;
    const GroupState state = group_state(attention, model_.heads, slot, group);
    if (!segment.is_uncommitted) return state;
    return copied(attention, model_.heads, group, state, copies_ + thread * copy_bytes_);
  }

  // A share that is read whole, if there are so many.
  NextGroup next_of(const Attention& attention, int64_t index) const {
    if (index >= static_cast<int64_t>(shares_.whole.size())) return {};
    const Share& share = shares_.whole[static_cast<size_t>(index)];
    const Token& token = tokens_[static_cast<size_t>(segments_[static_cast<size_t>(share.segment)].first)];
    const int64_t taken = std::max(attention.sinks + attention.recent_window(share.group), token.position + 1);
    return {slot_state(attention, share), std::min(attention.places(share.group), taken)};
  }

  GroupState slot_state(const Attention& attention, const Share& share) const {
    const Segment& segment = segments_[static_cast<size_t>(share.segment)];
    uint8_t* slot = tokens_[static_cast<size_t>(segment.first)].slot;
    return group_state(attention, model_.heads, slot, share.group);
  }

  // Feeds rows first ... last - 1 to a group's state, and answers them if is_asked.
  void walk(const Layer& layer, int64_t group, const GroupState& state, int64_t first, int64_t last, bool is_asked,
            int thread, const NextGroup& next) const {
    const int64_t rank = layer.attention.far_rank;
    HeadGroup head(layer.attention, model_.heads, group, state, arenas_ + thread * arena_size_, next);
    const Token* tokens = tokens_of(layer).data();
    for (int64_t n = first, together; n < last; n += std::max<int64_t>(together, 1)) {
      together = is_asked ? head.block_of(tokens[n].position, last - n) : 0;
      const float* projected = projected_ + n * projected_width_;
      const float* far_low = rank > 0 && is_asked ? far_low_ + n * rank : nullptr;
      float* out = is_asked ? attended_.values + n * attended_.width : nullptr;
      if (together > 0) {
        head.feed_block(tokens + n, together, projected, projected_width_, far_low, out, attended_.width);
      } else {
        head.feed(tokens[n], projected, far_low, out);
      }
    }
  }

  void attend_all(const Layer& layer) const {
    const Attention& attention = layer.attention;
    const auto num_split = static_cast<int64_t>(shares_.split.size()), num_parts = shares_.num_parts;
    const auto num_whole = static_cast<int64_t>(shares_.whole.size()), together = shares_.together;
    const int64_t num_runs = (num_whole + together - 1) / together;
    std::vector<GroupState> starts(static_cast<size_t>(num_split * num_parts));  // of the parts
    std::atomic<int64_t> num_started{0};  // shares whose starts are found
    if (attention.far_rank > 0) lower_queries(layer);
    Pool::instance().run(num_split + num_runs + num_split * num_parts, threads_, [&](int64_t index, int thread) {
      if (index < num_split) {
        find_starts(layer, index, thread, starts.data() + index * num_parts);
        num_started.fetch_add(1, std::memory_order_release);
        return;
      }
      index -= num_split;
      if (index < num_runs) return walk_run(layer, index * together, thread);
      index -= num_runs;
      const Share& share = shares_.split[static_cast<size_t>(index / num_parts)];
      const Segment& segment = segments_[static_cast<size_t>(share.segment)];
      // Tasks are taken in order: another thread is at it, if it is not done.
      while (num_started.load(std::memory_order_acquire) < num_split) relax();
      const int64_t part = index % num_parts;
      walk(layer, share.group, starts[static_cast<size_t>(index)], shares_.start_of(segment, part),
           shares_.start_of(segment, part + 1), true, thread, {});
    });
    finish_attention(layer);
  }

  // Shares that are read whole, from `first` on, as many as a task has.
  void walk_run(const Layer& layer, int64_t first, int thread) const {
    const Attention& attention = layer.attention;
    const int64_t together = shares_.together, last = std::min(first + together, static_cast<int64_t>(shares_.whole.size()));
    for (int64_t index = first; index < last; ++index) {
      const Share& share = shares_.whole[static_cast<size_t>(index)];
      const Segment& segment = segments_[static_cast<size_t>(share.segment)];
      // Then this thread is likely to take the task behind those that the others have.
      const int64_t next = index + 1 < last ? index + 1 : last + (threads_ - 1) * together;
      walk(layer, share.group, state_of(attention, segment, share.group, thread), segment.first, segment.last, true, thread,
           next_of(attention, next));
    }
  }

  // The states at the beginnings of a share's parts: copies, but the last one is the slot's own.
  void find_starts(const Layer& layer, int64_t index, int thread, GroupState* starts) const {
    const Share& share = shares_.split[static_cast<size_t>(index)];
    const Segment& segment = segments_[static_cast<size_t>(share.segment)];
    const GroupState state = slot_state(layer.attention, share);
    const int64_t last = shares_.num_parts - 1;
    for (int64_t part = 0; part < last; ++part) {
      uint8_t* memory = shared_copies_ + (index * last + part) * copy_bytes_;
      starts[part] = copied(layer.attention, model_.heads, share.group, state, memory);
      walk(layer, share.group, state, shares_.start_of(segment, part), shares_.start_of(segment, part + 1), false, thread, {});
    }
    starts[last] = state;
  }

  void finish_attention(const Layer& layer) const {
    const bool is_gated = layer.gate.rows > 0;
    if (!is_gated && !layer.output.reads_quantized()) return;
    for_prepared(attended_, layer.output, [&](int64_t n) {
      float* row = attended_.values + n * attended_.width;
      if (is_gated)
        gated_group_norm(layer.group_norm, model_.heads.head_size, attended_.width, gate_ + n * attended_.width, row);
    });
  }

  // Inner rows, ready for the product down.
  void mlp(const Layer& layer) const {
#if DIJIANG_TILES
    if (takes_columns(layer.mlp_up, layer.mlp_gate, layer.mlp_down, num_rows_)) return mlp_in_columns(layer);
#endif
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
    if (layer.mlp_down.reads_quantized()) for_prepared(inner_, layer.mlp_down, [](int64_t) {});
  }

#if DIJIANG_TILES
  // The same by sixteen rows, which lie side by side and need not be turned round on their way to the next product.
  void mlp_in_columns(const Layer& layer) const {
    const Activations x = mlp_normed_.activations();
    const auto kind = static_cast<ActivationKind>(model_.activation);
    for_outputs(inner_.width, num_rows_, [&](int64_t first, int64_t last) {
      tile_columns(layer.mlp_up, layer.mlp_gate, kind, x, num_rows_, first, last, inner_.values);
    });
    Pool::instance().run((num_rows_ + kTileRows - 1) / kTileRows, num_rows_ >= 8 ? threads_ : 1, [&](int64_t part, int) {
      const int64_t n = part * kTileRows, count = std::min(kTileRows, num_rows_ - n);
      round_columns_to_tiles(layer.mlp_down, inner_.values + n * inner_.width, count,
                             inner_.rounded + n * 2 * padded(inner_.width), inner_.scales + n);
    });
  }
#endif

  // To the hidden rows: the product, or its norm. What the MLP reads is not needed at either time.
  void add_product(const Matrix& matrix, const RowBuffer& x, const Norm& norm) const {
    const int64_t size = model_.hidden_size;
    const bool is_normed = norm.weight != nullptr;
    float* out = is_normed ? mlp_normed_.values : hidden_;
    auto task = [&](int64_t first, int64_t last) {
      product(matrix, x.activations(), num_rows_, first, last, out, size, !is_normed);
    };
    for_outputs(matrix.rows, num_rows_, task, panel_outputs(matrix));
    if (!is_normed) return;
    for_rows([&](int64_t n) {
      float *row = out + n * size, *hidden = hidden_ + n * size;
      apply(norm, row, size, row);
      for (int64_t j = 0; j < size; ++j) hidden[j] += row[j];
    });
  }

  const Model& model_;
  float* hidden_;  // [N, D], each layer adds to it
  int64_t projected_width_ = 0, arena_size_ = 0, copy_bytes_ = 0;
  uint8_t* copies_ = nullptr;  // by thread: a copy of a group's state
  uint8_t* shared_copies_ = nullptr;  // at the beginnings of parts
  float *gate_, *inner_gate_, *projected_, *far_queries_, *far_low_, *angles_, *arenas_;
  RowBuffer normed_, mlp_normed_, attended_, inner_;
  std::vector<Token> tokens_, local_tokens_;
  std::vector<Segment> segments_;
  Shares shares_;
};

}  // namespace dijiang
