// Nearest centroid of attention rows (Eq. E4): what the kernels of the map and of assign_rows do not do.
#include "device.cuh"

namespace vidops::cuda {

constexpr int kLogSumThreads = 256;

struct AssignClustersArgs {
  const float* lse;
  i64 head_stride, row_stride;
  int rows;
  float* lse2;  // (heads, rows)
};

// Log-sum-exps that the caller knows already, in the map's units of log 2.
VIDOPS_KERNEL(kLogSumThreads) assign_clusters_log_sums(AssignClustersArgs a) {
  const int row = (int)block_x() * kLogSumThreads + thread_x(), head = (int)block_y();
  if (row < a.rows)
    a.lse2[(i64)head * a.rows + row] = a.lse[head * a.head_stride + row * a.row_stride] * 1.44269504088896341f;
}

}  // namespace vidops::cuda
