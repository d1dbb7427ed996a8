// What the binding files share: capsules in, TensorViews out. Only they know Python.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <iterator>

#include "vidops/slot_iterations.h"
#include "vidops/tensor_view.h"

namespace vidops::bindings {

// The part of the DLPack ABI (version 0.x capsules named "dltensor") that is read here. The layout is the published
// C ABI; declaring it keeps the build free of a dependency that is one struct long.
struct DLTensor {
  void* data;
  struct {
    int32_t type, id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

inline DType dtype_of(const DLTensor& t) {
  enum { kInt = 0, kFloat = 2, kBfloat = 4 };
  const int code = t.dtype.code, bits = t.dtype.bits;
  if (t.dtype.lanes == 1) {
    if (code == kFloat && bits == 32) return DType::f32;
    if (code == kFloat && bits == 64) return DType::f64;
    if (code == kFloat && bits == 16) return DType::f16;
    if (code == kBfloat && bits == 16) return DType::bf16;
    if (code == kInt && bits == 64) return DType::i64;
    if (code == kInt && bits == 32) return DType::i32;
  }
  throw ArgumentError("a tensor of this dtype has no native form");
}

inline TensorView view(const pybind11::capsule& capsule) {
  const auto* t = static_cast<const DLTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
  if (t == nullptr) throw pybind11::error_already_set();
  TensorView v;
  require(t->ndim <= kMaxRank, "a tensor has more dimensions than the native layer takes");
  v.dtype = dtype_of(*t);
  const int32_t kCpu = 1;
  v.device = t->device.type == kCpu ? Device::cpu : Device::cuda;
  v.device_index = t->device.id;
  v.rank = t->ndim;
  int64_t packed = 1;
  for (int i = t->ndim - 1; i >= 0; --i) {
    v.shape[i] = t->shape[i];
    v.stride[i] = t->strides != nullptr ? t->strides[i] : packed;
    packed *= t->shape[i];
  }
  v.data = static_cast<char*>(t->data) + (t->data != nullptr ? t->byte_offset : 0);
  // FakeTensors have a null address: refuse them instead of reading it.
  require(packed == 0 || t->data != nullptr, "a tensor has no memory behind it");
  // An empty tensor counts as contiguous for torch, whatever its strides.
  require(packed == 0 || v.rank == 0 || v.shape[v.rank - 1] <= 1 || v.stride[v.rank - 1] == 1,
          "a tensor's last axis is not contiguous");
  return v;
}

inline SlotWeights slot_weights(const pybind11::list& given) {
  SlotWeights weights;
  require(given.size() == std::size(kSlotWeights), "weights: expected one entry for each");
  for (size_t i = 0; i < given.size(); ++i) weights.*kSlotWeights[i] = view(given[i].cast<pybind11::capsule>());
  return weights;
}

// Registers the CUDA entry points.
void bind_cuda(pybind11::module_& module);

}  // namespace vidops::bindings
