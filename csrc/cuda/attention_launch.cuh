// Host side that both attention ops share: sizes, scratch, and the launches of one op's kernels that the other uses.
#pragma once

#include "attention.cuh"
#include "launch.cuh"

namespace vidops::cuda {

constexpr size_t kAttentionSpare = 128;  // for the flag of the map's kernel

struct AttentionSizes {
  int64_t batch, heads, n, m, d;
};

// What a call needs beside its arguments.
struct AttentionNeeds {
  bool split;     // float32 operands, stored as two planes
  bool values;    // v is an operand
  bool gradient;  // backward: row statistics, and with `values` also the output's gradient as an operand
};

// An operand as the caller has it; `view` has shape (B,H,rows,D).
struct AttentionInput {
  TensorView view;
  PackedOperand packed;
  bool poison;
};

// Sizes, scale and scratch pointers; without memory in the arena it only counts.
AttentionArgs attention_plan(const char* op, Arena& arena, const AttentionSizes& sizes, const AttentionNeeds& needs);

inline AttentionSizes attention_sizes(const TensorView& q, const TensorView& k) {
  return {q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.shape[3]};
}

void attention_check(const char* op, const TensorView& q, const TensorView& view, int64_t rows, const char* name);
void attention_set_scale(AttentionArgs& args, double scale);
void attention_set_dropout(const char* op, AttentionArgs& args, double dropout_p, uint64_t seed);
// lse (B,H,N) contiguous and, when present, the map's gradient (B,N,M).
void attention_set_row_inputs(const char* op, AttentionArgs& args, const TensorView& lse, const TensorView& grad_map);

// Packs up to four operands of one dtype.
void attention_launch_pack(const char* op, const AttentionArgs& args, const AttentionInput* inputs, int count,
                           void* stream);
// args.lse, args.lse2 from packed q and k.
void attention_launch_lse(const char* op, const AttentionArgs& args, DType dtype, void* stream);
// args.p, args.log_p from packed q, k and args.lse2.
void attention_launch_map(const char* op, const AttentionArgs& args, DType dtype, void* stream);

// The value product's result and its gradient; absent without one.
struct AttentionValues {
  TensorView grad_out, out;
};

struct AttentionGradients {
  void *q, *k, *v;  // contiguous, in the dtype of the operands; v null without a value product
};

// All gradients from packed operands, args.lse and args.grad_map.
void attention_launch_gradients(const char* op, AttentionArgs args, DType dtype, const AttentionValues& values,
                                const AttentionGradients& out, void* stream);

// Sets args.stages to what fits: two stages where tiles are not streamed in chunks, else one. `tile_rows` are held
// throughout, `stage_rows` per stage, `spare` bytes beside them. Returns the bytes of shared memory.
size_t attention_fit_stages(const char* op, AttentionArgs& args, DType dtype, size_t tile_rows, size_t stage_rows,
                            size_t spare = kAttentionSpare);

// One of three kernels by the operands' dtype.
template <class Kernel>
Kernel attention_kernel(DType dtype, Kernel f32, Kernel f16, Kernel bf16) {
  return dtype == DType::f32 ? f32 : dtype == DType::f16 ? f16 : bf16;
}

}  // namespace vidops::cuda
