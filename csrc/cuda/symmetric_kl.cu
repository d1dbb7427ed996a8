// Pairwise symmetrised KL divergence (Eq. E2) by three float16 products.
#include "distance.cuh"

namespace vidops::cuda {

constexpr int kDistanceSide = 128;
constexpr int kDistancePitch = kDistanceSide + 1;  // of the tile in shared memory: no conflicts in columns
constexpr int kDistanceShared = TileShape<kDistanceSide, kDistanceSide>::kSharedBytes;
constexpr int kDistanceLean = TileShape<kDistanceSide, kDistanceSide, true>::kSharedBytes;
static_assert(kDistanceSide * kDistancePitch * sizeof(float) <= kDistanceLean, "it replaces the stages");

struct SymmetricKlArgs {
  DistanceArgs set;
  float* out;
  int rows, columns;  // of the result
  bool same;
};

VIDOPS_KERNEL(kColumnThreads) symmetric_kl_columns(DistanceArgs a) { sum_columns(a); }

VIDOPS_KERNEL(kColumnThreads) symmetric_kl_centre(DistanceArgs a) { centre_columns(a); }

VIDOPS_KERNEL(kPackThreads) symmetric_kl_pack(DistanceArgs a) {
  VIDOPS_SHARED(memory);
  pack_row<false>(a, reinterpret_cast<float*>(memory));
}

// One block per tile. A set with itself: tiles on and above the diagonal also write their mirror image.
template <bool kLean>
VIDOPS_DEVICE void distance_tile(const SymmetricKlArgs& a) {
  VIDOPS_SHARED(memory);
  const TilePlace place((a.rows + kDistanceSide - 1) / kDistanceSide,
                        (a.columns + kDistanceSide - 1) / kDistanceSide);
  if (a.same && place.across < place.down) return;
  const int first_row = place.down * kDistanceSide, first_column = place.across * kDistanceSide;
  Tile<kDistanceSide, kDistanceSide, kLean> tile;
  multiply_tile<Half, kDistanceFlush>(
      tile, cross_product(a.set, a.same ? 0 : a.rows), memory,
      [&](int r) { return first_row + r < a.rows ? (i64)(first_row + r) : -1; },
      [&](int c) { return first_column + c < a.columns ? (i64)(first_column + c) : -1; });

  float* shared = reinterpret_cast<float*>(memory);
  const Unscale unscale(a.set);
  tile.for_each([&](float value, int slab, int strip, int e) {
    shared[tile.row(slab, e) * kDistancePitch + tile.column(strip, e)] = unscale(value);
  });
  block_sync();

  // One value serves both places of a pair, so that the result is symmetric bit for bit.
  const float* row_self = a.set.stats;
  const float* column_self = a.set.stats + (a.same ? 0 : a.rows);
  const bool diagonal = a.same && place.across == place.down;
  const int c = thread_x() % kDistanceSide, column = first_column + c;
  for (int r = thread_x() / kDistanceSide; r < kDistanceSide; r += kTileThreads / kDistanceSide) {
    const int row = first_row + r;
    if (row >= a.rows || column >= a.columns) continue;
    const float cross = diagonal && c < r ? shared[c * kDistancePitch + r] : shared[r * kDistancePitch + c];
    a.out[(i64)row * a.columns + column] = row_self[row] + column_self[column] - cross;
  }
  if (!a.same || diagonal) return;
  const int r = c, row = first_row + r;
  for (int k = thread_x() / kDistanceSide; k < kDistanceSide; k += kTileThreads / kDistanceSide) {
    const int mirrored = first_column + k;
    if (row >= a.rows || mirrored >= a.columns) continue;
    a.out[(i64)mirrored * a.columns + row] =
        row_self[row] + column_self[mirrored] - shared[r * kDistancePitch + k];
  }
}

VIDOPS_KERNEL(kTileThreads) symmetric_kl_product(SymmetricKlArgs a) { distance_tile<false>(a); }

VIDOPS_KERNEL(kTileThreads) symmetric_kl_product_lean(SymmetricKlArgs a) { distance_tile<true>(a); }

}  // namespace vidops::cuda
