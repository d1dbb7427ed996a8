// Nearest centroid of every given map row (Eq. E4). Shapes: p, log_p (n,M), centroids and log_centroids (K,M), label (n) i64.
#pragma once

#include "vidops/tensor_view.h"

namespace vidops {

struct AssignRowsParams {
  TensorView p, log_p;
  TensorView centroids, log_centroids;
  TensorView label;
};

void assign_rows_forward_cpu(const AssignRowsParams& params, int threads);

}  // namespace vidops
