#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define VIDOPS_HAS_AVX512
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define VIDOPS_ISA avx512
#define VIDOPS_VECTOR_BYTES 64
#define VIDOPS_MR 14
#include "kernels.inl"
#pragma GCC pop_options
#endif
