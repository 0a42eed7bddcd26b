// Attention's inner loop, written once over a policy V that names the vector operations of one instruction set, and
// over what the cache holds (attention_store.h). Included by isa_*.cpp only, and kept in an unnamed namespace.
//
// Beyond what product.h asks for, V has: widen_bf16, nearest_bf16, maximum, seen, ByPairs and ByQuads (products of
// two bf16 and of four bytes), and of a product's tile kKeyRows, keys of scores, and kSums, sums of values.
#pragma once
#include <cstdint>
#include <cstring>

#include "attention.h"
#include "attention_product.h"
#include "attention_store.h"
#include "exponential.h"
#include "inline.h"

namespace localmimo {
namespace {

constexpr float kMasked = -3.0e38f;  // the score of a key that a query does not see

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

template <class V>
float exponential1(float x) {
  float lanes[16];
  V::store(lanes, exponential<V>(V::set1(x)));
  return lanes[0];
}

template <class V>
void scale_row(float* x, int64_t n, float by) {
  for (int64_t i = 0; i < n; i += 16) V::store(x + i, V::mul(V::load(x + i), V::set1(by)));
}

// The rows of one call over one section; S: what the cache holds. Rows go in groups of sixteen, one to a lane: keys are
// then read from the cache, and nothing of the softmax crosses lanes. Values take the lanes when they are added up.
template <class V, class S>
class Section {
 public:
  Section(const CachedHead& h, const Queries& q, float* states, void* scratch)
      : h_(h),
        q_(q),
        rows_(q.tokens * q.group),
        wide_(padded16(h.d_v)),
        stride_(state_floats(h.d_v)),
        depth_((h.d_k + S::kPer - 1) / S::kPer),
        words_(depth_ * S::kWords),
        states_(states),
        cells_(static_cast<typename S::Cell*>(scratch)),
        queries_(cells_ + 4 * kKeys / S::kPer),
        scores_(reinterpret_cast<float*>(queries_ + groups() * depth_)),
        weights_(scores_ + kKeys * 16),
        units_(weights_ + groups() * kWeights),
        keys_(units_ + groups() * 48) {}

  void run(int64_t begin, int64_t end) {
    std::memset(queries_, 0, sizeof(typename S::Cell) * static_cast<size_t>(groups() * depth_));
    for (int64_t row = 0; row < rows_; ++row) {
      std::memset(states_ + row * stride_, 0, sizeof(float) * static_cast<size_t>(stride_));
      states_[row * stride_ + wide_ + 1] = kMasked;
      float* const words = keys_;
      words[words_ - 1] = 0.0f;
      units(row / 16)[row % 16] = S::query(q_.q + row * h_.d_k, h_.d_k, words);
      float* const lanes = reinterpret_cast<float*>(queries_ + row / 16 * depth_) + row % 16;
      for (int64_t w = 0; w < words_; ++w) std::memcpy(lanes + 16 * w, words + w, sizeof(float));
      if (S::kIntegers) excess(row / 16)[row % 16] = 128 * sum_of(words);
    }
    for (int64_t start = begin; start < end; start += kKeys) block(start, end);
  }

 private:
  static constexpr int64_t kWeights = kKeys / S::kPer * S::kWords * 16;  // words of a group's weights in a block

  int64_t groups() const { return (rows_ + 15) / 16; }

  // For int8: the scale of each query, the excess of its products, and the scale of its weights.
  float* units(int64_t group) const { return units_ + 48 * group; }
  int32_t* excess(int64_t group) const { return reinterpret_cast<int32_t*>(units(group) + 16); }
  float* weight_units(int64_t group) const { return units(group) + 32; }

  int32_t sum_of(const float* codes) const {
    const int8_t* const bytes = reinterpret_cast<const int8_t*>(codes);
    int32_t sum = 0;
    for (int64_t i = 0; i < h_.d_k; ++i) sum += bytes[i];
    return sum;
  }

  // The tokens that see any of the block's positions, up to `end`, and those positions.
  void block(int64_t start, int64_t end) {
    const int64_t first = max_of(0, start - q_.position);
    const int64_t last = min_of(q_.tokens, start + kKeys - 1 - q_.position + q_.window);
    const int64_t begin = max_of(start, q_.lowest());
    end = min_of(min_of(end, start + kKeys), q_.last() + 1);
    if (first >= last || begin >= end) return;
    const int64_t from = first * q_.group / 16, to = (last * q_.group + 15) / 16;
    const Keys keys = keys_of(start, begin, end);
    if (S::kIntegers) read_scales(start, begin, end);
    for (int64_t group = from; group < to; ++group) {
      score(keys, start, begin - start, end - start, group, group == from);
      for (int64_t row = group * 16; row < min_of(rows_, group * 16 + 16); ++row)
        for_hidden_keys(start, end, row, [&](int64_t key) { scores_[key * 16 + row % 16] = kMasked; });
      softmax_weights(start, end, group);
    }
    add_values(start, begin, end, from, to);
  }

  struct Keys { const float* words; int64_t stride; };

  // The words of keys begin to end - 1, in the cache if they can be read there.
  Keys keys_of(int64_t start, int64_t begin, int64_t end) {
    const int64_t size = row_bytes(S::kStore, h_.d_k), row = h_.row(begin);
    if (S::kAsStored && h_.d_k % S::kPer == 0 && row + end - begin <= h_.rows)
      return {reinterpret_cast<const float*>(h_.keys + row * size) - (begin - start) * words_, words_};
    for (int64_t p = begin; p < end; ++p) {
      float* const words = keys_ + (p - start) * words_;
      words[words_ - 1] = 0.0f;
      S::key(h_.keys + h_.row(p) * size, h_.d_k, words);
    }
    return {keys_, words_};
  }

  // The scales of the block's keys and values; none where there are none.
  void read_scales(int64_t start, int64_t begin, int64_t end) {
    for (int64_t i = 0; i < kKeys; ++i) key_scales_[i] = value_scales_[i] = 0.0f;
    for (int64_t p = begin; p < end; ++p) {
      const int64_t row = h_.row(p);
      std::memcpy(key_scales_ + p - start, h_.keys + row * row_bytes(S::kStore, h_.d_k) + h_.d_k, sizeof(float));
      std::memcpy(value_scales_ + p - start, h_.values + row * row_bytes(S::kStore, h_.d_v) + h_.d_v, sizeof(float));
    }
  }

  // scores [kKeys][16] = keys begin to end - 1 times sixteen queries; meanwhile the next block may come nearer.
  void score(const Keys& keys, int64_t start, int64_t begin, int64_t end, int64_t group, bool ahead) {
    const int64_t key = row_bytes(S::kStore, h_.d_k), value = row_bytes(S::kStore, h_.d_v);
    const int64_t row = h_.row(start + begin) - begin + kKeys;
    const Soon next{h_.keys + row * key, ahead ? (key + depth_ - 1) / depth_ : 0};
    const Soon after{h_.values + row * value, ahead ? (value + depth_ - 1) / depth_ : 0};
    const Units factors{key_scales_, units(group), excess(group)};
    const Product<S> p{keys.words, keys.stride, queries_ + group * depth_, scores_, 16, depth_, {next, after}, factors};
    product_rows<V, S, false, 1, V::kKeyRows>(p, begin, end - begin);
    for (int64_t i = 0; i < 16 * begin; ++i) scores_[i] = kMasked;
    for (int64_t i = 16 * end; i < 16 * kKeys; ++i) scores_[i] = kMasked;
  }

  // Calls use(key) for the keys of the block that a row does not see.
  template <class Use>
  void for_hidden_keys(int64_t start, int64_t end, int64_t row, Use use) const {
    const int64_t position = q_.position + row / q_.group;
    for (int64_t key = 0; key < min_of(position - q_.window + 1 - start, kKeys); ++key) use(key);
    for (int64_t key = max_of(0, min_of(position + 1, end) - start); key < kKeys; ++key) use(key);
  }

  // Turns the scores of a group into weights against the running maxima of its rows.
  void softmax_weights(int64_t start, int64_t end, int64_t group) {
    float* const states = states_ + group * 16 * stride_;
    const int64_t n = min_of(16, rows_ - group * 16);
    alignas(64) float sums[16] = {}, most[16], factors[16];
    for (int64_t i = 0; i < 16; ++i) most[i] = i < n ? states[i * stride_ + wide_ + 1] : 0.0f;
    typename V::F high[4];
    for (int j = 0; j < 4; ++j) high[j] = V::load(scores_ + 16 * j);
    for (int64_t k = 4; k < kKeys; k += 4)
      for (int j = 0; j < 4; ++j) high[j] = V::maximum(high[j], V::load(scores_ + 16 * (k + j)));
    const typename V::F before = V::load(most);
    const typename V::F now = V::maximum(before, V::maximum(V::maximum(high[0], high[1]), V::maximum(high[2], high[3])));
    V::store(factors, exponential<V>(V::sub(before, now)));
    V::store(most, now);
    for (int64_t i = 0; i < n; ++i) {
      if (factors[i] < 1.0f) scale_row<V>(states + i * stride_, wide_, factors[i]);
      states[i * stride_ + wide_ + 1] = most[i];
    }
    const bool whole = !hidden(start, end, group);
    float* const weights = weights_ + group * kWeights;
    typename V::F sum[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    for (int64_t k = 0; k < kKeys; k += 4) {
      typename V::F p[4];
      for (int j = 0; j < 4; ++j) p[j] = exponential<V>(V::sub(V::load(scores_ + 16 * (k + j)), now));
      if (!whole)
        for (int j = 0; j < 4; ++j) p[j] = V::seen(V::load(scores_ + 16 * (k + j)), kMasked, p[j]);
      if constexpr (S::kIntegers)
        for (int j = 0; j < 4; ++j) V::store(scores_ + 16 * (k + j), p[j]);
      else
        for (int j = 0; j < 4; j += S::kPer) S::weights(p + j, weights + (k + j) / S::kPer * S::kWords * 16);
      for (int j = 0; j < 4; ++j) sum[j] = V::add(sum[j], p[j]);
    }
    V::store(sums, V::add(V::add(sum[0], sum[1]), V::add(sum[2], sum[3])));
    for (int64_t i = 0; i < n; ++i) {
      float& total = states[i * stride_ + wide_];
      total = total * factors[i] + sums[i];
    }
    if constexpr (S::kIntegers) quantise_weights(group);
  }

  // From scores_, times the values' scales, to bytes with a unit for each row; what is not finite shows in the unit.
  void quantise_weights(int64_t group) {
    typename V::F high = V::zero(), odd = V::zero();
    for (int64_t k = 0; k < kKeys; ++k) {
      const typename V::F scaled = V::mul(V::load(scores_ + 16 * k), V::set1(value_scales_[k]));
      V::store(scores_ + 16 * k, scaled);
      high = V::maximum(high, scaled);
      odd = V::add(odd, V::sub(scaled, scaled));
    }
    V::store(weight_units(group), V::fma(high, V::set1(1.0f / 255.0f), odd));
    const typename V::F by = V::div(V::set1(255.0f), V::maximum(high, V::set1(1e-30f)));
    for (int64_t k = 0; k < kKeys; k += 4) {
      typename V::F p[4];
      for (int j = 0; j < 4; ++j) p[j] = V::mul(V::load(scores_ + 16 * (k + j)), by);
      S::weights(p, weights_ + group * kWeights + 4 * k);
    }
  }

  // Whether any row of a group does not see all of the block.
  bool hidden(int64_t start, int64_t end, int64_t group) const {
    const int64_t last = min_of(rows_, group * 16 + 16) - 1;
    const int64_t low = q_.position + group * 16 / q_.group, high = q_.position + last / q_.group;
    return end < start + kKeys || low + 1 < start + kKeys || high - q_.window + 1 > start;
  }

  // states += weights times the values of positions begin to end - 1.
  void add_values(int64_t start, int64_t begin, int64_t end, int64_t from, int64_t to) {
    const int64_t first = (begin - start) / S::kPer, count = (end - start + S::kPer - 1) / S::kPer - first;
    const int64_t n = min_of(rows_ - from * 16, 16);
    const int64_t most = 4 * n <= V::kSums ? 4 : 2;
    Values values(h_, start + first * S::kPer, count * S::kPer, begin, end);
    for (int64_t d = 0; d < wide_;) {
      const int64_t cells = d + 16 * most <= wide_ ? most : 1;
      for (int64_t c = 0; c < cells; ++c) values.pack(d + 16 * c, count, cells, cells_ + c);
      for (int64_t group = from; group < to; ++group) {
        const float* weights = weights_ + group * kWeights + first * S::kWords * 16;
        const Units factors{weight_units(group), nullptr, nullptr};
        const Product<S> p{weights, 0, cells_, states_ + group * 16 * stride_ + d, stride_, count, {}, factors};
        const int64_t rows = min_of(rows_ - group * 16, 16);
        if (cells == 4) product_rows<V, S, true, 4, V::kSums / 4>(p, 0, rows);
        else if (cells == 2) product_rows<V, S, true, 2, V::kSums / 2>(p, 0, rows);
        else product_rows<V, S, true, 1, V::kSums>(p, 0, rows);
      }
      d += 16 * cells;
    }
  }

  // The rows of some positions' values; before `begin` and from `end` on zeros stand in.
  class Values {
   public:
    Values(const CachedHead& h, int64_t from, int64_t n, int64_t begin, int64_t end) : d_v_(h.d_v), n_(n) {
      static const uint8_t zeros[4 * kMaxHeadDim] = {};
      const int64_t size = row_bytes(S::kStore, d_v_);
      for (int64_t i = 0; i < n; ++i) {
        const bool seen = from + i >= begin && from + i < end;
        rows_[i] = seen ? h.values + h.row(from + i) * size : zeros;
      }
    }

    // Sixteen dimensions from d on, `count` cells `apart` from each other.
    void pack(int64_t d, int64_t count, int64_t apart, typename S::Cell* out) {
      if (d + 16 > d_v_) copy_tails(d);
      for (int64_t t = 0; t < count; ++t) {
        const uint8_t* at[S::kPer];
        for (int64_t i = 0; i < S::kPer; ++i) at[i] = rows_[t * S::kPer + i] + d * S::kBytes;
        S::value(at, out + t * apart);
      }
    }

   private:
    void copy_tails(int64_t d) {
      for (int64_t i = 0; i < n_; ++i) {
        std::memset(tails_[i], 0, sizeof tails_[i]);
        std::memcpy(tails_[i], rows_[i] + d * S::kBytes, static_cast<size_t>((d_v_ - d) * S::kBytes));
        rows_[i] = reinterpret_cast<const uint8_t*>(tails_[i]) - d * S::kBytes;
      }
    }

    const int64_t d_v_, n_;
    const uint8_t* rows_[kKeys];
    float tails_[kKeys][16];  // floats, because they may be read as such
  };

  const CachedHead& h_;
  const Queries& q_;
  const int64_t rows_, wide_, stride_, depth_, words_;
  float* const states_;
  typename S::Cell* const cells_;    // [kKeys / kPer][4]
  typename S::Cell* const queries_;  // [groups][depth]
  float* const scores_;              // [kKeys][16]
  float* const weights_;             // [groups][kWeights]
  float* const units_;               // [groups][3][16]
  float* const keys_;                // [kKeys][words]
  float key_scales_[kKeys], value_scales_[kKeys];
};

// The states of all rows over the positions from `begin`, on a block's boundary, to `end`.
template <class V>
void attend_section(const CachedHead& h, const Queries& q, int64_t begin, int64_t end, float* states, void* scratch) {
  if (h.store == Store::f32) Section<V, Exact<V>>(h, q, states, scratch).run(begin, end);
  else if (h.store == Store::bf16) Section<V, Pairs<typename V::ByPairs>>(h, q, states, scratch).run(begin, end);
  else Section<V, Quads<V, typename V::ByQuads>>(h, q, states, scratch).run(begin, end);
}

// Merges a row's state over later positions into the one over earlier positions.
template <class V>
void merge_states(float* into, const float* later, int64_t d_v) {
  const int64_t n = padded16(d_v);
  const float a = into[n + 1], b = later[n + 1];
  if (b <= kMasked) return;
  if (a <= kMasked) {
    std::memcpy(into, later, sizeof(float) * static_cast<size_t>(n + 2));
    return;
  }
  const float most = a > b ? a : b;
  const float before = exponential1<V>(a - most), after = exponential1<V>(b - most);
  const typename V::F left = V::set1(before), right = V::set1(after);
  for (int64_t i = 0; i < n; i += 16)
    V::store(into + i, V::fma(V::load(later + i), right, V::mul(V::load(into + i), left)));
  into[n] = into[n] * before + later[n] * after;
  into[n + 1] = most;
}

// The output of a row: its sum over its weights and the sink's.
template <class V>
void finish_state(const float* state, const float* sink, int64_t d_v, float* out) {
  float total = state[padded16(d_v)], factor = 1.0f;
  if (sink) {
    const float largest = state[padded16(d_v) + 1], most = largest > *sink ? largest : *sink;
    factor = exponential1<V>(largest - most);
    total = total * factor + exponential1<V>(*sink - most);
  }
  const float by = factor / total;
  for (int64_t d = 0; d < d_v; ++d) out[d] = state[d] * by;
}

}  // namespace
}  // namespace localmimo
