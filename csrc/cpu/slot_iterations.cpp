// All iterations of slot attention in one call: the pass over the tokens (slot_attend.cpp), products with weights that
// are laid out once (slot_side.cpp), and what comes between them, row by row.
#include "vidops/slot_iterations.h"

#include "common.h"
#include "kernels.h"
#include "vidops/slot_attend.h"
#include "vidops/slot_side.h"

namespace vidops::cpu {
namespace {

constexpr int64_t kPackedRows = 64;  // fewer rows do not pay for a layout of a whole weight, in memory that is new
constexpr int64_t kRows = 16;        // of a task that goes row by row

template <class T>
TensorView view_of(const T* data, std::initializer_list<int64_t> shape) {
  TensorView v;
  v.data = const_cast<T*>(data);
  v.dtype = dtype_of<T>();
  int64_t packed = 1;
  v.rank = static_cast<int32_t>(shape.size());
  std::copy(shape.begin(), shape.end(), v.shape);
  for (int axis = v.rank - 1; axis >= 0; --axis) v.stride[axis] = packed, packed *= v.shape[axis];
  return v;
}

template <class T>
const T* or_null(const TensorView& v) {
  return v.present() ? v.as<const T>() : nullptr;
}

// Scratch that the next call of a thread finds again, up to `kKept` bytes: fresh memory is paid for page by page, which
// takes longer than a small product.
class Scratch {
 public:
  Scratch() : blocks_(blocks()) {}
  ~Scratch() {
    int64_t total = 0;
    for (const Block& block : blocks_) total += block.bytes;
    if (total > kKept) blocks_.clear();
  }
  template <class T>
  T* take(int64_t count) {
    if (next_ == blocks_.size()) blocks_.emplace_back();
    Block& block = blocks_[next_++];
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    if (block.bytes < bytes) block.memory.resize(bytes), block.bytes = bytes;
    return reinterpret_cast<T*>(block.memory.get());
  }

 private:
  static constexpr int64_t kKept = int64_t{16} << 20;
  struct Block {
    Buffer<char> memory;
    int64_t bytes = 0;
  };
  static std::vector<Block>& blocks() {
    thread_local std::vector<Block> kept;
    return kept;
  }
  std::vector<Block>& blocks_;
  size_t next_ = 0;
};

// A weight that the slots' rows are multiplied by, (out, in), or (in, out) if not `turned`.
template <class T>
struct Weight {
  TensorView matrix, packed;
  bool turned = true;

  void set(Scratch& scratch, const TensorView& given, bool turned_, bool packs, int threads) {
    turned = turned_;
    matrix = view_of(given.as<const T>(), {1, given.shape[0], given.shape[1]});
    if (!packs) return;
    const int64_t size = product_packed_size(matrix.dtype, outs(), ins());
    packed = view_of(scratch.take<T>(size), {1, size});
    product_pack_cpu(matrix, turned, packed, threads);
  }
  int64_t outs() const { return matrix.shape[turned ? 1 : 2]; }
  int64_t ins() const { return matrix.shape[turned ? 2 : 1]; }
};

template <class T>
class Iterations {
 public:
  Iterations(const SlotIterationsParams& params, int threads)
      : p_(params),
        threads_(threads),
        batch_(params.slots.shape[0]),
        slots_(params.slots.shape[1]),
        width_(params.slots.shape[2]),
        tokens_(params.inputs.shape[1]),
        channels_(params.inputs.shape[2]),
        rows_(batch_ * slots_) {
    const bool packs = p_.iters > 1 && rows_ >= kPackedRows;
    q_.set(scratch_, p_.q_weight, true, packs, threads), key_.set(scratch_, p_.key, false, packs, threads);
    value_.set(scratch_, p_.value, true, packs, threads);
    int64_t widest = std::max({width_, q_.outs(), value_.outs()});
    if (p_.merge_weight.present()) merge_.set(scratch_, p_.merge_weight, true, packs, threads);
    if (p_.gru_weight_ih.present()) {
      from_update_.set(scratch_, p_.gru_weight_ih, true, packs, threads);
      from_slots_.set(scratch_, p_.gru_weight_hh, true, packs, threads);
      widest = std::max(widest, 3 * width_);
    }
    if (p_.mlp_weight1.present()) {
      first_.set(scratch_, p_.mlp_weight1, true, packs, threads);
      second_.set(scratch_, p_.mlp_weight2, true, packs, threads);
      widest = std::max(widest, first_.outs());
    }
    if (p_.merge_weight.present()) widest = std::max(widest, merge_.outs());
    for (T** wide : {&a_, &b_}) *wide = scratch_.take<T>(rows_ * widest);
    if (p_.gru_weight_ih.present()) gates_ = scratch_.take<T>(rows_ * 3 * width_);
    for (T** row : {&token_q_, &num_}) *row = scratch_.take<T>(rows_ * channels_);
    for (T** one : {&c_, &den_}) *one = scratch_.take<T>(rows_);
    for (T** token : {&mean_, &rstd_}) *token = scratch_.take<T>(batch_ * tokens_);
  }

  void run() {
    const int64_t size = rows_ * width_, kept = p_.states.shape[0];
    T* slots = p_.out.template as<T>();
    std::copy_n(p_.slots.template as<const T>(), size, slots);
    for (int64_t step = 0; step < p_.iters; ++step) {
      const int64_t state = step - (p_.iters - kept);
      if (state >= 0) std::copy_n(slots, size, p_.states.template as<T>() + state * size);
      iterate(slots, step == 0, step == p_.iters - 1);
    }
  }

 private:
  void iterate(T* slots, bool first, bool last) {
    normalise(slots, p_.norm_slots_weight, p_.norm_slots_bias, a_);
    product(a_, q_, p_.q_bias, b_);
    kn_.scaled_copy(T(p_.scale), b_, b_, rows_ * q_.outs());
    product(b_, key_, {}, token_q_);
    for (int64_t r = 0; r < rows_; ++r)
      c_[r] = p_.key_bias.present() ? kn_.dot(b_ + r * q_.outs(), p_.key_bias.template as<T>(), q_.outs()) : T(0);
    attend(first, last);

    T *heads = a_, *update = heads;
    for (int64_t r = 0; r < rows_; ++r) {
      const T total = den_[r] + T(p_.denominator);
      T* row = num_ + r * channels_;
      for (int64_t i = 0; i < channels_; ++i) row[i] /= total;
      den_[r] /= total;
    }
    product(num_, value_, {}, heads);
    for (int64_t r = 0; p_.value_bias.present() && r < rows_; ++r)
      kn_.axpy(den_[r], p_.value_bias.template as<T>(), heads + r * value_.outs(), value_.outs());
    if (p_.merge_weight.present()) product(heads, merge_, p_.merge_bias, update = b_);
    if (p_.gru_weight_ih.present()) {
      T* projected = update == a_ ? b_ : a_;
      product(update, from_update_, p_.gru_bias_ih, projected);
      product(slots, from_slots_, p_.gru_bias_hh, gates_);
      for_rows([&](int64_t r) {
        kn_.side.gru(projected + r * 3 * width_, gates_ + r * 3 * width_, width_, slots + r * width_);
      });
    } else {
      kn_.axpy(T(1), update, slots, rows_ * width_);
    }
    if (!p_.mlp_weight1.present()) return;
    normalise(slots, p_.norm_mlp_weight, p_.norm_mlp_bias, a_);
    T* hidden = b_;
    product(a_, first_, p_.mlp_bias1, hidden);
    // Not a maximum, which would lose what is not a number.
    for (int64_t i = 0; i < rows_ * first_.outs(); ++i) hidden[i] = hidden[i] < T(0) ? T(0) : hidden[i];
    product(hidden, second_, p_.mlp_bias2, slots, true);
  }

  // A pass over the tokens; the first one finds their statistics too.
  void attend(bool first, bool last) {
    SlotAttendForwardParams a;
    TensorView rows = p_.inputs;  // (B,1,N,Din)
    rows.rank = 4, rows.shape[1] = 1, rows.shape[2] = tokens_, rows.shape[3] = channels_;
    rows.stride[2] = p_.inputs.stride[1], rows.stride[3] = 1, rows.stride[1] = 0;
    a.keys = a.values = rows;
    a.mean = view_of(mean_, {batch_, tokens_}), a.rstd = view_of(rstd_, {batch_, tokens_});
    a.q = view_of(token_q_, {batch_, 1, slots_, channels_}), a.c = view_of(c_, {batch_, 1, slots_});
    a.token_mask = p_.token_mask, a.slot_mask = p_.slot_mask;
    a.groups = p_.groups, a.eps = p_.eps;
    a.num = view_of(num_, {batch_, 1, slots_, channels_}), a.den = view_of(den_, {batch_, 1, slots_});
    auto map = [&](const TensorView& v) {
      return last && v.present() ? view_of(v.as<const T>(), {batch_, 1, slots_, tokens_}) : TensorView();
    };
    a.dots = map(p_.dots), a.attn = map(p_.attn);
    a.norm_eps = first ? p_.ln_eps : -1;
    slot_attend_forward_cpu(a, threads_);
  }

  void product(const T* x, const Weight<T>& w, const TensorView& bias, T* out, bool add = false) {
    ProductParams q;
    q.a = view_of(x, {1, rows_, w.ins()}), q.b = w.matrix, q.b_turned = w.turned, q.packed = w.packed;
    q.bias = bias, q.out = view_of(out, {1, rows_, w.outs()}), q.add = add;
    product_cpu(q, threads_);
  }

  void normalise(const T* x, const TensorView& weight, const TensorView& bias, T* out) {
    parallel_for(ceil_div(rows_, kRows), threads_, [&](int64_t task, int) {
      T mean[kRows], rstd[kRows];
      const int64_t from = task * kRows, count = std::min(kRows, rows_ - from);
      kn_.slots.moments(x + from * width_, width_, count, width_, T(p_.ln_eps), mean, rstd);
      for (int64_t r = 0; r < count; ++r) {
        // Slots whose variance overflows become NaN, unlike tokens: so they do in PyTorch, which other backends call.
        if (rstd[r] == 0) rstd[r] = std::numeric_limits<T>::quiet_NaN();
        kn_.side.normalise(x + (from + r) * width_, width_, mean[r], rstd[r], or_null<T>(weight), or_null<T>(bias),
                           out + (from + r) * width_);
      }
    });
  }

  template <class F>
  void for_rows(F&& body) {
    parallel_for(ceil_div(rows_, kRows), threads_, [&](int64_t task, int) {
      for (int64_t r = task * kRows; r < std::min(rows_, (task + 1) * kRows); ++r) body(r);
    });
  }

  const SlotIterationsParams& p_;
  const Kernels<T>& kn_ = kernels<T>();
  const int threads_;
  const int64_t batch_, slots_, width_, tokens_, channels_, rows_;
  Scratch scratch_;
  Weight<T> q_, key_, value_, merge_, from_update_, from_slots_, first_, second_;
  T *a_, *b_, *gates_ = nullptr, *token_q_, *num_, *c_, *den_, *mean_, *rstd_;
};

template <class T>
void check_weight(const TensorView& v, int64_t outs, int64_t ins, const char* name) {
  check(v, 2, dtype_of<T>(), name);
  check_shape(v, {outs, ins}, name);
  require(v.contiguous(), std::string(name) + ": expected a contiguous tensor");
}

template <class T>
void check_vector(const TensorView& v, int64_t size, const char* name) {
  if (!v.present()) return;
  check(v, 1, dtype_of<T>(), name);
  check_shape(v, {size}, name);
}

template <class T>
void check_call(const SlotIterationsParams& p) {
  check(p.inputs, 3, dtype_of<T>(), "inputs");
  check(p.slots, 3, dtype_of<T>(), "slots");
  const int64_t batch = p.slots.shape[0], slots = p.slots.shape[1], width = p.slots.shape[2];
  const int64_t channels = p.inputs.shape[2];
  check_shape(p.inputs, {batch, p.inputs.shape[1], channels}, "inputs");
  require(p.slots.contiguous() && p.out.contiguous() && p.states.contiguous(), "slots: expected contiguous tensors");
  require(p.slots.numel() > 0 && p.inputs.numel() > 0, "inputs and slots: expected at least one of everything");
  check(p.out, 3, dtype_of<T>(), "out");
  check_shape(p.out, {batch, slots, width}, "out");
  check(p.states, 4, dtype_of<T>(), "states");
  check_shape(p.states, {p.states.shape[0], batch, slots, width}, "states");
  require(p.iters >= 1 && p.states.shape[0] <= p.iters, "states: expected at most one per iteration");
  const int64_t hq = p.q_weight.shape[0], hv = p.value.shape[0];
  check_weight<T>(p.q_weight, hq, width, "q_weight");
  check_weight<T>(p.key, hq, channels, "key");
  check_weight<T>(p.value, hv, channels, "value");
  check_vector<T>(p.q_bias, hq, "q_bias"), check_vector<T>(p.key_bias, hq, "key_bias");
  check_vector<T>(p.value_bias, hv, "value_bias");
  int64_t update = hv;
  if (p.merge_weight.present()) {
    update = p.merge_weight.shape[0];
    check_weight<T>(p.merge_weight, update, hv, "merge_weight");
    check_vector<T>(p.merge_bias, update, "merge_bias");
  }
  if (p.gru_weight_ih.present()) {
    check_weight<T>(p.gru_weight_ih, 3 * width, update, "gru_weight_ih");
    check_weight<T>(p.gru_weight_hh, 3 * width, width, "gru_weight_hh");
    check_vector<T>(p.gru_bias_ih, 3 * width, "gru_bias_ih"), check_vector<T>(p.gru_bias_hh, 3 * width, "gru_bias_hh");
  } else {
    require(update == width, "value: expected updates as wide as the slots they are added to");
  }
  if (p.mlp_weight1.present()) {
    const int64_t hidden = p.mlp_weight1.shape[0];
    check_weight<T>(p.mlp_weight1, hidden, width, "mlp_weight1");
    check_weight<T>(p.mlp_weight2, width, hidden, "mlp_weight2");
    check_vector<T>(p.mlp_bias1, hidden, "mlp_bias1"), check_vector<T>(p.mlp_bias2, width, "mlp_bias2");
  }
  for (const TensorView* v : {&p.norm_slots_weight, &p.norm_slots_bias, &p.norm_mlp_weight, &p.norm_mlp_bias})
    check_vector<T>(*v, width, "norm");
  for (const TensorView* v : {&p.dots, &p.attn}) {
    if (!v->present()) continue;
    check(*v, 3, dtype_of<T>(), "dots and attn");
    check_shape(*v, {batch, slots, p.inputs.shape[1]}, "dots and attn");
    require(v->contiguous(), "dots and attn: expected contiguous tensors");
  }
}

}  // namespace
}  // namespace vidops::cpu

namespace vidops {

void slot_iterations_forward_cpu(const SlotIterationsParams& params, int threads) {
  cpu::dispatch_float(params.slots.dtype, [&](auto zero) {
    using T = decltype(zero);
    cpu::check_call<T>(params);
    cpu::Iterations<T>(params, threads).run();
  });
}

}  // namespace vidops
