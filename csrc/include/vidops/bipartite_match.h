// The most similar odd token of every even one, and the even tokens in ascending order of that similarity. Shapes:
// metric (B,N,d); order, partner (B,ceil(N/2)) i64; similarity the same in the dtype of metric.
#pragma once

#include "vidops/tensor_view.h"

namespace vidops {

struct BipartiteMatchParams {
  TensorView metric;
  TensorView order, similarity, partner;  // contiguous
  bool class_token = false, distill_token = false;
};

void bipartite_match_forward_cpu(const BipartiteMatchParams& params, int threads);

}  // namespace vidops
