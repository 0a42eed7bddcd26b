// Product: integer dot products of packed rows with quantised activations, written once over a
// policy V that names the vector operations of one instruction set. Included by isa_*.cpp only, and
// kept in an unnamed namespace: code built with AVX-512 flags must never be shared by the linker.
//
// V has: F (16 floats), Sum (integer sums of 16 rows), Step (16-bit weights, 16 rows x 4 columns),
// Acts (4 activations, broadcast), Table (a 16-entry book), and the operations used below.
//
// Order of the arithmetic, the same everywhere: per block of 32 columns (16 for nf4-16) an exact
// integer sum; then out = fma(float(sum) * activation_scale, weight_scale, out), blocks ascending;
// at the end one multiplication by the tensor's scale. Batch size, tiling and threads cannot change it.
#pragma once
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "attention_kernel.h"
#include "encode.h"
#include "exponential.h"
#include "inline.h"
#include "kernels.h"
#include "router_kernel.h"

namespace localmimo {
namespace {

// Prefetching. Codes are asked for kAhead bytes before they are needed, into the level-2 cache; scales a row group of
// 4096 columns before. Where one token of int8 keeps the arithmetic units idle, loads run far ahead by themselves, and
// asking for one line in four shows the hardware where they go without filling its queues. With one token of nf4
// the lines are asked for once more on their way into the first level. Measured on Zen 4, two threads, share of a plain
// read of 47 to 53 GB/s: int8 0.84 without prefetching, 0.79 with each line, 0.93 with one in four, but 0.67 instead of 0.92
// with two tokens; nf4 0.65, 0.91, 0.68, and 0.96 with both levels. Two row groups side by side: 0.60 to 0.75.
constexpr int64_t kLine = 64, kAhead = 16384, kNear = 2048, kBlocksAhead = 128;
template <Format f, int tokens>
constexpr int64_t kEvery = f == Format::int8 && tokens == 1 ? 4 : 1;
template <Format f, int tokens>
constexpr bool kTwice = f == Format::nf4 && tokens == 1;
constexpr int kStepCodes = 64;               // int16 weights of one step: 16 rows x 4 columns
constexpr int kPanelBlocks = 8;              // blocks unpacked at a time: 2 x 8 KiB of weights stay in L1
constexpr int kBlockCodes = 8 * kStepCodes;  // int16 weights of one unpacked block

template <Format f>
struct Reader {
  static constexpr int kParts = f == Format::nf4_16 ? 2 : 1;  // scales per block and row

  static constexpr const int16_t* book() {
    return f == Format::mxfp4 ? kMxfp4Book : kNf4Book;
  }

  static const uint8_t* codes(const Matrix& w, int64_t group) {
    return w.codes + group * blocks(f, w.cols) * codes_per_block(f);
  }

  static const uint8_t* scales(const Matrix& w, int64_t group) {
    return w.scales + group * blocks(f, w.cols) * scales_per_block(f);
  }

  // Calls use(step, column) for the eight steps of a block.
  template <class V, class Use>
  static LM_INLINE void steps(const uint8_t* block, const typename V::Table& table, Use use) {
    if constexpr (f == Format::int8) {
      for (int v = 0; v < 8; ++v) use(V::widen(block + v * 64), 4 * v);
    } else {
      for (int v = 0; v < 4; ++v) {
        typename V::Step low, high;
        V::look_up(block + v * 64, table, low, high);
        use(low, 4 * v);
        use(high, 16 + 4 * v);
      }
    }
  }

  // The scales of one part of block b of a row group.
  template <class V>
  static LM_INLINE typename V::F scale(const uint8_t* scales, int64_t b, int part) {
    if constexpr (f == Format::int8) return V::half(scales + b / 2 * 32);
    else if constexpr (f == Format::mxfp4) return V::e8m0(scales + b * 16);
    else return V::e4m3(scales + (b * kParts + part) * 16);
  }
};

template <class V>
LM_INLINE typename V::F add_block(typename V::F total, const typename V::Sum& sum, typename V::F weight_scale,
                                  float activation_scale) {
  return V::fma(V::mul(V::to_float(sum), V::set1(activation_scale)), weight_scale, total);
}

inline float end_factor(const Matrix& w) {
  float scale = 1.0f;
  if (w.scale) std::memcpy(&scale, w.scale, sizeof scale);
  return scale * unit(w.format);
}

// n tokens, one row group, straight from the packed bytes.
template <class V, Format f, int n>
void direct(const Matrix& w, int64_t group, const ActivationPointers& x, float* out, const ReadAhead& read_ahead) {
  using R = Reader<f>;
  // The halves of a block are summed apart: for the two parts of nf4-16, and where few tokens leave
  // nothing else to do while a sum waits for the one before.
  constexpr int kHalves = R::kParts == 2 || n <= 4 ? 2 : 1;
  const int64_t n_blocks = blocks(f, w.cols);
  const uint8_t* codes = R::codes(w, group);
  const uint8_t* scales = R::scales(w, group);
  const typename V::Table table = V::table(R::book());
  typename V::F total[n];
  for (int t = 0; t < n; ++t) total[t] = V::zero();
  const int16_t* acts[n];
  for (int t = 0; t < n; ++t) acts[t] = x.codes[t];
  for (int64_t b = 0; b < n_blocks; ++b) {
    typename V::Sum sum[n][kHalves];
    for (int t = 0; t < n; ++t)
      for (int h = 0; h < kHalves; ++h) sum[t][h] = V::no_sum();
    const uint8_t* block = codes + b * codes_per_block(f);
    V::template prefetch<codes_per_block(f), kEvery<f, n> * kLine>(read_ahead.codes.ahead(block, kAhead));
    if constexpr (kTwice<f, n>) V::template prefetch<codes_per_block(f), kLine, true>(block + kNear);
    V::template prefetch<1>(read_ahead.scales.ahead(scales + b * scales_per_block(f), kBlocksAhead * scales_per_block(f)));
    R::template steps<V>(block, table, [&](const typename V::Step& step, int column) LM_INLINE_LAMBDA {
      for (int t = 0; t < n; ++t)
        V::mac(sum[t][kHalves == 2 ? column / 16 : 0], step, V::acts(acts[t] + b * kBlock + column));
    });
    for (int p = 0; p < R::kParts; ++p) {
      const typename V::F scale = R::template scale<V>(scales, b, p);
      for (int t = 0; t < n; ++t) {
        const bool merge = kHalves > R::kParts;
        const typename V::Sum whole = merge ? V::merge(sum[t][0], sum[t][kHalves - 1]) : sum[t][p];
        total[t] = add_block<V>(total[t], whole, scale, x.scales[t][b]);
      }
    }
  }
  const typename V::F factor = V::set1(end_factor(w));
  for (int t = 0; t < n; ++t) V::store(out + t * kStrip, V::mul(total[t], factor));
}

template <class V, Format f, int most>
void direct_any(const Matrix& w, int64_t group, const ActivationPointers& x, int n, float* out, const ReadAhead& read_ahead) {
  if constexpr (most > 1) {
    if (n < most) return direct_any<V, f, most - 1>(w, group, x, n, out, read_ahead);
  }
  direct<V, f, most>(w, group, x, out, read_ahead);
}

// Unpacked weights of up to kPanelBlocks blocks of one row group.
struct Panel {
  int16_t codes[kPanelBlocks * kBlockCodes];
  float scales[kPanelBlocks * 2 * kLanes];
};
static_assert(2 * sizeof(Panel) <= kScratchBytes, "two panels per thread");

template <class V, Format f>
void unpack(const Matrix& w, int64_t group, int64_t first, int count, Panel& panel) {
  using R = Reader<f>;
  const uint8_t* codes = R::codes(w, group);
  const uint8_t* scales = R::scales(w, group);
  const typename V::Table table = V::table(R::book());
  for (int b = 0; b < count; ++b) {
    const uint8_t* block = codes + (first + b) * codes_per_block(f);
    V::template prefetch<codes_per_block(f)>(block + kPanelBlocks * codes_per_block(f));
    int16_t* to = panel.codes + b * kBlockCodes;
    R::template steps<V>(block, table, [&](const typename V::Step& step, int column) LM_INLINE_LAMBDA {
      V::save(to + column * kLanes, step);
    });
    for (int p = 0; p < R::kParts; ++p)
      V::store(panel.scales + (b * R::kParts + p) * kLanes, R::template scale<V>(scales, first + b, p));
  }
}

// A register tile: n_groups x n tokens over the blocks of a panel, continuing the totals in `out`.
template <class V, int n_parts, int n_groups, int n>
void tile(const Panel* panels, int count, const ActivationPointers& x, int64_t first, float* out) {
  typename V::F total[n_groups][n];
  for (int g = 0; g < n_groups; ++g)
    for (int t = 0; t < n; ++t) total[g][t] = first ? V::load(out + t * kStrip + g * kLanes) : V::zero();
  const int16_t* acts[n];
  for (int t = 0; t < n; ++t) acts[t] = x.codes[t] + first * kBlock;
  for (int b = 0; b < count; ++b) {
    for (int p = 0; p < n_parts; ++p) {
      typename V::Sum sum[n_groups][n];
      for (int g = 0; g < n_groups; ++g)
        for (int t = 0; t < n; ++t) sum[g][t] = V::no_sum();
      LM_UNROLL
      for (int s = p * (8 / n_parts); s < (p + 1) * (8 / n_parts); ++s) {
        const int at = b * kBlockCodes + s * kStepCodes;
        typename V::Step step[n_groups];
        for (int g = 0; g < n_groups; ++g) step[g] = V::saved(panels[g].codes + at);
        for (int t = 0; t < n; ++t) {
          const typename V::Acts a = V::acts(acts[t] + b * kBlock + 4 * s);
          for (int g = 0; g < n_groups; ++g) V::mac(sum[g][t], step[g], a);
        }
      }
      for (int g = 0; g < n_groups; ++g) {
        const typename V::F scale = V::load(panels[g].scales + (b * n_parts + p) * kLanes);
        for (int t = 0; t < n; ++t)
          total[g][t] = add_block<V>(total[g][t], sum[g][t], scale, x.scales[t][first + b]);
      }
    }
  }
  for (int g = 0; g < n_groups; ++g)
    for (int t = 0; t < n; ++t) V::store(out + t * kStrip + g * kLanes, total[g][t]);
}

template <class V, int n_parts, int n_groups, int most>
void tile_any(const Panel* panels, int count, const ActivationPointers& x, int64_t first, int n, float* out) {
  if constexpr (most > 1) {
    if (n < most) return tile_any<V, n_parts, n_groups, most - 1>(panels, count, x, first, n, out);
  }
  tile<V, n_parts, n_groups, most>(panels, count, x, first, out);
}

// Tiles of at most `most` tokens, as equal as can be: small ones keep the arithmetic units less busy.
template <class V, int n_parts, int n_groups, int most>
void tiles(const Panel* panels, int count, const ActivationPointers& x, int64_t first, int n_tokens, float* out) {
  const int n_tiles = (n_tokens + most - 1) / most, size = n_tokens / n_tiles, longer = n_tokens % n_tiles;
  for (int i = 0, t = 0; i < n_tiles; ++i) {
    const int n = size + (i < longer);
    tile_any<V, n_parts, n_groups, most>(panels, count, {x.codes + t, x.scales + t}, first, n, out + t * kStrip);
    t += n;
  }
}

// One strip and the blocks of one panel: unpack it once for all tokens, then run register tiles over it.
template <class V, Format f, int n_groups>
void panel_of(const Matrix& w, int64_t group, int64_t first, int count, const ActivationPointers& x, int n_tokens, float* out,
              Panel* panels) {
  for (int g = 0; g < n_groups; ++g) unpack<V, f>(w, group + g, first, count, panels[g]);
  tiles<V, Reader<f>::kParts, n_groups, V::kTile / 2>(panels, count, x, first, n_tokens, out);
}

// Many tokens: all strips take their turn at the activations of one panel's columns, which stay in the cache.
template <class V, Format f>
void panelled(const Matrix& w, int64_t group, int n_groups, const ActivationPointers& x, int n_tokens, float* out, void* scratch) {
  Panel* panels = static_cast<Panel*>(scratch);
  const int64_t n_blocks = blocks(f, w.cols);
  for (int64_t first = 0; first < n_blocks; first += kPanelBlocks) {
    const int count = static_cast<int>(n_blocks - first < kPanelBlocks ? n_blocks - first : kPanelBlocks);
    for (int g = 0; g < n_groups; g += 2) {
      float* to = out + g / 2 * n_tokens * kStrip;
      if (g + 2 <= n_groups) panel_of<V, f, 2>(w, group + g, first, count, x, n_tokens, to, panels);
      else panel_of<V, f, 1>(w, group + g, first, count, x, n_tokens, to, panels);
    }
  }
  const typename V::F factor = V::set1(end_factor(w));
  for (int i = 0; i < (n_groups + 1) / 2 * n_tokens * kStrip; i += kLanes)
    V::store(out + i, V::mul(V::load(out + i), factor));
}

template <class V, Format f>
void product_of(const Matrix& w, int64_t strip, int n_strips, const ActivationPointers& x, int n_tokens, float* out,
                void* scratch, const ReadAhead& read_ahead) {
  const int64_t group = 2 * strip, left = row_groups(w.rows) - group;
  const int n_groups = static_cast<int>(left < 2 * n_strips ? left : 2 * n_strips);
  if constexpr (V::kPanels) {
    if (n_tokens > 2 * V::kDirect) return panelled<V, f>(w, group, n_groups, x, n_tokens, out, scratch);
  }
  const int passes = (n_tokens + V::kDirect - 1) / V::kDirect, part = (n_tokens + passes - 1) / passes;
  for (int g = 0; g < n_groups; ++g)
    for (int t = 0; t < n_tokens; t += part) {
      const int n = part < n_tokens - t ? part : n_tokens - t;
      float* to = out + (g / 2 * n_tokens + t) * kStrip + g % 2 * kLanes;
      direct_any<V, f, V::kDirect>(w, group + g, {x.codes + t, x.scales + t}, n, to, read_ahead);
    }
}

template <class V>
void product(const Matrix& w, int64_t strip, int n_strips, const ActivationPointers& x, int n_tokens, float* out, void* scratch,
             const ReadAhead& read_ahead) {
  switch (w.format) {
    case Format::nf4: return product_of<V, Format::nf4>(w, strip, n_strips, x, n_tokens, out, scratch, read_ahead);
    case Format::nf4_16: return product_of<V, Format::nf4_16>(w, strip, n_strips, x, n_tokens, out, scratch, read_ahead);
    case Format::mxfp4: return product_of<V, Format::mxfp4>(w, strip, n_strips, x, n_tokens, out, scratch, read_ahead);
    case Format::int8: return product_of<V, Format::int8>(w, strip, n_strips, x, n_tokens, out, scratch, read_ahead);
  }
}

// ---- activations

template <class V>
void quantise(const float* x, int64_t cols, int top, int16_t* codes, float* scales) {
  alignas(64) float tail[kBlock];
  const int64_t n_blocks = padded_cols(cols) / kBlock;
  for (int64_t b = 0; b < n_blocks; ++b) {
    const float* from = x + b * kBlock;
    const int64_t left = cols - b * kBlock;
    if (left < kBlock) {
      for (int i = 0; i < kBlock; ++i) tail[i] = i < left ? from[i] : 0.0f;
      from = tail;
    }
    const float largest = V::largest(from);  // NaN wins, so that it reaches the output
    // Below 1e-30 the inverse would overflow; such a block counts as zero.
    const float inverse = largest >= 1e-30f ? static_cast<float>(top) / largest : 0.0f;
    scales[b] = largest / static_cast<float>(top);
    V::round(from, inverse, codes + b * kBlock);
  }
}

// ---- SiLU

template <class V>
void silu_mul(float* gate, const float* up, int64_t n) {  // n is a multiple of 16
  for (int64_t i = 0; i < n; i += kLanes) {
    const typename V::F g = V::load(gate + i);
    const typename V::F e = exponential<V>(V::sub(V::zero(), g));
    const typename V::F s = V::div(g, V::add(V::set1(1.0f), e));
    V::store(gate + i, V::mul(s, V::load(up + i)));
  }
}

template <class V>
uint64_t read(const uint8_t* data, size_t n) {
  typename V::Word sum[4] = {};
  for (size_t i = 0; i < n; i += 256)
    for (int j = 0; j < 4; ++j) V::exclusive_or(sum[j], data + i + 64 * j);
  uint64_t words[4][8], all = 0;
  std::memcpy(words, sum, sizeof words);
  for (const auto& eight : words)
    for (uint64_t word : eight) all ^= word;
  return all;
}

// ---- bfloat16

template <class V>
LM_INLINE void sixteen_to_bf16(const float* x, uint16_t* out) {
  uint32_t bits[16];
  V::store(reinterpret_cast<float*>(bits), V::nearest_bf16(V::load(x)));
  for (int i = 0; i < 16; ++i) out[i] = static_cast<uint16_t>(bits[i] >> 16);
}

template <class V>
void all_to_bf16(const float* x, int64_t n, uint16_t* out) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) sixteen_to_bf16<V>(x + i, out + i);
  if (i == n) return;
  float rest[16] = {};
  uint16_t rounded[16];
  std::memcpy(rest, x + i, sizeof(float) * static_cast<size_t>(n - i));
  sixteen_to_bf16<V>(rest, rounded);
  std::memcpy(out + i, rounded, sizeof(uint16_t) * static_cast<size_t>(n - i));
}

template <class V>
constexpr Kernels kernels_of(const char* name) {
  return {name, quantise<V>, product<V>, silu_mul<V>, encode<V>, read<V>,
          attend_section<V>, merge_states<V>, finish_state<V>, dots<V>, sigmoid<V>, all_to_bf16<V>};
}

}  // namespace
}  // namespace localmimo
