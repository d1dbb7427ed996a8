// Host side of distance.cuh: its scratch memory and the launches that fill it.
#pragma once

#include <algorithm>

#include "distance.cuh"
#include "launch.cuh"

namespace vidops::cuda {

// The sizes in `args`, and the scratch cut from `arena`. `map_rows`: of p and q together.
inline void lay_out_distance(const char* op, Arena& arena, int64_t map_rows, int64_t cols, int halves,
                             DistanceArgs& args) {
  require(map_rows <= 0x3fffffff, std::string(op) + ": too many rows");
  args.cols = to_int(op, cols);
  args.halves = halves;
  args.slices = static_cast<int>(std::min<int64_t>(64, std::max<int64_t>(1, ceil_div(map_rows, 64))));
  args.slice_rows = static_cast<int>(ceil_div(map_rows, args.slices));
  args.stride = static_cast<int>(round_up(cols, kRowAlign));
  args.plane = map_rows * args.stride;
  args.partial = arena.take<float>(2 * args.slices * cols);
  args.centre = arena.take<float>(3 * cols);
  args.largest = arena.take<u32>(2);
  args.planes = arena.take<u16>(2 * halves * args.plane);
  args.stats = arena.take<float>(kStats * map_rows);
}

// Rows of (..., rows, columns); `batch` counts along the leading axis of a 3-D view.
inline MapRows map_rows(const char* op, const TensorView& map, const TensorView& log, int64_t batch = 0) {
  require_dtype(op, "map", map, DType::f32);
  require_dtype(op, "log map", log, DType::f32);
  const int axis = map.rank - 2;
  MapRows rows{};
  rows.map = map.as<const float>() + (axis ? batch * map.stride[0] : 0);
  rows.log = log.as<const float>() + (axis ? batch * log.stride[0] : 0);
  rows.map_stride = map.stride[axis];
  rows.log_stride = log.stride[axis];
  rows.rows = to_int(op, map.shape[axis]);
  return rows;
}

// Every op compiles the three kernels under names of its own.
using DistanceKernel = void (*)(DistanceArgs);

inline void prepare_distance(const char* op, const DistanceArgs& args, DistanceKernel columns_kernel,
                             DistanceKernel centre_kernel, DistanceKernel pack_kernel, void* stream) {
  const int64_t column_blocks = ceil_div(args.cols, kColumnThreads);
  zero_async(op, args.largest, 2 * sizeof(u32), stream);
  VIDOPS_LAUNCH(op, columns_kernel, Grid{grid_x(op, column_blocks * args.slices)}, kColumnThreads, 0, stream,
                args);
  VIDOPS_LAUNCH(op, centre_kernel, Grid{grid_x(op, column_blocks)}, kColumnThreads, 0, stream, args);
  VIDOPS_LAUNCH(op, pack_kernel, Grid{grid_x(op, args.p.rows + args.q.rows)}, kPackThreads,
                sizeof(float) * kPackThreads / kWarp, stream, args);
}

}  // namespace vidops::cuda
