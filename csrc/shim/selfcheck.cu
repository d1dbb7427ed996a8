// A kernel that exercises what the wrappers promise: asynchronous copies, ldmatrix in both orders, tensor-core
// products, barriers. C (16x8) += A (16 x 16 steps, row-major) B (16 steps x 8, row-major), one warp per block.
#include "../cuda/device.cuh"

namespace vidops::cuda {

constexpr int kCheckLeft = 16 * 16, kCheckRight = 16 * 16;  // B is padded to 16 columns

VIDOPS_KERNEL(32) selfcheck_product(const u16* a, const u16* b, float* c, int steps) {
  VIDOPS_SHARED(memory);
  u16* left = reinterpret_cast<u16*>(memory);
  u16* right = left + kCheckLeft;
  const int lane = lane_id();
  float sum[4] = {};
  for (int step = 0; step < steps; ++step) {
#ifdef VIDOPS_FAULT_OUT_OF_BOUNDS
    const int offset = step + 1;
#else
    const int offset = step;
#endif
    const int row = lane / 2, half = lane % 2 * 8;
    copy_async(left + row * 16 + half, a + (i64)row * steps * 16 + offset * 16 + half, true);
    copy_async(right + row * 16 + half, b + ((i64)step * 16 + row) * 16 + half, true);
    copy_commit();
#ifndef VIDOPS_FAULT_MISSING_WAIT
    copy_wait<0>();
#endif
    block_sync();
    u32 fa[4], fb[4];
    load_matrix(fa, left + lane % 16 * 16 + lane / 16 * 8);
    load_matrix_transposed(fb, right + lane % 16 * 16 + lane / 16 * 8);
    const u32 first[2] = {fb[0], fb[1]};
    mma_bfloat(sum, fa, first);
    block_sync();
  }
  copy_wait<0>();
  const int group = lane / 4, pair = lane % 4 * 2;
  for (int e = 0; e < 4; ++e) c[(group + e / 2 * 8) * 8 + pair + e % 2] = sum[e];
}

// Every thread passes a value to another warp's thread, round after round, through the same shared memory.
VIDOPS_KERNEL(128) selfcheck_rotate(int* out, int rounds) {
  VIDOPS_SHARED(memory);
  int* slot = reinterpret_cast<int*>(memory);
  const int me = thread_x();
  int value = me;
  for (int round = 0; round < rounds; ++round) {
    slot[me] = value;
    block_sync();
    value = slot[(me + 33) % 128] + 1;
#ifndef VIDOPS_FAULT_MISSING_BARRIER
    block_sync();
#endif
  }
  out[me] = value;
}

// Half of the block skips a barrier.
VIDOPS_KERNEL(64) selfcheck_divergent(int* out) {
  if (thread_x() < 32) block_sync();
  out[thread_x()] = 1;
}

}  // namespace vidops::cuda
