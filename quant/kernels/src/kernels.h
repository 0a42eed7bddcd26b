// Kernels: what one instruction set offers. Each isa_*.cpp fills one table; dispatch.cpp picks one.
// All of them do the same arithmetic in the same order, so that they agree bit for bit.
#pragma once
#include <cstddef>
#include <cstdint>

#include "attention.h"
#include "layout.h"

namespace localmimo {

// Quantised activations of some tokens, reached through one pointer per token.
struct ActivationPointers {
  const int16_t* const* codes;  // [n][padded_cols]
  const float* const* scales;   // [n][padded_cols / 32]
};

constexpr int kCells = 1024;

// The tables of a 4-bit codec, made by quant/formats/fourbit.py and explained there.
struct Book {
  const float* values;          // [16] by code
  const int32_t* code_of_rank;  // [16]
  const int32_t* position;      // [kCells] rank of the nearest value at the left edge of a cell
  const float* midpoint;        // [kCells] above it the next rank is nearer
  const float* rough;           // [kCells] the value nearest to the cell's centre
  const float* scale_of_byte;   // [256]
  const float* covers;          // [n_covers] ascending: the largest magnitude a scale byte covers
  int n_covers;
  float per_unit, centre;       // cell = ratio * per_unit + centre
  const int32_t* steps;         // [n_steps] candidates, from the covering scale
  int n_steps;
};

// Bytes that a thread reads one after the other, up to `end`, and the address at which it continues: prefetching runs
// ahead of the kernel, over the end of a range into the next.
struct ReadRange {
  const uint8_t* end;
  const uint8_t* next;  // null: nowhere
  const uint8_t* ahead(const uint8_t* p, int64_t distance) const {
    const uintptr_t at = reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(distance);
    const uintptr_t last = reinterpret_cast<uintptr_t>(end);
    const uintptr_t on = next ? reinterpret_cast<uintptr_t>(next) : last - static_cast<uintptr_t>(distance);
    return reinterpret_cast<const uint8_t*>(at < last ? at : at - last + on);
  }
};

// The two ranges of a packed matrix.
struct ReadAhead {
  ReadRange codes, scales;
};

struct Kernels {
  const char* name;
  // x [cols] -> codes [padded], scales [padded / 32]; columns beyond `cols` become 0.
  void (*quantise)(const float* x, int64_t cols, int top, int16_t* codes, float* scales);
  // out[(s * n_tokens + t) * kStrip + r] = row (strip + s) * kStrip + r of W times token t.
  void (*product)(const Matrix& w, int64_t strip, int n_strips, const ActivationPointers& x, int n_tokens, float* out,
                  void* scratch, const ReadAhead& read_ahead);
  // gate[i] = silu(gate[i]) * up[i]
  void (*silu_mul)(float* gate, const float* up, int64_t n);
  // Packs up to 16 rows of w / scale, row-major, into one row group; returns the squared error.
  double (*encode)(const Book& book, Format f, const float* w, int64_t rows, int64_t cols, float scale,
                   uint8_t* codes, uint8_t* scales);
  // The exclusive or of n bytes, a multiple of 256: nothing but reading.
  uint64_t (*read)(const uint8_t* data, size_t n);
  // Attention and the router: see attention_kernel.h.
  void (*attend_section)(const CachedHead& h, const Queries& q, int64_t begin, int64_t end, float* states, void* scratch);
  void (*merge_states)(float* into, const float* later, int64_t d_v);
  void (*finish_state)(const float* state, const float* sink, int64_t d_v, float* out);
  // out[r * n_experts + e] = x[r] . w[e] for rows of n floats
  void (*dots)(const float* x, const float* w, int64_t rows, int64_t experts, int64_t n, int64_t n_experts, float* out);
  void (*sigmoid)(float* x, int64_t n);  // n is a multiple of 16
  void (*to_bf16)(const float* x, int64_t n, uint16_t* out);  // see bf16.h
};

constexpr int64_t kScratchBytes = 1 << 16;  // what `product` may use per thread

}  // namespace localmimo
