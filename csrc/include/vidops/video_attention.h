// Softmax attention with optional head-mean map and counter-based dropout, forward and backward.
// Shapes: q, out (B,H,N,D), k and v (B,H,M,D), map (B,N,M), lse (B,H,N).
#pragma once

#include "vidops/tensor_view.h"

namespace vidops {

struct VideoAttentionParams {
  TensorView q, k, v;        // f32 or f64
  TensorView out, map, lse;  // contiguous; map absent when not wanted
  double scale = 1.0;
  double dropout_p = 0.0;
  uint64_t seed = 0;         // Philox key; element ((b*H+h)*N+i)*M+j is its counter
};

struct VideoAttentionBackwardParams {
  TensorView grad_out, grad_map;  // grad_map absent without a map
  TensorView q, k, v, out, lse;
  TensorView grad_q, grad_k, grad_v;
  double scale = 1.0;
  double dropout_p = 0.0;
  uint64_t seed = 0;
};

void video_attention_forward_cpu(const VideoAttentionParams& params, int threads);
void video_attention_backward_cpu(const VideoAttentionBackwardParams& params, int threads);

}  // namespace vidops
