// One pass of slot attention over all tokens on CUDA: softmax over the slots, weighted sums of the values. Shapes:
// keys (B,Hk,N,Dk) and values (B,Hv,N,Dv) with Hk, Hv in {1,H}; q (B,H,S,Dk), c (B,H,S), num (B,H,S,Dv), den (B,H,S),
// dots and attn (B,H,S,N), token_mask (B,G,N), slot_mask (B,S), mean and rstd (B,N).
#pragma once

#include "vidops/tensor_view.h"

namespace vidops {

// What both directions read. Everything but keys and values is f32 and contiguous.
struct SlotAttendCudaInputs {
  TensorView keys, values;           // f32, f16 or bf16, of one dtype; the same tensor twice is read once
  TensorView mean, rstd;             // present: a row x of keys and values enters as (x - mean) * rstd
  TensorView q, c;
  TensorView token_mask, slot_mask;  // factors of the weights; 0 shuts a slot out of the softmax. Absent: all ones
  int64_t groups = 1;                // the softmax runs over the S / groups slots of a group
  bool joint = false;                // over the slots of all heads; one group only
  double eps = 0.0;                  // added to the weights before the mask
  TensorView workspace;              // i64 scratch of slot_attend_workspace_cuda() words
};

struct SlotAttendCudaParams {
  SlotAttendCudaInputs in;
  TensorView num, den;    // sums over the tokens of weight times value, and of the weights
  TensorView dots, attn;  // absent when not wanted
};

struct SlotAttendCudaBackwardParams {
  SlotAttendCudaInputs in;
  TensorView grad_num, grad_den;
  TensorView grad_dots, grad_attn;    // absent: zero
  TensorView grad_keys, grad_values;  // f32, contiguous, like keys and values; of the rows after mean and rstd where
                                      // these are present. One buffer if keys and values are one tensor
  bool add = true;                    // to what grad_keys and grad_values hold
  TensorView grad_q, grad_c;
};

struct TokenStatisticsCudaParams {
  TensorView x;           // (B,N,D); f32, f16 or bf16
  TensorView mean, rstd;  // (B,N), f32, contiguous
  double eps = 0.0;       // added to the variance
};

// `width` is the size in bytes of an element of keys; `shared` says that values are the keys.
struct SlotAttendCudaSizes {
  int64_t batch, heads, slots, n, dk, dv, key_heads, value_heads, groups, width;
  bool joint, shared;
};

void slot_attend_forward_cuda(const SlotAttendCudaParams& params, int device, void* stream);
void slot_attend_backward_cuda(const SlotAttendCudaBackwardParams& params, int device, void* stream);
void token_statistics_cuda(const TokenStatisticsCudaParams& params, int device, void* stream);
int64_t slot_attend_workspace_cuda(const SlotAttendCudaSizes& sizes, bool backward, int device);

}  // namespace vidops
