#include "launch.cuh"
#include "segment_mean.cu"
#include "vidops/segment_mean.h"

namespace vidops {
namespace {

constexpr const char* kOp = "segment_mean";

void lay_out(cuda::Arena& arena, int64_t rows, int64_t segments, cuda::SegmentMeanArgs& args) {
  args.members = arena.take<int>(rows);
  args.first = arena.take<int>(segments);
  args.size = arena.take<int>(segments);
}

}  // namespace

int64_t segment_mean_workspace_cuda(int64_t rows, int64_t segments) {
  cuda::Arena arena;
  cuda::SegmentMeanArgs args{};
  lay_out(arena, rows, segments, args);
  return arena.words();
}

void segment_mean_forward_cuda(const SegmentMeanParams& params, int device, void* stream) {
  using namespace cuda;
  const DeviceGuard guard(kOp, device);
  require_dtype(kOp, "x", params.x, DType::f32);
  const int64_t rows = params.x.shape[0], cols = params.x.shape[1], segments = params.mean.shape[0];
  if (segments == 0 || cols == 0) return;

  Arena arena(kOp, params.workspace, segment_mean_workspace_cuda(rows, segments));
  SegmentMeanArgs args{};
  lay_out(arena, rows, segments, args);
  args.x = params.x.as<const float>();
  args.x_stride = params.x.stride[0];
  args.label = params.label.as<const i64>();
  args.label_stride = params.label.stride[0];
  args.rows = to_int(kOp, rows);
  args.cols = to_int(kOp, cols);
  args.segments = to_int(kOp, segments);
  args.column_blocks = static_cast<int>(ceil_div(cols, kMeanThreads));
  args.mean = params.mean.as<float>();

  VIDOPS_LAUNCH(kOp, segment_mean_members, Grid{grid_x(kOp, ceil_div(segments, kMemberThreads / kWarp))},
                kMemberThreads, 0, stream, args);
  VIDOPS_LAUNCH(kOp, segment_mean_rows, Grid{grid_x(kOp, segments * args.column_blocks)}, kMeanThreads, 0, stream,
                args);
}

}  // namespace vidops
