// Attention of the spatio-temporal block (sheet 2.2, Ding et al., ECCV 2024) and both ops' gradients (sheet 8.4), from
// packed operands and every row's log-sum-exp:
//   out = (P m) v,  dP = (dO v^T + dMap / H) m,  dS = P (dP - delta) scale,  delta = rowsum(P dP),
//   dq = dS k,  dk = dS^T q,  dv = (P m)^T dO,
// P the softmax weights of a head, m the dropout factor. All are one loop: a score tile is rebuilt, turned into
// weights in its registers, and multiplied by a third operand. The kernel of dk and dv holds keys in rows and queries
// in columns, so that no sum crosses blocks and results repeat bit for bit. The part of delta that comes from the
// output is rowsum(dO out); only the map's takes scores of its own.
//
// dP and delta are kept times H: the map's gradient, the operand that is read most, then enters as it is.
#include "attention.cuh"

namespace vidops::cuda {

constexpr int kRowWarps = kRowTile / kWarpTile;
constexpr int kDeltaThreads = 512;
constexpr int kStatisticsThreads = 256;

// Visits the elements of a 32 x 8 kN tile of scores.
template <int kN, class Visit>
VIDOPS_DEVICE void for_elements(Visit visit) {
  VIDOPS_UNROLL
  for (int i = 0; i < 2; ++i)
    VIDOPS_UNROLL
    for (int j = 0; j < kN; ++j)
      VIDOPS_UNROLL
      for (int e = 0; e < 4; ++e) visit(i, j, e);
}

// Which elements of such a tile are kept, one bit each; `row` and `column` are those of this thread's first.
template <int kN, bool kTransposed>
VIDOPS_DEVICE u32 kept_elements(const AttentionArgs& a, int head, int row, int column) {
  u32 keep = 0;
  VIDOPS_NO_UNROLL
  for (int at = 0; at < 8 * kN; ++at) {
    const int r = row + at / (4 * kN) * 16 + at % 4 / 2 * 8, c = column + at / 4 % kN * 8 + at % 2;
    keep |= (u32)kept(a, head, kTransposed ? c : r, kTransposed ? r : c) << at;
  }
  return keep;
}

template <int kN>
VIDOPS_DEVICE bool kept_element(u32 keep, int i, int j, int e) {
  return keep >> ((i * kN + j) * 4 + e) & 1;
}

enum class WeightedSum { output, queries, keys };

// Eight warps have kRowTile rows by kColumnTile columns of the scores, 32 by 32 each: with 32 rows an operand that is
// read from shared memory serves two instructions. They hold them as kParts of 8 kN columns, by what registers allow.
template <class Kind, WeightedSum kSum, int kWidth, bool kStreamed>
struct WeightedTile {
  static constexpr bool kTransposed = kSum == WeightedSum::keys;  // rows are keys
  static constexpr bool kValues = kSum != WeightedSum::queries;   // sums weights
  static constexpr bool kLogits = kSum != WeightedSum::output;    // sums gradients of the logits
  static constexpr int kM = kWarpTile / 16, kParts = kTransposed && (kStreamed || Kind::kNarrowRange) ? 2 : 1;
  static constexpr int kN = kWarpTile / 8 / kParts;
  static constexpr int kPasses = kStreamed ? kParts : 1;  // scores that come in chunks of channels: part by part
  static constexpr int kUnroll = kTransposed ? (Kind::kPlanes == 1 ? 2 : 1) : 4;  // by registers too
  static constexpr float kWeightScale = Kind::kNarrowRange ? 32768.0f : 1.0f;  // fills float16's range
  static constexpr int kMapRows = kTransposed ? kColumnTile : kRowTile;
  static constexpr int kMapColumns = kTransposed ? kRowTile : kColumnTile;
  static constexpr int kMapPitch = kMapColumns + (kTransposed ? 4 : 8);  // a warp's reads meet no bank conflict
  // Rows whose operands wait in registers, where these suffice: half of what the products read from shared memory.
  static constexpr bool kHeld = !kTransposed && !kStreamed && !(kLogits ? Kind::kNarrowRange : Kind::kPlanes > 1);
  using Left = u32[kWidth / 16][kM][Kind::kPlanes][4];
  using Scores = float[kM][kN][4];
  using Sums = float[kM][kMaxWidth / 8][4];

  const AttentionArgs& a;
  char* const memory;
  const PackedOperand &x_operand, &y_operand, &x_value, &y_value;
  const int rows, columns;

  VIDOPS_DEVICE WeightedTile(const AttentionArgs& args, char* shared)
      : a(args),
        memory(shared),
        x_operand(kTransposed ? a.k : a.q),
        y_operand(kTransposed ? a.q : a.k),
        x_value(kTransposed ? a.v : a.g),
        y_value(kTransposed ? a.g : a.v),
        rows(kTransposed ? a.m : a.n),
        columns(kTransposed ? a.n : a.m) {}

  // The heads of a row tile run together: the map's gradient comes from memory once. Asked for where they are needed,
  // these take no registers.
  static VIDOPS_DEVICE int head() { return (int)block_x(); }
  static VIDOPS_DEVICE int base() { return (int)block_y() * kRowTile; }
  static VIDOPS_DEVICE int out_chunk() { return (int)block_z(); }
  // Of this warp within the tile, and of this thread's first element.
  static VIDOPS_DEVICE int row() { return opaque(warp_id()) % kRowWarps * kWarpTile; }
  static VIDOPS_DEVICE int column() { return opaque(warp_id()) / kRowWarps * kWarpTile; }
  static VIDOPS_DEVICE int my_row() { return base() + row() + opaque(lane_id()) / 4; }

  VIDOPS_DEVICE bool with_values() const { return a.v.data != nullptr; }

  static VIDOPS_DEVICE int down(int slot) { return slot / 2 * 16 + slot % 2 * 8; }  // from my_row

  VIDOPS_DEVICE u16* stage_at(int stage) const {
    return reinterpret_cast<u16*>(memory) + a.at.stages + stage * a.at.stage_size;
  }
  VIDOPS_DEVICE const float* map_of() const { return a.grad_map + opaque(head()) / a.heads * a.map_batch; }

  VIDOPS_DEVICE void load_map(float* to, int first, int thread) const {
    constexpr int kGroups = kMapColumns / 4, kStep = kAttentionThreads / kGroups;
    const int query = (kTransposed ? first : base()) + thread / kGroups;
    const int key = (kTransposed ? base() : first) + thread % kGroups * 4;
    const float* from = map_of() + query * a.map_row + key;
    to += thread / kGroups * kMapPitch + thread % kGroups * 4;
    const int left = key < a.m ? a.n - query : 0;
    VIDOPS_UNROLL
    for (int i = 0; i < kMapRows; i += kStep) {
      copy_async(to + i * kMapPitch, from, i < left);
      from += kStep * a.map_row;
    }
  }

  VIDOPS_DEVICE void load(int item, int chunk, int stage) const {
    // What depends on these is computed here, not kept in registers that the products need.
    const int head = opaque(WeightedTile::head()), thread = opaque(thread_x());
    const int first = item / kPasses * kColumnTile;
    u16* const x = reinterpret_cast<u16*>(memory);
    u16* const y = stage_at(stage);
    const auto place = [&](const PackedOperand& o, int of_chunk, int row) {
      return ((i64)head * (kStreamed ? a.chunks : 1) + (kStreamed ? of_chunk : 0)) * o.rows + row;
    };
    if (item == 0 || kStreamed) {
      load_tile<Kind, kWidth, kRowTile>(x, x_operand, place(x_operand, chunk, base()), thread);
      if (kLogits && with_values())
        load_tile<Kind, kWidth, kRowTile>(x + a.at.row_value, x_value, place(x_value, chunk, base()), thread);
    }
    const auto load_columns = [&](int at, const PackedOperand& o, int of_chunk) {
      load_tile<Kind, kWidth, kColumnTile>(y + at, o, place(o, of_chunk, first), thread);
    };
    load_columns(0, y_operand, chunk);
    if (kLogits && with_values()) load_columns(a.at.column_value, y_value, chunk);
    if (kStreamed && chunk + 1 < a.chunks) return;
    if (kValues && with_values() && (kStreamed || !kLogits)) load_columns(a.at.value_sum, y_value, out_chunk());
    if (kLogits && kStreamed) load_columns(a.at.logit_sum, y_operand, out_chunk());
    if (kLogits && a.map_staged) load_map(reinterpret_cast<float*>(y + a.at.map), first, thread);
    if (kTransposed && thread < kColumnTile / 2) {
      const float* const from = thread < kColumnTile / 4 ? a.row_lse2 : a.delta;
      copy_async(y + a.at.statistics + thread * 8,
                 from + (i64)head * a.q.rows + first + thread % (kColumnTile / 4) * 4, true);
    }
  }

  static VIDOPS_DEVICE void hold(Left& left, const u16* x) {
    VIDOPS_UNROLL
    for (int k = 0; k < kWidth / 16; ++k) load_left<Kind>(left[k], x, row(), k * 2, kWidth, lane_id());
  }

  // From the rows in registers, or else in x.
  static VIDOPS_DEVICE void multiply(Scores& s, const Left& left, const u16* x, const u16* y, int column) {
    const int lane = opaque(lane_id());
    if constexpr (kHeld) {
      VIDOPS_UNROLL
      for (int k = 0; k < kWidth / 16; ++k) multiply_left<Kind>(s, left[k], y, column, k * 2, kWidth, lane);
    } else {
      multiply_rows<Kind, kUnroll>(s, x, row(), y, column, kWidth, lane);
    }
  }

  // t: the gradient of the weights before dropout, from dO v^T.
  VIDOPS_DEVICE void add_map(Scores& t, const u16* y, int first, int my_column, float factor) const {
    if (a.map_staged) {
      const float* const map = reinterpret_cast<const float*>(y + a.at.map);
      const int my_row = row() + opaque(lane_id()) / 4;
      const float* const mine =
          kTransposed ? map + my_column * kMapPitch + my_row : map + my_row * kMapPitch + my_column;
      for_elements<kN>([&](int i, int j, int e) {
        const int r = i * 16 + e / 2 * 8, c = j * 8 + e % 2;
        t[i][j][e] = t[i][j][e] * factor + mine[kTransposed ? c * kMapPitch + r : r * kMapPitch + c];
      });
    } else if (a.grad_map) {
      const int left_rows = rows - my_row(), left_columns = columns - first - my_column;
      const i64 down = kTransposed ? 1 : a.map_row, across = kTransposed ? a.map_row : 1;
      const float* const mine = map_of() + my_row() * down + (first + my_column) * across;
      for_elements<kN>([&](int i, int j, int e) {
        const int r = i * 16 + e / 2 * 8, c = j * 8 + e % 2;
        const float extra = r < left_rows && c < left_columns ? mine[r * down + c * across] : 0.0f;
        t[i][j][e] = t[i][j][e] * factor + extra;
      });
    } else {
      for_elements<kN>([&](int i, int j, int e) { t[i][j][e] *= factor; });
    }
  }

  // Adds the two halves of the columns and stores them; every thread takes part.
  VIDOPS_DEVICE void store(Sums& o, void* out, float back) const {
    float* const half = reinterpret_cast<float*>(memory) + thread_x() % (kRowWarps * kWarp);
    const auto for_sums = [&](auto visit) {
      VIDOPS_UNROLL
      for (int j = 0; j < kMaxWidth / 8; ++j) {
        if (j * 8 >= kWidth) continue;
        VIDOPS_UNROLL
        for (int i = 0; i < kM; ++i)
          VIDOPS_UNROLL
          for (int e = 0; e < 4; ++e) visit(i, j, e, half[((j * kM + i) * 4 + e) * kRowWarps * kWarp]);
      }
    };
    const int first = my_row(), lane = lane_id();
    if (column() > 0) for_sums([&](int i, int j, int e, float& place) { place = o[i][j][e]; });
    block_sync();
    if (column() == 0) {
      for_sums([&](int i, int j, int e, float& place) {
        const int r = first + i * 16 + e / 2 * 8, channel = out_chunk() * kWidth + j * 8 + lane % 4 * 2 + e % 2;
        if (r < rows && channel < a.d)
          Kind::store(out, ((i64)head() * rows + r) * a.d + channel, (o[i][j][e] + place) * back);
      });
    }
    block_sync();
  }
};

// One block per kRowTile rows, head and (for wide heads) chunk of output channels.
template <class Kind, WeightedSum kSum, int kWidth, bool kStreamed>
VIDOPS_DEVICE void attention_weighted(const AttentionArgs& a) {
  VIDOPS_SHARED(memory);
  using Tile = WeightedTile<Kind, kSum, kWidth, kStreamed>;
  constexpr int kN = Tile::kN;
  const Tile tile(a, memory);
  const int head = Tile::head();
  const float factor = a.factor * operand_factor(a.q, head) * operand_factor(a.k, head);
  float value_factor = 0;
  if (Tile::kLogits && tile.with_values())
    value_factor = operand_factor(a.g, head) * operand_factor(a.v, head) * (float)a.heads;

  float row_lse2[4] = {}, row_delta[4] = {};  // when rows are queries
  VIDOPS_UNROLL
  for (int r = 0; r < 4; ++r) {
    const int i = Tile::my_row() + Tile::down(r);
    if (Tile::kTransposed || i >= a.n) continue;
    row_lse2[r] = Tile::kLogits ? a.row_lse2[(i64)head * a.q.rows + i] : a.lse2[(i64)head * a.n + i];
    if (Tile::kLogits) row_delta[r] = a.delta[(i64)head * a.q.rows + i];
  }

  typename Tile::Left left, left_value;
  typename Tile::Scores s, t;
  typename Tile::Sums values, logits;
  if (kStreamed) {
    clear(s);
    clear(t);
  }
  if (Tile::kValues) clear(values);
  if (Tile::kLogits) clear(logits);
  const auto use_part = [&](int first, int column, int chunk, const u16* y) {
    if (first + column >= tile.columns) return;
    const u16* const x = reinterpret_cast<const u16*>(memory);
    if (!kStreamed) {  // else the scores of the part before were cleared after their use
      clear(s);
      clear(t);
    }
    Tile::multiply(s, left, x, y, column);
    if (Tile::kLogits && tile.with_values())
      Tile::multiply(t, left_value, x + a.at.row_value, y + a.at.column_value, column);
    if (kStreamed && chunk + 1 < a.chunks) return;

    const int my_column = column + opaque(lane_id()) % 4 * 2;
    const float* const lse2_at = reinterpret_cast<const float*>(y + a.at.statistics) + my_column;
    for_elements<kN>([&](int i, int j, int e) {
      const float lse2 = Tile::kTransposed ? lse2_at[j * 8 + e % 2] : row_lse2[i * 2 + e / 2];
      s[i][j][e] = exp2_flush(s[i][j][e] * factor - lse2);
    });
    if (Tile::kLogits) tile.add_map(t, y, first, my_column, value_factor);
    u32 keep = 0;
    if (a.dropout) keep = kept_elements<kN, Tile::kTransposed>(a, Tile::head(), Tile::my_row(), first + my_column);
    if (Tile::kLogits) {
      if (a.dropout)
        for_elements<kN>([&](int i, int j, int e) {
          t[i][j][e] = kept_element<kN>(keep, i, j, e) ? t[i][j][e] * a.keep_scale : 0.0f;
        });
      for_elements<kN>([&](int i, int j, int e) {
        const float delta = Tile::kTransposed ? lse2_at[kColumnTile + j * 8 + e % 2] : row_delta[i * 2 + e / 2];
        t[i][j][e] = s[i][j][e] * (t[i][j][e] - delta);
      });
    }
    if (Tile::kValues) {
      if (a.dropout)
        for_elements<kN>([&](int i, int j, int e) {
          if (!kept_element<kN>(keep, i, j, e)) s[i][j][e] = 0;
        });
      for_elements<kN>([&](int i, int j, int e) { s[i][j][e] *= Tile::kWeightScale; });
    }
    // Beyond the last query weights are zero by their log-sum-exp; beyond the last key they are not.
    if (!Tile::kTransposed && first + column + kWarpTile > tile.columns)
      for_elements<kN>([&](int i, int j, int e) {
        if (first + my_column + j * 8 + e % 2 < tile.columns) return;
        s[i][j][e] = 0;
        t[i][j][e] = 0;
      });

    const float one[4] = {1, 1, 1, 1};
    if (Tile::kValues && tile.with_values())
      multiply_weights<Kind>(values, s, one, y + a.at.value_sum + column * kWidth, kWidth);
    if (kStreamed) clear(s);
    if (!Tile::kLogits) return;
    // The gradients of a row's logits are scaled by a power of two to fill the operand type's range.
    float down[4] = {1, 1, 1, 1};
    if (Kind::kNarrowRange) {
      float up[4] = {};
      for_elements<kN>([&](int i, int j, int e) {
        up[i * 2 + e / 2] = larger_number(up[i * 2 + e / 2], magnitude(t[i][j][e]));
      });
      VIDOPS_UNROLL
      for (int r = 0; r < 4; ++r) {
        VIDOPS_UNROLL
        for (int mask = 1; mask <= 2; mask <<= 1) up[r] = larger_number(up[r], shuffle_xor(up[r], mask));
        const int shift = range_shift(float_bits(up[r]));
        up[r] = power_of_two(shift);
        down[r] = power_of_two(-shift);
      }
      for_elements<kN>([&](int i, int j, int e) { t[i][j][e] *= up[i * 2 + e / 2]; });
    }
    multiply_weights<Kind>(logits, t, down, y + a.at.logit_sum + column * kWidth, kWidth);
    if (kStreamed) clear(t);
  };
  pipeline(
      a.at.column_tiles * Tile::kPasses, kStreamed ? a.chunks : 1, a.stages,
      [&](int item, int chunk, int stage) { tile.load(item, chunk, stage); },
      [&](int item, int chunk, int stage) {
        if (Tile::base() + Tile::row() >= tile.rows) return;
        if (Tile::kHeld && item == 0) {
          const u16* const x = reinterpret_cast<const u16*>(memory);
          Tile::hold(left, x);
          if (Tile::kLogits && tile.with_values()) Tile::hold(left_value, x + a.at.row_value);
        }
        const int first = item / Tile::kPasses * kColumnTile, part = item % Tile::kPasses;
        VIDOPS_NO_UNROLL
        for (int p = part; p < part + Tile::kParts / Tile::kPasses; ++p)
          use_part(first, Tile::column() + p * 8 * kN, chunk, tile.stage_at(stage));
      });

  if (Tile::kLogits)
    tile.store(logits, Tile::kTransposed ? a.grad_k : a.grad_q,
               operand_factor(tile.y_operand, head) * a.scale / (float)a.heads);
  if (Tile::kValues && tile.with_values())
    tile.store(values, Tile::kTransposed ? a.grad_v : a.out,
               operand_factor(tile.y_value, head) * a.keep_scale / Tile::kWeightScale);
}

// The width of a chunk as a constant: addresses then are.
template <class Kind, WeightedSum kSum>
VIDOPS_DEVICE void attention_weighted(const AttentionArgs& a) {
  if (a.chunks > 1) {
    attention_weighted<Kind, kSum, kMaxWidth, true>(a);
  } else if (a.width == 64) {
    attention_weighted<Kind, kSum, 64, false>(a);
  } else if (a.width == 48) {
    attention_weighted<Kind, kSum, 48, false>(a);
  } else if (a.width == 32) {
    attention_weighted<Kind, kSum, 32, false>(a);
  } else {
    attention_weighted<Kind, kSum, 16, false>(a);
  }
}

VIDOPS_KERNEL(kAttentionThreads, 1) attention_out_f32(AttentionArgs a) {
  attention_weighted<SplitKind, WeightedSum::output>(a);
}
VIDOPS_KERNEL(kAttentionThreads, 1) attention_out_f16(AttentionArgs a) {
  attention_weighted<HalfKind, WeightedSum::output>(a);
}
VIDOPS_KERNEL(kAttentionThreads, 1) attention_out_bf16(AttentionArgs a) {
  attention_weighted<BfloatKind, WeightedSum::output>(a);
}
VIDOPS_KERNEL(kAttentionThreads, 1) attention_dq_f32(AttentionArgs a) {
  attention_weighted<SplitKind, WeightedSum::queries>(a);
}
VIDOPS_KERNEL(kAttentionThreads, 1) attention_dq_f16(AttentionArgs a) {
  attention_weighted<HalfKind, WeightedSum::queries>(a);
}
VIDOPS_KERNEL(kAttentionThreads, 1) attention_dq_bf16(AttentionArgs a) {
  attention_weighted<BfloatKind, WeightedSum::queries>(a);
}
VIDOPS_KERNEL(kAttentionThreads, 1) attention_dkv_f32(AttentionArgs a) {
  attention_weighted<SplitKind, WeightedSum::keys>(a);
}
VIDOPS_KERNEL(kAttentionThreads, 1) attention_dkv_f16(AttentionArgs a) {
  attention_weighted<HalfKind, WeightedSum::keys>(a);
}
VIDOPS_KERNEL(kAttentionThreads, 1) attention_dkv_bf16(AttentionArgs a) {
  attention_weighted<BfloatKind, WeightedSum::keys>(a);
}

// The map's share of delta, times H: rowsum(P m dMap). One block per kRowTile rows, part of the keys and kDeltaHeads
// heads, innermost, for which a tile of the map's gradient stays in registers. Warps hold 32 rows by 32 keys.
template <class Kind, int kWidth>
VIDOPS_DEVICE void attention_delta(const AttentionArgs& a) {
  VIDOPS_SHARED(memory);
  constexpr int kColumnWarps = kDeltaKeys / kWarpTile;
  const u32 tiles = (u32)a.q.rows / kRowTile;
  const int base = (int)(block_x() % tiles) * kRowTile, batch = (int)(block_x() / tiles);
  const int first_head = (int)block_z() * kDeltaHeads;
  const int heads = a.heads - first_head < kDeltaHeads ? a.heads - first_head : kDeltaHeads;
  const int key_tiles = (a.m + kDeltaKeys - 1) / kDeltaKeys, from = (int)block_y() * a.map_tiles_per_part;
  const int until = from + a.map_tiles_per_part < key_tiles ? from + a.map_tiles_per_part : key_tiles;

  float* const sums = reinterpret_cast<float*>(memory);  // [head][warp of the columns][row]
  float* const lse2 = sums + kDeltaHeads * kColumnWarps * kRowTile;  // [head][row]
  u16* const staged = reinterpret_cast<u16*>(lse2 + kDeltaHeads * kRowTile);
  const int x_size = tile_size<Kind>(kRowTile, kWidth), stage_size = x_size + tile_size<Kind>(kDeltaKeys, kWidth);
  const int lane = lane_id(), row = warp_id() % kRowWarps * kWarpTile, column = warp_id() / kRowWarps * kWarpTile;
  const int my_row = base + row + lane / 4;
  for (int at = thread_x(); at < heads * kColumnWarps * kRowTile; at += kDeltaThreads) sums[at] = 0;
  for (int at = thread_x(); at < heads * kRowTile; at += kDeltaThreads) {
    const int i = base + at % kRowTile;
    const i64 head = (i64)batch * a.heads + first_head + at / kRowTile;
    lse2[at] = i < a.n ? a.lse[head * a.n + i] * kLog2e : 0.0f;
  }

  float g[2][4][4], s[2][4][4];
  clear(s);
  pipeline(
      (until - from) * heads, a.chunks, a.stages,
      [&](int item, int chunk, int stage) {
        const int head = batch * a.heads + first_head + item % heads;
        u16* const to = staged + stage * stage_size;
        const int thread = thread_x();
        const i64 plane = (i64)head * a.chunks + chunk;
        load_tile<Kind, kWidth, kRowTile, kDeltaThreads>(to, a.q, plane * a.q.rows + base, thread);
        load_tile<Kind, kWidth, kDeltaKeys, kDeltaThreads>(
            to + x_size, a.k, plane * a.k.rows + (from + item / heads) * kDeltaKeys, thread);
      },
      [&](int item, int chunk, int stage) {
        const int first = (from + item / heads) * kDeltaKeys + column, my_key = first + lane % 4 * 2;
        if (base + row >= a.n || first >= a.m) return;
        const int h = item % heads, head = batch * a.heads + first_head + h;
        const float factor = a.factor * operand_factor(a.q, head) * operand_factor(a.k, head);
        if (h == 0 && chunk == 0) {  // the latency passes behind the product
          const float* const mine = a.grad_map + batch * a.map_batch + my_row * a.map_row + my_key;
          for_elements<4>([&](int i, int j, int e) {
            const int r = i * 16 + e / 2 * 8, c = j * 8 + e % 2;
            g[i][j][e] = my_row + r < a.n && my_key + c < a.m ? mine[r * a.map_row + c] : 0.0f;
          });
        }
        const u16* const x = staged + stage * stage_size;
        multiply_rows<Kind>(s, x, row, x + x_size, column, kWidth);
        if (chunk + 1 < a.chunks) return;

        const float* const row_lse2 = lse2 + h * kRowTile + row + lane / 4;
        for_elements<4>([&](int i, int j, int e) {
          s[i][j][e] = exp2_flush(s[i][j][e] * factor - row_lse2[i * 16 + e / 2 * 8]);
        });
        if (first + kWarpTile > a.m)  // an infinite weight there would not vanish against a zero gradient
          for_elements<4>([&](int i, int j, int e) {
            if (my_key + j * 8 + e % 2 >= a.m) s[i][j][e] = 0;
          });
        if (a.dropout) {
          const u32 keep = kept_elements<4, false>(a, head, my_row, my_key);
          for_elements<4>([&](int i, int j, int e) {
            if (!kept_element<4>(keep, i, j, e)) s[i][j][e] = 0;
          });
        }
        float sum[4] = {};
        for_elements<4>([&](int i, int j, int e) { sum[i * 2 + e / 2] += s[i][j][e] * g[i][j][e]; });
        clear(s);
        VIDOPS_UNROLL
        for (int r = 0; r < 4; ++r)
          VIDOPS_UNROLL
          for (int mask = 1; mask <= 2; mask <<= 1) sum[r] += shuffle_xor(sum[r], mask);
        // Of the four lanes that now hold the same sums each adds one row's.
        const float mine = lane & 2 ? lane & 1 ? sum[3] : sum[2] : lane & 1 ? sum[1] : sum[0];
        const int place = row + lane % 4 / 2 * 16 + lane % 2 * 8 + lane / 4;
        sums[(h * kColumnWarps + column / kWarpTile) * kRowTile + place] += mine;
      });

  for (int at = thread_x(); at < heads * kRowTile; at += kDeltaThreads) {
    const int h = at / kRowTile, place = at % kRowTile;
    float total = 0;
    VIDOPS_UNROLL
    for (int w = 0; w < kColumnWarps; ++w) total += sums[(h * kColumnWarps + w) * kRowTile + place];
    const i64 head = (i64)block_y() * a.batch_heads + batch * a.heads + first_head + h;
    a.map_delta[head * a.q.rows + base + place] = total * a.keep_scale;
  }
}

template <class Kind>
VIDOPS_DEVICE void attention_delta(const AttentionArgs& a) {
  if (a.width == 64) {
    attention_delta<Kind, 64>(a);
  } else if (a.width == 48) {
    attention_delta<Kind, 48>(a);
  } else if (a.width == 32) {
    attention_delta<Kind, 32>(a);
  } else {
    attention_delta<Kind, 16>(a);
  }
}

VIDOPS_KERNEL(kDeltaThreads, 1) attention_delta_f32(AttentionArgs a) { attention_delta<SplitKind>(a); }
VIDOPS_KERNEL(kDeltaThreads, 1) attention_delta_f16(AttentionArgs a) { attention_delta<HalfKind>(a); }
VIDOPS_KERNEL(kDeltaThreads, 1) attention_delta_bf16(AttentionArgs a) { attention_delta<BfloatKind>(a); }

// Rows of a tensor (B,H,N,D) as the caller has it.
struct AttentionRows {
  const void* data;  // null without a value product
  i64 batch_stride, head_stride, row_stride;
};

struct AttentionRowArgs {
  AttentionArgs attention;
  AttentionRows grad_out, out;
};

// row_lse2 and delta, one warp per row of a head, those of the padding included.
template <class Kind>
VIDOPS_DEVICE void attention_statistics(const AttentionRowArgs& args) {
  const AttentionArgs& a = args.attention;
  const i64 at = (i64)block_x() * (kStatisticsThreads / kWarp) + warp_id(), all = (i64)a.batch_heads * a.q.rows;
  if (at >= all) return;
  const int head = (int)(at / a.q.rows), i = (int)(at % a.q.rows);
  float delta = 0;
  if (i < a.n) {
    const auto first = [&](const AttentionRows& r) {
      return head / a.heads * r.batch_stride + head % a.heads * r.head_stride + i * r.row_stride;
    };
    if (args.out.data)
      for (int c = lane_id(); c < a.d; c += kWarp)
        delta += Kind::load(args.grad_out.data, first(args.grad_out) + c) *
                 Kind::load(args.out.data, first(args.out) + c);
    delta *= (float)a.heads;
    for (int part = lane_id(); part < a.map_parts; part += kWarp) delta += a.map_delta[part * all + at];
  }
  delta = warp_sum(delta);
  if (lane_id() > 0) return;
  a.row_lse2[at] = i < a.n ? a.lse[(i64)head * a.n + i] * kLog2e : VIDOPS_INFINITY;
  a.delta[at] = delta;
}

VIDOPS_KERNEL(kStatisticsThreads) attention_statistics_f32(AttentionRowArgs a) { attention_statistics<SplitKind>(a); }
VIDOPS_KERNEL(kStatisticsThreads) attention_statistics_f16(AttentionRowArgs a) { attention_statistics<HalfKind>(a); }
VIDOPS_KERNEL(kStatisticsThreads) attention_statistics_bf16(AttentionRowArgs a) { attention_statistics<BfloatKind>(a); }

}  // namespace vidops::cuda
