#include "distance_launch.cuh"
#include "symmetric_kl_adjacency.cu"
#include "vidops/symmetric_kl_adjacency.h"

namespace vidops {
namespace {

constexpr const char* kOp = "symmetric_kl_adjacency";

void lay_out(cuda::Arena& arena, int64_t rows, int64_t cols, bool filtered,
             cuda::SymmetricKlAdjacencyArgs& args) {
  cuda::lay_out_distance(kOp, arena, rows, cols, filtered ? 1 : 2, args.set);
  args.tiles = static_cast<int>(cuda::ceil_div(rows, cuda::kFilterSide));
  args.open = arena.take<cuda::u32>(rows * args.tiles * cuda::kFilterWords);
}

}  // namespace

// 4 bytes per element of the map for the filter, 8 for the exact form, and an eighth of a byte per pair.
int64_t symmetric_kl_adjacency_workspace_cuda(int64_t rows, int64_t cols, bool filtered) {
  cuda::Arena arena;
  cuda::SymmetricKlAdjacencyArgs args{};
  lay_out(arena, rows, cols, filtered, args);
  return arena.words();
}

void symmetric_kl_adjacency_forward_cuda(const SymmetricKlAdjacencyParams& params, int device, void* stream) {
  using namespace cuda;
  const DeviceGuard guard(kOp, device);
  require_dtype(kOp, "adjacency", params.adjacency, DType::i64);
  const int64_t rows = params.p.shape[0], cols = params.p.shape[1];
  if (rows == 0) return;

  Arena arena(kOp, params.workspace, symmetric_kl_adjacency_workspace_cuda(rows, cols, params.filtered));
  SymmetricKlAdjacencyArgs args{};
  lay_out(arena, rows, cols, params.filtered, args);
  args.set.p = map_rows(kOp, params.p, params.log_p);
  args.tau = static_cast<float>(params.tau);
  args.out_words = static_cast<int>(2 * params.adjacency.shape[1]);
  args.out = params.adjacency.as<u32>();

  prepare_distance(kOp, args.set, symmetric_kl_adjacency_columns, symmetric_kl_adjacency_centre,
                   symmetric_kl_adjacency_pack, stream);
  // 128 KB of shared memory, or 96 where a block may not have more: one block per multiprocessor.
  const Grid grid{grid_x(kOp, int64_t{args.tiles} * args.tiles)};
  if (shared_limit(kOp) < kFilterShared)
    VIDOPS_LAUNCH(kOp, symmetric_kl_adjacency_filter_lean, grid, kTileThreads, kFilterLean, stream, args);
  else
    VIDOPS_LAUNCH(kOp, symmetric_kl_adjacency_filter, grid, kTileThreads, kFilterShared, stream, args);
  VIDOPS_LAUNCH(kOp, symmetric_kl_adjacency_recheck, Grid{grid_x(kOp, rows)}, kRecheckThreads, 0, stream,
                args);
}

}  // namespace vidops
