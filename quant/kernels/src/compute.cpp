#include "compute.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "activations.h"
#include "dispatch.h"
#include "pool.h"

namespace localmimo {
namespace {

constexpr int kTokens = 64;  // of one product call: at 4096 columns their activations fill half a level-2 cache
constexpr int64_t kUnits = 8;    // per thread, at the least, where there are so many strips
constexpr int64_t kShortest = 4, kLongest = 16;  // strips of the longest unit, for many tokens and for few
constexpr int64_t kAlone = 96 << 10;  // multiplications of some microseconds: one thread is done before two have met
// Per thread: what product() uses, then two arrays of floats [strips of a unit][tokens][kStrip].
constexpr size_t kOutputs = kShortest * kTokens * kStrip;
constexpr size_t kThreadBytes = kScratchBytes + 2 * sizeof(float) * kOutputs;

struct Scratch {
  void* panel;
  float *first, *second;
  explicit Scratch(void* memory)
      : panel(memory),
        first(reinterpret_cast<float*>(static_cast<char*>(memory) + kScratchBytes)),
        second(first + kOutputs) {}
};

// Pointers to the quantised rows of a list of tokens.
struct ActivationRows {
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
  ActivationPointers at(int64_t i) const { return {codes.data() + i, scales.data() + i}; }
};

// What a call keeps for the next one; guarded by the pool's turn.
struct ComputeBuffers {
  Activations x, inner;
  ActivationRows rows, inner_rows;
};

ComputeBuffers& compute_buffers() {
  static ComputeBuffers* s = new ComputeBuffers;
  return *s;
}

// Where the bytes of a strip begin, or of the end of the matrix.
struct StripAddress {
  const uint8_t *codes = nullptr, *scales = nullptr;
};

StripAddress strip_address(const Matrix& w, int64_t strip) {
  const int64_t block = std::min(2 * strip, row_groups(w.rows)) * blocks(w.format, w.cols);
  return {w.codes + block * codes_per_block(w.format), w.scales + block * scales_per_block(w.format)};
}

ReadAhead read_ahead(const StripAddress& end, const StripAddress& next) { return {{end.codes, next.codes}, {end.scales, next.scales}}; }

// Strips of one unit: at the start of each the hardware's prefetchers begin anew (on Zen 4 with two threads and a read
// of 57 GB/s, one token: 0.80 of it in nf4 and 0.88 in int8 by 4 strips, 0.87 and 0.97 by 16), and strips that share
// activations save reading them; many units balance the threads.
int64_t unit_strips(int64_t n_strips, int threads, int64_t n_tokens) {
  const int64_t longest = std::clamp<int64_t>(kShortest * kTokens / std::max<int64_t>(n_tokens, 1), kShortest, kLongest);
  return std::clamp<int64_t>(n_strips / (kUnits * threads), 1, longest);
}

int64_t strips(int64_t rows) { return ceil_div(rows, kStrip); }

// Puts n outputs from index `at` of y on.
void put(const Kernels& k, const float* from, int64_t n, void* y, bool half, int64_t at) {
  if (half) {
    k.to_bf16(from, n, static_cast<uint16_t*>(y) + at);
  } else {
    std::memcpy(static_cast<float*>(y) + at, from, sizeof(float) * static_cast<size_t>(n));
  }
}

Matrix part(const uint8_t* page, const PageShape& shape, const PageShape::Part& at, int64_t rows, int64_t cols) {
  const float* scale = at.scale < 0 ? nullptr : reinterpret_cast<const float*>(page + at.scale);
  return {shape.format, rows, cols, page + at.codes, page + at.scales, scale};
}

class LayerCall {
 public:
  LayerCall(const PageShape& shape, const Routing& routing, float* out)
      : shape_(shape), routing_(routing), out_(out), k_(kernels()), pool_(Pool::instance()), s_(compute_buffers()) {}

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
    inner_phase();
    outer_phase();
  }

 private:
  void inner_phase() {
    const int64_t inner = padded_cols(shape_.inner) / kStrip;
    const int64_t wide = unit_strips(inner * routing_.n_experts, pool_.threads(), max_tokens());
    const int64_t per_expert = ceil_div(inner, wide);
    pool_.run(routing_.n_experts * per_expert, [&](int64_t unit, int64_t next, int thread) {
      const int64_t first = unit % per_expert * wide, last = std::min(first + wide, inner);
      const StripAddress on = next < 0 ? StripAddress{} : strip_address(gate(next / per_expert), next % per_expert * wide);
      inner_strips(unit / per_expert, first, last, on, Scratch(pool_.scratch(thread)));
    }, 2 * matrix_work() <= kAlone);
  }

  void outer_phase() {
    const int64_t outer = strips(shape_.hidden), high = unit_strips(outer, pool_.threads(), max_tokens());
    pool_.run(ceil_div(outer, high), [&](int64_t unit, int64_t next, int thread) {
      const int64_t first = unit * high, last = std::min(first + high, outer);
      for (int64_t e = 0; e < routing_.n_experts; ++e) {
        const StripAddress on = e + 1 < routing_.n_experts ? strip_address(down(e + 1), first)
                         : next < 0                 ? StripAddress{}
                                                    : strip_address(down(0), next * high);
        outer_strips(e, first, last, on, Scratch(pool_.scratch(thread)));
      }
    }, matrix_work() <= kAlone);
  }

  Matrix gate(int64_t e) const { return part(routing_.pages[e], shape_, shape_.gate, shape_.inner, shape_.hidden); }
  Matrix up(int64_t e) const { return part(routing_.pages[e], shape_, shape_.up, shape_.inner, shape_.hidden); }
  Matrix down(int64_t e) const { return part(routing_.pages[e], shape_, shape_.down, shape_.hidden, shape_.inner); }

  int64_t matrix_work() const { return routing_.first[routing_.n_experts] * shape_.hidden * shape_.inner; }

  int64_t max_tokens() const {
    int64_t most = 0;
    for (int64_t e = 0; e < routing_.n_experts; ++e)
      most = std::max(most, routing_.first[e + 1] - routing_.first[e]);
    return most;
  }

  // 32 inner columns per strip of one expert: gate, up, SiLU, and quantised for `down`.
  void inner_strips(int64_t e, int64_t first, int64_t last, const StripAddress& next, Scratch scratch) {
    const int64_t begin = routing_.first[e], end = routing_.first[e + 1];
    const Matrix g = gate(e), u = up(e);
    const ReadAhead gates = read_ahead(strip_address(g, last), strip_address(u, first)), ups = read_ahead(strip_address(u, last), next);
    for (int64_t i = begin; i < end; i += kTokens) {
      const int n = static_cast<int>(std::min<int64_t>(kTokens, end - i));
      const int true_strips = static_cast<int>(std::min(last, strips(shape_.inner)) - first);
      if (true_strips > 0) {
        k_.product(g, first, true_strips, s_.rows.at(i), n, scratch.first, scratch.panel, gates);
        k_.product(u, first, true_strips, s_.rows.at(i), n, scratch.second, scratch.panel, ups);
      }
      for (int64_t s = first; s < last; ++s)
        for (int t = 0; t < n; ++t) {
          const int64_t at = ((s - first) * n + t) * kStrip;
          activate(scratch.first + at, scratch.second + at, i + t, s);
        }
    }
  }

  // A strip beyond the true rows is padding of the activations: zeros.
  void activate(const float* gate, const float* up, int64_t pair, int64_t strip) {
    const int64_t rows = std::clamp<int64_t>(shape_.inner - strip * kStrip, 0, kStrip);
    alignas(64) float g[64] = {}, u[kStrip] = {};
    std::memcpy(g, gate, sizeof(float) * static_cast<size_t>(rows));
    std::memcpy(u, up, sizeof(float) * static_cast<size_t>(rows));
    k_.silu_mul(g, u, kStrip);
    int16_t codes[64];  // quantise works on 64 columns; the second half of them is padding here
    float scales[2];
    k_.quantise(g, kStrip, activation_top(shape_.format), codes, scales);
    std::memcpy(s_.inner.codes(pair) + strip * kStrip, codes, sizeof(int16_t) * kStrip);
    s_.inner.scales(pair)[strip] = scales[0];
  }

  // 32 output columns per strip of one expert, weighted and added.
  void outer_strips(int64_t e, int64_t first, int64_t last, const StripAddress& next, Scratch scratch) {
    const int64_t begin = routing_.first[e], end = routing_.first[e + 1];
    const Matrix w = down(e);
    const ReadAhead on = read_ahead(strip_address(w, last), next);
    for (int64_t i = begin; i < end; i += kTokens) {
      const int n = static_cast<int>(std::min<int64_t>(kTokens, end - i));
      k_.product(w, first, static_cast<int>(last - first), s_.inner_rows.at(i), n, scratch.first, scratch.panel, on);
      for (int64_t s = first; s < last; ++s)
        for (int t = 0; t < n; ++t) add_output(scratch.first + ((s - first) * n + t) * kStrip, i + t, s);
    }
  }

  void add_output(const float* from, int64_t pair, int64_t strip) {
    const int64_t rows = std::min<int64_t>(kStrip, shape_.hidden - strip * kStrip);
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
  ComputeBuffers& s_;
};

}  // namespace

void linear(const Matrix& w, const void* x, bool half, int64_t n, void* y) {
  Pool& pool = Pool::instance();
  std::lock_guard<std::mutex> turn(pool.turn());
  const Kernels& k = kernels();
  ComputeBuffers& s = compute_buffers();
  pool.reserve(kThreadBytes);
  s.x.fill(pool, k, x, half, n, w.cols, w.format);
  s.rows.clear();
  for (int64_t i = 0; i < n; ++i) s.rows.add(s.x, i);
  const int64_t n_strips = strips(w.rows);
  const int64_t high = unit_strips(n_strips, pool.threads(), n);
  pool.run(ceil_div(n_strips, high), [&](int64_t unit, int64_t next, int thread) {
    const Scratch scratch(pool.scratch(thread));
    const int64_t first = unit * high, last = std::min(first + high, n_strips);
    const ReadAhead on = read_ahead(strip_address(w, last), next < 0 ? StripAddress{} : strip_address(w, next * high));
    for (int64_t i = 0; i < n; i += kTokens) {
      const int count = static_cast<int>(std::min<int64_t>(kTokens, n - i));
      k.product(w, first, static_cast<int>(last - first), s.rows.at(i), count, scratch.first, scratch.panel, on);
      for (int64_t strip = first; strip < last; ++strip)
        for (int t = 0; t < count; ++t)
          put(k, scratch.first + ((strip - first) * count + t) * kStrip,
              std::min<int64_t>(kStrip, w.rows - strip * kStrip),
              y, half, (i + t) * w.rows + strip * kStrip);
    }
  }, w.rows * w.cols * n <= kAlone);
}

void add_in_order(const float* terms, int64_t n, int64_t k, int64_t width, float* out) {
  Pool& pool = Pool::instance();
  std::lock_guard<std::mutex> turn(pool.turn());
  pool.run(n, [&](int64_t row, int64_t, int) {
    const float* from = terms + row * k * width;
    float* to = out + row * width;
    std::memcpy(to, from, sizeof(float) * static_cast<size_t>(width));
    for (int64_t i = 1; i < k; ++i)
      for (int64_t j = 0; j < width; ++j) to[j] += from[i * width + j];
  }, n * k * width <= kAlone);
}

double encode(const Book& book, Format f, const float* w, int64_t rows, int64_t cols, float scale, uint8_t* codes,
              uint8_t* scales) {
  Pool& pool = Pool::instance();
  std::lock_guard<std::mutex> turn(pool.turn());
  const Kernels& k = kernels();
  std::vector<double> errors(static_cast<size_t>(row_groups(rows)));
  pool.run(row_groups(rows), [&](int64_t group, int64_t, int) {
    const int64_t first = group * kLanes;
    errors[static_cast<size_t>(group)] =
        k.encode(book, f, w + first * cols, std::min<int64_t>(kLanes, rows - first), cols, scale,
                 codes + group * codes_bytes(f, 1, cols), scales + group * scales_bytes(f, 1, cols));
  });
  double sum = 0;
  for (double error : errors) sum += error;
  return sum;
}

uint64_t read_all(const uint8_t* data, size_t n) {
  constexpr size_t kPiece = 1 << 20;
  Pool& pool = Pool::instance();
  std::lock_guard<std::mutex> turn(pool.turn());
  const Kernels& k = kernels();
  std::vector<uint64_t> sums(n / kPiece);
  pool.run(static_cast<int64_t>(sums.size()), [&](int64_t piece, int64_t, int) {
    sums[static_cast<size_t>(piece)] = k.read(data + static_cast<size_t>(piece) * kPiece, kPiece);
  });
  uint64_t all = 0;
  for (uint64_t sum : sums) all ^= sum;
  return all;
}

void experts(const PageShape& shape, const Routing& routing, const void* x, bool half, int64_t n, float* out) {
  std::lock_guard<std::mutex> turn(Pool::instance().turn());
  LayerCall(shape, routing, out).run(x, half, n);
}

}  // namespace localmimo
