// The CUDA half of the module: one thin function per launcher. The tests bind the same file to the host shim.
#include <cstdint>

#include "bindings.h"
#include "vidops/greedy_absorb.h"
#include "vidops/greedy_absorb_kl.h"
#include "vidops/segment_mean.h"
#include "vidops/symmetric_kl.h"
#include "vidops/symmetric_kl_adjacency.h"

namespace vidops::bindings {

void bind_cuda(pybind11::module_& m) {
  namespace py = pybind11;
  using py::capsule;

  m.def("greedy_absorb_workspace_cuda", &greedy_absorb_workspace_cuda);
  m.def("greedy_absorb_kl_workspace_cuda", &greedy_absorb_kl_workspace_cuda);
  m.def("segment_mean_workspace_cuda", &segment_mean_workspace_cuda);
  m.def("symmetric_kl_workspace_cuda", &symmetric_kl_workspace_cuda);
  m.def("symmetric_kl_adjacency_workspace_cuda", &symmetric_kl_adjacency_workspace_cuda);
  m.def("greedy_absorb_forward_cuda", [](capsule adjacency, capsule owner, capsule label, capsule count,
                                         capsule workspace, int device, uintptr_t stream) {
    GreedyAbsorbParams a;
    a.adjacency = view(adjacency), a.owner = view(owner), a.label = view(label), a.count = view(count);
    a.workspace = view(workspace);
    py::gil_scoped_release release;
    greedy_absorb_forward_cuda(a, device, reinterpret_cast<void*>(stream));
  });
  m.def("greedy_absorb_kl_forward_cuda",
        [](capsule p, capsule log_p, capsule owner, capsule label, capsule count, capsule workspace,
           double tau, int device, uintptr_t stream) {
          GreedyAbsorbKlParams a;
          a.p = view(p), a.log_p = view(log_p);
          a.owner = view(owner), a.label = view(label), a.count = view(count);
          a.workspace = view(workspace), a.tau = tau;
          py::gil_scoped_release release;
          greedy_absorb_kl_forward_cuda(a, device, reinterpret_cast<void*>(stream));
        });
  m.def("segment_mean_forward_cuda",
        [](capsule x, capsule label, capsule mean, capsule workspace, int device, uintptr_t stream) {
          SegmentMeanParams a;
          a.x = view(x), a.label = view(label), a.mean = view(mean);
          a.workspace = view(workspace);
          py::gil_scoped_release release;
          segment_mean_forward_cuda(a, device, reinterpret_cast<void*>(stream));
        });
  m.def("symmetric_kl_forward_cuda",
        [](capsule p, capsule log_p, capsule q, capsule log_q, capsule distance, capsule workspace, bool same,
           int device, uintptr_t stream) {
          SymmetricKlParams a;
          a.p = view(p), a.log_p = view(log_p), a.q = view(q), a.log_q = view(log_q);
          a.distance = view(distance), a.workspace = view(workspace), a.same = same;
          py::gil_scoped_release release;
          symmetric_kl_forward_cuda(a, device, reinterpret_cast<void*>(stream));
        });
  m.def("symmetric_kl_adjacency_forward_cuda",
        [](capsule p, capsule log_p, capsule adjacency, capsule workspace, double tau, bool filtered,
           int device, uintptr_t stream) {
          SymmetricKlAdjacencyParams a;
          a.p = view(p), a.log_p = view(log_p), a.adjacency = view(adjacency);
          a.workspace = view(workspace), a.tau = tau, a.filtered = filtered;
          py::gil_scoped_release release;
          symmetric_kl_adjacency_forward_cuda(a, device, reinterpret_cast<void*>(stream));
        });
}

}  // namespace vidops::bindings
