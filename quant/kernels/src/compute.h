// Compute: products with a packed matrix and with a layer's experts, and packing. Knows no Python.
#pragma once
#include <cstdint>

#include "kernels.h"

namespace localmimo {

// y [n, rows] = x [n, cols] W^T; x and y are float32, or bf16 when `half`.
void linear(const Matrix& w, const void* x, bool half, int64_t n, void* y);

// The offsets of the nine parts of an expert in its page.
struct PageShape {
  Format format;
  int64_t hidden, inner;
  struct Part { int64_t codes, scales, scale; } gate, up, down;  // scale < 0: no tensor scale
};

// The work of one call. Expert e runs for the pairs first[e] .. first[e + 1] - 1; pair i is token
// token[i] with weight[i]. Its output is added to row to[i] of `out`, or stored there if `store`.
struct Routing {
  int64_t n_experts;
  const uint8_t* const* pages;
  const int64_t* first;
  const int64_t* token;
  const float* weight;
  const int64_t* to;
  bool store;
};

// x [n, hidden] float32, or bf16 when `half`; out [.., hidden] float32. Additions happen in the order
// of the experts in `routing`, whatever the threads do.
void experts(const PageShape& shape, const Routing& routing, const void* x, bool half, int64_t n, float* out);

// out [n, width] = terms [n, k, width] added over k, first to last.
void add_in_order(const float* terms, int64_t n, int64_t k, int64_t width, float* out);

// Packs w [rows, cols] float32 divided by `scale` with a 4-bit codec; returns the squared error, in
// units of scale^2, the same for any number of threads.
double encode(const Book& book, Format f, const float* w, int64_t rows, int64_t cols, float scale, uint8_t* codes,
              uint8_t* scales);

// Reads every byte with the pool's threads and returns their exclusive or: measures the memory.
uint64_t read_all(const uint8_t* data, size_t n);

}  // namespace localmimo
