// The CUDA half of the module: one thin function per launcher. The tests bind the same file to the host shim.
#include <cstdint>

#include "bindings.h"
#include "vidops/greedy_absorb.h"
#include "vidops/segment_mean.h"

namespace vidops::bindings {

void bind_cuda(pybind11::module_& m) {
  namespace py = pybind11;
  using py::capsule;

  m.def("greedy_absorb_workspace_cuda", &greedy_absorb_workspace_cuda);
  m.def("segment_mean_workspace_cuda", &segment_mean_workspace_cuda);
  m.def("greedy_absorb_forward_cuda", [](capsule adjacency, capsule owner, capsule label, capsule count,
                                         capsule workspace, int device, uintptr_t stream) {
    GreedyAbsorbParams a;
    a.adjacency = view(adjacency), a.owner = view(owner), a.label = view(label), a.count = view(count);
    a.workspace = view(workspace);
    py::gil_scoped_release release;
    greedy_absorb_forward_cuda(a, device, reinterpret_cast<void*>(stream));
  });
  m.def("segment_mean_forward_cuda",
        [](capsule x, capsule label, capsule mean, capsule workspace, int device, uintptr_t stream) {
          SegmentMeanParams a;
          a.x = view(x), a.label = view(label), a.mean = view(mean);
          a.workspace = view(workspace);
          py::gil_scoped_release release;
          segment_mean_forward_cuda(a, device, reinterpret_cast<void*>(stream));
        });
}

}  // namespace vidops::bindings
