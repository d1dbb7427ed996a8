// Mean of the rows of each segment. Rows are added in index order, so results repeat bit for bit.
#include "device.cuh"

namespace vidops::cuda {

constexpr int kMemberThreads = 128;
constexpr int kMeanThreads = 128;
constexpr int kBatch = 8;   // labels in flight per lane
constexpr int kAhead = 16;  // rows in flight per thread

struct SegmentMeanArgs {
  const float* x;
  i64 x_stride;
  const i64* label;
  i64 label_stride;
  int rows, cols, segments;
  int column_blocks;
  int* members;  // scratch, `rows` entries: the rows of segment 0, of segment 1, ...
  int* first;    // scratch, `segments` entries
  int* size;     // scratch, `segments` entries
  float* mean;
};

// One warp per segment lists its members. Scanning all labels twice costs less than a sort for the row counts of
// this library and, unlike atomics, keeps the index order.
VIDOPS_KERNEL(kMemberThreads) segment_mean_members(SegmentMeanArgs a) {
  const int segment = (int)block_x() * (kMemberThreads / kWarp) + warp_id();
  if (segment >= a.segments) return;
  const int lane = lane_id();
  int smaller = 0;
  for (int base = lane; base < a.rows; base += kBatch * kWarp) {
    VIDOPS_UNROLL
    for (int u = 0; u < kBatch; ++u) {
      const int row = base + u * kWarp;
      const i64 label = row < a.rows ? a.label[row * a.label_stride] : -1;
      smaller += label >= 0 && label < segment;
    }
  }
  VIDOPS_UNROLL
  for (int mask = kWarp / 2; mask; mask >>= 1) smaller += shuffle_xor(smaller, mask);

  int next = smaller;
  for (int base = 0; base < a.rows; base += kBatch * kWarp) {
    bool mine[kBatch];  // read before anything is written: the loads overlap
    VIDOPS_UNROLL
    for (int u = 0; u < kBatch; ++u) {
      const int row = base + u * kWarp + lane;
      mine[u] = row < a.rows && a.label[row * a.label_stride] == segment;
    }
    VIDOPS_UNROLL
    for (int u = 0; u < kBatch; ++u) {
      const u32 members = ballot(mine[u]);
      if (mine[u]) a.members[next + popcount(members & ((1u << lane) - 1))] = base + u * kWarp + lane;
      next += popcount(members);
    }
  }
  if (lane == 0) {
    a.first[segment] = smaller;
    a.size[segment] = next - smaller;
  }
}

// One block per segment and 128 columns. The order of the additions is fixed, so a large segment is a long walk of
// few threads: many loads ahead of the additions keep the memory busy.
VIDOPS_KERNEL(kMeanThreads) segment_mean_rows(SegmentMeanArgs a) {
  const int segment = (int)(block_x() / (u32)a.column_blocks);
  const int column = (int)(block_x() % (u32)a.column_blocks) * kMeanThreads + thread_x();
  if (column >= a.cols) return;
  const int size = a.size[segment];
  const int* members = a.members + a.first[segment];
  float sum = 0;
  for (int t = 0; t < size; t += kAhead) {
    float v[kAhead];
    VIDOPS_UNROLL
    for (int u = 0; u < kAhead; ++u) v[u] = t + u < size ? a.x[members[t + u] * a.x_stride + column] : 0.0f;
    VIDOPS_UNROLL
    for (int u = 0; u < kAhead; ++u) sum += v[u];
  }
  a.mean[(i64)segment * a.cols + column] = size ? sum / (float)size : 0.0f;
}

}  // namespace vidops::cuda
