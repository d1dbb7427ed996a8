// What slot_attend hands on to slot_pass: passes over wide tokens.
#pragma once

#include "launch.cuh"
#include "vidops/slot_attend_cuda.h"

namespace vidops {

// Partial sums that such a pass leaves, [splits] of num and den; 0: slot_pass does not take it.
int slot_pass_splits(const SlotAttendCudaSizes& sizes, bool backward, int64_t shared_limit);

// Where num and den, or the gradients of q and c, go.
struct SlotPassSums {
  float* num;
  float* den;
  int64_t num_split, den_split;
};

// For passes with splits, after all checks. dots and attn are outputs of a forward; of a backward, gradients.
void slot_pass(const SlotAttendCudaInputs& in, const SlotAttendCudaSizes& sizes, const TensorView& dots,
               const TensorView& attn, const SlotAttendCudaBackwardParams* backward, const SlotPassSums& sums,
               void* stream);

}  // namespace vidops
