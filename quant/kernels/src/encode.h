// Encode: the 4-bit scale search and nearest codes, step for step the arithmetic of the torch
// reference in quant/formats/fourbit.py, so that both give the same bytes. Written over the policy V of
// product.h, whose Finder looks up the book; included by isa_*.cpp only.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "inline.h"
#include "kernels.h"

namespace localmimo {
namespace {

using Lanes = float[kLanes];
using LaneInts = int32_t[kLanes];

// The lowest index whose scale covers `largest`, without branches to mispredict.
inline int covering_index(const Book& book, float largest) {
  int low = 0, n = book.n_covers;
  while (n > 0) {
    const int half = (n + 1) / 2;
    low += book.covers[low + half - 1] < largest ? half : 0;
    n -= half;
  }
  return low;
}

inline int candidate_byte(Format f, int covering, int step) {
  const int last = f == Format::mxfp4 ? 254 : 126;
  const int half = (covering + 1) / 2 < 1 ? 1 : (covering + 1) / 2;
  const int floor = f == Format::mxfp4 ? 0 : half;
  const int byte = covering + step < floor ? floor : covering + step;
  return byte > last ? last : byte;
}

// The squared error of a block for one scale per row; terms are added by halving, as the reference does.
template <class V, int block>
LM_INLINE typename V::F rough_error(const typename V::Finder& find, const Lanes* weights, typename V::F scale) {
  const typename V::F inverse = V::div(V::set1(1.0f), scale);
  const auto square = [&](int c) LM_INLINE_LAMBDA {
    const typename V::F w = V::load(weights[c]);
    const typename V::F off = V::sub(V::mul(find.rough(V::mul(w, inverse)), scale), w);
    return V::mul(off, off);
  };
  alignas(64) Lanes sum[block / 2];
  for (int c = 0; c < block / 2; ++c) V::store(sum[c], V::add(square(c), square(c + block / 2)));
  for (int half = block / 4; half; half /= 2)
    for (int c = 0; c < half; ++c) V::store(sum[c], V::add(V::load(sum[c]), V::load(sum[c + half])));
  return V::load(sum[0]);
}

template <int block>
void largest_of(const Lanes* weights, Lanes& largest) {
  for (int r = 0; r < kLanes; ++r) largest[r] = 0;
  for (int c = 0; c < block; ++c)
    for (int r = 0; r < kLanes; ++r) {
      const float size = std::fabs(weights[c][r]);
      largest[r] = size > largest[r] ? size : largest[r];
    }
}

// mxfp4 reaches from 2^-127 to 2^127, where squares leave the range of float: compared in units of the
// covering scale, a power of two.
template <class V, int block>
void in_units(const Lanes* weights, typename V::F unit, Lanes* out) {
  for (int c = 0; c < block; ++c) V::store(out[c], V::div(V::load(weights[c]), unit));
}

template <class V, int block>
void search(const Book& book, const typename V::Finder& find, Format f, const Lanes* weights, LaneInts& best) {
  alignas(64) Lanes largest, error, best_error, scaled[block];
  alignas(64) LaneInts covering, byte;
  largest_of<block>(weights, largest);
  for (int r = 0; r < kLanes; ++r) {
    covering[r] = covering_index(book, largest[r]);
    best_error[r] = INFINITY;
    best[r] = 0;
    byte[r] = candidate_byte(f, covering[r], 0);
  }
  typename V::F unit = V::set1(1.0f);
  if (f == Format::mxfp4) {
    unit = V::gather(book.scale_of_byte, byte);
    in_units<V, block>(weights, unit, scaled);
    weights = scaled;
  }
  for (int sign = 0; sign < (f == Format::mxfp4 ? 1 : 2); ++sign)
    for (int s = 0; s < book.n_steps; ++s) {
      for (int r = 0; r < kLanes; ++r) byte[r] = candidate_byte(f, covering[r], book.steps[s]) + 128 * sign;
      const typename V::F scale = V::div(V::gather(book.scale_of_byte, byte), unit);
      V::store(error, rough_error<V, block>(find, weights, scale));
      for (int r = 0; r < kLanes; ++r) {
        const bool better = error[r] < best_error[r];
        best_error[r] = better ? error[r] : best_error[r];
        best[r] = better ? byte[r] : best[r];
      }
    }
  for (int r = 0; r < kLanes; ++r) best[r] = largest[r] == 0 ? 0 : best[r];
}

// Nearest codes of a block given its scale bytes; returns the squared error.
template <class V, int block>
double nearest(const Book& book, const typename V::Finder& find, const Lanes* weights, const LaneInts& bytes,
               LaneInts* codes) {
  alignas(64) Lanes divisor, off;
  alignas(64) double squared[kLanes] = {};
  const typename V::F scale = V::gather(book.scale_of_byte, bytes);
  V::store(divisor, scale);
  for (int r = 0; r < kLanes; ++r) divisor[r] = divisor[r] == 0 ? 1.0f : divisor[r];
  for (int c = 0; c < block; ++c) {
    const typename V::F w = V::load(weights[c]);
    find.code(V::div(w, V::load(divisor)), codes[c]);
    V::store(off, V::sub(V::mul(V::gather16(book.values, codes[c]), scale), w));
    for (int r = 0; r < kLanes; ++r) squared[r] += static_cast<double>(off[r]) * off[r];
  }
  double total = 0;
  for (int r = 0; r < kLanes; ++r) total += squared[r];
  return total;
}

inline void load_block(const float* w, int64_t rows, int64_t stride, int64_t cols, float scale, Lanes* weights) {
  if (rows == kLanes && cols == kBlock) {
    for (int r = 0; r < kLanes; ++r)
      for (int c = 0; c < kBlock; ++c) weights[c][r] = w[r * stride + c];
  } else {
    std::memset(weights, 0, kBlock * sizeof(Lanes));
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c) weights[c][r] = w[r * stride + c];
  }
  for (int c = 0; c < kBlock; ++c)
    for (int r = 0; r < kLanes; ++r) weights[c][r] /= scale;
}

inline void pack_codes(const LaneInts* codes, uint8_t* out) {
  for (int v = 0; v < 4; ++v) {
    uint32_t word[kLanes];  // four columns of a row, little-endian
    for (int r = 0; r < kLanes; ++r) word[r] = 0;
    for (int j = 0; j < 4; ++j)
      for (int r = 0; r < kLanes; ++r)
        word[r] |= static_cast<uint32_t>(codes[4 * v + j][r] | codes[16 + 4 * v + j][r] << 4) << (8 * j);
    std::memcpy(out + 64 * v, word, 64);
  }
}

template <class V, int block>
double encode_group(const Book& book, Format f, const float* w, int64_t rows, int64_t cols, float scale,
                    uint8_t* codes, uint8_t* scales) {
  constexpr int kParts = kBlock / block;
  alignas(64) Lanes weights[kBlock];
  alignas(64) LaneInts chosen[kBlock], bytes;
  const typename V::Finder find(book);
  double error = 0;
  for (int64_t b = 0; b < blocks(f, cols); ++b) {
    const int64_t left = cols - b * kBlock;
    load_block(w + b * kBlock, rows, cols, left < kBlock ? left : kBlock, scale, weights);
    for (int part = 0; part < kParts; ++part) {
      const Lanes* piece = weights + part * block;
      search<V, block>(book, find, f, piece, bytes);
      error += nearest<V, block>(book, find, piece, bytes, chosen + part * block);
      for (int r = 0; r < kLanes; ++r) scales[(b * kParts + part) * kLanes + r] = static_cast<uint8_t>(bytes[r]);
    }
    pack_codes(chosen, codes + b * codes_per_block(f));
  }
  return error;
}

template <class V>
double encode(const Book& book, Format f, const float* w, int64_t rows, int64_t cols, float scale, uint8_t* codes,
              uint8_t* scales) {
  return f == Format::nf4_16 ? encode_group<V, 16>(book, f, w, rows, cols, scale, codes, scales)
                             : encode_group<V, 32>(book, f, w, rows, cols, scale, codes, scales);
}

// ---- look-ups in the book, one value at a time

// The cell of a ratio; anything, NaN too, lands inside the table.
inline int32_t cell_of(const Book& book, float ratio) {
  const float last = static_cast<float>(kCells - 1);
  float c = ratio * book.per_unit + book.centre;  // per_unit is a power of two: only the sum is rounded
  c = c < last ? c : last;
  c = c > 0.0f ? c : 0.0f;
  return static_cast<int32_t>(c);
}

inline int32_t code_of(const Book& book, float ratio) {
  const int32_t cell = cell_of(book, ratio);
  return book.code_of_rank[book.position[cell] + (ratio > book.midpoint[cell] ? 1 : 0)];
}

// ---- the same by buckets: the cells between `first` and `first + 32 << shift`, beyond which nothing
// changes, fall into 32 buckets with at most one step of the book in each.

struct Buckets {
  static constexpr int kCount = 32;
  int first, shift;
  // Up to `edge` the bucket has rank `rank`, from `next` on one more; between the two `midpoint` decides.
  float edge[kCount], next[kCount], midpoint[kCount];
  int32_t rank[kCount];
  float rough_edge[kCount], rough_below[kCount], rough_above[kCount];

  explicit Buckets(const Book& book) {
    first = 0;
    while (first + 1 < kCells && same(book, first, first + 1)) ++first;
    int last = kCells - 1;
    while (last > first && same(book, last - 1, last)) --last;
    for (shift = 0; ((last - first) >> shift) + 1 > kCount; ++shift) {}
    for (int b = 0; b < kCount; ++b) fill(book, b);
  }

  static bool same(const Book& book, int a, int b) {
    return book.position[a] == book.position[b] && book.rough[a] == book.rough[b] && book.midpoint[a] == INFINITY &&
           book.midpoint[b] == INFINITY;
  }

 private:
  int cell(int b, int i) const {
    const int c = first + (b << shift) + i;
    return c < kCells ? c : kCells - 1;
  }

  void fill(const Book& book, int b) {
    const int begin = cell(b, 0);
    rank[b] = book.position[begin];
    edge[b] = next[b] = midpoint[b] = rough_edge[b] = INFINITY;
    rough_below[b] = rough_above[b] = book.rough[begin];
    for (int i = 0; i < 1 << shift; ++i) {
      const int c = cell(b, i);
      if (edge[b] == INFINITY && book.midpoint[c] != INFINITY) {
        midpoint[b] = book.midpoint[c];
        edge[b] = static_cast<float>(c);
        next[b] = static_cast<float>(c + 1);
      } else if (edge[b] == INFINITY && book.position[c] != rank[b]) {
        edge[b] = next[b] = static_cast<float>(c);
      }
      if (rough_edge[b] == INFINITY && book.rough[c] != rough_below[b]) {
        rough_edge[b] = static_cast<float>(c);
        rough_above[b] = book.rough[c];
      }
    }
  }
};

}  // namespace
}  // namespace localmimo
