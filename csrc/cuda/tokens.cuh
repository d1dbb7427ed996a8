// What bipartite_match and sta_score share: unit keys, and sorting by (value, index).
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
        const int low = 2 * i - (i & (apart - 1)), high = low + apart;
        const u64 a = key[low], b = key[high];
        if ((a > b) == ((low & run) == 0)) key[low] = b, key[high] = a;
      }
    }
  block_sync();
}

}  // namespace vidops::cuda
