// Everything a kernel needs from the machine, once for the device and once for the host shim of the tests.
// Kernels use no other intrinsic, no inline assembly and no host header, so that nvcc, NVRTC and g++ (with
// VIDOPS_SHIM) all compile them.
#pragma once

#ifdef VIDOPS_SHIM
#include "../shim/shim.hpp"
#endif

namespace vidops::cuda {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

#ifdef VIDOPS_SHIM
#define VIDOPS_DEVICE inline
#define VIDOPS_KERNEL(...) void
#define VIDOPS_SHARED(name) char* name = ::shim::machine().shared
#define VIDOPS_BODY(host, device) { host }
#define VIDOPS_INFINITY __builtin_inff()
#define VIDOPS_UNROLL
#define VIDOPS_UNROLL_BY(n)
#define VIDOPS_NO_UNROLL
#else
#define VIDOPS_DEVICE __device__ __forceinline__
// Threads per block and, optionally, the blocks per multiprocessor that registers must leave room for.
#define VIDOPS_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)
#define VIDOPS_SHARED(name) extern __shared__ __align__(1024) char name[]
#define VIDOPS_BODY(host, device) { device }
#define VIDOPS_INFINITY __int_as_float(0x7f800000)
#define VIDOPS_UNROLL _Pragma("unroll")
#define VIDOPS_PRAGMA(text) _Pragma(#text)
#define VIDOPS_UNROLL_BY(n) VIDOPS_PRAGMA(unroll n)
#define VIDOPS_NO_UNROLL _Pragma("unroll 1")
#endif

constexpr int kWarp = 32;

// --- position -------------------------------------------------------------------------------------------------
VIDOPS_DEVICE int thread_x() VIDOPS_BODY(return (int)shim::machine().current->thread.x;, return (int)threadIdx.x;)
VIDOPS_DEVICE int block_threads() VIDOPS_BODY(return (int)shim::machine().block_size.x;, return (int)blockDim.x;)
VIDOPS_DEVICE u32 block_x() VIDOPS_BODY(return shim::machine().block.x;, return blockIdx.x;)
VIDOPS_DEVICE u32 block_y() VIDOPS_BODY(return shim::machine().block.y;, return blockIdx.y;)
VIDOPS_DEVICE u32 block_z() VIDOPS_BODY(return shim::machine().block.z;, return blockIdx.z;)
VIDOPS_DEVICE int lane_id() { return thread_x() % kWarp; }
VIDOPS_DEVICE int warp_id() { return thread_x() / kWarp; }

// --- synchronisation and exchange; warp operations are always full-mask -----------------------------------------
VIDOPS_DEVICE void block_sync() VIDOPS_BODY(shim::block_barrier();, __syncthreads();)
VIDOPS_DEVICE void warp_sync() VIDOPS_BODY(shim::warp_barrier(shim::WarpOp::sync);, __syncwarp();)
VIDOPS_DEVICE u32 ballot(bool p) VIDOPS_BODY(return shim::vote(p);, return __ballot_sync(0xffffffffu, p);)

template <class T>
VIDOPS_DEVICE T shuffle(T v, int lane)
    VIDOPS_BODY(return shim::exchange_from(v, lane);, return __shfl_sync(0xffffffffu, v, lane);)

template <class T>
VIDOPS_DEVICE T shuffle_xor(T v, int mask)
    VIDOPS_BODY(return shim::exchange_from(v, lane_id() ^ mask);, return __shfl_xor_sync(0xffffffffu, v, mask);)

// --- clusters: blocks that run together and read one another's shared memory (sm_90); elsewhere a block is one ------
#if defined(VIDOPS_SHIM) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define VIDOPS_CLUSTER_BODY(host, device, alone) VIDOPS_BODY(host, device)
#else
#define VIDOPS_CLUSTER_BODY(host, device, alone) { alone }
#endif

VIDOPS_DEVICE int cluster_rank()
    VIDOPS_CLUSTER_BODY(return shim::machine().current->rank;,
                        u32 r; asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)); return (int)r;, return 0;)
// All threads of the cluster; what they wrote to shared memory before is visible to all after.
VIDOPS_DEVICE void cluster_sync()
    VIDOPS_CLUSTER_BODY(shim::cluster_barrier();,
                        asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
                        asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");, __syncthreads();)
// Where block `rank` has what this block has at `own`. A block may leave only after all have read what it holds.
template <class T>
VIDOPS_DEVICE const T* cluster_peer(const T* own, int rank)
    VIDOPS_CLUSTER_BODY(return static_cast<const T*>(shim::cluster_address(own, rank));,
                        u64 at; asm("mapa.u64 %0, %1, %2;" : "=l"(at) : "l"((u64)own), "r"(rank));
                        return reinterpret_cast<const T*>(at);, return own;)

// --- atomics on shared memory (integers only: their results do not depend on the order) ---------------------------
VIDOPS_DEVICE u32 atomic_add_shared(u32* p, u32 v)
    VIDOPS_BODY(u32 old = *p; *p += v; return old;, return atomicAdd(p, v);)
VIDOPS_DEVICE void atomic_or_shared(u32* p, u32 v) VIDOPS_BODY(*p |= v;, atomicOr(p, v);)

// --- atomics on global memory (integers only), and what orders plain accesses around them -----------------------
VIDOPS_DEVICE u32 atomic_add_global(u32* p, u32 v)
    VIDOPS_BODY(u32 old = *p; *p += v; return old;, return atomicAdd(p, v);)
VIDOPS_DEVICE void atomic_or_global(u32* p, u32 v) VIDOPS_BODY(*p |= v;, atomicOr(p, v);)
VIDOPS_DEVICE void atomic_max_global(u32* p, u32 v) VIDOPS_BODY(if (*p < v) *p = v;, atomicMax(p, v);)
VIDOPS_DEVICE void device_fence() VIDOPS_BODY(, __threadfence();)

// --- bits and scalar maths ----------------------------------------------------------------------------------------
VIDOPS_DEVICE int popcount(u32 v) VIDOPS_BODY(return __builtin_popcount(v);, return __popc(v);)
VIDOPS_DEVICE int popcount(u64 v) VIDOPS_BODY(return __builtin_popcountll(v);, return __popcll(v);)
VIDOPS_DEVICE int lowest_bit(u32 v) VIDOPS_BODY(return __builtin_ctz(v);, return __ffs((int)v) - 1;)
VIDOPS_DEVICE int lowest_bit(u64 v) VIDOPS_BODY(return __builtin_ctzll(v);, return __ffsll((i64)v) - 1;)
VIDOPS_DEVICE u32 float_bits(float v) VIDOPS_BODY(u32 b; memcpy(&b, &v, 4); return b;, return __float_as_uint(v);)
VIDOPS_DEVICE float bits_float(u32 b) VIDOPS_BODY(float v; memcpy(&v, &b, 4); return v;, return __uint_as_float(b);)
VIDOPS_DEVICE u64 double_bits(double v)
    VIDOPS_BODY(u64 b; memcpy(&b, &v, 8); return b;, return (u64)__double_as_longlong(v);)
// 2^exponent for |exponent| <= 126.
VIDOPS_DEVICE float power_of_two(int exponent) { return bits_float((u32)(127 + exponent) << 23); }
VIDOPS_DEVICE u32 multiply_high(u32 a, u32 b) VIDOPS_BODY(return (u32)((u64)a * b >> 32);, return __umulhi(a, b);)
VIDOPS_DEVICE float exp2_fast(float v)
    VIDOPS_BODY(return exp2f(v);, float r; asm("ex2.approx.f32 %0, %1;" : "=f"(r) : "f"(v)); return r;)
// The same with results below the normal range flushed to 0: one instruction instead of four.
VIDOPS_DEVICE float exp2_flush(float v)
    VIDOPS_BODY(const float r = exp2f(v); return r < 0x1p-126f ? 0.0f : r;,
                float r; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v)); return r;)
VIDOPS_DEVICE float exponential(float v) VIDOPS_BODY(return ::expf(v);, return ::expf(v);)
VIDOPS_DEVICE float hyperbolic_tangent(float v) VIDOPS_BODY(return ::tanhf(v);, return ::tanhf(v);)
VIDOPS_DEVICE float error_function(float v) VIDOPS_BODY(return ::erff(v);, return ::erff(v);)
VIDOPS_DEVICE float log_natural(float v) VIDOPS_BODY(return ::logf(v);, return ::logf(v);)
VIDOPS_DEVICE double exponential(double v) VIDOPS_BODY(return ::exp(v);, return ::exp(v);)
VIDOPS_DEVICE float square_root(float v) VIDOPS_BODY(return ::sqrtf(v);, return ::sqrtf(v);)
VIDOPS_DEVICE double square_root(double v) VIDOPS_BODY(return ::sqrt(v);, return ::sqrt(v);)
// a * b + c, rounded once on every machine: the compiler is left no choice.
VIDOPS_DEVICE float multiply_add(float a, float b, float c)
    VIDOPS_BODY(return __builtin_fmaf(a, b, c);, return __fmaf_rn(a, b, c);)
VIDOPS_DEVICE double multiply_add(double a, double b, double c)
    VIDOPS_BODY(return __builtin_fma(a, b, c);, return __fma_rn(a, b, c);)
// count + (a < b) in two instructions: left to itself the compiler selects, which takes three.
VIDOPS_DEVICE u32 count_if_less(u32 count, u32 a, u32 b)
    VIDOPS_BODY(return count + (a < b);,
                asm("{.reg .pred p; setp.lt.u32 p, %1, %2; @p add.u32 %0, %0, 1;}" : "+r"(count) : "r"(a), "r"(b));
                return count;)
VIDOPS_DEVICE u32 count_if_less(u32 count, u64 a, u64 b)
    VIDOPS_BODY(return count + (a < b);,
                asm("{.reg .pred p; setp.lt.u64 p, %1, %2; @p add.u32 %0, %0, 1;}" : "+r"(count) : "l"(a), "l"(b));
                return count;)
// The same value, unknown to the compiler: what depends on it is computed where it is used and not kept in registers.
VIDOPS_DEVICE int opaque(int v) VIDOPS_BODY(return v;, asm volatile("" : "+r"(v)); return v;)
// Of the negative zero too: its bits are compared as an integer's.
VIDOPS_DEVICE float magnitude(float v) { return bits_float(float_bits(v) & 0x7fffffffu); }
VIDOPS_DEVICE double magnitude(double v) VIDOPS_BODY(return __builtin_fabs(v);, return ::fabs(v);)
VIDOPS_DEVICE bool finite(float v) { return (float_bits(v) & 0x7f800000u) != 0x7f800000u; }
// NaN propagates, unlike with fmaxf.
VIDOPS_DEVICE float larger(float a, float b) { return a > b || a != a ? a : b; }
VIDOPS_DEVICE double larger(double a, double b) { return a > b || a != a ? a : b; }
// The number if one of the two is NaN.
VIDOPS_DEVICE float larger_number(float a, float b) VIDOPS_BODY(return ::fmaxf(a, b);, return ::fmaxf(a, b);)

VIDOPS_DEVICE float half_to_float(u16 h)
    VIDOPS_BODY(_Float16 v; memcpy(&v, &h, 2); return (float)v;,
                float r; asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(h)); return r;)
VIDOPS_DEVICE u16 float_to_half(float v)
    VIDOPS_BODY(_Float16 h = (_Float16)v; u16 b; memcpy(&b, &h, 2); return b;,
                u16 r; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(v)); return r;)
VIDOPS_DEVICE float bfloat_to_float(u16 b) { return bits_float((u32)b << 16); }
// Round to nearest even; only for finite values.
VIDOPS_DEVICE u16 float_to_bfloat(float v) {
  const u32 b = float_bits(v);
  return (u16)((b + 0x7fffu + (b >> 16 & 1u)) >> 16);
}

// Two floats as 16-bit values in one word, `low` in the lower half; NaN and infinities survive.
VIDOPS_DEVICE u32 pack_half(float low, float high)
    VIDOPS_BODY(return float_to_half(low) | (u32)float_to_half(high) << 16;,
                u32 r; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low)); return r;)
VIDOPS_DEVICE u32 pack_bfloat(float low, float high)
    VIDOPS_BODY(const u32 l = finite(low) ? float_to_bfloat(low) : float_bits(low) >> 16 | (low != low) << 6;
                const u32 h = finite(high) ? float_to_bfloat(high) : float_bits(high) >> 16 | (high != high) << 6;
                return l | h << 16;,
                u32 r; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low)); return r;)

// --- asynchronous copies global -> shared ---------------------------------------------------------------------------
// 16 bytes, both sides aligned to 16; without `valid` the destination is zero-filled and nothing is read.
VIDOPS_DEVICE void copy_async(void* to, const void* from, bool valid)
    VIDOPS_BODY(shim::copy_async(to, from, valid ? 16 : 0);,
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((u32)__cvta_generic_to_shared(to)),
                             "l"(from), "r"(valid ? 16 : 0) : "memory");)
VIDOPS_DEVICE void copy_commit()
    VIDOPS_BODY(shim::copy_commit();, asm volatile("cp.async.commit_group;" ::: "memory");)
// Waits until at most `kAllowed` of this thread's groups are in flight.
template <int kAllowed>
VIDOPS_DEVICE void copy_wait()
    VIDOPS_BODY(shim::copy_wait(kAllowed);, asm volatile("cp.async.wait_group %0;" ::"n"(kAllowed) : "memory");)

// --- tensor cores ---------------------------------------------------------------------------------------------------
// Four 8x8 matrices of 16-bit elements; lane 8m+i names row i of matrix m.
VIDOPS_DEVICE void load_matrix(u32 (&r)[4], const void* row)
    VIDOPS_BODY(shim::load_matrix(r, row, false);,
                asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                             : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                             : "r"((u32)__cvta_generic_to_shared(row)) : "memory");)
VIDOPS_DEVICE void load_matrix_transposed(u32 (&r)[4], const void* row)
    VIDOPS_BODY(shim::load_matrix(r, row, true);,
                asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                             : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                             : "r"((u32)__cvta_generic_to_shared(row)) : "memory");)
// c (16x8, fp32) += a (16x16, row) b (16x8, col).
VIDOPS_DEVICE void mma_half(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2])
    VIDOPS_BODY(shim::multiply_add(c, a, b, half_to_float);,
                asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
                             "{%8,%9}, {%0,%1,%2,%3};"
                             : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                             : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));)
VIDOPS_DEVICE void mma_bfloat(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2])
    VIDOPS_BODY(shim::multiply_add(c, a, b, bfloat_to_float);,
                asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
                             "{%8,%9}, {%0,%1,%2,%3};"
                             : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                             : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));)

// c (16x8, fp32) += a (16x8, row) b (8x8, col) of float32 values of which the upper 19 bits count. Lane 4g+t has the
// elements (g,t), (g+8,t), (g,t+4), (g+8,t+4) of a, and of b (t,g), (t+4,g).
VIDOPS_DEVICE void mma_tf32(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2])
    VIDOPS_BODY(shim::multiply_add_tf32(c, a, b);,
                asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
                             "{%8,%9}, {%0,%1,%2,%3};"
                             : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                             : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));)

// --- products of a warpgroup: four warps, from a thread number divisible by 128 (sm_90a) ------------------------------
// Other targets compile kernels without them, under the same names.
#if defined(VIDOPS_SHIM) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kGroupProducts = true;
#else
constexpr bool kGroupProducts = false;
#endif

// Makes this thread's writes to shared memory visible to the products that start after the next barrier.
VIDOPS_DEVICE void group_publish() VIDOPS_BODY(, asm volatile("fence.proxy.async.shared::cta;" ::: "memory");)
// Before the first product of a batch, and after accumulators were touched.
VIDOPS_DEVICE void group_arrive()
    VIDOPS_BODY(shim::group_arrive();, asm volatile("wgmma.fence.sync.aligned;" ::: "memory");)
VIDOPS_DEVICE void group_commit()
    VIDOPS_BODY(shim::group_commit();, asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");)

// Waits until at most `kAllowed` batches are in flight.
template <int kAllowed>
VIDOPS_DEVICE void group_wait()
    VIDOPS_BODY(shim::group_wait(kAllowed);,
                asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kAllowed) : "memory");)

// After a wait: keeps reads of accumulators from moving to before it.
template <int kStrips>
VIDOPS_DEVICE void group_settle(float (&c)[kStrips][4]) {
#ifndef VIDOPS_SHIM
  VIDOPS_UNROLL
  for (int i = 0; i < kStrips; ++i)
    asm volatile("" : "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])::"memory");
#endif
}

#ifndef VIDOPS_SHIM
// Describes rows of 128 bytes whose 16-byte piece k lies at k ^ (row % 8); row 0 is aligned to 1024 bytes, and `at`
// may point into it, by columns of 32 bytes.
VIDOPS_DEVICE u64 group_operand(const void* at) {
  return ((u64)__cvta_generic_to_shared(at) & 0x3ffff) >> 4 | (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62;
}

#define VIDOPS_STRIP(i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define VIDOPS_STRIPS_8(i) \
  VIDOPS_STRIP(i), VIDOPS_STRIP(i + 1), VIDOPS_STRIP(i + 2), VIDOPS_STRIP(i + 3), VIDOPS_STRIP(i + 4), \
      VIDOPS_STRIP(i + 5), VIDOPS_STRIP(i + 6), VIDOPS_STRIP(i + 7)
#define VIDOPS_NUMBERS_32 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29," \
  "%30,%31"
#define VIDOPS_NUMBERS_64 \
  VIDOPS_NUMBERS_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54," \
  "%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define VIDOPS_GROUP_64(type) \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type \
               " {" VIDOPS_NUMBERS_32 "}, %32, %33, p, 1, 1, 0, 0;}" \
               : VIDOPS_STRIPS_8(0) : "l"(group_operand(a)), "l"(group_operand(b)), "r"((int)add))
#define VIDOPS_GROUP_128(type) \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type \
               " {" VIDOPS_NUMBERS_64 "}, %64, %65, p, 1, 1, 0, 0;}" \
               : VIDOPS_STRIPS_8(0), VIDOPS_STRIPS_8(8) \
               : "l"(group_operand(a)), "l"(group_operand(b)), "r"((int)add))
#endif

// c (64 x 8 strips) = a (64x16) b^T (8 strips x 16), plus c where `add`; both in shared memory, see group_operand.
// c[i][e] is row warp % 4 * 16 + lane / 4 + e / 2 * 8, column 8 i + lane % 4 * 2 + e % 2. Runs behind the caller's
// back: neither c nor the operands may be touched before a wait.
VIDOPS_DEVICE void group_half(float (&c)[8][4], const void* a, const void* b, bool add)
    VIDOPS_BODY(shim::group_multiply(c, 8, a, b, add, half_to_float);, VIDOPS_GROUP_64("f16");)
VIDOPS_DEVICE void group_half(float (&c)[16][4], const void* a, const void* b, bool add)
    VIDOPS_BODY(shim::group_multiply(c, 16, a, b, add, half_to_float);, VIDOPS_GROUP_128("f16");)
VIDOPS_DEVICE void group_bfloat(float (&c)[8][4], const void* a, const void* b, bool add)
    VIDOPS_BODY(shim::group_multiply(c, 8, a, b, add, bfloat_to_float);, VIDOPS_GROUP_64("bf16");)
VIDOPS_DEVICE void group_bfloat(float (&c)[16][4], const void* a, const void* b, bool add)
    VIDOPS_BODY(shim::group_multiply(c, 16, a, b, add, bfloat_to_float);, VIDOPS_GROUP_128("bf16");)

// --- small collectives built from the above ----------------------------------------------------------------------------
VIDOPS_DEVICE float warp_sum(float v) {
  VIDOPS_UNROLL
  for (int mask = 16; mask; mask >>= 1) v += shuffle_xor(v, mask);
  return v;
}

VIDOPS_DEVICE float warp_max(float v) {
  VIDOPS_UNROLL
  for (int mask = 16; mask; mask >>= 1) v = larger(v, shuffle_xor(v, mask));
  return v;
}

// Sum over the block, the same in every thread; `scratch` holds one float per warp.
VIDOPS_DEVICE float block_sum(float v, float* scratch) {
  v = warp_sum(v);
  block_sync();
  if (lane_id() == 0) scratch[warp_id()] = v;
  block_sync();
  float total = 0;
  for (int w = 0; w < block_threads() / kWarp; ++w) total += scratch[w];
  return total;
}

}  // namespace vidops::cuda
