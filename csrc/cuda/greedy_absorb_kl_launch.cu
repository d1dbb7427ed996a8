#include <algorithm>

#include "distance_launch.cuh"
#include "greedy_absorb_kl.cu"
#include "vidops/greedy_absorb_kl.h"

namespace vidops {
namespace {

constexpr const char* kOp = "greedy_absorb_kl";
constexpr int64_t kLeastSteps = 8;  // of a share: fewer do not pay for its sum

void lay_out(cuda::Arena& arena, int64_t rows, int64_t cols, cuda::GreedyAbsorbKlArgs& args) {
  cuda::lay_out_distance(kOp, arena, rows, cols, 1, args.set);
  args.state = arena.take<cuda::GreedyState>(1);
  args.list[0] = arena.take<int>(rows);
  args.list[1] = arena.take<int>(rows);
  const int64_t steps = cuda::ceil_div(cols, cuda::kTileChunk) * 2;
  args.most_splits = static_cast<int>(std::clamp<int64_t>(steps / kLeastSteps, 1, cuda::kMostSplits));
  if (args.most_splits > 1) args.shares = arena.take<float>(int64_t{cuda::kSplitBlocks} * cuda::kTileFloats);
  args.near = arena.take<cuda::u32>(rows * cuda::kMaskWords);
}

}  // namespace

// 4 bytes per element of the map, and 8 MB for the shares of tiles.
int64_t greedy_absorb_kl_workspace_cuda(int64_t rows, int64_t cols) {
  cuda::Arena arena;
  cuda::GreedyAbsorbKlArgs args{};
  lay_out(arena, rows, cols, args);
  return arena.words();
}

void greedy_absorb_kl_forward_cuda(const GreedyAbsorbKlParams& params, int device, void* stream) {
  using namespace cuda;
  const DeviceGuard guard(kOp, device);
  const int64_t rows = params.p.shape[0], cols = params.p.shape[1];
  if (rows == 0) return zero_async(kOp, params.count.data, sizeof(int64_t), stream);

  Arena arena(kOp, params.workspace, greedy_absorb_kl_workspace_cuda(rows, cols));
  GreedyAbsorbKlArgs args{};
  lay_out(arena, rows, cols, args);
  args.set.p = map_rows(kOp, params.p, params.log_p);
  args.tau = static_cast<float>(params.tau);
  args.owner = params.owner.as<i64>();
  args.label = params.label.as<i64>();
  args.count = params.count.as<i64>();

  zero_async(kOp, args.state, sizeof(GreedyState), stream);
  prepare_distance(kOp, args.set, greedy_absorb_kl_columns, greedy_absorb_kl_centre, greedy_absorb_kl_pack,
                   stream);
  // Every round settles all of its candidates, so the number of rounds has a bound that the host knows. 96 KB
  // of shared memory and 128 registers: two blocks per multiprocessor from sm_90 on.
  for (int64_t settled = 0; settled < rows; settled += kCandidates) {
    const int64_t tiles = ceil_div(rows - settled, kAliveTile);
    // Enough for every number of rows that may be alive: splits times tiles never exceed it.
    const int64_t blocks = std::max(tiles, std::min<int64_t>(kSplitBlocks, tiles * args.most_splits));
    const int round = static_cast<int>(settled / kCandidates);
    VIDOPS_LAUNCH(kOp, greedy_absorb_kl_round, Grid{grid_x(kOp, blocks)}, kTileThreads, kRoundShared, stream,
                  args, round);
  }
}

}  // namespace vidops
