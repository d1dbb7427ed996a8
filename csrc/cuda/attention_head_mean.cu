// Head-averaged softmax map (Eq. E1, Ding et al., ECCV 2024): packing of the operands, log-sum-exp of every head's
// row, then the map one tile at a time with the heads innermost, so that no per-head map exists.
#include "attention_groups.cuh"

namespace vidops::cuda {

constexpr int kRangeRows = 64;
constexpr int kPackThreads = 256;
constexpr int kCombineThreads = 256;
constexpr int kLseKeys = 128;
constexpr int kMapKeys = 128;
constexpr int kMapThreads = 512;
// The forms by products of warpgroups. A limit below the threads they need marks kernels without such products.
constexpr int kLseGroups = 4, kWideLseGroups = 2, kMapGroups = 2;
constexpr int kMapParts = 2;  // a warpgroup has kBlockRows rows by kMapParts * kGroupKeys keys of the map
constexpr int kLseGroupLimit = kGroupProducts ? kLseGroups * kGroupThreads : kWarp;
constexpr int kWideLseGroupLimit = kGroupProducts ? kWideLseGroups * kGroupThreads : kWarp;
constexpr int kMapGroupLimit = kGroupProducts ? kMapGroups * kGroupThreads : kWarp;
constexpr int kMaxSources = 4;

struct AttentionSource {
  const void* data;
  i64 batch_stride, head_stride, row_stride;
  int rows;
  bool poison;  // infinities become NaN, so that they take their row (of q) or every row (of k) with them
  PackedOperand packed;
};

struct AttentionPackArgs {
  AttentionSource source[kMaxSources];
  int heads, batch_heads, d, width, chunks;
  int blocks_per_head;
  u32 exponent_mask;  // of the 16-bit type
};

VIDOPS_DEVICE i64 source_row(const AttentionPackArgs& a, const AttentionSource& s, int head, int row) {
  return head / a.heads * s.batch_stride + head % a.heads * s.head_stride + row * s.row_stride;
}

// Largest finite magnitude of every head.
VIDOPS_KERNEL(kPackThreads) attention_range(AttentionPackArgs a) {
  const AttentionSource& s = a.source[block_y()];
  const int head = (int)(block_x() / (u32)a.blocks_per_head);
  const int first = (int)(block_x() % (u32)a.blocks_per_head) * kRangeRows;
  const int rows = s.rows - first < kRangeRows ? s.rows - first : kRangeRows;
  float largest = 0;
  for (int at = thread_x(); at < rows * a.d; at += kPackThreads) {
    const float v = magnitude(static_cast<const float*>(s.data)[source_row(a, s, head, first + at / a.d) + at % a.d]);
    if (finite(v) && v > largest) largest = v;
  }
  largest = warp_max(largest);
  if (lane_id() == 0 && largest > 0) atomic_max_global(s.packed.range + head, float_bits(largest));
}

struct PackPlace {
  int head, chunk, row, channel;
  i64 to;  // element of the first plane
};

// Eight channels per thread. False beyond the operand's end.
template <int kPlanes>
VIDOPS_DEVICE bool pack_place(const AttentionPackArgs& a, const AttentionSource& s, PackPlace& place) {
  if (s.packed.rows == 0) return false;
  const int groups = a.width / 8;
  place.head = (int)(block_x() / (u32)a.blocks_per_head);
  const int item = (int)(block_x() % (u32)a.blocks_per_head) * kPackThreads + thread_x();
  const int row = item / groups % s.packed.rows, group = item % groups;
  place.chunk = item / groups / s.packed.rows;
  place.row = row;
  place.channel = place.chunk * a.width + group * 8;
  const i64 first = ((i64)place.head * a.chunks + place.chunk) * s.packed.rows + row / kBlockRows * kBlockRows;
  place.to = (first * kPlanes + row % kBlockRows) * a.width + (group ^ swizzle(row, a.width)) * 8;
  return place.chunk < a.chunks;
}

struct alignas(16) EightHalves {
  u32 word[4];
};

VIDOPS_KERNEL(kPackThreads) attention_pack_f32(AttentionPackArgs a) {
  const AttentionSource& s = a.source[block_y()];
  PackPlace place;
  if (!pack_place<SplitKind::kPlanes>(a, s, place)) return;
  const float up = power_of_two(range_shift(s.packed.range[place.head]));
  const float* from = static_cast<const float*>(s.data) + source_row(a, s, place.head, place.row) + place.channel;
  const int left = place.row < s.rows ? a.d - place.channel : 0;
  EightHalves high, low;
  VIDOPS_UNROLL
  for (int w = 0; w < 4; ++w) {
    float v[2], rest[2];
    VIDOPS_UNROLL
    for (int e = 0; e < 2; ++e) {
      v[e] = w * 2 + e < left ? from[w * 2 + e] * up : 0.0f;
      if (s.poison && !finite(v[e])) v[e] = v[e] - v[e];
    }
    high.word[w] = pack_half(v[0], v[1]);
    VIDOPS_UNROLL
    for (int e = 0; e < 2; ++e)
      rest[e] = finite(v[e]) ? v[e] - half_to_float((u16)(high.word[w] >> e * 16)) : 0.0f;
    low.word[w] = pack_half(rest[0], rest[1]);
  }
  *reinterpret_cast<EightHalves*>(s.packed.data + place.to) = high;
  *reinterpret_cast<EightHalves*>(s.packed.data + place.to + kBlockRows * a.width) = low;
}

// float16 and bfloat16 are stored as they are.
VIDOPS_KERNEL(kPackThreads) attention_pack_16bit(AttentionPackArgs a) {
  const AttentionSource& s = a.source[block_y()];
  PackPlace place;
  if (!pack_place<1>(a, s, place)) return;
  const u16* from = static_cast<const u16*>(s.data) + source_row(a, s, place.head, place.row) + place.channel;
  const int left = place.row < s.rows ? a.d - place.channel : 0;
  EightHalves packed;
  VIDOPS_UNROLL
  for (int w = 0; w < 4; ++w) {
    packed.word[w] = 0;
    VIDOPS_UNROLL
    for (int e = 0; e < 2; ++e) {
      u32 v = w * 2 + e < left ? from[w * 2 + e] : 0;
      if (s.poison && (v & a.exponent_mask) == a.exponent_mask) v = 0x7fff;  // a NaN of both types
      packed.word[w] |= v << e * 16;
    }
  }
  *reinterpret_cast<EightHalves*>(s.packed.data + place.to) = packed;
}

VIDOPS_DEVICE void store_lse(const AttentionArgs& a, i64 at, float top, float sum) {
  const float log_sum = log_natural(sum);
  a.lse[at] = top * kLn2 + log_sum;
  a.lse2[at] = top + log_sum * kLog2e;
}

VIDOPS_DEVICE void merge_sums(float& top, float& sum, float other_top, float other_sum) {
  const float higher = other_top > top ? other_top : top;
  sum = sum * exp2_flush(top - higher) + other_sum * exp2_flush(other_top - higher);
  top = higher;
}

// The sum of block_y's range of keys for row `at` of (B,H,N).
VIDOPS_DEVICE void store_sum(const AttentionArgs& a, i64 at, float top, float sum) {
  if (a.splits > 1) {
    a.part_top[(i64)block_y() * a.batch_heads * a.n + at] = top;
    a.part_sum[(i64)block_y() * a.batch_heads * a.n + at] = sum;
  } else {
    store_lse(a, at, top, sum);
  }
}

// Merges the sums of four neighbouring lanes, the same way in each: the lower lane's value comes first.
VIDOPS_DEVICE void merge_lanes(float& top, float& sum) {
  VIDOPS_UNROLL
  for (int mask = 1; mask <= 2; mask <<= 1) {
    float other_top = shuffle_xor(top, mask), other_sum = shuffle_xor(sum, mask);
    if (lane_id() & mask) {
      merge_sums(other_top, other_sum, top, sum);
      top = other_top, sum = other_sum;
    } else {
      merge_sums(top, sum, other_top, other_sum);
    }
  }
}

// One block per kRowTile query rows, head and range of key tiles; warps hold 32 rows by 64 keys of the scores. Every
// thread keeps the running maximum and sum of the columns it sees, in units of log 2; threads are merged at the end.
// NaN does not enter the maximum but does enter the sum.
template <class Kind>
VIDOPS_DEVICE void attention_lse(const AttentionArgs& a) {
  VIDOPS_SHARED(memory);
  const int tiles = a.q.rows / kRowTile;
  const int head = (int)(block_x() / (u32)tiles);
  const int base = (int)(block_x() % (u32)tiles) * kRowTile;
  const int key_tiles = (a.m + kLseKeys - 1) / kLseKeys;
  const int from = (int)block_y() * a.tiles_per_split;
  const int until = from + a.tiles_per_split < key_tiles ? from + a.tiles_per_split : key_tiles;

  u16* const x = reinterpret_cast<u16*>(memory);
  u16* const y = x + tile_size<Kind>(kRowTile, a.width);
  const int y_size = tile_size<Kind>(kLseKeys, a.width);
  const float factor = a.factor * operand_factor(a.q, head) * operand_factor(a.k, head);
  const int lane = lane_id(), row = warp_id() % 4 * 32, column = warp_id() / 4 * 64;

  float top[4], sum[4], s[2][8][4];
  VIDOPS_UNROLL
  for (int r = 0; r < 4; ++r) top[r] = kLowest, sum[r] = 0;
  pipeline(
      until - from, a.chunks, a.stages,
      [&](int tile, int chunk, int stage) {
        if (tile == 0 || a.chunks > 1) load_rows<Kind>(x, a.q, a, head, chunk, base, kRowTile);
        load_rows<Kind>(y + stage * y_size, a.k, a, head, chunk, (from + tile) * kLseKeys, kLseKeys);
      },
      [&](int tile, int chunk, int stage) {
        const int first = (from + tile) * kLseKeys + column;
        if (base + row >= a.n || first >= a.m) return;
        if (chunk == 0) clear(s);
        multiply_rows<Kind>(s, x, row, y + stage * y_size, column, a.width, lane, a.depth);
        if (chunk + 1 < a.chunks) return;
        // A positive factor can wait until after the maximum, and then costs no instruction of its own.
        float late = factor;
        if (factor <= 0 || first + 64 > a.m) {
          late = 1;
          VIDOPS_UNROLL
          for (int i = 0; i < 2; ++i)
            VIDOPS_UNROLL
            for (int j = 0; j < 8; ++j)
              VIDOPS_UNROLL
              for (int e = 0; e < 4; ++e)
                s[i][j][e] = first + j * 8 + lane % 4 * 2 + e % 2 < a.m ? s[i][j][e] * factor : -VIDOPS_INFINITY;
        }
        VIDOPS_UNROLL
        for (int r = 0; r < 4; ++r) {
          float highest = -VIDOPS_INFINITY, part = 0;
          VIDOPS_UNROLL
          for (int j = 0; j < 8; ++j)
            VIDOPS_UNROLL
            for (int e = 0; e < 2; ++e) highest = larger_number(highest, s[r / 2][j][r % 2 * 2 + e]);
          highest = larger_number(top[r], highest * late);
          VIDOPS_UNROLL
          for (int j = 0; j < 8; ++j)
            VIDOPS_UNROLL
            for (int e = 0; e < 2; ++e) part += exp2_flush(s[r / 2][j][r % 2 * 2 + e] * late - highest);
          sum[r] = sum[r] * exp2_flush(top[r] - highest) + part;
          top[r] = highest;
        }
      });

  float* const shared_top = reinterpret_cast<float*>(memory);
  float* const shared_sum = shared_top + 2 * kRowTile;
  VIDOPS_UNROLL
  for (int r = 0; r < 4; ++r) {
    merge_lanes(top[r], sum[r]);
    if (lane % 4 == 0) {
      const int at = column / 64 * kRowTile + row + r / 2 * 16 + r % 2 * 8 + lane / 4;
      shared_top[at] = top[r];
      shared_sum[at] = sum[r];
    }
  }
  block_sync();
  const int me = thread_x();
  if (me >= kRowTile || base + me >= a.n) return;
  float row_top = shared_top[me], row_sum = shared_sum[me];
  merge_sums(row_top, row_sum, shared_top[kRowTile + me], shared_sum[kRowTile + me]);
  store_sum(a, (i64)head * a.n + base + me, row_top, row_sum);
}

VIDOPS_KERNEL(kAttentionThreads, 2) attention_lse_f32(AttentionArgs a) { attention_lse<SplitKind>(a); }
VIDOPS_KERNEL(kAttentionThreads) attention_lse_f16(AttentionArgs a) { attention_lse<HalfKind>(a); }
VIDOPS_KERNEL(kAttentionThreads) attention_lse_bf16(AttentionArgs a) { attention_lse<BfloatKind>(a); }

// The same by products of warpgroups, one per kBlockRows query rows. The queries of a head of one chunk stay in shared
// memory; those of a wider one come with every tile of keys.
template <class Kind, bool kWide>
VIDOPS_DEVICE void attention_lse_groups(const AttentionArgs& a) {
  VIDOPS_SHARED(memory);
  constexpr int kGroups = kWide ? kWideLseGroups : kLseGroups, kThreads = kGroups * kGroupThreads;
  constexpr int kRows = kGroups * kBlockRows, kAhead = kWide ? 1 : 2, kStages = kAhead + 2;
  constexpr int kX = Kind::kPlanes * kRows * kMaxWidth, kY = Kind::kPlanes * kGroupKeys * kMaxWidth;
  const int tiles = (a.q.rows + kRows - 1) / kRows;
  const int head = (int)(block_x() / (u32)tiles);
  const int base = (int)(block_x() % (u32)tiles) * kRows;
  const int key_tiles = (a.m + kGroupKeys - 1) / kGroupKeys;
  const int from = (int)block_y() * a.tiles_per_split;
  const int until = from + a.tiles_per_split < key_tiles ? from + a.tiles_per_split : key_tiles;
  const int chunks = kWide ? a.chunks : 1, group = warp_id() / 4;
  const int rows = a.q.rows - base < kRows ? a.q.rows - base : kRows;
  const bool active = base + group * kBlockRows < a.n;
  const float factor = a.factor * operand_factor(a.q, head) * operand_factor(a.k, head);

  u16* const x = reinterpret_cast<u16*>(memory);  // one for all stages, or one for each
  u16* const y = x + (kWide ? kStages : 1) * kX;
  const u16* const my_x = x + tile_size<Kind>(group * kBlockRows, kMaxWidth);

  float top[2] = {kLowest, kLowest}, sum[2] = {};
  GroupScores s;
  int load_tile = from, load_chunk = 0, load_stage = 0;
  int tile = from, chunk = 0, stage = 0, first = 0;
  bool whole = false;
  staggered<kAhead>(
      (until - from) * chunks, group >= kGroups / 2,
      [&] {
        if (load_tile == until) return;
        if (kWide || load_tile == from)
          load_rows<Kind, kThreads>(x + (kWide ? load_stage * kX : 0), a.q, a, head, load_chunk, base, rows);
        load_keys<Kind, kThreads>(y + load_stage * kY, a.k, a, head, load_chunk, load_tile * kGroupKeys);
        load_stage = load_stage + 1 == kStages ? 0 : load_stage + 1;
        if (++load_chunk == chunks) load_chunk = 0, ++load_tile;
      },
      [&] {
        if (active) start_scores<Kind>(s, my_x + (kWide ? stage * kX : 0), y + stage * kY, a.depth, chunk > 0);
      },
      [&] {
        stage = stage + 1 == kStages ? 0 : stage + 1;
        whole = ++chunk == chunks;
        first = tile * kGroupKeys;
        if (whole) chunk = 0, ++tile;
      },
      [&] {
        if (!whole || !active) return;
        group_settle(s);
        // A positive factor can wait until after the maximum, and then costs no instruction of its own.
        float late = factor;
        if (factor <= 0 || first + kGroupKeys > a.m) {
          late = 1;
          for_scores(s, [&](float& value, int strip, int e) {
            value = first + group_key(strip, e) < a.m ? value * factor : -VIDOPS_INFINITY;
          });
        }
        VIDOPS_UNROLL
        for (int r = 0; r < 2; ++r) {
          float highest = -VIDOPS_INFINITY, part[2] = {};
          VIDOPS_UNROLL
          for (int j = 0; j < kGroupKeys / 8; ++j)
            highest = larger_number(highest, larger_number(s[j][r * 2], s[j][r * 2 + 1]));
          highest = larger_number(top[r], highest * late);
          VIDOPS_UNROLL
          for (int j = 0; j < kGroupKeys / 8; ++j)
            VIDOPS_UNROLL
            for (int e = 0; e < 2; ++e) part[e] += exp2_flush(s[j][r * 2 + e] * late - highest);
          sum[r] = sum[r] * exp2_flush(top[r] - highest) + (part[0] + part[1]);
          top[r] = highest;
        }
      });

  VIDOPS_UNROLL
  for (int r = 0; r < 2; ++r) {
    merge_lanes(top[r], sum[r]);
    const int row = base + warp_id() * 16 + r * 8 + lane_id() / 4;
    if (lane_id() % 4 == 0 && row < a.n) store_sum(a, (i64)head * a.n + row, top[r], sum[r]);
  }
}

template <class Kind, bool kWide>
VIDOPS_DEVICE void lse_by_groups(const AttentionArgs& a) {
  if constexpr (kGroupProducts) attention_lse_groups<Kind, kWide>(a);
}

VIDOPS_KERNEL(kLseGroupLimit) attention_lse_groups_f32(AttentionArgs a) { lse_by_groups<SplitKind, false>(a); }
VIDOPS_KERNEL(kLseGroupLimit) attention_lse_groups_f16(AttentionArgs a) { lse_by_groups<HalfKind, false>(a); }
VIDOPS_KERNEL(kLseGroupLimit) attention_lse_groups_bf16(AttentionArgs a) { lse_by_groups<BfloatKind, false>(a); }
VIDOPS_KERNEL(kWideLseGroupLimit) attention_lse_wide_f32(AttentionArgs a) { lse_by_groups<SplitKind, true>(a); }
VIDOPS_KERNEL(kWideLseGroupLimit) attention_lse_wide_f16(AttentionArgs a) { lse_by_groups<HalfKind, true>(a); }
VIDOPS_KERNEL(kWideLseGroupLimit) attention_lse_wide_bf16(AttentionArgs a) { lse_by_groups<BfloatKind, true>(a); }

// Merges the key ranges of a row, in order.
VIDOPS_KERNEL(kCombineThreads) attention_lse_combine(AttentionArgs a) {
  const i64 rows = (i64)a.batch_heads * a.n, at = (i64)block_x() * kCombineThreads + thread_x();
  if (at >= rows) return;
  float top = a.part_top[at], sum = a.part_sum[at];
  for (int split = 1; split < a.splits; ++split)
    merge_sums(top, sum, a.part_top[split * rows + at], a.part_sum[split * rows + at]);
  store_lse(a, at, top, sum);
}

struct alignas(8) FloatPair {
  float first, second;
};

VIDOPS_DEVICE void store_pair(float* row, int column, int columns, float first, float second) {
  if (columns % 2 == 0) {
    if (column < columns) *reinterpret_cast<FloatPair*>(row + column) = FloatPair{first, second};
  } else {
    if (column < columns) row[column] = first;
    if (column + 1 < columns) row[column + 1] = second;
  }
}

// The tile of the map that a block works on, and how it streams the heads. A warp has 32 rows by 32 keys, of which it
// holds 16 kM rows, after the first `skip`, at a time.
template <class Kind, int kM>
struct MapTile {
  using Values = float[kM][4][4];

  const AttentionArgs& a;
  u16* data;
  int batch, base_n, base_m;
  int x_size, stage_size;
  int row, column;        // of this warp within the tile
  int my_row, my_column;  // of this thread's first element in the map
  bool active;            // this warp has elements

  VIDOPS_DEVICE MapTile(const AttentionArgs& args, char* memory, int skip = 0)
      : a(args), data(reinterpret_cast<u16*>(memory)) {
    const u32 tiles_n = (u32)a.q.rows / kRowTile, tiles_m = (u32)(a.m + kMapKeys - 1) / kMapKeys, tile = block_x();
    // Neighbouring blocks share the keys of a tile.
    base_n = (int)(tile % tiles_n) * kRowTile;
    base_m = (int)(tile / tiles_n % tiles_m) * kMapKeys;
    batch = (int)(tile / tiles_n / tiles_m);
    x_size = tile_size<Kind>(kRowTile, a.width);
    stage_size = x_size + tile_size<Kind>(kMapKeys, a.width);
    row = warp_id() % 4 * 32 + skip;
    column = warp_id() / 4 * 32;
    my_row = base_n + row + lane_id() / 4;
    my_column = base_m + column + lane_id() % 4 * 2;
    active = base_n + row < a.n && base_m + column < a.m;
  }

  // Calls use(s, head) for every head, s the logarithms to base 2 of the head's weights.
  template <class Use>
  VIDOPS_DEVICE void for_heads(Use use) const {
    Values s;
    pipeline(
        a.heads, a.chunks, a.stages,
        [&](int h, int chunk, int stage) {
          const int head = batch * a.heads + h;
          u16* const to = data + stage * stage_size;
          load_rows<Kind, kMapThreads>(to, a.q, a, head, chunk, base_n, kRowTile);
          load_rows<Kind, kMapThreads>(to + x_size, a.k, a, head, chunk, base_m, kMapKeys);
        },
        [&](int h, int chunk, int stage) {
          if (!active) return;
          // Read first what the scores will meet, so that its latency passes behind the product.
          const int head = batch * a.heads + h;
          const float factor = a.factor * operand_factor(a.q, head) * operand_factor(a.k, head);
          float lse2[2 * kM];
          VIDOPS_UNROLL
          for (int r = 0; r < 2 * kM; ++r) {
            const int i = my_row + r / 2 * 16 + r % 2 * 8;
            lse2[r] = a.lse2[(i64)head * a.n + (i < a.n ? i : a.n - 1)];
          }
          const u16* const from = data + stage * stage_size;
          if (chunk == 0) clear(s);
          multiply_rows<Kind>(s, from, row, from + x_size, column, a.width, lane_id(), a.depth);
          if (chunk + 1 < a.chunks) return;
          VIDOPS_UNROLL
          for (int i = 0; i < kM; ++i)
            VIDOPS_UNROLL
            for (int j = 0; j < 4; ++j)
              VIDOPS_UNROLL
              for (int e = 0; e < 4; ++e) s[i][j][e] = s[i][j][e] * factor - lse2[i * 2 + e / 2];
          use(s, h);
        });
  }
};

template <int kM, class Visit>
VIDOPS_DEVICE void for_elements(Visit visit) {
  VIDOPS_UNROLL
  for (int i = 0; i < kM; ++i)
    VIDOPS_UNROLL
    for (int j = 0; j < 4; ++j)
      VIDOPS_UNROLL
      for (int e = 0; e < 4; ++e) visit(i, j, e);
}

template <class Kind, bool kDropout>
VIDOPS_DEVICE void attention_map(const AttentionArgs& a) {
  VIDOPS_SHARED(memory);
  using Tile = MapTile<Kind, 2>;
  const Tile tile(a, memory);
  u32* const flag = reinterpret_cast<u32*>(tile.data + a.stages * tile.stage_size);
  if (thread_x() == 0) *flag = 0;

  typename Tile::Values sum;
  clear(sum);
  tile.for_heads([&](const typename Tile::Values& x, int h) {
    for_elements<2>([&](int i, int j, int e) {
      const int n = tile.my_row + i * 16 + e / 2 * 8, m = tile.my_column + j * 8 + e % 2;
      if (!kDropout || kept(a, tile.batch * a.heads + h, n, m)) sum[i][j][e] += exp2_flush(x[i][j][e]);
    });
  });

  const float share = a.keep_scale / (float)a.heads, log_heads = log_natural((float)a.heads);
  bool tiny = false;
  VIDOPS_UNROLL
  for (int r = 0; r < 4; ++r) {
    const int i = tile.my_row + r / 2 * 16 + r % 2 * 8;
    if (!tile.active || i >= a.n) continue;
    const i64 to = ((i64)tile.batch * a.n + i) * a.m;
    VIDOPS_UNROLL
    for (int j = 0; j < 4; ++j) {
      const float first = sum[r / 2][j][r % 2 * 2], second = sum[r / 2][j][r % 2 * 2 + 1];
      const int at = tile.my_column + j * 8;
      store_pair(a.p + to, at, a.m, first * share, second * share);
      if (kDropout || !a.log_p) continue;
      store_pair(a.log_p + to, at, a.m, log_natural(first) - log_heads, log_natural(second) - log_heads);
      tiny |= (first < kTinySum && at < a.m) || (second < kTinySum && at + 1 < a.m);
    }
  }
  if (kDropout || !a.log_p) return;
  if (tiny) atomic_or_shared(flag, 1);
  block_sync();
  if (thread_x() == 0) a.tiny_tile[block_x()] = *flag;
}

struct alignas(16) FourFloats {
  float value[4];
};

// Four neighbours of a row of `columns` elements, `left` of which remain.
VIDOPS_DEVICE void store_four(float* to, int columns, int left, const FourFloats& four) {
  if (columns % 4 == 0) {
    if (left > 0) *reinterpret_cast<FourFloats*>(to) = four;
  } else {
    VIDOPS_UNROLL
    for (int e = 0; e < 4; ++e)
      if (e < left) to[e] = four.value[e];
  }
}

VIDOPS_DEVICE FourFloats load_four(const float* from, int columns, int left) {
  FourFloats four{{1, 1, 1, 1}};
  if (columns % 4 == 0) {
    if (left > 0) four = *reinterpret_cast<const FourFloats*>(from);
  } else {
    VIDOPS_UNROLL
    for (int e = 0; e < 4; ++e)
      if (e < left) four.value[e] = from[e];
  }
  return four;
}

// Where a block of the map's kernel by warpgroups is: it works through tiles of kRowTile rows by kMapParts *
// kGroupKeys keys, every a.map_blocks-th of them, and in each through heads, parts of the keys and chunks.
template <bool kWide>
struct MapStep {
  const AttentionArgs& a;
  u32 tile;
  int batch, base_n, base_m;       // base_m: of the part
  int h = 0, part = 0, chunk = 0;  // chunk stays 0 unless heads are wide

  VIDOPS_DEVICE MapStep(const AttentionArgs& args, u32 first) : a(args), tile(first) { place(); }

  VIDOPS_DEVICE u32 tiles_n() const { return (u32)a.q.rows / kRowTile; }
  VIDOPS_DEVICE u32 tiles_m() const {
    constexpr int kTileKeys = kMapParts * kGroupKeys;
    return (u32)(a.m + kTileKeys - 1) / kTileKeys;
  }
  VIDOPS_DEVICE u32 tiles() const { return tiles_n() * tiles_m() * (u32)(a.batch_heads / a.heads); }
  VIDOPS_DEVICE int head() const { return batch * a.heads + h; }
  VIDOPS_DEVICE bool has_keys() const { return base_m < a.m; }
  VIDOPS_DEVICE bool last_chunk() const { return !kWide || chunk + 1 == a.chunks; }
  VIDOPS_DEVICE bool last_head() const { return h + 1 == a.heads; }

  // Neighbouring blocks share the keys of a tile.
  VIDOPS_DEVICE void place() {
    base_n = (int)(tile % tiles_n()) * kRowTile;
    base_m = (int)(tile / tiles_n() % tiles_m()) * (kMapParts * kGroupKeys);
    batch = (int)(tile / tiles_n() / tiles_m());
  }

  VIDOPS_DEVICE void next() {
    if (!last_chunk()) {
      ++chunk;
      return;
    }
    chunk = 0;
    base_m += kGroupKeys;
    if (++part < kMapParts) return;
    part = 0;
    base_m -= kMapParts * kGroupKeys;
    if (++h < a.heads) return;
    h = 0;
    tile += (u32)a.map_blocks;
    place();
  }
};

// Ends a part of a tile: this thread's elements of the map, from the heads' sums, which it clears, and those of the
// logarithm. For these the thread reads back what it wrote: the registers are full of the sums of the whole tile.
VIDOPS_DEVICE void store_part(const AttentionArgs& a, u32 map_tile, int part, int my_row, GroupScores& sum) {
  constexpr int kFours = kGroupKeys / 16, kBatch = 4;
  const MapStep<false> step(a, map_tile);
  const int base_m = step.base_m + part * kGroupKeys;
  const int i = step.base_n + my_row, first = base_m + group_key(0, 0);
  const i64 at = ((i64)step.batch * a.n + i) * a.m + first;
  VIDOPS_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int left = i + r * 8 < a.n ? a.m - first : 0;
    VIDOPS_UNROLL
    for (int f = 0; f < kFours; ++f) {
      FourFloats four;
      VIDOPS_UNROLL
      for (int e = 0; e < 4; ++e) four.value[e] = sum[f * 2 + e / 2][r * 2 + e % 2] * a.share;
      store_four(a.p + at + (i64)r * 8 * a.m + f * 16, a.m, left - f * 16, four);
    }
  }
  for_scores(sum, [](float& value, int, int) { value = 0; });
  if (!a.log_p) return;

  bool tiny = false;
  VIDOPS_NO_UNROLL
  for (int batch = 0; batch < 2 * kFours; batch += kBatch) {
    const int r = batch / kFours, offset = batch % kFours * 16;
    const i64 from = at + (i64)r * 8 * a.m + offset;
    const int left = i + r * 8 < a.n ? a.m - first - offset : 0;
    FourFloats four[kBatch];
    VIDOPS_UNROLL
    for (int f = 0; f < kBatch; ++f) four[f] = load_four(a.p + from + f * 16, a.m, left - f * 16);
    VIDOPS_UNROLL
    for (int f = 0; f < kBatch; ++f) {
      VIDOPS_UNROLL
      for (int e = 0; e < 4; ++e) {
        tiny |= four[f].value[e] < kTinySum * a.share;
        four[f].value[e] = log_natural(four[f].value[e]);
      }
      store_four(a.log_p + from + f * 16, a.m, left - f * 16, four[f]);
    }
  }
  const u32 tiles_m = (u32)(a.m + kMapKeys - 1) / kMapKeys;
  const u32 tile = ((u32)step.batch * tiles_m + base_m / kMapKeys) * step.tiles_n() + step.base_n / kRowTile;
  if (tiny) atomic_or_global(a.tiny_tile + tile, 1);
}

VIDOPS_DEVICE void add_weights(GroupScores& sum, const GroupScores& s, float factor, const float (&lse2)[2]) {
  for_scores(sum, [&](float& value, int strip, int e) { value += exp2_flush(s[strip][e] * factor - lse2[e / 2]); });
}

// The map by products of warpgroups. The blocks stay, so that the operands of a tile come while the last is stored.
// Queries of one chunk serve kMapParts steps.
template <class Kind, bool kWide>
VIDOPS_DEVICE void attention_map_groups(const AttentionArgs& a) {
  VIDOPS_SHARED(memory);
  constexpr int kThreads = kMapGroups * kGroupThreads, kAhead = kWide ? 1 : 2, kStages = kAhead + 2, kStagesX = 3;
  constexpr int kX = Kind::kPlanes * kRowTile * kMaxWidth, kY = Kind::kPlanes * kGroupKeys * kMaxWidth;
  static_assert(kRowTile == kMapGroups * kBlockRows, "a warpgroup has one block of rows");
  u16* const x = reinterpret_cast<u16*>(memory);
  u16* const y = x + kStagesX * kX;
  const int group = warp_id() / 4, my_row = warp_id() * 16 + lane_id() / 4;

  MapStep<kWide> loading(a, block_x()), use(a, block_x());
  int load_x = 0, load_y = 0, use_x = 0, use_y = 0;
  const auto turn = [](int& stage_x, int& stage_y, const MapStep<kWide>& step) {
    stage_y = stage_y + 1 == kStages ? 0 : stage_y + 1;
    if (kWide || step.part + 1 == kMapParts) stage_x = stage_x + 1 == kStagesX ? 0 : stage_x + 1;
  };

  float sum[kMapParts][kGroupKeys / 8][4];
  clear(sum);
  GroupScores s;
  float factor, lse2[2];
  u32 ranges[2] = {};

  // What finish() needs to know of its step, when `use` is one ahead, and start() of the next.
  u32 now_tile;
  int now_part;
  bool now_whole, now_last;
  bool active, new_head;
  const u16 *my_x, *my_y;
  i64 lse2_at;
  const auto aim = [&] {
    const int i = use.base_n + my_row;
    active = use.has_keys() && use.base_n + group * kBlockRows < a.n;
    new_head = active && use.part == 0 && use.chunk == 0;
    my_x = x + use_x * kX + tile_size<Kind>(group * kBlockRows, kMaxWidth);
    my_y = y + use_y * kY;
    lse2_at = (i64)use.head() * a.n + (i < a.n ? i : a.n - 1);
  };
  aim();

  const u32 tiles = use.tiles(), my_tiles = (tiles - block_x() + (u32)a.map_blocks - 1) / (u32)a.map_blocks;
  staggered<kAhead>(
      (int)my_tiles * a.heads * kMapParts * a.chunks, group >= kMapGroups / 2,
      [&] {
        if (loading.tile >= tiles) return;
        const int head = loading.head(), chunk = loading.chunk;
        if (kWide || loading.part == 0)
          load_rows<Kind, kThreads>(x + load_x * kX, a.q, a, head, chunk, loading.base_n, kRowTile);
        if (loading.has_keys()) load_keys<Kind, kThreads>(y + load_y * kY, a.k, a, head, chunk, loading.base_m);
        turn(load_x, load_y, loading);
        loading.next();
      },
      [&] {
        if (!active) return;
        if (new_head) {  // read before the products and used after them
          const int below = use.base_n + my_row + 8 < a.n ? 8 : 0;
          lse2[0] = a.lse2[lse2_at], lse2[1] = a.lse2[lse2_at + below];
          ranges[0] = operand_range(a.q, use.head()), ranges[1] = operand_range(a.k, use.head());
        }
        start_scores<Kind>(s, my_x, my_y, a.depth, use.chunk > 0);
      },
      [&] {
        factor = a.factor * range_factor(a.q, ranges[0]) * range_factor(a.k, ranges[1]);
        now_tile = use.tile, now_part = use.part;
        now_whole = active && use.last_chunk(), now_last = use.last_head();
        turn(use_x, use_y, use);
        use.next();
        aim();
      },
      [&] {
        if (!now_whole) return;
        group_settle(s);
        // Not by index: what is indexed at run time does not live in registers.
        if (now_part == 0) {
          add_weights(sum[0], s, factor, lse2);
          if (now_last) store_part(a, now_tile, 0, my_row, sum[0]);
        } else {
          add_weights(sum[1], s, factor, lse2);
          if (now_last) store_part(a, now_tile, 1, my_row, sum[1]);
        }
      });
}

// A sum of exponentials that came out tiny may have lost terms. Tiles that hold such sums are gone through once more,
// for those elements, as (largest term, sum relative to it): log P is finite wherever the logits are.
template <class Kind>
VIDOPS_DEVICE void attention_tiny(const AttentionArgs& a) {
  VIDOPS_SHARED(memory);
  if (a.tiny_tile[block_x()] == 0) return;
  using Tile = MapTile<Kind, 1>;
  const float share = 1.0f / (float)a.heads, log_heads = log_natural((float)a.heads);
  for (int skip = 0; skip < 32; skip += 16) {
    const Tile tile(a, memory, skip);
    typename Tile::Values top, sum;
    clear(top);
    clear(sum);
    tile.for_heads([&](const typename Tile::Values& x, int h) {
      for_elements<1>([&](int i, int j, int e) {
        float& t = top[i][j][e];
        if (h == 0) t = x[i][j][e];
        const bool higher = x[i][j][e] > t;
        const float ratio = exp2_flush(-magnitude(x[i][j][e] - t));
        sum[i][j][e] = higher ? sum[i][j][e] * ratio + 1.0f : sum[i][j][e] + ratio;
        t = higher ? x[i][j][e] : t;
      });
    });
    if (!tile.active) continue;
    for_elements<1>([&](int i, int j, int e) {
      const int n = tile.my_row + e / 2 * 8, m = tile.my_column + j * 8 + e % 2;
      const i64 at = ((i64)tile.batch * a.n + n) * a.m + m;
      if (n >= a.n || m >= a.m || !(a.p[at] < kTinySum * share)) return;
      a.log_p[at] = top[i][j][e] * kLn2 + log_natural(sum[i][j][e]) - log_heads;
      a.p[at] = exp2_fast(top[i][j][e]) * sum[i][j][e] * share;
    });
  }
}

VIDOPS_KERNEL(kMapThreads) attention_map_f32(AttentionArgs a) { attention_map<SplitKind, false>(a); }
VIDOPS_KERNEL(kMapThreads) attention_map_f16(AttentionArgs a) { attention_map<HalfKind, false>(a); }
VIDOPS_KERNEL(kMapThreads) attention_map_bf16(AttentionArgs a) { attention_map<BfloatKind, false>(a); }
VIDOPS_KERNEL(kMapThreads) attention_map_dropout_f32(AttentionArgs a) { attention_map<SplitKind, true>(a); }
VIDOPS_KERNEL(kMapThreads) attention_map_dropout_f16(AttentionArgs a) { attention_map<HalfKind, true>(a); }
VIDOPS_KERNEL(kMapThreads) attention_map_dropout_bf16(AttentionArgs a) { attention_map<BfloatKind, true>(a); }
VIDOPS_KERNEL(kMapThreads) attention_tiny_f32(AttentionArgs a) { attention_tiny<SplitKind>(a); }
VIDOPS_KERNEL(kMapThreads) attention_tiny_f16(AttentionArgs a) { attention_tiny<HalfKind>(a); }
VIDOPS_KERNEL(kMapThreads) attention_tiny_bf16(AttentionArgs a) { attention_tiny<BfloatKind>(a); }

template <class Kind, bool kWide>
VIDOPS_DEVICE void map_by_groups(const AttentionArgs& a) {
  if constexpr (kGroupProducts) attention_map_groups<Kind, kWide>(a);
}

VIDOPS_KERNEL(kMapGroupLimit) attention_map_groups_f32(AttentionArgs a) { map_by_groups<SplitKind, false>(a); }
VIDOPS_KERNEL(kMapGroupLimit) attention_map_groups_f16(AttentionArgs a) { map_by_groups<HalfKind, false>(a); }
VIDOPS_KERNEL(kMapGroupLimit) attention_map_groups_bf16(AttentionArgs a) { map_by_groups<BfloatKind, false>(a); }
VIDOPS_KERNEL(kMapGroupLimit) attention_map_wide_f32(AttentionArgs a) { map_by_groups<SplitKind, true>(a); }
VIDOPS_KERNEL(kMapGroupLimit) attention_map_wide_f16(AttentionArgs a) { map_by_groups<HalfKind, true>(a); }
VIDOPS_KERNEL(kMapGroupLimit) attention_map_wide_bf16(AttentionArgs a) { map_by_groups<BfloatKind, true>(a); }

}  // namespace vidops::cuda
