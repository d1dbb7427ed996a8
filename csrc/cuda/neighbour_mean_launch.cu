#include "launch.cuh"
#include "neighbour_mean.cu"
#include "vidops/neighbour_mean.h"

namespace vidops {
namespace {

constexpr const char* kOp = "neighbour_mean";

void lay_out(cuda::Arena& arena, int64_t rows, cuda::NeighbourMeanArgs& args) {
  const int64_t words = cuda::ceil_div(rows, cuda::kChunk), tiles = cuda::ceil_div(rows, cuda::kProductRows);
  args.total = arena.take<float>(rows);
  args.usable = arena.take<cuda::u32>(words);
  args.norm = arena.take<float>(rows);
  args.hash = arena.take<cuda::u64>(rows);
  args.first = arena.take<int>(rows);
  args.distinct = arena.take<int>(rows);
  args.count = arena.take<int>(1);
  args.used = arena.take<cuda::u32>(tiles * words * 2);
  args.used_count = arena.take<int>(tiles);
}

}  // namespace

int64_t neighbour_mean_workspace_cuda(int64_t rows) {
  cuda::Arena arena;
  cuda::NeighbourMeanArgs args{};
  lay_out(arena, rows, args);
  return arena.words();
}

void neighbour_mean_forward_cuda(const NeighbourMeanParams& params, int device, void* stream) {
  using namespace cuda;
  const DeviceGuard guard(kOp, device);
  require_dtype(kOp, "p", params.p, DType::f32);
  require_dtype(kOp, "adjacency", params.adjacency, DType::i64);
  const int64_t rows = params.p.shape[0], cols = params.p.shape[1];
  if (rows == 0 || cols == 0) return;

  Arena arena(kOp, params.workspace, neighbour_mean_workspace_cuda(rows));
  NeighbourMeanArgs args{};
  lay_out(arena, rows, args);
  args.adjacency = params.adjacency.as<const u32>();
  args.row_stride = params.adjacency.stride[0] * 2;
  args.p = params.p.as<const float>();
  args.p_stride = params.p.stride[0];
  args.rows = to_int(kOp, rows);
  args.cols = to_int(kOp, cols);
  args.words = static_cast<int>(ceil_div(rows, kChunk));
  args.column_tiles = static_cast<int>(ceil_div(cols, kProductCols));
  args.mean = params.mean.as<float>();

  const Grid row_warps{grid_x(kOp, ceil_div(rows, kRowThreads / kWarp))};
  // The number of distinct rows stays on the device: grids are for the most there can be.
  const int64_t row_tiles = ceil_div(rows, kProductRows);
  VIDOPS_LAUNCH(kOp, neighbour_mean_totals, Grid{grid_x(kOp, args.words)}, kTotalThreads, sizeof(u32), stream, args);
  VIDOPS_LAUNCH(kOp, neighbour_mean_norms, row_warps, kRowThreads, 0, stream, args);
  VIDOPS_LAUNCH(kOp, neighbour_mean_first, row_warps, kRowThreads, 0, stream, args);
  VIDOPS_LAUNCH(kOp, neighbour_mean_compact, Grid{1}, kCompactThreads, kCompactThreads / kWarp * sizeof(int), stream,
                args);
  VIDOPS_LAUNCH(kOp, neighbour_mean_words, Grid{grid_x(kOp, row_tiles)}, kListThreads, kListThreads * sizeof(u32),
                stream, args);
  // 25 KB; registers allow three blocks on a multiprocessor. Neighbouring blocks share columns of P, which then
  // come from the L2 cache.
  const size_t shared = sizeof(u32) * 2 * (kChunkWords + kProductRows);
  VIDOPS_LAUNCH(kOp, neighbour_mean_tiles, Grid{grid_x(kOp, row_tiles * args.column_tiles)}, kProductThreads, shared,
                stream, args);
  VIDOPS_LAUNCH(kOp, neighbour_mean_copy, Grid{grid_x(kOp, rows)}, kCopyThreads, 0, stream, args);
}

}  // namespace vidops
