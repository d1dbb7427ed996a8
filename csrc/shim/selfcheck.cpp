#include <cstdio>
#include <exception>

#include "selfcheck.cu"

extern "C" int shim_selfcheck(unsigned seed, const unsigned short* a, const unsigned short* b, float* c, int steps,
                              char* error, size_t capacity) {
  using namespace vidops::cuda;
  shim::machine().seed = seed;
  try {
    shim::launch({1, 1, 1}, {32, 1, 1}, sizeof(u16) * (kCheckLeft + kCheckRight),
                 [&] { selfcheck_product(a, b, c, steps); }, "selfcheck_product");
    return 0;
  } catch (const std::exception& e) {
    std::snprintf(error, capacity, "%s", e.what());
    return 1;
  }
}

extern "C" int shim_divergent(unsigned seed, int* out, char* error, size_t capacity) {
  shim::machine().seed = seed;
  try {
    shim::launch({1, 1, 1}, {64, 1, 1}, 0, [&] { vidops::cuda::selfcheck_divergent(out); }, "selfcheck_divergent");
    return 0;
  } catch (const std::exception& e) {
    std::snprintf(error, capacity, "%s", e.what());
    return 1;
  }
}
