#include "greedy_absorb.cu"
#include "launch.cuh"
#include "vidops/greedy_absorb.h"

namespace vidops {
namespace {

constexpr const char* kOp = "greedy_absorb";

}  // namespace

int64_t greedy_absorb_workspace_cuda(int64_t rows) {
  cuda::Arena arena;
  arena.take<int>(rows);
  return arena.words();
}

void greedy_absorb_forward_cuda(const GreedyAbsorbParams& params, int device, void* stream) {
  using namespace cuda;
  const DeviceGuard guard(kOp, device);
  const int64_t rows = params.adjacency.shape[0];
  if (rows == 0) return zero_async(kOp, params.count.data, sizeof(int64_t), stream);

  Arena arena(kOp, params.workspace, greedy_absorb_workspace_cuda(rows));
  GreedyAbsorbArgs args{};
  args.adjacency = params.adjacency.as<const u64>();
  args.row_stride = params.adjacency.stride[0];
  args.rows = to_int(kOp, rows);
  args.words = static_cast<int>(ceil_div(rows, kWordBits));
  args.leaders = arena.take<int>(rows);
  args.owner = params.owner.as<i64>();
  args.label = params.label.as<i64>();
  args.count = params.count.as<i64>();

  // 1.8 million rows fill the 227 KB of a Hopper block.
  const size_t shared = sizeof(u64) * (static_cast<size_t>(args.words) + kWordBits + 1);
  VIDOPS_LAUNCH(kOp, greedy_absorb_walk, Grid{1}, kWalkThreads, shared, stream, args);
  VIDOPS_LAUNCH(kOp, greedy_absorb_owner, Grid{grid_x(kOp, ceil_div(args.words, kOwnerThreads / kWarp))},
                kOwnerThreads, 0, stream, args);
}

}  // namespace vidops
