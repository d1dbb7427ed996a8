// One pass of slot attention over the tokens: dots, softmax over the slots, weighted sums; and its backward. H heads of
// S slots meet N tokens; Hk and Hv are 1 (keys or values shared by all heads) or H. Shapes: keys (B,Hk,N,Dk), values
// (B,Hv,N,Dv), mean and rstd (B,N), q (B,H,S,Dk), c (B,H,S), token_mask (B,G,N), slot_mask (B,S), num (B,H,S,Dv), den
// (B,H,S), dots and attn (B,H,S,N). slot_mask is i32; everything else is f32, or everything is f64.
#pragma once

#include "vidops/tensor_view.h"

namespace vidops {

// dots = q.k + c, -inf where slot_mask is not 0. a = softmax of the dots over the S / groups slots of a group, per head
// (joint: over all H * S). w = (a + eps) * token_mask.
struct SlotAttendParams {
  TensorView keys, values;
  TensorView mean, rstd;             // present: keys and values are raw rows x, used as (x - mean) * rstd
  TensorView q, c;                   // contiguous
  TensorView token_mask, slot_mask;  // absent: none
  int64_t groups = 1;
  bool joint = false;
  double eps = 0.0;
};

struct SlotAttendForwardParams : SlotAttendParams {
  TensorView num, den;    // sum of w V and of w over the tokens; contiguous
  TensorView dots, attn;  // contiguous; absent when not wanted
  double norm_eps = -1;   // not negative: mean and rstd are results, those of `token_statistics_cpu` but for rounding
};

struct SlotAttendBackwardParams : SlotAttendParams {
  TensorView grad_num, grad_den;      // contiguous
  TensorView grad_dots, grad_attn;    // contiguous; absent: zero. The dots of masked slots pass nothing back.
  TensorView grad_keys, grad_values;  // like keys and values; may be one tensor
  bool add = true;                    // to what they hold
  TensorView grad_q, grad_c;          // contiguous
};

// rows (B,N,D), mean and rstd (B,N): what a LayerNorm makes of every row.
struct TokenStatisticsParams {
  TensorView rows;
  TensorView mean, rstd;  // contiguous
  double eps = 1e-5;
};

// The result does not depend on the number of threads.
void slot_attend_forward_cpu(const SlotAttendForwardParams& params, int threads);
void slot_attend_backward_cpu(const SlotAttendBackwardParams& params, int threads);
void token_statistics_cpu(const TokenStatisticsParams& params, int threads);

}  // namespace vidops
