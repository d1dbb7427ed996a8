// Bipartite matching of even with odd tokens (arXiv 2210.09461): unit keys, the best partner of every even token, and
// a sort per item.
#include "tokens.cuh"

namespace vidops::cuda {

constexpr int kMatchSortThreads = 512;

struct UnitKeysArgs {
  TokenRows metric;
  int tokens;
  i64 rows;  // of all items
  float* unit;
};

namespace {

template <class Storage>
VIDOPS_DEVICE void unit_keys(const UnitKeysArgs& a) {
  using Element = typename Storage::Element;
  const i64 row = (i64)block_x() * (kTokenThreads / kWarp) + warp_id();
  if (row >= a.rows) return;
  const Element* x =
      static_cast<const Element*>(a.metric.data) + row / a.tokens * a.metric.item + row % a.tokens * a.metric.row;
  unit_row<Storage>(x, a.metric.width, a.metric.whole, a.unit + row * a.metric.width);
}

template <class Storage>
VIDOPS_DEVICE void match(const MatchArgs& a) {
  VIDOPS_SHARED(memory);
  const int first = (int)(block_x() % (u32)a.blocks) * (kTokenThreads / kWarp);
  match_tokens<Storage>(a, first, (int)(block_x() / (u32)a.blocks), memory);
}

}  // namespace

VIDOPS_KERNEL(kTokenThreads) unit_keys_f32(UnitKeysArgs a) { unit_keys<FloatStorage>(a); }
VIDOPS_KERNEL(kTokenThreads) unit_keys_f16(UnitKeysArgs a) { unit_keys<HalfStorage>(a); }
VIDOPS_KERNEL(kTokenThreads) unit_keys_bf16(UnitKeysArgs a) { unit_keys<BfloatStorage>(a); }
VIDOPS_KERNEL(kTokenThreads) match_tokens_f32(MatchArgs a) { match<FloatStorage>(a); }
VIDOPS_KERNEL(kTokenThreads) match_tokens_f16(MatchArgs a) { match<HalfStorage>(a); }
VIDOPS_KERNEL(kTokenThreads) match_tokens_bf16(MatchArgs a) { match<BfloatStorage>(a); }

// One block per item; `slots`, a power of two, holds `even` keys.
VIDOPS_KERNEL(kMatchSortThreads) match_sort(const float* similarity, int even, int slots, i64* order) {
  VIDOPS_SHARED(memory);
  u64* key = reinterpret_cast<u64*>(memory);
  const i64 first = (i64)block_x() * even;
  for (int i = thread_x(); i < slots; i += kMatchSortThreads)
    key[i] = i < even ? sorting_key(similarity[first + i], i) : ~u64{0};
  block_sort(key, slots);
  for (int i = thread_x(); i < even; i += kMatchSortThreads) order[first + i] = (i64)(u32)key[i];
}

}  // namespace vidops::cuda
