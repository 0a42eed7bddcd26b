// The router's inner loops, written once over a policy V (see product.h), whose kDotRows are rows of a tile.
#pragma once
#include <cstdint>
#include <cstring>

#include "exponential.h"
#include "inline.h"

namespace localmimo {
namespace {

// out[r * n_experts + e] = x[r] . w[e], sixteen lanes of fma, then the lanes in order

template <class V, int rows, int experts>
void dot_tile(const float* x, const float* w, int64_t n, int64_t n_experts, float* out) {
  typename V::F sum[rows][experts];
  for (int r = 0; r < rows; ++r)
    for (int e = 0; e < experts; ++e) sum[r][e] = V::zero();
  const auto step = [&](const float* a, const float* b, int64_t stride) LM_INLINE_LAMBDA {
    typename V::F left[rows];
    for (int r = 0; r < rows; ++r) left[r] = V::load(a + r * stride);
    for (int e = 0; e < experts; ++e) {
      const typename V::F right = V::load(b + e * stride);
      for (int r = 0; r < rows; ++r) sum[r][e] = V::fma(left[r], right, sum[r][e]);
    }
  };
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) step(x + i, w + i, n);
  if (i < n) {
    float a[rows * 16] = {}, b[experts * 16] = {};
    for (int r = 0; r < rows; ++r) std::memcpy(a + 16 * r, x + r * n + i, sizeof(float) * static_cast<size_t>(n - i));
    for (int e = 0; e < experts; ++e) std::memcpy(b + 16 * e, w + e * n + i, sizeof(float) * static_cast<size_t>(n - i));
    step(a, b, 16);
  }
  for (int r = 0; r < rows; ++r)
    for (int e = 0; e < experts; ++e) {
      float lanes[16], total = 0.0f;
      V::store(lanes, sum[r][e]);
      for (float lane : lanes) total += lane;
      out[r * n_experts + e] = total;
    }
}

template <class V, int most, int experts>
void dot_rows(const float* x, const float* w, int64_t rows, int64_t n, int64_t n_experts, float* out) {
  for (; rows >= most; rows -= most, x += most * n, out += most * n_experts)
    dot_tile<V, most, experts>(x, w, n, n_experts, out);
  if constexpr (most > 1) {
    if (rows > 0) dot_rows<V, most - 1, experts>(x, w, rows, n, n_experts, out);
  }
}

template <class V>
void dots(const float* x, const float* w, int64_t rows, int64_t experts, int64_t n, int64_t n_experts, float* out) {
  for (; experts >= 4; experts -= 4, w += 4 * n, out += 4) dot_rows<V, V::kDotRows, 4>(x, w, rows, n, n_experts, out);
  for (; experts > 0; --experts, w += n, ++out) dot_rows<V, V::kDotRows, 1>(x, w, rows, n, n_experts, out);
}

template <class V>
void sigmoid(float* x, int64_t n) {  // n is a multiple of 16
  for (int64_t i = 0; i < n; i += 16) {
    const typename V::F e = exponential<V>(V::sub(V::zero(), V::load(x + i)));
    V::store(x + i, V::div(V::set1(1.0f), V::add(V::set1(1.0f), e)));
  }
}

}  // namespace
}  // namespace localmimo
