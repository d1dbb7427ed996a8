#include "gather_tokens.cu"
#include "launch.cuh"
#include "vidops/token_cuda.h"

namespace vidops {
namespace {

constexpr const char* kGather = "gather_tokens";
constexpr const char* kScatter = "scatter_tokens";
constexpr int64_t kWarps = cuda::kGatherThreads / cuda::kWarp;

int64_t bytes_of(const char* op, DType dtype) {
  require(dtype == DType::f16 || dtype == DType::bf16 || dtype == DType::f32 || dtype == DType::f64,
          std::string(op) + ": x has an unsupported dtype");
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

// Strides of an axis of one element may be anything.
int64_t stride_of(const TensorView& v, int axis) { return v.shape[axis] > 1 ? v.stride[axis] : 0; }

void check(const char* op, const GatherTokensCudaParams& p, bool scatter) {
  require(p.x.rank == 3 && p.out.rank == 3 && p.index.rank == 2 && p.index.dtype == DType::i64 && p.out.contiguous() &&
              p.out.dtype == p.x.dtype,
          std::string(op) + ": ranks or dtypes do not fit");
  const TensorView& taken = scatter ? p.x : p.out;
  require(p.index.shape[0] == p.x.shape[0] && p.out.shape[0] == p.x.shape[0] && p.out.shape[2] == p.x.shape[2] &&
              p.index.shape[1] == taken.shape[1],
          std::string(op) + ": shapes do not fit");
}

}  // namespace

void gather_tokens_forward_cuda(const GatherTokensCudaParams& params, int device, void* stream) {
  using namespace cuda;
  const DeviceGuard guard(kGather, device);
  vidops::check(kGather, params, false);
  if (params.out.numel() == 0) return;
  const TensorView& x = params.x;
  const int64_t size = bytes_of(kGather, x.dtype), row = x.shape[2] * size;
  GatherArgs args{};
  args.x = x.as<const char>(), args.item = stride_of(x, 0) * size, args.row = stride_of(x, 1) * size;
  args.index = params.index.as<const i64>(), args.index_item = stride_of(params.index, 0);
  args.tokens = to_int(kGather, x.shape[1]), args.taken = to_int(kGather, params.index.shape[1]);
  args.rows = params.out.shape[0] * params.out.shape[1];
  args.out = params.out.as<char>();
  // The widest unit that all rows start and end at.
  const uint64_t all = static_cast<uint64_t>(row | args.item | args.row) | reinterpret_cast<uintptr_t>(x.data) |
                       reinterpret_cast<uintptr_t>(params.out.data);
  const int64_t unit = all % 16 == 0 ? 16 : all % 8 == 0 ? 8 : all % 4 == 0 ? 4 : 2;
  args.units = to_int(kGather, row / unit);
  const auto kernel = unit == 16  ? gather_tokens_16
                      : unit == 8 ? gather_tokens_8
                      : unit == 4 ? gather_tokens_4
                                  : gather_tokens_2;
  VIDOPS_LAUNCH(kGather, kernel, Grid{grid_x(kGather, ceil_div(args.rows, kWarps))}, kGatherThreads, 0, stream, args);
}

int64_t scatter_tokens_workspace_cuda(int64_t batch, int64_t taken, int64_t tokens) {
  cuda::Arena arena;
  arena.take<int>(batch * tokens);
  arena.take<int>(batch * taken);
  return arena.words();
}

void scatter_tokens_forward_cuda(const GatherTokensCudaParams& params, int device, void* stream) {
  using namespace cuda;
  const DeviceGuard guard(kScatter, device);
  vidops::check(kScatter, params, true);
  if (params.out.numel() == 0) return;
  const TensorView& x = params.x;
  bytes_of(kScatter, x.dtype);
  const int64_t batch = x.shape[0], taken = x.shape[1], tokens = params.out.shape[1];
  Arena arena(kScatter, params.workspace, scatter_tokens_workspace_cuda(batch, taken, tokens));
  ScatterArgs args{};
  args.x = x.data, args.item = stride_of(x, 0), args.row = stride_of(x, 1);
  args.index = params.index.as<const i64>(), args.index_item = stride_of(params.index, 0);
  args.tokens = to_int(kScatter, tokens), args.taken = to_int(kScatter, taken);
  args.width = to_int(kScatter, x.shape[2]);
  args.rows = batch * tokens;
  args.first = arena.take<int>(batch * tokens), args.next = arena.take<int>(batch * taken);
  args.out = params.out.data;
  const Grid grid{grid_x(kScatter, ceil_div(args.rows, kWarps))};
  VIDOPS_LAUNCH(kScatter, scatter_tokens_lists, grid, kGatherThreads, 0, stream, args);
  const auto kernel = x.dtype == DType::f32   ? scatter_tokens_f32
                      : x.dtype == DType::f64 ? scatter_tokens_f64
                      : x.dtype == DType::f16 ? scatter_tokens_f16
                                              : scatter_tokens_bf16;
  VIDOPS_LAUNCH(kScatter, kernel, grid, kGatherThreads, 0, stream, args);
}

}  // namespace vidops
