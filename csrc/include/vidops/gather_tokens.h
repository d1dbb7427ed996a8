// Rows by index, and the sums of rows by index. Shapes: gather: x (B,N,D), index (B,K) i64, out (B,K,D); scatter: x
// (B,K,D), index (B,K), out (B,N,D). x may have any strides but that of its last axis.
#pragma once

#include "vidops/tensor_view.h"

namespace vidops {

struct GatherTokensParams {
  TensorView x, index;
  TensorView out;  // contiguous, dtype of x
};

void gather_tokens_forward_cpu(const GatherTokensParams& params, int threads);
void scatter_tokens_forward_cpu(const GatherTokensParams& params, int threads);

}  // namespace vidops
