// Mean of the rows of each segment, rows added in index order. Shapes: x (n,M), label (n) i64, mean (K,M).
#pragma once

#include "vidops/tensor_view.h"

namespace vidops {

struct SegmentMeanParams {
  TensorView x, label;
  TensorView mean;  // contiguous, like x
  TensorView workspace;  // CUDA only: i64 scratch of segment_mean_workspace_cuda() words
};

void segment_mean_forward_cpu(const SegmentMeanParams& params, int threads);
void segment_mean_forward_cuda(const SegmentMeanParams& params, int device, void* stream);
int64_t segment_mean_workspace_cuda(int64_t rows, int64_t segments);

}  // namespace vidops
