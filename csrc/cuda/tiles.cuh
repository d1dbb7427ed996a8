// Matrix products of 16-bit operands on the tensor cores, one output tile per block of kTileThreads threads.
//
//   tile(r, c) = sum over terms t, columns k of  left_t[left_row(r)][k] * right_t[right_row(c)][k]
//
// Both operands are stored by rows with the summed axis contiguous. A product may have several terms, which
// run into one accumulator: [P | L] against [L | P], or the parts of operands split into a high and a low
// half. The rows of a tile are named by functors, so they may be gathered: -1 stands for a row of zeros.
//
// Columns go in chunks of 64 through stages of shared memory filled by asynchronous 16-byte copies. Piece k of
// row r lies at k ^ (r % 8), so that neither the copies nor the products meet bank conflicts. Where warpgroups
// have products of their own (sm_90a) these read both operands from there; elsewhere, and in the lean form for
// devices that give a block less shared memory, warps fetch fragments with ldmatrix.
// Tensor cores truncate when they add; every kFlush chunks their accumulator moves into a separate float sum,
// which bounds the error by tile_rounding(kFlush), whatever the depth. Fewer chunks per run are more exact,
// more are faster.
//
// Use: every thread of the block calls multiply_tile with the same arguments; `shared` holds kSharedBytes of
// the TileShape and is free for other use when the call returns. Thread-to-element maps: Tile::row and
// Tile::column; tile_words turns a predicate into bit rows.
#pragma once

#include "device.cuh"

namespace vidops::cuda {

constexpr int kTileThreads = 256;
constexpr int kTileChunk = 64;  // columns per stage
constexpr int kRowAlign = 8;    // stored rows hold a multiple of this many elements: 16-byte copies

// Error of one entry, relative to the sum of the magnitudes of its products: four instructions per chunk,
// each of which may cut 17 addends at 2^-23 of the largest. The float sums add 2^-24 per run.
VIDOPS_DEVICE float tile_rounding(int flush) { return (float)(flush * 4 * 17) * 1.1920929e-7f; }

struct Half {
  static VIDOPS_DEVICE void multiply(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    mma_half(c, a, b);
  }
  template <int kStrips>
  static VIDOPS_DEVICE void multiply(float (&c)[kStrips][4], const char* a, const char* b, bool add) {
    group_half(c, a, b, add);
  }
};
struct Bfloat {
  static VIDOPS_DEVICE void multiply(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    mma_bfloat(c, a, b);
  }
  template <int kStrips>
  static VIDOPS_DEVICE void multiply(float (&c)[kStrips][4], const char* a, const char* b, bool add) {
    group_bfloat(c, a, b, add);
  }
};

// 128x128, 128x64 and 64x128 are possible. A warp owns kSlabs * 16 rows and kStrips * 8 columns; with products of
// warpgroups four warps own 64 rows together.
template <int kM, int kN, bool kLean = false>
struct TileShape {
  static constexpr bool kGrouped = kGroupProducts && !kLean;
  static constexpr int kAcross = kGrouped ? 128 / kM : kN / 32;
  static constexpr int kSlabs = kGrouped ? 1 : kM * kAcross / (kTileThreads / kWarp) / 16;
  static constexpr int kStrips = kGrouped ? kN / kAcross / 8 : 4;
  static constexpr int kRowBytes = kTileChunk * 2;
  static constexpr int kStages = kLean ? 3 : 4;
  static constexpr int kStageBytes = (kM + kN) * kRowBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;

  static VIDOPS_DEVICE int warp_across() { return kGrouped ? warp_id() / 4 % kAcross : warp_id() % kAcross; }
  static VIDOPS_DEVICE int first_row() {
    return kGrouped ? warp_id() / 4 / kAcross * 64 + warp_id() % 4 * 16 : warp_id() / kAcross * (kSlabs * 16);
  }
  static VIDOPS_DEVICE int first_column() { return warp_across() * kStrips * 8; }
};

template <int kM, int kN, bool kLean = false>
struct Tile {
  using Shape = TileShape<kM, kN, kLean>;
  static constexpr int kSlabs = Shape::kSlabs, kStrips = Shape::kStrips;
  float value[kSlabs][kStrips][4];

  // Place in the output tile of value[slab][strip][e].
  static VIDOPS_DEVICE int row(int slab, int e) {
    return Shape::first_row() + slab * 16 + lane_id() / 4 + e / 2 * 8;
  }
  static VIDOPS_DEVICE int column(int strip, int e) {
    return Shape::first_column() + strip * 8 + lane_id() % 4 * 2 + e % 2;
  }

  // Calls visit(value, slab, strip, e) for every value of this thread.
  template <class Visit>
  VIDOPS_DEVICE void for_each(Visit visit) {
    VIDOPS_UNROLL
    for (int slab = 0; slab < kSlabs; ++slab)
      VIDOPS_UNROLL
      for (int strip = 0; strip < kStrips; ++strip)
        VIDOPS_UNROLL
        for (int e = 0; e < 4; ++e) visit(value[slab][strip][e], slab, strip, e);
  }
};

// The tile of this block in a grid of down x across tiles on block axis x. Eight tile rows are visited
// together, so that blocks which run at the same time share operands in the L2 cache.
struct TilePlace {
  int down, across;

  VIDOPS_DEVICE TilePlace(int tiles_down, int tiles_across) {
    const u32 group = 8 * (u32)tiles_across;
    const int first = (int)(block_x() / group) * 8, rest = (int)(block_x() % group);
    const int height = tiles_down - first < 8 ? tiles_down - first : 8;
    down = first + rest % height;
    across = rest / height;
  }
};

// The terms of a product. Operands of one side are planes of equal layout; term t multiplies the plane named
// by hexadecimal digit t of left_code with the plane named by digit t of right_code.
struct Product {
  const u16* left;
  const u16* right;
  i64 left_plane, right_plane;  // elements from plane to plane
  i64 stride;                   // elements from row to row, on both sides: a multiple of kRowAlign
  int columns;                  // elements of a row that are multiplied: a multiple of kRowAlign
  int terms;
  u32 left_code, right_code;
};

// Copies the operands of a tile, one call per stage, in the order of the products.
template <class Shape, int kM, int kN>
struct TileLoader {
  static constexpr int kRowsPerPass = kTileThreads / 8, kPassBytes = kRowsPerPass * Shape::kRowBytes;
  static constexpr int kLeftPasses = kM / kRowsPerPass, kRightPasses = kN / kRowsPerPass;

  const Product& product;
  char* const shared;
  const int piece, to, steps;
  // What this thread copies: one piece of these rows, in every stage.
  i64 left_at[kLeftPasses], right_at[kRightPasses];  // in elements
  u32 left_valid = 0, right_valid = 0;
  int step = 0, term = 0, column = 0;

  template <class LeftRow, class RightRow>
  VIDOPS_DEVICE TileLoader(const Product& product_, char* shared_, LeftRow left_row, RightRow right_row)
      : product(product_),
        shared(shared_),
        piece(thread_x() % 8),
        to(thread_x() / 8 * Shape::kRowBytes + (piece ^ thread_x() / 8 % 8) * 16),
        steps((product_.columns + kTileChunk - 1) / kTileChunk * product_.terms) {
    const int first = thread_x() / 8;
    VIDOPS_UNROLL
    for (int u = 0; u < kLeftPasses; ++u) {
      const i64 row = left_row(first + u * kRowsPerPass);
      left_at[u] = (row < 0 ? 0 : row * product.stride) + piece * 8;
      left_valid |= (u32)(row >= 0) << u;
    }
    VIDOPS_UNROLL
    for (int u = 0; u < kRightPasses; ++u) {
      const i64 row = right_row(first + u * kRowsPerPass);
      right_at[u] = (row < 0 ? 0 : row * product.stride) + piece * 8;
      right_valid |= (u32)(row >= 0) << u;
    }
  }

  // Terms change fastest: planes that meet in several terms are read again while they are still cached.
  VIDOPS_DEVICE void operator()() {
    if (step < steps) {
      const u32 left_digit = product.left_code >> 4 * term & 15;
      const u32 right_digit = product.right_code >> 4 * term & 15;
      const u16* left = product.left + left_digit * product.left_plane + column;
      const u16* right = product.right + right_digit * product.right_plane + column;
      const bool inside = column + piece * 8 < product.columns;
      char* stage = shared + step % Shape::kStages * Shape::kStageBytes + to;
      VIDOPS_UNROLL
      for (int u = 0; u < kLeftPasses; ++u)
        copy_async(stage + u * kPassBytes, left + left_at[u], inside && left_valid >> u & 1);
      stage += kM * Shape::kRowBytes;
      VIDOPS_UNROLL
      for (int u = 0; u < kRightPasses; ++u)
        copy_async(stage + u * kPassBytes, right + right_at[u], inside && right_valid >> u & 1);
      if (++term == product.terms) term = 0, column += kTileChunk;
    }
    ++step;
    copy_commit();
  }
};

// One batch of products stays in flight while the next stage is awaited, so a stage is filled again two steps after
// its product started.
template <class Format, int kFlush, int kM, int kN, bool kLean, class Loader>
VIDOPS_DEVICE void multiply_by_groups(Tile<kM, kN, kLean>& tile, Loader& load) {
  using Shape = TileShape<kM, kN, kLean>;
  const int group = warp_id() / 4;
  const char* const left = load.shared + group / Shape::kAcross * 64 * Shape::kRowBytes;
  const char* const right =
      load.shared + (kM + group % Shape::kAcross * (kN / Shape::kAcross)) * Shape::kRowBytes;
  for (int stage = 0; stage < Shape::kStages - 2; ++stage) load();
  for (int run = 0; run < load.steps; run += kFlush) {
    float part[Shape::kStrips][4];
    const int end = run + kFlush < load.steps ? run + kFlush : load.steps;
    VIDOPS_NO_UNROLL
    for (int step = run; step < end; ++step) {
      copy_wait<Shape::kStages - 3>();
      group_publish();
      block_sync();  // the stage has arrived for all, and all are done with the one that is filled next
      load();
      const int stage = step % Shape::kStages * Shape::kStageBytes;
      group_arrive();
      VIDOPS_UNROLL
      for (int k = 0; k < kTileChunk / 16; ++k)
        Format::multiply(part, left + stage + k * 32, right + stage + k * 32, k > 0 || step > run);
      group_commit();
      group_wait<1>();
    }
    group_wait<0>();
    group_settle(part);
    tile.for_each([&](float& value, int, int strip, int e) { value += part[strip][e]; });
  }
}

template <class Format, int kFlush, int kM, int kN, bool kLean, class Loader>
VIDOPS_DEVICE void multiply_by_warps(Tile<kM, kN, kLean>& tile, Loader& load) {
  using Shape = TileShape<kM, kN, kLean>;
  constexpr int kSlabBytes = 16 * Shape::kRowBytes;
  // Addresses of this lane's ldmatrix rows; a step of 16 columns flips bits 5 and 6 of the offset.
  const int lane = lane_id();
  const int left_from = (Shape::first_row() + lane % 16) * Shape::kRowBytes + (lane / 16 ^ lane % 8) * 16;
  const int right_from = (kM + Shape::first_column() + lane % 8 + lane / 16 * 8) * Shape::kRowBytes +
                         (lane / 8 % 2 ^ lane % 8) * 16;

  for (int stage = 0; stage < Shape::kStages - 1; ++stage) load();
  for (int run = 0; run < load.steps; run += kFlush) {
    float part[Shape::kSlabs][4][4] = {};
    const int end = run + kFlush < load.steps ? run + kFlush : load.steps;
    for (int step = run; step < end; ++step) {
      copy_wait<Shape::kStages - 2>();
      block_sync();  // the stage has arrived for all, and all are done with the one that is filled next
      load();
      const char* stage = load.shared + step % Shape::kStages * Shape::kStageBytes;
      VIDOPS_UNROLL
      for (int k = 0; k < kTileChunk / 16; ++k) {
        u32 a[Shape::kSlabs][4], b[2][4];
        VIDOPS_UNROLL
        for (int s = 0; s < Shape::kSlabs; ++s)
          load_matrix(a[s], stage + (left_from ^ k * 32) + s * kSlabBytes);
        VIDOPS_UNROLL
        for (int c = 0; c < 2; ++c) load_matrix(b[c], stage + (right_from ^ k * 32) + c * kSlabBytes);
        VIDOPS_UNROLL
        for (int s = 0; s < Shape::kSlabs; ++s)
          VIDOPS_UNROLL
          for (int c = 0; c < 4; ++c) {
            const u32 column[2] = {b[c / 2][c % 2 * 2], b[c / 2][c % 2 * 2 + 1]};
            Format::multiply(part[s][c], a[s], column);
          }
      }
    }
    tile.for_each([&](float& value, int slab, int strip, int e) { value += part[slab][strip][e]; });
  }
}

template <class Format, int kFlush, int kM, int kN, bool kLean, class LeftRow, class RightRow>
VIDOPS_DEVICE void multiply_tile(Tile<kM, kN, kLean>& tile, const Product& product, char* shared, LeftRow left_row,
                                 RightRow right_row) {
  using Shape = TileShape<kM, kN, kLean>;
  TileLoader<Shape, kM, kN> load(product, shared, left_row, right_row);
  tile.for_each([](float& value, int, int, int) { value = 0; });
  if constexpr (Shape::kGrouped)
    multiply_by_groups<Format, kFlush>(tile, load);
  else
    multiply_by_warps<Format, kFlush>(tile, load);
  copy_wait<0>();
  block_sync();
}

// Bit rows of a predicate over the tile: bit c % 32 of words[r * kN / 32 + c / 32] is test(slab, strip, e) of
// element (r, c). Ends without a barrier.
template <int kM, int kN, bool kLean, class Test>
VIDOPS_DEVICE void tile_words(const Tile<kM, kN, kLean>& tile, u32* words, Test test) {
  using Shape = TileShape<kM, kN, kLean>;
  VIDOPS_UNROLL
  for (int slab = 0; slab < Shape::kSlabs; ++slab)
    VIDOPS_UNROLL
    for (int half = 0; half < 2; ++half)
      VIDOPS_UNROLL
      for (int first = 0; first < Shape::kStrips; first += 4) {
        u32 word = 0;
        VIDOPS_UNROLL
        for (int strip = first; strip < first + 4; ++strip)
          VIDOPS_UNROLL
          for (int e = 2 * half; e < 2 * half + 2; ++e)
            word |= (u32)test(slab, strip, e) << tile.column(strip, e) % 32;
        word |= shuffle_xor(word, 1);
        word |= shuffle_xor(word, 2);
        if (lane_id() % 4 == 0) words[tile.row(slab, 2 * half) * (kN / 32) + tile.column(first, 0) / 32] = word;
      }
}

}  // namespace vidops::cuda
