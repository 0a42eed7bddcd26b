// c [rows][16 cells] = or, where a is stored in columns, += a [rows][depth] b [depth][cells]. Every element of c is one
// chain over depth; what a and b hold and how they are multiplied is up to the policy S (attention_store.h).
#pragma once
#include <cstdint>

#include "inline.h"

namespace localmimo {
namespace {

// Memory that is read soon, in even portions: from a pointer on, so many bytes for each row and step of depth.
struct Soon {
  const uint8_t* from;
  int64_t portion;
};

// The scales of integer sums: a factor for each row, and where rows are keys one for each lane, from which `above` is
// subtracted first.
struct Units {
  const float *rows, *lanes;
  const int32_t* above;
};

// Of a each row is either a row in memory, or one of sixteen columns (`lda` is then 0, and nothing is fetched ahead).
template <class S>
struct Product {
  const float* a;  // words: [rows][lda], or [depth * S::kWords][16]
  int64_t lda;
  const typename S::Cell* b;
  float* c;
  int64_t ldc, depth;
  Soon soon[2];
  Units units;
};

template <class V, class S, bool columns, int cells, int rows>
void product_tile(const Product<S>& p, int64_t row) {
  const int64_t lda = columns ? 1 : p.lda;
  const float* a = p.a + row * lda;
  float* c = p.c + row * p.ldc;
  typename S::Sum sum[rows][cells];
  for (int r = 0; r < rows; ++r)
    for (int j = 0; j < cells; ++j) sum[r][j] = S::template begin<columns>(c + r * p.ldc + 16 * j);
  const uint8_t *first = nullptr, *second = nullptr;
  if (!columns) first = p.soon[0].from + row * p.depth * p.soon[0].portion;
  if (!columns) second = p.soon[1].from + row * p.depth * p.soon[1].portion;
  for (int64_t t = 0; t < p.depth; ++t, a += S::kWords * (columns ? 16 : 1)) {
    if (!columns) {
      V::template prefetch<1>(first + t * rows * p.soon[0].portion);
      V::template prefetch<1>(second + t * rows * p.soon[1].portion);
    }
    typename S::Right right[cells];
    for (int j = 0; j < cells; ++j) right[j] = S::right(p.b[t * cells + j]);
    for (int r = 0; r < rows; ++r)
      for (int j = 0; j < cells; ++j) sum[r][j] = S::template add<columns ? 16 : 1>(sum[r][j], a + r * lda, right[j]);
  }
  for (int r = 0; r < rows; ++r)
    for (int j = 0; j < cells; ++j) S::template end<columns>(sum[r][j], p.units, row + r, c + r * p.ldc + 16 * j);
}

template <class V, class S, bool columns, int cells, int most>
void product_tile_any(const Product<S>& p, int64_t row, int64_t rows) {
  if constexpr (most > 1) {
    if (rows < most) return product_tile_any<V, S, columns, cells, most - 1>(p, row, rows);
  }
  product_tile<V, S, columns, cells, most>(p, row);
}

// Tiles of `most` rows, as equal as can be.
template <class V, class S, bool columns, int cells, int most>
void product_rows(const Product<S>& p, int64_t row, int64_t rows) {
  const int64_t tiles = (rows + most - 1) / most, size = rows / tiles, longer = rows % tiles;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t n = size + (i < longer);
    product_tile_any<V, S, columns, cells, most>(p, row, n);
    row += n;
  }
}

}  // namespace
}  // namespace localmimo
