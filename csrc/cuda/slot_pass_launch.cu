#include "slot_pass_launch.cuh"

#include <algorithm>

#include "slot_pass.cu"

namespace vidops {
namespace {

constexpr const char* kOp = "slot_attend";
constexpr int64_t kLeastChannels = 32;  // below it a warp's products are mostly padding
constexpr int64_t kMostRows = 32;       // of a softmax
constexpr int64_t kMostWarps = cuda::kPassThreads / cuda::kWarp;
constexpr int64_t kLeastTiles = 2;  // of a split
// Of a large card.
constexpr int64_t kMultiprocessors = 132;
constexpr int64_t kMultiprocessorShared = 228 << 10, kReserved = 1 << 10;  // bytes, and those that a block takes more
constexpr int64_t kResidentWarps[] = {12, 8};  // of a multiprocessor, by strips: by their registers

using cuda::ceil_div;
using cuda::round_up;

// How channels, tokens and shared memory are divided, in `args`; without pointers.
struct PassPlan {
  cuda::SlotPassArgs args{};
  int strips = 0, bytes = 0;
  bool fits = false;

  PassPlan(const SlotAttendCudaSizes& sizes, bool backward, int64_t shared_limit);

 private:
  void lay_out(bool backward);
};

PassPlan::PassPlan(const SlotAttendCudaSizes& sizes, bool backward, int64_t shared_limit) {
  using namespace cuda;
  const int64_t rows = sizes.slots / std::max<int64_t>(sizes.groups, 1);
  const bool absorbed = sizes.heads == 1 && sizes.key_heads == 1 && sizes.value_heads == 1 && sizes.shared;
  if (!absorbed || sizes.joint || sizes.dk < kLeastChannels || rows < 1 || rows > kMostRows) return;
  strips = rows <= 16 ? 1 : 2;
  const int64_t most_units = strips == 1 ? kPassUnits<1> : kPassUnits<2>, units = ceil_div(sizes.dk, 8);
  int64_t warps = 1;
  while (warps * most_units < units) warps *= 2;
  if (warps > kMostWarps) return;
  args.n = to_int(kOp, sizes.n), args.channels = to_int(kOp, sizes.dk);
  args.slots = to_int(kOp, sizes.slots), args.sets = to_int(kOp, sizes.groups), args.set_rows = static_cast<int>(rows);
  args.launch_sets = backward ? 1 : args.sets;  // sets would race for the gradients of the same tokens
  // Rows of slots take so much shared memory that it may leave room for few blocks: then of more warps.
  for (;; warps *= 2) {
    args.warps = static_cast<int>(warps), args.units = static_cast<int>(ceil_div(units, warps));
    args.pitch = static_cast<int>(warps * args.units * 8 * sizes.width / 16 | 1) * 16;
    lay_out(backward);
    const int64_t room = kMultiprocessorShared / (bytes + kReserved);
    if (warps == kMostWarps || room * warps * 2 > kResidentWarps[strips - 1]) break;
  }
  if (bytes > shared_limit) return;

  const int64_t tiles = ceil_div(sizes.n, kPassTokens), blocks = std::max<int64_t>(sizes.batch * args.launch_sets, 1);
  const int64_t resident = std::min(kResidentWarps[strips - 1] / warps, kMultiprocessorShared / (bytes + kReserved));
  const int64_t wanted = kMultiprocessors * resident / blocks;
  const int64_t splits = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(tiles / kLeastTiles, 1));
  args.share = to_int(kOp, ceil_div(tiles, splits) * kPassTokens);
  args.splits = static_cast<int>(ceil_div(sizes.n, args.share));
  fits = true;
}

void PassPlan::lay_out(bool backward) {
  using namespace cuda;
  int64_t used = 0;
  const auto take = [&](int64_t size) {
    const int64_t at = used;
    used += round_up(size, 16);
    return to_int(kOp, at);
  };
  const int64_t kinds = backward ? 2 : 1, lane_quads = kWarp * static_cast<int64_t>(sizeof(FloatQuad));
  SlotPassLayout& at = args.at;
  at.q = take(strips * args.warps * args.units * lane_quads);
  at.g = take(backward ? strips * args.warps * args.units * lane_quads : 0);
  at.dots = take(kinds * args.warps * strips * 2 * lane_quads);
  at.weights = take(args.warps * kinds * strips * 16 * kPassTurned * static_cast<int64_t>(sizeof(float)));
  at.statistics = take(2 * 2 * kPassTokens * static_cast<int64_t>(sizeof(float)));
  at.infinite = take(sizeof(u32));
  at.stage_bytes = kPassTokens * args.pitch;
  at.stage = take(int64_t{kPassStages} * at.stage_bytes);
  bytes = to_int(kOp, used);
}

auto kernel_for(int strips, bool backward, DType dtype) {
  using namespace cuda;
  const auto of = [&](auto f32, auto f16, auto bf16) {
    return dtype == DType::f32 ? f32 : dtype == DType::f16 ? f16 : bf16;
  };
  if (backward)
    return strips == 1 ? of(slot_pass_grad_16_f32, slot_pass_grad_16_f16, slot_pass_grad_16_bf16)
                       : of(slot_pass_grad_32_f32, slot_pass_grad_32_f16, slot_pass_grad_32_bf16);
  return strips == 1 ? of(slot_pass_16_f32, slot_pass_16_f16, slot_pass_16_bf16)
                     : of(slot_pass_32_f32, slot_pass_32_f16, slot_pass_32_bf16);
}

bool aligned(const void* data, int64_t bytes) { return reinterpret_cast<uintptr_t>(data) % bytes == 0; }

void set_tokens(cuda::SlotPassArgs& args, const TensorView& keys, int64_t width) {
  args.x = keys.data;
  args.batch = keys.shape[0] > 1 ? keys.stride[0] : 0, args.row = keys.shape[2] > 1 ? keys.stride[2] : 0;
  args.whole = aligned(keys.data, 16) && args.channels * width % 16 == 0 && args.batch * width % 16 == 0 &&
               args.row * width % 16 == 0;
}

}  // namespace

int slot_pass_splits(const SlotAttendCudaSizes& sizes, bool backward, int64_t shared_limit) {
  const PassPlan plan(sizes, backward, shared_limit);
  return plan.fits ? plan.args.splits : 0;
}

void slot_pass(const SlotAttendCudaInputs& in, const SlotAttendCudaSizes& sizes, const TensorView& dots,
               const TensorView& attn, const SlotAttendCudaBackwardParams* backward, const SlotPassSums& sums,
               void* stream) {
  using namespace cuda;
  const PassPlan plan(sizes, backward != nullptr, static_cast<int64_t>(shared_limit(kOp)));
  require(plan.fits, std::string(kOp) + ": such a pass does not fit slot_pass");
  SlotPassArgs args = plan.args;
  set_tokens(args, in.keys, sizes.width);
  const auto optional = [](const TensorView& v) { return v.present() ? v.as<float>() : nullptr; };
  args.mean = optional(in.mean), args.rstd = optional(in.rstd);
  args.q = in.q.as<const float>(), args.c = in.c.as<const float>();
  args.token_mask = optional(in.token_mask), args.slot_mask = optional(in.slot_mask);
  args.eps = static_cast<float>(in.eps);
  args.num = sums.num, args.den = sums.den, args.num_split = sums.num_split, args.den_split = sums.den_split;
  args.pairs = args.channels % 2 == 0 && aligned(args.num, 8);
  if (backward) {
    args.grad_num = backward->grad_num.as<const float>(), args.grad_den = backward->grad_den.as<const float>();
    args.grad_dots = optional(dots), args.grad_attn = optional(attn);
    args.grad_tokens = backward->grad_keys.as<float>(), args.grads_add = backward->add;
    args.pairs = args.pairs && aligned(args.grad_tokens, 8);
  } else {
    args.dots = optional(dots), args.attn = optional(attn);
  }
  const auto kernel = kernel_for(plan.strips, backward != nullptr, in.keys.dtype);
  const Grid grid{grid_x(kOp, sizes.batch * args.launch_sets * args.splits)};
  for (args.first_set = 0; args.first_set < args.sets; args.first_set += args.launch_sets) {
    VIDOPS_LAUNCH(kOp, kernel, grid, args.warps * kWarp, plan.bytes, stream, args);
    args.grads_add = true;
  }
}

}  // namespace vidops
