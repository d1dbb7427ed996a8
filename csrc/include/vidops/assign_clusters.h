// Nearest centroid of every attention row, keys streamed (Eq. E4). Shapes: q (H,N,D), k (H,M,D), lse (H,N),
// centroids and log_centroids (K,M), label (N) i64.
#pragma once

#include "vidops/tensor_view.h"

namespace vidops {

struct AssignClustersParams {
  TensorView q, k;  // f32 or f64 on the CPU; f32, f16 or bf16 on CUDA
  TensorView lse;   // absent: computed inside
  TensorView centroids, log_centroids;
  TensorView label;
  double scale = 1.0;
  TensorView workspace;   // CUDA only: i64 scratch of assign_clusters_workspace_cuda() words
  int64_t pass_rows = 0;  // CUDA only: rows of P that exist at a time, 0 = what fits 128 MB
};

void assign_clusters_forward_cpu(const AssignClustersParams& params, int threads);
void assign_clusters_forward_cuda(const AssignClustersParams& params, int device, void* stream);
int64_t assign_clusters_workspace_cuda(int64_t heads, int64_t queries, int64_t channels, int64_t keys,
                                       int64_t clusters, bool f32, int64_t pass_rows);

}  // namespace vidops
