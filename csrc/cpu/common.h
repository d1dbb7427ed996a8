// What every CPU operator needs: aligned scratch, a parallel loop that exceptions cannot escape, argument
// checks.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "vidops/tensor_view.h"

namespace vidops::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) { resize(count); }
  void resize(int64_t count) {
    // Large scratch on huge pages: first-touch faults on 4 KB pages cost as much as packing the data.
    constexpr int64_t kHuge = int64_t{2} << 20;
    const int64_t wanted = std::max<int64_t>(count, 1) * static_cast<int64_t>(sizeof(T));
    const int64_t alignment = wanted >= 2 * kHuge ? kHuge : 64;
    const size_t bytes = static_cast<size_t>(round_up(wanted, alignment));
    memory_.reset(static_cast<T*>(std::aligned_alloc(static_cast<size_t>(alignment), bytes)));
    if (!memory_) throw std::bad_alloc();
#if defined(__linux__)
    if (alignment == kHuge)
      madvise(memory_.get(), bytes, MADV_HUGEPAGE);  // advice only: a refusal changes nothing
#endif
  }
  T* get() const { return memory_.get(); }
  T& operator[](int64_t i) const { return memory_.get()[i]; }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> memory_;
};

int thread_index();

// Runs body(task, thread) for every task. Tasks are independent and own their outputs, so the result does not
// depend on the number of threads. The first exception is rethrown after the region.
template <class F>
void parallel_for(int64_t tasks, int threads, F&& body) {
  if (tasks <= 0) return;
  const int team = static_cast<int>(std::min<int64_t>(std::max(threads, 1), tasks));
  if (team == 1) {
    for (int64_t t = 0; t < tasks; ++t) body(t, 0);
    return;
  }
  std::exception_ptr error;
  std::atomic<bool> failed{false};
#pragma omp parallel for num_threads(team) schedule(dynamic, 1)
  for (int64_t t = 0; t < tasks; ++t) {
    if (failed.load(std::memory_order_relaxed)) continue;
    try {
      body(t, thread_index());
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

template <class T>
constexpr DType dtype_of() {
  return sizeof(T) == 4 ? DType::f32 : DType::f64;
}

inline void check(const TensorView& v, int rank, DType dtype, const char* name) {
  require(v.rank == rank, std::string(name) + ": expected rank " + std::to_string(rank));
  require(v.dtype == dtype, std::string(name) + ": unexpected dtype");
  require(v.device == Device::cpu, std::string(name) + ": expected a CPU tensor");
  require(v.numel() == 0 || v.data != nullptr, std::string(name) + ": no data");
  require(v.shape[rank - 1] <= 1 || v.stride[rank - 1] == 1,
          std::string(name) + ": last axis must be contiguous");
}

inline void check_shape(const TensorView& v, std::initializer_list<int64_t> shape, const char* name) {
  int axis = 0;
  for (int64_t extent : shape) {
    require(v.shape[axis] == extent, std::string(name) + ": axis " + std::to_string(axis) + " has " +
                                         std::to_string(v.shape[axis]) + " elements, expected " +
                                         std::to_string(extent));
    ++axis;
  }
}

template <class T>
void check_contiguous(const TensorView& v, std::initializer_list<int64_t> shape, const char* name) {
  check(v, static_cast<int>(shape.size()), dtype_of<T>(), name);
  check_shape(v, shape, name);
  require(v.contiguous(), std::string(name) + ": expected a contiguous tensor");
}

// Calls body(T{}) with the element type of a floating tensor.
template <class F>
void dispatch_float(DType dtype, F&& body) {
  if (dtype == DType::f32) return body(float{});
  if (dtype == DType::f64) return body(double{});
  throw ArgumentError("the CPU kernels take float32 or float64");
}

// Philox-4x32-10, first word of the block whose counter is the element's index.
inline uint32_t philox_word(uint64_t seed, uint64_t element) {
  uint32_t c0 = static_cast<uint32_t>(element), c1 = static_cast<uint32_t>(element >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t m0 = uint64_t{0xD2511F53u} * c0, m1 = uint64_t{0xCD9E8D57u} * c2;
    const uint32_t n0 = static_cast<uint32_t>(m1 >> 32) ^ c1 ^ k0,
                   n2 = static_cast<uint32_t>(m0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(m1);
    c3 = static_cast<uint32_t>(m0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

// Dropout on softmax weights: keep iff word >= floor(p * 2^32), kept weights grow by 1/(1-p).
struct Dropout {
  uint64_t seed = 0;
  uint64_t threshold = 0;
  double grow = 1.0;
  Dropout(double p, uint64_t s) : seed(s) {
    require(p >= 0.0 && p < 1.0, "dropout_p must lie in [0, 1)");
    threshold = static_cast<uint64_t>(std::floor(p * 4294967296.0));
    grow = 1.0 / (1.0 - p);
    active = p > 0.0;
  }
  bool active = false;
  double factor(uint64_t element) const { return philox_word(seed, element) >= threshold ? grow : 0.0; }
};

}  // namespace vidops::cpu
