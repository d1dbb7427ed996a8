// All iterations of slot attention in one launch on CUDA: one head, one softmax over all slots, narrow rows. Shapes:
// inputs (B,N,Din), slots (B,S,D), the weights of vidops.SlotParams, dots and attn (B,S,N), states (K,B,S,D).
#pragma once

#include "vidops/tensor_view.h"

namespace vidops {

// What is absent may be empty. Everything but inputs is f32 and contiguous.
struct SlotIterationsCudaParams {
  TensorView inputs, slots;  // inputs f32, f16 or bf16
  TensorView norm_input_weight, norm_input_bias, norm_slots_weight, norm_slots_bias;
  TensorView q_weight, q_bias, k_weight, k_bias, v_weight, v_bias;  // k_weight transposed: (Din,Hq)
  TensorView merge_weight, merge_bias;
  TensorView gru_weight_ih, gru_weight_hh, gru_bias_ih, gru_bias_hh;
  TensorView norm_mlp_weight, norm_mlp_bias, mlp_weight1, mlp_bias1, mlp_weight2, mlp_bias2;
  TensorView token_mask, slot_mask;  // (B,N) factors of the weights; (B,S), 0 shuts a slot out of the softmax
  TensorView out;                    // (B,S,D)
  TensorView states;                 // slots entering the last K iterations
  TensorView dots, attn;             // of the last iteration; absent when not wanted
  TensorView workspace;              // i64 scratch of slot_iterations_workspace_cuda() words
  int64_t iters = 1;
  double scale = 1.0;        // of the dots
  double eps = 0.0;          // added to the softmax before the mask
  double denominator = 0.0;  // added to a slot's sum of weights
  double ln_eps = 1e-5;
  bool gelu = false;  // else ReLU
  int64_t cluster = 0;  // blocks that share an item, 1, 2, 4 or 8; 0: as many as keep the device busy
};

// Hq, Hv, rows of the merge (0: none) and of the MLP (0: none); `width` is the size of an element of inputs.
struct SlotIterationsCudaSizes {
  int64_t batch, n, din, slots, d, hq, hv, du, hidden, width;
  bool gru;
  int64_t cluster;
};

// -1 where the device, or the kernel, cannot hold such a call.
int64_t slot_iterations_workspace_cuda(const SlotIterationsCudaSizes& sizes, int device);
void slot_iterations_forward_cuda(const SlotIterationsCudaParams& params, int device, void* stream);

}  // namespace vidops
