// All iterations of slot attention with one head whose projections of the tokens are absorbed into the slot side, as
// vidops/ops/_slot_iterations.py has them; ReLU in the MLP. Shapes: inputs (B,N,Din), slots (B,S,D), the weights of
// vidops.SlotParams but for what is folded, dots and attn (B,S,N), states (K,B,S,D). All f32, or all f64.
#pragma once

#include "vidops/tensor_view.h"

namespace vidops {

// What is absent may be empty. Everything but inputs is contiguous.
struct SlotIterationsParams {
  TensorView inputs, slots;
  TensorView key, key_bias, value, value_bias;  // (Hq,Din), (Hq), (Hv,Din), (Hv): the affine of the inputs' norm inside
  TensorView norm_slots_weight, norm_slots_bias, q_weight, q_bias, merge_weight, merge_bias;
  TensorView gru_weight_ih, gru_weight_hh, gru_bias_ih, gru_bias_hh;
  TensorView norm_mlp_weight, norm_mlp_bias, mlp_weight1, mlp_bias1, mlp_weight2, mlp_bias2;
  TensorView token_mask, slot_mask;  // (B,G,N) factors of the weights; (B,S) i32, not 0 shuts a slot out
  TensorView out;                    // (B,S,D)
  TensorView states;                 // slots entering the last K iterations
  TensorView dots, attn;             // of the last iteration; absent when not wanted
  int64_t iters = 1, groups = 1;
  double scale = 1.0;        // of the dots
  double eps = 0.0;          // added to the softmax before the mask
  double denominator = 0.0;  // added to a slot's sum of weights
  double ln_eps = 1e-5;
};

// The result does not depend on the number of threads.
void slot_iterations_forward_cpu(const SlotIterationsParams& params, int threads);

}  // namespace vidops
