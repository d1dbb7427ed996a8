// All iterations of slot attention with one head whose projections of the tokens are absorbed into the slot side, as
// vidops/ops/_slot_iterations.py has them, forward and backward; ReLU in the MLP. Shapes: inputs (B,N,Din), slots
// (B,S,D), dots and attn (B,S,N), states (K,B,S,D), the weights as vidops.SlotParams. All f32, or all f64.
#pragma once

#include "vidops/tensor_view.h"

namespace vidops {

// In the order of vidops.SlotParams; what is absent may be empty. Contiguous.
struct SlotWeights {
  TensorView norm_input_weight, norm_input_bias, norm_slots_weight, norm_slots_bias;
  TensorView q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, merge_weight, merge_bias;
  TensorView gru_weight_ih, gru_weight_hh, gru_bias_ih, gru_bias_hh;
  TensorView norm_mlp_weight, norm_mlp_bias, mlp_weight1, mlp_bias1, mlp_weight2, mlp_bias2;
};

// By position, for those who go through them all.
constexpr TensorView SlotWeights::*kSlotWeights[] = {
    &SlotWeights::norm_input_weight, &SlotWeights::norm_input_bias, &SlotWeights::norm_slots_weight,
    &SlotWeights::norm_slots_bias,   &SlotWeights::q_weight,        &SlotWeights::q_bias,
    &SlotWeights::k_weight,          &SlotWeights::k_bias,          &SlotWeights::v_weight,
    &SlotWeights::v_bias,            &SlotWeights::merge_weight,    &SlotWeights::merge_bias,
    &SlotWeights::gru_weight_ih,     &SlotWeights::gru_weight_hh,   &SlotWeights::gru_bias_ih,
    &SlotWeights::gru_bias_hh,       &SlotWeights::norm_mlp_weight, &SlotWeights::norm_mlp_bias,
    &SlotWeights::mlp_weight1,       &SlotWeights::mlp_bias1,       &SlotWeights::mlp_weight2,
    &SlotWeights::mlp_bias2};

struct SlotIterationsParams {
  TensorView inputs;                 // the last axis contiguous
  SlotWeights weights;
  TensorView token_mask, slot_mask;  // (B,G,N) factors of the weights; (B,S) i32, not 0 shuts a slot out; or absent
  TensorView states;                 // slots entering the last K iterations; contiguous
  // What the backward would else compute again of those iterations: slot_record_size elements in one row; or absent.
  TensorView record;
  int64_t items = 0, first_item = 0;  // which items of the record these are, of how many; 0: all
  int64_t groups = 1;
  double scale = 1.0;        // of the dots
  double eps = 0.0;          // added to the softmax before the mask
  double denominator = 0.0;  // added to a slot's sum of weights
  double ln_eps = 1e-5;
};

struct SlotIterationsForwardParams : SlotIterationsParams {  // states and record are results
  TensorView slots, out;  // (B,S,D); contiguous
  TensorView dots, attn;  // of the last iteration; contiguous; absent when not wanted
  int64_t iters = 1;
};

// Through the iterations whose states were kept.
struct SlotIterationsBackwardParams : SlotIterationsParams {
  TensorView grad_dots, grad_attn;  // contiguous; absent: zero. The dots of masked slots pass nothing back.
  TensorView grad_slots;            // (B,S,D), contiguous: that of the slots that leave, then of those that enter
  TensorView grad_inputs;           // (B,N,Din), contiguous
  SlotWeights grads;                // one for each weight
};

// The result does not depend on the number of threads.
void slot_iterations_forward_cpu(const SlotIterationsForwardParams& params, int threads);
void slot_iterations_backward_cpu(const SlotIterationsBackwardParams& params, int threads);

// Elements of `record`, given inputs, weights and states.
int64_t slot_record_size(const SlotIterationsParams& params);

// Frees what the calling thread keeps for its next call: at most 16 MiB.
void slot_iterations_release_cpu();

}  // namespace vidops
