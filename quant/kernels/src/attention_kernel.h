// Attention's inner loop, written once over a policy V that names the vector operations of one instruction set.
// Included by product.h for isa_*.cpp only, and kept in an unnamed namespace like it.
//
// Beyond what product.h asks for, V has: Words (16 words of 32 bits), transpose, low_half, high_half, whole, byte,
// bits, widen_bf16, widen_int8, maximum, top, the register tile kRows x kCols of a product, and kFewRows and kFewTile,
// rows of queries and vectors of values, of the path for few queries.
#pragma once
#include <cstdint>
#include <cstring>

#include "attention.h"
#include "inline.h"

namespace localmimo {
namespace {

template <class V>
typename V::F exponential(typename V::F x);  // product.h

constexpr float kNothing = -3.0e38f;  // a score that was never taken

// ---- c [rows][16 cols] (+)= a [rows][depth] b [depth][16 cols]; every element is one chain of fma over depth

struct Product {
  const float *a, *b;
  float* c;
  int64_t lda, ldb, ldc, depth;
  bool add;
};

template <class V, int rows, int cols>
void product_tile(const Product& p, int64_t row, int64_t col) {
  const float* a = p.a + row * p.lda;
  const float* b = p.b + col * 16;
  float* c = p.c + row * p.ldc + col * 16;
  typename V::F sum[rows][cols];
  for (int r = 0; r < rows; ++r)
    for (int j = 0; j < cols; ++j) sum[r][j] = p.add ? V::load(c + r * p.ldc + 16 * j) : V::zero();
  for (int64_t t = 0; t < p.depth; ++t) {
    typename V::F right[cols];
    for (int j = 0; j < cols; ++j) right[j] = V::load(b + t * p.ldb + 16 * j);
    for (int r = 0; r < rows; ++r) {
      const typename V::F left = V::set1(a[r * p.lda + t]);
      for (int j = 0; j < cols; ++j) sum[r][j] = V::fma(left, right[j], sum[r][j]);
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int j = 0; j < cols; ++j) V::store(c + r * p.ldc + 16 * j, sum[r][j]);
}

template <class V, int most, int cols>
void product_rows(const Product& p, int64_t row, int64_t rows, int64_t col) {
  for (; rows >= most; rows -= most, row += most) product_tile<V, most, cols>(p, row, col);
  if constexpr (most > 1) {
    if (rows > 0) product_rows<V, most - 1, cols>(p, row, rows, col);
  }
}

template <class V, int most>
void product_cols(const Product& p, int64_t rows, int64_t col, int64_t cols) {
  for (; cols >= most; cols -= most, col += most) product_rows<V, V::kRows, most>(p, 0, rows, col);
  if constexpr (most > 1) {
    if (cols > 0) product_cols<V, most - 1>(p, rows, col, cols);
  }
}

template <class V>
void dense_product(const Product& p, int64_t rows, int64_t cols) {
  product_cols<V, V::kCols>(p, rows, 0, cols);
}

// ---- packing: keys of 16 positions across the lanes, values widened

// Calls use(word, words) for the 32-bit words of sixteen rows of `n` bytes; reads nothing beyond them.
template <class V, class Use>
LM_INLINE void across(const uint8_t* const* rows, int64_t n, int64_t ahead, Use use) {
  typename V::Words words[16];
  int64_t at = 0;
  for (; at + 64 <= n; at += 64) {
    if (ahead)
      for (int i = 0; i < 16; ++i) V::template prefetch<64>(rows[i] + at + ahead);
    V::transpose(rows, at, words);
    for (int w = 0; w < 16; ++w) use(at / 4 + w, words[w]);
  }
  if (at == n) return;
  uint8_t tail[16][64] = {};
  const uint8_t* tails[16];
  for (int i = 0; i < 16; ++i) {
    std::memcpy(tail[i], rows[i] + at, static_cast<size_t>(n - at));
    tails[i] = tail[i];
  }
  V::transpose(tails, 0, words);
  for (int w = 0; 4 * w < n - at; ++w) use(at / 4 + w, words[w]);
}

// out[d * kKeys + lane] for sixteen rows of d_k values; the last word of a row may hold fewer values than fit.
template <class V>
void pack_keys(Store store, const uint8_t* const* rows, const float* scales, int64_t d_k, int64_t ahead, float* out) {
  if (store == Store::f32) {
    across<V>(rows, 4 * d_k, ahead, [&](int64_t w, const typename V::Words& x) LM_INLINE_LAMBDA {
      V::store(out + w * kKeys, V::whole(x));
    });
  } else if (store == Store::bf16) {
    across<V>(rows, 2 * d_k, ahead, [&](int64_t w, const typename V::Words& x) LM_INLINE_LAMBDA {
      V::store(out + 2 * w * kKeys, V::low_half(x));
      if (2 * w + 1 < d_k) V::store(out + (2 * w + 1) * kKeys, V::high_half(x));
    });
  } else {
    const typename V::F scale = V::load(scales);
    across<V>(rows, d_k, ahead, [&](int64_t w, const typename V::Words& x) LM_INLINE_LAMBDA {
      const typename V::F four[4] = {V::template byte<0>(x), V::template byte<1>(x), V::template byte<2>(x),
                                     V::template byte<3>(x)};
      for (int i = 0; i < 4; ++i)
        if (4 * w + i < d_k) V::store(out + (4 * w + i) * kKeys, V::mul(four[i], scale));
    });
  }
}

// Packs the keys of positions begin to end - 1 of the block at `start`; other lanes hold anything.
template <class V>
void pack_key_block(const Head& h, int64_t start, int64_t begin, int64_t end, float* out) {
  const int64_t size = row_bytes(h.store, h.d_k);
  for (int64_t lane = 0; lane < kKeys; lane += 16) {
    if (start + lane + 16 <= begin || start + lane >= end) continue;
    const uint8_t* rows[16];
    float scales[16] = {};
    for (int i = 0; i < 16; ++i) {
      int64_t p = start + lane + i;
      p = p < begin ? begin : p >= end ? end - 1 : p;
      rows[i] = h.keys + h.row(p) * size;
      if (h.store == Store::int8) std::memcpy(scales + i, rows[i] + h.d_k, sizeof(float));
    }
    pack_keys<V>(h.store, rows, scales, h.d_k, kKeys * size, out + lane);
  }
}

template <class V>
LM_INLINE typename V::F widen(Store store, const uint8_t* from, typename V::F scale) {
  if (store == Store::f32) return V::load(reinterpret_cast<const float*>(from));
  if (store == Store::bf16) return V::widen_bf16(from);
  return V::mul(V::widen_int8(from), scale);
}

template <class V, Store store>
void pack_value_row(const uint8_t* from, int64_t d_v, int64_t ahead, float* out) {
  float scale_of_row = 1.0f;
  if (store == Store::int8) std::memcpy(&scale_of_row, from + d_v, sizeof(float));
  const typename V::F scale = V::set1(scale_of_row);
  constexpr int64_t size = store == Store::f32 ? 4 : store == Store::bf16 ? 2 : 1;
  int64_t d = 0;
  for (; d + 16 <= d_v; d += 16) {
    V::template prefetch<16 * size>(from + d * size + ahead);
    V::store(out + d, widen<V>(store, from + d * size, scale));
  }
  if (d == d_v) return;
  float tail[16] = {};  // floats, because it may be read as such
  std::memcpy(tail, from + d * size, static_cast<size_t>((d_v - d) * size));
  V::store(out + d, widen<V>(store, reinterpret_cast<const uint8_t*>(tail), scale));
}

template <class V>
void pack_value_block(const Head& h, int64_t start, int64_t begin, int64_t end, float* out) {
  const int64_t size = row_bytes(h.store, h.d_v), wide = padded16(h.d_v), ahead = kKeys * size;
  for (int64_t p = begin; p < end; ++p) {
    const uint8_t* from = h.values + h.row(p) * size;
    float* to = out + (p - start) * wide;
    if (h.store == Store::f32) pack_value_row<V, Store::f32>(from, h.d_v, ahead, to);
    else if (h.store == Store::bf16) pack_value_row<V, Store::bf16>(from, h.d_v, ahead, to);
    else pack_value_row<V, Store::int8>(from, h.d_v, ahead, to);
  }
}

// ---- the running softmax

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

// Turns the scores [kKeys] of a row into weights against its running maximum; only begin to end - 1 are seen.
template <class V>
void soften(float* scores, int64_t begin, int64_t end, float* state, int64_t wide) {
  float *sums = state + wide, *most = sums + 16;
  for (int64_t i = 0; i < begin; ++i) scores[i] = kNothing;
  for (int64_t i = end; i < kKeys; ++i) scores[i] = kNothing;
  typename V::F s[4], highest;
  for (int j = 0; j < 4; ++j) s[j] = V::load(scores + 16 * j);
  highest = V::maximum(V::maximum(s[0], s[1]), V::maximum(s[2], s[3]));
  const float here = V::top(highest);
  if (here > *most) {
    if (*most > kNothing) scale_row<V>(state, wide + 16, exponential1<V>(*most - here));
    *most = here;
  }
  const typename V::F shift = V::set1(*most);
  for (int j = 0; j < 4; ++j) V::store(scores + 16 * j, exponential<V>(V::sub(s[j], shift)));
  for (int64_t i = 0; i < begin; ++i) scores[i] = 0.0f;
  for (int64_t i = end; i < kKeys; ++i) scores[i] = 0.0f;
  typename V::F sum = V::load(sums);
  for (int j = 0; j < 4; ++j) sum = V::add(sum, V::load(scores + 16 * j));
  V::store(sums, sum);
}

// ---- few queries: no packed copies, keys go from their transposition into the sums; the same chains of fma

// out[r * kKeys + lane] = q[r] . key of the lane, from sixteen keys' words.
template <class V, Store store, int rows>
void score_lanes(const float* words, const float* scales, const float* q, int64_t d_k, float* out) {
  constexpr int per_word = store == Store::f32 ? 1 : store == Store::bf16 ? 2 : 4;
  typename V::F sum[rows];
  for (int r = 0; r < rows; ++r) sum[r] = V::zero();
  const typename V::F scale = V::load(scales);
  const auto add = [&](int64_t d, typename V::F key) LM_INLINE_LAMBDA {
    for (int r = 0; r < rows; ++r) sum[r] = V::fma(V::set1(q[r * d_k + d]), key, sum[r]);
  };
  int64_t d = 0;
  for (; d + per_word <= d_k; d += per_word) {
    const typename V::Words x = V::bits(V::load(words + d / per_word * 16));
    if constexpr (store == Store::f32) {
      add(d, V::whole(x));
    } else if constexpr (store == Store::bf16) {
      add(d, V::low_half(x));
      add(d + 1, V::high_half(x));
    } else {
      add(d, V::mul(V::template byte<0>(x), scale));
      add(d + 1, V::mul(V::template byte<1>(x), scale));
      add(d + 2, V::mul(V::template byte<2>(x), scale));
      add(d + 3, V::mul(V::template byte<3>(x), scale));
    }
  }
  if (d < d_k) {  // a last word that is not full
    const typename V::Words x = V::bits(V::load(words + d / per_word * 16));
    if constexpr (store == Store::bf16) {
      add(d, V::low_half(x));
    } else if constexpr (store == Store::int8) {
      add(d, V::mul(V::template byte<0>(x), scale));
      if (d + 1 < d_k) add(d + 1, V::mul(V::template byte<1>(x), scale));
      if (d + 2 < d_k) add(d + 2, V::mul(V::template byte<2>(x), scale));
    }
  }
  for (int r = 0; r < rows; ++r) V::store(out + r * kKeys, sum[r]);
}

template <class V, Store store, int most>
void score_rows(const float* words, const float* scales, const float* q, int64_t d_k, int64_t rows, float* out) {
  for (; rows >= most; rows -= most, q += most * d_k, out += most * kKeys)
    score_lanes<V, store, most>(words, scales, q, d_k, out);
  if constexpr (most > 1) {
    if (rows > 0) score_rows<V, store, most / 2>(words, scales, q, d_k, rows, out);
  }
}

template <class V, Store store>
void score_block(const Head& h, int64_t start, int64_t begin, int64_t end, const float* q, int64_t rows, float* words,
                 float* scores) {
  const int64_t size = row_bytes(store, h.d_k), bytes = store == Store::int8 ? h.d_k : size;
  for (int64_t lane = 0; lane < kKeys; lane += 16) {
    if (start + lane + 16 <= begin || start + lane >= end) continue;
    const uint8_t* keys[16];
    float scales[16] = {};
    for (int i = 0; i < 16; ++i) {
      int64_t p = start + lane + i;
      p = p < begin ? begin : p >= end ? end - 1 : p;
      keys[i] = h.keys + h.row(p) * size;
      if (store == Store::int8) std::memcpy(scales + i, keys[i] + h.d_k, sizeof(float));
    }
    across<V>(keys, bytes, kKeys * size, [&](int64_t w, const typename V::Words& x) LM_INLINE_LAMBDA {
      V::store(words + w * 16, V::whole(x));
    });
    score_rows<V, store, V::kFewRows>(words, scales, q, h.d_k, rows, scores + lane);
  }
}

// states[r] += weights[r][i] * value i, for `cols` vectors of the values of positions begin to end - 1.
template <class V, Store store, int rows, int cols>
void mix_tile(const Head& h, int64_t start, int64_t begin, int64_t end, const float* weights, int64_t col,
              float* states, int64_t stride) {
  constexpr int64_t size = store == Store::f32 ? 4 : store == Store::bf16 ? 2 : 1;
  const int64_t bytes = row_bytes(store, h.d_v), ahead = kKeys * bytes;
  typename V::F sum[rows][cols];
  for (int r = 0; r < rows; ++r)
    for (int j = 0; j < cols; ++j) sum[r][j] = V::load(states + r * stride + (col + j) * 16);
  for (int64_t p = begin; p < end; ++p) {
    const uint8_t* row = h.values + h.row(p) * bytes;
    const uint8_t* from = row + col * 16 * size;
    typename V::F scale = V::zero(), value[cols];
    if (store == Store::int8) {
      float s;
      std::memcpy(&s, row + h.d_v, sizeof s);
      scale = V::set1(s);
    }
    V::template prefetch<16 * cols * size>(from + ahead);
    for (int j = 0; j < cols; ++j) value[j] = widen<V>(store, from + j * 16 * size, scale);
    for (int r = 0; r < rows; ++r) {
      const typename V::F weight = V::set1(weights[r * kKeys + p - start]);
      for (int j = 0; j < cols; ++j) sum[r][j] = V::fma(weight, value[j], sum[r][j]);
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int j = 0; j < cols; ++j) V::store(states + r * stride + (col + j) * 16, sum[r][j]);
}

template <class V, Store store, int most>
void mix_rows(const Head& h, int64_t start, int64_t begin, int64_t end, const float* weights, int64_t rows,
              float* states, int64_t stride) {
  constexpr int cols = V::kFewTile / most > 8 ? 8 : V::kFewTile / most > 0 ? V::kFewTile / most : 1;
  for (; rows >= most; rows -= most, weights += most * kKeys, states += most * stride) {
    int64_t col = 0;
    for (; col + cols <= h.d_v / 16; col += cols)
      mix_tile<V, store, most, cols>(h, start, begin, end, weights, col, states, stride);
    for (; col < h.d_v / 16; ++col)
      mix_tile<V, store, most, 1>(h, start, begin, end, weights, col, states, stride);
  }
  if constexpr (most > 1) {
    if (rows > 0) mix_rows<V, store, most / 2>(h, start, begin, end, weights, rows, states, stride);
  }
}

inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }

template <class V>
void score_few(const Head& h, int64_t start, int64_t begin, int64_t end, const float* q, int64_t rows, float* words,
               float* scores) {
  if (h.store == Store::f32) score_block<V, Store::f32>(h, start, begin, end, q, rows, words, scores);
  else if (h.store == Store::bf16) score_block<V, Store::bf16>(h, start, begin, end, q, rows, words, scores);
  else score_block<V, Store::int8>(h, start, begin, end, q, rows, words, scores);
}

template <class V>
void mix_few(const Head& h, int64_t start, int64_t begin, int64_t end, const float* weights, int64_t rows,
             float* states, int64_t stride) {
  constexpr int most = V::kFewRows;
  if (h.store == Store::f32) mix_rows<V, Store::f32, most>(h, start, begin, end, weights, rows, states, stride);
  else if (h.store == Store::bf16) mix_rows<V, Store::bf16, most>(h, start, begin, end, weights, rows, states, stride);
  else mix_rows<V, Store::int8, most>(h, start, begin, end, weights, rows, states, stride);
}

template <class V>
void attend_block(const Head& h, const Queries& q, int64_t start, int64_t end, float* states, float* scratch) {
  const int64_t first = greater(0, start - q.position);
  const int64_t last = lesser(q.tokens, start + kKeys - 1 - q.position + q.window);
  const int64_t begin = greater(start, q.lowest());
  end = lesser(lesser(end, start + kKeys), q.last() + 1);
  if (first >= last || begin >= end) return;
  const int64_t wide = padded16(h.d_v), stride = state_floats(h.d_v);
  float *keys = scratch, *values = keys + kKeys * h.d_k, *scores = values + kKeys * wide;
  const int64_t rows = (last - first) * q.group;
  const bool few = rows <= V::kFewRows && h.d_v % 16 == 0;
  if (few) score_few<V>(h, start, begin, end, q.q + first * q.group * h.d_k, rows, keys, scores);
  else pack_key_block<V>(h, start, begin, end, keys);
  if (!few) dense_product<V>({q.q + first * q.group * h.d_k, keys, scores, h.d_k, kKeys, kKeys, h.d_k, false}, rows, kKeys / 16);
  float* state = states + first * q.group * stride;
  for (int64_t t = first; t < last; ++t) {
    const int64_t position = q.position + t;
    const int64_t from = greater(0, position - q.window + 1 - start), to = lesser(position + 1, end) - start;
    for (int64_t j = 0; j < q.group; ++j) {
      const int64_t row = (t - first) * q.group + j;
      soften<V>(scores + row * kKeys, from, to, state + row * stride, wide);
    }
  }
  if (few) return mix_few<V>(h, start, begin, end, scores, rows, state, stride);
  pack_value_block<V>(h, start, begin, end, values);
  dense_product<V>({scores + (begin - start), values + (begin - start) * wide, state, kKeys, wide, stride, end - begin, true},
                   rows, wide / 16);
}

// The states of all rows over the positions from `begin`, on a block's boundary, to `end`.
template <class V>
void attend_section(const Head& h, const Queries& q, int64_t begin, int64_t end, float* states, float* scratch) {
  const int64_t wide = padded16(h.d_v), stride = state_floats(h.d_v);
  for (int64_t row = 0; row < q.tokens * q.group; ++row) {
    std::memset(states + row * stride, 0, sizeof(float) * static_cast<size_t>(stride));
    states[row * stride + wide + 16] = kNothing;
  }
  for (int64_t start = begin; start < end; start += kKeys) attend_block<V>(h, q, start, end, states, scratch);
}

// Merges a row's state over later positions into the one over earlier positions.
template <class V>
void merge_states(float* into, const float* later, int64_t d_v) {
  const int64_t n = padded16(d_v) + 16;  // with the sums
  const float a = into[n], b = later[n];
  if (b <= kNothing) return;
  if (a <= kNothing) {
    std::memcpy(into, later, sizeof(float) * static_cast<size_t>(n + 1));
    return;
  }
  const float most = a > b ? a : b;
  const typename V::F left = V::set1(exponential1<V>(a - most)), right = V::set1(exponential1<V>(b - most));
  for (int64_t i = 0; i < n; i += 16)
    V::store(into + i, V::fma(V::load(later + i), right, V::mul(V::load(into + i), left)));
  into[n] = most;
}

// The output of a row: its sum over its weights and the sink's.
template <class V>
void finish_state(const float* state, const float* sink, int64_t d_v, float* out) {
  const float* sums = state + padded16(d_v);
  float total = 0.0f, factor = 1.0f;
  for (int i = 0; i < 16; ++i) total += sums[i];
  if (sink) {
    const float most = sums[16] > *sink ? sums[16] : *sink;
    factor = exponential1<V>(sums[16] - most);
    total = total * factor + exponential1<V>(*sink - most);
  }
  const float by = factor / total;
  for (int64_t d = 0; d < d_v; ++d) out[d] = state[d] * by;
}

// ---- the router: out[r * n_experts + e] = x[r] . w[e], sixteen lanes of fma, then the lanes in order

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
