// The nearest kept token of every place of a grid: a block holds the indices of an item's kept tokens, each thread looks
// at all of them for one place.
#include "device.cuh"

namespace vidops::cuda {

constexpr int kNearestThreads = 128;
constexpr int kNearestTile = 1024;

struct NearestArgs {
  const i64* keep;
  i64 keep_item;
  int kept, places, width, blocks;  // blocks of an item
  i64* source;
};

VIDOPS_KERNEL(kNearestThreads) nearest_kept(NearestArgs a) {
  VIDOPS_SHARED(memory);
  int* tile = reinterpret_cast<int*>(memory);
  const i64 item = block_x() / (u32)a.blocks;
  const int place = (int)(block_x() % (u32)a.blocks) * kNearestThreads + thread_x();
  const int y = place / a.width, x = place % a.width;
  const i64* keep = a.keep + item * a.keep_item;
  i64 best = (i64)1 << 62;  // squared distance, then raster index
  int source = 0;
  for (int base = 0; base < a.kept; base += kNearestTile) {
    block_sync();
    for (int k = thread_x(); k < kNearestTile && base + k < a.kept; k += kNearestThreads) {
      const i64 token = keep[base + k];
      tile[k] = token >= 0 && token < a.places ? (int)token : -1;
    }
    block_sync();
    for (int k = 0; k < kNearestTile && base + k < a.kept; ++k) {
      const int token = tile[k];
      if (token < 0) continue;
      const i64 down = token / a.width - y, across = token % a.width - x;
      const i64 rank = (down * down + across * across) << 20 | token;
      if (rank < best) best = rank, source = base + k;
    }
  }
  if (place < a.places) a.source[item * a.places + place] = source;
}

}  // namespace vidops::cuda
