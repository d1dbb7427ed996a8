#include <algorithm>
#include <cmath>

#include "attention_head_mean.cu"
#include "attention_launch.cuh"
#include "vidops/attention_head_mean.h"

namespace vidops {
namespace cuda {
namespace {

constexpr int64_t kTypicalBlocks = 132;  // that run at once, one per multiprocessor of the largest card
constexpr int64_t kStartTiles = 2;       // tiles of keys that pass in the time it takes to start a block
constexpr int64_t kDeltaBlocks = 528;   // four, so that the last ones to run cost little

int64_t map_tiles(const AttentionArgs& args) {
  return int64_t{args.q.rows / kRowTile} * ceil_div(args.m, kMapKeys) * (args.batch_heads / args.heads);
}

// Into how many ranges of tiles the keys are cut, so that `blocks` times as many fill whole rounds of the card.
int64_t key_splits(int64_t blocks, int64_t key_tiles) {
  int64_t best = 1, least = 0;
  for (int64_t splits = 1; splits <= std::min(key_tiles, kTypicalBlocks); ++splits) {
    const int64_t time = ceil_div(blocks * splits, kTypicalBlocks) * (ceil_div(key_tiles, splits) + kStartTiles);
    if (splits == 1 || time < least) best = splits, least = time;
  }
  return best;
}

// Shared memory of a kernel that multiplies by warpgroups.
size_t group_shared(DType dtype, size_t rows) {
  return sizeof(u16) * (dtype == DType::f32 ? SplitKind::kPlanes : 1) * kMaxWidth * rows;
}

// Whether the current device has code with products of warpgroups, and room for it.
template <class Kernel>
bool use_groups(const char* op, const AttentionArgs& args, Kernel kernel, int threads, size_t shared) {
  return args.width == kMaxWidth && shared <= shared_limit(op) && threads <= thread_limit(op, kernel);
}

bool launch_lse_groups(const char* op, const AttentionArgs& args, DType dtype, void* stream) {
  const bool wide = args.chunks > 1;
  const int groups = wide ? kWideLseGroups : kLseGroups, threads = groups * kGroupThreads;
  const int rows = groups * kBlockRows;
  // float32: 192 KB.
  const size_t shared = group_shared(dtype, wide ? 3 * (rows + kGroupKeys) : rows + 4 * kGroupKeys);
  const auto attention_lse =
      wide ? attention_kernel(dtype, attention_lse_wide_f32, attention_lse_wide_f16, attention_lse_wide_bf16)
           : attention_kernel(dtype, attention_lse_groups_f32, attention_lse_groups_f16, attention_lse_groups_bf16);
  if (!use_groups(op, args, attention_lse, threads, shared)) return false;
  const Grid grid{grid_x(op, ceil_div(args.q.rows, rows) * args.batch_heads), grid_yz(op, args.splits)};
  VIDOPS_LAUNCH(op, attention_lse, grid, threads, shared, stream, args);
  return true;
}

bool launch_map_groups(const char* op, const AttentionArgs& plan, DType dtype, void* stream) {
  AttentionArgs args = plan;
  const bool wide = args.chunks > 1;
  const int threads = kMapGroups * kGroupThreads;
  // float32: 224 KB for heads of one chunk, 192 for wider ones.
  const size_t shared = group_shared(dtype, 3 * kRowTile + (wide ? 3 : 4) * kGroupKeys);
  const auto attention_map =
      wide ? attention_kernel(dtype, attention_map_wide_f32, attention_map_wide_f16, attention_map_wide_bf16)
           : attention_kernel(dtype, attention_map_groups_f32, attention_map_groups_f16, attention_map_groups_bf16);
  if (!use_groups(op, args, attention_map, threads, shared)) return false;
  const int64_t tiles = int64_t{args.q.rows / kRowTile} * ceil_div(args.m, kMapParts * kGroupKeys) *
                        (args.batch_heads / args.heads);
  args.share = 1.0f / static_cast<float>(args.heads);
  args.map_blocks = static_cast<int>(std::min<int64_t>(tiles, multiprocessors(op)));
  if (args.log_p) zero_async(op, args.tiny_tile, map_tiles(args) * sizeof(u32), stream);
  VIDOPS_LAUNCH(op, attention_map, Grid{grid_x(op, args.map_blocks)}, threads, shared, stream, args);
  return true;
}

}  // namespace

size_t attention_fit_stages(const char* op, AttentionArgs& args, DType dtype, size_t tile_rows, size_t stage_rows,
                            size_t spare) {
  const size_t row = sizeof(u16) * (dtype == DType::f32 ? SplitKind::kPlanes : 1) * args.width;
  const size_t limit = shared_limit(op);
  const auto bytes = [&](size_t stages) { return row * (tile_rows + stages * stage_rows); };
  args.stages = args.chunks == 1 && bytes(2) + spare <= limit ? 2 : 1;
  require(bytes(1) + spare <= limit,
          std::string(op) + ": heads of this size need " + std::to_string(bytes(1) / 1024) +
              " KB of shared memory per block, more than the device has");
  return bytes(args.stages) + spare;
}

AttentionArgs attention_plan(const char* op, Arena& arena, const AttentionSizes& sizes, const AttentionNeeds& needs) {
  AttentionArgs args{};
  args.heads = to_int(op, sizes.heads);
  args.batch_heads = to_int(op, sizes.batch * sizes.heads);
  args.n = to_int(op, sizes.n);
  args.m = to_int(op, sizes.m);
  args.d = to_int(op, sizes.d);
  const bool wide = sizes.d > kMaxWidth;
  args.depth = wide ? kMaxWidth : static_cast<int>(round_up(sizes.d, 16));
  // Products of warpgroups need rows of kMaxWidth; half of them empty would cost more than they save.
  const bool scores_only = !needs.values && !needs.gradient;
  args.width = scores_only && sizes.d > kMaxWidth / 2 ? kMaxWidth : args.depth;
  args.chunks = static_cast<int>(ceil_div(sizes.d, args.width));

  const auto operand = [&](int64_t rows) {
    PackedOperand o{};
    o.rows = to_int(op, round_up(rows, kRowTile));
    o.data = arena.take<u16>((needs.split ? SplitKind::kPlanes : 1) * int64_t{args.batch_heads} * args.chunks *
                             o.rows * args.width);
    return o;
  };
  args.q = operand(sizes.n);
  args.k = operand(sizes.m);
  if (needs.values) args.v = operand(sizes.m);
  if (needs.values && needs.gradient) args.g = operand(sizes.n);
  if (needs.split)  // one piece, cleared in one go
    for (PackedOperand* o : {&args.q, &args.k, &args.v, &args.g}) o->range = arena.take<u32>(args.batch_heads);

  const int64_t rows = int64_t{args.batch_heads} * args.n;
  if (needs.gradient) {
    const int64_t padded_rows = int64_t{args.batch_heads} * args.q.rows;
    args.row_lse2 = arena.take<float>(padded_rows);
    args.delta = arena.take<float>(padded_rows);
    const int64_t blocks = std::max<int64_t>(
        1, args.q.rows / kRowTile * sizes.batch * ceil_div(sizes.heads, kDeltaHeads));
    const int64_t tiles = std::max<int64_t>(1, ceil_div(args.m, kDeltaKeys));
    const int64_t wanted = std::clamp<int64_t>(kDeltaBlocks / blocks, 1, tiles);
    args.map_tiles_per_part = static_cast<int>(ceil_div(tiles, wanted));
    args.map_parts = static_cast<int>(ceil_div(tiles, args.map_tiles_per_part));
    args.map_delta = arena.take<float>(padded_rows * args.map_parts);
    return args;
  }
  args.lse2 = arena.take<float>(rows);
  args.tiny_tile = arena.take<u32>(map_tiles(args));
  const int64_t blocks = std::max<int64_t>(1, ceil_div(args.q.rows, kLseGroups * kBlockRows) * args.batch_heads);
  const int64_t key_tiles = std::max<int64_t>(1, ceil_div(args.m, kLseKeys));
  args.tiles_per_split = static_cast<int>(ceil_div(key_tiles, key_splits(blocks, key_tiles)));
  args.splits = static_cast<int>(ceil_div(key_tiles, args.tiles_per_split));
  if (args.splits > 1) {
    args.part_top = arena.take<float>(rows * args.splits);
    args.part_sum = arena.take<float>(rows * args.splits);
  }
  return args;
}

void attention_check(const char* op, const TensorView& q, const TensorView& view, int64_t rows, const char* name) {
  const bool known = q.dtype == DType::f32 || q.dtype == DType::f16 || q.dtype == DType::bf16;
  require(known && view.dtype == q.dtype, std::string(op) + ": " + name + " has an unsupported dtype");
  require(view.rank == 4 && view.shape[0] == q.shape[0] && view.shape[1] == q.shape[1] && view.shape[2] == rows &&
              view.shape[3] == q.shape[3],
          std::string(op) + ": " + name + " has an unexpected shape");
}

void attention_set_scale(AttentionArgs& args, double scale) {
  args.scale = static_cast<float>(scale);
  args.factor = static_cast<float>(scale * 1.4426950408889634);
}

void attention_set_dropout(const char* op, AttentionArgs& args, double dropout_p, uint64_t seed) {
  require(dropout_p >= 0.0 && dropout_p < 1.0, std::string(op) + ": dropout_p must be in [0, 1)");
  args.dropout = dropout_p > 0;
  args.threshold = static_cast<u32>(dropout_p * 4294967296.0);
  args.seed = seed;
  args.keep_scale = static_cast<float>(1.0 / (1.0 - dropout_p));
}

void attention_set_row_inputs(const char* op, AttentionArgs& args, const TensorView& lse,
                              const TensorView& grad_map) {
  require_dtype(op, "lse", lse, DType::f32);
  require(lse.numel() == int64_t{args.batch_heads} * args.n, std::string(op) + ": lse has an unexpected shape");
  require(lse.contiguous(), std::string(op) + ": lse is not contiguous");
  args.lse = lse.as<float>();
  if (!grad_map.present()) return;
  require_dtype(op, "the map's gradient", grad_map, DType::f32);
  require(grad_map.rank == 3 && grad_map.shape[0] * args.heads == args.batch_heads && grad_map.shape[1] == args.n &&
              grad_map.shape[2] == args.m,
          std::string(op) + ": the map's gradient has an unexpected shape");
  args.grad_map = grad_map.as<const float>();
  args.map_batch = grad_map.stride[0];
  args.map_row = grad_map.stride[1];
}

void attention_launch_pack(const char* op, const AttentionArgs& args, const AttentionInput* inputs, int count,
                           void* stream) {
  AttentionPackArgs pack{};
  pack.heads = args.heads;
  pack.batch_heads = args.batch_heads;
  pack.d = args.d;
  pack.width = args.width;
  pack.chunks = args.chunks;
  const DType dtype = inputs[0].view.dtype;
  pack.exponent_mask = dtype == DType::f16 ? 0x7c00 : 0x7f80;
  int64_t rows = 0;
  for (int i = 0; i < count; ++i) {
    const TensorView& view = inputs[i].view;
    AttentionSource& s = pack.source[i];
    s.data = view.data;
    s.batch_stride = view.stride[0];
    s.head_stride = view.stride[1];
    s.row_stride = view.stride[2];
    s.rows = to_int(op, view.shape[2]);
    s.poison = inputs[i].poison;
    s.packed = inputs[i].packed;
    rows = std::max<int64_t>(rows, s.packed.rows);
  }
  const auto grid = [&](int64_t blocks) {
    pack.blocks_per_head = to_int(op, blocks);
    return Grid{grid_x(op, blocks * args.batch_heads), grid_yz(op, count)};
  };
  const int64_t items = rows * args.chunks * (args.width / 8);
  if (dtype != DType::f32) {
    const Grid blocks = grid(ceil_div(to_int(op, items), kPackThreads));
    VIDOPS_LAUNCH(op, attention_pack_16bit, blocks, kPackThreads, 0, stream, pack);
    return;
  }
  const size_t bytes = reinterpret_cast<char*>(args.g.range + args.batch_heads) - reinterpret_cast<char*>(args.q.range);
  zero_async(op, args.q.range, bytes, stream);
  const Grid range_blocks = grid(ceil_div(rows, kRangeRows));
  VIDOPS_LAUNCH(op, attention_range, range_blocks, kPackThreads, 0, stream, pack);
  const Grid blocks = grid(ceil_div(to_int(op, items), kPackThreads));
  VIDOPS_LAUNCH(op, attention_pack_f32, blocks, kPackThreads, 0, stream, pack);
}

void attention_launch_lse(const char* op, const AttentionArgs& plan, DType dtype, void* stream) {
  AttentionArgs args = plan;
  if (!launch_lse_groups(op, args, dtype, stream)) {
    // 72 KB for float32 heads of 48 channels, 96 KB for 64.
    const size_t shared = attention_fit_stages(op, args, dtype, kRowTile, kLseKeys);
    const Grid grid{grid_x(op, int64_t{args.q.rows / kRowTile} * args.batch_heads), grid_yz(op, args.splits)};
    const auto attention_lse = attention_kernel(dtype, attention_lse_f32, attention_lse_f16, attention_lse_bf16);
    VIDOPS_LAUNCH(op, attention_lse, grid, kAttentionThreads, shared, stream, args);
  }
  if (args.splits == 1) return;
  const int64_t rows = int64_t{args.batch_heads} * args.n;
  VIDOPS_LAUNCH(op, attention_lse_combine, Grid{grid_x(op, ceil_div(rows, kCombineThreads))}, kCombineThreads, 0,
                stream, args);
}

void attention_launch_map(const char* op, const AttentionArgs& plan, DType dtype, void* stream) {
  AttentionArgs args = plan;
  // 96 KB for float32 heads of 48 channels, 128 KB for 64; half of it for the 16-bit types.
  const size_t shared = attention_fit_stages(op, args, dtype, 0, kRowTile + kMapKeys);
  const Grid grid{grid_x(op, map_tiles(args))};
  if (args.dropout) {  // takes its time for the random words, not for the products
    const auto attention_map =
        attention_kernel(dtype, attention_map_dropout_f32, attention_map_dropout_f16, attention_map_dropout_bf16);
    VIDOPS_LAUNCH(op, attention_map, grid, kMapThreads, shared, stream, args);
    return;
  }
  if (!launch_map_groups(op, args, dtype, stream)) {
    const auto attention_map = attention_kernel(dtype, attention_map_f32, attention_map_f16, attention_map_bf16);
    VIDOPS_LAUNCH(op, attention_map, grid, kMapThreads, shared, stream, args);
  }
  if (!args.log_p) return;
  const auto attention_tiny = attention_kernel(dtype, attention_tiny_f32, attention_tiny_f16, attention_tiny_bf16);
  VIDOPS_LAUNCH(op, attention_tiny, grid, kMapThreads, shared, stream, args);
}

}  // namespace cuda

namespace {

constexpr const char* kOp = "attention_head_mean";

cuda::AttentionNeeds needs(bool f32, bool backward) { return {f32, false, backward}; }

}  // namespace

int64_t attention_head_mean_workspace_cuda(int64_t batch, int64_t heads, int64_t n, int64_t d, int64_t m, bool f32,
                                           bool backward) {
  cuda::Arena arena;
  cuda::attention_plan(kOp, arena, {batch, heads, n, m, d}, needs(f32, backward));
  return arena.words();
}

void attention_head_mean_forward_cuda(const AttentionHeadMeanParams& params, int device, void* stream) {
  using namespace cuda;
  const DeviceGuard guard(kOp, device);
  const DType dtype = params.q.dtype;
  const AttentionSizes sizes = attention_sizes(params.q, params.k);
  attention_check(kOp, params.q, params.q, sizes.n, "q");
  attention_check(kOp, params.q, params.k, sizes.m, "k");
  require_dtype(kOp, "p", params.p, DType::f32);
  require_dtype(kOp, "lse", params.lse, DType::f32);
  require(!(params.dropout_p > 0 && params.log_p.present()),
          std::string(kOp) + ": a map with dropout has no logarithm");
  if (sizes.batch * sizes.n == 0) return;

  const bool f32 = dtype == DType::f32;
  Arena arena(kOp, params.workspace,
              attention_head_mean_workspace_cuda(sizes.batch, sizes.heads, sizes.n, sizes.d, sizes.m, f32, false));
  AttentionArgs args = attention_plan(kOp, arena, sizes, needs(f32, false));
  attention_set_scale(args, params.scale);
  attention_set_dropout(kOp, args, params.dropout_p, params.seed);
  args.lse = params.lse.as<float>();
  args.p = params.p.as<float>();
  args.log_p = params.log_p.present() ? params.log_p.as<float>() : nullptr;

  const AttentionInput inputs[] = {{params.q, args.q, true}, {params.k, args.k, true}};
  attention_launch_pack(kOp, args, inputs, 2, stream);
  attention_launch_lse(kOp, args, dtype, stream);
  attention_launch_map(kOp, args, dtype, stream);
}

void attention_head_mean_backward_cuda(const AttentionHeadMeanBackwardParams& params, int device, void* stream) {
  using namespace cuda;
  const DeviceGuard guard(kOp, device);
  const DType dtype = params.q.dtype;
  const AttentionSizes sizes = attention_sizes(params.q, params.k);
  attention_check(kOp, params.q, params.q, sizes.n, "q");
  attention_check(kOp, params.q, params.k, sizes.m, "k");
  attention_check(kOp, params.q, params.grad_q, sizes.n, "grad_q");
  attention_check(kOp, params.q, params.grad_k, sizes.m, "grad_k");
  if (sizes.batch == 0) return;

  const bool f32 = dtype == DType::f32;
  Arena arena(kOp, params.workspace,
              attention_head_mean_workspace_cuda(sizes.batch, sizes.heads, sizes.n, sizes.d, sizes.m, f32, true));
  AttentionArgs args = attention_plan(kOp, arena, sizes, needs(f32, true));
  attention_set_scale(args, params.scale);
  attention_set_dropout(kOp, args, params.dropout_p, params.seed);
  attention_set_row_inputs(kOp, args, params.lse, params.grad_p);

  const AttentionInput inputs[] = {{params.q, args.q, true}, {params.k, args.k, true}};
  attention_launch_pack(kOp, args, inputs, 2, stream);
  attention_launch_gradients(kOp, args, dtype, {}, {params.grad_q.data, params.grad_k.data, nullptr}, stream);
}

}  // namespace vidops
