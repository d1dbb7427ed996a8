#include <algorithm>

#include "assign_rows.cu"
#include "launch.cuh"
#include "vidops/assign_rows.h"

namespace vidops {
namespace {

constexpr const char* kOp = "assign_rows";
constexpr int64_t kPassBytes = int64_t{128} << 20;  // of the packed rows of one pass and their scores
constexpr int64_t kBlocks = 264;                    // two for every multiprocessor of a large card
constexpr int64_t kSliceColumns = 128;              // at least
constexpr int kWide = 128, kNarrow = 64;            // centroids per tile
constexpr size_t kWideShared = cuda::TileShape<cuda::kScoreRows, kWide>::kSharedBytes;      // 128 KB
constexpr size_t kNarrowShared = cuda::TileShape<cuda::kScoreRows, kNarrow>::kSharedBytes;  // 96 KB

struct Shape {
  int64_t pitch, rows_at_once, slice_columns, slices;

  Shape(int64_t rows, int64_t columns, int64_t clusters, int64_t pass_rows) {
    using cuda::ceil_div;
    using cuda::round_up;
    pitch = round_up(columns, cuda::kRowAlign);
    const int64_t row_bytes = 2 * sizeof(cuda::u16) * pitch + sizeof(float) * clusters;
    const int64_t fit = std::max<int64_t>(kPassBytes / row_bytes / cuda::kScoreRows, 1) * cuda::kScoreRows;
    rows_at_once = std::min(rows, pass_rows > 0 ? pass_rows : fit);
    // Few tiles are cut along the columns until every multiprocessor has work.
    const int64_t tiles = ceil_div(rows_at_once, cuda::kScoreRows) * ceil_div(clusters, kWide);
    const int64_t wanted = ceil_div(kBlocks, std::max<int64_t>(tiles, 1));
    slice_columns = std::max(round_up(ceil_div(pitch, wanted), cuda::kTileChunk), kSliceColumns);
    slices = ceil_div(pitch, slice_columns);
  }
};

void lay_out(cuda::Arena& arena, const Shape& shape, int64_t columns, int64_t clusters, cuda::AssignRowsArgs& args) {
  args.centre = arena.take<float>(columns);
  args.x_planes = arena.take<cuda::u16>(2 * clusters * shape.pitch);
  args.largest = arena.take<cuda::u32>(1);
  args.x_stats = arena.take<float>(cuda::kAssignStats * clusters);
  args.entropy = arena.take<float>(clusters);
  args.row_planes = arena.take<cuda::u16>(2 * shape.rows_at_once * shape.pitch);
  args.row_stats = arena.take<float>(cuda::kAssignStats * shape.rows_at_once);
  args.scores = arena.take<float>(shape.slices * shape.rows_at_once * clusters);
}

void launch_pack(cuda::AssignPackArgs pack, const cuda::AssignRowsArgs& args, int64_t rows, void* stream) {
  using namespace cuda;
  pack.centre = args.centre, pack.largest = args.largest;
  pack.rows = to_int(kOp, rows), pack.columns = args.columns, pack.pitch = args.pitch;
  VIDOPS_LAUNCH(kOp, assign_rows_pack, Grid{grid_x(kOp, rows)}, kPackThreads, kPackThreads / kWarp * sizeof(float),
                stream, pack);
}

void pack_centroids(const cuda::AssignRowsArgs& args, void* stream) {
  using namespace cuda;
  zero_async(kOp, args.largest, sizeof(u32), stream);
  VIDOPS_LAUNCH(kOp, assign_rows_centre, Grid{grid_x(kOp, ceil_div(args.columns, kCentreThreads))}, kCentreThreads, 0,
                stream, args);
  AssignPackArgs pack{};
  pack.value = args.x, pack.value_stride = args.x_stride;
  pack.log = args.log_x, pack.log_stride = args.log_x_stride;
  pack.planes = args.x_planes, pack.plane = static_cast<i64>(args.clusters) * args.pitch;
  pack.stats = args.x_stats, pack.entropy = args.entropy;
  launch_pack(pack, args, args.clusters, stream);
}

void pack_rows(const cuda::AssignRowsArgs& args, void* stream) {
  cuda::AssignPackArgs pack{};
  pack.value = args.p, pack.value_stride = args.p_stride;
  pack.log = args.log_p, pack.log_stride = args.log_p_stride;
  pack.planes = args.row_planes, pack.plane = args.row_plane;
  pack.stats = args.row_stats;
  launch_pack(pack, args, args.rows, stream);
}

}  // namespace

int64_t assign_rows_workspace_cuda(int64_t rows, int64_t columns, int64_t clusters, int64_t pass_rows) {
  cuda::Arena arena;
  cuda::AssignRowsArgs args{};
  lay_out(arena, Shape(rows, columns, clusters, pass_rows), columns, clusters, args);
  return arena.words();
}

void assign_rows_forward_cuda(const AssignRowsParams& params, int device, void* stream) {
  using namespace cuda;
  const DeviceGuard guard(kOp, device);
  require_dtype(kOp, "p", params.p, DType::f32);
  require_dtype(kOp, "log_p", params.log_p, DType::f32);
  require_dtype(kOp, "centroids", params.centroids, DType::f32);
  require_dtype(kOp, "log_centroids", params.log_centroids, DType::f32);
  const int64_t rows = params.p.shape[0], columns = params.p.shape[1], clusters = params.centroids.shape[0];
  if (rows == 0) return;
  require(columns > 0 && clusters > 0, std::string(kOp) + ": at least one column and one centroid expected");

  const Shape shape(rows, columns, clusters, params.pass_rows);
  Arena arena(kOp, params.workspace, assign_rows_workspace_cuda(rows, columns, clusters, params.pass_rows));
  AssignRowsArgs args{};
  lay_out(arena, shape, columns, clusters, args);
  args.x = params.centroids.as<const float>(), args.x_stride = params.centroids.stride[0];
  args.log_x = params.log_centroids.as<const float>(), args.log_x_stride = params.log_centroids.stride[0];
  args.p_stride = params.p.stride[0], args.log_p_stride = params.log_p.stride[0];
  args.columns = to_int(kOp, columns);
  args.clusters = to_int(kOp, clusters);
  args.pitch = static_cast<int>(shape.pitch);
  const bool wide = clusters > kNarrow && shared_limit(kOp) >= kWideShared;
  args.cluster_tiles = static_cast<int>(ceil_div(clusters, wide ? kWide : kNarrow));
  args.slices = static_cast<int>(shape.slices);
  args.slice_columns = static_cast<int>(shape.slice_columns);
  args.row_plane = shape.rows_at_once * shape.pitch;
  const int64_t runs = 2 * ceil_div(shape.pitch, kTileChunk) / kScoreFlush + 2 * shape.slices + 2;
  args.sum_rounding = static_cast<float>(runs) / (1 << 24);
  args.entropy_rounding = static_cast<float>(ceil_div(shape.pitch, kPackThreads) + 16) / (1 << 23);
  if (!params.centroids_ready) pack_centroids(args, stream);

  // A row of P may be the whole map's: passes bound the scratch memory.
  for (int64_t first = 0; first < rows; first += shape.rows_at_once) {
    const int64_t here = std::min(shape.rows_at_once, rows - first);
    args.p = params.p.as<const float>() + first * args.p_stride;
    args.log_p = params.log_p.as<const float>() + first * args.log_p_stride;
    args.label = params.label.as<i64>() + first;
    args.rows = to_int(kOp, here);
    args.row_tiles = static_cast<int>(ceil_div(here, kScoreRows));

    pack_rows(args, stream);
    const Grid grid{grid_x(kOp, shape.slices * args.row_tiles * args.cluster_tiles)};
    if (wide)
      VIDOPS_LAUNCH(kOp, assign_rows_scores, grid, kTileThreads, kWideShared, stream, args);
    else
      VIDOPS_LAUNCH(kOp, assign_rows_scores_narrow, grid, kTileThreads, kNarrowShared, stream, args);
    VIDOPS_LAUNCH(kOp, assign_rows_decide, Grid{grid_x(kOp, here)}, kDecideThreads,
                  (kDecideThreads / kWarp + ceil_div(clusters, kWarp)) * sizeof(u32), stream, args);
  }
}

}  // namespace vidops
