// bfloat16: rounds float32 to the nearest, ties to even. Infinities stay; NaN stays NaN, quiet, with its sign and the
// upper bits of its payload. Each instruction set's nearest_bf16 gives the bits of `to_bf16`.
#pragma once
#include <cstdint>
#include <cstring>

namespace localmimo {

// Float32 bits whose upper half is the rounded number; the lower half may hold anything.
constexpr uint32_t round_to_bf16(uint32_t bits) {
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return nan ? bits | 0x00400000u : bits + 0x7fffu + ((bits >> 16) & 1);
}

inline uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>(round_to_bf16(bits) >> 16);
}

inline float from_bf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

}  // namespace localmimo
