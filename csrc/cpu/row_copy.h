// Rows taken by index, of elements of any size.
#pragma once

#include "common.h"
#include "kernels.h"

namespace vidops::cpu {

inline int64_t float_bytes(DType dtype) {
  if (dtype == DType::f16 || dtype == DType::bf16) return 2;
  require(dtype == DType::f32 || dtype == DType::f64, "x: expected a floating dtype");
  return dtype == DType::f32 ? 4 : 8;
}

// From x (B,N,D) to a contiguous out (B,K,D).
class RowCopy {
 public:
  RowCopy(const TensorView& x, const TensorView& out)
      : x_(x),
        out_(out),
        size_(float_bytes(x.dtype)),
        width_(x.shape[2] * size_),
        // What no cache will hold until it is used is written past them, without being read first.
        stream_(out.numel() * size_ > kStreamed && width_ % 64 == 0 &&
                reinterpret_cast<uintptr_t>(out.data) % 64 == 0) {}

  // Rows [first, first + count) of item b of out from rows base + index[0, count) of x.
  void run(int64_t b, int64_t base, const int64_t* index, int64_t count, int64_t first) const {
    const int64_t pitch = x_.stride[1] * size_;
    const char* x = x_.as<char>() + b * x_.stride[0] * size_ + base * pitch;
    char* out = out_.as<char>() + (b * out_.shape[1] + first) * width_;
    for (int64_t k = 0; k < count; ++k)
      copy_(x + index[k] * pitch, out + k * width_, width_, x + index[std::min(k + 1, count - 1)] * pitch, stream_);
  }

 private:
  static constexpr int64_t kStreamed = int64_t{16} << 20;
  TensorView x_, out_;
  int64_t size_, width_;
  bool stream_;
  decltype(kernels<float>().copy_row) copy_ = kernels<float>().copy_row;
};

}  // namespace vidops::cpu
