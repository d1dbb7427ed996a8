// Normalised sum of neighbouring rows (Eq. E3). Shapes: adjacency (n, ceil(n/64)) i64, p and mean (n,M).
#pragma once

#include "vidops/tensor_view.h"

namespace vidops {

struct NeighbourMeanParams {
  TensorView adjacency, p;
  TensorView mean;       // contiguous, like p
  TensorView workspace;  // CUDA only: i64 scratch of neighbour_mean_workspace_cuda() words
};

void neighbour_mean_forward_cpu(const NeighbourMeanParams& params, int threads);
void neighbour_mean_forward_cuda(const NeighbourMeanParams& params, int device, void* stream);
int64_t neighbour_mean_workspace_cuda(int64_t rows);

}  // namespace vidops
