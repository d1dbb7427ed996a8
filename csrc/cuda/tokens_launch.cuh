// Host side of what bipartite_match and sta_score share.
#pragma once

#include "launch.cuh"
#include "tokens.cuh"

namespace vidops::cuda {

inline bool holds_storage(DType dtype) { return dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16; }

// Rows (items, tokens, width), whose last axis is contiguous; doubles where they are allowed.
inline TokenRows token_rows(const char* op, const char* name, const TensorView& v, bool f64 = false) {
  require(holds_storage(v.dtype) || (f64 && v.dtype == DType::f64),
          std::string(op) + ": " + name + " has an unsupported dtype");
  require(v.rank == 3 && v.shape[1] > 0 && v.shape[2] > 0, std::string(op) + ": " + name + " has the axes (B,N,D)");
  TokenRows rows{};
  const int64_t size = v.dtype == DType::f64 ? 8 : v.dtype == DType::f32 ? 4 : 2;
  rows.data = v.data;
  // Strides of an axis of one element may be anything.
  rows.item = v.shape[0] > 1 ? v.stride[0] : 0, rows.row = v.shape[1] > 1 ? v.stride[1] : 0;
  rows.width = to_int(op, v.shape[2]);
  rows.whole = rows.width % 4 == 0 && reinterpret_cast<uintptr_t>(v.data) % (4 * size) == 0 && rows.item % 4 == 0 &&
               rows.row % 4 == 0;
  return rows;
}

inline void require_result(const char* op, const TensorView& v, DType dtype, std::initializer_list<int64_t> shape) {
  require(v.dtype == dtype && v.contiguous() && v.rank == static_cast<int>(shape.size()),
          std::string(op) + ": a result has another dtype, rank or layout");
  int axis = 0;
  for (int64_t extent : shape)
    require(v.shape[axis++] == extent, std::string(op) + ": a result has another shape");
}

inline int64_t power_of_two_from(int64_t count) {
  int64_t slots = 1;
  while (slots < count) slots *= 2;
  return slots;
}

}  // namespace vidops::cuda
