// All iterations of slot attention on CUDA, one kernel after the other.
#include <algorithm>
#include <initializer_list>
#include <iterator>

#include "launch.cuh"
#include "slot_steps.cu"
#include "vidops/slot_attend_cuda.h"
#include "vidops/slot_steps_cuda.h"

namespace vidops {
namespace {

constexpr const char* kOp = "slot_steps";
constexpr int64_t kBlocks = 264;        // two for every multiprocessor of a large card
constexpr int64_t kMostNormParts = 64;  // sums over rows that are added one after the other
constexpr int64_t kLeastNormRows = 16;  // of a block

using cuda::aligned;
using cuda::ceil_div;
using cuda::round_up;
using cuda::StepForm;

TensorView view_of(const float* data, std::initializer_list<int64_t> shape) {
  TensorView v;
  v.data = const_cast<float*>(data);
  v.device = Device::cuda;
  v.rank = static_cast<int32_t>(shape.size());
  std::copy(shape.begin(), shape.end(), v.shape);
  int64_t packed = 1;
  for (int axis = v.rank - 1; axis >= 0; --axis) v.stride[axis] = packed, packed *= v.shape[axis];
  return v;
}

int64_t element_bytes(const TensorView& v) { return v.dtype == DType::f32 ? 4 : 2; }

// --- checks -------------------------------------------------------------------------------------------------------
void check_storage(const char* name, const TensorView& v, std::initializer_list<int64_t> shape, bool packed = true) {
  bool right = v.dtype == DType::f32 || v.dtype == DType::f16 || v.dtype == DType::bf16;
  right = right && v.rank == static_cast<int32_t>(shape.size()) && (!packed || v.contiguous());
  int axis = 0;
  for (const int64_t extent : shape) right = right && v.shape[axis++] == extent;
  require(right, std::string(kOp) + ": " + name + " has an unexpected dtype, shape or layout");
}

void check_floats(const char* name, const TensorView& v, std::initializer_list<int64_t> shape) {
  if (!v.present()) return;
  check_storage(name, v, shape);
  cuda::require_dtype(kOp, name, v, DType::f32);
}

// Shapes of the weights; `w` may be their gradients.
void check_weights(const SlotWeights& w, int64_t channels, int64_t width, const SlotWeights& like) {
  const auto matrix = [](const TensorView& v, int64_t outs, int64_t ins) { check_storage("a weight", v, {outs, ins}); };
  const auto vector = [](const TensorView& v, int64_t size) {
    if (v.present()) check_storage("a bias or a norm's affine", v, {size});
  };
  const auto rows = [](const TensorView& v) { return v.present() ? v.shape[0] : 0; };
  const int64_t hq = rows(like.q_weight), hv = rows(like.v_weight), hidden = rows(like.mlp_weight1);
  const int64_t update = like.merge_weight.present() ? rows(like.merge_weight) : hv;
  require(hq > 0 && hv > 0, std::string(kOp) + ": needs weights of q, k and v");
  matrix(w.q_weight, hq, width), matrix(w.k_weight, hq, channels), matrix(w.v_weight, hv, channels);
  vector(w.q_bias, hq), vector(w.k_bias, hq), vector(w.v_bias, hv);
  vector(w.norm_input_weight, channels), vector(w.norm_input_bias, channels);
  vector(w.norm_slots_weight, width), vector(w.norm_slots_bias, width);
  vector(w.norm_mlp_weight, width), vector(w.norm_mlp_bias, width);
  if (like.merge_weight.present()) matrix(w.merge_weight, update, hv), vector(w.merge_bias, update);
  if (like.gru_weight_ih.present()) {
    matrix(w.gru_weight_ih, 3 * width, update), matrix(w.gru_weight_hh, 3 * width, width);
    vector(w.gru_bias_ih, 3 * width), vector(w.gru_bias_hh, 3 * width);
  } else {
    require(update == width, std::string(kOp) + ": the update is not as wide as the slots it is added to");
  }
  if (like.mlp_weight1.present()) {
    matrix(w.mlp_weight1, hidden, width), matrix(w.mlp_weight2, width, hidden);
    vector(w.mlp_bias1, hidden), vector(w.mlp_bias2, width);
  }
}

void check_call(const SlotIterationsParams& p) {
  require(p.inputs.rank == 3 && p.states.rank == 4, std::string(kOp) + ": inputs have three axes, states four");
  const int64_t batch = p.states.shape[1], slots = p.states.shape[2], tokens = p.inputs.shape[1];
  require(p.states.numel() > 0 && p.inputs.numel() > 0, std::string(kOp) + ": needs at least one of everything");
  check_storage("inputs", p.inputs, {batch, tokens, p.inputs.shape[2]}, false);
  check_floats("states", p.states, {p.states.shape[0], batch, slots, p.states.shape[3]});
  check_weights(p.weights, p.inputs.shape[2], p.states.shape[3], p.weights);
  require(p.groups > 0 && slots % p.groups == 0, std::string(kOp) + ": groups must divide the slots");
  check_floats("token_mask", p.token_mask, {batch, p.groups, tokens});
  check_floats("slot_mask", p.slot_mask, {batch, slots});
}

// --- one iteration ------------------------------------------------------------------------------------------------
// Float32, (outs, ins); null: absent.
struct Weight {
  const float* data = nullptr;
  int64_t outs = 0, ins = 0;
};

// How a product ends; see SlotProductArgs.
struct Ending {
  const float* bias = nullptr;
  const float* factor = nullptr;
  double scale = 1;
  StepForm form = StepForm::none;
  const float* gate = nullptr;
  float* before = nullptr;
  const float* add = nullptr;
};

// What an iteration makes of its slots, (B S, width) each, as in the CPU's SlotRows.
struct Rows {
  const float* slots = nullptr;
  float *normed = nullptr, *mean = nullptr, *rstd = nullptr, *q = nullptr, *token_q = nullptr, *c = nullptr;
  float *mean_row = nullptr, *weight = nullptr, *total = nullptr, *heads = nullptr, *update = nullptr;
  float *from_update = nullptr, *from_slots = nullptr, *moved = nullptr;
  float *mlp_normed = nullptr, *mlp_mean = nullptr, *mlp_rstd = nullptr;
  float *before = nullptr, *hidden = nullptr;  // of the MLP: what the activation is applied to, if kept, and its result
};

class Steps {
 protected:
  Steps(const SlotIterationsParams& p, bool gelu, cuda::Arena& arena, int device, void* stream)
      : p_(p),
        gelu_(gelu),
        device_(device),
        stream_(stream),
        arena_(arena),
        batch_(p.states.shape[1]),
        slots_(p.states.shape[2]),
        width_(p.states.shape[3]),
        tokens_(p.inputs.shape[1]),
        channels_(p.inputs.shape[2]),
        rows_(batch_ * slots_) {
    const SlotWeights& w = p.weights;
    for (TensorView SlotWeights::*one : kSlotWeights) {
      const TensorView& v = w.*one;
      (w_.*one) = v;
      if (!v.present() || v.dtype == DType::f32) continue;
      TensorView& wide = w_.*one;
      wide.dtype = DType::f32, wide.data = take(v.numel());
      convert(v.data, wide.data, v.numel(), v.dtype, true);
    }
    mean_ = take(batch_ * tokens_), rstd_ = take(batch_ * tokens_);
    q_ = matrix(w_.q_weight), key_ = matrix(w_.k_weight), value_ = matrix(w_.v_weight);
    merge_ = matrix(w_.merge_weight);
    from_update_ = matrix(w_.gru_weight_ih), from_slots_ = matrix(w_.gru_weight_hh);
    first_ = matrix(w_.mlp_weight1), second_ = matrix(w_.mlp_weight2);
    const bool scale = w_.norm_input_weight.present(), shift = w_.norm_input_bias.present();
    folds_ = scale || shift;
    for (Weight* weight : {&key_, &value_})
      if (scale) weight->data = take(weight->outs * channels_);
    key_biased_ = shift || w_.k_bias.present(), value_biased_ = shift || w_.v_bias.present();
    key_bias_ = data(w_.k_bias), value_bias_ = data(w_.v_bias);
    if (shift) key_bias_ = take(key_.outs), value_bias_ = take(value_.outs);
    attend_words_ = attend_words(false);
  }

  float* take(int64_t count) { return arena_.take<float>(count); }
  static const float* data(const TensorView& v) { return v.present() ? v.as<const float>() : nullptr; }
  static Weight matrix(const TensorView& v) {
    return v.present() ? Weight{v.as<const float>(), v.shape[0], v.shape[1]} : Weight{};
  }
  bool gru() const { return from_update_.outs > 0; }
  bool mlp() const { return first_.outs > 0; }
  bool merges() const { return merge_.outs > 0; }
  int64_t update_width() const { return merges() ? merge_.outs : value_.outs; }

  SlotAttendCudaSizes attend_sizes() const {
    return {batch_, 1, slots_, tokens_, channels_, channels_, 1, 1, p_.groups, element_bytes(p_.inputs), false, true};
  }
  int64_t attend_words(bool backward) const { return slot_attend_workspace_cuda(attend_sizes(), backward, device_); }
  // For all passes over the tokens, after the last piece was asked for.
  void take_attend_workspace() {
    attend_workspace_.dtype = DType::i64, attend_workspace_.rank = 1;
    attend_workspace_.shape[0] = attend_words_, attend_workspace_.stride[0] = 1;
    attend_workspace_.data = arena_.take<int64_t>(attend_words_);
  }

  // A tensor in another dtype; those asked for together take one launch.
  void convert(const void* from, void* to, int64_t count, DType half, bool widen) {
    using cuda::StepCast;
    if (jobs_ == cuda::kConvertJobs) convert_all();
    const StepCast cast = half == DType::f32   ? StepCast::none
                          : half == DType::f16 ? (widen ? StepCast::from_half : StepCast::to_half)
                                               : (widen ? StepCast::from_bfloat : StepCast::to_bfloat);
    conversions_.job[jobs_++] = {from, to, count, cast};
    longest_ = std::max(longest_, count);
  }
  void convert_all() {
    using namespace cuda;
    if (jobs_ > 0)
      VIDOPS_LAUNCH(kOp, slot_convert, (Grid{entries(longest_), static_cast<unsigned>(jobs_), 1}), kStepRowThreads, 0,
                    stream_, conversions_);
    jobs_ = 0, longest_ = 0;
  }

  // Statistics of the tokens, and the projections with the affine of their norm.
  void begin() {
    using namespace cuda;
    convert_all();
    TokenStatisticsCudaParams t;
    t.x = p_.inputs, t.eps = p_.ln_eps;
    t.mean = view_of(mean_, {batch_, tokens_}), t.rstd = view_of(rstd_, {batch_, tokens_});
    token_statistics_cuda(t, device_, stream_);
    if (!folds_) return;
    const bool scale = w_.norm_input_weight.present(), shift = w_.norm_input_bias.present();
    const auto part = [&](const TensorView& weight, const TensorView& bias, const Weight& to, const float* to_bias) {
      return SlotFold{data(weight), data(bias), to_int(kOp, to.outs), scale ? const_cast<float*>(to.data) : nullptr,
                      shift ? const_cast<float*>(to_bias) : nullptr};
    };
    const SlotFoldArgs args{{part(w_.k_weight, w_.k_bias, key_, key_bias_),
                             part(w_.v_weight, w_.v_bias, value_, value_bias_)},
                            data(w_.norm_input_weight), data(w_.norm_input_bias), to_int(kOp, channels_)};
    VIDOPS_LAUNCH(kOp, slot_fold, (Grid{warps(std::max(key_.outs, value_.outs)), 2, 1}), kStepRowThreads, 0, stream_,
                  args);
  }

  // From the slots to the hidden layer of the MLP. May share memory: normed, heads and mlp_normed; q, update and
  // hidden; from_update and one of these that it does not come from; slots and moved.
  void run(const Rows& s, const TensorView& dots, const TensorView& attn) {
    using namespace cuda;
    normalise(s.slots, w_.norm_slots_weight, w_.norm_slots_bias, s.normed, s.mean, s.rstd);
    Ending query;
    query.bias = data(w_.q_bias), query.scale = p_.scale;
    product(s.normed, q_, s.q, query);
    through(s.q, key_, s.token_q);
    if (key_biased_) {
      const SlotDotsArgs args{s.q, key_bias_, rows_, to_int(kOp, key_.outs), s.c};
      VIDOPS_LAUNCH(kOp, slot_dots, Grid{warps(rows_)}, kStepRowThreads, 0, stream_, args);
    } else {
      zero_async(kOp, s.c, sizeof(float) * rows_, stream_);
    }
    SlotAttendCudaParams a;
    set_tokens(s, a.in);
    a.num = view_of(s.mean_row, {batch_, 1, slots_, channels_}), a.den = view_of(s.weight, {batch_, 1, slots_});
    a.dots = map_of(dots), a.attn = map_of(attn);
    slot_attend_forward_cuda(a, device_, stream_);
    const SlotMeanArgs mean{s.mean_row, s.weight, s.total, rows_, to_int(kOp, channels_),
                            static_cast<float>(p_.denominator)};
    VIDOPS_LAUNCH(kOp, slot_mean, Grid{warps(rows_)}, kStepRowThreads, 0, stream_, mean);

    Ending heads;
    heads.bias = value_bias_, heads.factor = s.weight;
    const bool direct = !merges() && !gru();
    if (direct) heads.add = s.slots;
    product(s.mean_row, value_, direct ? s.moved : s.heads, heads);
    if (merges()) {
      Ending merge;
      merge.bias = data(w_.merge_bias);
      if (!gru()) merge.add = s.slots;
      product(s.heads, merge_, gru() ? s.update : s.moved, merge);
    }
    if (gru()) {
      Ending update, recurrent;
      update.bias = data(w_.gru_bias_ih), recurrent.bias = data(w_.gru_bias_hh);
      product(merges() ? s.update : s.heads, from_update_, s.from_update, update);
      product(s.slots, from_slots_, s.from_slots, recurrent);
      VIDOPS_LAUNCH(kOp, slot_gates, Grid{entries(rows_ * width_)}, kStepRowThreads, 0, stream_,
                    gates(s, s.moved));
    }
    if (!mlp()) return;
    normalise(s.moved, w_.norm_mlp_weight, w_.norm_mlp_bias, s.mlp_normed, s.mlp_mean, s.mlp_rstd);
    Ending hidden;
    hidden.bias = data(w_.mlp_bias1), hidden.before = s.before, hidden.form = gelu_ ? StepForm::gelu : StepForm::relu;
    product(s.mlp_normed, first_, s.hidden, hidden);
  }

  cuda::SlotGatesArgs gates(const Rows& s, float* out) const {
    return {s.from_update, s.from_slots, s.slots, rows_, cuda::to_int(kOp, width_), out};
  }

  void normalise(const float* x, const TensorView& weight, const TensorView& bias, float* out, float* mean,
                 float* rstd) {
    using namespace cuda;
    const SlotNormArgs args{x,   rows_, to_int(kOp, width_), data(weight), data(bias), static_cast<float>(p_.ln_eps),
                            out, mean,  rstd};
    VIDOPS_LAUNCH(kOp, slot_norm, Grid{warps(rows_)}, kStepRowThreads, 0, stream_, args);
  }

  // What a pass over the tokens takes, forward and backward.
  void set_tokens(const Rows& s, SlotAttendCudaInputs& in) const {
    TensorView tokens = p_.inputs;  // (B,N,Din) as (B,1,N,Din)
    tokens.rank = 4, tokens.shape[1] = 1, tokens.shape[2] = tokens_, tokens.shape[3] = channels_;
    tokens.stride[1] = 0, tokens.stride[2] = p_.inputs.stride[1], tokens.stride[3] = 1;
    in.keys = in.values = tokens;
    in.mean = view_of(mean_, {batch_, tokens_}), in.rstd = view_of(rstd_, {batch_, tokens_});
    in.q = view_of(s.token_q, {batch_, 1, slots_, channels_}), in.c = view_of(s.c, {batch_, 1, slots_});
    in.token_mask = p_.token_mask, in.slot_mask = p_.slot_mask;
    in.groups = p_.groups, in.eps = p_.eps;
    in.workspace = attend_workspace_;
  }
  TensorView map_of(const TensorView& v) const {
    return v.present() ? view_of(v.as<const float>(), {batch_, 1, slots_, tokens_}) : TensorView();
  }

  // out = x w^T
  void product(const float* x, const Weight& w, float* out, const Ending& ending = {}) {
    multiply<true>(x, rows_, w.ins, w.data, w.outs, out, ending);
  }
  // out = x w
  void through(const float* x, const Weight& w, float* out, const Ending& ending = {}) {
    multiply<false>(x, rows_, w.outs, w.data, w.ins, out, ending);
  }

  template <bool kTurned>
  void multiply(const float* a, int64_t m, int64_t k, const float* b, int64_t n, float* out, const Ending& ending) {
    using namespace cuda;
    SlotProductArgs args = product_args(a, m, k, b, n, out);
    args.a_whole = k % 4 == 0 && aligned(a), args.b_whole = (kTurned ? k : n) % 4 == 0 && aligned(b);
    args.splits = 1, args.share = args.k;
    args.bias = ending.bias, args.factor = ending.factor, args.scale = static_cast<float>(ending.scale);
    args.form = ending.form, args.gate = ending.gate, args.before = ending.before, args.add = ending.add;
    if (narrow(m, n))
      launch_product<true, kTurned, 32>(kTurned ? slot_product_nt_32 : slot_product_nn_32, args);
    else
      launch_product<true, kTurned, 64>(kTurned ? slot_product_nt_64 : slot_product_nn_64, args);
  }

  // Whether blocks of half as many columns share the multiprocessors more evenly.
  static bool narrow(int64_t m, int64_t n) { return n <= 32 || tiles(m, n, 64) < kBlocks; }

  template <bool kAInner, bool kBInner, int kColumns, class Kernel>
  void launch_product(Kernel kernel, const cuda::SlotProductArgs& args) const {
    const cuda::Grid grid{cuda::grid_x(kOp, tiles(args.m, args.n, kColumns)), static_cast<unsigned>(args.splits), 1};
    constexpr int kShared = cuda::kStepShared<kAInner, kBInner, kColumns>;
    VIDOPS_LAUNCH(kOp, kernel, grid, cuda::kStepThreads, kShared, stream_, args);
  }

  static cuda::SlotProductArgs product_args(const float* a, int64_t m, int64_t k, const float* b, int64_t n,
                                            float* out) {
    cuda::SlotProductArgs args{};
    args.a = a, args.b = b, args.out = out;
    args.m = cuda::to_int(kOp, m), args.n = cuda::to_int(kOp, n), args.k = cuda::to_int(kOp, k);
    return args;
  }
  static int64_t tiles(int64_t m, int64_t n, int64_t columns) {
    return ceil_div(m, cuda::kStepTile) * ceil_div(n, columns);
  }
  static unsigned warps(int64_t rows) {
    return cuda::grid_x(kOp, ceil_div(rows, cuda::kStepRowThreads / cuda::kWarp));
  }
  static unsigned entries(int64_t count) { return cuda::grid_x(kOp, ceil_div(count, cuda::kStepRowThreads)); }

  const SlotIterationsParams& p_;
  const bool gelu_;
  const int device_;
  void* const stream_;
  cuda::Arena& arena_;
  const int64_t batch_, slots_, width_, tokens_, channels_, rows_;
  SlotWeights w_;                                   // as float32
  Weight q_, key_, value_, merge_, from_update_, from_slots_, first_, second_;
  const float *key_bias_ = nullptr, *value_bias_ = nullptr;  // with the shift of the inputs' norm inside; null: zero
  bool folds_ = false, key_biased_ = false, value_biased_ = false;
  float *mean_ = nullptr, *rstd_ = nullptr;  // of the tokens
  int64_t attend_words_ = 0;
  TensorView attend_workspace_;

 private:
  cuda::SlotConvertArgs conversions_{};
  int jobs_ = 0;
  int64_t longest_ = 0;
};

// --- forward ------------------------------------------------------------------------------------------------------
class Forward : Steps {
 public:
  Forward(const SlotStepsForwardCudaParams& p, cuda::Arena& arena, int device, void* stream)
      : Steps(p, p.gelu, arena, device, stream), given_(p) {
    int64_t widest = std::max(width_, gru() ? 3 * width_ : 0);
    for (const Weight* w : {&q_, &value_, &merge_, &first_}) widest = std::max(widest, w->outs);
    float *a = take(rows_ * widest), *b = take(rows_ * widest);
    s_.normed = s_.heads = s_.mlp_normed = a, s_.q = s_.update = s_.hidden = b;
    s_.from_update = merges() ? a : b;
    if (gru()) s_.from_slots = take(rows_ * 3 * width_);
    s_.token_q = take(rows_ * channels_), s_.mean_row = take(rows_ * channels_);
    s_.c = take(rows_), s_.weight = take(rows_), s_.total = take(rows_);
    s_.moved = p.out.dtype == DType::f32 ? p.out.as<float>() : take(rows_ * width_);
    s_.slots = s_.moved;
    take_attend_workspace();
  }

  void run() {
    const int64_t size = rows_ * width_, kept = given_.states.shape[0];
    convert(given_.slots.data, s_.moved, size, given_.slots.dtype, true);
    begin();
    for (int64_t step = 0; step < given_.iters; ++step) {
      const int64_t state = step - (given_.iters - kept);
      if (state >= 0) {
        convert(s_.moved, given_.states.as<float>() + state * size, size, DType::f32, true);
        convert_all();
      }
      const bool last = step == given_.iters - 1;
      Steps::run(s_, last ? given_.dots : TensorView(), last ? given_.attn : TensorView());
      if (!mlp()) continue;
      Ending residual;
      residual.bias = data(w_.mlp_bias2), residual.add = s_.moved;
      product(s_.hidden, second_, s_.moved, residual);
    }
    if (given_.out.dtype == DType::f32) return;
    convert(s_.moved, given_.out.data, size, given_.out.dtype, false);
    convert_all();
  }

 private:
  const SlotStepsForwardCudaParams& given_;
  Rows s_;
};

void check_forward(const SlotStepsForwardCudaParams& p) {
  check_call(p);
  const int64_t batch = p.states.shape[1], slots = p.states.shape[2], tokens = p.inputs.shape[1];
  check_storage("slots", p.slots, {batch, slots, p.states.shape[3]});
  check_storage("out", p.out, {batch, slots, p.states.shape[3]});
  check_floats("dots", p.dots, {batch, slots, tokens});
  check_floats("attn", p.attn, {batch, slots, tokens});
  require(p.iters >= 1 && p.states.shape[0] <= p.iters, std::string(kOp) + ": states has one entry per iteration kept");
}

// --- backward -----------------------------------------------------------------------------------------------------
class Backward : Steps {
 public:
  Backward(const SlotStepsBackwardCudaParams& p, cuda::Arena& arena, int device, void* stream)
      : Steps(p, p.gelu, arena, device, stream), given_(p), iterations_(p.states.shape[0]) {
    for (TensorView SlotWeights::*one : kSlotWeights) {
      const TensorView& v = p.grads.*one;
      g_.*one = v;
      if (v.present() && v.dtype != DType::f32) (g_.*one).dtype = DType::f32, (g_.*one).data = take(v.numel());
    }
    grad_ = p.grad_slots.as<float>();
    grad_tokens_ = p.grad_inputs.dtype == DType::f32 ? p.grad_inputs.as<float>() : take(batch_ * tokens_ * channels_);
    const int64_t hq = q_.outs, hv = value_.outs, hidden = first_.outs;
    for (float** one : {&s_.normed, &s_.moved, &grad_normed_}) *one = take(rows_ * width_);
    for (float** one : {&s_.mean, &s_.rstd, &s_.c, &s_.weight, &s_.total, &grad_den_, &grad_c_}) *one = take(rows_);
    s_.q = take(rows_ * hq), s_.heads = take(rows_ * hv);
    for (float** one : {&s_.token_q, &s_.mean_row, &grad_token_q_}) *one = take(rows_ * channels_);
    if (merges()) s_.update = take(rows_ * update_width()), grad_heads_ = take(rows_ * hv);
    if (gru()) {
      s_.from_update = take(rows_ * 3 * width_), s_.from_slots = take(rows_ * 3 * width_);
      grad_update_ = take(rows_ * update_width());
    }
    if (mlp()) {
      s_.mlp_normed = take(rows_ * width_), s_.hidden = take(rows_ * hidden);
      s_.mlp_mean = take(rows_), s_.mlp_rstd = take(rows_);
      if (gelu_) s_.before = take(rows_ * hidden);
    }
    // One after the other.
    grad_hidden_ = grad_row_ = grad_q_ = take(rows_ * std::max({hidden, channels_, hq}));
    if (key_biased_) key_bias_grad_ = w_.k_bias.present() ? g_.k_bias.as<float>() : take(hq);
    if (value_biased_) value_bias_grad_ = w_.v_bias.present() ? g_.v_bias.as<float>() : take(hv);
    norm_share_ = std::max(ceil_div(rows_, kMostNormParts), kLeastNormRows);
    int64_t parts = ceil_div(rows_, norm_share_) * 2 * width_;
    for (const Weight* w : {&q_, &key_, &value_, &merge_, &from_update_, &from_slots_, &first_, &second_})
      if (w->outs > 0) parts = std::max(parts, splits(*w) * (w->outs * w->ins + w->outs));
    parts_ = take(parts);
    attend_words_ = std::max(attend_words_, attend_words(true));
    take_attend_workspace();
  }

  void run() {
    begin();
    for (index_ = iterations_ - 1; index_ >= 0; --index_) iteration();
    finish();
  }

 private:
  void iteration() {
    s_.slots = given_.states.as<const float>() + index_ * rows_ * width_;
    Steps::run(s_, {}, {});
    if (mlp()) mlp_grad();
    const float* grad_update = update_grad();
    const float* grad_heads = merge_grad(grad_update);
    gathered_grad(grad_heads);
    tokens_grad();
    queries_grad();
  }

  void mlp_grad() {
    Ending hidden;
    hidden.form = gelu_ ? StepForm::gelu_grad : StepForm::relu_grad, hidden.gate = gelu_ ? s_.before : s_.hidden;
    through(grad_, second_, grad_hidden_, hidden);
    weight_grad(g_.mlp_weight2, g_.mlp_bias2, grad_, s_.hidden);
    through(grad_hidden_, first_, grad_normed_);
    weight_grad(g_.mlp_weight1, g_.mlp_bias1, grad_hidden_, s_.mlp_normed);
    norm_grad(s_.moved, s_.mlp_mean, s_.mlp_rstd, w_.norm_mlp_weight, g_.norm_mlp_weight, g_.norm_mlp_bias);
  }

  // Of the update; `grad_` turns into that of the slots that entered, as far as they reach around the update.
  const float* update_grad() {
    using namespace cuda;
    if (!gru()) return grad_;
    VIDOPS_LAUNCH(kOp, slot_gates_grad, Grid{entries(rows_ * width_)}, kStepRowThreads, 0, stream_, gates(s_, grad_));
    through(s_.from_update, from_update_, grad_update_);
    weight_grad(g_.gru_weight_ih, g_.gru_bias_ih, s_.from_update, merges() ? s_.update : s_.heads);
    Ending around;
    around.add = grad_;
    through(s_.from_slots, from_slots_, grad_, around);
    weight_grad(g_.gru_weight_hh, g_.gru_bias_hh, s_.from_slots, s_.slots);
    return grad_update_;
  }

  const float* merge_grad(const float* grad_update) {
    if (!merges()) return grad_update;
    through(grad_update, merge_, grad_heads_);
    weight_grad(g_.merge_weight, g_.merge_bias, grad_update, s_.heads);
    return grad_heads_;
  }

  void gathered_grad(const float* grad_heads) {
    using namespace cuda;
    through(grad_heads, value_, grad_row_);
    weight_grad(g_.v_weight, value_bias_grad_, grad_heads, s_.mean_row, s_.weight);
    const SlotGatherGradArgs args{grad_row_, s_.mean_row, s_.weight, s_.total, grad_heads, value_bias_, rows_,
                                  to_int(kOp, channels_), to_int(kOp, value_.outs), grad_den_};
    VIDOPS_LAUNCH(kOp, slot_gather_grad, Grid{warps(rows_)}, kStepRowThreads, 0, stream_, args);
  }

  void tokens_grad() {
    SlotAttendCudaBackwardParams a;
    set_tokens(s_, a.in);
    a.grad_num = view_of(grad_row_, {batch_, 1, slots_, channels_});
    a.grad_den = view_of(grad_den_, {batch_, 1, slots_});
    if (last()) a.grad_dots = map_of(given_.grad_dots), a.grad_attn = map_of(given_.grad_attn);
    a.grad_keys = a.grad_values = view_of(grad_tokens_, {batch_, 1, tokens_, channels_});
    a.add = !last();
    a.grad_q = view_of(grad_token_q_, {batch_, 1, slots_, channels_});
    a.grad_c = view_of(grad_c_, {batch_, 1, slots_});
    slot_attend_backward_cuda(a, device_, stream_);
  }

  void queries_grad() {
    weight_grad(g_.k_weight, key_bias_grad_, s_.q, grad_token_q_, grad_c_);
    Ending query;
    query.bias = key_bias_, query.factor = grad_c_, query.scale = p_.scale;
    product(grad_token_q_, key_, grad_q_, query);
    through(grad_q_, q_, grad_normed_);
    weight_grad(g_.q_weight, g_.q_bias, grad_q_, s_.normed);
    norm_grad(s_.slots, s_.mean, s_.rstd, w_.norm_slots_weight, g_.norm_slots_weight, g_.norm_slots_bias);
  }

  // From the gradient of a LayerNorm's result, in grad_normed_, to that of its rows, added to `grad_`.
  void norm_grad(const float* x, const float* mean, const float* rstd, const TensorView& weight,
                 const TensorView& weight_grad, const TensorView& bias_grad) {
    using namespace cuda;
    const bool affine = weight_grad.present() || bias_grad.present();
    const int64_t blocks = ceil_div(rows_, norm_share_);
    const SlotNormGradArgs args{x,     mean,  rstd,
                                data(weight), grad_normed_, rows_,
                                to_int(kOp, width_), to_int(kOp, norm_share_), grad_,
                                affine ? parts_ : nullptr};
    VIDOPS_LAUNCH(kOp, slot_norm_grad, Grid{grid_x(kOp, blocks)}, kStepRowThreads, 0, stream_, args);
    if (affine)
      sum_parts(blocks, 2 * width_, width_, weight_grad.as<float>(), width_, bias_grad.as<float>());
  }

  // Parts of the rows, so that all multiprocessors have some.
  int64_t splits(const Weight& w) const {
    return std::clamp<int64_t>(kBlocks / tiles(w.outs, w.ins, 64), 1, ceil_div(rows_, 2 * cuda::kStepDepth));
  }

  void weight_grad(const TensorView& weight, const TensorView& bias, const float* grad, const float* x) {
    weight_grad(weight, bias.present() ? bias.as<float>() : nullptr, grad, x, nullptr);
  }
  // weight += grad^T x and bias += the rows of grad, each by its weight.
  void weight_grad(const TensorView& weight, float* bias, const float* grad, const float* x, const float* row_weight) {
    using namespace cuda;
    const int64_t outs = weight.shape[0], ins = weight.shape[1];
    SlotProductArgs args = product_args(grad, outs, rows_, x, ins, parts_);
    args.a_whole = outs % 4 == 0 && aligned(grad), args.b_whole = ins % 4 == 0 && aligned(x);
    args.share = to_int(kOp, round_up(ceil_div(rows_, splits({nullptr, outs, ins})), kStepDepth));
    args.splits = static_cast<int>(ceil_div(rows_, args.share));
    args.part = outs * ins + outs;
    args.sums = bias != nullptr, args.row_weight = row_weight;
    if (ins <= 32)
      launch_product<false, false, 32>(slot_product_tn_32, args);
    else
      launch_product<false, false, 64>(slot_product_tn_64, args);
    sum_parts(args.splits, args.part, outs * ins, weight.as<float>(), bias ? outs : 0, bias);
  }

  void sum_parts(int64_t count, int64_t stride, int64_t first, float* out, int64_t second, float* more) {
    using namespace cuda;
    const SlotPartsArgs args{parts_, to_int(kOp, count), stride, first, second, out, more, !last()};
    VIDOPS_LAUNCH(kOp, slot_parts, Grid{entries(first + second)}, kStepRowThreads, 0, stream_, args);
  }

  void finish() {
    using namespace cuda;
    if (folds_) {
      const auto part = [&](const TensorView& weight, const TensorView& grad, const float* bias_grad) {
        return SlotUnfold{data(weight), grad.as<float>(), bias_grad, to_int(kOp, weight.shape[0])};
      };
      const auto result = [](const TensorView& v) { return v.present() ? v.as<float>() : nullptr; };
      const SlotUnfoldArgs args{{part(w_.k_weight, g_.k_weight, key_bias_grad_),
                                 part(w_.v_weight, g_.v_weight, value_bias_grad_)},
                                data(w_.norm_input_weight), data(w_.norm_input_bias), to_int(kOp, channels_),
                                result(g_.norm_input_weight), result(g_.norm_input_bias)};
      constexpr int kShared = 2 * kStepRowThreads * static_cast<int>(sizeof(float));
      VIDOPS_LAUNCH(kOp, slot_unfold, Grid{grid_x(kOp, ceil_div(channels_, kStepColumns))}, kStepRowThreads, kShared,
                    stream_, args);
    }
    tokens_before_norm();
    for (TensorView SlotWeights::*one : kSlotWeights) {
      const TensorView& v = given_.grads.*one;
      if (v.present() && v.dtype != DType::f32) convert((g_.*one).data, v.data, v.numel(), v.dtype, false);
    }
    convert_all();
  }

  void tokens_before_norm() {
    using namespace cuda;
    const TensorView& x = p_.inputs;
    SlotTokenGradArgs args{};
    args.x = x.data;
    args.batch = batch_ > 1 ? x.stride[0] : 0, args.row = tokens_ > 1 ? x.stride[1] : 0;
    args.n = to_int(kOp, tokens_), args.channels = to_int(kOp, channels_), args.rows = batch_ * tokens_;
    const int64_t bytes = 4 * element_bytes(x);
    args.whole = channels_ % 4 == 0 && reinterpret_cast<uintptr_t>(x.data) % bytes == 0 && args.batch % 4 == 0 &&
                 args.row % 4 == 0 && reinterpret_cast<uintptr_t>(given_.grad_inputs.data) % bytes == 0 &&
                 aligned(grad_tokens_);
    args.lanes = lanes_of_row(ceil_div(channels_, args.whole ? 4 : 1));
    args.mean = mean_, args.rstd = rstd_, args.grad = grad_tokens_, args.out = given_.grad_inputs.data;
    const auto kernel = x.dtype == DType::f32   ? slot_token_grad_f32
                        : x.dtype == DType::f16 ? slot_token_grad_f16
                                                : slot_token_grad_bf16;
    VIDOPS_LAUNCH(kOp, kernel, Grid{entries(args.rows * args.lanes)}, kStepRowThreads, 0, stream_, args);
  }

  bool last() const { return index_ == iterations_ - 1; }

  const SlotStepsBackwardCudaParams& given_;
  SlotWeights g_;  // as float32
  const int64_t iterations_;
  int64_t index_ = 0, norm_share_ = 0;
  Rows s_;
  float* grad_;  // of the slots that leave an iteration, then of those that enter it
  float *grad_tokens_ = nullptr, *grad_normed_ = nullptr, *grad_den_ = nullptr, *grad_c_ = nullptr;
  float *grad_token_q_ = nullptr, *grad_heads_ = nullptr, *grad_update_ = nullptr;
  float *grad_hidden_ = nullptr, *grad_row_ = nullptr, *grad_q_ = nullptr;
  float *key_bias_grad_ = nullptr, *value_bias_grad_ = nullptr, *parts_ = nullptr;
};

void check_backward(const SlotStepsBackwardCudaParams& p) {
  check_call(p);
  const int64_t batch = p.states.shape[1], slots = p.states.shape[2], tokens = p.inputs.shape[1];
  require(p.grad_slots.present() && p.grad_inputs.dtype == p.inputs.dtype,
          std::string(kOp) + ": grad_slots is missing, or grad_inputs has another dtype than inputs");
  check_floats("grad_slots", p.grad_slots, {batch, slots, p.states.shape[3]});
  check_storage("grad_inputs", p.grad_inputs, {batch, tokens, p.inputs.shape[2]});
  check_floats("grad_dots", p.grad_dots, {batch, slots, tokens});
  check_floats("grad_attn", p.grad_attn, {batch, slots, tokens});
  for (TensorView SlotWeights::*one : kSlotWeights)
    require((p.weights.*one).present() == (p.grads.*one).present(), std::string(kOp) + ": one gradient per weight");
  check_weights(p.grads, p.inputs.shape[2], p.states.shape[3], p.weights);
}

template <class Call, class Params>
int64_t words(const Params& params, int device) {
  const cuda::DeviceGuard guard(kOp, device);
  cuda::Arena arena;
  Call(params, arena, device, nullptr);
  return arena.words();
}

template <class Call, class Params>
void run(const Params& params, int device, void* stream) {
  const cuda::DeviceGuard guard(kOp, device);
  cuda::Arena arena(kOp, params.workspace, 0);
  Call call(params, arena, device, stream);
  require(arena.words() <= params.workspace.numel(),
          std::string(kOp) + ": workspace must hold " + std::to_string(arena.words()) + " int64 words");
  call.run();
}

}  // namespace

int64_t slot_steps_forward_workspace_cuda(const SlotStepsForwardCudaParams& params, int device) {
  check_forward(params);
  return words<Forward>(params, device);
}

int64_t slot_steps_backward_workspace_cuda(const SlotStepsBackwardCudaParams& params, int device) {
  check_backward(params);
  return words<Backward>(params, device);
}

void slot_steps_forward_cuda(const SlotStepsForwardCudaParams& params, int device, void* stream) {
  check_forward(params);
  run<Forward>(params, device, stream);
}

void slot_steps_backward_cuda(const SlotStepsBackwardCudaParams& params, int device, void* stream) {
  check_backward(params);
  run<Backward>(params, device, stream);
}

}  // namespace vidops
