// C entry points through which the tests run the CUDA launchers on the host shim. A failure is a message, not an
// abort: every function returns 0 or fills `error` and returns 1.
#include <cstdio>
#include <exception>

#include "shim.hpp"
#include "vidops/greedy_absorb.h"
#include "vidops/segment_mean.h"

namespace {

using vidops::DType;
using vidops::TensorView;

TensorView vector_view(void* data, DType dtype, int64_t size) {
  TensorView v;
  v.data = data;
  v.dtype = dtype;
  v.rank = 1;
  v.shape[0] = size;
  v.stride[0] = 1;
  return v;
}

TensorView matrix_view(void* data, DType dtype, int64_t rows, int64_t cols, int64_t stride) {
  TensorView v = vector_view(data, dtype, rows);
  v.rank = 2;
  v.shape[1] = cols;
  v.stride[0] = stride;
  v.stride[1] = 1;
  return v;
}

template <class Body>
int guarded(unsigned seed, char* error, size_t capacity, Body body) {
  shim::machine().seed = seed;
  try {
    body();
    return 0;
  } catch (const std::exception& e) {
    std::snprintf(error, capacity, "%s", e.what());
    return 1;
  }
}

}  // namespace

extern "C" {

int64_t shim_greedy_absorb_workspace(int64_t rows) { return vidops::greedy_absorb_workspace_cuda(rows); }

int shim_greedy_absorb(unsigned seed, void* adjacency, int64_t rows, int64_t words, int64_t stride, void* owner,
                       void* label, void* count, void* workspace, int64_t workspace_words, char* error,
                       size_t capacity) {
  return guarded(seed, error, capacity, [&] {
    vidops::GreedyAbsorbParams p;
    p.adjacency = matrix_view(adjacency, DType::i64, rows, words, stride);
    p.owner = vector_view(owner, DType::i64, rows);
    p.label = vector_view(label, DType::i64, rows);
    p.count = vector_view(count, DType::i64, 1);
    p.workspace = vector_view(workspace, DType::i64, workspace_words);
    vidops::greedy_absorb_forward_cuda(p, 0, nullptr);
  });
}

int64_t shim_segment_mean_workspace(int64_t rows, int64_t segments) {
  return vidops::segment_mean_workspace_cuda(rows, segments);
}

int shim_segment_mean(unsigned seed, void* x, int64_t rows, int64_t cols, int64_t stride, void* label,
                      int64_t segments, void* mean, void* workspace, int64_t workspace_words, char* error,
                      size_t capacity) {
  return guarded(seed, error, capacity, [&] {
    vidops::SegmentMeanParams p;
    p.x = matrix_view(x, DType::f32, rows, cols, stride);
    p.label = vector_view(label, DType::i64, rows);
    p.mean = matrix_view(mean, DType::f32, segments, cols, cols);
    p.workspace = vector_view(workspace, DType::i64, workspace_words);
    vidops::segment_mean_forward_cuda(p, 0, nullptr);
  });
}

}  // extern "C"
