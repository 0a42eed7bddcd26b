// Layout: the positions of a packed matrix's parts and the order of its bytes. Knows no thread, no
// instruction set and no Python.
#pragma once
#include <cstddef>
#include <cstdint>

namespace localmimo {

constexpr int kLanes = 16;   // rows of one row group
constexpr int kBlock = 32;   // columns that share one integer sum
constexpr int kStrip = 32;   // rows of one unit of work: two row groups, one activation block of `down`

enum class Format : int { nf4 = 0, nf4_16 = 1, mxfp4 = 2, int8 = 3 };
constexpr int kFormats = 4;

// One packed matrix; rows and columns are the true ones, the bytes are padded as the codec pads them.
struct Matrix {
  Format format;
  int64_t rows, cols;
  const uint8_t* codes;
  const uint8_t* scales;
  const float* scale;  // tensor scale; null for int8; may be unaligned, read it through memcpy
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t row_groups(int64_t rows) { return ceil_div(rows, kLanes); }

// Columns are padded to 64 for int8 and to 32 for the 4-bit formats.
constexpr int64_t blocks(Format f, int64_t cols) {
  return f == Format::int8 ? 2 * ceil_div(cols, 64) : ceil_div(cols, kBlock);
}
constexpr int64_t codes_per_block(Format f) { return f == Format::int8 ? 512 : 256; }
// int8 shares 16 half-precision scales (32 bytes) between two blocks.
constexpr int64_t scales_per_block(Format f) { return f == Format::nf4_16 ? 32 : 16; }

constexpr int64_t codes_bytes(Format f, int64_t rows, int64_t cols) {
  return row_groups(rows) * blocks(f, cols) * codes_per_block(f);
}
constexpr int64_t scales_bytes(Format f, int64_t rows, int64_t cols) {
  return row_groups(rows) * blocks(f, cols) * scales_per_block(f);
}

// Activations are always padded to 64 columns, so that they serve every format.
constexpr int64_t padded_cols(int64_t cols) { return ceil_div(cols, 64) * 64; }

// NF4 as 14-bit integers. The unit 7854.024 is the one below 8192 that rounds the sixteen values
// best (rms error 1.9e-5 of the largest: far below bf16).
constexpr double kNf4Unit = 7854.024;
constexpr int16_t kNf4Book[16] = {-7854, -5468, -4124, -3102, -2234, -1451, -715, 0,
                                  625,   1264,  1933,  2654,  3461,  4419,  5678, 7854};
// MXFP4 (E2M1) doubled: exact.
constexpr int16_t kMxfp4Book[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// Largest activation code: 32 products of book x activation must stay below 2^31.
constexpr int activation_top(Format f) {
  return f == Format::nf4 || f == Format::nf4_16 ? 8500 : 32767;
}
static_assert(int64_t{32} * 7854 * activation_top(Format::nf4) < (int64_t{1} << 31), "nf4 sum");
static_assert(int64_t{32} * 128 * activation_top(Format::int8) < (int64_t{1} << 31), "int8 sum");

// What a product of integers is multiplied by at the very end. e4m3 scales are read as if they were
// half-precision numbers, which makes them 256 times too small.
inline float unit(Format f) {
  switch (f) {
    case Format::nf4:
    case Format::nf4_16: return static_cast<float>(256.0 / kNf4Unit);
    case Format::mxfp4: return 0.5f;
    default: return 1.0f;
  }
}

}  // namespace localmimo
