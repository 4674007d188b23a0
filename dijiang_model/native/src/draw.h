// Drawing one token from a row of logits, by inverse CDF over what temperature, min-p, top-k and top-p leave of it.
//
// The twin is `reference/drawing.py`. Sums of weights are fp64, so that no tail token is rounded away.
#pragma once

#include <algorithm>
#include <functional>
#include <vector>

#include "vector.h"

namespace dijiang {

typedef double DoubleVec __attribute__((vector_size(kLanes * 8)));

struct DrawRules {
  double uniform;     // in [0, 1)
  float temperature;  // > 0; 0: nothing is drawn
  float min_p;        // weights below it are left out, the largest weight being 1; 0: none
  int64_t top_k;      // so many largest logits stay, and equals of the last; from the vocabulary's size on: all
  double top_p;       // as few of the heaviest as reach this share of all stay, and equals of the last; above 1: all
};

// Larger floats have larger keys; NaN has one too, so that keys can be sorted whatever a row holds.
static inline uint32_t key_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
}

static inline float number_of(uint32_t key) {
  const uint32_t bits = key ^ ((key >> 31) != 0 ? 0x80000000u : 0xffffffffu);
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

class Drawing {
 public:
  // For rows of `count` logits, one at a time.
  explicit Drawing(int64_t count)
      : count_(count), weights_(at(count + kLanes)), maxima_(at((count + kChunk - 1) / kChunk)), masses_(kBins) {
    keys_.reserve(at(count));  // nothing is allocated in a thread that draws
    kept_.reserve(at(count));
    places_.reserve(at(count));
    sums_.reserve(at(count / kBlock + 2));
  }

  Drawing(Drawing&&) = default;
  int64_t count() const { return count_; }

  int64_t draw(const float* logits, const DrawRules& rules) {
    const float most = find_maxima(logits);
    const bool is_cut = rules.top_k < count_;
    if (is_cut) keep_largest(logits, rules.top_k);
    num_ = is_cut ? static_cast<int64_t>(kept_.size()) : count_;
    if (num_ == 0) return count_ - 1;  // of a row of NaN
    weigh(is_cut ? kept_.data() : logits, most, rules);
    if (rules.top_p <= 1.0) keep_heaviest(rules.top_p);
    const int64_t drawn = place_at(rules.uniform);
    return is_cut ? places_[at(drawn)] : drawn;
  }

 private:
  // The largest logit of each chunk, -inf where all are NaN; returns the largest of all.
  float find_maxima(const float* x) {
    float most = -std::numeric_limits<float>::infinity();
    for (int64_t chunk = 0, first = 0; first < count_; ++chunk, first += kChunk) {
      Vec best = splat(-std::numeric_limits<float>::infinity());
      const int64_t last = std::min(first + kChunk, count_);
      int64_t i = first;
      for (; i + kLanes <= last; i += kLanes) {
        const Vec next = load(x + i);
        best = next > best ? next : best;
      }
      float here = largest(best);
      for (; i < last; ++i) here = x[i] > here ? x[i] : here;
      maxima_[at(chunk)] = here;
      most = here > most ? here : most;
    }
    return most;
  }

  // Logits that are at least the k-th largest go to `kept_`, where they stood to `places_`.
  void keep_largest(const float* x, int64_t k) {
    // So many chunks hold a logit that is at least the k-th largest of their maxima.
    keys_.clear();
    for (const float here : maxima_) keys_.push_back(key_of(here));
    gather(x, k <= static_cast<int64_t>(keys_.size()) ? kth(k) : -std::numeric_limits<float>::infinity());
    keys_.clear();
    for (const float here : kept_) keys_.push_back(key_of(here));
    if (!keys_.empty()) gather(x, kth(std::min(k, static_cast<int64_t>(keys_.size()))));
  }

  void gather(const float* x, float least) {
    kept_.clear();
    places_.clear();
    for (int64_t chunk = 0, first = 0; first < count_; ++chunk, first += kChunk) {
      if (!(maxima_[at(chunk)] >= least)) continue;
      for (int64_t i = first; i < first + kChunk && i < count_; ++i) {
        if (!(x[i] >= least)) continue;
        kept_.push_back(x[i]);
        places_.push_back(i);
      }
    }
  }

  // The k-th largest of the keys, as a number.
  float kth(int64_t k) {
    const auto wanted = keys_.begin() + static_cast<std::ptrdiff_t>(k - 1);
    std::nth_element(keys_.begin(), wanted, keys_.end(), std::greater<uint32_t>());
    return number_of(*wanted);
  }

  // exp((x - most) / T), so that the largest weighs 1.
  void weigh(const float* x, float most, const DrawRules& rules) {
    const Vec top = splat(most), temperature = splat(rules.temperature), least = splat(rules.min_p);
    auto weight = [&](Vec x) {
      const Vec w = exponential((x - top) / temperature);
      return w >= least ? w : splat(0.0f);  // 0 for NaN
    };
    int64_t i = 0;
    for (; i + kLanes <= num_; i += kLanes) store(&weights_[at(i)], weight(load(x + i)));
    if (i == num_) return;
    float rest[kLanes];
    store(rest, weight(load_first(x + i, num_ - i)));
    for (int64_t j = 0; j < kLanes; ++j) weights_[at(i + j)] = i + j < num_ ? rest[j] : 0.0f;
  }

  // Weights below the lightest of the fewest that reach `share` of all, at least one, become 0.
  void keep_heaviest(double share) {
    const double all = sum_blocks(), wanted = share * all;
    if (all == 0.0) return;
    // Whatever is lighter than this is, taken together, less than half of what may be left out.
    gather_keys(static_cast<float>(0.5 * (1.0 - share) * all / static_cast<double>(num_)));
    std::fill(masses_.begin(), masses_.end(), 0.0);
    for (const uint32_t key : keys_) masses_[key >> kShift] += static_cast<double>(number_of(key));
    size_t last = 0, bin = kBins - 1;  // the last one of any mass, so that roundings never go past it
    while (masses_[last] == 0.0) ++last;
    double mass = 0.0;
    for (; bin > last && (masses_[bin] == 0.0 || mass + masses_[bin] < wanted); --bin) mass += masses_[bin];
    const auto others = std::remove_if(keys_.begin(), keys_.end(), [&](uint32_t key) { return key >> kShift != bin; });
    std::sort(keys_.begin(), others, std::greater<uint32_t>());
    float least = 0.0f;
    for (auto key = keys_.begin(); key != others && (key == keys_.begin() || mass < wanted); ++key) {
      least = number_of(*key);
      mass += static_cast<double>(least);
    }
    for (int64_t i = 0; i < num_; i += kLanes) {
      const Vec w = load(&weights_[at(i)]);
      store(&weights_[at(i)], w >= splat(least) ? w : splat(0.0f));
    }
  }

  // Keys of the weights above 0 that are at least `least`.
  void gather_keys(float least) {
    keys_.clear();
    for (int64_t first = 0; first < num_; first += kChunk) {
      const int64_t last = std::min(first + kChunk, num_);
      Vec best = splat(0.0f);
      for (int64_t i = first; i < last; i += kLanes) {
        const Vec next = load(&weights_[at(i)]);
        best = next > best ? next : best;
      }
      if (largest(best) < least) continue;
      for (int64_t i = first; i < last; ++i)
        if (const float w = weights_[at(i)]; w > 0.0f && w >= least) keys_.push_back(key_of(w));
    }
  }

  // Sums of the weights, block by block, and of all.
  double sum_blocks() {
    sums_.clear();
    double all = 0.0;
    for (int64_t first = 0; first < num_; first += kBlock) {
      DoubleVec sums{};
      for (int64_t i = first; i < first + kBlock && i < num_; i += kLanes)
        sums += __builtin_convertvector(load(&weights_[at(i)]), DoubleVec);
      double total = 0.0;
      for (int lane = 0; lane < kLanes; ++lane) total += sums[lane];
      sums_.push_back(total);
      all += total;
    }
    return all;
  }

  // The first whose weight and those before it are more than `uniform` of all.
  int64_t place_at(double uniform) {
    const double all = sum_blocks();
    const double target = uniform * all;
    double mass = 0.0;
    for (size_t block = 0; block < sums_.size(); ++block) {
      if (mass + sums_[block] <= target) {
        mass += sums_[block];
        continue;
      }
      const int64_t first = static_cast<int64_t>(block) * kBlock;
      for (int64_t i = first; i < first + kBlock && i < num_; ++i) {
        mass += static_cast<double>(weights_[at(i)]);
        if (mass > target) return i;
      }
    }
    // Roundings of the sum have left nothing above the target: the last one of any weight.
    int64_t last = num_ - 1;
    while (last > 0 && weights_[at(last)] == 0.0f) --last;
    return last;
  }

  static size_t at(int64_t i) { return static_cast<size_t>(i); }

  static constexpr int kShift = 20;  // a bin for some numbers of each sign and power of two
  static constexpr size_t kBins = size_t{1} << (32 - kShift);
  static constexpr int64_t kChunk = 64, kBlock = 32 * kLanes;

  int64_t count_, num_ = 0;  // of logits; of weights
  std::vector<float> weights_;  // [num], and zeros up to whole vectors
  std::vector<float> maxima_, kept_;
  std::vector<int64_t> places_;
  std::vector<double> masses_, sums_;  // of bins; of blocks
  std::vector<uint32_t> keys_;
};

}  // namespace dijiang
