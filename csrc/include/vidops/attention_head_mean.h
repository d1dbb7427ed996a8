// Head-averaged softmax map (Eq. E1) and its backward. Shapes: q (B,H,N,D), k (B,H,M,D), p and log_p (B,N,M), lse (B,H,N).
#pragma once

#include "vidops/tensor_view.h"

namespace vidops {

struct AttentionHeadMeanParams {
  TensorView q, k;             // f32 or f64 on the CPU; also f16, bf16 on CUDA
  TensorView p, log_p, lse;    // accumulation dtype, contiguous; log_p absent when not wanted
  double scale = 1.0;
  double dropout_p = 0.0;      // see video_attention.h for the counter-based mask
  uint64_t seed = 0;
  TensorView workspace;        // CUDA only: i64 scratch of attention_head_mean_workspace_cuda() words
};

struct AttentionHeadMeanBackwardParams {
  TensorView grad_p;           // (B,N,M), accumulation dtype
  TensorView q, k, lse;
  TensorView grad_q, grad_k;   // like q, k; contiguous
  double scale = 1.0;
  double dropout_p = 0.0;
  uint64_t seed = 0;
  TensorView workspace;        // CUDA only, as above, of a backward
};

void attention_head_mean_forward_cpu(const AttentionHeadMeanParams& params, int threads);
void attention_head_mean_backward_cpu(const AttentionHeadMeanBackwardParams& params, int threads);
// q and k of one dtype: f32, f16 or bf16. With dropout there is no log_p.
void attention_head_mean_forward_cuda(const AttentionHeadMeanParams& params, int device, void* stream);
void attention_head_mean_backward_cuda(const AttentionHeadMeanBackwardParams& params, int device, void* stream);
int64_t attention_head_mean_workspace_cuda(int64_t batch, int64_t heads, int64_t n, int64_t d, int64_t m, bool f32,
                                           bool backward);

}  // namespace vidops
