#include "kernels.h"

#include "common.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace vidops::cpu {

namespace scalar {
extern const Kernels<float> table_f32;
extern const Kernels<double> table_f64;
}  // namespace scalar
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels<float> table_f32;
extern const Kernels<double> table_f64;
}  // namespace avx2
namespace avx512 {
extern const Kernels<float> table_f32;
extern const Kernels<double> table_f64;
}  // namespace avx512
#endif

template <>
const Kernels<float>& kernels_for<float>(CpuIsa isa) {
#if defined(__x86_64__)
  if (isa >= CpuIsa::avx512) return avx512::table_f32;
  if (isa == CpuIsa::avx2) return avx2::table_f32;
#endif
  return scalar::table_f32;
}

template <>
const Kernels<double>& kernels_for<double>(CpuIsa isa) {
#if defined(__x86_64__)
  if (isa >= CpuIsa::avx512) return avx512::table_f64;
  if (isa == CpuIsa::avx2) return avx2::table_f64;
#endif
  return scalar::table_f64;
}

int thread_index() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace vidops::cpu
