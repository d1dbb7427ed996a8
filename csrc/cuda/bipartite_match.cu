// Bipartite matching of even with odd tokens (arXiv 2210.09461): unit keys, the best partner of every even token, and
// a sort per item.
#include "tokens.cuh"

namespace vidops::cuda {

constexpr int kMatchSortThreads = 512;
constexpr int kMatchDepth = 64;               // channels at a time
constexpr int kMatchPitch = kMatchDepth + 1;  // of a key in shared memory: those of a warp's lanes lie in other banks
constexpr int kMatchShared = (kWarp + kTokenThreads / kWarp) * kMatchPitch * 4;  // bytes

struct UnitKeysArgs {
  TokenRows metric;
  int tokens;
  i64 rows;  // of all items
  float* unit;
};

struct MatchArgs {
  TokenRows metric;
  int blocks;        // of an item
  int tokens, even;  // N and ceil(N/2)
  bool class_token, distill_token;
  const float* unit;  // (items, tokens, width)
  float* similarity;  // (items, even)
  i64* partner;       // the same
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

// NaN before every number, then the larger, then the smaller index: as torch.max chooses.
VIDOPS_DEVICE bool chosen_before(float a, int at_a, float b, int at_b) {
  if (a != a || b != b) return (a != a) && (b == b || at_a < at_b);
  return a > b || (a == b && at_a < at_b);
}

template <class Storage>
VIDOPS_DEVICE double sqrt_of_squares(const typename Storage::Element* x, int width) {
  double sum = 0;
  VIDOPS_UNROLL_BY(8)
  for (int c = 0; c < width; ++c) {
    const double value = Storage::value(x[c]);
    sum += value * value;
  }
  return square_root(sum);
}

// The cosine of two keys, one with its norm, rounded once.
template <class Storage>
VIDOPS_DEVICE float exact_cosine(const typename Storage::Element* x, const typename Storage::Element* y, int width,
                                 double x_size) {
  double xy = 0, yy = 0;
  VIDOPS_UNROLL_BY(8)
  for (int c = 0; c < width; ++c) {
    const double value = Storage::value(y[c]);
    xy += Storage::value(x[c]) * value, yy += value * value;
  }
  const double size = x_size * square_root(yy);
  return size == 0 ? 0.0f : (float)(xy / size);
}

// One warp per even token, from `first` on; the block reads the odd ones together, one for each lane. Equal tokens have
// the same sums wherever they are: each is one lane's, in channel order.
template <class Storage>
VIDOPS_DEVICE void match_tokens(const MatchArgs& a, int first, int item, char* memory) {
  using Element = typename Storage::Element;
  const int width = a.metric.width, odd = a.tokens / 2, i = first + warp_id(), lane = lane_id();
  const bool there = i < a.even;
  const float* unit = a.unit + (i64)item * a.tokens * width;
  float* others = reinterpret_cast<float*>(memory);
  float* own = others + kWarp * kMatchPitch;
  const Element* key = static_cast<const Element*>(a.metric.data) + item * a.metric.item;
  const double size = there ? sqrt_of_squares<Storage>(key + (i64)2 * i * a.metric.row, width) : 0;
  // By which the product of two unit keys may miss another that is as large.
  const float slack = 2 * (width + 4) * 6e-8f;
  float best = -VIDOPS_INFINITY, most = -VIDOPS_INFINITY;
  int at = 0x7fffffff;
  // Keys in memory: every second one from `from` on, of `count`.
  const auto load = [&](float* to, int from, int rows, int count, int channel) {
    for (int e = thread_x(); e < rows * kMatchDepth; e += kTokenThreads) {
      const int r = e / kMatchDepth, c = e % kMatchDepth;
      const bool inside = from / 2 + r < count && channel + c < width;
      to[r * kMatchPitch + c] = inside ? unit[(i64)(from + 2 * r) * width + channel + c] : 0.0f;
    }
  };
  for (int base = 0; base < odd; base += kWarp) {
    float dot = 0;
    for (int channel = 0; channel < width; channel += kMatchDepth) {
      block_sync();
      load(others, 2 * base + 1, kWarp, odd, channel);
      load(own, 2 * first, kTokenThreads / kWarp, a.even, channel);
      block_sync();
      const int depth = width - channel < kMatchDepth ? width - channel : kMatchDepth;
      VIDOPS_UNROLL_BY(8)
      for (int c = 0; c < depth; ++c)
        dot = multiply_add(own[warp_id() * kMatchPitch + c], others[lane * kMatchPitch + c], dot);
    }
    if (!there) continue;
    const int j = base + lane;
    if (a.distill_token && j == 0) dot = -VIDOPS_INFINITY;
    most = larger_number(most, warp_max(j < odd && dot == dot ? dot : -VIDOPS_INFINITY));
    // Whatever rounding may have kept from being the maximum is looked at again, rounded once: tokens which have an
    // equal one among the odd ones tie, and the first of the best is taken. None is better than 1.
    if (j >= odd || dot < most - slack || (finite(dot) && best >= 1)) continue;
    if (finite(dot))
      dot = exact_cosine<Storage>(key + (i64)2 * i * a.metric.row, key + (i64)(2 * j + 1) * a.metric.row, width, size);
    if (chosen_before(dot, j, best, at)) best = dot, at = j;
  }
  if (!there) return;
  VIDOPS_UNROLL
  for (int mask = kWarp / 2; mask; mask >>= 1) {
    const float other = shuffle_xor(best, mask);
    const int other_at = shuffle_xor(at, mask);
    if (chosen_before(other, other_at, best, at)) best = other, at = other_at;
  }
  if (odd == 0) at = -1;
  if (lane != 0) return;
  a.similarity[(i64)item * a.even + i] = a.class_token && i == 0 ? -VIDOPS_INFINITY : best;
  a.partner[(i64)item * a.even + i] = at;
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
