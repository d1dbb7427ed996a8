// Scores of semantic-aware temporal accumulation (arXiv 2308.04549). Shapes: x (B,T N,D), metric (B,T N,d); keep
// (B,T,K) i64; activation, acc, score (B,T,N); first_order (B,N) i64, first_similarity (B,ceil(N/2)). Of
// sta_prune besides: source (B,T N,D), the tokens in a dtype of their own, and kept (B,T K,D), those that are kept.
#pragma once

#include "vidops/tensor_view.h"

namespace vidops {

struct StaScoreParams {
  TensorView x, metric;
  TensorView keep, activation, acc, score, first_order, first_similarity;  // contiguous
  TensorView source, kept;  // may be missing; kept contiguous, dtype of source
  bool reverse = false, first_frame_pruned = false;
};

void sta_score_forward_cpu(const StaScoreParams& params, int threads);

}  // namespace vidops
