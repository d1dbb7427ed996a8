// Nearest centroid of every given map row (Eq. E4). Shapes: p, log_p (n,M), centroids and log_centroids (K,M),
// label (n) i64.
#pragma once

#include "vidops/tensor_view.h"

namespace vidops {

struct AssignRowsParams {
  TensorView p, log_p;
  TensorView centroids, log_centroids;
  TensorView label;
  TensorView workspace;          // CUDA only: i64 scratch of assign_rows_workspace_cuda() words
  int64_t pass_rows = 0;         // CUDA only: rows packed at a time, 0 = what fits 128 MB
  bool centroids_ready = false;  // CUDA only: an earlier call with this workspace packed these centroids
};

void assign_rows_forward_cpu(const AssignRowsParams& params, int threads);
void assign_rows_forward_cuda(const AssignRowsParams& params, int device, void* stream);
int64_t assign_rows_workspace_cuda(int64_t rows, int64_t columns, int64_t clusters, int64_t pass_rows);

}  // namespace vidops
