// AVX2 with FMA and F16C: the book is looked up as two byte tables whose results are interleaved to
// words; vpmaddwd multiplies and adds pairs. Sums stay split into column pairs until a block ends.
#include "kernels.h"

#if defined(__AVX2__) && (defined(_MSC_VER) || (defined(__FMA__) && defined(__F16C__)))
#include <immintrin.h>

#include <cstring>

#include "product.h"

namespace localmimo {
namespace {

struct Avx2 {
  struct F { __m256 a, b; };
  struct Sum { __m256i v[4]; };   // rows (0 1 | 4 5), (2 3 | 6 7) and the same of rows 8 to 15
  struct Step { __m256i v[4]; };  // four columns of each of those rows
  using Acts = __m256i;
  struct Table { __m256i low, high; };
  static constexpr int kDirect = 2;
  static constexpr bool kPanels = true;
  static constexpr int kTile = 2;

  static LM_INLINE F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static LM_INLINE F set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static LM_INLINE F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static LM_INLINE void store(float* p, F x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
  }
  static LM_INLINE F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  static LM_INLINE F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
  static LM_INLINE F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  static LM_INLINE F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
  static LM_INLINE F fma(F x, F y, F z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
  }
  static LM_INLINE F rint(F x) { return {_mm256_round_ps(x.a, 8), _mm256_round_ps(x.b, 8)}; }
  static LM_INLINE F maximum(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
  static LM_INLINE __m256 seen(__m256 score, float nothing, __m256 weight) {  // zero where there was nothing
    return _mm256_and_ps(_mm256_cmp_ps(score, _mm256_set1_ps(nothing), _CMP_NEQ_UQ), weight);
  }
  static LM_INLINE F seen(F score, float nothing, F weight) {
    return {seen(score.a, nothing, weight.a), seen(score.b, nothing, weight.b)};
  }
  static LM_INLINE __m256 clamp(__m256 x, float low, float high) {
    return _mm256_min_ps(_mm256_set1_ps(high), _mm256_max_ps(_mm256_set1_ps(low), x));
  }
  static LM_INLINE F clamp(F x, float low, float high) { return {clamp(x.a, low, high), clamp(x.b, low, high)}; }
  static LM_INLINE __m256 scale_by_power(__m256 x, __m256 n) {
    return _mm256_castsi256_ps(
        _mm256_add_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
  }
  static LM_INLINE F scale_by_power(F x, F n) { return {scale_by_power(x.a, n.a), scale_by_power(x.b, n.b)}; }

  static LM_INLINE Sum no_sum() {
    const __m256i z = _mm256_setzero_si256();
    return {{z, z, z, z}};
  }
  static LM_INLINE Sum merge(const Sum& a, const Sum& b) {
    Sum s;
    for (int i = 0; i < 4; ++i) s.v[i] = _mm256_add_epi32(a.v[i], b.v[i]);
    return s;
  }
  static LM_INLINE F to_float(const Sum& s) {
    return {_mm256_cvtepi32_ps(_mm256_hadd_epi32(s.v[0], s.v[1])),
            _mm256_cvtepi32_ps(_mm256_hadd_epi32(s.v[2], s.v[3]))};
  }
  static LM_INLINE Table table(const int16_t* book) {
    alignas(16) uint8_t low[16], high[16];
    for (int i = 0; i < 16; ++i) {
      low[i] = static_cast<uint8_t>(book[i] & 0xff);
      high[i] = static_cast<uint8_t>((book[i] >> 8) & 0xff);
    }
    return {_mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(low))),
            _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(high)))};
  }
  static LM_INLINE void words(__m256i codes, const Table& t, __m256i& first, __m256i& second) {
    const __m256i low = _mm256_shuffle_epi8(t.low, codes);
    const __m256i high = _mm256_shuffle_epi8(t.high, codes);
    first = _mm256_unpacklo_epi8(low, high);
    second = _mm256_unpackhi_epi8(low, high);
  }
  static LM_INLINE void look_up(const uint8_t* p, const Table& t, Step& low, Step& high) {
    const __m256i mask = _mm256_set1_epi8(15);
    for (int h = 0; h < 2; ++h) {
      const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32 * h));
      words(_mm256_and_si256(w, mask), t, low.v[2 * h], low.v[2 * h + 1]);
      words(_mm256_and_si256(_mm256_srli_epi16(w, 4), mask), t, high.v[2 * h], high.v[2 * h + 1]);
    }
  }
  static LM_INLINE Step widen(const uint8_t* p) {
    Step s;
    for (int h = 0; h < 2; ++h) {  // a byte in the upper half of a word, then shifted down with its sign
      const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32 * h));
      s.v[2 * h] = _mm256_srai_epi16(_mm256_unpacklo_epi8(w, w), 8);
      s.v[2 * h + 1] = _mm256_srai_epi16(_mm256_unpackhi_epi8(w, w), 8);
    }
    return s;
  }
  static LM_INLINE void save(int16_t* p, const Step& s) {
    for (int i = 0; i < 4; ++i) _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16 * i), s.v[i]);
  }
  static LM_INLINE Step saved(const int16_t* p) {
    Step s;
    for (int i = 0; i < 4; ++i) s.v[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16 * i));
    return s;
  }
  static LM_INLINE Acts acts(const int16_t* p) {
    int64_t four;
    std::memcpy(&four, p, 8);
    return _mm256_set1_epi64x(four);
  }
  static LM_INLINE void mac(Sum& s, const Step& w, const Acts& a) {
    for (int i = 0; i < 4; ++i) s.v[i] = _mm256_add_epi32(s.v[i], _mm256_madd_epi16(w.v[i], a));
  }
  template <int64_t bytes, int64_t every = 64, bool near = false>
  static LM_INLINE void prefetch(const uint8_t* p) {
    for (int64_t i = 0; i < bytes; i += every)
      _mm_prefetch(reinterpret_cast<const char*>(p + i), near ? _MM_HINT_T0 : _MM_HINT_T1);
  }

  static LM_INLINE F e4m3(const uint8_t* p) {  // as half precision: sign, 4 exponent, 3 mantissa bits
    const __m256i w = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i h = _mm256_and_si256(_mm256_slli_epi16(w, 7), _mm256_set1_epi16(int16_t(0xBFFF)));
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(h)), _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1))};
  }
  static LM_INLINE __m256 power(const uint8_t* p) {
    const __m256i w = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_slli_epi32(w, 23), _mm256_set1_epi32(0x00400000)));
  }
  static LM_INLINE F e8m0(const uint8_t* p) { return {power(p), power(p + 8)}; }
  static LM_INLINE F half(const uint8_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16)))};
  }

  static constexpr int kDotRows = 1, kKeyRows = 4, kSums = 4;
  using ByPairs = TwoSteps<Avx2>;
  static LM_INLINE __m256 widen_half(const uint8_t* p) {
    const __m128i w = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(w), 16));
  }
  static LM_INLINE F widen_bf16(const uint8_t* p) { return {widen_half(p), widen_half(p + 16)}; }
  static LM_INLINE __m256 nearest_bf16(__m256 x) {
    const __m256i w = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(w, 16), _mm256_set1_epi32(1));
    const __m256 up = _mm256_castsi256_ps(_mm256_add_epi32(w, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))));
    const __m256 quiet = _mm256_castsi256_ps(_mm256_or_si256(w, _mm256_set1_epi32(0x00400000)));
    const __m256 upper_half = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(0xffff0000u)));
    return _mm256_and_ps(_mm256_blendv_ps(up, quiet, _mm256_cmp_ps(x, x, _CMP_UNORD_Q)), upper_half);
  }
  static LM_INLINE F nearest_bf16(F x) { return {nearest_bf16(x.a), nearest_bf16(x.b)}; }
  struct ByQuads {  // by 16-bit numbers: sums of two products of bytes would not fit into them
    struct Cell { alignas(32) int32_t v[16]; };
    struct Right { __m256i even[2], odd[2]; };
    struct Sum { __m256i v[2]; };
    static LM_INLINE __m256i ints(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static LM_INLINE Sum none() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
    static LM_INLINE Sum less(const Sum& a, const int32_t* b) {
      return {{_mm256_sub_epi32(a.v[0], ints(b)), _mm256_sub_epi32(a.v[1], ints(b + 8))}};
    }
    static LM_INLINE F to_float(const Sum& a) { return {_mm256_cvtepi32_ps(a.v[0]), _mm256_cvtepi32_ps(a.v[1])}; }
    static LM_INLINE Right right(const Cell& c) {
      Right r;
      for (int i = 0; i < 2; ++i) {
        r.even[i] = _mm256_srai_epi16(_mm256_slli_epi16(ints(c.v + 8 * i), 8), 8);
        r.odd[i] = _mm256_srai_epi16(ints(c.v + 8 * i), 8);
      }
      return r;
    }
    template <int64_t apart>
    static LM_INLINE Sum add(Sum sum, const float* l, const Right& r) {
      int32_t four;
      std::memcpy(&four, l, sizeof four);
      const __m256i even = _mm256_set1_epi32(four & 0xff00ff), odd = _mm256_set1_epi32((four >> 8) & 0xff00ff);
      for (int i = 0; i < 2; ++i) {
        const __m256i two = _mm256_add_epi32(_mm256_madd_epi16(even, r.even[i]), _mm256_madd_epi16(odd, r.odd[i]));
        sum.v[i] = _mm256_add_epi32(sum.v[i], two);
      }
      return sum;
    }
    static LM_INLINE __m256i code(__m256 x, int place) { return _mm256_slli_epi32(_mm256_cvtps_epi32(x), 8 * place); }
    static LM_INLINE __m256i codes(__m256 a, __m256 b, __m256 c, __m256 d) {
      return _mm256_or_si256(_mm256_or_si256(code(a, 0), code(b, 1)), _mm256_or_si256(code(c, 2), code(d, 3)));
    }
    static LM_INLINE void weights(const F* p, float* out) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), codes(p[0].a, p[1].a, p[2].a, p[3].a));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 8), codes(p[0].b, p[1].b, p[2].b, p[3].b));
    }
    static LM_INLINE void value(const uint8_t* const* rows, Cell* out) {
      __m128i r[4];
      for (int i = 0; i < 4; ++i) r[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i]));
      const __m128i low[2] = {_mm_unpacklo_epi8(r[0], r[1]), _mm_unpackhi_epi8(r[0], r[1])};
      const __m128i high[2] = {_mm_unpacklo_epi8(r[2], r[3]), _mm_unpackhi_epi8(r[2], r[3])};
      for (int i = 0; i < 2; ++i) {
        _mm_store_si128(reinterpret_cast<__m128i*>(out->v + 8 * i), _mm_unpacklo_epi16(low[i], high[i]));
        _mm_store_si128(reinterpret_cast<__m128i*>(out->v + 8 * i + 4), _mm_unpackhi_epi16(low[i], high[i]));
      }
    }
  };

  struct Word { __m256i a, b; };
  static LM_INLINE void exclusive_or(Word& sum, const uint8_t* p) {
    sum.a = _mm256_xor_si256(sum.a, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    sum.b = _mm256_xor_si256(sum.b, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32)));
  }
  static LM_INLINE __m256i ints(const int32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static LM_INLINE F gather(const float* table, const int32_t* at) {
    return {_mm256_i32gather_ps(table, ints(at), 4), _mm256_i32gather_ps(table, ints(at + 8), 4)};
  }
  static LM_INLINE F gather16(const float* table, const int32_t* at) { return gather(table, at); }
  class Finder {
   public:
    explicit Finder(const Book& book) : book_(book) {}
    LM_INLINE F rough(F ratio) const {
      return {_mm256_i32gather_ps(book_.rough, cell(ratio.a), 4), _mm256_i32gather_ps(book_.rough, cell(ratio.b), 4)};
    }
    LM_INLINE void code(F ratio, int32_t* out) const {
      code(ratio.a, out);
      code(ratio.b, out + 8);
    }

   private:
    LM_INLINE void code(__m256 ratio, int32_t* out) const {
      const __m256i c = cell(ratio);
      const __m256 above = _mm256_cmp_ps(ratio, _mm256_i32gather_ps(book_.midpoint, c, 4), _CMP_GT_OQ);
      const __m256i rank = _mm256_sub_epi32(_mm256_i32gather_epi32(book_.position, c, 4), _mm256_castps_si256(above));
      const __m256i codes = _mm256_i32gather_epi32(book_.code_of_rank, rank, 4);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), codes);
    }
    LM_INLINE __m256i cell(__m256 ratio) const {  // see Avx512::Finder
      const __m256 c = _mm256_fmadd_ps(ratio, _mm256_set1_ps(book_.per_unit), _mm256_set1_ps(book_.centre));
      const __m256 low = _mm256_min_ps(c, _mm256_set1_ps(float(kCells - 1)));
      return _mm256_cvttps_epi32(_mm256_max_ps(low, _mm256_setzero_ps()));
    }
    const Book& book_;
  };

  static LM_INLINE float largest(const float* x) {
    const __m256i mask = _mm256_set1_epi32(0x7fffffff);
    __m256i m = _mm256_setzero_si256();
    for (int i = 0; i < kBlock; i += 8)
      m = _mm256_max_epi32(
          m, _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i)), mask));
    __m128i h = _mm_max_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
    h = _mm_max_epi32(h, _mm_shuffle_epi32(h, 0x4E));
    h = _mm_max_epi32(h, _mm_shuffle_epi32(h, 0xB1));
    const int bits = _mm_cvtsi128_si32(h);
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
  }
  static LM_INLINE void round(const float* x, float inverse, int16_t* codes) {
    const __m256 by = _mm256_set1_ps(inverse);
    for (int i = 0; i < kBlock; i += 16) {
      const __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), by));
      const __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8), by));
      const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xD8);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), both);
    }
  }
};

constexpr Kernels kKernels = kernels_of<Avx2>("avx2");

}  // namespace

const Kernels* avx2_kernels() { return &kKernels; }

}  // namespace localmimo
#else
namespace localmimo {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace localmimo
#endif
