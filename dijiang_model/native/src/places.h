// The places of one key-value head: sinks, a ring of recent tokens, anchors; who is evicted when a token comes.
//
// As `ops/anchors.py`, token by token: nothing depends on how a text is cut or on what runs beside it.
#pragma once

#include "attention.h"

namespace dijiang {

typedef int32_t PartIntAt __attribute__((vector_size(kLanes * 2), aligned(4), may_alias));

// Who was evicted: its column, while nothing has been written there, and its position.
struct Evicted {
  int64_t column;
  int64_t position;
};

class Places {
 public:
  Places(const Attention& a, const GroupState& state, int64_t group, int64_t head_size)
      : at_(state), age_(a.age), sinks_(a.sinks), window_(a.has_anchors() ? a.windows[group] : 0), span_(a.span),
        limit_(a.places(group) - a.sinks - window_), d_(head_size), value_bytes_(head_size * a.value_bits / 8) {
    constexpr int64_t kFewest = 4 * kWide;
    part_size_ = std::max((limit_ + kMostParts - 1) / kMostParts, kFewest);
    std::fill(lowest_, lowest_ + kMostParts, -1);
  }

  // Columns that may hold a token once that at `position` has come: the first so many.
  int64_t used(int64_t position) const {
    const int64_t left = position + 1 - sinks_ - window_;
    return sinks_ + window_ + (left < 0 ? 0 : left < limit_ ? left : limit_);
  }

  int64_t column_of(int64_t position) const {
    return position < sinks_ ? position : sinks_ + position % window_;
  }

  int64_t window() const { return window_; }

  // Notes the new token's score and lets the token that leaves the window join the anchors. evict(Evicted) is called for
  // whoever loses its place, before that is overwritten; moved(from, to) of columns, if that token stays. The new token's
  // own place is free afterwards.
  template <class Evict, class Moved>
  bool make_room(int64_t position, float score, const Evict& evict, const Moved& moved) {
    const int64_t own = column_of(position), leaving = position - window_;
    const float shared = remember(position, score);
    const int64_t known = position - span_;
    if (span_ > 0 && known >= sinks_) at_.scores[column_of(known)] = shared;
    bool is_evicted = false;
    if (leaving >= sinks_) {
      const int64_t count = leaving - sinks_;
      if (count < limit_) {
        move(own, sinks_ + window_ + count);
        moved(own, sinks_ + window_ + count);
        forget_lowest(sinks_ + window_ + count);
      } else {
        const int64_t lowest = limit_ > 0 ? lowest_anchor() : own;
        const int64_t loser = limit_ > 0 && priority(own) >= priority(lowest) ? lowest : own;
        evict(Evicted{loser, at_.positions[loser]});
        is_evicted = true;
        if (loser != own) {
          move(own, loser);
          moved(own, loser);
          forget_lowest(loser);
        }
      }
    }
    at_.positions[own] = static_cast<int32_t>(position);
    at_.scores[own] = score;
    return is_evicted;
  }

  // -inf in the scores of columns that hold nothing, up to whole vectors.
  void hide(int64_t position, float* scores) const {
    const float hidden = -std::numeric_limits<float>::infinity();
    const int64_t count = used(position);
    for (int64_t j = count; j < padded_rows(count); ++j) scores[j] = hidden;
    for (int64_t z = position + 1; z < sinks_; ++z) scores[z] = hidden;
    if (position - window_ + 1 >= sinks_) return;
    for (int64_t c = 0; c < window_; ++c)
      if (position - modulo(position - c, window_) < sinks_) scores[sinks_ + c] = hidden;
  }

 private:
  double priority(int64_t column) const {
    return static_cast<double>(at_.scores[column]) + age_ * static_cast<double>(at_.positions[column]);
  }

  // The score that the token `span` before this one shares.
  float remember(int64_t position, float score) {
    const int64_t size = 2 * span_ + 1, held = position + 1 < size ? position + 1 : size;
    at_.recent[position % size] = score;
    float most = score;
    for (int64_t j = 0; j < held; ++j) most = at_.recent[j] > most ? at_.recent[j] : most;
    return most;
  }

  void move(int64_t from, int64_t to) {
    std::memcpy(at_.keys + to * d_, at_.keys + from * d_, static_cast<size_t>(d_));
    std::memcpy(at_.values + to * value_bytes_, at_.values + from * value_bytes_, static_cast<size_t>(value_bytes_));
    at_.key_scales[to] = at_.key_scales[from];
    at_.value_scales[to] = at_.value_scales[from];
    at_.positions[to] = at_.positions[from];
    at_.scores[to] = at_.scores[from];
  }

  // Whether an anchor goes before another one: of equals the older.
  bool is_lower(int64_t column, int64_t other) const {
    const double p = priority(column), q = priority(other);
    return p < q || (p == q && at_.positions[column] < at_.positions[other]);
  }

  // The column of the anchor of the lowest priority, all places being taken: that of each part is known as long as
  // nothing in the part changes.
  int64_t lowest_anchor() {
    int64_t lowest = -1;
    for (int64_t first = 0, part = 0; first < limit_; first += part_size_, ++part) {
      if (lowest_[part] < 0)
        lowest_[part] = static_cast<int32_t>(lowest_of(first, std::min(first + part_size_, limit_)));
      if (lowest < 0 || is_lower(lowest_[part], lowest)) lowest = lowest_[part];
    }
    return lowest;
  }

  // The same of anchors first ... last - 1.
  int64_t lowest_of(int64_t first, int64_t last) const {
    const int64_t start = sinks_ + window_;
    int64_t j = first, lowest = start + first;
    auto take = [&](int64_t column) {
      if (is_lower(column, lowest)) lowest = column;
    };
    if (last - first >= kWide) {
      const Wide age = wide(age_);
      Wide least, oldest;
      WideInt where;
      for (; j + kWide <= last; j += kWide) {
        const Wide score = __builtin_convertvector(*reinterpret_cast<const PartAt*>(at_.scores + start + j), Wide);
        const Wide place = __builtin_convertvector(*reinterpret_cast<const PartIntAt*>(at_.positions + start + j), Wide);
        const Wide p = score + age * place;
        const WideInt here = j - WideInt{};
        if (j == first) {
          least = p, oldest = place, where = here;
          continue;
        }
        const WideInt is_less = (p < least) | ((p == least) & (place < oldest));
        least = is_less ? p : least;
        oldest = is_less ? place : oldest;
        where = is_less ? here : where;
      }
      for (int lane = 0; lane < kWide; ++lane) take(start + where[lane] + lane);
    }
    for (; j < last; ++j) take(start + j);
    return lowest;
  }

  void forget_lowest(int64_t column) { lowest_[(column - sinks_ - window_) / part_size_] = -1; }

  const GroupState at_;
  const double age_;
  const int64_t sinks_, window_, span_, limit_, d_, value_bytes_;
  static constexpr int64_t kMostParts = 32;
  int64_t part_size_ = 1;
  int32_t lowest_[kMostParts];  // of each part; -1: not known
};

}  // namespace dijiang
