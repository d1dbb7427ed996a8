// A non-owning, self-describing view of a tensor: what a kernel launcher needs and nothing else.
// No torch, no CUDA, no Python: the cores below csrc/ compile without any of them.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace vidops {

enum class DType : int32_t { f32, f64, f16, bf16, i64, i32 };
enum class Device : int32_t { cpu, cuda };

constexpr int kMaxRank = 6;

struct TensorView {
  void* data = nullptr;  // first element; null only for empty or absent tensors
  DType dtype = DType::f32;
  Device device = Device::cpu;
  int32_t device_index = 0;
  int32_t rank = 0;
  int64_t shape[kMaxRank] = {};
  int64_t stride[kMaxRank] = {};  // in elements; the last one is 1 for every tensor the bindings let through

  bool present() const { return rank > 0 && !(rank == 1 && shape[0] == 0); }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= shape[i];
    return n;
  }
  bool contiguous() const {
    if (numel() == 0) return true;
    int64_t packed = 1;
    for (int i = rank - 1; i >= 0; --i) {
      if (shape[i] > 1 && stride[i] != packed) return false;
      packed *= shape[i];
    }
    return true;
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// Wrong arguments that reached the native layer (the Python hub checks first; this is the second line).
struct ArgumentError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

inline void require(bool condition, const std::string& message) {
  if (!condition) throw ArgumentError(message);
}

}  // namespace vidops
