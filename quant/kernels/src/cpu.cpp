#include "cpu.h"

#if defined(_MSC_VER) && defined(_M_X64)
#include <immintrin.h>
#include <intrin.h>
#elif defined(__x86_64__)
#include <cpuid.h>
#endif

namespace localmimo {
namespace {

#if defined(__x86_64__) || defined(_M_X64)
struct Registers { unsigned a, b, c, d; };

Registers cpuid(unsigned leaf, unsigned sub) {
  Registers r{};
#if defined(_MSC_VER)
  int out[4];
  __cpuidex(out, static_cast<int>(leaf), static_cast<int>(sub));
  r = {unsigned(out[0]), unsigned(out[1]), unsigned(out[2]), unsigned(out[3])};
#else
  __cpuid_count(leaf, sub, r.a, r.b, r.c, r.d);
#endif
  return r;
}

unsigned long long enabled_state() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<unsigned long long>(high) << 32) | low;
#endif
}

bool has(unsigned word, int bit) { return (word >> bit) & 1; }

Cpu probe() {
  Cpu cpu;
  if (cpuid(0, 0).a < 7) return cpu;
  const Registers one = cpuid(1, 0), seven = cpuid(7, 0);
  cpu.pclmul = has(one.c, 1) && has(one.c, 19);  // with SSE4.1
  if (!has(one.c, 27)) return cpu;  // OSXSAVE: the system saves vector registers
  const unsigned long long state = enabled_state();
  cpu.avx2 = (state & 6) == 6 && has(one.c, 12) && has(one.c, 29) && has(seven.b, 5);  // FMA, F16C, AVX2
  cpu.avx512 = cpu.avx2 && (state & 0xe6) == 0xe6 && has(seven.b, 16) && has(seven.b, 17) &&
               has(seven.b, 30) && has(seven.b, 31) && has(seven.c, 11);  // F, DQ, BW, VL, VNNI
  cpu.avx512_bf16 = cpu.avx512 && seven.a >= 1 && has(cpuid(7, 1).a, 5);
  return cpu;
}
#else
Cpu probe() { return {}; }
#endif

}  // namespace

const Cpu& cpu() {
  static const Cpu found = probe();
  return found;
}

}  // namespace localmimo
