// CUDA entry points of token pruning; shapes as in the CPU headers. Scratch is i64 words.
#pragma once

#include "vidops/tensor_view.h"

namespace vidops {

struct BipartiteMatchCudaParams {
  TensorView metric;
  TensorView order, similarity, partner;
  TensorView workspace;
  bool class_token = false, distill_token = false;
};

int64_t bipartite_match_workspace_cuda(int64_t batch, int64_t tokens, int64_t width);
void bipartite_match_forward_cuda(const BipartiteMatchCudaParams& params, int device, void* stream);

struct StaScoreCudaParams {
  TensorView x, metric;
  TensorView keep, activation, acc, score, first_order, first_similarity;
  TensorView workspace;
  bool reverse = false, first_frame_pruned = false;
};

int64_t sta_score_workspace_cuda(int64_t batch, int64_t frames, int64_t tokens, int64_t width, bool f64);
void sta_score_forward_cuda(const StaScoreCudaParams& params, int device, void* stream);

struct GatherTokensCudaParams {
  TensorView x, index;
  TensorView out;
  TensorView workspace;  // of scatter alone
};

void gather_tokens_forward_cuda(const GatherTokensCudaParams& params, int device, void* stream);
int64_t scatter_tokens_workspace_cuda(int64_t batch, int64_t taken, int64_t tokens);
void scatter_tokens_forward_cuda(const GatherTokensCudaParams& params, int device, void* stream);

struct NearestKeptCudaParams {
  TensorView keep;
  TensorView source;
  int64_t width = 1;
};

void nearest_kept_forward_cuda(const NearestKeptCudaParams& params, int device, void* stream);

}  // namespace vidops
