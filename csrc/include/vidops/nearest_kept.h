// Which kept token is nearest to every place of a grid. Shapes: keep (B,K) i64 raster indices, source (B,h w) i64.
#pragma once

#include "vidops/tensor_view.h"

namespace vidops {

struct NearestKeptParams {
  TensorView keep;
  TensorView source;  // contiguous
  int64_t width = 1;
};

void nearest_kept_forward_cpu(const NearestKeptParams& params, int threads);

}  // namespace vidops
