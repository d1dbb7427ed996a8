// One frame of label propagation (sheet 5 of arXiv 2308.09951). Shapes: query (N,C), context (F,N,C), labels
// (F,N,L), out (N,L), index (N,k) i64, weight (N,k).
#pragma once

#include "vidops/tensor_view.h"

namespace vidops {

struct LabelPropagationParams {
  TensorView query, context;  // f32 or f64, on CUDA also f16 or bf16
  TensorView labels;
  TensorView out, index, weight;
  int64_t width = 1;         // of the grid, whose rows follow each other in N
  int64_t limit = 1;         // squared grid distances from here on are outside of the radius
  int64_t unrestricted = 1;  // leading frames without a radius
  int64_t repeats = 0;       // further copies of the first frame, under the radius
  double temperature = 1.0;
  TensorView workspace;  // CUDA only: i64 scratch of label_propagation_workspace_cuda() words
};

struct LabelPropagationCudaSizes {
  int64_t frames, tokens, width, k;
  int64_t element_bytes;  // of the features
};

void label_propagation_forward_cpu(const LabelPropagationParams& params, int threads);
void label_propagation_forward_cuda(const LabelPropagationParams& params, int device, void* stream);
int64_t label_propagation_workspace_cuda(const LabelPropagationCudaSizes& sizes, int device);

}  // namespace vidops
