// A layer in one call, so that a token costs few calls from Python: norm, projections, attention, residual, norm, and the
// router or a dense MLP. The same arithmetic as its parts called one by one.
#pragma once
#include <vector>

#include "attention.h"
#include "kernels.h"

namespace localmimo {

struct LayerBlock {
  int64_t hidden, heads, kv_heads, d_k, d_v, window;
  float eps, scale, value_scale;
  const float *attn_norm, *mlp_norm, *sink;
  Matrix qkv, o;
  // Either a router or a dense MLP.
  bool routed;
  int64_t n_experts, top_k;
  const float *router, *bias;
  float routed_scale;
  bool normalise, rounded;  // rounded: the router's input is rounded to bf16
  Matrix gate, up, down;
};

// New rows of one sequence: their rows in its cache, and their rotation.
struct SequenceRows {
  int64_t n, position;
  const float *cos, *sin;  // [n][rotary / 2]
  int64_t rotary;
  Store store;
  uint8_t *keys, *values;
  int64_t rows, first;
};

// x [n][hidden], the sequences' rows one after the other, becomes the residual stream behind attention, or behind a dense
// MLP. With a router `normed` [n][hidden], `chosen` and `weights` [n][top_k] say what the experts are to do.
void run_block(const LayerBlock& b, const std::vector<SequenceRows>& sequences, float* x, float* normed, int64_t* chosen,
               float* weights);

}  // namespace localmimo
