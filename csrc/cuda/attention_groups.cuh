// Scores by products of warpgroups, for heads whose channels are stored 64 wide, on devices that have such products.
//
// The blocks of a packed operand are what the products read: rows of 128 bytes with permuted pieces. The left operand
// of a warpgroup is one such block as it is; 128 keys, its right operand, are two blocks with the rows of each plane
// brought together.
//
// The tensor cores work for one half of a block's warpgroups while the other half takes exponentials: the late half
// passes the barrier of the next step before it uses the scores of this one, the early half afterwards.
#pragma once

#include "attention.cuh"

namespace vidops::cuda {

constexpr int kGroupThreads = 4 * kWarp;
constexpr int kGroupKeys = 128;
constexpr int kPlaneSize = kBlockRows * kMaxWidth;  // elements

using GroupScores = float[kGroupKeys / 8][4];

template <class Kind>
struct GroupFormat {
  static VIDOPS_DEVICE void multiply(GroupScores& s, const u16* x, const u16* y, bool add) { group_half(s, x, y, add); }
};
template <>
struct GroupFormat<BfloatKind> {
  static VIDOPS_DEVICE void multiply(GroupScores& s, const u16* x, const u16* y, bool add) {
    group_bfloat(s, x, y, add);
  }
};

// Starts s (64 x 128) = x y^T over kDepth channels, plus s where `add`; the small products of two planes come first.
template <class Kind, int kDepth>
VIDOPS_DEVICE void start_products(GroupScores& s, const u16* x, const u16* y, bool add) {
  constexpr int kTerms = Kind::kPlanes == 2 ? 3 : 1, kStep = 16;
  group_arrive();
  VIDOPS_UNROLL
  for (int term = 0; term < kTerms; ++term) {
    const u16* const left = x + (term == 0 ? Kind::kPlanes - 1 : 0) * kPlaneSize;
    const u16* const right = y + (term == 1 ? 1 : 0) * (kGroupKeys * kMaxWidth);
    VIDOPS_UNROLL
    for (int k = 0; k < kDepth; k += kStep) GroupFormat<Kind>::multiply(s, left + k, right + k, add || term + k > 0);
  }
  group_commit();
}

// The same over one chunk, whose channels from `depth` on are zero: heads of 48 channels save a quarter.
template <class Kind>
VIDOPS_DEVICE void start_scores(GroupScores& s, const u16* x, const u16* y, int depth, bool add) {
  if (depth <= 48)
    start_products<Kind, 48>(s, x, y, add);
  else
    start_products<Kind, kMaxWidth>(s, x, y, add);
}

// Starts copying kGroupKeys rows of one chunk, planes apart; `row` is a multiple of kGroupKeys. Rows change places
// within sixteens, so that a thread's four scores of a row in two neighbouring strips are those of four neighbours.
template <class Kind, int kThreads>
VIDOPS_DEVICE void load_keys(u16* to, const PackedOperand& o, const AttentionArgs& a, int head, int chunk, int row) {
  constexpr int kPass = kThreads * 8, kBlocks = kGroupKeys / kBlockRows, kPieces = kMaxWidth / 8;
  static_assert(kPlaneSize % kPass == 0 && kThreads % (16 * kPieces) == 0, "a pass is sixteens of rows of one plane");
  const u16* from = o.data + (((i64)head * a.chunks + chunk) * o.rows + row) * (Kind::kPlanes * kMaxWidth);
  from += thread_x() * 8;
  const int my_row = thread_x() / kPieces, key = my_row % 16;
  const int place = my_row - key + key / 2 % 2 * 8 + key / 4 * 2 + key % 2;
  const int piece = thread_x() % kPieces ^ swizzle(my_row, kMaxWidth) ^ swizzle(place, kMaxWidth);
  to += (place * kPieces + piece) * 8;
  VIDOPS_UNROLL
  for (int at = 0; at < tile_size<Kind>(kGroupKeys, kMaxWidth); at += kPass) {
    const int block = at / (Kind::kPlanes * kPlaneSize), plane = at / kPlaneSize % Kind::kPlanes;
    copy_async(to + (plane * kBlocks + block) * kPlaneSize + at % kPlaneSize, from + at, true);
  }
}

// The key, within a tile loaded by load_keys, of a thread's score s[strip][e].
VIDOPS_DEVICE int group_key(int strip, int e) {
  return strip / 2 * 16 + lane_id() % 4 * 4 + strip % 2 * 2 + e % 2;
}

template <class Visit>
VIDOPS_DEVICE void for_scores(GroupScores& s, Visit visit) {
  VIDOPS_UNROLL
  for (int strip = 0; strip < kGroupKeys / 8; ++strip)
    VIDOPS_UNROLL
    for (int e = 0; e < 4; ++e) visit(s[strip][e], strip, e);
}

// Calls start(), prepare() and then finish(), which uses what the products of start() gave, for every step. load() is
// called once per step, kAhead (1 or 2) steps before its start, and a few times more: kAhead + 2 steps' data must have
// room, for the late warpgroups may still be multiplying the last but one when it is called. Ends without a barrier.
//
// The path from finish() to the next products is kept short, for the tensor cores run dry if it takes longer than the
// products of the other half: what can be done while products run belongs in prepare(), and the early half loads after
// it has started them.
template <int kAhead, class Load, class Start, class Prepare, class Finish>
VIDOPS_DEVICE void staggered(int steps, bool late, Load load, Start start, Prepare prepare, Finish finish) {
  const auto load_ahead = [&] {
    load();
    copy_commit();
  };
  const auto publish_next = [&] {
    copy_wait<kAhead - 1>();
    group_publish();
  };
  VIDOPS_UNROLL
  for (int step = 0; step < kAhead; ++step) load_ahead();
  publish_next();
  block_sync();
  start();
  load_ahead();
  VIDOPS_NO_UNROLL
  for (int left = steps - 1;; --left) {
    if (left > 0 && (late || kAhead > 1)) publish_next();
    if (left > 0 && late) {
      block_sync();
      load_ahead();
    }
    prepare();
    group_wait<0>();
    finish();
    if (left == 0) return;
    if (!late) {
      if (kAhead == 1) publish_next();
      block_sync();
    }
    start();
    if (!late) load_ahead();
  }
}

}  // namespace vidops::cuda
