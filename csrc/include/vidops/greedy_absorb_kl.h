// Greedy absorption on D(p,p) <= tau with lazily computed rows. Shapes: p, log_p (n,M), owner and label (n) i64, count () or (1) i64.
#pragma once

#include "vidops/tensor_view.h"

namespace vidops {

struct GreedyAbsorbKlParams {
  TensorView p, log_p;
  TensorView owner, label, count;
  double tau = 1.0;
};

void greedy_absorb_kl_forward_cpu(const GreedyAbsorbKlParams& params, int threads);

}  // namespace vidops
