#include <algorithm>
#include <initializer_list>

#include "launch.cuh"
#include "slot_attend.cu"
#include "vidops/slot_attend_cuda.h"

namespace vidops {
namespace {

constexpr const char* kOp = "slot_attend";
constexpr const char* kStatisticsOp = "token_statistics";
constexpr int64_t kBlocks = 264;             // two for every multiprocessor of a large card
constexpr int64_t kTileBytes = 36 << 10;     // of a stage, where one row is not already more
constexpr int64_t kMostTile = 128;           // tokens
constexpr int64_t kMostRows = 64;            // of a block
constexpr int64_t kUsualThreads = 192;       // two blocks of them per multiprocessor leave 168 registers to each
constexpr int64_t kMostSlices = 8;
constexpr int64_t kMultiprocessorShared = 228 << 10;  // as on Hopper, of which each block takes kReserved more
constexpr int64_t kReserved = 1 << 10;
constexpr int64_t kLeastTiles = 2;           // of a split

using cuda::aligned;
using cuda::ceil_div;
using cuda::round_up;

// How rows, tokens and threads are divided, in `args`; without pointers, so the size of the scratch follows from it.
struct SlotPlan {
  cuda::SlotAttendArgs args{};
  int64_t batch = 0, chunks = 0;  // of an item, all units
  int threads = 0;
  int64_t out_channels = 0;

  SlotPlan(const SlotAttendCudaSizes& sizes, bool backward, int64_t shared_limit);

 private:
  void set_operand(cuda::SlotOperand& o, int64_t channels, bool own) const;
  bool divide(const SlotAttendCudaSizes& sizes, bool backward, int64_t most_rows, int64_t shared_limit);
  void divide_threads(bool backward, int64_t tasks, int64_t usual);
  void lay_out(bool backward, int64_t tasks);

  int64_t width_ = 0;
  bool shared_ = false;
};

void SlotPlan::set_operand(cuda::SlotOperand& o, int64_t channels, bool own) const {
  o.channels = cuda::to_int(kOp, channels);
  o.quads = static_cast<int>(ceil_div(channels, 4));
  o.pairs = static_cast<int>(ceil_div(o.quads, 2));
  const int64_t padded = round_up(o.quads, 8);  // what tensor cores multiply
  o.row_pitch = static_cast<int>(padded | 1) * 4;
  o.row_bytes = static_cast<int>(channels * width_);
  o.pitch = static_cast<int>(padded * 4 * width_ / 16 | 1) * 16;
  o.own = own;
}

// Offsets into shared memory.
void SlotPlan::lay_out(bool backward, int64_t tasks) {
  int64_t used = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t at = used;
    used += round_up(bytes, 16);
    return cuda::to_int(kOp, at);
  };
  const auto take_floats = [&](int64_t count) { return take(count * static_cast<int64_t>(sizeof(float))); };
  cuda::SlotLayout& at = args.at;
  const int64_t rows = args.row_groups * cuda::kSlotRows, tile = args.tile;
  at.place = take(sizeof(cuda::SlotPlace));
  at.infinite = take(sizeof(cuda::u32));
  at.q = take_floats(rows * args.keys.row_pitch);
  at.g = take_floats(backward ? rows * args.values.row_pitch : 0);
  at.constants = take_floats(3 * rows);
  at.planes = take_floats(args.key_slices * rows * (tile + 4));
  at.planes_g = take_floats(backward ? args.key_slices * rows * (tile + 4) : 0);
  at.weights = take_floats(tile * (rows + 4));
  at.weights_g = take_floats(backward ? tile * (rows + 4) : 0);
  at.statistics = take_floats(4 * tile);
  at.sums = take_floats(rows * (tile + 4));
  at.values = cuda::to_int(kOp, shared_ ? 0 : tile * args.keys.pitch);
  at.stage_bytes = cuda::to_int(kOp, at.values + tile * args.values.pitch);
  // At the end of a block, sums of half of its threads.
  const int64_t unit_floats = args.unit_parts / 2 * args.teams * cuda::kWarp * int64_t{cuda::kSlotUnits * 16};
  const int64_t sums = std::max(args.parts / 2 * tasks * static_cast<int64_t>(sizeof(cuda::SlotSums)),
                                unit_floats * static_cast<int64_t>(sizeof(float)));
  at.stage = take(std::max<int64_t>(int64_t{args.stages} * at.stage_bytes, sums));
  at.bytes = cuda::to_int(kOp, used);
}

// Divides a tile's products among about `usual` threads.
void SlotPlan::divide_threads(bool backward, int64_t tasks, int64_t usual) {
  using namespace cuda;
  const SlotOperand& out = backward ? args.keys : args.values;
  // The fewest threads that give the fewest tokens to each.
  const int64_t most_parts = std::clamp<int64_t>(usual / tasks, 1, args.tile / 4);
  args.parts = static_cast<int>(ceil_div(args.tile, ceil_div(args.tile, most_parts)));
  const int64_t strips = ceil_div(args.row_groups, 2), units = strips * ceil_div(out.quads, 8);
  const int64_t warps = std::max(ceil_div(std::max<int64_t>(tasks * args.parts, args.tile), kWarp),
                                 ceil_div(units, kSlotUnits));
  threads = static_cast<int>(warps * kWarp);

  // Tensor cores: a warp's units of the output against its share of the tokens.
  const int64_t steps = args.tile / 8;
  int64_t least = 0;
  args.teams = 0;
  for (int64_t each = 1; each <= kSlotUnits; each *= 2) {
    const int64_t teams = ceil_div(units, each), parts = std::min(warps / teams, steps);
    if (parts == 0) continue;
    const int64_t cost = each * ceil_div(steps, parts);
    if (args.teams > 0 && cost >= least) continue;
    least = cost;
    args.units = static_cast<int>(each), args.teams = static_cast<int>(teams);
    args.unit_parts = static_cast<int>(parts);
  }

  const int64_t pieces = strips * (args.tile / kSlotTile);
  const int64_t quads = std::max(args.keys.quads, backward ? args.values.quads : 0);
  args.key_slices = 1;
  for (int64_t k = 2; k <= std::min(kMostSlices, ceil_div(quads, kSlotSlices)); ++k) {
    const int64_t rounds = ceil_div(pieces * k, warps), best = ceil_div(pieces * args.key_slices, warps);
    if (rounds * args.key_slices < best * k) args.key_slices = static_cast<int>(k);
  }
}

bool SlotPlan::divide(const SlotAttendCudaSizes& sizes, bool backward, int64_t most_rows, int64_t shared_limit) {
  using namespace cuda;
  const int64_t set = args.set_rows;
  const int64_t alike = args.keys.own || args.values.own ? sizes.slots : args.rows;  // rows that see the same keys
  const bool whole_sets = set <= most_rows && set <= alike;
  args.mode = whole_sets ? SlotMode::all : SlotMode::given;
  args.unit_rows = static_cast<int>(whole_sets ? alike : std::min(alike, set));
  const int64_t fit = whole_sets ? std::max<int64_t>(most_rows / set * set, 1) : most_rows;
  const int64_t even = ceil_div(args.unit_rows, ceil_div(args.unit_rows, fit));
  args.chunk_rows = static_cast<int>(whole_sets ? round_up(even, set) : even);
  args.chunks = static_cast<int>(ceil_div(args.unit_rows, args.chunk_rows));
  args.row_groups = static_cast<int>(ceil_div(args.chunk_rows, kSlotRows));
  chunks = args.rows / args.unit_rows * args.chunks;

  const SlotOperand& out = backward ? args.keys : args.values;
  const int64_t tasks = int64_t{args.row_groups} * out.pairs;
  const int64_t units = ceil_div(args.row_groups, 2) * ceil_div(out.quads, 8);
  if (tasks > kSlotThreads || units > kSlotUnits * kSlotThreads / kWarp) return false;
  const int64_t token_bytes = args.keys.pitch + (shared_ ? 0 : args.values.pitch);
  const int64_t tile = std::clamp<int64_t>(kTileBytes / token_bytes / kSlotTile * kSlotTile, kSlotTile, kMostTile);
  args.tile = static_cast<int>(std::min(tile, round_up(sizes.n, kSlotTile)));
  divide_threads(backward, tasks, kUsualThreads);
  const int64_t pairs = (whole_sets ? args.chunk_rows / set : 1) * args.tile;
  args.weigh_parts = 1;
  while (args.weigh_parts < kWarp && args.weigh_parts * 2 <= set && pairs * args.weigh_parts * 2 <= threads)
    args.weigh_parts *= 2;

  // Two blocks per multiprocessor, or else one of twice the threads.
  args.stages = 2;
  lay_out(backward, tasks);
  if (2 * (args.at.bytes + kReserved) > kMultiprocessorShared) divide_threads(backward, tasks, 2 * kUsualThreads);
  for (; args.stages > 0; --args.stages) {
    lay_out(backward, tasks);
    if (args.at.bytes <= shared_limit) return true;
  }
  return false;
}

SlotPlan::SlotPlan(const SlotAttendCudaSizes& sizes, bool backward, int64_t shared_limit)
    : batch(sizes.batch), width_(sizes.width), shared_(sizes.shared) {
  using namespace cuda;
  require(sizes.groups > 0 && sizes.slots % sizes.groups == 0, std::string(kOp) + ": groups must divide the slots");
  require(!sizes.joint || sizes.groups == 1, std::string(kOp) + ": joint heads take one group");
  args.rows = to_int(kOp, sizes.heads * sizes.slots);
  args.slots = to_int(kOp, sizes.slots), args.n = to_int(kOp, sizes.n), args.groups = to_int(kOp, sizes.groups);
  args.set_rows = to_int(kOp, sizes.joint ? args.rows : sizes.slots / sizes.groups);
  set_operand(args.keys, sizes.dk, sizes.key_heads > 1);
  set_operand(args.values, sizes.dv, sizes.value_heads > 1);
  out_channels = backward ? sizes.dk : sizes.dv;

  int64_t most_rows = std::min(kMostRows, round_up(args.rows, kSlotRows));
  while (most_rows > 0 && !divide(sizes, backward, most_rows, shared_limit)) most_rows -= kSlotRows;
  require(most_rows > 0, std::string(kOp) + ": so many channels do not fit the shared memory of this device");

  // Blocks of one launch that write gradients of the same tokens would race: then there is a launch per chunk.
  const bool apart = args.keys.own && args.values.own && args.unit_rows == args.slots && args.chunks == 1;
  args.launch_chunks = static_cast<int>(backward && !apart ? 1 : chunks);
  const int64_t tiles = ceil_div(sizes.n, args.tile), blocks = batch * args.launch_chunks;
  const int64_t wanted = std::clamp<int64_t>(kBlocks / blocks, 1, std::max<int64_t>(tiles / kLeastTiles, 1));
  args.share = to_int(kOp, ceil_div(tiles, wanted) * args.tile);
  args.splits = static_cast<int>(ceil_div(sizes.n, args.share));
}

// Scratch: dots between two launches, then partial sums.
void lay_out_scratch(cuda::Arena& arena, const SlotPlan& plan, bool backward, cuda::SlotAttendArgs& args,
                     cuda::SlotSumArgs& sum) {
  const int64_t rows = plan.batch * args.rows;
  if (args.mode == cuda::SlotMode::given) {
    args.dots = arena.take<float>(rows * args.n);
    if (backward) args.weight_grads = arena.take<float>(rows * args.n);
  }
  sum.splits = args.splits;
  sum.num_count = rows * plan.out_channels, sum.den_count = rows;
  if (args.splits == 1) return;
  args.num = arena.take<float>(args.splits * sum.num_count);
  args.den = arena.take<float>(args.splits * sum.den_count);
}

bool same_tensor(const TensorView& x, const TensorView& y) {
  bool same = x.data == y.data && x.dtype == y.dtype && x.rank == y.rank;
  for (int i = 0; same && i < x.rank; ++i) same = x.shape[i] == y.shape[i] && x.stride[i] == y.stride[i];
  return same;
}

void require_shape(const char* name, const TensorView& view, std::initializer_list<int64_t> shape) {
  bool right = view.dtype == DType::f32 && view.rank == static_cast<int>(shape.size()) && view.contiguous();
  int axis = 0;
  for (const int64_t extent : shape) right = right && view.shape[axis++] == extent;
  require(right, std::string(kOp) + ": " + name + " has an unexpected dtype, shape or layout");
}

void require_storage(const char* op, const char* name, DType dtype) {
  require(dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16,
          std::string(op) + ": " + name + " must be float32, float16 or bfloat16 on CUDA");
}

SlotAttendCudaSizes sizes_of(const SlotAttendCudaInputs& in) {
  require_storage(kOp, "keys", in.keys.dtype);
  cuda::require_dtype(kOp, "values", in.values, in.keys.dtype);
  require(in.keys.rank == 4 && in.values.rank == 4 && in.q.rank == 4,
          std::string(kOp) + ": keys, values and q have four axes");
  SlotAttendCudaSizes s{};
  s.batch = in.q.shape[0], s.heads = in.q.shape[1], s.slots = in.q.shape[2], s.dk = in.q.shape[3];
  s.n = in.keys.shape[2], s.dv = in.values.shape[3];
  s.key_heads = in.keys.shape[1], s.value_heads = in.values.shape[1];
  s.groups = in.groups, s.joint = in.joint;
  s.width = in.keys.dtype == DType::f32 ? 4 : 2;
  s.shared = same_tensor(in.keys, in.values);
  const auto fits = [&](const TensorView& v) {
    return v.shape[0] == s.batch && (v.shape[1] == 1 || v.shape[1] == s.heads) && v.shape[2] == s.n;
  };
  require(fits(in.keys) && fits(in.values) && in.keys.shape[3] == s.dk && s.dk > 0 && s.dv > 0,
          std::string(kOp) + ": shapes of keys, values and q do not agree");
  require_shape("q", in.q, {s.batch, s.heads, s.slots, s.dk});
  require_shape("c", in.c, {s.batch, s.heads, s.slots});
  require(in.mean.present() == in.rstd.present(), std::string(kOp) + ": mean and rstd come together");
  if (in.mean.present()) {
    require_shape("mean", in.mean, {s.batch, s.n});
    require_shape("rstd", in.rstd, {s.batch, s.n});
  }
  if (in.token_mask.present()) require_shape("token_mask", in.token_mask, {s.batch, s.groups, s.n});
  if (in.slot_mask.present()) require_shape("slot_mask", in.slot_mask, {s.batch, s.slots});
  return s;
}

void set_data(cuda::SlotOperand& o, const TensorView& view, int64_t width) {
  const auto stride = [&](int axis) { return view.shape[axis] > 1 ? view.stride[axis] : 0; };
  o.data = view.data;
  o.batch = stride(0), o.head = stride(1), o.row = stride(2);
  o.whole = aligned(view.data) && o.channels * width % 16 == 0 && o.batch * width % 16 == 0 &&
            o.head * width % 16 == 0 && o.row * width % 16 == 0;
}

void set_inputs(cuda::SlotAttendArgs& args, const SlotAttendCudaInputs& in, int64_t width) {
  set_data(args.keys, in.keys, width);
  set_data(args.values, in.values, width);
  const auto optional = [](const TensorView& v) { return v.present() ? v.as<const float>() : nullptr; };
  args.mean = optional(in.mean), args.rstd = optional(in.rstd);
  args.q = in.q.as<const float>(), args.c = in.c.as<const float>();
  args.token_mask = optional(in.token_mask), args.slot_mask = optional(in.slot_mask);
  args.eps = static_cast<float>(in.eps);
  args.rows_whole = args.keys.channels % 4 == 0 && aligned(in.q.data);
}

void launch(const SlotPlan& plan, cuda::SlotAttendArgs args, DType dtype, bool backward, cuda::SlotMode mode,
            bool shared, void* stream) {
  using namespace cuda;
  args.mode = mode;
  // What a launch does not multiply with, it does not read; where values are the keys, one copy serves both.
  const bool keys = mode != SlotMode::given || backward, values = mode != SlotMode::dots || backward;
  args.keys.loaded = keys || shared;
  args.values.loaded = values && !shared;
  if (mode == SlotMode::dots) args.launch_chunks = static_cast<int>(plan.chunks);
  const Grid grid{grid_x(kOp, plan.batch * args.launch_chunks * args.splits)};
  const auto kernel = backward ? dtype == DType::f32   ? slot_attend_backward_f32
                                 : dtype == DType::f16 ? slot_attend_backward_f16
                                                       : slot_attend_backward_bf16
                               : dtype == DType::f32   ? slot_attend_forward_f32
                                 : dtype == DType::f16 ? slot_attend_forward_f16
                                                       : slot_attend_forward_bf16;
  for (args.first_chunk = 0; args.first_chunk < plan.chunks; args.first_chunk += args.launch_chunks) {
    VIDOPS_LAUNCH(kOp, kernel, grid, plan.threads, args.at.bytes, stream, args);
    args.grads_add = true;
  }
}

void run(const SlotPlan& plan, const cuda::SlotAttendArgs& args, cuda::SlotSumArgs sum, DType dtype, bool backward,
         bool shared, void* stream) {
  using namespace cuda;
  if (plan.args.mode == SlotMode::given) launch(plan, args, dtype, backward, SlotMode::dots, shared, stream);
  launch(plan, args, dtype, backward, plan.args.mode, shared, stream);
  if (args.splits == 1) return;
  sum.num = args.num, sum.den = args.den;
  VIDOPS_LAUNCH(kOp, slot_attend_sum, Grid{grid_x(kOp, ceil_div(sum.num_count + sum.den_count, kSumThreads))},
                kSumThreads, 0, stream, sum);
}

// Sends the sums to their outputs, directly or by way of the scratch.
void set_outputs(cuda::SlotAttendArgs& args, cuda::SlotSumArgs& sum, const TensorView& num, const TensorView& den,
                 int64_t channels) {
  sum.num_out = num.as<float>(), sum.den_out = den.as<float>();
  if (args.splits == 1) args.num = sum.num_out, args.den = sum.den_out;
  args.num_split = sum.num_count, args.den_split = sum.den_count;
  args.num_whole = channels % 4 == 0 && aligned(args.num);
}

bool nothing_to_do(const SlotAttendCudaSizes& sizes, const TensorView& num, const TensorView& den, void* stream) {
  const int64_t rows = sizes.batch * sizes.heads * sizes.slots;
  if (rows > 0 && sizes.n > 0) return false;
  if (rows > 0) {
    cuda::zero_async(kOp, num.data, sizeof(float) * num.numel(), stream);
    cuda::zero_async(kOp, den.data, sizeof(float) * den.numel(), stream);
  }
  return true;
}

}  // namespace

int64_t slot_attend_workspace_cuda(const SlotAttendCudaSizes& sizes, bool backward, int device) {
  const cuda::DeviceGuard guard(kOp, device);
  if (sizes.batch * sizes.heads * sizes.slots * sizes.n == 0) return 0;
  SlotPlan plan(sizes, backward, static_cast<int64_t>(cuda::shared_limit(kOp)));
  cuda::Arena arena;
  cuda::SlotSumArgs sum{};
  lay_out_scratch(arena, plan, backward, plan.args, sum);
  return arena.words();
}

void slot_attend_forward_cuda(const SlotAttendCudaParams& params, int device, void* stream) {
  using namespace cuda;
  const DeviceGuard guard(kOp, device);
  const SlotAttendCudaSizes sizes = sizes_of(params.in);
  require_shape("num", params.num, {sizes.batch, sizes.heads, sizes.slots, sizes.dv});
  require_shape("den", params.den, {sizes.batch, sizes.heads, sizes.slots});
  if (nothing_to_do(sizes, params.num, params.den, stream)) return;

  const SlotPlan plan(sizes, false, static_cast<int64_t>(shared_limit(kOp)));
  Arena arena(kOp, params.in.workspace, slot_attend_workspace_cuda(sizes, false, device));
  SlotAttendArgs args = plan.args;
  SlotSumArgs sum{};
  lay_out_scratch(arena, plan, false, args, sum);
  set_inputs(args, params.in, sizes.width);
  set_outputs(args, sum, params.num, params.den, sizes.dv);
  if (params.dots.present()) {
    require_shape("dots", params.dots, {sizes.batch, sizes.heads, sizes.slots, sizes.n});
    args.dots = params.dots.as<float>();
  }
  if (params.attn.present()) {
    require_shape("attn", params.attn, {sizes.batch, sizes.heads, sizes.slots, sizes.n});
    args.attn = params.attn.as<float>();
  }
  run(plan, args, sum, params.in.keys.dtype, false, sizes.shared, stream);
}

void slot_attend_backward_cuda(const SlotAttendCudaBackwardParams& params, int device, void* stream) {
  using namespace cuda;
  const DeviceGuard guard(kOp, device);
  const SlotAttendCudaSizes sizes = sizes_of(params.in);
  require_shape("grad_num", params.grad_num, {sizes.batch, sizes.heads, sizes.slots, sizes.dv});
  require_shape("grad_den", params.grad_den, {sizes.batch, sizes.heads, sizes.slots});
  require_shape("grad_q", params.grad_q, {sizes.batch, sizes.heads, sizes.slots, sizes.dk});
  require_shape("grad_c", params.grad_c, {sizes.batch, sizes.heads, sizes.slots});
  require_shape("grad_keys", params.grad_keys, {sizes.batch, sizes.key_heads, sizes.n, sizes.dk});
  require_shape("grad_values", params.grad_values, {sizes.batch, sizes.value_heads, sizes.n, sizes.dv});
  require((params.grad_keys.data == params.grad_values.data) == sizes.shared || sizes.n == 0,
          std::string(kOp) + ": one buffer for the gradients of keys and values if and only if they are one tensor");
  if (nothing_to_do(sizes, params.grad_q, params.grad_c, stream)) return;

  const SlotPlan plan(sizes, true, static_cast<int64_t>(shared_limit(kOp)));
  Arena arena(kOp, params.in.workspace, slot_attend_workspace_cuda(sizes, true, device));
  SlotAttendArgs args = plan.args;
  SlotSumArgs sum{};
  lay_out_scratch(arena, plan, true, args, sum);
  set_inputs(args, params.in, sizes.width);
  set_outputs(args, sum, params.grad_q, params.grad_c, sizes.dk);
  args.rows_whole = args.rows_whole && sizes.dv % 4 == 0 && aligned(params.grad_num.data);
  args.grad_num = params.grad_num.as<const float>(), args.grad_den = params.grad_den.as<const float>();
  if (params.grad_dots.present()) {
    require_shape("grad_dots", params.grad_dots, {sizes.batch, sizes.heads, sizes.slots, sizes.n});
    args.grad_dots = params.grad_dots.as<const float>();
  }
  if (params.grad_attn.present()) {
    require_shape("grad_attn", params.grad_attn, {sizes.batch, sizes.heads, sizes.slots, sizes.n});
    args.grad_attn = params.grad_attn.as<const float>();
  }
  args.grad_keys = params.grad_keys.as<float>();
  args.grad_values = sizes.shared ? nullptr : params.grad_values.as<float>();
  args.grads_add = params.add;
  args.grads_whole = sizes.dk % 4 == 0 && sizes.dv % 4 == 0 && aligned(params.grad_keys.data) &&
                     aligned(params.grad_values.data);
  run(plan, args, sum, params.in.keys.dtype, true, sizes.shared, stream);
}

void token_statistics_cuda(const TokenStatisticsCudaParams& params, int device, void* stream) {
  using namespace cuda;
  const DeviceGuard guard(kStatisticsOp, device);
  const TensorView& x = params.x;
  require_storage(kStatisticsOp, "x", x.dtype);
  require(x.rank == 3 && x.shape[2] > 0, std::string(kStatisticsOp) + ": x has the axes (B,N,D)");
  require_shape("mean", params.mean, {x.shape[0], x.shape[1]});
  require_shape("rstd", params.rstd, {x.shape[0], x.shape[1]});
  TokenStatisticsArgs args{};
  args.rows = x.shape[0] * x.shape[1];
  if (args.rows == 0) return;
  const int64_t width = x.dtype == DType::f32 ? 4 : 2;
  args.x = x.data;
  args.batch = x.shape[0] > 1 ? x.stride[0] : 0, args.row = x.shape[1] > 1 ? x.stride[1] : 0;
  args.n = to_int(kStatisticsOp, x.shape[1]), args.channels = to_int(kStatisticsOp, x.shape[2]);
  args.whole = args.channels % 4 == 0 && reinterpret_cast<uintptr_t>(x.data) % (4 * width) == 0 &&
               args.batch % 4 == 0 && args.row % 4 == 0;
  args.lanes = lanes_of_row(ceil_div(args.channels, args.whole ? 4 : 1));
  args.eps = static_cast<float>(params.eps);
  args.mean = params.mean.as<float>(), args.rstd = params.rstd.as<float>();
  const auto kernel = x.dtype == DType::f32   ? token_statistics_f32
                      : x.dtype == DType::f16 ? token_statistics_f16
                                              : token_statistics_bf16;
  const Grid grid{grid_x(kStatisticsOp, ceil_div(args.rows, kStatisticsThreads / args.lanes))};
  VIDOPS_LAUNCH(kStatisticsOp, kernel, grid, kStatisticsThreads, 0, stream, args);
}

}  // namespace vidops
