#include "distance_launch.cuh"
#include "symmetric_kl.cu"
#include "vidops/symmetric_kl.h"

namespace vidops {
namespace {

constexpr const char* kOp = "symmetric_kl";

}  // namespace

// Two halves of both kinds for every row: as much memory as the maps and their logs, for one batch entry at a
// time.
int64_t symmetric_kl_workspace_cuda(int64_t map_rows, int64_t cols) {
  cuda::Arena arena;
  cuda::DistanceArgs args{};
  cuda::lay_out_distance(kOp, arena, map_rows, cols, 2, args);
  return arena.words();
}

void symmetric_kl_forward_cuda(const SymmetricKlParams& params, int device, void* stream) {
  using namespace cuda;
  const DeviceGuard guard(kOp, device);
  require_dtype(kOp, "distance", params.distance, DType::f32);
  const int64_t rows = params.distance.shape[1], columns = params.distance.shape[2], cols = params.p.shape[2];
  if (rows == 0 || columns == 0) return;

  const int64_t all_rows = rows + (params.same ? 0 : columns);
  Arena arena(kOp, params.workspace, symmetric_kl_workspace_cuda(all_rows, cols));
  SymmetricKlArgs args{};
  lay_out_distance(kOp, arena, all_rows, cols, 2, args.set);
  args.rows = to_int(kOp, rows);
  args.columns = to_int(kOp, columns);
  args.same = params.same;
  const int64_t tiles = ceil_div(rows, kDistanceSide) * ceil_div(columns, kDistanceSide);
  const bool lean = shared_limit(kOp) < kDistanceShared;
  for (int64_t b = 0; b < params.p.shape[0]; ++b) {
    args.set.p = map_rows(kOp, params.p, params.log_p, b);
    if (!params.same) args.set.q = map_rows(kOp, params.q, params.log_q, b);
    args.out = params.distance.as<float>() + b * rows * columns;
    prepare_distance(kOp, args.set, symmetric_kl_columns, symmetric_kl_centre, symmetric_kl_pack, stream);
    // 128 KB of shared memory, or 96 where a block may not have more: one block per multiprocessor.
    const Grid grid{grid_x(kOp, tiles)};
    if (lean)
      VIDOPS_LAUNCH(kOp, symmetric_kl_product_lean, grid, kTileThreads, kDistanceLean, stream, args);
    else
      VIDOPS_LAUNCH(kOp, symmetric_kl_product, grid, kTileThreads, kDistanceShared, stream, args);
  }
}

}  // namespace vidops
