// All iterations of slot attention with one head whose projections of the tokens are absorbed into the slot side, as
// vidops/ops/_slot_iterations.py has them, on CUDA: one call that launches all kernels, forward and backward.
#pragma once

#include "vidops/slot_iterations.h"

namespace vidops {

// Inputs, slots, weights, what has their shape, f32, f16 or bf16 each; states f32; masks and maps f32, slot_mask with 0
// where a slot is shut out.
struct SlotStepsForwardCudaParams : SlotIterationsForwardParams {
  bool gelu = false;     // else ReLU
  TensorView workspace;  // i64 scratch of as many words as its function says
};
// grad_slots is f32; the dots of masked slots have no gradient.
struct SlotStepsBackwardCudaParams : SlotIterationsBackwardParams {
  bool gelu = false;
  TensorView workspace;
};

int64_t slot_steps_forward_workspace_cuda(const SlotStepsForwardCudaParams& params, int device);
int64_t slot_steps_backward_workspace_cuda(const SlotStepsBackwardCudaParams& params, int device);
void slot_steps_forward_cuda(const SlotStepsForwardCudaParams& params, int device, void* stream);
void slot_steps_backward_cuda(const SlotStepsBackwardCudaParams& params, int device, void* stream);

}  // namespace vidops
