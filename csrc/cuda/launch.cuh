// Host side of the launchers: device selection, launches, scratch memory. Every failure is an exception.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "device.cuh"
#include "vidops/tensor_view.h"

#ifndef VIDOPS_SHIM
#include <cuda_runtime.h>
#endif

namespace vidops::cuda {

#ifdef VIDOPS_SHIM

using Grid = shim::Index;

class DeviceGuard {
 public:
  DeviceGuard(const char*, int) {}
};

inline void zero_async(const char*, void* data, size_t bytes, void*) { std::memset(data, 0, bytes); }

inline size_t shared_limit(const char*) { return shim::machine().shared_limit; }

inline int multiprocessors(const char*) { return shim::machine().multiprocessors; }

template <class Kernel>
int thread_limit(const char*, Kernel) {
  return 1024;
}

template <class Kernel>
int cluster_limit(const char*, Kernel) {
  return 8;
}

#define VIDOPS_LAUNCH_CLUSTERS(op, kernel, grid, cluster, threads, shared_bytes, stream, ...)               \
  do {                                                                                                      \
    (void)(stream);                                                                                         \
    const auto vidops_kernel = kernel;                                                                      \
    ::shim::launch(                                                                                         \
        grid, ::shim::Index{(unsigned)(threads), 1, 1}, shared_bytes, [&] { vidops_kernel(__VA_ARGS__); }, \
        op, cluster);                                                                                       \
  } while (0)

#define VIDOPS_LAUNCH(op, kernel, grid, threads, shared_bytes, stream, ...)                                     \
  do {                                                                                                          \
    (void)(stream);                                                                                             \
    ::shim::launch(grid, ::shim::Index{(unsigned)(threads), 1, 1}, shared_bytes, [&] { kernel(__VA_ARGS__); }, \
                   #kernel);                                                                                    \
  } while (0)

#else

struct Grid {
  unsigned x = 1, y = 1, z = 1;
};

inline void check(const char* op, const char* what, cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(op) + ": " + what + ": " + cudaGetErrorName(error) + ", " +
                           cudaGetErrorString(error));
}

// Makes `device` current for one call and gives the caller's device back.
class DeviceGuard {
 public:
  DeviceGuard(const char* op, int device) {
    check(op, "cudaGetDevice", cudaGetDevice(&previous_));
    if (device != previous_) check(op, "cudaSetDevice", cudaSetDevice(device));
    restore_ = device != previous_;
  }
  ~DeviceGuard() {
    if (restore_) (void)cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool restore_ = false;
};

inline void zero_async(const char* op, void* data, size_t bytes, void* stream) {
  check(op, "cudaMemsetAsync", cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream)));
}

// Shared memory that a block may ask for on the current device: 227 KB on Hopper, 163 on A100, 99 on most others.
inline size_t shared_limit(const char* op) {
  int device = 0, bytes = 0;
  check(op, "cudaGetDevice", cudaGetDevice(&device));
  check(op, "cudaDeviceGetAttribute",
        cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return static_cast<size_t>(bytes);
}

inline int multiprocessors(const char* op) {
  int device = 0, count = 0;
  check(op, "cudaGetDevice", cudaGetDevice(&device));
  check(op, "cudaDeviceGetAttribute", cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// Threads that a block of the kernel may have, by the launch bounds of the code that the current device runs.
template <class Kernel>
int thread_limit(const char* op, Kernel kernel) {
  cudaFuncAttributes attributes{};
  check(op, "cudaFuncGetAttributes", cudaFuncGetAttributes(&attributes, kernel));
  return attributes.maxThreadsPerBlock;
}

// Blocks of a cluster that every device of a kind takes; 1 where there are no clusters, or where the kernel knows of
// none: PTX of sm_80 runs on newer devices as well, and takes every block for the first of its cluster.
template <class Kernel>
int cluster_limit(const char* op, Kernel kernel) {
  int device = 0, major = 0;
  check(op, "cudaGetDevice", cudaGetDevice(&device));
  check(op, "cudaDeviceGetAttribute", cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  cudaFuncAttributes attributes{};
  check(op, "cudaFuncGetAttributes", cudaFuncGetAttributes(&attributes, kernel));
  return major >= 9 && attributes.ptxVersion >= 90 ? 8 : 1;
}

// More than 48 KB of dynamic shared memory must be asked for, per device; the call is a table look-up in the
// runtime.
template <class Kernel>
void allow_shared(const char* op, Kernel kernel, size_t bytes) {
  if (bytes > 48 * 1024)
    check(op, "cudaFuncSetAttribute",
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
}

#define VIDOPS_LAUNCH(op, kernel, grid, threads, shared_bytes, stream, ...)                                      \
  do {                                                                                                           \
    const ::vidops::cuda::Grid vidops_grid = grid;                                                               \
    ::vidops::cuda::allow_shared(op, kernel, shared_bytes);                                                      \
    kernel<<<dim3(vidops_grid.x, vidops_grid.y, vidops_grid.z), dim3(threads), shared_bytes,                     \
             static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__);                                                  \
    ::vidops::cuda::check(op, #kernel, cudaGetLastError());                                                      \
  } while (0)

// The same in clusters of blocks that lie side by side; one of a block is an ordinary launch, on any device.
template <class Kernel, class... Args>
void launch_clusters(const char* op, Kernel kernel, Grid grid, int cluster, int threads, size_t shared_bytes,
                     void* stream, Args... args) {
  allow_shared(op, kernel, shared_bytes);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid.x, grid.y, grid.z);
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  check(op, "cudaLaunchKernelEx", cudaLaunchKernelEx(&config, kernel, args...));
}

#define VIDOPS_LAUNCH_CLUSTERS(op, kernel, grid, cluster, threads, shared_bytes, stream, ...) \
  ::vidops::cuda::launch_clusters(op, kernel, grid, cluster, threads, shared_bytes, stream, __VA_ARGS__)

#endif

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Grid dimension x, which alone is large enough for element counts.
inline unsigned grid_x(const char* op, int64_t blocks) {
  require(blocks <= 0x7fffffff, std::string(op) + ": too large for one launch");
  return static_cast<unsigned>(blocks);
}

inline unsigned grid_yz(const char* op, int64_t blocks) {
  require(blocks <= 65535, std::string(op) + ": too large for one launch");
  return static_cast<unsigned>(blocks);
}

inline bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// Lanes of a warp, a power of two, that share a row of so many pieces, so that each has four loads in flight.
inline int lanes_of_row(int64_t pieces) {
  int lanes = 1;
  while (lanes < kWarp && lanes * 4 < pieces) lanes *= 2;
  return lanes;
}

// Rows and columns are int in the kernels; offsets are 64 bit.
inline int to_int(const char* op, int64_t value) {
  require(value >= 0 && value <= 0x3fffffff, std::string(op) + ": dimension out of range");
  return static_cast<int>(value);
}

// Cuts aligned pieces out of the scratch tensor. Without memory it only counts, so one function lays out the
// scratch and states its size.
class Arena {
 public:
  Arena() = default;
  Arena(const char* op, const TensorView& workspace, int64_t words_needed) {
    require(workspace.dtype == DType::i64 && workspace.numel() >= words_needed,
            std::string(op) + ": workspace must hold " + std::to_string(words_needed) + " int64 words");
    base_ = static_cast<char*>(workspace.data);
    require(reinterpret_cast<uintptr_t>(base_) % 16 == 0, std::string(op) + ": workspace must be 16-byte aligned");
  }

  template <class T>
  T* take(int64_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 128);
    return piece;
  }

  int64_t words() const { return used_ / 8; }

 private:
  char* base_ = nullptr;
  int64_t used_ = 0;
};

inline void require_dtype(const char* op, const char* name, const TensorView& view, DType dtype) {
  require(view.dtype == dtype, std::string(op) + ": " + name + " has an unsupported dtype");
}

}  // namespace vidops::cuda
