// Bit rows of [D <= tau] (Eq. E2): a float16 product decides all pairs but those near tau, the direct form
// the rest.
#include "distance.cuh"

namespace vidops::cuda {

constexpr int kFilterSide = 128;
constexpr int kFilterWords = kFilterSide / 32;
constexpr int kFilterShared = TileShape<kFilterSide, kFilterSide>::kSharedBytes;
constexpr int kFilterLean = TileShape<kFilterSide, kFilterSide, true>::kSharedBytes;
constexpr int kRecheckThreads = 256;
static_assert(kFilterSide * 2 * (kStats + kFilterWords) * 4 <= kFilterLean, "they replace the stages");

struct SymmetricKlAdjacencyArgs {
  DistanceArgs set;
  float tau;
  int tiles;      // along one side
  int out_words;  // 32-bit words of a row of `out`
  u32* out;
  u32* open;      // scratch, [rows][tiles * kFilterWords]: pairs i < j left open; no tiles below the diagonal
};

VIDOPS_KERNEL(kColumnThreads) symmetric_kl_adjacency_columns(DistanceArgs a) { sum_columns(a); }

VIDOPS_KERNEL(kColumnThreads) symmetric_kl_adjacency_centre(DistanceArgs a) { centre_columns(a); }

VIDOPS_KERNEL(kPackThreads) symmetric_kl_adjacency_pack(DistanceArgs a) {
  VIDOPS_SHARED(memory);
  pack_row<true>(a, reinterpret_cast<float*>(memory));
}

// One block per tile on or above the diagonal. It alone writes the words of its rows and, mirrored, of its
// columns.
template <bool kLean>
VIDOPS_DEVICE void filter_tile(const SymmetricKlAdjacencyArgs& a) {
  VIDOPS_SHARED(memory);
  const TilePlace place(a.tiles, a.tiles);
  if (place.across < place.down) return;
  const int rows = a.set.p.rows;
  const int first_row = place.down * kFilterSide, first_column = place.across * kFilterSide;
  Tile<kFilterSide, kFilterSide, kLean> tile;
  multiply_tile<Half, kFilterFlush>(
      tile, cross_product(a.set, 0), memory,
      [&](int r) { return first_row + r < rows ? (i64)(first_row + r) : -1; },
      [&](int c) { return first_column + c < rows ? (i64)(first_column + c) : -1; });

  // In the place of the stages: stats of the tile's rows and columns, then bit words.
  float* stats = reinterpret_cast<float*>(memory);
  u32* near = reinterpret_cast<u32*>(stats + kStats * 2 * kFilterSide);
  u32* open = near + kFilterSide * kFilterWords;
  {
    const int me = thread_x(), row = me < kFilterSide ? first_row + me : first_column + me - kFilterSide;
    VIDOPS_UNROLL
    for (int s = 0; s < kStats; ++s)
      stats[s * 2 * kFilterSide + me] = row < rows ? a.set.stats[(i64)s * rows + row] : 0;
  }
  block_sync();
  const Threshold threshold(a.set, a.tau, 0);
  tile.for_each([&](float& value, int slab, int strip, int e) {
    const int r = tile.row(slab, e), c = tile.column(strip, e);
    // Below the diagonal the mirror image decides.
    const bool wanted = first_row + r < first_column + c && first_column + c < rows;
    const Decision decision =
        threshold(value, stats + r, 2 * kFilterSide, stats + kFilterSide + c, 2 * kFilterSide);
    value = wanted ? (float)decision : 0.0f;
  });
  tile_words(tile, near, [&](int s, int c, int e) { return tile.value[s][c][e] == (float)kNear; });
  tile_words(tile, open, [&](int s, int c, int e) { return tile.value[s][c][e] == (float)kOpen; });
  block_sync();

  const bool diagonal = place.down == place.across;
  for (int at = thread_x(); at < kFilterSide * kFilterWords; at += kTileThreads) {
    const int r = at / kFilterWords, w = at % kFilterWords;
    u32 mirrored = 0;
    for (int b = 0; b < 32; ++b) mirrored |= (near[(w * 32 + b) * kFilterWords + r / 32] >> r % 32 & 1) << b;
    const int row = first_row + r, word = place.across * kFilterWords + w;
    if (row < rows) {
      a.open[(i64)row * a.tiles * kFilterWords + word] = open[at];
      u32 bits = near[at];
      if (diagonal) bits |= mirrored | (r / 32 == w ? 1u << r % 32 : 0u);
      if (word < a.out_words) a.out[(i64)row * a.out_words + word] = bits;
    }
    if (!diagonal) {
      const int column = first_column + r, mirrored_word = place.down * kFilterWords + w;
      if (column < rows) a.out[(i64)column * a.out_words + mirrored_word] = mirrored;
    }
  }
}

VIDOPS_KERNEL(kTileThreads) symmetric_kl_adjacency_filter(SymmetricKlAdjacencyArgs a) {
  filter_tile<false>(a);
}

VIDOPS_KERNEL(kTileThreads) symmetric_kl_adjacency_filter_lean(SymmetricKlAdjacencyArgs a) {
  filter_tile<true>(a);
}

// One block per row, a warp per open pair. Pairs of different rows share words, hence the atomics; or
// commutes.
VIDOPS_KERNEL(kRecheckThreads) symmetric_kl_adjacency_recheck(SymmetricKlAdjacencyArgs a) {
  const int i = (int)block_x(), words = a.tiles * kFilterWords, lane = lane_id();
  const u32* open = a.open + (i64)i * words;
  int turn = 0;
  for (int base = i / kFilterSide * kFilterWords; base < words; base += kWarp) {
    const u32 mine = base + lane < words ? open[base + lane] : 0;
    for (u32 left = ballot(mine != 0); left; left &= left - 1) {
      const int at = lowest_bit(left);
      for (u32 bits = shuffle(mine, at); bits; bits &= bits - 1, ++turn) {
        if (turn % (kRecheckThreads / kWarp) != warp_id()) continue;
        const int j = (base + at) * 32 + lowest_bit(bits);
        const float distance = direct_distance(a.set.p, i, a.set.p, j, a.set.cols);
        if (lane != 0 || !(distance <= a.tau)) continue;
        atomic_or_global(a.out + (i64)i * a.out_words + j / 32, 1u << j % 32);
        atomic_or_global(a.out + (i64)j * a.out_words + i / 32, 1u << i % 32);
      }
    }
  }
}

}  // namespace vidops::cuda
