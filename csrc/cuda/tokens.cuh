// What bipartite_match and sta_score share: unit keys, best partners, and sorting by (value, index).
#pragma once

#include "split_products.cuh"

namespace vidops::cuda {

constexpr int kTokenThreads = 256;  // of kernels with a warp per token

// Rows (items, tokens, width) of any strides but that of the last axis. A group is `tokens` rows of an item.
struct TokenRows {
  const void* data;
  i64 item, row;  // strides
  int width;
  bool whole;  // four channels can be read at a time
};

VIDOPS_DEVICE double warp_sum(double v) {
  VIDOPS_UNROLL
  for (int mask = 16; mask; mask >>= 1) v += shuffle_xor(v, mask);
  return v;
}

// The warp's sum of use(value) over a row, in double: what is decided by small differences must not be rounded early.
template <class Storage, class Use>
VIDOPS_DEVICE double row_sum(const typename Storage::Element* x, int width, bool whole, Use use) {
  double part[2] = {};
  if constexpr (sizeof(typename Storage::Element) < sizeof(double))
    if (whole) {
      VIDOPS_UNROLL_BY(4)
      for (int quad = lane_id(); quad < width / 4; quad += kWarp) {
        const FloatQuad v = load_quad<Storage>(reinterpret_cast<const char*>(x), quad);
        VIDOPS_UNROLL
        for (int e = 0; e < 4; ++e) part[e & 1] += use(v.v[e]);
      }
      return warp_sum(part[0] + part[1]);
    }
  for (int c = lane_id(); c < width; c += kWarp) part[0] += use(Storage::value(x[c]));
  return warp_sum(part[0]);
}

// One warp: unit = x / |x|, zeros for zeros, NaN where an element is not finite. No square of a float over- or
// underflows in double, and |x| is rounded once, so that equal rows stay equal and a row of one element is 1 or -1.
template <class Storage>
VIDOPS_DEVICE void unit_row(const typename Storage::Element* x, int width, bool whole, float* unit) {
  const double norm = square_root(row_sum<Storage>(x, width, whole, [](float v) { return (double)v * (double)v; }));
  const float rounded = (float)norm;
  const bool usual = rounded > 1e-37f && rounded < 1e37f;
  for (int c = lane_id(); c < width; c += kWarp) {
    const float v = Storage::value(x[c]);
    float scaled = v / rounded;
    if (!usual) {  // a branch: the division of doubles is long
      scaled = norm == 0 ? 0.0f : (float)((double)v / norm);
      if (!(finite(v) && norm - norm == 0)) scaled = bits_float(0x7fc00000u);
    }
    unit[c] = scaled;
  }
}

// Bits that sort as the numbers do, NaN last.
VIDOPS_DEVICE u32 sorting_bits(float v) {
  if (v != v) return 0xffffffffu;
  const u32 bits = float_bits(v + 0.0f);  // the negative zero is no other number
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
VIDOPS_DEVICE u64 sorting_bits(double v) {
  if (v != v) return ~u64{0};
  const u64 bits = double_bits(v + 0.0);
  return bits >> 63 ? ~bits : bits | u64{1} << 63;
}
VIDOPS_DEVICE u64 sorting_key(float v, int index) { return (u64)sorting_bits(v) << 32 | (u32)index; }

// The whole block: ascending order of `count` keys, a power of two, in shared memory.
VIDOPS_DEVICE void block_sort(u64* key, int count) {
  bool others = true;  // whether another warp may have written what comes next: not while pairs lie in 64 keys
  for (int run = 2; run <= count; run *= 2)
    for (int apart = run / 2; apart; apart /= 2) {
      if (others || apart > kWarp)
        block_sync();
      else
        warp_sync();
      others = apart > kWarp;
      for (int i = thread_x(); i < count / 2; i += block_threads()) {
        const int low = i / apart * 2 * apart + i % apart, high = low + apart;
        const u64 a = key[low], b = key[high];
        if ((a > b) == ((low & run) == 0)) key[low] = b, key[high] = a;
      }
    }
  block_sync();
}

// NaN before every number, then the larger, then the smaller index: as torch.max chooses.
VIDOPS_DEVICE bool chosen_before(float a, int at_a, float b, int at_b) {
  if (a != a || b != b) return (a != a) && (b == b || at_a < at_b);
  return a > b || (a == b && at_a < at_b);
}

struct MatchArgs {
  TokenRows metric;
  int blocks;         // of an item
  int first_row;      // of the matched tokens within an item
  int tokens, even;   // N and ceil(N/2)
  bool class_token, distill_token;
  const float* unit;  // (items, rows of an item, width)
  i64 unit_item;
  float* similarity;  // (items, even)
  i64* partner;       // the same, null: not wanted
};

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

constexpr int kMatchDepth = 64;              // channels at a time
constexpr int kMatchPitch = kMatchDepth + 1;  // of a key in shared memory: those of a warp's lanes lie in other banks
constexpr int kMatchShared = (kWarp + kTokenThreads / kWarp) * kMatchPitch * 4;  // bytes

// One warp per even token, from `first` on; the block reads the odd ones together, one for each lane. Equal tokens have
// the same sums wherever they are: each is one lane's, in channel order.
template <class Storage>
VIDOPS_DEVICE void match_tokens(const MatchArgs& a, int first, int item, char* memory) {
  using Element = typename Storage::Element;
  const int width = a.metric.width, odd = a.tokens / 2, i = first + warp_id(), lane = lane_id();
  const bool there = i < a.even;
  const float* unit = a.unit + item * a.unit_item + (i64)a.first_row * width;
  float* others = reinterpret_cast<float*>(memory);
  float* own = others + kWarp * kMatchPitch;
  const Element* key = static_cast<const Element*>(a.metric.data) + item * a.metric.item + a.first_row * a.metric.row;
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
  if (a.partner) a.partner[(i64)item * a.even + i] = at;
}

}  // namespace vidops::cuda
