#include "attention_launch.cuh"
#include "video_attention.cu"
#include "vidops/video_attention.h"

namespace vidops {
namespace cuda {
namespace {

// Chooses the stages and returns the shared memory. float32 heads of 48 channels: 72 KB for out and dv, 96 KB for the
// gradients of q and k; of 64 channels: 96 and 128 KB; wider ones, streamed without a second stage: 64 and 112 KB.
// Half of it for the 16-bit types.
size_t weighted_shared(const char* op, AttentionArgs& args, DType dtype, WeightedSum sum) {
  const bool output = sum == WeightedSum::output, with_values = !output && args.v.data != nullptr;
  const bool own_z = output || (sum == WeightedSum::gradient && args.chunks > 1);
  return attention_fit_stages(op, args, dtype, (with_values ? 2 : 1) * kRowTile,
                              kColumnTile * (1 + (with_values ? 1 : 0) + (own_z ? 1 : 0)));
}

Grid weighted_grid(const char* op, const AttentionArgs& args, const PackedOperand& rows, bool by_chunk) {
  return {grid_x(op, int64_t{rows.rows / kRowTile} * args.batch_heads), grid_yz(op, by_chunk ? args.chunks : 1)};
}

}  // namespace

void attention_launch_gradients(const char* op, AttentionArgs args, DType dtype, const AttentionGradients& out,
                                void* stream) {
  const auto attention_dk = attention_kernel(dtype, attention_dk_f32, attention_dk_f16, attention_dk_bf16);
  const auto attention_dv = attention_kernel(dtype, attention_dv_f32, attention_dv_f16, attention_dv_bf16);
  if (args.n > 0) {
    const auto attention_delta =
        attention_kernel(dtype, attention_delta_f32, attention_delta_f16, attention_delta_bf16);
    size_t shared = weighted_shared(op, args, dtype, WeightedSum::statistics);
    VIDOPS_LAUNCH(op, attention_delta, weighted_grid(op, args, args.q, false), kAttentionThreads, shared, stream,
                  args);
    const auto attention_dq = attention_kernel(dtype, attention_dq_f32, attention_dq_f16, attention_dq_bf16);
    args.out = out.q;
    shared = weighted_shared(op, args, dtype, WeightedSum::gradient);
    VIDOPS_LAUNCH(op, attention_dq, weighted_grid(op, args, args.q, true), kAttentionThreads, shared, stream, args);
  }
  args.out = out.k;
  size_t shared = weighted_shared(op, args, dtype, WeightedSum::gradient);
  VIDOPS_LAUNCH(op, attention_dk, weighted_grid(op, args, args.k, true), kAttentionThreads, shared, stream, args);
  if (!out.v) return;
  args.out = out.v;
  shared = weighted_shared(op, args, dtype, WeightedSum::output);
  VIDOPS_LAUNCH(op, attention_dv, weighted_grid(op, args, args.k, true), kAttentionThreads, shared, stream, args);
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
  VIDOPS_LAUNCH(kOp, attention_out, weighted_grid(kOp, args, args.q, true), kAttentionThreads, shared, stream, args);
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
  attention_launch_gradients(kOp, args, dtype, {params.grad_q.data, params.grad_k.data, params.grad_v.data}, stream);
}

}  // namespace vidops
