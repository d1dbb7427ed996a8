// Nearest centroid of every attention row, keys streamed (Eq. E4). Shapes: q (H,N,D), k (H,M,D), lse (H,N), centroids and log_centroids (K,M), label (N) i64.
#pragma once

#include "vidops/tensor_view.h"

namespace vidops {

struct AssignClustersParams {
  TensorView q, k;
  TensorView lse;  // absent: computed inside
  TensorView centroids, log_centroids;
  TensorView label;
  TensorView workspace;  // CUDA only: i64 scratch of assign_clusters_workspace_cuda() words
  double scale = 1.0;
};

void assign_clusters_forward_cpu(const AssignClustersParams& params, int threads);
void assign_clusters_forward_cuda(const AssignClustersParams& params, int device, void* stream);
int64_t assign_clusters_workspace_cuda(int64_t heads, int64_t queries, int64_t keys, int64_t head_size, int64_t clusters);

}  // namespace vidops
