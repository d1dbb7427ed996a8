#include "launch.cuh"
#include "nearest_kept.cu"
#include "vidops/token_cuda.h"

namespace vidops {

void nearest_kept_forward_cuda(const NearestKeptCudaParams& params, int device, void* stream) {
  using namespace cuda;
  constexpr const char* kOp = "nearest_kept";
  const DeviceGuard guard(kOp, device);
  require(params.keep.rank == 2 && params.source.rank == 2 && params.keep.dtype == DType::i64 &&
              params.source.dtype == DType::i64 && params.source.contiguous(),
          "nearest_kept: ranks or dtypes do not fit");
  const int64_t batch = params.keep.shape[0], places = params.source.shape[1];
  require(params.source.shape[0] == batch && params.width > 0 && places % params.width == 0 && places < (1 << 20),
          "nearest_kept: shapes do not fit");
  if (params.source.numel() == 0) return;
  NearestArgs args{};
  args.keep = params.keep.as<const i64>();
  args.keep_item = batch > 1 ? params.keep.stride[0] : 0;
  args.kept = to_int(kOp, params.keep.shape[1]), args.places = static_cast<int>(places);
  args.width = to_int(kOp, params.width);
  args.blocks = static_cast<int>(ceil_div(places, kNearestThreads));
  args.source = params.source.as<i64>();
  VIDOPS_LAUNCH(kOp, nearest_kept, Grid{grid_x(kOp, batch * args.blocks)}, kNearestThreads, kNearestTile * sizeof(int),
                stream, args);
}

}  // namespace vidops
