// Activations: the quantised inputs of one call, one row per token.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace localmimo {

class Activations {
 public:
  // Grows, never shrinks: a decoding loop allocates once.
  void resize(int64_t n, int64_t cols);
  int64_t cols() const { return cols_; }
  int16_t* codes(int64_t i) { return codes_.get() + i * (padded_ + kApart); }
  float* scales(int64_t i) { return scales_.get() + i * (padded_ / kBlock); }
  // Quantises x [n][cols], bf16 when `half`, spread over the pool.
  void fill(Pool& pool, const Kernels& k, const void* x, bool half, int64_t n, int64_t cols, Format format);

 private:
  static constexpr int kApart = 32;  // a cache line between rows, whose columns would else share a cache set
  int64_t cols_ = 0, padded_ = 0;
  size_t n_codes_ = 0, n_scales_ = 0;
  std::unique_ptr<int16_t[]> codes_;
  std::unique_ptr<float[]> scales_;
};

}  // namespace localmimo
