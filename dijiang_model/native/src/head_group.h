// The work of a token in one key-value head: see `attention.h`.
#pragma once

#include "attention.h"
#include "block_attention.h"

namespace dijiang {

// A group that the same thread is likely to feed next.
struct NextGroup {
  GroupState state{};
  int64_t num_places = 0;  // that it reads; 0: there is no next group
};

// Feeds tokens of one sequence to one group, in order, moving its state on.
//
// A state is read once with every token, from memory: while keys are read the values are asked for, then what comes behind
// them, and in the end the keys of the next group.
class HeadGroup {
 public:
  // Floats of scratch that one needs.
  static int64_t scratch_size(const Attention& a, const Heads& heads) {
    const int64_t shared = heads.num_heads / heads.num_groups, d = heads.head_size;
    const int64_t planes = 2 * shared * plane_bytes(std::max(d, a.most_places(heads.num_groups))) / 4;
    return (6 * shared + 4) * d + (shared + 1) * a.num_features +
           shared * padded_rows(a.most_places(heads.num_groups)) + 2 * shared + 2 * heads.rotary_half +
           (a.has_anchors() ? planes + block_size(a, heads) : 0) + shared * static_cast<int64_t>(sizeof(Words)) / 4 +
           25 * 16;
  }

  HeadGroup(const Attention& a, const Heads& heads, int64_t group, const GroupState& state, float* scratch,
            const NextGroup& next)
      : a_(a), heads_(heads), at_(state), next_(next), group_(group), shared_(heads.num_heads / heads.num_groups),
        d_(heads.head_size), num_places_(a.places(group)), first_head_(group * shared_),
        places_(a, state, group, heads.head_size),
        block_(scratch, a.places(group), shared_, d_, a.value_bits) {
    if (a.has_anchors()) scratch += BlockReader::scratch_size(a.most_places(heads.num_groups), shared_, d_);
    auto take = [&scratch](int64_t count) {
      float* taken = scratch;
      scratch += (count + 15) / 16 * 16;
      return taken;
    };
    linear_rows_ = take((shared_ + 1) * d_);
    new_key_ = take(d_);
    linear_value_ = take(d_);
    exact_query_ = take(shared_ * d_);
    sink_query_ = take(shared_ * d_);
    rotated_ = take(shared_ * d_);
    linear_ = take(shared_ * d_);
    exact_ = take(shared_ * d_);
    phi_ = take((shared_ + 1) * a.num_features);
    weights_ = take(shared_ * padded_rows(num_places_));
    sums_ = take(shared_);
    mix_ = take(shared_);
    angles_ = take(2 * heads.rotary_half);
    words_ = reinterpret_cast<Words*>(take(shared_ * static_cast<int64_t>(sizeof(Words)) / 4));
    planes_ = reinterpret_cast<int8_t*>(
        take(a.has_anchors() ? 2 * shared_ * plane_bytes(std::max(d_, num_places_)) / 4 : 0));
    const int64_t together = a.has_anchors() && kReadsBlocks ? kBlockTokens : 0;
    block_exact_ = take(together * d_);
    block_sums_ = take(together);
    block_mix_ = take(together * shared_);
    block_below_ = take(together * shared_);
    if (a.has_anchors()) block_.forget();
    linear_key_ = linear_rows_ + shared_ * d_;
    phi_key_ = phi_ + shared_ * a.num_features;
  }

  // One token: reads the projected row, moves the state on, writes the group's heads of `out`.
  // `far_low` [far_rank]: what the linear branch's update of the queries is made of; null without one.
  // Without `out` nothing is asked of the state; it is moved on to the same bits.
  void feed(const Token& token, const float* projected, const float* far_low, float* out) {
    const bool is_asked = out != nullptr;
    bool leaves = true;
    reads_ = is_asked;
    rotate(key(projected), d_, heads_.rotary_half, token.cos, token.sin, new_key_);
    if (is_asked) turn_queries(token, projected, far_low);
    if (a_.has_anchors()) {
      block_.forget();
      leaves = move_places(token, value(projected), projected[heads_.score_start + group_]);
      if (is_asked) read_places(token);
      if (is_asked) weigh(projected);
    } else if (a_.window > 0) {
      with_kept(a_.exact_numbers, [&](auto* kept) {
        using Kept = std::remove_pointer_t<decltype(kept)>;
        leaves = move_window<Kept>(token, value(projected));
        if (is_asked) read_window<Kept>(token);
      });
      if (is_asked) weigh(projected);
    } else {
      std::memcpy(linear_key_, is_rotated() ? new_key_ : key(projected), row_bytes());
      std::memcpy(linear_value_, value(projected), row_bytes());
    }
    make_features(leaves);
    move_linear(token, is_asked, leaves);
    if (is_asked) join(out + first_head_ * d_);
    is_warm_ = true;
  }

  // How many of the next `count` tokens are better fed together, from `position` on: 0 for one by one.
  int64_t block_of(int64_t position, int64_t count) const {
    constexpr int64_t kFewest = 4;
    if (!kReadsBlocks || !a_.has_anchors() || position < a_.sinks) return 0;
    const int64_t together = std::min({count, kBlockTokens, places_.window()});
    return together < kFewest ? 0 : together;
  }

  // So many tokens at once, all of them asked for: what `feed` does one after the other, to the same bits. Rows are
  // `projected_stride`, far_rank (or far_low is null) and out_stride apart.
  void feed_block(const Token* tokens, int64_t count, const float* projected, int64_t projected_stride,
                  const float* far_low, float* out, int64_t out_stride) {
    reads_block_ = true;
    block_.begin(at_, places_.used(tokens[count - 1].position));
    for (int64_t i = 0; i < count; ++i, projected += projected_stride) {
      reads_ = true;
      rotate(key(projected), d_, heads_.rotary_half, tokens[i].cos, tokens[i].sin, new_key_);
      turn_queries(tokens[i], projected, far_low == nullptr ? nullptr : far_low + i * a_.far_rank);
      block_.ask(exact_query_, sink_query_);
      const bool leaves = move_places(tokens[i], value(projected), projected[heads_.score_start + group_]);
      weigh(projected);
      make_features(leaves);
      move_linear(tokens[i], true, leaves);
      is_warm_ = true;
      for (int64_t r = 0; r < shared_; ++r) {
        block_mix_[r * kBlockTokens + i] = mix_[r];
        block_below_[r * kBlockTokens + i] = below(r);
        std::memcpy(out + i * out_stride + (first_head_ + r) * d_, linear_ + r * d_, row_bytes());
      }
    }
    block_.end();
    reads_block_ = false;
    for (int64_t r = 0; r < shared_; ++r) {
      block_.read(r, places_, tokens[0].position, a_.sinks, block_exact_, d_, block_sums_);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = r * kBlockTokens + i;
        float* target = out + i * out_stride + (first_head_ + r) * d_;
        join_parts(reads_ ? target : nullptr, block_exact_ + i * d_, d_, block_sums_[i], block_mix_[at], block_below_[at],
                   target);
      }
    }
  }

 private:
  static int64_t block_size(const Attention& a, const Heads& heads) {
    const int64_t shared = heads.num_heads / heads.num_groups, d = heads.head_size;
    const int64_t own = kReadsBlocks ? kBlockTokens * (d + 2 * shared + 1) : 0;
    return own + BlockReader::scratch_size(a.most_places(heads.num_groups), shared, d);
  }

  bool is_rotated() const { return a_.late_cos == nullptr; }
  // Whether there is a linear part.
  bool is_there() const { return a_.num_features > 0; }
  size_t row_bytes() const { return static_cast<size_t>(d_) * sizeof(float); }
  const float* query(const float* projected, int64_t r) const {
    return projected + heads_.query_start + (first_head_ + r) * heads_.query_step;
  }
  const float* key(const float* projected) const { return projected + heads_.key_start + group_ * heads_.key_step; }
  const float* value(const float* projected) const {
    return projected + heads_.value_start + group_ * heads_.value_step;
  }

  // The values, while keys are read; those of a sequence's later tokens are in the cache.
  Behind values_behind(int64_t num_places) const {
    const int64_t row = a_.has_anchors() ? d_ * a_.value_bits / 8 : d_ * bytes_of(a_.exact_numbers);
    return is_warm_ ? Behind() : Behind(at_.values, num_places * row, num_places);
  }

  // What comes behind the values, while they are read: a linear state that is worth it, or the next group.
  Behind state_behind(int64_t num_places) const {
    if (!is_large()) return keys_behind(num_places);
    return is_warm_ ? Behind() : Behind(at_.linear, GroupBytes(a_, heads_, group_).linear, num_places);
  }

  // The next group's keys, in parts with so many rows.
  Behind keys_behind(int64_t num_rows) const {
    if (is_warm_) return {};
    return {next_.state.keys, next_.num_places * d_ * bytes_of(a_.exact_numbers), num_rows};
  }

  bool is_large() const { return a_.num_features > 1; }

  // What the next group's places are chosen and weighed by.
  void ask_next_places() const {
    const GroupState& next = next_.state;
    if (is_warm_) return;
    for (const void* part : {static_cast<const void*>(next.positions), static_cast<const void*>(next.scores),
                             static_cast<const void*>(next.key_scales), static_cast<const void*>(next.value_scales)})
      Behind(part, next_.num_places * 4, 1).ask(0, 1);
  }

  void turn_queries(const Token& token, const float* projected, const float* far_low) {
    const int64_t half = heads_.rotary_half;
    const Vec scale = splat(1.0f / std::sqrt(static_cast<float>(d_)));
    auto scaled = [&](const float* x, float* to) {
      for (int64_t i = 0; i < d_; i += kLanes) store(to + i, load(x + i) * scale);
    };
    for (int64_t r = 0; r < shared_; ++r) {
      const float* own = query(projected, r);
      float *linear = linear_rows_ + r * d_, *rotated = rotated_ + r * d_, *sink = sink_query_ + r * d_;
      rotate(own, d_, half, token.cos, token.sin, rotated);
      if (a_.num_features > 1 || far_low != nullptr)
        far_query(own, far_low, a_.far_up + (first_head_ + r) * d_, a_.far_rank, heads_.num_heads * d_, d_, linear);
      if (a_.num_features > 1 && is_rotated() && far_low == nullptr) std::memcpy(linear, rotated, row_bytes());
      if (is_rotated() && far_low != nullptr) {
        std::memcpy(exact_, linear, row_bytes());
        rotate(exact_, d_, half, token.cos, token.sin, linear);
      }
      if (a_.window == 0) continue;
      scaled(rotated, exact_query_ + r * d_);
      if (a_.sinks == 0) continue;
      rotate(own, d_, half, token.sink_cos, token.sink_sin, sink);
      scaled(sink, sink);
    }
  }

  // The token in the new one's row of the ring is taken out, and may go over into the linear state: then true.
  template <class Kept>
  bool move_window(const Token& token, const float* value) {
    Kept *keys = reinterpret_cast<Kept*>(at_.keys), *values = reinterpret_cast<Kept*>(at_.values);
    constexpr bool kIsScaled = std::is_same_v<Kept, int8_t>;
    const int64_t row = a_.sinks + modulo(token.position, a_.window);
    const int64_t sink_row = token.position < a_.sinks ? token.position : row;
    const bool leaves = token.position - a_.window >= a_.sinks;
    take_row(keys + row * d_, d_, kIsScaled ? at_.key_scales[row] : 1.0f, linear_key_);
    take_row(values + row * d_, d_, kIsScaled ? at_.value_scales[row] : 1.0f, linear_value_);
    if (!is_rotated() && leaves)
      rotate_back(linear_key_, heads_.rotary_half, token.cos, token.sin, a_.late_cos, a_.late_sin);
    for (int64_t written : {row, sink_row}) {
      const float key_scale = put_row(new_key_, d_, keys + written * d_);
      const float value_scale = put_row(value, d_, values + written * d_);
      if (!kIsScaled) continue;
      at_.key_scales[written] = key_scale;
      at_.value_scales[written] = value_scale;
    }
    return leaves;
  }

  // exact[r] = sum_j w[r][j] v_j and sums[r] = sum_j w[r][j], w[r][j] = exp(q[r] . k[j] - max) over visible exact rows.
  template <class Kept>
  void read_window(const Token& token) {
    const int64_t stride = padded_rows(num_places_);
    const auto *keys = reinterpret_cast<const Kept*>(at_.keys), *values = reinterpret_cast<const Kept*>(at_.values);
    scores(shared_, sink_query_, d_, keys, at_.key_scales, 0, a_.sinks, weights_, stride, values_behind(num_places_));
    scores(shared_, exact_query_, d_, keys, at_.key_scales, a_.sinks, num_places_, weights_, stride,
           values_behind(num_places_));
    for (int64_t r = 0; r < shared_; ++r) {
      float* w = weights_ + r * stride;
      hide(token.position, a_.window, a_.sinks, w);
      sums_[r] = exponentials(w, stride);
      if (std::is_same_v<Kept, int8_t>)
        for (int64_t j = 0; j < num_places_; ++j) w[j] *= at_.value_scales[j];
    }
    weighted(shared_, weights_, stride, values, d_, num_places_, exact_, d_, state_behind(num_places_));
  }

  // The new token takes its place; whoever is evicted for it goes over into the linear state: then true.
  bool move_places(const Token& token, const float* value, float score) {
    auto* keys = reinterpret_cast<int8_t*>(at_.keys);
    auto* values = reinterpret_cast<int8_t*>(at_.values);
    const bool has_nibbles = a_.value_bits == 4;
    const bool leaves = places_.make_room(token.position, score, [&](const Evicted& evicted) {
      const int64_t row = evicted.column;
      if (has_nibbles) {
        take_nibbles(at_.values + row * d_ / 2, d_, at_.value_scales[row], linear_value_);
      } else {
        take_row(values + row * d_, d_, at_.value_scales[row], linear_value_);
      }
      late_ = exponential(a_.log_decay[group_] * static_cast<float>(token.position - evicted.position));
      if (a_.num_features <= 1) return;  // one constant feature asks no key
      take_row(keys + row * d_, d_, at_.key_scales[row], linear_key_);
      if (!is_rotated()) unrotate(linear_key_, evicted.position);
    }, [this](int64_t from, int64_t to) {
      if (reads_block_) block_.moved(from, to);
    });
    if (!leaves) std::memset(linear_value_, 0, row_bytes());  // it is multiplied by zeros
    const int64_t row = places_.column_of(token.position);
    at_.key_scales[row] = put_row(new_key_, d_, keys + row * d_);
    at_.value_scales[row] = has_nibbles ? put_nibbles(value, d_, at_.values + row * d_ / 2)
                                        : put_row(value, d_, values + row * d_);
    if (reads_block_) block_.placed(at_, row);
    return leaves;
  }

  // Undoes the rotation of a key in place.
  void unrotate(float* x, int64_t position) {
    const int64_t half = heads_.rotary_half;
    float *cos = angles_, *sin = angles_ + half;
    back_angles(position, a_.frequencies, half, cos, sin);
    rotate(x, d_, half, cos, sin, exact_);
    std::memcpy(x, exact_, row_bytes());
  }

  // As `read_window`, over what the places hold.
  void read_places(const Token& token) {
    const auto *keys = reinterpret_cast<const int8_t*>(at_.keys), *values = reinterpret_cast<const int8_t*>(at_.values);
    const int64_t used = places_.used(token.position), stride = padded_rows(used), sinks = std::min(a_.sinks, used);
    auto score = [&](const float* queries, int64_t first, int64_t last) {
      if (!kReadsCodes)
        return scores(shared_, queries, d_, keys, at_.key_scales, first, last, weights_, stride, values_behind(used));
      for (int64_t r = 0; r < shared_; ++r) round_words(queries + r * d_, d_, words(r));
      score_codes(shared_, words_, d_, keys, at_.key_scales, first, last, weights_, stride, values_behind(used));
    };
    if (sinks > 0) score(sink_query_, 0, sinks);
    score(exact_query_, sinks, used);
    ask_next_places();
    for (int64_t r = 0; r < shared_; ++r) {
      float* w = weights_ + r * stride;
      places_.hide(token.position, w);
      if (kReadsCodes) {
        sums_[r] = weigh_words(w, used, at_.value_scales, words(r));
        continue;
      }
      sums_[r] = exponentials(w, stride);
      for (int64_t j = 0; j < used; ++j) w[j] *= at_.value_scales[j];
    }
    if (kReadsCodes) {
      weigh_codes(shared_, words_, at_.values, a_.value_bits, d_, used, exact_, d_, state_behind(used));
    } else if (a_.value_bits == 4) {
      weigh_nibbles(shared_, weights_, stride, at_.values, d_, used, exact_, d_, new_key_);
    } else {
      weighted(shared_, weights_, stride, values, d_, used, exact_, d_, state_behind(used));
    }
  }

  // The query head's row in 16 bits, to be written.
  Words& words(int64_t r) {
    const int64_t plane = plane_bytes(std::max(d_, num_places_));
    words_[r].high = planes_ + 2 * r * plane;
    words_[r].low = words_[r].high + plane;
    return words_[r];
  }

  // How much the linear part counts beside the window.
  void weigh(const float* projected) {
    reads_ = false;
    for (int64_t r = 0; r < shared_; ++r) {
      const float bias = a_.mix_bias[first_head_ + r];
      const float* read = is_rotated() ? rotated_ + r * d_ : query(projected, r);
      mix_[r] = bias + dot(read, a_.mix_weight + (first_head_ + r) * d_, d_);
      // A disabled head (bias -inf) needs nothing of the state: its features and its read-out are left out.
      reads_ = reads_ || (is_there() && bias != -std::numeric_limits<float>::infinity());
    }
    for (int64_t r = 0; r < shared_; ++r) mix_[r] = static_cast<float>(a_.num_features) * exponential(mix_[r]);
  }

  void make_features(bool leaves) {
    if (a_.num_features <= 1) {  // none, or one constant feature
      std::fill(phi_, phi_ + (shared_ + 1) * a_.num_features, 1.0f);
      return;
    }
    const int64_t features = a_.num_features, first = reads_ ? 0 : shared_, last = leaves ? shared_ + 1 : shared_;
    const float *nodes = a_.nodes + group_ * features, *log_weights = a_.log_weights + group_ * features;
    weighted(last - first, linear_rows_ + first * d_, d_, a_.basis, features, d_, phi_ + first * features, features);
    for (int64_t i = first; i < last; ++i) {
      float* row = phi_ + i * features;
      for (int64_t j = 0; j < features; j += kLanes)
        store(row + j, load(row + j) * load(nodes + j) + load(log_weights + j));
      normalise(row, features, a_.is_softmax != 0);
    }
  }

  void move_linear(const Token& token, bool is_asked, bool leaves) {
    if (!is_there()) return;
    const int64_t features = a_.num_features;
    float decay = 0.0f, write = 1.0f;
    if (a_.table_write != nullptr) {
      const int64_t entry = token.position < a_.table_entries ? token.position : a_.table_entries - 1;
      const int64_t entry_at = entry * heads_.num_heads + group_;
      decay = a_.decay[entry_at];
      write = a_.table_write[entry_at];
      for (int64_t j = 0; is_asked && j < features; ++j) phi_[j] *= a_.table_read[entry_at];
    } else {
      decay = a_.decay[group_];
      if (a_.has_anchors()) write = late_;
      if (a_.late != nullptr) write = a_.late[group_];
    }
    for (int64_t j = 0; j < features; ++j) phi_key_[j] = leaves ? phi_key_[j] * write : 0.0f;
    const Behind behind = is_large() || a_.window == 0 ? keys_behind(features) : Behind();
    const Update update{decay, phi_key_, linear_value_, random_salt(token.position), behind};
    const int64_t num_read = reads_ ? shared_ : 0;
    if (a_.linear_numbers == Numbers::kFloat) {
      update_and_read(num_read, phi_, features, reinterpret_cast<float*>(at_.linear), d_, features, linear_, d_,
                      update);
    } else {
      update_and_read(num_read, phi_, features, reinterpret_cast<Half*>(at_.linear), d_, features, linear_, d_,
                      update);
    }
    for (int64_t j = 0; a_.has_denominator != 0 && j < features; ++j)
      at_.normaliser[j] = phi_key_[j] + at_.normaliser[j] * decay;
  }

  // phi(q)^T z of a head.
  float below(int64_t r) const {
    return reads_ ? dot(phi_ + r * a_.num_features, at_.normaliser, a_.num_features) : 0.0f;
  }

  // The window and the linear part under one denominator; without one, the linear part alone.
  void join(float* target) const {
    for (int64_t r = 0; r < shared_; ++r, target += d_) {
      const float* linear = linear_ + r * d_;
      if (a_.has_denominator == 0) {
        std::memcpy(target, linear, row_bytes());
        continue;
      }
      if (a_.window > 0) {
        join_parts(reads_ ? linear : nullptr, exact_ + r * d_, d_, sums_[r], mix_[r], below(r), target);
        continue;
      }
      const float all = below(r);
      for (int64_t i = 0; i < d_; ++i) target[i] = linear[i] / all;
    }
  }

  const Attention& a_;
  const Heads& heads_;
  const GroupState at_;
  const NextGroup next_;
  const int64_t group_, shared_, d_, num_places_, first_head_;
  Places places_;
  BlockReader block_;
  bool reads_ = true, is_warm_ = false, reads_block_ = false;
  float *linear_rows_;  // the linear branch's queries, then the key that enters the state
  float *new_key_, *linear_value_, *exact_query_, *sink_query_, *rotated_, *linear_, *exact_, *phi_, *weights_;
  float *sums_, *mix_;
  float *linear_key_, *phi_key_;
  float* angles_;
  float *block_exact_, *block_sums_, *block_mix_, *block_below_;  // of a block: [R, tokens] or [tokens]
  Words* words_;  // [R]
  int8_t* planes_;
  float late_ = 1.0f;  // decay of whoever was evicted last
};

}  // namespace dijiang
