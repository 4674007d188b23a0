// Up to sixteen tokens of a prompt ask the places of one key-value head together, by the matrix unit.
//
// Each token sees the places as they are at its own time. Between a block's first and its last token few of them change,
// and what comes in is one of the block's own tokens, or one that was in the window when the block began: so queries meet
// what all places held at the beginning and the block's own keys, and a token takes from that what its places hold.
// Scores and sums are whole numbers as in `score_codes.h`, everything else happens row by row: the bits are those of one
// token after the other.
#pragma once

#include "places.h"
#include "score_codes.h"
#include "tile_rows.h"

namespace dijiang {

constexpr int64_t kBlockTokens = 16;

// Whether blocks are read so.
constexpr bool kReadsBlocks = DIJIANG_TILES != 0 && kReadsCodes;

#if DIJIANG_TILES

class BlockReader {
 public:
  // Floats of scratch that one needs for `places` places.
  static int64_t scratch_size(int64_t places, int64_t shared, int64_t d) {
    const int64_t entries = padded_entries(places), channels = padded_codes(d);
    const int64_t bytes = 2 * entries * channels + 4 * shared * kBlockTokens * channels + 2 * kBlockTokens * entries +
                          4 * kTileBytes + 2 * kBlockTokens * channels;
    return bytes / 4 + kBlockTokens * entries + 3 * entries + 2 * shared * kBlockTokens + entries / 64 + 15 * 16;
  }

  BlockReader(float* scratch, int64_t places, int64_t shared, int64_t d, int64_t value_bits)
      : shared_(shared), d_(d), channels_(padded_codes(d)), most_(padded_entries(places)), value_bits_(value_bits) {
    auto take = [&scratch](int64_t floats) {
      float* taken = scratch;
      scratch += (floats + 15) / 16 * 16;
      return taken;
    };
    auto take_bytes = [&take](int64_t bytes) { return reinterpret_cast<int8_t*>(take(bytes / 4)); };
    keys_ = take_bytes(most_ * channels_);
    values_ = take_bytes(most_ * channels_);
    queries_ = take_bytes(4 * shared * kBlockTokens * channels_);
    planes_ = take_bytes(2 * kBlockTokens * most_);
    sums_ = reinterpret_cast<int32_t*>(take(4 * kTileBytes / 4));
    new_keys_ = take_bytes(kBlockTokens * channels_);
    new_values_ = take_bytes(kBlockTokens * channels_);
    weights_ = take(kBlockTokens * most_);
    key_scales_ = take(most_);
    value_scales_ = take(most_);
    held_scales_ = take(most_);
    query_scales_ = take(2 * shared * kBlockTokens);
    is_packed_ = reinterpret_cast<uint8_t*>(take_bytes(most_ / kTileRows + 4));
  }

  // Places were written to outside of blocks, or for the first time: nothing that is packed counts any more.
  void forget() { std::memset(is_packed_, 0, static_cast<size_t>(most_ / kTileRows)); }

  // Before any of the block's tokens takes its place: the columns that `used` says, those of the last token.
  void begin(const GroupState& state, int64_t used) {
    used_ = used;
    first_new_ = padded_rows(used);
    count_ = changes_ = 0;
    const auto* keys = reinterpret_cast<const int8_t*>(state.keys);
    for (int64_t n = 0; n < num_written_; ++n) is_packed_[written_[n] / kTileRows] = 0;
    num_written_ = 0;
    for (int64_t j = 0; j < used; j += kTileRows) {
      if (is_packed_[j / kTileRows] != 0) continue;
      pack_keys(keys + j * d_, used - j, j);
      pack_values(state.values + j * value_bytes(), used - j, j);
      is_packed_[j / kTileRows] = used - j >= kTileRows ? 1 : 0;
    }
    std::memcpy(key_scales_, state.key_scales, static_cast<size_t>(used) * sizeof(float));
    std::memcpy(value_scales_, state.value_scales, static_cast<size_t>(used) * sizeof(float));
  }

  // The block's next token asks: rows [shared, d] of queries, and of queries for the sinks.
  void ask(const float* queries, const float* sink_queries) {
    for (int64_t r = 0; r < shared_; ++r) {
      round_query(queries + r * d_, 2 * r);
      round_query(sink_queries + r * d_, 2 * r + 1);
    }
  }

  // That token has taken its place: what has been written to a column by it, `from` a column as the block began.
  void moved(int64_t from, int64_t to) { change(to, from); }
  void placed(const GroupState& state, int64_t column) {
    change(column, first_new_ + count_);
    std::memcpy(new_keys_ + count_ * d_, reinterpret_cast<const int8_t*>(state.keys) + column * d_, static_cast<size_t>(d_));
    std::memcpy(new_values_ + count_ * value_bytes(), state.values + column * value_bytes(),
                static_cast<size_t>(value_bytes()));
    key_scales_[first_new_ + count_] = state.key_scales[column];
    value_scales_[first_new_ + count_] = state.value_scales[column];
    changed_before_[++count_] = changes_;
  }

  // Behind the last token.
  void end() {
    pack_keys(new_keys_, count_, first_new_);
    pack_values(reinterpret_cast<const uint8_t*>(new_values_), count_, first_new_);
    num_entries_ = plane_bytes(first_new_ + kTileRows);
  }

  // Query head r of all tokens: out[i] = sum_j w[j] v_j and sums[i] = sum_j w[j], w[j] = exp(q . k[j] - max) over what
  // the token at `position` + i sees. `out` [tokens, stride].
  void read(int64_t r, const Places& places, int64_t position, int64_t sinks, float* out, int64_t stride, float* sums) {
    const TileSession session(kTileRowBytes);
    score(2 * r, 0, first_new_ + kTileRows, first_new_ + kTileRows);
    if (sinks > 0) score(2 * r + 1, 0, (sinks + kTileRows - 1) / kTileRows * kTileRows, sinks);
    std::memcpy(held_scales_, value_scales_, static_cast<size_t>(used_) * sizeof(float));
    float scales[kBlockTokens];
    num_held_ = 0;
    for (int64_t i = 0; i < count_; ++i) scales[i] = weigh(i, places, position + i, sums + i);
    add_values(scales, out, stride);
  }

 private:
  struct Change {
    int32_t column, entry;
  };

  // Room for the places, padded to tiles, and a block's own tokens.
  static int64_t padded_entries(int64_t places) { return plane_bytes(padded_rows(places) + kTileRows); }
  int64_t value_bytes() const { return d_ * value_bits_ / 8; }

  void change(int64_t column, int64_t entry) {
    all_changes_[changes_++] = {static_cast<int32_t>(column), static_cast<int32_t>(entry)};
    written_[num_written_++] = static_cast<int32_t>(column);
  }

  void round_query(const float* query, int64_t which) {
    Words words;
    words.high = queries_ + 2 * which * kBlockTokens * channels_ + count_ * channels_;
    words.low = words.high + kBlockTokens * channels_;
    round_words<false>(query, d_, words);
    query_scales_[which * kBlockTokens + count_] = words.scale;
  }

  // Keys of 16 places as tiles [channels / 64][16 of four channels][16 places][4].
  void pack_keys(const int8_t* keys, int64_t count, int64_t entry) {
    int8_t* to = keys_ + entry * channels_;
    for (int64_t c = 0; c < d_; c += kCodeChannels, to += kTileBytes) {
      const int64_t left = d_ - c;
      const __mmask64 here = left >= kCodeChannels ? ~0ull : (1ull << left) - 1ull;
      __m512i x[16];
      if (count >= kTileRows) {
        each<16>([&](auto j) DIJIANG_INLINE { x[j] = _mm512_maskz_loadu_epi8(here, keys + j * d_ + c); });
      } else {
        for (int64_t j = 0; j < kTileRows; ++j)
          x[j] = j < count ? _mm512_maskz_loadu_epi8(here, keys + j * d_ + c) : _mm512_setzero_si512();
      }
      transpose(x);
      each<16>([&](auto k) DIJIANG_INLINE { _mm512_storeu_si512(to + k * kTileRowBytes, x[k]); });
    }
  }

  DIJIANG_INLINE __m512i signed_codes(const uint8_t* row, int64_t c) const {
    const int64_t left = d_ - c;
    if (value_bits_ == 8)
      return _mm512_maskz_loadu_epi8(left >= kCodeChannels ? ~0ull : (1ull << left) - 1ull, row + c);
    return _mm512_sub_epi8(value_codes<4>(row, c, d_), _mm512_set1_epi8(8));
  }

  // Values of 16 places as parts of tiles [channels / 64][entries / 64][4 tiles][16 of four entries][16 channels][4].
  // Channel 16 L + 4 k + p is column 4 L + p of tile k.
  void pack_values(const uint8_t* values, int64_t count, int64_t entry) {
    const int64_t part = entry % kTileRowBytes / 4 * kTileRowBytes;
    for (int64_t c = 0; c < d_; c += kCodeChannels) {
      int8_t* to = values_ + c * most_ + entry / kTileRowBytes * 4 * kTileBytes + part;
      for (int64_t j = 0; j < kTileRows; j += 4, to += kTileRowBytes) {
        __m512i row[4];
        each<4>([&](auto o) DIJIANG_INLINE {
          row[o] = j + o < count ? signed_codes(values + (j + o) * value_bytes(), c) : _mm512_setzero_si512();
        });
        const __m512i a = _mm512_unpacklo_epi8(row[0], row[1]), b = _mm512_unpackhi_epi8(row[0], row[1]);
        const __m512i e = _mm512_unpacklo_epi8(row[2], row[3]), f = _mm512_unpackhi_epi8(row[2], row[3]);
        _mm512_storeu_si512(to, _mm512_unpacklo_epi16(a, e));
        _mm512_storeu_si512(to + kTileBytes, _mm512_unpackhi_epi16(a, e));
        _mm512_storeu_si512(to + 2 * kTileBytes, _mm512_unpacklo_epi16(b, f));
        _mm512_storeu_si512(to + 3 * kTileBytes, _mm512_unpackhi_epi16(b, f));
      }
    }
  }

  // Scores of entries first ... last - 1 with one kind of queries, to the rows of weights: of those before `kept` alone, for
  // the sinks are asked by queries of their own.
  void score(int64_t which, int64_t first, int64_t last, int64_t kept) {
    const int8_t* high = queries_ + 2 * which * kBlockTokens * channels_;
    const int8_t* low = high + kBlockTokens * channels_;
    const float* scales = query_scales_ + which * kBlockTokens;
    const bool is_one_step = channels_ == kCodeChannels;  // queries stay in their tiles then
    if (is_one_step) {
      load_tile<4>(high, channels_);
      load_tile<5>(low, channels_);
    }
    for (int64_t j = first; j < last; j += 2 * kTileRows) {
      each<4>([&](auto tile) DIJIANG_INLINE { clear_tile<tile>(); });
      const int8_t* keys = keys_ + j * channels_;
      for (int64_t c = 0; c < channels_; c += kCodeChannels, keys += kTileBytes) {
        if (!is_one_step) {
          load_tile<4>(high + c, channels_);
          load_tile<5>(low + c, channels_);
        }
        load_tile<6>(keys, kTileRowBytes);
        multiply_signed<0, 4, 6>();
        multiply_signed<1, 5, 6>();
        if (j + kTileRows >= last) continue;
        load_tile<7>(keys + kTileRows * channels_, kTileRowBytes);
        multiply_signed<2, 4, 7>();
        multiply_signed<3, 5, 7>();
      }
      each<4>([&](auto tile) DIJIANG_INLINE { store_tile<tile>(sums_ + tile * kTileBytes / 4, kTileRowBytes); });
      put_scores(scales, j, sums_, first_lanes(kept - j));
      if (j + kTileRows < last)
        put_scores(scales, j + kTileRows, sums_ + 2 * kTileBytes / 4, first_lanes(kept - j - kTileRows));
    }
  }

  void put_scores(const float* scales, int64_t entry, const int32_t* high, __mmask16 kept) {
    const __m512 key_scales = _mm512_loadu_ps(key_scales_ + entry);
    const int32_t* low = high + kTileBytes / 4;
    float* to = weights_ + entry;
    auto one = [&](int64_t i) DIJIANG_INLINE {
      const __m512i whole = _mm512_add_epi32(_mm512_slli_epi32(_mm512_loadu_si512(high + i * kLanes), 8),
                                             _mm512_loadu_si512(low + i * kLanes));
      const __m512 score = _mm512_mul_ps(_mm512_cvtepi32_ps(whole), _mm512_set1_ps(scales[i]));
      _mm512_mask_storeu_ps(to + i * most_, kept, _mm512_mul_ps(score, key_scales));
    };
    if (count_ == kBlockTokens) return each<kBlockTokens>(one);
    for (int64_t i = 0; i < count_; ++i) one(i);
  }

  // Changes of columns up to token i are taken in.
  void take_changes(int64_t i) {
    for (int64_t n = changed_before_[i]; n < changed_before_[i + 1]; ++n) {
      const Change& next = all_changes_[n];
      int64_t at = 0;
      while (at < num_held_ && held_[at].column != next.column) ++at;
      held_[at] = next;
      if (at == num_held_) ++num_held_;
      held_scales_[next.column] = value_scales_[next.entry];
    }
  }

  // Scores of token i to weights, times the values' scales and rounded to 16 bits: the scale of that.
  float weigh(int64_t i, const Places& places, int64_t position, float* total) {
    float* w = weights_ + i * most_;
    take_changes(i);
    float scores[2 * kBlockTokens];
    for (int64_t n = 0; n < num_held_; ++n) scores[n] = w[held_[n].entry];
    for (int64_t n = 0; n < num_held_; ++n) w[held_[n].column] = scores[n];
    const int64_t used = places.used(position);
    places.hide(position, w);
    Words words;
    words.high = planes_ + i * most_;
    words.low = words.high + kBlockTokens * most_;
    *total = weigh_words<false>(w, used, held_scales_, words);
    for (int8_t* plane : {words.high, words.low}) {
      const int64_t behind = plane_bytes(used);
      if (behind < num_entries_) std::memset(plane + behind, 0, static_cast<size_t>(num_entries_ - behind));
      int8_t codes[2 * kBlockTokens];
      for (int64_t n = 0; n < num_held_; ++n) codes[n] = plane[held_[n].column];
      for (int64_t n = 0; n < num_held_; ++n) plane[held_[n].column] = 0;
      for (int64_t n = 0; n < num_held_; ++n) plane[held_[n].entry] = codes[n];
    }
    return words.scale;
  }

  // out[i] = sum_j w[i][j] v_j.
  void add_values(const float* scales, float* out, int64_t stride) {
    const int8_t *high = planes_, *low = planes_ + kBlockTokens * most_;
    for (int64_t c = 0; c < d_; c += kCodeChannels) {
      const int8_t* panel = values_ + c * most_;
      for (int64_t pair = 0; pair < 2; ++pair) {
        each<4>([&](auto tile) DIJIANG_INLINE { clear_tile<tile>(); });
        for (int64_t j = 0; j < num_entries_; j += kTileRowBytes) {
          const int8_t* values = panel + (4 * j / kTileRowBytes + 2 * pair) * kTileBytes;
          load_tile<4>(high + j, most_);
          load_tile<6>(values, kTileRowBytes);
          load_tile<5>(low + j, most_);
          load_tile<7>(values + kTileBytes, kTileRowBytes);
          multiply_signed<0, 4, 6>();
          multiply_signed<1, 5, 6>();
          multiply_signed<2, 4, 7>();
          multiply_signed<3, 5, 7>();
        }
        each<4>([&](auto tile) DIJIANG_INLINE { store_tile<tile>(sums_ + tile * kTileBytes / 4, kTileRowBytes); });
        for (int64_t k = 0; k < 2; ++k) put_values(scales, sums_ + 2 * k * kTileBytes / 4, c, 2 * pair + k, out, stride);
      }
    }
  }

  void put_values(const float* scales, const int32_t* high, int64_t c, int64_t k, float* out, int64_t stride) const {
    const int32_t* low = high + kTileBytes / 4;
    for (int64_t i = 0; i < count_; ++i) {
      const __m512 above = _mm512_cvtepi32_ps(_mm512_loadu_si512(high + i * kLanes));
      const __m512 below = _mm512_cvtepi32_ps(_mm512_loadu_si512(low + i * kLanes));
      float lanes[kLanes];
      _mm512_storeu_ps(lanes, _mm512_mul_ps(_mm512_fmadd_ps(above, _mm512_set1_ps(256.0f), below), _mm512_set1_ps(scales[i])));
      for (int64_t quarter = 0; quarter < 4 && c + 16 * quarter < d_; ++quarter)
        std::memcpy(out + i * stride + c + 16 * quarter + 4 * k, lanes + 4 * quarter, 4 * sizeof(float));
    }
  }

  const int64_t shared_, d_, channels_, most_, value_bits_;
  int64_t used_ = 0, first_new_ = 0, num_entries_ = 0, count_ = 0, changes_ = 0, num_held_ = 0;
  int8_t *keys_, *values_, *queries_, *planes_, *new_keys_, *new_values_;
  int32_t* sums_;
  float *weights_, *key_scales_, *value_scales_, *held_scales_, *query_scales_;
  Change all_changes_[2 * kBlockTokens], held_[2 * kBlockTokens];  // held: what columns hold now, not as the block began
  int64_t changed_before_[kBlockTokens + 1] = {};
  uint8_t* is_packed_;  // of each sixteen columns: as they are now
  int32_t written_[2 * kBlockTokens];  // columns that the last block wrote to
  int64_t num_written_ = 0;
};

#else

class BlockReader {
 public:
  static int64_t scratch_size(int64_t, int64_t, int64_t) { return 0; }
  BlockReader(float*, int64_t, int64_t, int64_t, int64_t) {}
  void forget() {}
  void begin(const GroupState&, int64_t) {}
  void ask(const float*, const float*) {}
  void moved(int64_t, int64_t) {}
  void placed(const GroupState&, int64_t) {}
  void end() {}
  void read(int64_t, const Places&, int64_t, int64_t, float*, int64_t, float*) {}
};

#endif

}  // namespace dijiang
