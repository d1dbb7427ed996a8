// Thresholded symmetrised KL as bit rows: [D(p_i, p_j) <= tau]. Shapes: p, log_p (n,M), adjacency (n, ceil(n/64)) i64.
#pragma once

#include "vidops/tensor_view.h"

namespace vidops {

struct SymmetricKlAdjacencyParams {
  TensorView p, log_p;
  TensorView adjacency;  // contiguous i64; bit j%64 of word j/64
  TensorView workspace;  // CUDA only: i64 scratch of symmetric_kl_adjacency_workspace_cuda() words
  double tau = 1.0;
  bool filtered = true;  // 16-bit filter with exact recheck near tau; decisions equal the exact form
};

void symmetric_kl_adjacency_forward_cpu(const SymmetricKlAdjacencyParams& params, int threads);
void symmetric_kl_adjacency_forward_cuda(const SymmetricKlAdjacencyParams& params, int device, void* stream);
int64_t symmetric_kl_adjacency_workspace_cuda(int64_t rows, int64_t cols, bool filtered);

}  // namespace vidops
