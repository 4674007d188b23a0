// How the attention of long segments is shared out: by key-value group, and what does not come out even in parts.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "threads.h"

namespace dijiang {

// Rows first ... last - 1 belong to one sequence, in order. An uncommitted one leaves its slot as it is.
struct Segment {
  int64_t first, last;
  bool is_uncommitted;
};

// A segment in one group.
struct Share {
  int64_t segment, group;
};

// A state depends on all tokens before, so that one thread has to walk along a segment. But to move a state on takes a
// fraction of what it takes to read it: of the last few shares, which would leave threads without work, the states at the
// beginnings of parts are found first, and then the parts are read on copies of them, the last part on the state itself.
// All of it computes the same numbers from the same numbers.
class Shares {
 public:
  static constexpr int64_t kLong = 64;  // tokens of a segment for which that is worth it
  static constexpr int64_t kMostParts = 4;
  static constexpr int64_t kTasks = 8;  // of each thread, where shares are short: within a task it is known what comes next

  Shares() = default;

  Shares(const std::vector<Segment>& segments, int64_t num_groups, int num_threads) {
    for (int64_t s = 0; s < static_cast<int64_t>(segments.size()); ++s) {
      const Segment& segment = segments[static_cast<size_t>(s)];
      const bool is_long = segment.last - segment.first >= kLong && !segment.is_uncommitted && num_threads > 1;
      for (int64_t group = 0; group < num_groups; ++group) (is_long ? split : whole).push_back({s, group});
    }
    const auto count = static_cast<int64_t>(split.size()), threads = static_cast<int64_t>(num_threads);
    const int64_t left = threads > 1 ? count % threads : 0;
    if (left > 0) num_parts = std::min(threads / std::gcd(left, threads), kMostParts);
    if (count == 0) together = std::max<int64_t>(static_cast<int64_t>(whole.size()) / (kTasks * threads), 1);
    // The others go first, before anything that is short.
    whole.insert(whole.begin(), split.begin(), split.end() - left);
    split.erase(split.begin(), split.end() - left);
  }

  // Where a part of a segment begins; part num_parts: behind its end.
  int64_t start_of(const Segment& segment, int64_t part) const {
    return segment.first + (segment.last - segment.first) * part / num_parts;
  }

  int64_t num_copies() const { return static_cast<int64_t>(split.size()) * (num_parts - 1); }

  std::vector<Share> whole, split;
  int64_t num_parts = 1;  // of each that is split
  int64_t together = 1;   // of `whole`, in one task
};

}  // namespace dijiang
