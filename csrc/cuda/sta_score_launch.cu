#include <algorithm>

#include "sta_score.cu"
#include "tokens_launch.cuh"
#include "vidops/token_cuda.h"

namespace vidops {
namespace {

constexpr const char* kOp = "sta_score";
constexpr int64_t kSpreadBytes = int64_t{256} << 20;  // of the exponentials of the items of one launch
constexpr int64_t kMaxTeams = 32;                     // whose sums are added up again
constexpr int64_t kTeamTokens = 5120;                 // of all teams: so many doubles fit beside what else a block has
constexpr size_t kTileShared = 16 * cuda::kTilePitch * (cuda::kTileRows + cuda::kTileColumns);

struct Sizes {
  int64_t batch, frames, tokens, width;

  int64_t pairs() const { return frames - 1; }
  int64_t even() const { return (tokens + 1) / 2; }
  int64_t depth() const { return cuda::round_up(width, 4); }
  int64_t pitch() const { return cuda::round_up(tokens, 8); }
  int64_t row_tiles() const { return cuda::ceil_div(tokens, cuda::kTileRows); }
  int64_t column_tiles() const { return cuda::ceil_div(tokens, cuda::kTileColumns); }
  int64_t match_rows() const { return cuda::ceil_div(even(), cuda::kTileRows); }
  int64_t match_columns() const { return cuda::ceil_div(tokens / 2, cuda::kTileColumns); }
  // How many items a launch of the tiles and the scan takes.
  int64_t together(size_t element) const {
    const int64_t bytes = std::max<int64_t>(pairs(), 1) * tokens * pitch() * static_cast<int64_t>(element);
    return std::clamp<int64_t>(kSpreadBytes / bytes, 1, std::max<int64_t>(batch, 1));
  }
};

template <class T>
void lay_out(cuda::Arena& arena, const Sizes& s, cuda::StaScoreArgs<T>& args) {
  const int64_t together = s.together(sizeof(T)), pairs = together * s.pairs(), group = s.tokens * s.depth();
  args.unit = arena.take<T>(s.batch * s.frames * group);
  if constexpr (sizeof(T) == sizeof(double)) {
    args.exact = args.unit + (args.reverse ? s.pairs() * group : 0), args.exact_item = s.frames * group;
  } else {
    args.exact = arena.take<double>(s.batch * group), args.exact_item = group;
  }
  args.total = arena.take<double>(s.batch * s.frames * s.tokens);
  args.spread = arena.take<T>(pairs * s.tokens * s.pitch());
  args.part = arena.take<double>(pairs * s.column_tiles() * s.tokens);
  args.mass = arena.take<double>(pairs * s.tokens);
  args.best = arena.take<T>(together * s.match_columns() * s.even());
}

template <class T>
int64_t workspace_words(const Sizes& s) {
  cuda::Arena arena;
  cuda::StaScoreArgs<T> args{};
  lay_out(arena, s, args);
  return arena.words();
}

// Blocks of a cluster: as many as the device has room for, while each has enough to read of every row.
template <class T, class Scan>
void share_out(const Sizes& s, Scan scan, cuda::StaScoreArgs<T>& args) {
  const int64_t pieces = s.pitch() * static_cast<int64_t>(sizeof(T)) / 16, limit = cuda::cluster_limit(kOp, scan);
  const int64_t multiprocessors = cuda::multiprocessors(kOp);
  int64_t ranks = 1;
  while (s.frames > 1 && ranks * 2 <= limit && args.here * ranks * 2 <= multiprocessors && pieces >= ranks * 2 * 4)
    ranks *= 2;
  args.ranks = static_cast<int>(ranks);
  args.share = static_cast<int>(cuda::round_up(cuda::ceil_div(pieces, ranks), 2));
  // By the tokens alone: a clip's figures depend neither on its batch nor on the device.
  args.teams = static_cast<int>(std::clamp<int64_t>(kTeamTokens / s.tokens, 1, kMaxTeams));
}

template <class T>
size_t scan_shared(const Sizes& s, cuda::StaScoreArgs<T>& args) {
  const size_t pitch = static_cast<size_t>(s.pitch());
  const size_t sums = static_cast<size_t>(args.teams) * static_cast<size_t>(args.share) * (16 / sizeof(T));
  const int64_t slots = args.tokens > cuda::Ranking<T>::kMostCounted ? cuda::power_of_two_from(s.tokens) : 0;
  const size_t numbers = std::max(pitch * (sizeof(T) + sizeof(int)), sizeof(cuda::u64) * static_cast<size_t>(slots));
  const size_t shared = sizeof(double) * (cuda::kScanThreads / cuda::kWarp + sums) +
                        pitch * sizeof(T) * (args.ranks > 1 ? 2 : 1) + pitch * sizeof(cuda::u32) + numbers;
  const int64_t copies = std::min<int64_t>(s.pairs(), 2);
  const size_t held = static_cast<size_t>(16 * copies * s.tokens * args.share);
  const bool fits = shared + held <= cuda::shared_limit(kOp);
  args.held = fits ? static_cast<int>(copies) : 0;
  return fits ? shared + held : shared;
}

template <class T, class Look, class Spread, class Scan>
void run(const StaScoreCudaParams& params, const Sizes& s, cuda::StaScoreArgs<T>& args, Look look, Spread spread,
         Scan scan, void* stream) {
  using namespace cuda;
  args.items = to_int(kOp, s.batch), args.frames = to_int(kOp, s.frames), args.tokens = to_int(kOp, s.tokens);
  args.kept = to_int(kOp, params.keep.shape[2]), args.even = to_int(kOp, s.even());
  args.reverse = params.reverse, args.first_frame_pruned = params.first_frame_pruned;
  args.depth = to_int(kOp, s.depth()), args.pitch = to_int(kOp, s.pitch());
  args.row_tiles = to_int(kOp, s.row_tiles()), args.column_tiles = to_int(kOp, s.column_tiles());
  args.match_rows = to_int(kOp, s.match_rows()), args.match_columns = to_int(kOp, s.match_columns());
  Arena arena(kOp, params.workspace, workspace_words<T>(s));
  lay_out(arena, s, args);
  args.keep = params.keep.as<i64>();
  args.activation = params.activation.as<T>(), args.acc = params.acc.as<T>(), args.score = params.score.as<T>();
  args.first_order = params.first_order.as<i64>(), args.first_similarity = params.first_similarity.as<T>();

  const int64_t rows = to_int(kOp, s.batch * s.frames * s.tokens), together = s.together(sizeof(T));
  VIDOPS_LAUNCH(kOp, look, Grid{grid_x(kOp, ceil_div(rows, kTokenThreads / kWarp))}, kTokenThreads, 0, stream, args);
  for (int64_t first = 0; first < s.batch; first += together) {
    args.first_item = static_cast<int>(first), args.here = static_cast<int>(std::min(together, s.batch - first));
    const int64_t tiles = s.match_rows() * s.match_columns() + s.pairs() * s.row_tiles() * s.column_tiles();
    VIDOPS_LAUNCH(kOp, spread, Grid{grid_x(kOp, args.here * (tiles + s.frames))}, kTileThreads, kTileShared, stream,
                  args);
    share_out(s, scan, args);
    const size_t shared = scan_shared(s, args);
    require(shared <= shared_limit(kOp), std::string(kOp) + ": too many tokens in a group for a block");
    VIDOPS_LAUNCH_CLUSTERS(kOp, scan, Grid{grid_x(kOp, int64_t{args.here} * args.ranks)}, args.ranks, kScanThreads,
                           shared, stream, args);
  }
}

}  // namespace

int64_t sta_score_workspace_cuda(int64_t batch, int64_t frames, int64_t tokens, int64_t width, bool f64) {
  const Sizes sizes{batch, frames, tokens, width};
  return f64 ? workspace_words<double>(sizes) : workspace_words<float>(sizes);
}

void sta_score_forward_cuda(const StaScoreCudaParams& params, int device, void* stream) {
  using namespace cuda;
  const DeviceGuard guard(kOp, device);
  const TokenRows x = token_rows(kOp, "x", params.x, true), metric = token_rows(kOp, "metric", params.metric, true);
  const DType dtype = params.x.dtype, figures = dtype == DType::f64 ? DType::f64 : DType::f32;
  require(params.metric.dtype == dtype && params.keep.rank == 3, "sta_score: dtypes or ranks do not fit");
  const int64_t batch = params.x.shape[0], frames = params.keep.shape[1], kept = params.keep.shape[2];
  require(frames > 0 && params.x.shape[1] % frames == 0 && params.metric.shape[0] == batch &&
              params.metric.shape[1] == params.x.shape[1],
          "sta_score: x and metric do not fit");
  const Sizes sizes{batch, frames, params.x.shape[1] / frames, metric.width};
  require(kept >= 1 && kept <= sizes.tokens, "sta_score: keep must have 1 to N tokens");
  require_result(kOp, params.keep, DType::i64, {batch, frames, kept});
  for (const TensorView* v : {&params.activation, &params.acc, &params.score})
    require_result(kOp, *v, figures, {batch, frames, sizes.tokens});
  require_result(kOp, params.first_order, DType::i64, {batch, sizes.tokens});
  require_result(kOp, params.first_similarity, figures, {batch, sizes.even()});
  if (batch == 0) return;

  if (dtype == DType::f64) {
    StaScoreArgs<double> args{};
    args.x = x, args.metric = metric;
    run(params, sizes, args, sta_look_f64, sta_spread_f64, sta_scan_f64, stream);
  } else {
    StaScoreArgs<float> args{};
    args.x = x, args.metric = metric;
    const auto look = dtype == DType::f32 ? sta_look_f32 : dtype == DType::f16 ? sta_look_f16 : sta_look_bf16;
    run(params, sizes, args, look, sta_spread_f32, sta_scan_f32, stream);
  }
}

}  // namespace vidops
