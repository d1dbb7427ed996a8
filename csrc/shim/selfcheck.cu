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

// C (64x64) = A (64 x 64 steps) B^T (64 x 64 steps) of float16 by one warpgroup: a stage is filled while the product of
// the one before runs.
constexpr int kGroupSide = 64, kGroupStage = 2 * kGroupSide * 128;

VIDOPS_KERNEL(128) selfcheck_groups(const u16* a, const u16* b, float* c, int steps) {
  VIDOPS_SHARED(memory);
  const int piece = thread_x() % 8;
  const auto load = [&](int step) {
    for (int row = thread_x() / 8; step < steps && row < kGroupSide; row += 16) {
      char* const to = memory + step % 2 * kGroupStage + row * 128 + (piece ^ row % 8) * 16;
      const i64 from = ((i64)row * steps + step) * 64 + piece * 8;
      copy_async(to, a + from, true);
      copy_async(to + kGroupStage / 2, b + from, true);
    }
    copy_commit();
  };
  float sum[kGroupSide / 8][4];
  load(0);
  for (int step = 0; step < steps; ++step) {
    copy_wait<0>();
    group_publish();
    block_sync();
#ifndef VIDOPS_FAULT_MISSING_ARRIVE
    group_arrive();
#endif
    const char* const stage = memory + step % 2 * kGroupStage;
    for (int k = 0; k < 4; ++k) group_half(sum, stage + k * 32, stage + kGroupStage / 2 + k * 32, step + k > 0);
    group_commit();
#ifndef VIDOPS_FAULT_MISSING_GROUP_WAIT
    group_wait<1>();
#endif
    block_sync();
    load(step + 1);
  }
#ifndef VIDOPS_FAULT_MISSING_LAST_GROUP_WAIT
  group_wait<0>();
#endif
  group_settle(sum);
  copy_wait<0>();
  for (int i = 0; i < kGroupSide / 8; ++i)
    for (int e = 0; e < 4; ++e)
      c[(warp_id() * 16 + lane_id() / 4 + e / 2 * 8) * kGroupSide + i * 8 + lane_id() % 4 * 2 + e % 2] = sum[i][e];
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

// Every block passes a value to the next of its cluster, round after round, through its shared memory.
VIDOPS_KERNEL(64) selfcheck_cluster(int* out, int blocks, int rounds) {
  VIDOPS_SHARED(memory);
  int* slot = reinterpret_cast<int*>(memory);
  const int me = thread_x(), rank = cluster_rank();
#ifdef VIDOPS_FAULT_NO_SUCH_BLOCK
  const int next = rank + 1;
#else
  const int next = (rank + 1) % blocks;
#endif
  int value = rank * 64 + me;
  for (int round = 0; round < rounds; ++round) {
    slot[me] = value;
    cluster_sync();
    value = *cluster_peer(slot + (me + 33) % 64, next) + 1;
#ifndef VIDOPS_FAULT_MISSING_CLUSTER_BARRIER
    if (round + 1 < rounds) cluster_sync();
#endif
  }
#ifdef VIDOPS_FAULT_EARLY_EXIT
  for (int i = 0; i < 8; ++i) block_sync();  // early even so: another block may be further behind
#else
  cluster_sync();
#endif
  out[block_x() * 64 + me] = value;
}

// Half of the block skips a barrier.
VIDOPS_KERNEL(64) selfcheck_divergent(int* out) {
  if (thread_x() < 32) block_sync();
  out[thread_x()] = 1;
}

}  // namespace vidops::cuda
