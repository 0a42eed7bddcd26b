// AVX-512 with VNNI and BF16: attention over a bf16 cache by products of pairs; all else as without BF16.
#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && \
    defined(__AVX512VNNI__) && defined(__AVX512BF16__)
#include "avx512.h"

namespace localmimo {

const Kernels* avx512_kernels();  // of isa_avx512.cpp

namespace {

struct Avx512Bf16 : Avx512 {
  struct ByPairs : Floats<Avx512> {
    struct Cell { alignas(64) uint32_t v[16]; };
    using Right = __m512i;
    static constexpr int64_t kWords = 1;
    static constexpr bool kAsStored = true;
    static LM_INLINE Right right(const Cell& c) { return _mm512_load_si512(c.v); }
    template <int64_t apart>
    static LM_INLINE F add(F sum, const float* l, Right r) {
      int32_t pair;  // not as a float: broadcasting that costs a third of the speed
      std::memcpy(&pair, l, sizeof pair);
      return _mm512_dpbf16_ps(sum, (__m512bh)r, (__m512bh)_mm512_set1_epi32(pair));
    }
    static LM_INLINE void key(const uint8_t* row, int64_t n, float* out) {
      std::memcpy(out, row, static_cast<size_t>(2 * n));
    }
    static LM_INLINE float query(const float* q, int64_t n, float* out) {
      for (int64_t i = 0; i < n; i += 16) {
        float some[16] = {};
        std::memcpy(some, q + i, sizeof(float) * static_cast<size_t>(n - i < 16 ? n - i : 16));
        const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(load(some));
        std::memcpy(out + i / 2, &rounded, sizeof(float) * static_cast<size_t>(n - i < 16 ? (n - i + 1) / 2 : 8));
      }
      return 1.0f;
    }
    static LM_INLINE __m512i zipped(__m512i both) {
      const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                             21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
      return _mm512_permutexvar_epi16(order, both);
    }
    static LM_INLINE void weights(F* p, float* out) {
      const __m512i pairs = zipped((__m512i)_mm512_cvtne2ps_pbh(p[1], p[0]));
      store(out, _mm512_castsi512_ps(pairs));
      p[0] = low_half(pairs);
      p[1] = high_half(pairs);
    }
    static LM_INLINE void value(const uint8_t* const* rows, Cell* out) {
      const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[0]));
      const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[1]));
      _mm512_store_si512(out->v, zipped(_mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1)));
    }
  };
};

Kernels with_bf16() {
  Kernels k = *avx512_kernels();
  k.name = "avx512-bf16";
  k.attend_section = attend_section<Avx512Bf16>;
  return k;
}

}  // namespace

const Kernels* avx512_bf16_kernels() {
  static const Kernels found = with_bf16();
  return &found;
}

}  // namespace localmimo
#else
namespace localmimo {
const Kernels* avx512_bf16_kernels() { return nullptr; }
}  // namespace localmimo
#endif
