// Rows by index, and sums of rows by index. Indices out of range read nothing, and write nothing.
#include "split_products.cuh"

namespace vidops::cuda {

constexpr int kGatherThreads = 256;

struct GatherArgs {
  const char* x;
  i64 item, row;  // strides in bytes
  const i64* index;
  i64 index_item;
  int tokens, taken;
  i64 rows;   // of the result, over all items
  int units;  // of 16, 8, 4 or 2 bytes in a row
  char* out;
};

struct alignas(16) Bytes16 {
  u64 v[2];
};

namespace {

// One warp per row of the result.
template <class Unit>
VIDOPS_DEVICE void gather(const GatherArgs& a) {
  const i64 row = (i64)block_x() * (kGatherThreads / kWarp) + warp_id();
  if (row >= a.rows) return;
  const i64 item = row / a.taken, from = a.index[item * a.index_item + row % a.taken];
  const bool there = from >= 0 && from < a.tokens;
  const Unit* x = reinterpret_cast<const Unit*>(a.x + item * a.item + (there ? from : 0) * a.row);
  Unit* out = reinterpret_cast<Unit*>(a.out) + row * a.units;
  VIDOPS_UNROLL_BY(4)
  for (int u = lane_id(); u < a.units; u += kWarp) out[u] = there ? x[u] : Unit{};
}

}  // namespace

VIDOPS_KERNEL(kGatherThreads) gather_tokens_16(GatherArgs a) { gather<Bytes16>(a); }
VIDOPS_KERNEL(kGatherThreads) gather_tokens_8(GatherArgs a) { gather<u64>(a); }
VIDOPS_KERNEL(kGatherThreads) gather_tokens_4(GatherArgs a) { gather<u32>(a); }
VIDOPS_KERNEL(kGatherThreads) gather_tokens_2(GatherArgs a) { gather<u16>(a); }

struct ScatterArgs {
  const void* x;
  i64 item, row;  // strides
  const i64* index;
  i64 index_item;
  int tokens, taken, width;
  i64 rows;    // of the result, over all items
  int* first;  // (items, tokens): the first row that goes to a place, -1 where none does
  int* next;   // (items, taken): the next one that goes to the same place
  void* out;
};

// One warp per place lists the rows that go to it, in their order: the index is short, and read from the cache.
VIDOPS_KERNEL(kGatherThreads) scatter_tokens_lists(ScatterArgs a) {
  const i64 place = (i64)block_x() * (kGatherThreads / kWarp) + warp_id();
  if (place >= a.rows) return;
  const i64 item = place / a.tokens, wanted = place % a.tokens;
  const i64* index = a.index + item * a.index_item;
  const int lane = lane_id();
  int first = -1, last = -1;
  for (int base = 0; base < a.taken; base += kWarp) {
    const bool mine = base + lane < a.taken && index[base + lane] == wanted;
    const u32 found = ballot(mine);
    if (!found) continue;
    const u32 after = lane == kWarp - 1 ? 0 : found & (0xffffffffu << (lane + 1));
    if (mine && after) a.next[item * a.taken + base + lane] = base + lowest_bit(after);
    // The last one of a batch waits for the first of the next, so that no entry is written twice.
    if (lane == 0 && last >= 0) a.next[item * a.taken + last] = base + lowest_bit(found);
    if (first < 0) first = base + lowest_bit(found);
    u32 rest = found;
    while (rest & (rest - 1)) rest &= rest - 1;
    last = base + lowest_bit(rest);
  }
  if (lane == 0 && last >= 0) a.next[item * a.taken + last] = -1;
  if (lane == 0) a.first[place] = first;
}

namespace {

// One warp per place: rows are added in their order.
template <class Storage, class Sum, class Write>
VIDOPS_DEVICE void scatter(const ScatterArgs& a, Write write_value) {
  using Element = typename Storage::Element;
  const i64 place = (i64)block_x() * (kGatherThreads / kWarp) + warp_id();
  if (place >= a.rows) return;
  const i64 item = place / a.tokens;
  const int first = a.first[place];
  const Element* x = static_cast<const Element*>(a.x) + item * a.item;
  Element* out = static_cast<Element*>(a.out) + place * a.width;
  for (int c = lane_id(); c < a.width; c += kWarp) {
    Sum total = 0;
    for (int k = first; k >= 0; k = a.next[item * a.taken + k]) total += Storage::value(x[k * a.row + c]);
    out[c] = write_value(total);
  }
}

}  // namespace

VIDOPS_KERNEL(kGatherThreads) scatter_tokens_f32(ScatterArgs a) {
  scatter<FloatStorage, float>(a, [](float v) { return v; });
}
VIDOPS_KERNEL(kGatherThreads) scatter_tokens_f64(ScatterArgs a) {
  scatter<DoubleStorage, double>(a, [](double v) { return v; });
}
VIDOPS_KERNEL(kGatherThreads) scatter_tokens_f16(ScatterArgs a) {
  scatter<HalfStorage, float>(a, [](float v) { return float_to_half(v); });
}
VIDOPS_KERNEL(kGatherThreads) scatter_tokens_bf16(ScatterArgs a) {
  scatter<BfloatStorage, float>(a, [](float v) { return (u16)pack_bfloat(v, 0.0f); });
}

}  // namespace vidops::cuda
