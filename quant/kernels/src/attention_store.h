// What attention computes with, by the kind of number that the cache holds, over a policy V of one instruction set.
// Knows no block, no softmax and no place in the cache; attention_kernel.h does.
//
// Such a policy S names a Cell (what sixteen lanes hold against kPer numbers of a key, or against kPer weights), the
// kWords words that these numbers take on the other side, and the chains that they form:
//   Exact    float32: one fma per number.
//   Pairs    bf16: queries and weights are rounded to bf16, like the keys and values that they meet; products of two
//            are then exact. Two numbers at a time, the odd one first, one rounding each: what vdpbf16ps does (apart
//            from numbers below 2^-126, which it takes for zero), and what two fma do elsewhere.
//   Quads    int8: queries are rounded to 8 bits with one scale each, and weights times their values' scales to 8 bits
//            with a scale per query and block of keys; sums of products are exact.
#pragma once
#include <cstdint>
#include <cstring>

#include "attention.h"
#include "attention_product.h"
#include "inline.h"

namespace localmimo {
namespace {

template <class V>
struct Floats {
  using Sum = typename V::F;
  static constexpr bool kIntegers = false;
  template <bool onto>
  static LM_INLINE Sum begin(const float* c) { return onto ? V::load(c) : V::zero(); }
  template <bool onto>
  static LM_INLINE void end(const Sum& sum, const Units&, int64_t, float* c) { V::store(c, sum); }
};

template <class V>
struct Singles : Floats<V> {
  struct Cell { alignas(64) float v[16]; };
  using Right = typename V::F;
  static constexpr int64_t kPer = 1, kWords = 1;
  static LM_INLINE Right right(const Cell& c) { return V::load(c.v); }
  template <int64_t apart>
  static LM_INLINE typename V::F add(typename V::F sum, const float* l, const Right& r) {
    return V::fma(V::set1(*l), r, sum);
  }
  // The words of a query; returns what one of them is worth.
  static LM_INLINE float query(const float* q, int64_t n, float* out) {
    std::memcpy(out, q, sizeof(float) * static_cast<size_t>(n));
    return 1.0f;
  }
  // The weights of kPer keys as their words; returns the weights as they will be used.
  static LM_INLINE void weights(typename V::F* p, float* out) { V::store(out, p[0]); }
};

template <class V>
struct Exact : Singles<V> {
  using typename Singles<V>::Cell;
  static constexpr Store kStore = Store::f32;
  static constexpr int64_t kBytes = 4;  // of one number
  static constexpr bool kAsStored = true;  // the words of a key are the bytes of its row
  static LM_INLINE void key(const uint8_t* row, int64_t n, float* out) {
    std::memcpy(out, row, static_cast<size_t>(n * kBytes));
  }
  static LM_INLINE void value(const uint8_t* const* rows, Cell* out) {
    V::store(out->v, V::load(reinterpret_cast<const float*>(rows[0])));
  }
};

// Pairs by fma, where no instruction takes both.
template <class V>
struct TwoSteps : Floats<V> {
  struct Cell { alignas(64) float even[16], odd[16]; };
  struct Right { typename V::F even, odd; };
  static constexpr int64_t kWords = 2;
  static constexpr bool kAsStored = false;
  static LM_INLINE Right right(const Cell& c) { return {V::load(c.even), V::load(c.odd)}; }
  template <int64_t apart>
  static LM_INLINE typename V::F add(typename V::F sum, const float* l, const Right& r) {
    return V::fma(V::set1(l[0]), r.even, V::fma(V::set1(l[apart]), r.odd, sum));
  }
  static LM_INLINE void key(const uint8_t* row, int64_t n, float* out) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) V::store(out + i, V::widen_bf16(row + 2 * i));
    if (i == n) return;
    uint8_t tail[32] = {};
    float last[16];
    std::memcpy(tail, row + 2 * i, static_cast<size_t>(2 * (n - i)));
    V::store(last, V::widen_bf16(tail));
    std::memcpy(out + i, last, sizeof(float) * static_cast<size_t>(n - i));
  }
  static LM_INLINE float query(const float* q, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i += 16) {
      float some[16] = {};
      const size_t bytes = sizeof(float) * static_cast<size_t>(n - i < 16 ? n - i : 16);
      std::memcpy(some, q + i, bytes);
      V::store(some, V::nearest_bf16(V::load(some)));
      std::memcpy(out + i, some, bytes);
    }
    return 1.0f;
  }
  static LM_INLINE void weights(typename V::F* p, float* out) {
    for (int i = 0; i < 2; ++i) V::store(out + 16 * i, p[i] = V::nearest_bf16(p[i]));
  }
  static LM_INLINE void value(const uint8_t* const* rows, Cell* out) {
    V::store(out->even, V::widen_bf16(rows[0]));
    V::store(out->odd, V::widen_bf16(rows[1]));
  }
};

// D: pairs by fma, or by the one instruction.
template <class D>
struct Pairs : D {
  static constexpr Store kStore = Store::bf16;
  static constexpr int64_t kBytes = 2, kPer = 2;
};

// D: exact sums of four products of bytes, the ones of keys and weights (plus 128, so) unsigned, the others signed.
template <class V, class D>
struct Quads : D {
  static constexpr Store kStore = Store::int8;
  static constexpr int64_t kBytes = 1, kPer = 4, kWords = 1;
  static constexpr bool kAsStored = false, kIntegers = true;
  template <bool onto>
  static LM_INLINE typename D::Sum begin(const float*) { return D::none(); }
  template <bool onto>
  static LM_INLINE void end(const typename D::Sum& sum, const Units& units, int64_t row, float* c) {
    const typename V::F by = V::set1(units.rows[row]);
    if (onto) V::store(c, V::fma(D::to_float(sum), by, V::load(c)));
    else V::store(c, V::mul(V::mul(D::to_float(D::less(sum, units.above)), V::load(units.lanes)), by));
  }
  static LM_INLINE void key(const uint8_t* row, int64_t n, float* out) {
    uint8_t* const bytes = reinterpret_cast<uint8_t*>(out);
    for (int64_t i = 0; i < n; ++i) bytes[i] = row[i] ^ 0x80;
  }
  // Codes of a query and their scale, which is NaN if any number of the query is not finite.
  static LM_INLINE float query(const float* q, int64_t n, float* out) {
    float lanes[16] = {}, most = 0.0f, odd = 0.0f;
    int8_t* const codes = reinterpret_cast<int8_t*>(out);
    for (int64_t i = 0; i < n; ++i) {
      const float size = q[i] < 0.0f ? -q[i] : q[i];
      most = size > most ? size : most;
      odd += q[i] - q[i];
    }
    const float inverse = most > 1e-30f && odd == 0.0f ? 127.0f / most : 0.0f;
    for (int64_t i = 0; i < n; i += 16) {
      const int64_t count = n - i < 16 ? n - i : 16;
      std::memcpy(lanes, q + i, sizeof(float) * static_cast<size_t>(count));
      V::store(lanes, V::rint(V::mul(V::load(lanes), V::set1(inverse))));
      for (int64_t j = 0; j < count; ++j) codes[i + j] = odd == 0.0f ? static_cast<int8_t>(lanes[j]) : int8_t{0};
    }
    return most / 127.0f + odd;
  }
};

}  // namespace
}  // namespace localmimo
