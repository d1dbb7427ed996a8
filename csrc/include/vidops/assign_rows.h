// Nearest centroid of every given map row (Eq. E4). Shapes: p, log_p (n,M), centroids and log_centroids (K,M), label (n) i64.
#pragma once

#include "vidops/tensor_view.h"

namespace vidops {

struct AssignRowsParams {
  TensorView p, log_p;
  TensorView centroids, log_centroids;
  TensorView label;
  TensorView workspace;  // CUDA only: i64 scratch of assign_rows_workspace_cuda() words
};

void assign_rows_forward_cpu(const AssignRowsParams& params, int threads);
void assign_rows_forward_cuda(const AssignRowsParams& params, int device, void* stream);
int64_t assign_rows_workspace_cuda(int64_t rows, int64_t cols, int64_t clusters);

}  // namespace vidops
