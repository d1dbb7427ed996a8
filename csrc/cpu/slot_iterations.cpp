// All iterations of slot attention in one call, forward.
#include "slot_iterations.h"

namespace vidops::cpu {
namespace {

template <class T>
class Iterations : SlotSide<T> {
 public:
  Iterations(const SlotIterationsForwardParams& params, int threads) : SlotSide<T>(params, threads), given_(params) {
    if (given_.iters > 1) this->pack_weights();
    int64_t widest = width_;
    for (const SlotWeight<T>* w : this->weights())
      if (w->present()) widest = std::max(widest, w->outs());
    T *a = this->take(rows_ * widest), *b = this->take(rows_ * widest);
    s_.normed = s_.heads = s_.mlp_normed = a, s_.q = s_.update = s_.hidden = b;
    s_.from_update = merge_.present() ? a : b;
    if (this->gru()) s_.from_slots = this->take(rows_ * 3 * width_);
    s_.token_q = this->take(rows_ * channels_);
    s_.mean_row = s_.value_row = this->take(rows_ * channels_);
    for (T** one : {&s_.c, &s_.weight, &s_.total}) *one = this->take(rows_);
    s_.slots = s_.moved = given_.out.as<T>();
  }

  void run() {
    const int64_t size = rows_ * width_, kept = given_.states.shape[0];
    T* slots = s_.moved;
    std::copy_n(given_.slots.template as<const T>(), size, slots);
    for (int64_t step = 0; step < given_.iters; ++step) {
      const int64_t state = step - (given_.iters - kept);
      if (state >= 0) std::copy_n(slots, size, given_.states.template as<T>() + state * given_.states.stride[0]);
      const bool last = step == given_.iters - 1;
      SlotRows<T> s = s_;
      if (state >= 0) this->recorded(state, s);
      SlotSide<T>::run(s, step == 0, last ? given_.dots : TensorView(), last ? given_.attn : TensorView());
      if (this->mlp()) this->product(s.hidden, second_, w_.mlp_bias2, slots, true);
    }
    // Before a backward, which needs memory, but no weights in this layout.
    if (given_.record.present()) this->discard_packed_weights();
  }

 private:
  using Base = SlotSide<T>;
  using Base::second_, Base::merge_, Base::rows_, Base::width_, Base::channels_, Base::scratch_, Base::w_;
  const SlotIterationsForwardParams& given_;
  SlotRows<T> s_;
};

// Items from `first` on of what has one entry per item along `axis`.
TensorView items_of(const TensorView& v, int64_t first, int64_t count, int axis = 0) {
  TensorView part = v;
  if (!v.present()) return part;
  const int64_t bytes = v.dtype == DType::f64 ? 8 : 4;
  part.data = static_cast<char*>(v.data) + first * v.stride[axis] * bytes;
  part.shape[axis] = count;
  return part;
}

// How many items are run through all iterations before the next ones. Where weights are few, as many as the cache keeps
// the tokens of from one iteration to the next; else all, so that weights are read once.
template <class T>
int64_t items_together(const SlotIterationsForwardParams& p) {
  constexpr int64_t kWeights = int64_t{256} << 10, kTokens = int64_t{1} << 20;  // bytes, of an L2 of one or two MiB
  int64_t weights = 0;
  for (TensorView SlotWeights::*one : kSlotWeights)
    if ((p.weights.*one).present()) weights += (p.weights.*one).numel();
  const int64_t batch = p.slots.shape[0], item = p.inputs.shape[1] * p.inputs.shape[2] * int64_t(sizeof(T));
  return weights * int64_t(sizeof(T)) > kWeights ? batch : std::clamp<int64_t>(kTokens / item, 1, batch);
}

template <class T>
void run_items(const SlotIterationsForwardParams& p, int threads) {
  const int64_t batch = p.slots.shape[0], step = items_together<T>(p);
  for (int64_t first = 0; first < batch; first += step) {
    const int64_t count = std::min(step, batch - first);
    SlotIterationsForwardParams part = p;
    for (TensorView SlotIterationsForwardParams::*one :
         {&SlotIterationsForwardParams::slots, &SlotIterationsForwardParams::out, &SlotIterationsForwardParams::dots,
          &SlotIterationsForwardParams::attn})
      part.*one = items_of(p.*one, first, count);
    part.items = batch, part.first_item = first;
    part.inputs = items_of(p.inputs, first, count), part.states = items_of(p.states, first, count, 1);
    part.token_mask = items_of(p.token_mask, first, count), part.slot_mask = items_of(p.slot_mask, first, count);
    Iterations<T>(part, threads).run();
  }
}

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

}  // namespace

template <class T>
void check_iterations(const SlotIterationsParams& p) {
  const SlotWeights& w = p.weights;
  check(p.inputs, 3, dtype_of<T>(), "inputs");
  check(p.states, 4, dtype_of<T>(), "states");
  require(p.states.contiguous(), "states: expected a contiguous tensor");
  const int64_t width = p.states.shape[3], channels = p.inputs.shape[2];
  check_shape(p.inputs, {p.states.shape[1], p.inputs.shape[1], channels}, "inputs");
  require(p.states.numel() > 0 && p.inputs.numel() > 0, "inputs and states: expected at least one of everything");
  const int64_t hq = w.q_weight.shape[0], hv = w.v_weight.shape[0];
  check_weight<T>(w.q_weight, hq, width, "q_weight");
  check_weight<T>(w.k_weight, hq, channels, "k_weight");
  check_weight<T>(w.v_weight, hv, channels, "v_weight");
  check_vector<T>(w.q_bias, hq, "q_bias"), check_vector<T>(w.k_bias, hq, "k_bias");
  check_vector<T>(w.v_bias, hv, "v_bias");
  for (const TensorView* v : {&w.norm_input_weight, &w.norm_input_bias}) check_vector<T>(*v, channels, "norm_input");
  int64_t update = hv;
  if (w.merge_weight.present()) {
    update = w.merge_weight.shape[0];
    check_weight<T>(w.merge_weight, update, hv, "merge_weight");
    check_vector<T>(w.merge_bias, update, "merge_bias");
  }
  if (w.gru_weight_ih.present()) {
    check_weight<T>(w.gru_weight_ih, 3 * width, update, "gru_weight_ih");
    check_weight<T>(w.gru_weight_hh, 3 * width, width, "gru_weight_hh");
    check_vector<T>(w.gru_bias_ih, 3 * width, "gru_bias_ih"), check_vector<T>(w.gru_bias_hh, 3 * width, "gru_bias_hh");
  } else {
    require(update == width, "v_weight: expected updates as wide as the slots they are added to");
  }
  if (w.mlp_weight1.present()) {
    const int64_t hidden = w.mlp_weight1.shape[0];
    check_weight<T>(w.mlp_weight1, hidden, width, "mlp_weight1");
    check_weight<T>(w.mlp_weight2, width, hidden, "mlp_weight2");
    check_vector<T>(w.mlp_bias1, hidden, "mlp_bias1"), check_vector<T>(w.mlp_bias2, width, "mlp_bias2");
  }
  for (const TensorView* v : {&w.norm_slots_weight, &w.norm_slots_bias, &w.norm_mlp_weight, &w.norm_mlp_bias})
    check_vector<T>(*v, width, "norm");
  if (p.record.present()) check_contiguous<T>(p.record, {slot_record_size(p)}, "record");
}

template void check_iterations<float>(const SlotIterationsParams&);
template void check_iterations<double>(const SlotIterationsParams&);

}  // namespace vidops::cpu

namespace vidops {

void slot_iterations_forward_cpu(const SlotIterationsForwardParams& params, int threads) {
  cpu::dispatch_float(params.out.dtype, [&](auto zero) {
    using T = decltype(zero);
    cpu::check_iterations<T>(params);
    const TensorView& states = params.states;
    for (const TensorView* v : {&params.slots, &params.out})
      cpu::check_contiguous<T>(*v, {states.shape[1], states.shape[2], states.shape[3]}, "slots and out");
    for (const TensorView* v : {&params.dots, &params.attn})
      if (v->present())
        cpu::check_contiguous<T>(*v, {states.shape[1], states.shape[2], params.inputs.shape[1]}, "dots and attn");
    require(params.iters >= 1 && states.shape[0] <= params.iters, "states: expected at most one per iteration");
    cpu::run_items<T>(params, threads);
  });
}

int64_t slot_record_size(const SlotIterationsParams& p) {
  int64_t row = 0;
  for (const auto& r : cpu::recorded_rows<float>(p)) row += r.width;
  return 2 * p.inputs.shape[0] * p.inputs.shape[1] + p.states.shape[0] * p.states.shape[1] * p.states.shape[2] * row;
}

void slot_iterations_release_cpu() { cpu::Scratch::release(); }

}  // namespace vidops
