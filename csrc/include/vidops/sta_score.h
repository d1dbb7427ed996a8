// Scores of semantic-aware temporal accumulation (arXiv 2308.04549). Shapes: x (B,T N,D), metric (B,T N,d); keep
// (B,T,K) i64; activation, acc, score (B,T,N); first_order (B,N) i64, first_similarity (B,ceil(N/2)).
#pragma once

#include "vidops/tensor_view.h"

namespace vidops {

struct StaScoreParams {
  TensorView x, metric;
  TensorView keep, activation, acc, score, first_order, first_similarity;  // contiguous
  bool reverse = false, first_frame_pruned = false;
};

void sta_score_forward_cpu(const StaScoreParams& params, int threads);

}  // namespace vidops
