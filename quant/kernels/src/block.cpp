#include "block.h"

#include <cstring>
#include <mutex>

#include "bf16.h"
#include "compute.h"
#include "dispatch.h"
#include "pool.h"

namespace localmimo {
namespace {

constexpr int64_t kSmall = 200000;  // elements below which a hand-over to the pool costs more than it gains

struct BlockBuffers {
  std::mutex turn;
  std::vector<float> normed, wide, mixed, result, inner;
};

BlockBuffers& block_buffers() {
  static BlockBuffers* m = new BlockBuffers;
  return *m;
}

float* grown(std::vector<float>& v, int64_t n) {
  if (static_cast<int64_t>(v.size()) < n) v.resize(static_cast<size_t>(n));
  return v.data();
}

// A prompt's buffers are not kept: they are as large as the plan's workspace, which others use too.
void shrink(BlockBuffers& m, int64_t n) {
  if (n > 64)
    for (std::vector<float>* v : {&m.normed, &m.wide, &m.mixed, &m.result, &m.inner}) std::vector<float>().swap(*v);
}

void for_rows(int64_t n, int64_t width, const std::function<void(int64_t)>& row) {
  Pool& pool = Pool::instance();
  std::lock_guard<std::mutex> turn(pool.turn());
  if (n * width < kSmall) {
    for (int64_t i = 0; i < n; ++i) row(i);
  } else {
    pool.run(n, [&](int64_t i, int64_t, int) { row(i); });
  }
}

// `from` and `to` may be the same.
void round_to_bf16(const float* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = from_bf16(to_bf16(from[i]));
}

void silu(float* gate, const float* up, int64_t n) {
  const Kernels& k = kernels();
  const int64_t whole = n / 16 * 16;
  k.silu_mul(gate, up, whole);
  if (whole == n) return;
  float g[16] = {}, u[16] = {};
  std::memcpy(g, gate + whole, sizeof(float) * static_cast<size_t>(n - whole));
  std::memcpy(u, up + whole, sizeof(float) * static_cast<size_t>(n - whole));
  k.silu_mul(g, u, 16);
  std::memcpy(gate + whole, g, sizeof(float) * static_cast<size_t>(n - whole));
}

void attention(const LayerBlock& b, const std::vector<SequenceRows>& sequences, const float* joined, float* mixed) {
  for (const SequenceRows& p : sequences) {
    attend({p.n, b.heads, b.kv_heads, b.d_k, b.d_v, p.rotary, p.position, b.window, joined, p.cos, p.sin,
            b.value_scale, b.scale, p.store, p.keys, p.values, p.rows, p.first, p.rows, b.sink, mixed});
    joined += p.n * b.qkv.rows;
    mixed += p.n * b.o.cols;
  }
}

void choose(const LayerBlock& b, int64_t n, const float* normed, BlockBuffers& m, int64_t* chosen, float* weights) {
  const float* x = normed;
  if (b.rounded) {
    float* rounded = grown(m.normed, n * b.hidden);
    round_to_bf16(normed, n * b.hidden, rounded);
    x = rounded;
  }
  route({n, b.hidden, b.n_experts, b.top_k, x, b.router, b.bias, b.routed_scale, b.normalise, chosen, weights});
}

void dense(const LayerBlock& b, int64_t n, BlockBuffers& m, float* x, float* result) {
  const int64_t inner = b.gate.rows;
  float *gate = grown(m.wide, n * inner), *up = grown(m.inner, n * inner);
  linear(b.gate, m.normed.data(), false, n, gate);
  linear(b.up, m.normed.data(), false, n, up);
  for_rows(n, inner, [&](int64_t i) { silu(gate + i * inner, up + i * inner, inner); });
  linear(b.down, gate, false, n, result);
  for_rows(n, b.hidden, [&](int64_t i) {
    for (int64_t j = i * b.hidden; j < (i + 1) * b.hidden; ++j) x[j] += result[j];
  });
}

}  // namespace

void run_block(const LayerBlock& b, const std::vector<SequenceRows>& sequences, float* x, float* normed, int64_t* chosen,
               float* weights) {
  BlockBuffers& m = block_buffers();
  std::lock_guard<std::mutex> turn(m.turn);
  int64_t n = 0;
  for (const SequenceRows& p : sequences) n += p.n;
  float *first = grown(m.normed, n * b.hidden), *joined = grown(m.wide, n * b.qkv.rows);
  float *mixed = grown(m.mixed, n * b.o.cols), *result = grown(m.result, n * b.hidden);
  rms_norm(x, nullptr, b.attn_norm, b.eps, n, b.hidden, first);
  linear(b.qkv, first, false, n, joined);
  attention(b, sequences, joined, mixed);
  linear(b.o, mixed, false, n, result);
  rms_norm(x, result, b.mlp_norm, b.eps, n, b.hidden, b.routed ? normed : first);
  if (b.routed) choose(b, n, normed, m, chosen, weights);
  else dense(b, n, m, x, result);
  shrink(m, n);
}

}  // namespace localmimo
