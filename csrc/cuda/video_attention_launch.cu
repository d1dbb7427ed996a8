#include <algorithm>

#include "attention_launch.cuh"
#include "video_attention.cu"
#include "vidops/video_attention.h"

namespace vidops {
namespace cuda {
namespace {

// Lays out the shared memory and returns its size. In order of preference: two stages and the map's gradient through
// shared memory; without the latter; one stage. float32 heads of 64 channels take 200, 128 and 96 KB, wider ones,
// streamed without a second stage, 160 or 128; half of it, but for the map's 36 KB per stage, in the 16-bit types.
size_t weighted_shared(const char* op, AttentionArgs& args, DType dtype, WeightedSum sum) {
  const bool logits = sum != WeightedSum::output, keys = sum == WeightedSum::keys;
  const bool with_values = args.v.data != nullptr, streamed = args.chunks > 1;
  const int width = args.width * (dtype == DType::f32 ? SplitKind::kPlanes : 1);
  const int x_size = kRowTile * width, y_size = kColumnTile * width;
  const int map_size = (keys ? kColumnTile * (kRowTile + 4) : kRowTile * (kColumnTile + 8)) * 2;
  WeightedLayout& at = args.at;
  at.row_value = x_size;
  at.stages = logits && with_values ? 2 * x_size : x_size;
  int used = y_size;
  const auto take = [&](bool wanted, int size) {
    const int place = wanted ? used : 0;
    used += wanted ? size : 0;
    return place;
  };
  at.column_value = take(logits && with_values, y_size);
  const int own_value = take(with_values && (!logits || (keys && streamed)), y_size);
  at.value_sum = own_value ? own_value : at.column_value;
  at.logit_sum = take(logits && streamed, y_size);
  at.statistics = take(keys, kColumnTile * 2 * 2);
  at.map = used;
  at.column_tiles = static_cast<int>(ceil_div(keys ? args.n : args.m, kColumnTile));

  const bool aligned = args.map_row % 4 == 0 && args.map_batch % 4 == 0 && args.m % 4 == 0 &&
                       reinterpret_cast<uintptr_t>(args.grad_map) % 16 == 0;
  const bool map = logits && args.grad_map && aligned;
  const size_t limit = shared_limit(op);
  const size_t halves = sizeof(float) * kRowTile * args.width;  // of the sums, when they are added up
  const auto bytes = [&](int stages, bool staged) {
    return std::max(halves, sizeof(u16) * (at.stages + size_t(stages) * (used + (staged ? map_size : 0))));
  };
  struct Form {
    int stages;
    bool staged;
  };
  for (const Form form : {Form{2, true}, Form{2, false}, Form{1, true}, Form{1, false}}) {
    if ((form.stages == 2 && streamed) || (form.staged && !map) || bytes(form.stages, form.staged) > limit) continue;
    args.stages = form.stages;
    args.map_staged = form.staged;
    at.stage_size = used + (form.staged ? map_size : 0);
    return bytes(form.stages, form.staged);
  }
  require(false, std::string(op) + ": heads of this size need " + std::to_string(bytes(1, false) / 1024) +
                     " KB of shared memory per block, more than the device has");
  return 0;
}

Grid weighted_grid(const char* op, const AttentionArgs& args, const PackedOperand& rows) {
  return {grid_x(op, args.batch_heads), grid_yz(op, rows.rows / kRowTile), grid_yz(op, args.chunks)};
}

AttentionRows attention_rows(const TensorView& view) {
  return {view.data, view.stride[0], view.stride[1], view.stride[2]};
}

void launch_statistics(const char* op, const AttentionArgs& plan, DType dtype, const AttentionValues& values,
                       void* stream) {
  AttentionRowArgs row_args{plan, {}, {}};
  AttentionArgs& args = row_args.attention;
  if (args.grad_map) {
    // 64 KB per stage of float32 heads of 64 channels, and 20 KB of sums and log-sum-exps.
    const auto attention_delta =
        attention_kernel(dtype, attention_delta_f32, attention_delta_f16, attention_delta_bf16);
    const size_t sums = sizeof(float) * kDeltaHeads * (kDeltaKeys / kWarpTile + 1) * kRowTile;
    const size_t shared = attention_fit_stages(op, args, dtype, 0, kRowTile + kDeltaKeys, sums);
    const Grid grid{grid_x(op, int64_t{args.q.rows / kRowTile} * (args.batch_heads / args.heads)),
                    grid_yz(op, args.map_parts), grid_yz(op, ceil_div(args.heads, kDeltaHeads))};
    VIDOPS_LAUNCH(op, attention_delta, grid, kDeltaThreads, shared, stream, args);
  } else {
    args.map_parts = 0;
  }
  if (values.out.present()) {
    row_args.grad_out = attention_rows(values.grad_out);
    row_args.out = attention_rows(values.out);
  }
  const auto attention_statistics =
      attention_kernel(dtype, attention_statistics_f32, attention_statistics_f16, attention_statistics_bf16);
  const int64_t rows = int64_t{args.batch_heads} * args.q.rows;
  VIDOPS_LAUNCH(op, attention_statistics, Grid{grid_x(op, ceil_div(rows, kStatisticsThreads / kWarp))},
                kStatisticsThreads, 0, stream, row_args);
}

}  // namespace

void attention_launch_gradients(const char* op, AttentionArgs args, DType dtype, const AttentionValues& values,
                                const AttentionGradients& out, void* stream) {
  args.grad_q = out.q;
  args.grad_k = out.k;
  args.grad_v = out.v;
  if (args.n > 0) {
    launch_statistics(op, args, dtype, values, stream);
    const auto attention_dq = attention_kernel(dtype, attention_dq_f32, attention_dq_f16, attention_dq_bf16);
    const size_t shared = weighted_shared(op, args, dtype, WeightedSum::queries);
    VIDOPS_LAUNCH(op, attention_dq, weighted_grid(op, args, args.q), kAttentionThreads, shared, stream, args);
  }
  const auto attention_dkv = attention_kernel(dtype, attention_dkv_f32, attention_dkv_f16, attention_dkv_bf16);
  const size_t shared = weighted_shared(op, args, dtype, WeightedSum::keys);
  VIDOPS_LAUNCH(op, attention_dkv, weighted_grid(op, args, args.k), kAttentionThreads, shared, stream, args);
}

}  // namespace cuda

namespace {

constexpr const char* kOp = "video_attention";

cuda::AttentionNeeds needs(bool f32, bool backward) { return {f32, true, backward}; }

}  // namespace

int64_t video_attention_workspace_cuda(int64_t batch, int64_t heads, int64_t n, int64_t d, int64_t m, bool f32,
                                       bool backward) {
  cuda::Arena arena;
  cuda::attention_plan(kOp, arena, {batch, heads, n, m, d}, needs(f32, backward));
  return arena.words();
}

void video_attention_forward_cuda(const VideoAttentionParams& params, int device, void* stream) {
  using namespace cuda;
  const DeviceGuard guard(kOp, device);
  const DType dtype = params.q.dtype;
  const AttentionSizes sizes = attention_sizes(params.q, params.k);
  attention_check(kOp, params.q, params.q, sizes.n, "q");
  attention_check(kOp, params.q, params.k, sizes.m, "k");
  attention_check(kOp, params.q, params.v, sizes.m, "v");
  attention_check(kOp, params.q, params.out, sizes.n, "out");
  require_dtype(kOp, "lse", params.lse, DType::f32);
  if (sizes.batch * sizes.n == 0) return;

  const bool f32 = dtype == DType::f32;
  Arena arena(kOp, params.workspace,
              video_attention_workspace_cuda(sizes.batch, sizes.heads, sizes.n, sizes.d, sizes.m, f32, false));
  AttentionArgs args = attention_plan(kOp, arena, sizes, needs(f32, false));
  attention_set_scale(args, params.scale);
  attention_set_dropout(kOp, args, params.dropout_p, params.seed);
  args.lse = params.lse.as<float>();
  args.out = params.out.data;

  const AttentionInput inputs[] = {{params.q, args.q, true}, {params.k, args.k, true}, {params.v, args.v, false}};
  attention_launch_pack(kOp, args, inputs, 3, stream);
  attention_launch_lse(kOp, args, dtype, stream);
  const auto attention_out = attention_kernel(dtype, attention_out_f32, attention_out_f16, attention_out_bf16);
  const size_t shared = weighted_shared(kOp, args, dtype, WeightedSum::output);
  VIDOPS_LAUNCH(kOp, attention_out, weighted_grid(kOp, args, args.q), kAttentionThreads, shared, stream, args);
  if (!params.map.present()) return;
  require_dtype(kOp, "map", params.map, DType::f32);
  args.p = params.map.as<float>();
  attention_launch_map(kOp, args, dtype, stream);
}

void video_attention_backward_cuda(const VideoAttentionBackwardParams& params, int device, void* stream) {
  using namespace cuda;
  const DeviceGuard guard(kOp, device);
  const DType dtype = params.q.dtype;
  const AttentionSizes sizes = attention_sizes(params.q, params.k);
  attention_check(kOp, params.q, params.q, sizes.n, "q");
  attention_check(kOp, params.q, params.k, sizes.m, "k");
  attention_check(kOp, params.q, params.v, sizes.m, "v");
  attention_check(kOp, params.q, params.out, sizes.n, "out");
  attention_check(kOp, params.q, params.grad_out, sizes.n, "grad_out");
  attention_check(kOp, params.q, params.grad_q, sizes.n, "grad_q");
  attention_check(kOp, params.q, params.grad_k, sizes.m, "grad_k");
  attention_check(kOp, params.q, params.grad_v, sizes.m, "grad_v");
  require_dtype(kOp, "lse", params.lse, DType::f32);
  if (sizes.batch == 0) return;

  const bool f32 = dtype == DType::f32;
  Arena arena(kOp, params.workspace,
              video_attention_workspace_cuda(sizes.batch, sizes.heads, sizes.n, sizes.d, sizes.m, f32, true));
  AttentionArgs args = attention_plan(kOp, arena, sizes, needs(f32, true));
  attention_set_scale(args, params.scale);
  attention_set_dropout(kOp, args, params.dropout_p, params.seed);
  attention_set_row_inputs(kOp, args, params.lse, params.grad_map);

  const AttentionInput inputs[] = {{params.q, args.q, true},
                                   {params.k, args.k, true},
                                   {params.v, args.v, false},
                                   {params.grad_out, args.g, false}};
  attention_launch_pack(kOp, args, inputs, 4, stream);
  attention_launch_gradients(kOp, args, dtype, {params.grad_out, params.out},
                             {params.grad_q.data, params.grad_k.data, params.grad_v.data}, stream);
}

}  // namespace vidops
