// Nearest centroid of every attention row, keys streamed (Eq. E4). Shapes: q (H,N,D), k (H,M,D), lse (H,N), centroids and log_centroids (K,M), label (N) i64.
#pragma once

#include "vidops/tensor_view.h"

namespace vidops {

struct AssignClustersParams {
  TensorView q, k;
  TensorView lse;  // absent: computed inside
  TensorView centroids, log_centroids;
  TensorView label;
  double scale = 1.0;
};

void assign_clusters_forward_cpu(const AssignClustersParams& params, int threads);

}  // namespace vidops
