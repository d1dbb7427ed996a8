// Mean of the rows of each segment. Rows are added in index order, so results repeat bit for bit.
#include "device.cuh"

namespace vidops::cuda {

constexpr int kMemberThreads = 128;
constexpr int kMeanThreads = 128;

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
  for (int base = 0; base < a.rows; base += kWarp) {
    const int row = base + lane;
    const i64 label = row < a.rows ? a.label[row * a.label_stride] : -1;
    smaller += popcount(ballot(label >= 0 && label < segment));
  }
  int next = smaller;
  for (int base = 0; base < a.rows; base += kWarp) {
    const int row = base + lane;
    const u32 mine = ballot(row < a.rows && a.label[row * a.label_stride] == segment);
    if (mine >> lane & 1) a.members[next + popcount(mine & ((1u << lane) - 1))] = row;
    next += popcount(mine);
  }
  if (lane == 0) {
    a.first[segment] = smaller;
    a.size[segment] = next - smaller;
  }
}

// One block per segment and 128 columns. Loads run four rows ahead of the additions, whose order is fixed.
VIDOPS_KERNEL(kMeanThreads) segment_mean_rows(SegmentMeanArgs a) {
  const int segment = (int)(block_x() / (u32)a.column_blocks);
  const int column = (int)(block_x() % (u32)a.column_blocks) * kMeanThreads + thread_x();
  if (column >= a.cols) return;
  const int size = a.size[segment];
  const int* members = a.members + a.first[segment];
  float sum = 0;
  int t = 0;
  for (; t + 4 <= size; t += 4) {
    float v[4];
    VIDOPS_UNROLL
    for (int u = 0; u < 4; ++u) v[u] = a.x[members[t + u] * a.x_stride + column];
    VIDOPS_UNROLL
    for (int u = 0; u < 4; ++u) sum += v[u];
  }
  for (; t < size; ++t) sum += a.x[members[t] * a.x_stride + column];
  a.mean[(i64)segment * a.cols + column] = size ? sum / (float)size : 0.0f;
}

}  // namespace vidops::cuda
