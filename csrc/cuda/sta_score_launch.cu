#include <algorithm>

#include "sta_score.cu"
#include "tokens_launch.cuh"
#include "vidops/token_cuda.h"

namespace vidops {
namespace {

constexpr const char* kOp = "sta_score";
constexpr int64_t kSpreadBytes = int64_t{256} << 20;  // of the exponentials of the items of one launch
constexpr size_t kSpreadShared =
    sizeof(float) * cuda::kSpreadDepth * (cuda::kSpreadRows + cuda::kSpreadColumns + 2 * cuda::kSpreadPad) +
    sizeof(double) * cuda::kSpreadRows * 16;

// How many items a launch of the spread and the scan takes.
int64_t items_together(int64_t batch, int64_t frames, int64_t tokens) {
  const int64_t pairs = std::max<int64_t>(frames - 1, 1);
  const int64_t bytes = pairs * tokens * cuda::round_up(tokens, 4) * static_cast<int64_t>(sizeof(float));
  return std::clamp<int64_t>(std::min(kSpreadBytes / bytes, 65535 / pairs), 1, std::max<int64_t>(batch, 1));
}

void lay_out(cuda::Arena& arena, int64_t batch, int64_t frames, int64_t tokens, int64_t width,
             cuda::StaScoreArgs& args) {
  const int64_t together = items_together(batch, frames, tokens), pairs = together * (frames - 1);
  args.unit = arena.take<float>(batch * frames * tokens * width);
  args.total = arena.take<double>(batch * frames * tokens);
  args.spread = arena.take<float>(pairs * tokens * cuda::round_up(tokens, 4));
  args.mass = arena.take<double>(pairs * tokens);
}

}  // namespace

int64_t sta_score_workspace_cuda(int64_t batch, int64_t frames, int64_t tokens, int64_t width) {
  cuda::Arena arena;
  cuda::StaScoreArgs args{};
  lay_out(arena, batch, frames, tokens, width, args);
  return arena.words();
}

void sta_score_forward_cuda(const StaScoreCudaParams& params, int device, void* stream) {
  using namespace cuda;
  const DeviceGuard guard(kOp, device);
  StaScoreArgs args{};
  args.x = token_rows(kOp, "x", params.x), args.metric = token_rows(kOp, "metric", params.metric);
  require(params.metric.dtype == params.x.dtype && params.keep.rank == 3, "sta_score: dtypes or ranks do not fit");
  const int64_t batch = params.x.shape[0], frames = params.keep.shape[1], kept = params.keep.shape[2];
  require(frames > 0 && params.x.shape[1] % frames == 0 && params.metric.shape[0] == batch &&
              params.metric.shape[1] == params.x.shape[1],
          "sta_score: x and metric do not fit");
  const int64_t tokens = params.x.shape[1] / frames, even = (tokens + 1) / 2;
  require(kept >= 1 && kept <= tokens, "sta_score: keep must have 1 to N tokens");
  require_result(kOp, params.keep, DType::i64, {batch, frames, kept});
  for (const TensorView* v : {&params.activation, &params.acc, &params.score})
    require_result(kOp, *v, DType::f32, {batch, frames, tokens});
  require_result(kOp, params.first_order, DType::i64, {batch, tokens});
  require_result(kOp, params.first_similarity, DType::f32, {batch, even});
  if (batch == 0) return;

  args.items = to_int(kOp, batch), args.frames = to_int(kOp, frames), args.tokens = to_int(kOp, tokens);
  args.kept = to_int(kOp, kept), args.even = to_int(kOp, even);
  args.reverse = params.reverse, args.first_frame_pruned = params.first_frame_pruned;
  constexpr int64_t kWarps = kTokenThreads / kWarp;
  args.match_blocks = static_cast<int>(ceil_div(even, kWarps));
  args.pitch = static_cast<int>(round_up(tokens, 4));
  args.slots = static_cast<int>(power_of_two_from(tokens));
  // As many teams as have a token for each of their threads, in whole warps.
  args.teams = static_cast<int>(std::clamp<int64_t>(kScanThreads / round_up(tokens, kWarp), 1, 8));
  const size_t shared = sizeof(u64) * static_cast<size_t>(args.slots) + sizeof(double) * 2 * (kScanThreads / kWarp) +
                        static_cast<size_t>(tokens) *
                            (sizeof(double) * static_cast<size_t>(args.teams) + sizeof(float) + sizeof(int));
  require(shared <= shared_limit(kOp), std::string(kOp) + ": too many tokens in a group for a block");
  Arena arena(kOp, params.workspace, sta_score_workspace_cuda(batch, frames, tokens, args.metric.width));
  lay_out(arena, batch, frames, tokens, args.metric.width, args);
  args.keep = params.keep.as<i64>();
  args.activation = params.activation.as<float>(), args.acc = params.acc.as<float>();
  args.score = params.score.as<float>();
  args.first_order = params.first_order.as<i64>(), args.first_similarity = params.first_similarity.as<float>();

  const DType dtype = params.x.dtype;
  const auto look = dtype == DType::f32 ? sta_look_f32 : dtype == DType::f16 ? sta_look_f16 : sta_look_bf16;
  const auto match = dtype == DType::f32 ? sta_match_f32 : dtype == DType::f16 ? sta_match_f16 : sta_match_bf16;
  VIDOPS_LAUNCH(kOp, look, Grid{grid_x(kOp, ceil_div(batch * frames * tokens, kWarps))}, kTokenThreads, 0, stream,
                args);
  VIDOPS_LAUNCH(kOp, match, Grid{grid_x(kOp, batch * args.match_blocks)}, kTokenThreads, kMatchShared, stream, args);
  const int64_t together = items_together(batch, frames, tokens);
  for (int64_t first = 0; first < batch; first += together) {
    const int64_t here = std::min(together, batch - first);
    args.first_item = static_cast<int>(first);
    if (frames > 1) {
      const Grid grid{grid_x(kOp, ceil_div(tokens, kSpreadRows)), grid_yz(kOp, here * (frames - 1))};
      VIDOPS_LAUNCH(kOp, sta_spread, grid, kSpreadThreads, kSpreadShared, stream, args);
    }
    VIDOPS_LAUNCH(kOp, sta_scan, Grid{grid_x(kOp, here)}, kScanThreads, shared, stream, args);
  }
}

}  // namespace vidops
