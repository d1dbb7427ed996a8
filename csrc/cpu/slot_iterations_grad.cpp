// All iterations of slot attention in one call, backward: each is run again from the slots that entered it, or from
// what the forward recorded of it.
//
// The gradient of a weight is a product over rows of slots. Where these are few, iterations are taken together: the
// weights' gradients, which are then larger than anything else, are written once. Where they are many, memory is given
// back as soon as it is used up.
#include "slot_iterations.h"

namespace vidops::cpu {
namespace {

constexpr int64_t kPooledRows = 256;  // of several iterations that are taken together

// (rows, width) of one iteration, or of those that are taken together.
template <class T>
struct Part {
  int64_t width = 0;
  bool pooled = false;
  T* base = nullptr;
};

template <class T>
class IterationsGrad : SlotSide<T> {
 public:
  IterationsGrad(const SlotIterationsBackwardParams& params, int threads)
      : SlotSide<T>(params, threads),
        given_(params),
        g_(params.grads),
        iterations_(params.states.shape[0]),
        pool_(std::clamp<int64_t>(kPooledRows / rows_, 1, iterations_)),
        grad_(params.grad_slots.as<T>()) {
    auto wide = [](int64_t width) { return Part<T>{width, false, nullptr}; };
    auto pooled = [](int64_t width) { return Part<T>{width, true, nullptr}; };
    const int64_t hq = q_.outs(), hv = value_.outs();
    normed_ = pooled(width_), q_rows_ = pooled(hq), grad_q_ = pooled(hq);
    mean_row_ = pooled(channels_), grad_token_q_ = pooled(channels_);
    heads_ = pooled(hv), grad_heads_ = pooled(hv);
    token_q_ = wide(channels_), value_row_ = wide(channels_), grad_row_ = wide(channels_);
    moved_ = wide(width_), grad_normed_ = wide(width_);
    update_ = grad_update_ = pooled(this->update_width());
    if (this->gru()) gates_update_ = gates_slots_ = pooled(3 * width_);
    if (this->mlp()) {
      mlp_normed_ = grad_out_ = pooled(width_);
      hidden_ = grad_hidden_ = pooled(first_.outs());
    }
    if (!params.record.present())
      for (T** one : {&c_, &weight_, &total_}) *one = this->take(rows_);
    for (T** one : {&grad_den_, &grad_c_}) *one = this->take(rows_);
    if (iterations_ > 1 && !params.record.present()) this->pack_weights();
    if (key_bias_) key_bias_grad_ = zeros(hq);
    if (value_bias_) value_bias_grad_ = zeros(hv);
    for (const TensorView* v : {&g_.norm_input_weight, &g_.norm_input_bias, &g_.norm_slots_weight, &g_.norm_slots_bias,
                                &g_.q_bias, &g_.merge_bias, &g_.gru_bias_ih, &g_.gru_bias_hh, &g_.norm_mlp_weight,
                                &g_.norm_mlp_bias, &g_.mlp_bias1, &g_.mlp_bias2})
      if (v->present()) std::fill_n(v->as<T>(), v->numel(), T(0));
  }

  void run() {
    for (int64_t end = iterations_; end > 0; end = first_index_) {
      first_index_ = std::max<int64_t>(0, end - pool_), together_ = end - first_index_;
      for (int64_t index = end - 1; index >= first_index_; --index) iteration(index);
    }
    finish(w_.k_weight, g_.k_weight, key_bias_grad_, g_.k_bias);
    finish(w_.v_weight, g_.v_weight, value_bias_grad_, g_.v_bias);
    TokenNormGradParams tokens;
    tokens.rows = given_.inputs, tokens.grad = given_.grad_inputs;
    tokens.mean = view_of(mean_, {batch_, tokens_}), tokens.rstd = view_of(rstd_, {batch_, tokens_});
    token_norm_grad_cpu(tokens, threads_);
  }

 private:
  void iteration(int64_t index) {
    index_ = index;
    SlotRows<T> s;
    s.slots = given_.states.template as<const T>() + index * rows_ * width_;
    s.normed = hold(normed_), s.moved = hold(moved_);
    if (this->mlp()) s.mlp_normed = hold(mlp_normed_), s.hidden = hold(hidden_);
    given_.record.present() ? resume(s) : again(s);
    this->move(s);
    if (!merge_.present() && !this->gru()) drop(heads_);

    if (this->mlp()) mlp_grad(s);
    drop(moved_);
    const T* grad_update = update_grad(s);
    const T* grad_heads = merge_grad(grad_update, s.heads);
    T* grad_num = gathered_grad(s, grad_heads);
    drop(heads_), drop(update_), drop(grad_heads_), drop(grad_update_), drop(mean_row_);
    tokens_grad(s, grad_num);
    drop(grad_row_), drop(token_q_);
    queries_grad(s);
    drop(q_rows_), drop(grad_token_q_), drop(normed_);
  }

  void again(SlotRows<T>& s) {
    s.q = hold(q_rows_), s.token_q = hold(token_q_), s.mean_row = hold(mean_row_);
    s.value_row = hold(value_row_), s.heads = hold(heads_);
    s.c = c_, s.weight = weight_, s.total = total_;
    if (merge_.present()) s.update = hold(update_);
    if (this->gru()) s.from_update = hold(gates_update_), s.from_slots = hold(gates_slots_);
    this->gather(s, last(), {}, {});
    drop(value_row_);
  }

  // Gates turn into their gradients, and the record may be asked for once more.
  void resume(SlotRows<T>& s) {
    this->norm_slots(s);
    this->recorded(index_, s);
    if (!this->gru()) return;
    s.from_update = copied(s.from_update, gates_update_), s.from_slots = copied(s.from_slots, gates_slots_);
  }

  void mlp_grad(const SlotRows<T>& s) {
    const T* grad_out = kept(grad_, grad_out_);
    T* grad_hidden = hold(grad_hidden_);
    this->product(grad_out, second_.other_way(), {}, grad_hidden);
    kn_.side.relu_grad(s.hidden, grad_hidden, rows_ * first_.outs());
    weight_grad(g_.mlp_weight2, g_.mlp_bias2, grad_out, s.hidden);
    drop(hidden_), drop(grad_out_);
    T* grad_normed = hold(grad_normed_);
    this->product(grad_hidden, first_.other_way(), {}, grad_normed);
    weight_grad(g_.mlp_weight1, g_.mlp_bias1, grad_hidden, s.mlp_normed);
    drop(grad_hidden_), drop(mlp_normed_);
    norm_grad(s.moved, grad_normed, w_.norm_mlp_weight, g_.norm_mlp_weight, g_.norm_mlp_bias);
    drop(grad_normed_);
  }

  // Of the update; `grad_` turns into that of the slots that entered, as far as they reach around the update.
  const T* update_grad(const SlotRows<T>& s) {
    if (!this->gru()) return kept(grad_, grad_update_);
    this->for_rows([&](int64_t r) {
      kn_.side.gru_grad(s.from_update + r * 3 * width_, s.from_slots + r * 3 * width_, s.slots + r * width_, width_,
                        grad_ + r * width_);
    });
    T* grad_update = hold(grad_update_);
    this->product(s.from_update, from_update_.other_way(), {}, grad_update);
    weight_grad(g_.gru_weight_ih, g_.gru_bias_ih, s.from_update, merge_.present() ? s.update : s.heads);
    this->product(s.from_slots, from_slots_.other_way(), {}, grad_, true);
    weight_grad(g_.gru_weight_hh, g_.gru_bias_hh, s.from_slots, s.slots);
    drop(gates_update_), drop(gates_slots_);
    return grad_update;
  }

  const T* merge_grad(const T* grad_update, const T* heads) {
    if (!merge_.present()) return grad_update;
    T* grad_heads = hold(grad_heads_);
    this->product(grad_update, merge_.other_way(), {}, grad_heads);
    weight_grad(g_.merge_weight, g_.merge_bias, grad_update, heads);
    return grad_heads;
  }

  // Of the sums over the tokens: those of their weights to `grad_den_`.
  T* gathered_grad(const SlotRows<T>& s, const T* grad_heads) {
    T* grad_row = hold(grad_row_);
    this->product(grad_heads, value_.other_way(), {}, grad_row);
    this->scale_channels(grad_row, grad_row);
    weight_grad(g_.v_weight, {}, grad_heads, s.mean_row);
    const int64_t hv = value_.outs();
    for (int64_t r = 0; r < rows_; ++r) {
      T* row = grad_row + r * channels_;
      T grad_weight = 0;
      if (value_bias_) {
        grad_weight = kn_.dot(grad_heads + r * hv, value_bias_, hv);
        kn_.axpy(s.weight[r], grad_heads + r * hv, value_bias_grad_, hv);
      }
      const T through = kn_.dot(row, s.mean_row + r * channels_, channels_) + grad_weight * s.weight[r];
      kn_.divided_copy(s.total[r], row, row, channels_);
      grad_den_[r] = (grad_weight - through) / s.total[r];
    }
    return grad_row;
  }

  void tokens_grad(const SlotRows<T>& s, const T* grad_num) {
    SlotAttendBackwardParams a;
    this->set_tokens(s, a);
    a.grad_num = view_of(grad_num, {batch_, 1, slots_, channels_});
    a.grad_den = view_of(grad_den_, {batch_, 1, slots_});
    if (last()) a.grad_dots = this->map_of(given_.grad_dots), a.grad_attn = this->map_of(given_.grad_attn);
    a.grad_keys = a.grad_values = this->token_rows(given_.grad_inputs);
    a.add = !last();
    a.grad_q = view_of(hold(grad_token_q_), {batch_, 1, slots_, channels_});
    a.grad_c = view_of(grad_c_, {batch_, 1, slots_});
    slot_attend_backward_cpu(a, threads_);
  }

  void queries_grad(const SlotRows<T>& s) {
    const int64_t hq = q_.outs();
    const T* grad_token_q = hold(grad_token_q_);
    weight_grad(g_.k_weight, {}, s.q, grad_token_q);
    T* scaled = hold(value_row_);
    this->scale_channels(grad_token_q, scaled);
    T* grad_q = hold(grad_q_);
    this->product(scaled, key_.other_way(), {}, grad_q);
    drop(value_row_);
    for (int64_t r = 0; key_bias_ && r < rows_; ++r) {
      kn_.axpy(grad_c_[r], s.q + r * hq, key_bias_grad_, hq);
      kn_.axpy(grad_c_[r], key_bias_, grad_q + r * hq, hq);
    }
    kn_.scaled_copy(T(given_.scale), grad_q, grad_q, rows_ * hq);
    T* grad_normed = hold(grad_normed_);
    this->product(grad_q, q_.other_way(), {}, grad_normed);
    weight_grad(g_.q_weight, g_.q_bias, grad_q, s.normed);
    drop(grad_q_);
    norm_grad(s.slots, grad_normed, w_.norm_slots_weight, g_.norm_slots_weight, g_.norm_slots_bias);
    drop(grad_normed_);
  }

  // From the gradient of a LayerNorm's result, which is overwritten, to that of its rows, added to `grad_`.
  void norm_grad(const T* x, T* grad, const TensorView& weight, const TensorView& weight_grad,
                 const TensorView& bias_grad) {
    // Sums over rows: not shared among threads, which would change their order.
    for (int64_t from = 0; (weight_grad.present() || bias_grad.present()) && from < rows_; from += kRows) {
      T mean[kRows], rstd[kRows];
      const int64_t count = std::min(kRows, rows_ - from);
      this->moments(x, from, count, mean, rstd);
      for (int64_t r = 0; r < count; ++r)
        kn_.side.affine_grad(x + (from + r) * width_, width_, mean[r], rstd[r], grad + (from + r) * width_,
                             or_null<T>(weight_grad), or_null<T>(bias_grad));
    }
    this->for_moments(x, [&](int64_t from, int64_t count, const T* mean, const T* rstd) {
      for (int64_t r = 0; r < count; ++r) {
        T* row = grad + (from + r) * width_;
        kn_.side.norm_grad(x + (from + r) * width_, width_, mean[r], rstd[r], or_null<const T>(weight), row);
        kn_.axpy(T(1), row, grad_ + (from + r) * width_, width_);
      }
    });
  }

  // weight += grad^T x and bias += the rows of grad, once all iterations that are taken together are there: their rows
  // follow those of this one.
  void weight_grad(const TensorView& weight, const TensorView& bias, const T* grad, const T* x) {
    if (offset() > 0) return;
    const int64_t rows = together_ * rows_, outs = weight.shape[0], ins = weight.shape[1];
    ProductParams p;
    p.a = view_of(grad, {1, rows, outs}), p.a_turned = true;
    p.b = view_of(x, {1, rows, ins});
    p.out = view_of(weight.as<T>(), {1, outs, ins});
    p.add = first_index_ + together_ < iterations_;
    product_cpu(p, threads_);
    for (int64_t r = 0; bias.present() && r < rows; ++r) kn_.axpy(T(1), grad + r * outs, bias.as<T>(), outs);
  }

  // The gradient of a folded projection of the tokens, taken apart.
  void finish(const TensorView& weight, const TensorView& grad, const T* folded_bias_grad,
              const TensorView& bias_grad) {
    const T *scale = or_null<const T>(w_.norm_input_weight), *shift = or_null<const T>(w_.norm_input_bias);
    for (int64_t o = 0; o < weight.shape[0]; ++o) {
      const T* row = weight.as<const T>() + o * channels_;
      T* row_grad = grad.as<T>() + o * channels_;
      if (scale) {
        kn_.side.multiply_add(row, row_grad, g_.norm_input_weight.template as<T>(), channels_);
        kn_.side.multiply(row_grad, scale, row_grad, channels_);
      }
      if (shift) {
        kn_.axpy(folded_bias_grad[o], row, g_.norm_input_bias.template as<T>(), channels_);
        kn_.axpy(folded_bias_grad[o], shift, row_grad, channels_);
      }
    }
    if (bias_grad.present()) std::copy_n(folded_bias_grad, bias_grad.shape[0], bias_grad.as<T>());
  }

  bool last() const { return index_ == iterations_ - 1; }
  int64_t offset() const { return index_ - first_index_; }
  bool stays(const Part<T>& part) const { return part.pooled && pool_ > 1; }
  T* hold(Part<T>& part) {
    if (!part.base) part.base = this->take((stays(part) ? pool_ : 1) * rows_ * part.width);
    return part.base + (stays(part) ? offset() * rows_ * part.width : 0);
  }
  void drop(Part<T>& part) {
    if (stays(part) || !part.base) return;
    scratch_.give(part.base);
    part.base = nullptr;
  }
  // `rows`, copied if they have to outlast this iteration.
  const T* kept(const T* rows, Part<T>& part) {
    return stays(part) ? copied(rows, part) : rows;
  }
  T* copied(const T* rows, Part<T>& part) {
    T* copy = hold(part);
    std::copy_n(rows, rows_ * part.width, copy);
    return copy;
  }
  T* zeros(int64_t count) {
    T* x = this->take(count);
    std::fill_n(x, count, T(0));
    return x;
  }

  using Base = SlotSide<T>;
  using Base::q_, Base::key_, Base::value_, Base::merge_, Base::from_update_, Base::from_slots_, Base::first_;
  using Base::second_, Base::rows_, Base::width_, Base::channels_, Base::batch_, Base::slots_, Base::tokens_;
  using Base::scratch_, Base::w_, Base::kn_, Base::threads_, Base::kRows, Base::mean_, Base::rstd_;
  using Base::key_bias_, Base::value_bias_;

  const SlotIterationsBackwardParams& given_;
  const SlotWeights& g_;
  const int64_t iterations_, pool_;
  T* const grad_;  // of the slots that leave an iteration, then of those that enter it
  int64_t index_ = 0, first_index_ = 0, together_ = 0;
  Part<T> normed_, q_rows_, grad_q_, mean_row_, grad_token_q_, heads_, grad_heads_, token_q_, value_row_, grad_row_;
  Part<T> moved_, grad_normed_, update_, grad_update_, gates_update_, gates_slots_, mlp_normed_, grad_out_, hidden_;
  Part<T> grad_hidden_;
  T *c_, *weight_, *total_, *grad_den_, *grad_c_, *key_bias_grad_ = nullptr, *value_bias_grad_ = nullptr;
};

template <class T>
void check_call(const SlotIterationsBackwardParams& p) {
  check_iterations<T>(p);
  const int64_t batch = p.states.shape[1], slots = p.states.shape[2], tokens = p.inputs.shape[1];
  check_contiguous<T>(p.grad_slots, {batch, slots, p.states.shape[3]}, "grad_slots");
  check_contiguous<T>(p.grad_inputs, {batch, tokens, p.inputs.shape[2]}, "grad_inputs");
  for (const TensorView* v : {&p.grad_dots, &p.grad_attn})
    if (v->present()) check_contiguous<T>(*v, {batch, slots, tokens}, "grad_dots and grad_attn");
  for (TensorView SlotWeights::*one : kSlotWeights) {
    const TensorView &weight = p.weights.*one, &grad = p.grads.*one;
    require(weight.present() == grad.present(), "grads: expected one for each weight");
    if (!weight.present()) continue;
    if (weight.rank == 1)
      check_contiguous<T>(grad, {weight.shape[0]}, "grads");
    else
      check_contiguous<T>(grad, {weight.shape[0], weight.shape[1]}, "grads");
  }
}

}  // namespace
}  // namespace vidops::cpu

namespace vidops {

void slot_iterations_backward_cpu(const SlotIterationsBackwardParams& params, int threads) {
  cpu::dispatch_float(params.grad_slots.dtype, [&](auto zero) {
    using T = decltype(zero);
    cpu::check_call<T>(params);
    cpu::IterationsGrad<T>(params, threads).run();
  });
}

}  // namespace vidops
