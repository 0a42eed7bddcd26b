// Attention: what a call is given, and the states that its parts hand to one another. Knows no Python and no
// instruction set; attention_kernel.h is the inner loop, attention.cpp shares the work out.
//
// Order of the arithmetic, the same for every number of queries, threads and instruction set: the keys that a query
// sees are in blocks of kKeys positions and in sections (section_end), both fixed by position. Within a section blocks
// follow each other with a running maximum; sections are merged in ascending order; the sink comes last.
#pragma once
#include <cstdint>

namespace localmimo {

enum class Store : int { f32 = 0, bf16 = 1, int8 = 2 };

constexpr int64_t kKeys = 64;       // positions of a block
constexpr int64_t kQueryRows = 128;  // most rows of queries (tokens x heads of a group) that share packed keys
constexpr int64_t kSection = 512;    // positions of a section, until 1/16 of the position is more

constexpr int64_t kMaxHeadDim = 1024;  // dimensions of a head at most

// A row of d values; after int8 values comes their scale, a float.
constexpr int64_t row_bytes(Store s, int64_t d) { return s == Store::f32 ? 4 * d : s == Store::bf16 ? 2 * d : d + 4; }

// Keys and values of one KV head. Position p is in row (p - first) % rows.
struct CachedHead {
  Store store;
  const uint8_t *keys, *values;
  int64_t first, rows, d_k, d_v;
  int64_t row(int64_t p) const { return p - first < rows ? p - first : (p - first) % rows; }
};

// Rows t * group + j: query head j of the group, token t at `position` + t, which sees `window` keys with itself.
struct Queries {
  const float* q;  // [tokens * group][d_k], multiplied by the softmax scale
  int64_t group, tokens, position, window;
  int64_t last() const { return position + tokens - 1; }
  int64_t lowest() const { return position - window + 1 > 0 ? position - window + 1 : 0; }
};

// The state of a row: a weighted sum of values, the sum of weights, the maximum.
constexpr int64_t padded16(int64_t n) { return (n + 15) / 16 * 16; }
constexpr int64_t state_floats(int64_t d_v) { return padded16(d_v) + 16; }
// Bytes that attend_section may use for so many rows of queries: four times sixteen lanes of values, queries and
// weights by groups of sixteen rows with three numbers to a row, keys, scores; no number takes more than four bytes.
constexpr int64_t section_scratch(int64_t rows, int64_t d_k) {
  const int64_t lanes = padded16(rows);
  return 4 * (kKeys * (4 * 16 + lanes + 16 + d_k + 3) + lanes * (d_k + 3 + 3));
}

// One past the last position of the section that holds p: 512 positions, later 1/16 to 1/32 of the position.
inline int64_t section_end(int64_t p) {
  int64_t size = kSection;
  while (p >= 32 * size) size *= 2;
  return (p / size + 1) * size;
}

// One layer, one sequence: n new tokens behind `position` others.
struct AttendCall {
  int64_t n, heads, kv_heads, d_k, d_v, rotary, position, window;
  const float* joined;       // [n][heads * d_k + kv_heads * (d_k + d_v)]
  const float *cos, *sin;    // [n][rotary / 2]
  float value_scale, scale;  // of what goes into the cache; of the logits
  Store store;
  uint8_t *keys, *values;    // [kv_heads][head_rows][row_bytes]
  int64_t head_rows, first, rows;  // see CachedHead
  const float* sink;         // [heads] or null
  float* out;                // [n][heads * d_v]
};

// Rotates queries and keys, scales the values, writes both into the cache, attends.
void attend(const AttendCall& call);

// out[i] = x[i] / rms(x[i]) * weight; where `add` is given it is first added to x.
void rms_norm(float* x, const float* add, const float* weight, float eps, int64_t n, int64_t hidden, float* out);

// The top_k experts of each row of x by sigmoid(x w) + bias, ascending, and their weights by sigmoid(x w).
struct RouteCall {
  int64_t n, hidden, n_experts, top_k;
  const float *x, *weight, *bias;
  float scale;
  bool normalise;
  int64_t* chosen;  // [n][top_k]
  float* weights;   // [n][top_k]
};
void route(const RouteCall& call);

}  // namespace localmimo
