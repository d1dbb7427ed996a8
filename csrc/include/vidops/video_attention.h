// Softmax attention with optional head-mean map and counter-based dropout, forward and backward.
// Shapes: q, out (B,H,N,D), k and v (B,H,M,D), map (B,N,M), lse (B,H,N).
#pragma once

#include "vidops/tensor_view.h"

namespace vidops {

struct VideoAttentionParams {
  TensorView q, k, v;        // f32 or f64 on the CPU; f32, f16 or bf16 on CUDA
  TensorView out, map, lse;  // contiguous; map absent when not wanted
  double scale = 1.0;
  double dropout_p = 0.0;
  uint64_t seed = 0;         // Philox key; element ((b*H+h)*N+i)*M+j is its counter
  TensorView workspace;      // CUDA only: i64 scratch of video_attention_workspace_cuda() words
};

struct VideoAttentionBackwardParams {
  TensorView grad_out, grad_map;  // grad_map absent without a map
  TensorView q, k, v, out, lse;
  TensorView grad_q, grad_k, grad_v;
  double scale = 1.0;
  double dropout_p = 0.0;
  uint64_t seed = 0;
  TensorView workspace;  // CUDA only, as above, of a backward
};

void video_attention_forward_cpu(const VideoAttentionParams& params, int threads);
void video_attention_backward_cpu(const VideoAttentionBackwardParams& params, int threads);
void video_attention_forward_cuda(const VideoAttentionParams& params, int device, void* stream);
void video_attention_backward_cuda(const VideoAttentionBackwardParams& params, int device, void* stream);
int64_t video_attention_workspace_cuda(int64_t batch, int64_t heads, int64_t n, int64_t d, int64_t m, bool f32,
                                       bool backward);

}  // namespace vidops
