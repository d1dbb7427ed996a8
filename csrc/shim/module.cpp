// The CUDA entry points of the extension, bound to the host shim: the tests call the launchers and kernels that run
// on a card, through the same functions and with the same arguments, on CPU tensors.
#include "../bindings.h"
#include "selfcheck.cu"
#include "shim.hpp"

namespace {

using pybind11::capsule;
using vidops::bindings::view;

// a (16, 16 s) and b (16 s, 16) as bfloat16, c (16, 8) f32.
void selfcheck(const capsule& a, const capsule& b, const capsule& c) {
  using namespace vidops::cuda;
  const auto left = view(a), right = view(b), product = view(c);
  const int steps = static_cast<int>(left.shape[1] / 16);
  shim::launch({1, 1, 1}, {32, 1, 1}, sizeof(u16) * (kCheckLeft + kCheckRight),
               [&] { selfcheck_product(left.as<const u16>(), right.as<const u16>(), product.as<float>(), steps); },
               "selfcheck_product");
}

// a and b (64, 64 s) as float16, c (64, 64) f32.
void groups(const capsule& a, const capsule& b, const capsule& c) {
  using namespace vidops::cuda;
  const auto left = view(a), right = view(b), product = view(c);
  const int steps = static_cast<int>(left.shape[1] / 64);
  shim::launch({1, 1, 1}, {128, 1, 1}, 2 * kGroupStage,
               [&] { selfcheck_groups(left.as<const u16>(), right.as<const u16>(), product.as<float>(), steps); },
               "selfcheck_groups");
}

void rotate(const capsule& out, int rounds) {
  const auto target = view(out);
  shim::launch({1, 1, 1}, {128, 1, 1}, 128 * sizeof(int),
               [&] { vidops::cuda::selfcheck_rotate(target.as<int>(), rounds); }, "selfcheck_rotate");
}

// out (clusters x blocks x 64).
void cluster(const capsule& out, int blocks, int rounds) {
  const auto target = view(out);
  shim::launch({static_cast<unsigned>(target.numel() / 64), 1, 1}, {64, 1, 1}, 64 * sizeof(int),
               [&] { vidops::cuda::selfcheck_cluster(target.as<int>(), blocks, rounds); }, "selfcheck_cluster", blocks);
}

void divergent(const capsule& out) {
  const auto target = view(out);
  shim::launch({1, 1, 1}, {64, 1, 1}, 0, [&] { vidops::cuda::selfcheck_divergent(target.as<int>()); },
               "selfcheck_divergent");
}

}  // namespace

// Each build has a name of its own, because one process keeps one module per name.
PYBIND11_MODULE(VIDOPS_SHIM_MODULE, m) {
  pybind11::register_local_exception<vidops::ArgumentError>(m, "ArgumentError", PyExc_ValueError);
  pybind11::register_local_exception<shim::Fault>(m, "Fault", PyExc_RuntimeError);
  m.def("set_seed", [](unsigned seed) { shim::machine().seed = seed; });
  m.def("set_shared_limit", [](size_t bytes) { shim::machine().shared_limit = bytes; });
  m.def("set_multiprocessors", [](int count) { shim::machine().multiprocessors = count; });
  m.def("selfcheck", &selfcheck);
  m.def("groups", &groups);
  m.def("rotate", &rotate);
  m.def("cluster", &cluster);
  m.def("divergent", &divergent);
#ifndef VIDOPS_SHIM_SELFCHECK_ONLY
  vidops::bindings::bind_cuda(m);
#endif
}
