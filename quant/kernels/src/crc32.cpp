// Built with flags for PCLMUL where the compiler knows them; whether the CPU has it is asked at run time.
// Method: Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ" (Intel, 2009): fold
// 64 bytes at a time to a 16-byte remainder of the same residue, which the plain code then finishes.
#include "crc32.h"

#include "cpu.h"

#if defined(__PCLMUL__) || (defined(_MSC_VER) && defined(_M_X64))
#include <immintrin.h>
#define LM_FOLD 1
#endif

namespace localmimo {
namespace {

struct Tables {
  uint32_t at[8][256];
  Tables() {
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t c = i;
      for (int bit = 0; bit < 8; ++bit) c = c & 1 ? 0xEDB88320u ^ (c >> 1) : c >> 1;
      at[0][i] = c;
    }
    for (int t = 1; t < 8; ++t)
      for (uint32_t i = 0; i < 256; ++i) at[t][i] = at[0][at[t - 1][i] & 255] ^ (at[t - 1][i] >> 8);
  }
};

const Tables& tables() {
  static const Tables t;
  return t;
}

// Works on the inverted register.
uint32_t plain(uint32_t c, const uint8_t* p, size_t n) {
  const auto& t = tables().at;
  for (; n >= 8; p += 8, n -= 8) {
    const uint32_t low = c ^ (p[0] | uint32_t(p[1]) << 8 | uint32_t(p[2]) << 16 | uint32_t(p[3]) << 24);
    c = t[7][low & 255] ^ t[6][low >> 8 & 255] ^ t[5][low >> 16 & 255] ^ t[4][low >> 24] ^ t[3][p[4]] ^
        t[2][p[5]] ^ t[1][p[6]] ^ t[0][p[7]];
  }
  for (; n; ++p, --n) c = t[0][(c ^ *p) & 255] ^ (c >> 8);
  return c;
}

#ifdef LM_FOLD
__m128i load(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

__m128i fold(__m128i x, __m128i by, __m128i next) {
  const __m128i low = _mm_clmulepi64_si128(x, by, 0x00), high = _mm_clmulepi64_si128(x, by, 0x11);
  return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

uint32_t folded(uint32_t c, const uint8_t* p, size_t n) {  // n >= 64
  const __m128i by64 = _mm_set_epi64x(0x1c6e41596, 0x154442bd4);  // x^(512-32), x^(512+32) mod P, reflected
  const __m128i by16 = _mm_set_epi64x(0x0ccaa009e, 0x1751997d0);  // x^(128-32), x^(128+32)
  __m128i x[4];
  for (int i = 0; i < 4; ++i) x[i] = load(p + 16 * i);
  x[0] = _mm_xor_si128(x[0], _mm_cvtsi32_si128(static_cast<int>(c)));
  p += 64;
  n -= 64;
  for (; n >= 64; p += 64, n -= 64)
    for (int i = 0; i < 4; ++i) x[i] = fold(x[i], by64, load(p + 16 * i));
  __m128i one = x[0];
  for (int i = 1; i < 4; ++i) one = fold(one, by16, x[i]);
  for (; n >= 16; p += 16, n -= 16) one = fold(one, by16, load(p));
  alignas(16) uint8_t rest[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(rest), one);
  return plain(plain(0, rest, 16), p, n);
}
#endif

}  // namespace

uint32_t crc32_plain(uint32_t value, const uint8_t* data, size_t n) { return ~plain(~value, data, n); }

uint32_t crc32(uint32_t value, const uint8_t* data, size_t n) {
#ifdef LM_FOLD
  static const bool can = cpu().pclmul;
  if (can && n >= 64) return ~folded(~value, data, n);
#endif
  return crc32_plain(value, data, n);
}

}  // namespace localmimo
