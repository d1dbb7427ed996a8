// One iteration of slot attention: the pass over the tokens (slot_attend.cpp), products with weights (slot_side.cpp)
// and what comes between them, row by row. Forward (slot_iterations.cpp) and backward (slot_iterations_grad.cpp) share
// it.
#pragma once

#include <array>
#include <utility>

#include "common.h"
#include "kernels.h"
#include "vidops/slot_attend.h"
#include "vidops/slot_iterations.h"
#include "vidops/slot_side.h"

namespace vidops::cpu {

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
T* or_null(const TensorView& v) {
  return v.present() ? v.as<T>() : nullptr;
}

// Memory that the next call of a thread finds again, up to `kKept` bytes: fresh memory is paid for page by page, which
// takes longer than a small product. A thread has one of these at a time.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  ~Scratch() {
    int64_t total = 0;
    for (Block& block : blocks()) block.taken = false, total += block.bytes;
    if (total > kKept) release();
  }
  template <class T>
  T* take(int64_t count) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    Block* best = nullptr;
    for (Block& block : blocks())
      if (!block.taken && block.bytes >= bytes && (!best || block.bytes < best->bytes)) best = &block;
    if (!best) {
      best = &blocks().emplace_back();
      best->memory.resize(bytes), best->bytes = bytes;
    }
    best->taken = true;
    return reinterpret_cast<T*>(best->memory.get());
  }
  void give(const void* memory) {
    for (Block& block : blocks())
      if (block.memory.get() == memory) block.taken = false;
  }
  // Frees it, for good.
  void discard(const void* memory) {
    auto& all = blocks();
    all.erase(std::remove_if(all.begin(), all.end(), [&](const Block& b) { return b.memory.get() == memory; }),
              all.end());
  }
  static void release() { blocks().clear(); }

 private:
  static constexpr int64_t kKept = int64_t{16} << 20;
  struct Block {
    Buffer<char> memory;
    int64_t bytes = 0;
    bool taken = false;
  };
  static std::vector<Block>& blocks() {
    thread_local std::vector<Block> kept;
    return kept;
  }
};

// What the rows of slots are multiplied by, (out, in), or (in, out) if not `turned`.
template <class T>
struct SlotWeight {
  TensorView matrix, packed;
  bool turned = true;

  SlotWeight() = default;
  SlotWeight(const TensorView& given, bool turned_) : turned(turned_) {
    if (given.present()) matrix = view_of(given.as<const T>(), {1, given.shape[0], given.shape[1]});
  }
  // Lays it out for several products.
  void pack(Scratch& scratch, int threads) {
    if (!present()) return;
    const int64_t size = product_packed_size(matrix.dtype, outs(), ins());
    packed = view_of(scratch.take<T>(size), {1, size});
    product_pack_cpu(matrix, turned, packed, threads);
  }
  bool present() const { return matrix.present(); }
  int64_t outs() const { return matrix.shape[turned ? 1 : 2]; }
  int64_t ins() const { return matrix.shape[turned ? 2 : 1]; }
  SlotWeight other_way() const {
    SlotWeight w;
    w.matrix = matrix, w.turned = !turned;
    return w;
  }
};

// What an iteration makes of its slots, (B S, width) each. One that nobody needs any more may be another's memory, of
// those that `SlotSide::run` says.
template <class T>
struct SlotRows {
  const T* slots = nullptr;  // that enter
  T *normed = nullptr, *q = nullptr;
  T *token_q = nullptr, *c = nullptr;        // queries as the tokens meet them, and their constants
  T *mean_row = nullptr, *weight = nullptr;  // sums over the tokens by `total`
  T* total = nullptr;                        // sum of weights and constant
  T* value_row = nullptr;                    // mean_row with the affine of the inputs' norm
  T *heads = nullptr, *update = nullptr;
  T *from_update = nullptr, *from_slots = nullptr;  // of a GRU
  T* moved = nullptr;                               // slots after the update
  T *mlp_normed = nullptr, *hidden = nullptr;       // hidden: after ReLU
};

// What a record holds of the rows of one iteration, and how wide. Of each quantity the rows of all kept iterations lie one
// after the other, as a product over several of them takes them; in front of all are the statistics of the tokens.
template <class T>
struct RecordedRows {
  T* SlotRows<T>::*rows;
  int64_t width;
};
template <class T>
std::vector<RecordedRows<T>> recorded_rows(const SlotIterationsParams& p) {
  using S = SlotRows<T>;
  const SlotWeights& w = p.weights;
  const int64_t channels = p.inputs.shape[2], width = p.states.shape[3];
  std::vector<RecordedRows<T>> found{{&S::c, 1}, {&S::weight, 1}, {&S::total, 1}, {&S::q, w.q_weight.shape[0]},
                                     {&S::token_q, channels}, {&S::mean_row, channels},
                                     {&S::heads, w.v_weight.shape[0]}};
  if (w.merge_weight.present()) found.push_back({&S::update, w.merge_weight.shape[0]});
  if (w.gru_weight_ih.present())
    for (T* S::*gates : {&S::from_update, &S::from_slots}) found.push_back({gates, 3 * width});
  return found;
}

template <class T>
class SlotSide {
 protected:
  struct Recorded {
    T* SlotRows<T>::*rows;
    T* first;  // of the first kept iteration
    int64_t pitch;
  };

  SlotSide(const SlotIterationsParams& params, int threads)
      : p_(params),
        w_(params.weights),
        threads_(threads),
        batch_(params.states.shape[1]),
        slots_(params.states.shape[2]),
        width_(params.states.shape[3]),
        tokens_(params.inputs.shape[1]),
        channels_(params.inputs.shape[2]),
        rows_(batch_ * slots_),
        q_(w_.q_weight, true),
        key_(w_.k_weight, false),
        value_(w_.v_weight, true),
        merge_(w_.merge_weight, true),
        from_update_(w_.gru_weight_ih, true),
        from_slots_(w_.gru_weight_hh, true),
        first_(w_.mlp_weight1, true),
        second_(w_.mlp_weight2, true) {
    if (p_.record.present()) {
      record();
    } else {
      for (T** token : {&mean_, &rstd_}) *token = take(batch_ * tokens_);
    }
    key_bias_ = folded_bias(w_.k_weight, w_.k_bias), value_bias_ = folded_bias(w_.v_weight, w_.v_bias);
  }

  std::array<SlotWeight<T>*, 8> weights() {
    return {&q_, &key_, &value_, &merge_, &from_update_, &from_slots_, &first_, &second_};
  }
  // For several iterations. Fewer rows do not pay for a layout of a whole weight, in memory that is new.
  void pack_weights() {
    constexpr int64_t kPackedRows = 64;
    for (SlotWeight<T>* w : weights())
      if (rows_ >= kPackedRows) w->pack(scratch_, threads_);
  }
  void discard_packed_weights() {
    for (SlotWeight<T>* w : weights())
      if (w->packed.present()) scratch_.discard(std::exchange(w->packed, TensorView()).data);
  }
  T* take(int64_t count) { return scratch_.take<T>(count); }
  bool gru() const { return from_update_.present(); }
  bool mlp() const { return first_.present(); }
  int64_t update_width() const { return merge_.present() ? merge_.outs() : value_.outs(); }

  // The rows of the record of one kept iteration, in place of those that `s` has.
  void recorded(int64_t index, SlotRows<T>& s) const {
    for (const Recorded& r : recorded_) s.*r.rows = r.first + index * r.pitch;
  }

  // From the slots to the hidden layer of the MLP. `first`: the statistics of the tokens are not known yet. dots and
  // attn absent: not wanted. May share memory: normed, heads and mlp_normed; q, update, and hidden; mean_row and
  // value_row; slots and moved.
  void run(const SlotRows<T>& s, bool first, const TensorView& dots, const TensorView& attn) {
    gather(s, first, dots, attn);
    move(s);
  }

  void norm_slots(const SlotRows<T>& s) const {
    normalise(s.slots, w_.norm_slots_weight, w_.norm_slots_bias, s.normed);
  }

  // The part of `run` whose rows a record holds, but for `normed`.
  void gather(const SlotRows<T>& s, bool first, const TensorView& dots, const TensorView& attn) {
    norm_slots(s);
    product(s.normed, q_, w_.q_bias, s.q);
    kn_.scaled_copy(T(p_.scale), s.q, s.q, rows_ * q_.outs());
    product(s.q, key_, {}, s.token_q);
    scale_channels(s.token_q, s.token_q);
    for (int64_t r = 0; r < rows_; ++r)
      s.c[r] = key_bias_ ? kn_.dot(s.q + r * q_.outs(), key_bias_, q_.outs()) : T(0);
    attend(s, first, dots, attn);

    for (int64_t r = 0; r < rows_; ++r) {
      s.total[r] = s.weight[r] + T(p_.denominator);
      kn_.divided_copy(s.total[r], s.mean_row + r * channels_, s.mean_row + r * channels_, channels_);
      s.weight[r] /= s.total[r];
    }
    scale_channels(s.mean_row, s.value_row);
    product(s.value_row, value_, {}, s.heads);
    for (int64_t r = 0; value_bias_ && r < rows_; ++r)
      kn_.axpy(s.weight[r], value_bias_, s.heads + r * value_.outs(), value_.outs());
    if (merge_.present()) product(s.heads, merge_, w_.merge_bias, s.update);
    if (gru()) {
      product(merge_.present() ? s.update : s.heads, from_update_, w_.gru_bias_ih, s.from_update);
      product(s.slots, from_slots_, w_.gru_bias_hh, s.from_slots);
    }
  }

  // The rest of it.
  void move(const SlotRows<T>& s) {
    const T* update = merge_.present() ? s.update : s.heads;
    if (s.moved != s.slots) std::copy_n(s.slots, rows_ * width_, s.moved);
    for_rows([&](int64_t r) {
      T* row = s.moved + r * width_;
      if (gru())
        kn_.side.gru(s.from_update + r * 3 * width_, s.from_slots + r * 3 * width_, width_, row);
      else
        kn_.axpy(T(1), update + r * width_, row, width_);
    });
    if (!mlp()) return;
    normalise(s.moved, w_.norm_mlp_weight, w_.norm_mlp_bias, s.mlp_normed);
    product(s.mlp_normed, first_, w_.mlp_bias1, s.hidden);
    kn_.side.relu(s.hidden, rows_ * first_.outs());
  }

  void product(const T* x, const SlotWeight<T>& w, const TensorView& bias, T* out, bool add = false) {
    ProductParams q;
    q.a = view_of(x, {1, rows_, w.ins()}), q.b = w.matrix, q.b_turned = w.turned, q.packed = w.packed;
    q.bias = bias, q.out = view_of(out, {1, rows_, w.outs()}), q.add = add;
    product_cpu(q, threads_);
  }

  // What a pass over the tokens takes, forward and backward.
  void set_tokens(const SlotRows<T>& s, SlotAttendParams& a) const {
    a.keys = a.values = token_rows(p_.inputs);
    a.mean = view_of(mean_, {batch_, tokens_}), a.rstd = view_of(rstd_, {batch_, tokens_});
    a.q = view_of(s.token_q, {batch_, 1, slots_, channels_}), a.c = view_of(s.c, {batch_, 1, slots_});
    a.token_mask = p_.token_mask, a.slot_mask = p_.slot_mask;
    a.groups = p_.groups, a.eps = p_.eps;
  }
  // (B,N,Din) as (B,1,N,Din).
  TensorView token_rows(const TensorView& x) const {
    TensorView v = x;
    v.rank = 4, v.shape[1] = 1, v.shape[2] = tokens_, v.shape[3] = channels_;
    v.stride[1] = 0, v.stride[2] = x.stride[1], v.stride[3] = 1;
    return v;
  }
  TensorView map_of(const TensorView& v) const {
    return v.present() ? view_of(v.as<const T>(), {batch_, 1, slots_, tokens_}) : TensorView();
  }

  // Rows of the tokens' width by the scale of the inputs' norm.
  void scale_channels(const T* x, T* out) const {
    const T* scale = or_null<const T>(w_.norm_input_weight);
    if (!scale && x != out) std::copy_n(x, rows_ * channels_, out);
    for (int64_t r = 0; scale && r < rows_; ++r)
      kn_.side.multiply(x + r * channels_, scale, out + r * channels_, channels_);
  }

  void moments(const T* x, int64_t from, int64_t count, T* mean, T* rstd) const {
    kn_.slots.moments(x + from * width_, width_, count, width_, T(p_.ln_eps), mean, rstd);
    // Slots whose variance overflows become NaN, unlike tokens: so they do in PyTorch, which other backends call.
    for (int64_t r = 0; r < count; ++r)
      if (rstd[r] == 0) rstd[r] = std::numeric_limits<T>::quiet_NaN();
  }
  // body(first row, rows, mean, reciprocal deviation) for blocks of rows, in any order.
  template <class F>
  void for_moments(const T* x, F&& body) const {
    parallel_for(ceil_div(rows_, kRows), threads_, [&](int64_t task, int) {
      T mean[kRows], rstd[kRows];
      const int64_t from = task * kRows, count = std::min(kRows, rows_ - from);
      moments(x, from, count, mean, rstd);
      body(from, count, mean, rstd);
    });
  }

  template <class F>
  void for_rows(F&& body) const {
    parallel_for(ceil_div(rows_, kRows), threads_, [&](int64_t task, int) {
      for (int64_t r = task * kRows; r < std::min(rows_, (task + 1) * kRows); ++r) body(r);
    });
  }

  static constexpr int64_t kRows = 16;  // of a task that goes row by row

  const SlotIterationsParams& p_;
  const SlotWeights& w_;
  const Kernels<T>& kn_ = kernels<T>();
  const int threads_;
  const int64_t batch_, slots_, width_, tokens_, channels_, rows_;
  Scratch scratch_;
  SlotWeight<T> q_, key_, value_, merge_, from_update_, from_slots_, first_, second_;
  std::vector<Recorded> recorded_;
  T *mean_, *rstd_;            // of the tokens
  T *key_bias_, *value_bias_;  // with the shift of the inputs' norm inside; null: zero

 private:
  void record() {
    const int64_t items = p_.items > 0 ? p_.items : batch_;
    T* next = p_.record.as<T>();
    auto place = [&](int64_t of_item, int64_t copies) {
      return std::exchange(next, next + copies * items * of_item) + p_.first_item * of_item;
    };
    mean_ = place(tokens_, 1), rstd_ = place(tokens_, 1);
    for (const RecordedRows<T>& r : recorded_rows<T>(p_))
      recorded_.push_back({r.rows, place(slots_ * r.width, p_.states.shape[0]), items * slots_ * r.width});
  }

  void normalise(const T* x, const TensorView& weight, const TensorView& bias, T* out) const {
    for_moments(x, [&](int64_t from, int64_t count, const T* mean, const T* rstd) {
      for (int64_t r = 0; r < count; ++r)
        kn_.side.normalise(x + (from + r) * width_, width_, mean[r], rstd[r], or_null<const T>(weight),
                           or_null<const T>(bias), out + (from + r) * width_);
    });
  }

  // A pass over the tokens; the first one finds their statistics too.
  void attend(const SlotRows<T>& s, bool first, const TensorView& dots, const TensorView& attn) const {
    SlotAttendForwardParams a;
    set_tokens(s, a);
    a.num = view_of(s.mean_row, {batch_, 1, slots_, channels_}), a.den = view_of(s.weight, {batch_, 1, slots_});
    a.dots = map_of(dots), a.attn = map_of(attn);
    a.norm_eps = first ? p_.ln_eps : -1;
    slot_attend_forward_cpu(a, threads_);
  }

  // bias + weight shift
  T* folded_bias(const TensorView& weight, const TensorView& bias) {
    const TensorView& shift = w_.norm_input_bias;
    if (!shift.present() && !bias.present()) return nullptr;
    const int64_t outs = weight.shape[0];
    T* out = take(outs);
    for (int64_t o = 0; o < outs; ++o) {
      out[o] = bias.present() ? bias.as<const T>()[o] : T(0);
      if (shift.present()) out[o] += kn_.dot(weight.as<const T>() + o * channels_, shift.as<const T>(), channels_);
    }
    return out;
  }
};

// Throws what a caller has got wrong in what forward and backward share.
template <class T>
void check_iterations(const SlotIterationsParams& params);

}  // namespace vidops::cpu
