#include "kernels.h"

#define VIDOPS_ISA scalar
#define VIDOPS_VECTOR_BYTES 16
#define VIDOPS_MR 4
#include "kernels.inl"
