// Pairwise symmetrised KL divergence (Eq. E2). Shapes: p, log_p (B,n,M), q, log_q (B,m,M), distance (B,n,m).
#pragma once

#include "vidops/tensor_view.h"

namespace vidops {

struct SymmetricKlParams {
  TensorView p, log_p, q, log_q;
  TensorView distance;   // contiguous
  TensorView workspace;  // CUDA only: i64 scratch of symmetric_kl_workspace_cuda() words
  bool same = false;     // q is p: only tiles i <= j are computed, the result is exactly symmetric
};

void symmetric_kl_forward_cpu(const SymmetricKlParams& params, int threads);
void symmetric_kl_forward_cuda(const SymmetricKlParams& params, int device, void* stream);
int64_t symmetric_kl_workspace_cuda(int64_t map_rows, int64_t cols);  // map_rows: n, or n + m unless `same`

}  // namespace vidops
