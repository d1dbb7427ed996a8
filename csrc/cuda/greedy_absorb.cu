// Greedy absorption on ready bit rows (Eq. E5): a walk by one block finds the leaders, then all blocks find owners.
#include "device.cuh"

namespace vidops::cuda {

constexpr int kWalkThreads = 512;
constexpr int kOwnerThreads = 128;
constexpr int kWordBits = 64;
constexpr int kAhead = 8;  // leaders' rows in flight

struct GreedyAbsorbArgs {
  const u64* adjacency;
  i64 row_stride;  // in words
  int rows, words;
  int* leaders;  // scratch, `rows` entries: row index of leader t
  i64* owner;
  i64* label;
  i64* count;
};

// The walk visits 64 rows at a time. Which of them lead depends only on the mask of absorbed rows and on the 64x64
// diagonal bits of the block, so one thread resolves the block in shared memory; the other threads then absorb
// whatever the new leaders cover, one column word each. The next diagonal is fetched meanwhile.
VIDOPS_KERNEL(kWalkThreads) greedy_absorb_walk(GreedyAbsorbArgs a) {
  VIDOPS_SHARED(memory);
  u64* absorbed = reinterpret_cast<u64*>(memory);
  u64* diagonal = absorbed + a.words;
  u64* leading = diagonal + kWordBits;

  const int me = thread_x();
  for (int w = me; w < a.words; w += kWalkThreads) {
    const int tail = a.rows - w * kWordBits;
    absorbed[w] = tail >= kWordBits ? 0 : ~u64{0} << tail;  // rows that do not exist are never visited
  }
  if (me < kWordBits) diagonal[me] = me < a.rows ? a.adjacency[me * a.row_stride] : 0;
  block_sync();

  int count = 0;
  for (int w = 0; w < a.words; ++w) {
    const int first = w * kWordBits;
    if (me == 0) {
      u64 open = ~absorbed[w], leads = 0;
      while (open) {
        const int bit = lowest_bit(open);
        leads |= u64{1} << bit;
        open &= ~(diagonal[bit] | u64{1} << bit);
      }
      *leading = leads;
    }
    block_sync();
    const u64 leads = *leading;

    const int next = first + kWordBits + me;
    u64 fetched = 0;
    if (me < kWordBits && next < a.rows) fetched = a.adjacency[next * a.row_stride + w + 1];

    if (me < kWordBits && leads >> me & 1) {
      const u64 before = leads & ((u64{1} << me) - 1);
      a.leaders[count + popcount(before)] = first + me;
    }
    count += popcount(leads);
    if (leads) {
      for (int column = w + 1 + me; column < a.words; column += kWalkThreads) {
        u64 covered = 0;
        for (u64 rest = leads; rest;) {
          u64 bits[kAhead];
          VIDOPS_UNROLL
          for (int u = 0; u < kAhead; ++u, rest &= rest - 1)
            bits[u] = rest ? a.adjacency[(first + lowest_bit(rest)) * a.row_stride + column] : 0;
          VIDOPS_UNROLL
          for (int u = 0; u < kAhead; ++u) covered |= bits[u];
        }
        absorbed[column] |= covered;
      }
    }
    if (me < kWordBits) diagonal[me] = fetched;
    block_sync();
  }
  if (me == 0) *a.count = count;
}

// owner(j) is the first leader that covers j: an absorbed row was absorbed by it. One warp per column word, each
// lane deciding bits `lane` and `lane + 32`; leaders are read 32 at a time in increasing order.
VIDOPS_KERNEL(kOwnerThreads) greedy_absorb_owner(GreedyAbsorbArgs a) {
  const int word = (int)block_x() * (kOwnerThreads / kWarp) + warp_id();
  if (word >= a.words) return;
  const int lane = lane_id();
  const int count = (int)*a.count;
  int rank[2] = {-1, -1};
  for (int base = 0; base < count; base += kWarp) {
    u64 bits = 0;
    if (base + lane < count) {
      const int leader = a.leaders[base + lane];
      bits = a.adjacency[leader * a.row_stride + word];
      if (leader / kWordBits == word) bits |= u64{1} << leader % kWordBits;
    }
    for (int t = 0; t < kWarp; ++t) {
      const u64 row = shuffle(bits, t);
      if (rank[0] < 0 && row >> lane & 1) rank[0] = base + t;
      if (rank[1] < 0 && row >> (lane + kWarp) & 1) rank[1] = base + t;
    }
    const bool open = (rank[0] < 0 && word * kWordBits + lane < a.rows) ||
                      (rank[1] < 0 && word * kWordBits + lane + kWarp < a.rows);
    if (!ballot(open)) break;
  }
  for (int half = 0; half < 2; ++half) {
    const int row = word * kWordBits + half * kWarp + lane;
    if (row >= a.rows) continue;
    a.label[row] = rank[half];
    a.owner[row] = a.leaders[rank[half]];
  }
}

}  // namespace vidops::cuda
