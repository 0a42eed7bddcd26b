// Norms and the router: rows of activations, a few dozen microseconds a layer.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "attention.h"
#include "dispatch.h"
#include "pool.h"

namespace localmimo {
namespace {

constexpr int64_t kSmall = 200000;   // additions below which a hand-over to the pool costs more than it gains
constexpr int64_t kExperts = 16;     // of a unit of the router
constexpr int64_t kRouteRows = 64;   // tokens of a unit of the router

template <class Unit>
void each(int64_t n, int64_t work, Unit unit) {
  if (work < kSmall) {
    for (int64_t i = 0; i < n; ++i) unit(i);
  } else {
    Pool::instance().run(n, [&](int64_t i, int64_t, int) { unit(i); });
  }
}

// Sixteen partial sums, added in order: the same on every machine.
float sum_of_squares(const float* x, int64_t n) {
  float lanes[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int j = 0; j < 16; ++j) lanes[j] += x[i + j] * x[i + j];
  for (int j = 0; i < n; ++i, ++j) lanes[j] += x[i] * x[i];
  float total = 0.0f;
  for (float lane : lanes) total += lane;
  return total;
}

void norm_row(float* x, const float* add, const float* weight, float eps, int64_t n, float* out) {
  if (add)
    for (int64_t i = 0; i < n; ++i) x[i] += add[i];
  const float by = 1.0f / std::sqrt(sum_of_squares(x, n) / static_cast<float>(n) + eps);
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * by * weight[i];
}

// The best k of a row, by score + bias; of equals the lower expert. Ascending, with their weights.
void choose(const RouteCall& c, const float* scores, int64_t row) {
  std::vector<std::pair<float, int64_t>> order(static_cast<size_t>(c.n_experts));
  for (int64_t e = 0; e < c.n_experts; ++e) order[static_cast<size_t>(e)] = {scores[e] + c.bias[e], e};
  std::partial_sort(order.begin(), order.begin() + c.top_k, order.end(), [](const auto& a, const auto& b) {
    return a.first > b.first || (a.first == b.first && a.second < b.second);
  });
  int64_t* chosen = c.chosen + row * c.top_k;
  for (int64_t i = 0; i < c.top_k; ++i) chosen[i] = order[static_cast<size_t>(i)].second;
  std::sort(chosen, chosen + c.top_k);
  float sum = 0.0f, *weights = c.weights + row * c.top_k;
  for (int64_t i = 0; i < c.top_k; ++i) sum += weights[i] = scores[chosen[i]];
  for (int64_t i = 0; i < c.top_k; ++i)
    weights[i] = (c.normalise ? weights[i] / (sum + 1e-20f) : weights[i]) * c.scale;
}

}  // namespace

void rms_norm(float* x, const float* add, const float* weight, float eps, int64_t n, int64_t hidden, float* out) {
  std::lock_guard<std::mutex> turn(Pool::instance().turn());
  each(n, n * hidden, [&](int64_t i) {
    norm_row(x + i * hidden, add ? add + i * hidden : nullptr, weight, eps, hidden, out + i * hidden);
  });
}

void route(const RouteCall& c) {
  std::lock_guard<std::mutex> turn(Pool::instance().turn());
  static std::vector<float>* memory = new std::vector<float>;
  const int64_t wide = padded16(c.n_experts), bands = (c.n_experts + kExperts - 1) / kExperts;
  const int64_t batches = (c.n + kRouteRows - 1) / kRouteRows;
  memory->assign(static_cast<size_t>(c.n * wide), 0.0f);
  float* scores = memory->data();
  const Kernels& k = kernels();
  each(bands * batches, c.n * c.n_experts * c.hidden, [&](int64_t unit) {
    const int64_t first = unit % bands * kExperts, row = unit / bands * kRouteRows;
    k.dots(c.x + row * c.hidden, c.weight + first * c.hidden, std::min(kRouteRows, c.n - row),
           std::min(kExperts, c.n_experts - first), c.hidden, wide, scores + row * wide + first);
  });
  each(c.n, c.n * c.n_experts * 16, [&](int64_t row) {
    k.sigmoid(scores + row * wide, wide);
    choose(c, scores + row * wide, row);
  });
}

}  // namespace localmimo
