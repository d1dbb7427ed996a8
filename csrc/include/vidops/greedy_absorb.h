// Greedy absorption on bit rows (sheet 2.6, Eq. E5). Shapes: adjacency (n, ceil(n/64)) i64, owner and label (n) i64, count () or (1) i64.
#pragma once

#include "vidops/tensor_view.h"

namespace vidops {

struct GreedyAbsorbParams {
  TensorView adjacency;
  TensorView owner, label, count;
  TensorView workspace;  // CUDA only: i64 scratch of greedy_absorb_workspace_cuda() words
};

void greedy_absorb_forward_cpu(const GreedyAbsorbParams& params, int threads);
void greedy_absorb_forward_cuda(const GreedyAbsorbParams& params, int device, void* stream);
int64_t greedy_absorb_workspace_cuda(int64_t rows);

}  // namespace vidops
