#include <algorithm>
#include <initializer_list>

#include "launch.cuh"
#include "slot_iterations.cu"
#include "vidops/slot_iterations_cuda.h"

namespace vidops {
namespace {

constexpr const char* kOp = "slot_iterations";
constexpr int64_t kMostSlots = 32;
constexpr int64_t kMostWidth = 128;   // of inputs and of slots
constexpr int64_t kMostHidden = 512;  // of queries, values and the MLP
constexpr int64_t kMostTiles = 1024;  // of a block: beyond it other blocks idle for long
constexpr int64_t kMostSlabs = 4;     // sums of warps that are added at a time

using cuda::ceil_div;
using cuda::round_up;

// How tokens and shared memory are divided, in `args`; without pointers.
struct IterationsPlan {
  cuda::SlotIterationsArgs args{};
  int strips = 0, warps = 0;
  bool fits = false;

  IterationsPlan(const SlotIterationsCudaSizes& sizes, int64_t shared_limit, int64_t cluster_limit,
                 int64_t multiprocessors);

  bool streams() const { return args.pinned < ceil_div(args.share_tiles, warps); }
  int64_t statistics() const { return streams() ? int64_t{args.items} * args.tiles * cuda::kStatisticsFloats : 0; }

 private:
  void set_cluster(const SlotIterationsCudaSizes& sizes, int64_t limit, int64_t multiprocessors);
  bool lay_out(const SlotIterationsCudaSizes& sizes, int64_t shared_limit);
};

// As many blocks per item as run at once, but none without a tile for each of its warps.
void IterationsPlan::set_cluster(const SlotIterationsCudaSizes& sizes, int64_t limit, int64_t multiprocessors) {
  int64_t cluster = 1;
  while (cluster * 2 <= limit && sizes.batch * cluster * 2 <= multiprocessors && args.tiles >= cluster * 2 * warps)
    cluster *= 2;
  args.cluster = static_cast<int>(sizes.cluster > 0 ? std::min(sizes.cluster, limit) : cluster);
  args.share_tiles = static_cast<int>(ceil_div(args.tiles, args.cluster));
}

// Offsets into shared memory, with what remains for tiles that stay.
bool IterationsPlan::lay_out(const SlotIterationsCudaSizes& sizes, int64_t shared_limit) {
  using namespace cuda;
  int64_t used = 0;
  const auto take = [&](int64_t count) {
    const int64_t at = used;
    used += round_up(count * static_cast<int64_t>(sizeof(float)), 16);
    return to_int(kOp, at);
  };
  SlotIterationsLayout& at = args.at;
  const int64_t padded = strips * 8, slab = padded * args.row_pitch;
  at.slots = take(padded * sizes.d);
  at.high = take(slab);
  at.low = take(slab);
  at.constants = take(padded);
  at.open = take(padded);
  at.dens = take(warps * padded);
  at.partial = take(2 * sizes.slots * (args.row_pitch + 1));
  at.weights = take(warps * kIterateTokens * (padded + 4));
  args.slabs = static_cast<int>(std::min<int64_t>(warps, kMostSlabs));
  at.slabs = to_int(kOp, used);
  const int64_t gates = sizes.gru ? 3 * sizes.d : 0;
  at.normed = take(kIterateRows * args.normed_pitch);
  at.hidden = take(kIterateRows * args.hidden_pitch);
  at.of_update = take(kIterateRows * gates);
  at.of_slots = take(kIterateRows * gates);
  used = std::max(used, at.slabs + args.slabs * slab * static_cast<int64_t>(sizeof(float)));
  at.ring = to_int(kOp, used);

  const int64_t each = warps * args.tile_bytes, own = ceil_div(args.share_tiles, warps);
  const int64_t room = (shared_limit - used) / each;
  if (room < std::min<int64_t>(own, kIterateStages)) return false;
  args.pinned = static_cast<int>(room >= own ? own : room - kIterateStages);
  args.warp_tiles = static_cast<int>(std::min(room, own));
  at.bytes = to_int(kOp, used + args.warp_tiles * each);
  return true;
}

IterationsPlan::IterationsPlan(const SlotIterationsCudaSizes& sizes, int64_t shared_limit, int64_t cluster_limit,
                               int64_t multiprocessors) {
  using namespace cuda;
  const int64_t most_hidden = std::max({sizes.hq, sizes.hv, sizes.hidden});
  if (sizes.slots > kMostSlots || std::max({sizes.din, sizes.d, sizes.du}) > kMostWidth || most_hidden > kMostHidden)
    return;
  args.items = to_int(kOp, sizes.batch), args.n = to_int(kOp, sizes.n);
  args.slots = static_cast<int>(sizes.slots), args.width = static_cast<int>(sizes.d);
  args.channels = static_cast<int>(sizes.din);
  args.units = static_cast<int>(ceil_div(sizes.din, 32));
  args.row_pitch = args.units * 32 + 4;  // an odd multiple of four floats, as `pitch` is of 16 bytes
  args.row_bytes = static_cast<int>(sizes.din * sizes.width);
  while (16 << args.piece_shift < args.row_bytes) ++args.piece_shift;
  args.pitch = static_cast<int>(args.units * 32 * sizes.width + 16);
  args.tile_bytes = kIterateTokens * args.pitch + kStatisticsFloats * static_cast<int>(sizeof(float));
  args.tiles = to_int(kOp, ceil_div(sizes.n, kIterateTokens));
  // An odd multiple of four floats, too: rows of the slot side lie in different banks.
  args.normed_pitch = static_cast<int>(round_up(std::max({sizes.din, sizes.d, sizes.du}), 8) + 4);
  args.hidden_pitch = static_cast<int>(round_up(most_hidden, 8) + 4);
  strips = sizes.slots <= 8 ? 1 : sizes.slots <= 16 ? 2 : 4;
  const bool wide = strips == 4 || (strips == 2 && sizes.width == sizeof(float));
  const int most_warps = (wide ? kIterateWideThreads : kIterateThreads) / kWarp;
  warps = most_warps;
  set_cluster(sizes, cluster_limit, multiprocessors);
  if (args.share_tiles > kMostTiles) return;
  // With fewer warps there is room for more tokens: a few are given up where all then stay.
  for (; warps * 3 >= most_warps * 2; --warps)
    if (lay_out(sizes, shared_limit) && !streams()) {
      fits = true;
      return;
    }
  for (warps = most_warps; warps > 0; --warps)
    if (lay_out(sizes, shared_limit)) {
      fits = true;
      return;
    }
}

IterationsPlan plan_on_device(const SlotIterationsCudaSizes& sizes) {
  return IterationsPlan(sizes, static_cast<int64_t>(cuda::shared_limit(kOp)),
                        cuda::cluster_limit(kOp, cuda::slot_iterations_8_f32), cuda::multiprocessors(kOp));
}

void require_shape(const char* name, const TensorView& view, std::initializer_list<int64_t> shape) {
  bool right = view.dtype == DType::f32 && view.rank == static_cast<int>(shape.size()) && view.contiguous();
  int axis = 0;
  for (const int64_t extent : shape) right = right && view.shape[axis++] == extent;
  require(right, std::string(kOp) + ": " + name + " has an unexpected dtype, shape or layout");
}

const float* optional(const char* name, const TensorView& view, std::initializer_list<int64_t> shape) {
  if (!view.present()) return nullptr;
  require_shape(name, view, shape);
  return view.as<const float>();
}

SlotIterationsCudaSizes sizes_of(const SlotIterationsCudaParams& p) {
  require(p.inputs.dtype == DType::f32 || p.inputs.dtype == DType::f16 || p.inputs.dtype == DType::bf16,
          std::string(kOp) + ": inputs must be float32, float16 or bfloat16 on CUDA");
  require(p.inputs.rank == 3 && p.slots.rank == 3 && p.inputs.shape[0] == p.slots.shape[0],
          std::string(kOp) + ": shapes of inputs and slots do not agree");
  require(p.q_weight.rank == 2 && p.v_weight.rank == 2, std::string(kOp) + ": q_weight and v_weight are matrices");
  const auto rows = [](const TensorView& v) { return v.present() ? v.shape[0] : 0; };
  SlotIterationsCudaSizes s{};
  s.batch = p.inputs.shape[0], s.n = p.inputs.shape[1], s.din = p.inputs.shape[2];
  s.slots = p.slots.shape[1], s.d = p.slots.shape[2];
  s.hq = p.q_weight.shape[0], s.hv = p.v_weight.shape[0];
  s.du = rows(p.merge_weight), s.hidden = rows(p.mlp_weight1);
  s.width = p.inputs.dtype == DType::f32 ? 4 : 2;
  s.gru = p.gru_weight_ih.present();
  s.cluster = p.cluster;
  require(s.n > 0 && s.din > 0 && s.slots > 0 && s.d > 0 && p.iters > 0,
          std::string(kOp) + ": needs tokens, slots, channels and iterations");
  return s;
}

cuda::SlotNorm norm(const char* name, const TensorView& weight, const TensorView& bias, int64_t width) {
  return {optional(name, weight, {width}), optional(name, bias, {width})};
}

cuda::SlotLinear linear(const char* name, const TensorView& weight, const TensorView& bias, int64_t out, int64_t in) {
  const float* data = optional(name, weight, {out, in});
  return {data, optional(name, bias, {out}), static_cast<int>(in), static_cast<int>(out)};
}

void set_weights(cuda::SlotIterationsArgs& args, const SlotIterationsCudaParams& p, const SlotIterationsCudaSizes& s) {
  const int64_t update = s.du > 0 ? s.du : s.hv;
  args.norm_input = norm("norm_input", p.norm_input_weight, p.norm_input_bias, s.din);
  args.norm_slots = norm("norm_slots", p.norm_slots_weight, p.norm_slots_bias, s.d);
  args.norm_mlp = norm("norm_mlp", p.norm_mlp_weight, p.norm_mlp_bias, s.d);
  args.query = linear("q", p.q_weight, p.q_bias, s.hq, s.d);
  args.key = linear("k_weight", p.k_weight, TensorView{}, s.din, s.hq);
  args.value = linear("v_weight", p.v_weight, TensorView{}, s.hv, s.din);
  args.key_bias = optional("k_bias", p.k_bias, {s.hq});
  args.value_bias = optional("v_bias", p.v_bias, {s.hv});
  args.merge = linear("merge", p.merge_weight, p.merge_bias, s.du, s.hv);
  args.gru_update = linear("gru_ih", p.gru_weight_ih, p.gru_bias_ih, 3 * s.d, update);
  args.gru_slots = linear("gru_hh", p.gru_weight_hh, p.gru_bias_hh, 3 * s.d, s.d);
  args.mlp_in = linear("mlp1", p.mlp_weight1, p.mlp_bias1, s.hidden, s.d);
  args.mlp_out = linear("mlp2", p.mlp_weight2, p.mlp_bias2, s.d, s.hidden);
  const bool complete = args.query.weight && args.key.weight && args.value.weight &&
                        !args.gru_update.weight == !args.gru_slots.weight &&
                        !args.mlp_in.weight == !args.mlp_out.weight && (s.gru || update == s.d);
  require(complete, std::string(kOp) + ": weights are missing, or the update is not as wide as a slot");
}

void set_tensors(cuda::SlotIterationsArgs& args, const SlotIterationsCudaParams& p, const SlotIterationsCudaSizes& s) {
  const int64_t states = p.states.rank == 4 ? p.states.shape[0] : 0;
  require(states > 0 && states <= p.iters, std::string(kOp) + ": states has one entry for each iteration kept");
  require_shape("slots", p.slots, {s.batch, s.slots, s.d});
  require_shape("out", p.out, {s.batch, s.slots, s.d});
  require_shape("states", p.states, {states, s.batch, s.slots, s.d});
  args.inputs = p.inputs.data;
  args.batch = s.batch > 1 ? p.inputs.stride[0] : 0, args.row = s.n > 1 ? p.inputs.stride[1] : 0;
  args.whole = reinterpret_cast<uintptr_t>(p.inputs.data) % 16 == 0 && args.row_bytes % 16 == 0 &&
               args.batch * s.width % 16 == 0 && args.row * s.width % 16 == 0;
  args.start = p.slots.as<const float>();
  args.out = p.out.as<float>(), args.states = p.states.as<float>();
  args.iters = cuda::to_int(kOp, p.iters), args.first_state = cuda::to_int(kOp, p.iters - states);
  args.token_mask = optional("token_mask", p.token_mask, {s.batch, s.n});
  args.slot_mask = optional("slot_mask", p.slot_mask, {s.batch, s.slots});
  args.dots = const_cast<float*>(optional("dots", p.dots, {s.batch, s.slots, s.n}));
  args.attn = const_cast<float*>(optional("attn", p.attn, {s.batch, s.slots, s.n}));
  args.scale = static_cast<float>(p.scale), args.eps = static_cast<float>(p.eps);
  args.denominator = static_cast<float>(p.denominator), args.ln_eps = static_cast<float>(p.ln_eps);
  args.gelu = p.gelu;
}

auto kernel_for(int strips, DType dtype) {
  using namespace cuda;
  const auto of = [&](auto f32, auto f16, auto bf16) {
    return dtype == DType::f32 ? f32 : dtype == DType::f16 ? f16 : bf16;
  };
  return strips == 1   ? of(slot_iterations_8_f32, slot_iterations_8_f16, slot_iterations_8_bf16)
         : strips == 2 ? of(slot_iterations_16_f32, slot_iterations_16_f16, slot_iterations_16_bf16)
                       : of(slot_iterations_32_f32, slot_iterations_32_f16, slot_iterations_32_bf16);
}

}  // namespace

int64_t slot_iterations_workspace_cuda(const SlotIterationsCudaSizes& sizes, int device) {
  const cuda::DeviceGuard guard(kOp, device);
  const IterationsPlan plan = plan_on_device(sizes);
  if (!plan.fits) return -1;
  cuda::Arena arena;
  arena.take<float>(plan.statistics());
  return arena.words();
}

void slot_iterations_forward_cuda(const SlotIterationsCudaParams& params, int device, void* stream) {
  using namespace cuda;
  const DeviceGuard guard(kOp, device);
  const SlotIterationsCudaSizes sizes = sizes_of(params);
  const IterationsPlan plan = plan_on_device(sizes);
  require(plan.fits, std::string(kOp) + ": such a call does not fit one launch on this device");
  SlotIterationsArgs args = plan.args;
  set_weights(args, params, sizes);
  set_tensors(args, params, sizes);
  if (sizes.batch == 0) return;
  if (plan.streams()) {
    Arena arena(kOp, params.workspace, ceil_div(plan.statistics() * static_cast<int64_t>(sizeof(float)), 8));
    args.statistics = arena.take<float>(plan.statistics());
  }
  VIDOPS_LAUNCH_CLUSTERS(kOp, kernel_for(plan.strips, params.inputs.dtype),
                         Grid{grid_x(kOp, sizes.batch * args.cluster)}, args.cluster, plan.warps * kWarp,
                         args.at.bytes, stream, args);
}

}  // namespace vidops
