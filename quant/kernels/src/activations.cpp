#include "activations.h"

#include "bf16.h"

namespace localmimo {
namespace {

constexpr int64_t kAlone = 1 << 14;  // values that one thread quantises in a microsecond or two
constexpr int kPiece = 1024;  // columns widened from bf16 at a time; a multiple of 64

void quantise_bf16(const Kernels& k, const uint16_t* x, int64_t cols, int top, int16_t* codes, float* scales) {
  float wide[kPiece];
  for (int64_t from = 0; from < cols; from += kPiece) {
    const int64_t n = cols - from < kPiece ? cols - from : kPiece;
    for (int64_t i = 0; i < n; ++i) wide[i] = from_bf16(x[from + i]);
    k.quantise(wide, n, top, codes + from, scales + from / kBlock);
  }
}

}  // namespace

void Activations::resize(int64_t n, int64_t cols) {
  cols_ = cols;
  padded_ = padded_cols(cols);
  const size_t codes = static_cast<size_t>(n * (padded_ + kApart));
  const size_t scales = static_cast<size_t>(n * padded_ / kBlock);
  if (codes > n_codes_) codes_.reset(new int16_t[n_codes_ = codes]);
  if (scales > n_scales_) scales_.reset(new float[n_scales_ = scales]);
}

void Activations::fill(Pool& pool, const Kernels& k, const void* x, bool half, int64_t n, int64_t cols,
                       Format format) {
  resize(n, cols);
  const int top = activation_top(format);
  const auto one = [&](int64_t i, int64_t, int) {
    if (half) quantise_bf16(k, static_cast<const uint16_t*>(x) + i * cols, cols, top, codes(i), scales(i));
    else k.quantise(static_cast<const float*>(x) + i * cols, cols, top, codes(i), scales(i));
  };
  pool.run(n, one, n * cols <= kAlone);
}

}  // namespace localmimo
