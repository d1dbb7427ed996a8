#include "bipartite_match.cu"
#include "tokens_launch.cuh"
#include "vidops/token_cuda.h"

namespace vidops {
namespace {

constexpr const char* kOp = "bipartite_match";

}  // namespace

int64_t bipartite_match_workspace_cuda(int64_t batch, int64_t tokens, int64_t width) {
  cuda::Arena arena;
  arena.take<float>(batch * tokens * width);
  return arena.words();
}

void bipartite_match_forward_cuda(const BipartiteMatchCudaParams& params, int device, void* stream) {
  using namespace cuda;
  const DeviceGuard guard(kOp, device);
  const int64_t batch = params.metric.shape[0], tokens = params.metric.shape[1], even = (tokens + 1) / 2;
  MatchArgs args{};
  args.metric = token_rows(kOp, "metric", params.metric);
  require_result(kOp, params.order, DType::i64, {batch, even});
  require_result(kOp, params.similarity, DType::f32, {batch, even});
  require_result(kOp, params.partner, DType::i64, {batch, even});
  if (batch == 0) return;
  const int64_t slots = power_of_two_from(even), shared = slots * static_cast<int64_t>(sizeof(u64));
  require(static_cast<size_t>(shared) <= shared_limit(kOp), std::string(kOp) + ": too many tokens to sort in a block");
  Arena arena(kOp, params.workspace, bipartite_match_workspace_cuda(batch, tokens, args.metric.width));
  constexpr int64_t kWarps = kTokenThreads / kWarp;

  UnitKeysArgs keys{args.metric, to_int(kOp, tokens), batch * tokens,
                    arena.take<float>(batch * tokens * args.metric.width)};
  args.blocks = static_cast<int>(ceil_div(even, kWarps));
  args.tokens = keys.tokens, args.even = to_int(kOp, even);
  args.class_token = params.class_token, args.distill_token = params.distill_token;
  args.unit = keys.unit;
  args.similarity = params.similarity.as<float>(), args.partner = params.partner.as<i64>();
  const DType dtype = params.metric.dtype;
  const auto unit = dtype == DType::f32 ? unit_keys_f32 : dtype == DType::f16 ? unit_keys_f16 : unit_keys_bf16;
  const auto match =
      dtype == DType::f32 ? match_tokens_f32 : dtype == DType::f16 ? match_tokens_f16 : match_tokens_bf16;
  VIDOPS_LAUNCH(kOp, unit, Grid{grid_x(kOp, ceil_div(keys.rows, kWarps))}, kTokenThreads, 0, stream, keys);
  VIDOPS_LAUNCH(kOp, match, Grid{grid_x(kOp, batch * args.blocks)}, kTokenThreads, kMatchShared, stream, args);
  VIDOPS_LAUNCH(kOp, match_sort, Grid{grid_x(kOp, batch)}, kMatchSortThreads, static_cast<size_t>(shared), stream,
                args.similarity, args.even, static_cast<int>(slots), params.order.as<i64>());
}

}  // namespace vidops
