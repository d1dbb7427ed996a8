// Greedy absorption on D(p,p) <= tau with lazily computed rows. Shapes: p, log_p (n,M), owner and label (n) i64, count () or (1) i64.
#pragma once

#include "vidops/tensor_view.h"

namespace vidops {

struct GreedyAbsorbKlParams {
  TensorView p, log_p;
  TensorView owner, label, count;
  TensorView workspace;  // CUDA only: i64 scratch of greedy_absorb_kl_workspace_cuda() words
  double tau = 1.0;
};

void greedy_absorb_kl_forward_cpu(const GreedyAbsorbKlParams& params, int threads);
void greedy_absorb_kl_forward_cuda(const GreedyAbsorbKlParams& params, int device, void* stream);
int64_t greedy_absorb_kl_workspace_cuda(int64_t rows, int64_t cols);

}  // namespace vidops
