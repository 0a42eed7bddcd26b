#include "compute.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "activations.h"
#include "dispatch.h"
#include "pool.h"

namespace localmimo {
namespace {

constexpr int kTokens = 192;  // tokens of one product call: a multiple of every register tile
// Per thread: what product() uses, then two [kTokens][kStrip] tiles of floats.
constexpr size_t kThreadBytes = kScratchBytes + 2 * sizeof(float) * kTokens * kStrip;

struct Scratch {
  void* panel;
  float *first, *second;
  explicit Scratch(void* memory)
      : panel(memory),
        first(reinterpret_cast<float*>(static_cast<char*>(memory) + kScratchBytes)),
        second(first + kTokens * kStrip) {}
};

// Pointers to the quantised rows of a list of tokens.
struct RowList {
  std::vector<const int16_t*> codes;
  std::vector<const float*> scales;
  void clear() {
    codes.clear();
    scales.clear();
  }
  void add(Activations& from, int64_t i) {
    codes.push_back(from.codes(i));
    scales.push_back(from.scales(i));
  }
  Rows at(int64_t i) const { return {codes.data() + i, scales.data() + i}; }
};

// What a call keeps for the next one; guarded by the pool's turn.
struct State {
  Activations x, inner;
  RowList rows, inner_rows;
};

State& state() {
  static State* s = new State;
  return *s;
}

int64_t strips(int64_t rows) { return ceil_div(rows, kStrip); }

// Runs product on the strip that starts at row 32 * strip; returns how many of its rows are true ones.
int64_t strip_product(const Kernels& k, const Matrix& w, int64_t strip, const Rows& x, int n, float* out,
                      void* panel) {
  const int64_t group = 2 * strip;
  const int n_groups = static_cast<int>(std::min<int64_t>(2, row_groups(w.rows) - group));
  k.product(w, group, n_groups, x, n, out, panel);
  return std::min<int64_t>(kStrip, w.rows - strip * kStrip);
}

Matrix part(const uint8_t* page, const PageShape& shape, const PageShape::Part& at, int64_t rows, int64_t cols) {
  const float* scale = at.scale < 0 ? nullptr : reinterpret_cast<const float*>(page + at.scale);
  return {shape.format, rows, cols, page + at.codes, page + at.scales, scale};
}

class LayerCall {
 public:
  LayerCall(const PageShape& shape, const Routing& routing, float* out)
      : shape_(shape), routing_(routing), out_(out), k_(kernels()), pool_(Pool::instance()), s_(state()) {}

  void run(const void* x, bool half, int64_t n) {
    const int64_t pairs = routing_.first[routing_.n_experts];
    pool_.reserve(kThreadBytes);
    s_.x.fill(pool_, k_, x, half, n, shape_.hidden, shape_.format);
    s_.inner.resize(pairs, shape_.inner);
    s_.rows.clear();
    s_.inner_rows.clear();
    for (int64_t i = 0; i < pairs; ++i) {
      s_.rows.add(s_.x, routing_.token[i]);
      s_.inner_rows.add(s_.inner, i);
    }
    const int64_t per_expert = padded_cols(shape_.inner) / kStrip;
    pool_.run(routing_.n_experts * per_expert, [&](int64_t unit, int thread) {
      inner_strip(unit / per_expert, unit % per_expert, Scratch(pool_.scratch(thread)));
    });
    pool_.run(strips(shape_.hidden), [&](int64_t strip, int thread) {
      for (int64_t e = 0; e < routing_.n_experts; ++e) outer_strip(e, strip, Scratch(pool_.scratch(thread)));
    });
  }

 private:
  // 32 inner columns of one expert: gate, up, SiLU, and quantised for `down`.
  void inner_strip(int64_t e, int64_t strip, Scratch scratch) {
    const int64_t begin = routing_.first[e], end = routing_.first[e + 1];
    const Matrix gate = part(routing_.pages[e], shape_, shape_.gate, shape_.inner, shape_.hidden);
    const Matrix up = part(routing_.pages[e], shape_, shape_.up, shape_.inner, shape_.hidden);
    const int top = activation_top(shape_.format);
    for (int64_t i = begin; i < end; i += kTokens) {
      const int n = static_cast<int>(std::min<int64_t>(kTokens, end - i));
      int64_t true_rows = 0;  // a strip beyond the end is padding of the activations only
      if (strip < strips(shape_.inner)) {
        true_rows = strip_product(k_, gate, strip, s_.rows.at(i), n, scratch.first, scratch.panel);
        strip_product(k_, up, strip, s_.rows.at(i), n, scratch.second, scratch.panel);
      }
      for (int t = 0; t < n; ++t)
        activate(scratch.first + t * kStrip, scratch.second + t * kStrip, true_rows, i + t, strip, top);
    }
  }

  void activate(float* gate, float* up, int64_t true_rows, int64_t pair, int64_t strip, int top) {
    alignas(64) float h[64] = {};
    std::memcpy(h, gate, sizeof(float) * static_cast<size_t>(true_rows));
    std::fill(up + true_rows, up + kStrip, 0.0f);
    k_.silu_mul(h, up, kStrip);
    int16_t codes[64];  // quantise works on 64 columns; the second half of them is padding here
    float scales[2];
    k_.quantise(h, kStrip, top, codes, scales);
    std::memcpy(s_.inner.codes(pair) + strip * kStrip, codes, sizeof(int16_t) * kStrip);
    s_.inner.scales(pair)[strip] = scales[0];
  }

  // 32 output columns of one expert, weighted and added.
  void outer_strip(int64_t e, int64_t strip, Scratch scratch) {
    const int64_t begin = routing_.first[e], end = routing_.first[e + 1];
    const Matrix down = part(routing_.pages[e], shape_, shape_.down, shape_.hidden, shape_.inner);
    for (int64_t i = begin; i < end; i += kTokens) {
      const int n = static_cast<int>(std::min<int64_t>(kTokens, end - i));
      const int64_t rows = strip_product(k_, down, strip, s_.inner_rows.at(i), n, scratch.first, scratch.panel);
      for (int t = 0; t < n; ++t) deliver(scratch.first + t * kStrip, rows, i + t, strip);
    }
  }

  void deliver(const float* from, int64_t rows, int64_t pair, int64_t strip) {
    float* to = out_ + routing_.to[pair] * shape_.hidden + strip * kStrip;
    const float weight = routing_.weight[pair];
    if (routing_.store) {
      for (int64_t r = 0; r < rows; ++r) to[r] = weight * from[r];
    } else {
      for (int64_t r = 0; r < rows; ++r) to[r] += weight * from[r];
    }
  }

  const PageShape& shape_;
  const Routing& routing_;
  float* out_;
  const Kernels& k_;
  Pool& pool_;
  State& s_;
};

}  // namespace

void linear(const Matrix& w, const void* x, bool half, int64_t n, float* y) {
  Pool& pool = Pool::instance();
  std::lock_guard<std::mutex> turn(pool.turn());
  const Kernels& k = kernels();
  State& s = state();
  pool.reserve(kThreadBytes);
  s.x.fill(pool, k, x, half, n, w.cols, w.format);
  s.rows.clear();
  for (int64_t i = 0; i < n; ++i) s.rows.add(s.x, i);
  pool.run(strips(w.rows), [&](int64_t strip, int thread) {
    const Scratch scratch(pool.scratch(thread));
    for (int64_t i = 0; i < n; i += kTokens) {
      const int count = static_cast<int>(std::min<int64_t>(kTokens, n - i));
      const int64_t rows = strip_product(k, w, strip, s.rows.at(i), count, scratch.first, scratch.panel);
      for (int t = 0; t < count; ++t)
        std::memcpy(y + (i + t) * w.rows + strip * kStrip, scratch.first + t * kStrip,
                    sizeof(float) * static_cast<size_t>(rows));
    }
  });
}

double encode(const Book& book, Format f, const float* w, int64_t rows, int64_t cols, float scale, uint8_t* codes,
              uint8_t* scales) {
  Pool& pool = Pool::instance();
  std::lock_guard<std::mutex> turn(pool.turn());
  const Kernels& k = kernels();
  std::vector<double> errors(static_cast<size_t>(row_groups(rows)));
  pool.run(row_groups(rows), [&](int64_t group, int) {
    const int64_t first = group * kLanes;
    errors[static_cast<size_t>(group)] =
        k.encode(book, f, w + first * cols, std::min<int64_t>(kLanes, rows - first), cols, scale,
                 codes + group * codes_bytes(f, 1, cols), scales + group * scales_bytes(f, 1, cols));
  });
  double sum = 0;
  for (double error : errors) sum += error;
  return sum;
}

void experts(const PageShape& shape, const Routing& routing, const void* x, bool half, int64_t n, float* out) {
  std::lock_guard<std::mutex> turn(Pool::instance().turn());
  LayerCall(shape, routing, out).run(x, half, n);
}

}  // namespace localmimo
