// The policy V (product.h, attention_kernel.h) of AVX-512 with VNNI (F, BW, DQ, VL): the book is looked up by vpermw,
// which reads bits 0 to 4 of each word only, so a book written twice needs no mask; vpdpwssd multiplies and adds pairs
// of 16-bit codes. Included by isa_avx512*.cpp only.
#pragma once
#include <immintrin.h>

#include <cstring>

#include "product.h"

namespace localmimo {
namespace {

struct Avx512 {
  using F = __m512;
  using Sum = __m512i;
  using Table = __m512i;
  struct Step { __m512i even, odd; };  // columns (0, 2) and (1, 3) of each row
  struct Acts { __m512i even, odd; };
  static constexpr int kDirect = 8;  // 8 sums, 8 totals, 4 steps and what is broadcast
  static constexpr bool kPanels = false;  // looking up takes other ports than multiplying: it may be done again

  static LM_INLINE F zero() { return _mm512_setzero_ps(); }
  static LM_INLINE F set1(float x) { return _mm512_set1_ps(x); }
  static LM_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
  static LM_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static LM_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
  static LM_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static LM_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static LM_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
  static LM_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static LM_INLINE F rint(F a) { return _mm512_roundscale_ps(a, 8); }
  static LM_INLINE F clamp(F a, float low, float high) {  // operands in this order keep a NaN
    return _mm512_min_ps(set1(high), _mm512_max_ps(set1(low), a));
  }
  static LM_INLINE F maximum(F a, F b) { return _mm512_max_ps(a, b); }
  static LM_INLINE F seen(F score, float nothing, F weight) {  // zero where there was nothing
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(score, set1(nothing), _CMP_NEQ_UQ), weight);
  }
  static LM_INLINE F scale_by_power(F a, F n) {
    return _mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_castps_si512(a), _mm512_slli_epi32(_mm512_cvtps_epi32(n), 23)));
  }

  static LM_INLINE Sum no_sum() { return _mm512_setzero_si512(); }
  static LM_INLINE Sum merge(Sum a, Sum b) { return _mm512_add_epi32(a, b); }
  static LM_INLINE F to_float(Sum s) { return _mm512_cvtepi32_ps(s); }
  static LM_INLINE Table table(const int16_t* book) {
    return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(book)));
  }

  static LM_INLINE void look_up(const uint8_t* p, const Table& t, Step& low, Step& high) {
    const __m512i w = _mm512_loadu_si512(p);
    low.even = _mm512_permutexvar_epi16(w, t);
    high.even = _mm512_permutexvar_epi16(_mm512_srli_epi16(w, 4), t);
    low.odd = _mm512_permutexvar_epi16(_mm512_srli_epi16(w, 8), t);
    high.odd = _mm512_permutexvar_epi16(_mm512_srli_epi16(w, 12), t);
  }
  static LM_INLINE Step widen(const uint8_t* p) {
    const __m512i w = _mm512_loadu_si512(p);
    return {_mm512_srai_epi16(_mm512_slli_epi16(w, 8), 8), _mm512_srai_epi16(w, 8)};
  }
  static LM_INLINE Acts acts(const int16_t* p) {
    int32_t even, odd;  // read apart: from one 64-bit word they would take two more instructions each
    std::memcpy(&even, p, 4);
    std::memcpy(&odd, p + 2, 4);
    return {_mm512_set1_epi32(even), _mm512_set1_epi32(odd)};
  }
  static LM_INLINE void mac(Sum& s, const Step& w, const Acts& a) {
    s = _mm512_dpwssd_epi32(s, w.even, a.even);
    s = _mm512_dpwssd_epi32(s, w.odd, a.odd);
  }
  template <int64_t bytes, int64_t every = 64, bool near = false>
  static LM_INLINE void prefetch(const uint8_t* p) {
    for (int64_t i = 0; i < bytes; i += every)
      _mm_prefetch(reinterpret_cast<const char*>(p + i), near ? _MM_HINT_T0 : _MM_HINT_T1);
  }

  static LM_INLINE F e4m3(const uint8_t* p) {  // as half precision: sign, 4 exponent, 3 mantissa bits
    const __m256i w = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(w, 7), _mm256_set1_epi16(int16_t(0xBFFF))));
  }
  static LM_INLINE F e8m0(const uint8_t* p) {  // byte 0 is 2^-127, the one that is a denormal float
    const __m512i w = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_slli_epi32(w, 23), _mm512_set1_epi32(0x00400000)));
  }
  static LM_INLINE F half(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }

  static constexpr int kDotRows = 4, kKeyRows = 8, kSums = 16;
  using ByPairs = TwoSteps<Avx512>;
    static LM_INLINE F low_half(__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
  static LM_INLINE F high_half(__m512i x) {
    return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static LM_INLINE F widen_bf16(const uint8_t* p) {
    const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(w), 16));
  }
  static LM_INLINE F nearest_bf16(F x) {
    const __m512i w = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(w, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(w, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return high_half(_mm512_mask_or_epi32(up, nan, w, _mm512_set1_epi32(0x00400000)));
  }
  struct ByQuads {
    struct Cell { alignas(64) int32_t v[16]; };
    using Right = __m512i;
    using Sum = __m512i;
    static LM_INLINE Sum none() { return _mm512_setzero_si512(); }
    static LM_INLINE Sum less(Sum a, const int32_t* b) { return _mm512_sub_epi32(a, _mm512_loadu_si512(b)); }
    static LM_INLINE F to_float(Sum a) { return _mm512_cvtepi32_ps(a); }
    static LM_INLINE Right right(const Cell& c) { return _mm512_load_si512(c.v); }
    template <int64_t apart>
    static LM_INLINE Sum add(Sum sum, const float* l, Right r) {
      int32_t four;
      std::memcpy(&four, l, sizeof four);
      return _mm512_dpbusd_epi32(sum, _mm512_set1_epi32(four), r);
    }
    static LM_INLINE __m512i code(F x, int place) { return _mm512_slli_epi32(_mm512_cvtps_epi32(x), 8 * place); }
    static LM_INLINE void weights(const F* p, float* out) {
      const __m512i low = _mm512_or_si512(code(p[0], 0), code(p[1], 1));
      const __m512i high = _mm512_or_si512(code(p[2], 2), code(p[3], 3));
      _mm512_storeu_si512(out, _mm512_or_si512(low, high));
    }
    static LM_INLINE void value(const uint8_t* const* rows, Cell* out) {
      const auto row = [&](int i) LM_INLINE_LAMBDA {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i]));
      };
      const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(row(0)), row(1), 1);
      const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(row(2)), row(3), 1);
      const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
      const __m512i fours = _mm512_permutexvar_epi32(order, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
      const __m512i turn = _mm512_broadcast_i32x4(_mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0));
      _mm512_store_si512(out->v, _mm512_shuffle_epi8(fours, turn));
    }
  };

  using Word = __m512i;
  static LM_INLINE void exclusive_or(Word& sum, const uint8_t* p) {
    sum = _mm512_xor_si512(sum, _mm512_loadu_si512(p));
  }
  static LM_INLINE F gather(const float* table, const int32_t* at) {
    return _mm512_i32gather_ps(_mm512_loadu_si512(at), table, 4);
  }
  static LM_INLINE F gather16(const float* table, const int32_t* at) {
    return _mm512_permutexvar_ps(_mm512_loadu_si512(at), _mm512_loadu_ps(table));
  }
  class Finder {  // a gather takes some 25 cycles, two registers hold a table of 32
   public:
    explicit Finder(const Book& book) : book_(book), b_(book), first_(float(b_.first)), last_(last(b_)) {}
    LM_INLINE F rough(F ratio) const {
      const F c = cell(ratio);
      const __m512i at = bucket(c);
      const __mmask16 up = _mm512_cmp_ps_mask(c, pick(at, b_.rough_edge), _CMP_GE_OQ);
      return _mm512_mask_blend_ps(up, pick(at, b_.rough_below), pick(at, b_.rough_above));
    }
    LM_INLINE void code(F ratio, int32_t* out) const {
      const F c = cell(ratio);
      const __m512i at = bucket(c);
      const __mmask16 above = _mm512_cmp_ps_mask(ratio, pick(at, b_.midpoint), _CMP_GT_OQ);
      const __mmask16 here = _mm512_cmp_ps_mask(c, pick(at, b_.edge), _CMP_GE_OQ);
      const __mmask16 next = _mm512_cmp_ps_mask(c, pick(at, b_.next), _CMP_GE_OQ);
      const __m512i rank = _mm512_permutex2var_epi32(_mm512_loadu_si512(b_.rank), at, _mm512_loadu_si512(b_.rank + 16));
      const __m512i up = _mm512_mask_add_epi32(rank, static_cast<__mmask16>((above & here) | next), rank, _mm512_set1_epi32(1));
      _mm512_storeu_si512(out, _mm512_permutexvar_epi32(up, _mm512_loadu_si512(book_.code_of_rank)));
    }

   private:
    static float last(const Buckets& b) {
      const int cell = b.first + (Buckets::kCount << b.shift) - 1;
      return static_cast<float>(cell < kCells ? cell : kCells - 1);
    }
    LM_INLINE F cell(F ratio) const {  // per_unit is a power of two, so that fma rounds as * and + do
      const F c = _mm512_fmadd_ps(ratio, set1(book_.per_unit), set1(book_.centre));
      return _mm512_max_ps(_mm512_min_ps(c, set1(last_)), set1(first_));
    }
    LM_INLINE __m512i bucket(F c) const {
      const __m512i cell = _mm512_sub_epi32(_mm512_cvttps_epi32(c), _mm512_set1_epi32(b_.first));
      return _mm512_srl_epi32(cell, _mm_cvtsi32_si128(b_.shift));
    }
    static LM_INLINE F pick(__m512i at, const float* table) {
      return _mm512_permutex2var_ps(_mm512_loadu_ps(table), at, _mm512_loadu_ps(table + 16));
    }
    const Book& book_;
    const Buckets b_;
    const float first_, last_;
  };

  static LM_INLINE float largest(const float* x) {
    const __m512i mask = _mm512_set1_epi32(0x7fffffff);
    const __m512i a = _mm512_and_si512(_mm512_loadu_si512(x), mask);
    const __m512i b = _mm512_and_si512(_mm512_loadu_si512(x + 16), mask);
    const int bits = _mm512_reduce_max_epi32(_mm512_max_epi32(a, b));
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
  }
  // Four columns are stored as 0, 2, 1, 3: the pairs that the words of the packed codes hold.
  static LM_INLINE void round(const float* x, float inverse, int16_t* codes) {
    const __m512i a = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), set1(inverse)));
    const __m512i b = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + 16), set1(inverse)));
    const auto order = static_cast<_MM_PERM_ENUM>(0xD8);
    const __m256i low = _mm512_cvtsepi32_epi16(_mm512_shuffle_epi32(a, order));
    const __m256i high = _mm512_cvtsepi32_epi16(_mm512_shuffle_epi32(b, order));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + 16), high);
  }
};

}  // namespace
}  // namespace localmimo
