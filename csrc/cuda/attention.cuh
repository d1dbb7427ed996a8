// What the attention kernels share: packed operands, score tiles, weighted sums, the dropout mask.
//
// q, k, v and incoming gradients are first packed, whatever their dtype and strides, into 16-bit planes whose tiles
// are contiguous: [head][chunk][block of 64 rows][plane][row][width], rows padded with zeros to kRowTile, the channels
// cut into chunks of `width` (16, 32, 48 or 64), the 16-byte groups of a row permuted so that ldmatrix meets no bank
// conflict. A tile in shared memory is a plain copy of such blocks.
//
// A float32 value x is stored as two float16 numbers, high + low = x 2^s with s chosen per head so that the largest
// magnitude lies in [2^14, 2^15): 22 bits of every value down to 2^-17 of the largest, where two bfloat16 planes would
// keep 16. Three products (the low by low one is below rounding) then give float32 accuracy.
#pragma once

#include "device.cuh"

namespace vidops::cuda {

constexpr int kAttentionThreads = 256;
constexpr int kAttentionWarps = kAttentionThreads / kWarp;
constexpr int kRowTile = 128;     // padding of packed rows, and rows of every output tile
constexpr int kColumnTile = 64;   // columns of a score tile that is multiplied by a third operand
constexpr int kWarpTile = 32;     // rows and columns that a warp holds of such a tile
constexpr int kBlockRows = 64;    // rows whose planes lie together
constexpr int kMaxWidth = 64;     // channels per chunk
constexpr int kDeltaKeys = 128;   // keys of a tile of the kernel that sums the map's share of delta
constexpr int kDeltaHeads = 8;    // heads whose sums one of its blocks holds
constexpr float kLn2 = 0.69314718055994531f;
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLowest = -3.0e38f;    // below every logit, and finite: differences of it are not NaN
constexpr float kTinySum = 1.0e-30f;   // a sum of exponentials below this may have lost terms that flushed to zero

struct PackedOperand {
  u16* data;
  u32* range;  // per head: bits of the largest finite magnitude; null where values are stored as they are
  int rows;    // padded
};

// Where the kernels that multiply weights keep their tiles in shared memory, in 16-bit words: two row tiles, then the
// stages, each of which starts with a tile of columns. Operands that are the same share a place.
struct WeightedLayout {
  int row_value;     // second row tile
  int stages;        // first stage
  int column_value;  // within a stage: second tile of columns,
  int value_sum;     // what weights are multiplied by,
  int logit_sum;     // what the gradients of logits are multiplied by,
  int map;           // the gradient of the map,
  int statistics;    // log-sum-exp and delta of the columns
  int stage_size;
  int column_tiles;
};

// One struct for every attention kernel; each reads the part that concerns it.
struct AttentionArgs {
  PackedOperand q, k, v, g;  // g: gradient of the output; v, g without data when there is no value product
  int heads, batch_heads, n, m, d;
  int width, chunks, stages;
  int depth;  // channels of a chunk up to the last that holds data, rounded up to 16
  float scale, factor;  // factor = scale * log2(e)
  float* lse;           // (B,H,N)
  float* lse2;          // the same in units of log 2
  float* part_top;      // [split][B,H,N] when the keys are split
  float* part_sum;
  int splits, tiles_per_split;
  float* p;      // (B,N,M)
  float* log_p;  // null when not wanted
  u32* tiny_tile;  // per tile of the map: sums of exponentials underflowed, or nearly so
  int map_blocks;  // that share the tiles of the map, by products of warpgroups
  float share;     // 1 / heads, there
  void* out;     // (B,H,N,D) in the dtype of the operands, as are the gradients
  void *grad_q, *grad_k, *grad_v;
  const float* grad_map;
  i64 map_batch, map_row;
  bool map_staged;   // its tiles go through shared memory; else they are read where they are needed
  float* map_delta;  // [part of the keys][B,H,padded rows]: the map's share of delta
  int map_parts, map_tiles_per_part;
  float* row_lse2;   // (B,H,padded rows): log-sum-exp in units of log 2, infinite beyond the last row
  float* delta;      // (B,H,padded rows): sum of weight times its gradient, times the number of heads
  WeightedLayout at;
  bool dropout;
  u32 threshold;
  u64 seed;
  float keep_scale;  // 1 / (1 - p)
};

// --- operand kinds ------------------------------------------------------------------------------------------------
// kNarrowRange: the operand type has float16's exponents, so that weights and gradients are scaled to fill them.
struct SplitKind {  // float32
  static constexpr int kPlanes = 2;
  static constexpr bool kNarrowRange = true;
  static VIDOPS_DEVICE void pack(u32 (&r)[2], float low, float high) {
    r[0] = pack_half(low, high);
    r[1] = pack_half(low - half_to_float((u16)r[0]), high - half_to_float((u16)(r[0] >> 16)));
  }
  static VIDOPS_DEVICE void mma(float (&c)[4], const u32 (&a)[2][4], const u32 (&b)[2][2]) {
    mma_half(c, a[1], b[0]);
    mma_half(c, a[0], b[1]);
    mma_half(c, a[0], b[0]);
  }
  static VIDOPS_DEVICE float load(const void* from, i64 at) { return static_cast<const float*>(from)[at]; }
  static VIDOPS_DEVICE void store(void* out, i64 at, float v) { static_cast<float*>(out)[at] = v; }
};

struct HalfKind {
  static constexpr int kPlanes = 1;
  static constexpr bool kNarrowRange = true;
  static VIDOPS_DEVICE void pack(u32 (&r)[1], float low, float high) { r[0] = pack_half(low, high); }
  static VIDOPS_DEVICE void mma(float (&c)[4], const u32 (&a)[1][4], const u32 (&b)[1][2]) { mma_half(c, a[0], b[0]); }
  static VIDOPS_DEVICE float load(const void* from, i64 at) {
    return half_to_float(static_cast<const u16*>(from)[at]);
  }
  static VIDOPS_DEVICE void store(void* out, i64 at, float v) { static_cast<u16*>(out)[at] = (u16)pack_half(v, 0); }
};

struct BfloatKind {
  static constexpr int kPlanes = 1;
  static constexpr bool kNarrowRange = false;
  static VIDOPS_DEVICE void pack(u32 (&r)[1], float low, float high) { r[0] = pack_bfloat(low, high); }
  static VIDOPS_DEVICE void mma(float (&c)[4], const u32 (&a)[1][4], const u32 (&b)[1][2]) {
    mma_bfloat(c, a[0], b[0]);
  }
  static VIDOPS_DEVICE float load(const void* from, i64 at) {
    return bfloat_to_float(static_cast<const u16*>(from)[at]);
  }
  static VIDOPS_DEVICE void store(void* out, i64 at, float v) { static_cast<u16*>(out)[at] = (u16)pack_bfloat(v, 0); }
};

// --- packed operands ------------------------------------------------------------------------------------------------
// The exponent s with largest * 2^s in [2^14, 2^15) (less for the smallest of floats); 0 for 0.
VIDOPS_DEVICE int range_shift(u32 largest) {
  const int shift = 141 - (int)(largest >> 23 & 0xff);
  return largest == 0 ? 0 : shift > 126 ? 126 : shift;
}

// What a packed value of this head must be multiplied by; in two steps, for a load well ahead of its use.
VIDOPS_DEVICE u32 operand_range(const PackedOperand& o, int head) { return o.range ? o.range[head] : 0; }
VIDOPS_DEVICE float range_factor(const PackedOperand& o, u32 range) {
  return o.range ? power_of_two(-range_shift(range)) : 1.0f;
}

VIDOPS_DEVICE float operand_factor(const PackedOperand& o, int head) {
  return range_factor(o, operand_range(o, head));
}

// Permutes the 16-byte groups of a row so that eight consecutive rows of one group lie in different banks.
VIDOPS_DEVICE int swizzle(int row, int width) {
  return width == 64 ? row & 7 : width == 32 ? row >> 1 & 3 : row >> 2 & 1;
}

// Elements of a tile of `rows` rows, all planes.
template <class Kind>
VIDOPS_DEVICE int tile_size(int rows, int width) {
  return Kind::kPlanes * rows * width;
}

// Starts copying `count` rows of one chunk; `row` and `count` are multiples of kBlockRows.
template <class Kind, int kThreads = kAttentionThreads>
VIDOPS_DEVICE void load_rows(u16* to, const PackedOperand& o, const AttentionArgs& a, int head, int chunk, int row,
                             int count) {
  const u16* from = o.data + (((i64)head * a.chunks + chunk) * o.rows + row) * (Kind::kPlanes * a.width);
  const int mine = thread_x() * 8;
  from += mine;
  to += mine;
  VIDOPS_NO_UNROLL
  for (int left = tile_size<Kind>(count, a.width) - mine; left > 0; left -= kThreads * 8) {
    copy_async(to, from, true);
    from += kThreads * 8;
    to += kThreads * 8;
  }
}

// The same with sizes as constants: an instruction or two per copy. `row` counts through all heads and chunks.
template <class Kind, int kWidth, int kRows, int kThreads = kAttentionThreads>
VIDOPS_DEVICE void load_tile(u16* to, const PackedOperand& o, i64 row, int thread) {
  constexpr int kSize = Kind::kPlanes * kRows * kWidth, kStep = kThreads * 8;
  const u16* const from = o.data + row * (Kind::kPlanes * kWidth) + thread * 8;
  to += thread * 8;
  VIDOPS_UNROLL
  for (int at = 0; at < kSize; at += kStep)
    if (kSize % kStep == 0 || at + thread * 8 < kSize) copy_async(to + at, from + at, true);
}

// Runs use(item, chunk, stage) for every chunk of channels of every item, whose data load(item, chunk, stage) has
// brought. With two stages the next copies run meanwhile, into the stage that everybody left before the barrier.
template <class Load, class Use>
VIDOPS_DEVICE void pipeline(int items, int chunks, int stages, Load load, Use use) {
  if (items == 0) return;
  load(0, 0, 0);
  copy_commit();
  int stage = 0, chunk = 0;
  for (int item = 0; item < items;) {
    const int next_chunk = chunk + 1 == chunks ? 0 : chunk + 1, next = item + (next_chunk == 0);
    copy_wait<0>();
    block_sync();
    if (stages == 2 && next < items) {
      load(next, next_chunk, stage ^ 1);
      copy_commit();
    }
    use(item, chunk, stage);
    if (stages == 2) {
      stage ^= 1;
    } else if (next < items) {
      block_sync();
      load(next, next_chunk, 0);
      copy_commit();
    }
    item = next;
    chunk = next_chunk;
  }
  block_sync();
}

// --- products -----------------------------------------------------------------------------------------------------
// Rows x[row...] as left operand of the 16 channels from `group` * 8; the rows do not cross a block.
template <class Kind, int kM>
VIDOPS_DEVICE void load_left(u32 (&left)[kM][Kind::kPlanes][4], const u16* x, int row, int group, int width,
                             int lane) {
  const int x_row = lane % 16;
  x += tile_size<Kind>(row / kBlockRows * kBlockRows, width) + (row % kBlockRows + x_row) * width;
  x += ((group + lane / 16) ^ swizzle(x_row, width)) * 8;
  VIDOPS_UNROLL
  for (int i = 0; i < kM; ++i)
    VIDOPS_UNROLL
    for (int p = 0; p < Kind::kPlanes; ++p) load_matrix(left[i][p], x + (p * kBlockRows + i * 16) * width);
}

// s (16 kM x 8 kN) += left y[column...]^T over those channels.
template <class Kind, int kM, int kN>
VIDOPS_DEVICE void multiply_left(float (&s)[kM][kN][4], const u32 (&left)[kM][Kind::kPlanes][4], const u16* y,
                                 int column, int group, int width, int lane) {
  const int y_row = lane / 16 * 8 + lane % 8;
  y += tile_size<Kind>(column / kBlockRows * kBlockRows, width) + (column % kBlockRows + y_row) * width;
  y += ((group + lane / 8 % 2) ^ swizzle(y_row, width)) * 8;
  VIDOPS_UNROLL
  for (int j = 0; j < kN; j += 2) {
    u32 right[2][Kind::kPlanes][2];
    VIDOPS_UNROLL
    for (int p = 0; p < Kind::kPlanes; ++p) {
      u32 r[4];
      load_matrix(r, y + (p * kBlockRows + j * 8) * width);
      right[0][p][0] = r[0], right[0][p][1] = r[1], right[1][p][0] = r[2], right[1][p][1] = r[3];
    }
    VIDOPS_UNROLL
    for (int i = 0; i < kM; ++i) {
      Kind::mma(s[i][j], left[i], right[0]);
      Kind::mma(s[i][j + 1], left[i], right[1]);
    }
  }
}

// s (16 kM x 8 kN) += x[row...] y[column...]^T over one chunk; neither range crosses a block of rows. `kUnroll` steps of
// 16 channels overlap their loads and products, where registers allow it; channels from `depth` on are zero.
template <class Kind, int kUnroll = 1, int kM, int kN>
VIDOPS_DEVICE void multiply_rows(float (&s)[kM][kN][4], const u16* x, int row, const u16* y, int column, int width,
                                 int lane = lane_id(), int depth = kMaxWidth) {
  VIDOPS_UNROLL_BY(kUnroll)
  for (int group = 0; group < width / 8 && group < depth / 8; group += 2) {
    u32 left[kM][Kind::kPlanes][4];
    load_left<Kind>(left, x, row, group, width, lane);
    multiply_left<Kind>(s, left, y, column, group, width, lane);
  }
}

template <int kM, int kN>
VIDOPS_DEVICE void clear(float (&s)[kM][kN][4]) {
  VIDOPS_UNROLL
  for (int i = 0; i < kM; ++i)
    VIDOPS_UNROLL
    for (int j = 0; j < kN; ++j)
      VIDOPS_UNROLL
      for (int e = 0; e < 4; ++e) s[i][j][e] = 0;
}

// o (16 kM x width) += w (16 kM x 8 kN) z times `down` of the row, z's rows within a block; the accumulator layout of w
// is that of a left operand. Tensor cores round sums towards zero, which adds up over thousands of rows of z: where
// float32 or float16 is wanted, each tile is summed by itself, then added. Without, `down` must be one.
template <class Kind, int kM, int kN>
VIDOPS_DEVICE void multiply_weights(float (&o)[kM][kMaxWidth / 8][4], const float (&w)[kM][kN][4],
                                    const float (&down)[2 * kM], const u16* z, int width) {
  constexpr int kPlanes = Kind::kPlanes, kSteps = kN / 2;
  const int lane = opaque(lane_id()), plane = kBlockRows * width;
  const int turn = swizzle(lane % 16, width);
  z += lane % 16 * width;
  u32 left[kSteps][kM][kPlanes][4];
  VIDOPS_UNROLL
  for (int k = 0; k < kSteps; ++k)
    VIDOPS_UNROLL
    for (int i = 0; i < kM; ++i)
      VIDOPS_UNROLL
      for (int part = 0; part < 4; ++part) {
        const float(&pair)[4] = w[i][2 * k + part / 2];
        u32 r[kPlanes];
        Kind::pack(r, pair[part % 2 * 2], pair[part % 2 * 2 + 1]);
        VIDOPS_UNROLL
        for (int p = 0; p < kPlanes; ++p) left[k][i][p][part] = r[p];
      }
  VIDOPS_UNROLL
  for (int j = 0; j < kMaxWidth / 8; j += 2) {
    if (j * 8 >= width) continue;
    float sum[kM][2][4];
    if constexpr (Kind::kNarrowRange) clear(sum);
    VIDOPS_UNROLL
    for (int k = 0; k < kSteps; ++k) {
      u32 right[2][kPlanes][2];
      VIDOPS_UNROLL
      for (int p = 0; p < kPlanes; ++p) {
        u32 r[4];
        load_matrix_transposed(r, z + p * plane + k * 16 * width + ((j + lane / 16) ^ turn) * 8);
        right[0][p][0] = r[0], right[0][p][1] = r[1], right[1][p][0] = r[2], right[1][p][1] = r[3];
      }
      VIDOPS_UNROLL
      for (int i = 0; i < kM; ++i)
        VIDOPS_UNROLL
        for (int c = 0; c < 2; ++c) Kind::mma(Kind::kNarrowRange ? sum[i][c] : o[i][j + c], left[k][i], right[c]);
    }
    if constexpr (Kind::kNarrowRange) {
      VIDOPS_UNROLL
      for (int i = 0; i < kM; ++i)
        VIDOPS_UNROLL
        for (int c = 0; c < 2; ++c)
          VIDOPS_UNROLL
          for (int e = 0; e < 4; ++e) o[i][j + c][e] += sum[i][c][e] * down[i * 2 + e / 2];
    }
  }
}

// --- dropout --------------------------------------------------------------------------------------------------------
// First word of Philox-4x32-10 (Salmon et al., SC 2011) for the counter (element, 0) and the key `seed`. The rounds
// stay a loop: callers repeat it for every element of a tile, and instructions are cached too.
VIDOPS_DEVICE u32 philox_first_word(u64 element, u64 seed) {
  u32 c0 = (u32)element, c1 = (u32)(element >> 32), c2 = 0, c3 = 0, k0 = (u32)seed, k1 = (u32)(seed >> 32);
  VIDOPS_NO_UNROLL
  for (int round = 0; round < 10; ++round) {
    const u32 left = multiply_high(0xD2511F53u, c0), right = multiply_high(0xCD9E8D57u, c2);
    const u32 left_low = 0xD2511F53u * c0, right_low = 0xCD9E8D57u * c2;
    c0 = right ^ c1 ^ k0;
    c1 = right_low;
    c2 = left ^ c3 ^ k1;
    c3 = left_low;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

// Whether weight (i, j) of the head is kept.
VIDOPS_DEVICE bool kept(const AttentionArgs& a, int head, int i, int j) {
  return philox_first_word(((u64)head * a.n + i) * a.m + j, a.seed) >= a.threshold;
}

}  // namespace vidops::cuda
