// Normalised sum of neighbouring rows (Eq. E3). Shapes: adjacency (n, ceil(n/64)) i64, p and mean (n,M).
#pragma once

#include "vidops/tensor_view.h"

namespace vidops {

struct NeighbourMeanParams {
  TensorView adjacency, p;
  TensorView mean;  // contiguous, like p
};

void neighbour_mean_forward_cpu(const NeighbourMeanParams& params, int threads);

}  // namespace vidops
