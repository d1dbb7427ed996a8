#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define VIDOPS_ISA avx2
#define VIDOPS_VECTOR_BYTES 32
#define VIDOPS_MR 6
#include "kernels.inl"
#pragma GCC pop_options
#endif
