// Greedy absorption on D <= tau (Eq. E2, E5) without the matrix D: rounds of candidates against the rows
// alive.
#include "distance.cuh"

namespace vidops::cuda {

constexpr int kCandidates = 128;  // of a round: the next rows that nobody has absorbed
constexpr int kAliveTile = 64;    // rows of a tile: few are alive, small tiles occupy more multiprocessors
constexpr int kMaskWords = kCandidates / 32;
constexpr int kTileRows = kAliveTile + kCandidates;
constexpr int kSplitBlocks = 264;  // a round of fewer tiles cuts their columns into shares for so many blocks
constexpr int kMostSplits = 32;    // shares of one tile
constexpr int kTileFloats = kAliveTile * kCandidates;
constexpr int kRoundShared = TileShape<kAliveTile, kCandidates>::kSharedBytes;
static_assert(4 * (kTileRows * kStats + 2 * kAliveTile * kMaskWords) <= kRoundShared, "replace the stages");

struct GreedyState {
  u32 arrived;                       // tiles of this round whose masks are written
  u32 arrived_shares[kSplitBlocks];  // per tile: shares that are written
  int leaders;                       // before this round
  int alive[2];                      // rows alive before a round and after it, by parity of the round
};

struct GreedyAbsorbKlArgs {
  DistanceArgs set;
  float tau;
  GreedyState* state;  // zero before the first round
  int* list[2];        // scratch, `rows` entries each: rows alive, in index order, by parity of the round
  int most_splits;
  float* shares;       // scratch, [kSplitBlocks][kTileFloats]; not there without splits
  u32* near;           // scratch, [rows][kMaskWords]: candidates near the row in a place of the list
  i64* owner;
  i64* label;
  i64* count;
};

VIDOPS_KERNEL(kColumnThreads) greedy_absorb_kl_columns(DistanceArgs a) { sum_columns(a); }

VIDOPS_KERNEL(kColumnThreads) greedy_absorb_kl_centre(DistanceArgs a) { centre_columns(a); }

VIDOPS_KERNEL(kPackThreads) greedy_absorb_kl_pack(DistanceArgs a) {
  VIDOPS_SHARED(memory);
  pack_row<true>(a, reinterpret_cast<float*>(memory));
}

// The rows alive before a round; round 0 begins with all rows and no list.
struct AliveRows {
  const int* list;
  int count;

  VIDOPS_DEVICE AliveRows(const GreedyAbsorbKlArgs& a, int round)
      : list(round ? a.list[round % 2] : nullptr), count(round ? a.state->alive[round % 2] : a.set.p.rows) {}
  VIDOPS_DEVICE int operator[](int place) const { return list ? list[place] : place; }
};

// Whether this block is the last of `number` to come here; it then sees what the others wrote before.
VIDOPS_DEVICE bool arrives_last(u32* counter, u32 number, u32* shared) {
  block_sync();
  if (thread_x() == 0) {
    device_fence();
    const bool last = atomic_add_global(counter, 1) == number - 1;
    if (last) *counter = 0;
    *shared = last;
    device_fence();
  }
  block_sync();
  const bool last = *shared;
  block_sync();
  return last;
}

// Masks of the candidates near each row of a tile, by one of the blocks that share it. True in the block that
// wrote them: the last one, which adds up the shares in their order.
VIDOPS_DEVICE bool find_near(const GreedyAbsorbKlArgs& a, const AliveRows& alive, int at_tile, int share,
                             int splits, char* memory) {
  const int first = at_tile * kAliveTile, candidates = alive.count < kCandidates ? alive.count : kCandidates;
  using Shape = TileShape<kAliveTile, kCandidates>;
  Tile<kAliveTile, kCandidates> tile;
  Product product = cross_product(a.set, 0);
  const int chunks = (product.columns + kTileChunk - 1) / kTileChunk;
  const int begin = (int)((i64)chunks * share / splits) * kTileChunk;
  const int end = (int)((i64)chunks * (share + 1) / splits) * kTileChunk;
  product.columns = (end < product.columns ? end : product.columns) - begin;
  product.left += begin;
  product.right += begin;
  multiply_tile<Half, kFilterFlush>(
      tile, product, memory, [&](int r) { return first + r < alive.count ? (i64)alive[first + r] : -1; },
      [&](int c) { return c < candidates ? (i64)alive[c] : -1; });

  if (splits > 1) {
    float* shares = a.shares + (i64)at_tile * splits * kTileFloats + thread_x();
    float* mine = shares + (i64)share * kTileFloats;
    const auto place = [](int slab, int strip, int e) {
      return ((slab * Shape::kStrips + strip) * 4 + e) * kTileThreads;
    };
    tile.for_each([&](float value, int slab, int strip, int e) { mine[place(slab, strip, e)] = value; });
    u32* arrived = a.state->arrived_shares + at_tile;
    if (!arrives_last(arrived, (u32)splits, reinterpret_cast<u32*>(memory))) return false;
    tile.for_each([](float& value, int, int, int) { value = 0; });
    for (int s = 0; s < splits; ++s)
      tile.for_each([&](float& value, int slab, int strip, int e) {
        value += shares[(i64)s * kTileFloats + place(slab, strip, e)];
      });
  }

  float* stats = reinterpret_cast<float*>(memory);
  u32* near = reinterpret_cast<u32*>(stats + kTileRows * kStats);
  u32* open = near + kAliveTile * kMaskWords;
  if (thread_x() < kTileRows) {
    const int me = thread_x(), place = me < kAliveTile ? first + me : me - kAliveTile;
    const int row = place < alive.count ? alive[place] : 0;
    VIDOPS_UNROLL
    for (int s = 0; s < kStats; ++s) stats[s * kTileRows + me] = a.set.stats[(i64)s * a.set.p.rows + row];
  }
  block_sync();
  const Threshold threshold(a.set, a.tau, 2 * kMostSplits);
  tile.for_each([&](float& value, int slab, int strip, int e) {
    const int r = tile.row(slab, e), c = tile.column(strip, e);
    Decision decision = threshold(value, stats + r, kTileRows, stats + kAliveTile + c, kTileRows);
    if (first + r == c) decision = kNear;
    if (first + r >= alive.count || c >= candidates) decision = kFar;
    value = (float)decision;
  });
  tile_words(tile, near, [&](int s, int c, int e) { return tile.value[s][c][e] == (float)kNear; });
  tile_words(tile, open, [&](int s, int c, int e) { return tile.value[s][c][e] == (float)kOpen; });
  block_sync();

  // A warp per word asks the direct form about its open pairs.
  for (int at = warp_id(); at < kAliveTile * kMaskWords; at += kTileThreads / kWarp) {
    const int place = first + at / kMaskWords;
    if (place >= alive.count) break;
    u32 bits = near[at];
    for (u32 left = open[at]; left; left &= left - 1) {
      const int c = at % kMaskWords * 32 + lowest_bit(left);
      const float distance = direct_distance(a.set.p, alive[place], a.set.p, alive[c], a.set.cols);
      if (distance <= a.tau) bits |= left & (0 - left);
    }
    if (lane_id() == 0) a.near[(i64)place * kMaskWords + at % kMaskWords] = bits;
  }
  return true;
}

// One block, after all masks are there: which candidates lead, who is absorbed, and the list of the next
// round.
VIDOPS_DEVICE void absorb(const GreedyAbsorbKlArgs& a, const AliveRows& alive, int round, char* memory) {
  u32* mask = reinterpret_cast<u32*>(memory);  // [kCandidates][kMaskWords]
  u32* leads = mask + kCandidates * kMaskWords;
  int* counts = reinterpret_cast<int*>(leads + kMaskWords);  // survivors per warp
  const int me = thread_x(), candidates = alive.count < kCandidates ? alive.count : kCandidates;
  for (int at = me; at < candidates * kMaskWords; at += kTileThreads) mask[at] = a.near[at];
  block_sync();
  if (me == 0) {
    u32 covered[kMaskWords] = {};
    VIDOPS_UNROLL
    for (int w = 0; w < kMaskWords; ++w) {
      const int here = candidates - w * 32;
      const u32 exist = here >= 32 ? ~0u : here <= 0 ? 0u : (1u << here) - 1;
      u32 leading = 0;
      for (u32 left = exist & ~covered[w]; left; left = exist & ~covered[w]) {
        const int c = w * 32 + lowest_bit(left);
        leading |= left & (0 - left);
        VIDOPS_UNROLL
        for (int v = 0; v < kMaskWords; ++v) covered[v] |= mask[c * kMaskWords + v];
      }
      leads[w] = leading;
    }
  }
  block_sync();

  const int before = a.state->leaders;
  int survivors = 0;
  int* next = a.list[(round + 1) % 2];
  for (int base = 0; base < alive.count; base += kTileThreads) {
    const int place = base + me;
    bool survives = place < alive.count;
    const int row = survives ? alive[place] : 0;
    if (survives) {
      int rank = 0;
      VIDOPS_UNROLL
      for (int w = 0; w < kMaskWords; ++w) {
        const u32 near = a.near[(i64)place * kMaskWords + w] & leads[w];
        if (survives && near) {
          const int bit = lowest_bit(near);
          a.owner[row] = alive[w * 32 + bit];
          a.label[row] = before + rank + popcount(leads[w] & ((1u << bit) - 1));
          survives = false;
        }
        rank += popcount(leads[w]);
      }
    }
    const u32 mine = ballot(survives);
    if (lane_id() == 0) counts[warp_id()] = popcount(mine);
    block_sync();
    int to = survivors;
    for (int w = 0; w < kTileThreads / kWarp; ++w) {
      to += w < warp_id() ? counts[w] : 0;
      survivors += counts[w];
    }
    if (survives) next[to + popcount(mine & ((1u << lane_id()) - 1))] = row;
    block_sync();
  }
  if (me != 0) return;
  int number = before;
  for (int w = 0; w < kMaskWords; ++w) number += popcount(leads[w]);
  a.state->leaders = number;
  a.state->alive[(round + 1) % 2] = survivors;
  *a.count = number;
}

// A round. Blocks fill the masks of their rows; the one that finishes last, whichever it is, absorbs. Rounds
// after the last row has an owner find no row and pass that on.
VIDOPS_KERNEL(kTileThreads) greedy_absorb_kl_round(GreedyAbsorbKlArgs a, int round) {
  VIDOPS_SHARED(memory);
  const AliveRows alive(a, round);
  if (alive.count == 0) {
    if (block_x() == 0 && thread_x() == 0) a.state->alive[(round + 1) % 2] = 0;
    return;
  }
  const int tiles = (alive.count + kAliveTile - 1) / kAliveTile;
  const int fit = tiles < kSplitBlocks ? kSplitBlocks / tiles : 1;
  const int splits = fit < a.most_splits ? fit : a.most_splits;
  const int tile = (int)block_x() % tiles, share = (int)block_x() / tiles;
  if (share >= splits || !find_near(a, alive, tile, share, splits, memory)) return;
  if (!arrives_last(&a.state->arrived, (u32)tiles, reinterpret_cast<u32*>(memory))) return;
  absorb(a, alive, round, memory);
}

}  // namespace vidops::cuda
