#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "dispatch.h"
#include "pool.h"

namespace localmimo {
namespace {

constexpr int64_t kSmall = 200000;      // multiplications below which a hand-over to the pool costs more than it gains
constexpr int64_t kUnitsPerThread = 4;  // units for which the sections of a query need not be spread
constexpr int64_t kParts = 4 << 20;     // floats of states that sections leave behind, unless threads would have no work

struct AttentionBuffers {
  std::vector<float> queries, parts;
};

AttentionBuffers& attention_buffers() {  // guarded by the pool's turn
  static AttentionBuffers* s = new AttentionBuffers;
  return *s;
}

float* grown(std::vector<float>& memory, int64_t n) {
  if (static_cast<int64_t>(memory.size()) < n) memory.resize(static_cast<size_t>(n));
  return memory.data();
}

// Writes n values as one row of the cache.
void store_row(const Kernels& k, Store store, const float* from, int64_t n, uint8_t* to) {
  if (store == Store::f32) {
    std::memcpy(to, from, sizeof(float) * static_cast<size_t>(n));
  } else if (store == Store::bf16) {
    k.to_bf16(from, n, reinterpret_cast<uint16_t*>(to));
  } else {
    float most = 0.0f;
    bool finite = true;
    for (int64_t i = 0; i < n; ++i) {
      most = std::max(most, std::fabs(from[i]));
      finite = finite && std::isfinite(from[i]);
    }
    const float inverse = most > 1e-30f ? 127.0f / most : 0.0f;
    const float scale = finite ? most / 127.0f : std::numeric_limits<float>::quiet_NaN();  // shows in what it is read for
    std::memcpy(to + n, &scale, sizeof scale);
    for (int64_t i = 0; i < n; ++i)
      to[i] = finite ? static_cast<uint8_t>(static_cast<int8_t>(std::nearbyint(from[i] * inverse))) : 0;
  }
}

class Attention {
 public:
  explicit Attention(const AttendCall& c)
      : c_(c),
        group_(c.heads / c.kv_heads),
        width_(c.heads * c.d_k + c.kv_heads * (c.d_k + c.d_v)),
        stride_(state_floats(c.d_v)),
        tokens_(std::max<int64_t>(1, kQueryRows / group_)),
        batches_((c.n + tokens_ - 1) / tokens_),
        k_(kernels()),
        pool_(Pool::instance()),
        queries_(grown(attention_buffers().queries, c.n * c.heads * c.d_k)) {}

  void run() {
    const int64_t states = rows() * stride_;
    // Per thread: the states so far, those of the section at hand, and what a section uses.
    pool_.reserve(static_cast<size_t>(4 * 2 * states + section_scratch(rows(), c_.d_k)));
    each(c_.n, c_.n * width_ * 4, [&](int64_t t, int) { prepare(t); });
    const int64_t units = c_.kv_heads * batches_;
    const int64_t seen = std::min(c_.position + c_.n, c_.window + c_.n);
    const int64_t work = c_.n * c_.heads * seen * (c_.d_k + c_.d_v);
    const std::vector<int64_t> edges = sections(std::max<int64_t>(0, c_.position - c_.window + 1), c_.position + c_.n);
    const int64_t parts = units * static_cast<int64_t>(edges.size() - 1) * states;
    const int64_t enough = parts > kParts ? pool_.threads() : kUnitsPerThread * pool_.threads();
    if (pool_.threads() == 1 || edges.size() == 2 || units >= enough) {
      each(units, work, [&](int64_t unit, int thread) {
        float* states_so_far = static_cast<float*>(pool_.scratch(thread));
        whole(unit, states_so_far, states_so_far + states, states_so_far + 2 * states);
      });
    } else {
      spread(units, edges, work);
    }
  }

 private:
  int64_t rows() const { return std::min(tokens_, c_.n) * group_; }

  template <class Unit>
  void each(int64_t n, int64_t work, Unit unit) {
    if (work < kSmall) {
      for (int64_t i = 0; i < n; ++i) unit(i, 0);
    } else {
      pool_.run(n, [&](int64_t i, int64_t, int thread) { unit(i, thread); });
    }
  }

  // The edges of the sections over positions begin to end - 1; the first on a block's boundary.
  static std::vector<int64_t> sections(int64_t begin, int64_t end) {
    std::vector<int64_t> edges(1, begin / kKeys * kKeys);
    while (edges.back() < end) edges.push_back(std::min(section_end(edges.back()), end));
    return edges;
  }

  const float* joined(int64_t t) const { return c_.joined + t * width_; }
  int64_t row_of(int64_t position) const { return (position - c_.first) % c_.rows; }

  void rotate(const float* from, int64_t t, float* to) const {
    const int64_t half = c_.rotary / 2;
    const float *cos = c_.cos + t * half, *sin = c_.sin + t * half;
    for (int64_t i = 0; i < half; ++i) {
      to[i] = from[i] * cos[i] - from[half + i] * sin[i];
      to[half + i] = from[half + i] * cos[i] + from[i] * sin[i];
    }
    std::memcpy(to + c_.rotary, from + c_.rotary, sizeof(float) * static_cast<size_t>(c_.d_k - c_.rotary));
  }

  // Queries of token t into their rows, its keys and values into the cache.
  void prepare(int64_t t) {
    float turned[kMaxHeadDim];
    const int64_t row = row_of(c_.position + t);
    for (int64_t h = 0; h < c_.heads; ++h) {
      float* to = queries_ + ((h / group_ * c_.n + t) * group_ + h % group_) * c_.d_k;
      rotate(joined(t) + h * c_.d_k, t, to);
      for (int64_t i = 0; i < c_.d_k; ++i) to[i] *= c_.scale;
    }
    const float* keys = joined(t) + c_.heads * c_.d_k;
    const float* values = keys + c_.kv_heads * c_.d_k;
    for (int64_t h = 0; h < c_.kv_heads; ++h) {
      const int64_t at = h * c_.head_rows + row;
      rotate(keys + h * c_.d_k, t, turned);
      store_row(k_, c_.store, turned, c_.d_k, c_.keys + at * row_bytes(c_.store, c_.d_k));
      for (int64_t i = 0; i < c_.d_v; ++i) turned[i] = values[h * c_.d_v + i] * c_.value_scale;
      store_row(k_, c_.store, turned, c_.d_v, c_.values + at * row_bytes(c_.store, c_.d_v));
    }
  }

  CachedHead head(int64_t h) const {
    const int64_t at = h * c_.head_rows;
    return {c_.store, c_.keys + at * row_bytes(c_.store, c_.d_k), c_.values + at * row_bytes(c_.store, c_.d_v),
            c_.first, c_.rows, c_.d_k, c_.d_v};
  }

  // Unit = KV head x batch of tokens.
  Queries batch(int64_t unit) const {
    const int64_t h = unit / batches_, first = unit % batches_ * tokens_;
    return {queries_ + (h * c_.n + first) * group_ * c_.d_k, group_, std::min(tokens_, c_.n - first),
            c_.position + first, c_.window};
  }

  void whole(int64_t unit, float* states, float* later, void* scratch) {
    const Queries q = batch(unit);
    const CachedHead h = head(unit / batches_);
    const std::vector<int64_t> edges = sections(q.lowest(), q.last() + 1);
    k_.attend_section(h, q, edges[0], edges[1], states, scratch);
    for (size_t i = 1; i + 1 < edges.size(); ++i) {
      k_.attend_section(h, q, edges[i], edges[i + 1], later, scratch);
      for (int64_t r = 0; r < q.tokens * group_; ++r) k_.merge_states(states + r * stride_, later + r * stride_, c_.d_v);
    }
    for (int64_t r = 0; r < q.tokens * group_; ++r) finish(unit, q, r, states + r * stride_);
  }

  // Few queries over many keys: sections apart, then merged in their order.
  void spread(int64_t units, const std::vector<int64_t>& edges, int64_t work) {
    const int64_t n_sections = static_cast<int64_t>(edges.size()) - 1, block = rows() * stride_;
    float* parts = grown(attention_buffers().parts, units * n_sections * block);
    each(units * n_sections, work, [&](int64_t part, int thread) {
      const int64_t unit = part / n_sections, section = part % n_sections;
      float* scratch = static_cast<float*>(pool_.scratch(thread)) + 2 * block;
      k_.attend_section(head(unit / batches_), batch(unit), edges[static_cast<size_t>(section)],
                        edges[static_cast<size_t>(section) + 1], parts + part * block, scratch);
    });
    each(units, units * n_sections * block * 4, [&](int64_t unit, int) {
      const Queries q = batch(unit);
      for (int64_t r = 0; r < q.tokens * group_; ++r) {
        float* first = parts + unit * n_sections * block + r * stride_;
        for (int64_t s = 1; s < n_sections; ++s) k_.merge_states(first, first + s * block, c_.d_v);
        finish(unit, q, r, first);
      }
    });
  }

  void finish(int64_t unit, const Queries& q, int64_t r, const float* states) const {
    const int64_t head = unit / batches_ * group_ + r % group_;
    const int64_t token = q.position - c_.position + r / group_;
    k_.finish_state(states, c_.sink ? c_.sink + head : nullptr, c_.d_v,
                    c_.out + (token * c_.heads + head) * c_.d_v);
  }

  const AttendCall& c_;
  const int64_t group_, width_, stride_, tokens_, batches_;
  const Kernels& k_;
  Pool& pool_;
  float* queries_;
};

}  // namespace

void attend(const AttendCall& call) {
  std::lock_guard<std::mutex> turn(Pool::instance().turn());
  Attention(call).run();
}

}  // namespace localmimo
