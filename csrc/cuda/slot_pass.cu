// A pass of slot attention over wide tokens, one head in the absorbed form: keys and values are the normalised tokens.
// Forward and backward of what slot_attend.cu does for any call, for up to 32 slots of one softmax.
//
// The warps of a block share the channels and go through the tokens of its share together, kPassTokens at a time. A
// warp multiplies its channels of the slots and of the tokens on tensor cores, to float32 accuracy
// (split_products.cuh); the parts of the dots meet in shared memory, every warp adds them in the same order and has the
// softmax in registers, from which it goes on to its channels of the sums. So a tile takes two barriers.
//
// What splitting cannot give, infinities and overflow: dots that are not finite are computed again by the ordinary
// units, and so is a forward's share if its sums are not finite.
#include "split_products.cuh"

namespace vidops::cuda {

constexpr int kPassThreads = 256;  // at most
constexpr int kPassTokens = 16;
constexpr int kPassStages = 2;
constexpr int kPassTurned = kPassTokens + 8;  // pitch of weights: fragments of their transpose lie in different banks
constexpr float kPassLog2e = 1.44269504088896341f;

// Eight channels each, of a warp.
template <int kStrips>
constexpr int kPassUnits = kStrips == 1 ? 12 : 8;

// Offsets into shared memory, in bytes.
struct SlotPassLayout {
  int q, g;        // fragments of the slots' rows: [strip][unit of all warps][lane] four floats
  int dots;        // parts of the dots: [kind][warp][strip][half of the tile][lane] four floats
  int weights;     // of a warp: [kind][rows][kPassTurned]
  int statistics;  // [parity][mean, rstd][token]
  int infinite;
  int stage, stage_bytes;
};

struct SlotPassArgs {
  const void* x;   // (B,N,Din); strides in elements
  i64 batch, row;
  int n, channels;
  bool whole;  // rows can be copied in aligned pieces of 16 bytes
  int pitch;   // of a row in shared memory, in bytes, an odd multiple of 16: eight rows lie in different banks
  const float* mean;
  const float* rstd;
  const float* q;  // (B,S,Din)
  const float* c;  // (B,S)
  const float* token_mask;  // (B,G,N)
  const float* slot_mask;   // (B,S), 0: shut out
  float eps;
  int slots, sets, set_rows;     // of an item: slots, and the sets of them that share a softmax
  int first_set, launch_sets;    // of this launch
  int splits, share;             // blocks that share a set, and their tokens: a multiple of the tile
  int warps, units;
  SlotPassLayout at;
  float* num;  // (B,S,Din) and (B,S), per split; in the backward the gradients of q and c
  float* den;
  i64 num_split, den_split;
  bool pairs;   // results can be written two channels at a time
  float* dots;  // (B,S,N), where wanted
  float* attn;
  // Backward.
  const float* grad_num;
  const float* grad_den;
  const float* grad_dots;
  const float* grad_attn;
  float* grad_tokens;  // (B,N,Din), of the normalised ones
  bool grads_add;      // to what is there
};

namespace {

struct alignas(8) FloatPair {
  float v[2];
};

// The lane's place in the fragments, and the block's in the work.
struct PassPlace {
  int lane = lane_id(), group = lane_id() / 4, place = lane_id() % 4, warp = warp_id();
  int item, set, split, begin, end;

  VIDOPS_DEVICE explicit PassPlace(const SlotPassArgs& a) {
    u32 rest = block_x();
    split = (int)(rest % (u32)a.splits);
    rest /= (u32)a.splits;
    set = a.first_set + (int)(rest % (u32)a.launch_sets);
    item = (int)(rest / (u32)a.launch_sets);
    begin = split * a.share;
    end = begin + a.share < a.n ? begin + a.share : a.n;
  }
  VIDOPS_DEVICE i64 slot(const SlotPassArgs& a, int row) const {
    return (i64)item * a.slots + set * a.set_rows + row;
  }
};

// Row r and channel c of a unit's fragment; lanes of mma_tf32's first operand.
VIDOPS_DEVICE int fragment_at(int units, int r, int c) {
  return (((r / 16 * units + c / 8) * kWarp + r % 8 * 4 + c % 4) * 4) + r % 16 / 8 + c % 8 / 4 * 2;
}

VIDOPS_DEVICE void load_fragments(float* to, const SlotPassArgs& a, const PassPlace& p, const float* from,
                                  int strips) {
  const int units = a.warps * a.units;
  from += p.slot(a, 0) * a.channels;
  VIDOPS_NO_UNROLL
  for (int i = thread_x(); i < strips * units * kWarp; i += block_threads()) {
    const int lane = i % kWarp, unit = i / kWarp % units, strip = i / kWarp / units;
    FloatQuad quad;
    VIDOPS_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int r = strip * 16 + lane / 4 + e % 2 * 8, c = unit * 8 + lane % 4 + e / 2 * 4;
      quad.v[e] = r < a.set_rows && c < a.channels ? from[(i64)r * a.channels + c] : 0.0f;
    }
    reinterpret_cast<FloatQuad*>(to)[i] = quad;
  }
}

// Tokens from `first` on into a stage; those that do not exist become zeros.
template <class Storage>
VIDOPS_DEVICE void load_pass_tokens(char* to, const SlotPassArgs& a, const PassPlace& p, int first) {
  using Element = typename Storage::Element;
  const Element* from = static_cast<const Element*>(a.x) + p.item * a.batch + first * a.row;
  const int valid = p.end - first;
  if (a.whole) {
    const int pieces = a.channels * (int)sizeof(Element) / 16;
    VIDOPS_NO_UNROLL
    for (int token = p.warp; token < kPassTokens; token += a.warps) {
      const bool there = token < valid;
      const char* row = reinterpret_cast<const char*>(from + (there ? token : 0) * a.row);
      VIDOPS_NO_UNROLL
      for (int piece = p.lane; piece < pieces; piece += kWarp)
        copy_async(to + token * a.pitch + piece * 16, row + piece * 16, there);
    }
    return;
  }
  VIDOPS_NO_UNROLL
  for (int token = p.warp; token < kPassTokens; token += a.warps) {
    Element* line = reinterpret_cast<Element*>(to + token * a.pitch);
    for (int c = p.lane; c < a.channels; c += kWarp) line[c] = token < valid ? from[token * a.row + c] : (Element)0;
  }
}

template <class Storage>
VIDOPS_DEVICE float token_value(const char* row, int c) {
  return Storage::value(reinterpret_cast<const typename Storage::Element*>(row)[c]);
}

template <class F>
VIDOPS_DEVICE float across_rows(float v, F&& combine) {
  VIDOPS_UNROLL
  for (int mask = 4; mask < kWarp; mask *= 2) v = combine(v, shuffle_xor(v, mask));
  return v;
}

// Of the fragments of `rows` and the tokens of a tile, over the warp's channels.
template <class Storage, int kStrips, int kKinds>
VIDOPS_DEVICE void multiply_split_dots(float (&dot)[kKinds][kStrips][2][4], const SlotPassArgs& a, const PassPlace& p,
                                       const char* memory, const char* tile, const float* mean) {
  const int all = a.warps * a.units, first = p.warp * a.units;
  float small[kKinds][kStrips][2][4] = {};
  VIDOPS_NO_UNROLL
  for (int unit = first; unit < first + a.units; ++unit) {
    SplitFloats rows[kKinds][kStrips];
    VIDOPS_UNROLL
    for (int kind = 0; kind < kKinds; ++kind)
      VIDOPS_UNROLL
      for (int s = 0; s < kStrips; ++s) {
        const FloatQuad quad =
            reinterpret_cast<const FloatQuad*>(memory + (kind ? a.at.g : a.at.q))[(s * all + unit) * kWarp + p.lane];
        VIDOPS_UNROLL
        for (int e = 0; e < 4; ++e) rows[kind][s].set(e, quad.v[e]);
      }
    VIDOPS_UNROLL
    for (int j = 0; j < 2; ++j) {
      const char* row = tile + (j * 8 + p.group) * a.pitch;
      const float centre = mean[j * 8 + p.group];
      const SplitPair x(token_value<Storage>(row, unit * 8 + p.place) - centre,
                        token_value<Storage>(row, unit * 8 + p.place + 4) - centre);
      VIDOPS_UNROLL
      for (int kind = 0; kind < kKinds; ++kind)
        VIDOPS_UNROLL
        for (int s = 0; s < kStrips; ++s) multiply_split(dot[kind][s][j], small[kind][s][j], rows[kind][s], x);
    }
  }
  VIDOPS_UNROLL
  for (int kind = 0; kind < kKinds; ++kind)
    VIDOPS_UNROLL
    for (int s = 0; s < kStrips; ++s)
      VIDOPS_UNROLL
      for (int j = 0; j < 2; ++j)
        VIDOPS_UNROLL
        for (int e = 0; e < 4; ++e) dot[kind][s][j][e] += small[kind][s][j][e];
}

// The same on the ordinary units: row group + e / 2 * 8, token 8 j + 2 place + e % 2.
template <class Storage, int kStrips, int kKinds>
VIDOPS_DEVICE void multiply_dots(float (&dot)[kKinds][kStrips][2][4], const SlotPassArgs& a, const PassPlace& p,
                                 const char* memory, const char* tile, const float* mean) {
  const int all = a.warps * a.units, first = p.warp * a.units * 8;
  VIDOPS_NO_UNROLL
  for (int c = first; c < first + a.units * 8; ++c)
    VIDOPS_UNROLL
    for (int kind = 0; kind < kKinds; ++kind) {
      const float* rows = reinterpret_cast<const float*>(memory + (kind ? a.at.g : a.at.q));
      VIDOPS_UNROLL
      for (int s = 0; s < kStrips; ++s)
        VIDOPS_UNROLL
        for (int j = 0; j < 2; ++j)
          VIDOPS_UNROLL
          for (int e = 0; e < 4; ++e) {
            const int token = j * 8 + p.place * 2 + e % 2;
            const float x = token_value<Storage>(tile + token * a.pitch, c) - mean[token];
            float& sum = dot[kind][s][j][e];
            sum = multiply_add(rows[fragment_at(all, s * 16 + p.group + e / 2 * 8, c)], x, sum);
          }
    }
}

// The parts of all warps, added in their order: afterwards every warp has the sums.
template <int kStrips, int kKinds>
VIDOPS_DEVICE void add_dots(float (&dot)[kKinds][kStrips][2][4], const SlotPassArgs& a, const PassPlace& p,
                            char* memory) {
  FloatQuad* parts = reinterpret_cast<FloatQuad*>(memory + a.at.dots);
  const auto at = [&](int kind, int warp, int s, int j) -> FloatQuad& {
    return parts[(((kind * a.warps + warp) * kStrips + s) * 2 + j) * kWarp + p.lane];
  };
  VIDOPS_UNROLL
  for (int kind = 0; kind < kKinds; ++kind)
    VIDOPS_UNROLL
    for (int s = 0; s < kStrips; ++s)
      VIDOPS_UNROLL
      for (int j = 0; j < 2; ++j) {
        const float(&own)[4] = dot[kind][s][j];
        at(kind, p.warp, s, j) = {{own[0], own[1], own[2], own[3]}};
      }
  block_sync();
  VIDOPS_UNROLL
  for (int kind = 0; kind < kKinds; ++kind)
    VIDOPS_UNROLL
    for (int s = 0; s < kStrips; ++s)
      VIDOPS_UNROLL
      for (int j = 0; j < 2; ++j) {
        FloatQuad sum = at(kind, 0, s, j);
        VIDOPS_NO_UNROLL
        for (int w = 1; w < a.warps; ++w) {
          const FloatQuad part = at(kind, w, s, j);
          VIDOPS_UNROLL
          for (int e = 0; e < 4; ++e) sum.v[e] += part.v[e];
        }
        VIDOPS_UNROLL
        for (int e = 0; e < 4; ++e) dot[kind][s][j][e] = sum.v[e];
      }
}

template <int kStrips>
struct PassRows {
  float c[kStrips][2], grad_den[kStrips][2];
  bool there[kStrips][2], open[kStrips][2];

  VIDOPS_DEVICE PassRows(const SlotPassArgs& a, const PassPlace& p) {
    VIDOPS_UNROLL
    for (int s = 0; s < kStrips; ++s)
      VIDOPS_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int r = s * 16 + p.group + h * 8;
        there[s][h] = r < a.set_rows;
        const i64 slot = p.slot(a, there[s][h] ? r : 0);
        c[s][h] = a.c[slot];
        grad_den[s][h] = a.grad_den ? a.grad_den[slot] : 0.0f;
        open[s][h] = !a.slot_mask || a.slot_mask[slot] != 0;
      }
  }
};

// Dots, and in the backward the gradients of weights, become what the sums take: weights (times rstd, since they meet
// rows that are only centred), or slopes of the dots likewise. `sum` gets the weights or slopes themselves; in the
// backward both go to the warp's own memory as well.
template <int kStrips, int kKinds>
VIDOPS_DEVICE void weigh_pass(float (&dot)[kKinds][kStrips][2][4], float (&sum)[kStrips][2], const SlotPassArgs& a,
                              const PassPlace& p, const PassRows<kStrips>& rows, int first, const float* rstd,
                              float* own) {
  constexpr bool kBackward = kKinds == 2;
  VIDOPS_UNROLL
  for (int j = 0; j < 2; ++j)
    VIDOPS_UNROLL
    for (int one = 0; one < 2; ++one) {
      const int token = j * 8 + p.place * 2 + one, column = first + token;
      const bool valid = column < p.end;
      const float scale = rstd[token];
      float mask = valid ? 1.0f : 0.0f;
      if (valid && a.token_mask) mask = a.token_mask[((i64)p.item * a.sets + p.set) * a.n + column];
      const auto map = [&](int s, int h) { return p.slot(a, s * 16 + p.group + h * 8) * a.n + column; };

      float v[kStrips][2], grad[kStrips][2] = {}, most = -VIDOPS_INFINITY;
      VIDOPS_UNROLL
      for (int s = 0; s < kStrips; ++s)
        VIDOPS_UNROLL
        for (int h = 0; h < 2; ++h) {
          v[s][h] = multiply_add(dot[0][s][j][h * 2 + one], scale, rows.c[s][h]);
          if (!rows.open[s][h]) v[s][h] = -VIDOPS_INFINITY;
          if (!rows.there[s][h]) continue;
          most = larger(most, v[s][h]);
          const bool writes = valid && p.warp == 0;
          if (!kBackward && a.dots && writes) a.dots[map(s, h)] = v[s][h];
          if (!kBackward || !valid) continue;
          grad[s][h] = mask * multiply_add(dot[kKinds - 1][s][j][h * 2 + one], scale, rows.grad_den[s][h]);
          if (a.grad_attn) grad[s][h] += a.grad_attn[map(s, h)];
        }
      most = across_rows(most, [](float x, float y) { return larger(x, y); });
      float total = 0, weighted = 0;
      VIDOPS_UNROLL
      for (int s = 0; s < kStrips; ++s)
        VIDOPS_UNROLL
        for (int h = 0; h < 2; ++h) {
          v[s][h] = rows.there[s][h] ? exp2_fast((v[s][h] - most) * kPassLog2e) : 0.0f;
          total += v[s][h];
          if (kBackward && rows.there[s][h]) weighted = multiply_add(v[s][h], grad[s][h], weighted);
        }
      const auto add = [](float x, float y) { return x + y; };
      total = across_rows(total, add);
      if (kBackward) weighted = across_rows(weighted, add) / total;
      VIDOPS_UNROLL
      for (int s = 0; s < kStrips; ++s)
        VIDOPS_UNROLL
        for (int h = 0; h < 2; ++h) {
          const bool there = valid && rows.there[s][h];
          const float weight = v[s][h] / total, kept = there ? (weight + a.eps) * mask : 0.0f;
          float result = kept;
          if (kBackward) {
            result = weight * (grad[s][h] - weighted);
            if (there && a.grad_dots) result += a.grad_dots[map(s, h)];
            if (!there || !rows.open[s][h]) result = 0;
            float* to = own + (s * 16 + p.group + h * 8) * kPassTurned + token;
            to[0] = result, to[kStrips * 16 * kPassTurned] = kept;
          } else if (a.attn && there && p.warp == 0) {
            a.attn[map(s, h)] = weight;
          }
          sum[s][h] += result;
          dot[0][s][j][h * 2 + one] = result * scale;
        }
    }
}

// sum (rows, the warp's channels) += weights (rows, tokens) times tokens. The tokens 2 i and 2 i + 1 of eight are the
// places i and i + 4 of the summed axis: so the weights lie where the dots came out.
template <class Storage, int kStrips>
VIDOPS_DEVICE void accumulate_pass(float (&sum)[kStrips][kPassUnits<kStrips>][4], const float (&weight)[kStrips][2][4],
                                   const SlotPassArgs& a, const PassPlace& p, const char* tile, const float* mean) {
  VIDOPS_UNROLL
  for (int j = 0; j < 2; ++j) {
    SplitFloats w[kStrips];
    VIDOPS_UNROLL
    for (int s = 0; s < kStrips; ++s)
      VIDOPS_UNROLL
      for (int e = 0; e < 4; ++e) w[s].set(e, weight[s][j][e % 2 * 2 + e / 2]);
    const int token = j * 8 + p.place * 2;
    const float centre = mean[token], next_centre = mean[token + 1];
    const char* row = tile + token * a.pitch;
    VIDOPS_UNROLL
    for (int u = 0; u < kPassUnits<kStrips>; ++u) {
      if (u >= a.units) continue;
      const int c = (p.warp * a.units + u) * 8 + p.group;
      const SplitPair x(token_value<Storage>(row, c) - centre, token_value<Storage>(row + a.pitch, c) - next_centre);
      VIDOPS_UNROLL
      for (int s = 0; s < kStrips; ++s) multiply_split(sum[s][u], sum[s][u], w[s], x);
    }
  }
}

// The same on the ordinary units; the weights pass through the warp's own memory.
template <class Storage, int kStrips>
VIDOPS_DEVICE void accumulate_plain(float (&sum)[kStrips][kPassUnits<kStrips>][4],
                                    const float (&weight)[kStrips][2][4], const SlotPassArgs& a, const PassPlace& p,
                                    const char* tile, const float* mean, float* own) {
  VIDOPS_UNROLL
  for (int s = 0; s < kStrips; ++s)
    VIDOPS_UNROLL
    for (int j = 0; j < 2; ++j)
      VIDOPS_UNROLL
      for (int e = 0; e < 4; ++e)
        own[(s * 16 + p.group + e / 2 * 8) * kPassTurned + j * 8 + p.place * 2 + e % 2] = weight[s][j][e];
  warp_sync();
  VIDOPS_NO_UNROLL
  for (int token = 0; token < kPassTokens; ++token)
    VIDOPS_UNROLL
    for (int u = 0; u < kPassUnits<kStrips>; ++u) {
      if (u >= a.units) continue;
      VIDOPS_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int c = (p.warp * a.units + u) * 8 + p.place * 2 + e % 2;
        const float x = token_value<Storage>(tile + token * a.pitch, c) - mean[token];
        VIDOPS_UNROLL
        for (int s = 0; s < kStrips; ++s)
          sum[s][u][e] = multiply_add(own[(s * 16 + p.group + e / 2 * 8) * kPassTurned + token], x, sum[s][u][e]);
      }
    }
  warp_sync();
}

VIDOPS_DEVICE void store_pair(float* to, float x, float y, int there, bool pairs, bool add) {
  if (pairs && there > 1) {
    FloatPair* pair = reinterpret_cast<FloatPair*>(to);
    const FloatPair before = add ? *pair : FloatPair{{0, 0}};
    *pair = {{before.v[0] + x, before.v[1] + y}};
    return;
  }
  if (there > 0) to[0] = add ? to[0] + x : x;
  if (there > 1) to[1] = add ? to[1] + y : y;
}

// The gradient of the tile's tokens: slopes times rows of q, and weights times rows of the gradient of num.
template <int kStrips>
VIDOPS_DEVICE void spread_pass(const SlotPassArgs& a, const PassPlace& p, int first, const char* memory,
                               const float* own) {
  constexpr int kSteps = 2 * kStrips;  // eight rows each
  const int all = a.warps * a.units;
  SplitFloats w[2][kSteps];
  VIDOPS_UNROLL
  for (int kind = 0; kind < 2; ++kind)
    VIDOPS_UNROLL
    for (int step = 0; step < kSteps; ++step)
      VIDOPS_UNROLL
      for (int e = 0; e < 4; ++e)
        w[kind][step].set(e, own[(kind * kStrips * 16 + step * 8 + p.place + e / 2 * 4) * kPassTurned + p.group +
                                 e % 2 * 8]);
  VIDOPS_NO_UNROLL
  for (int unit = p.warp * a.units; unit < (p.warp + 1) * a.units; ++unit) {
    float sum[4] = {}, small[4] = {};
    VIDOPS_UNROLL
    for (int kind = 0; kind < 2; ++kind) {
      const float* rows = reinterpret_cast<const float*>(memory + (kind ? a.at.g : a.at.q));
      VIDOPS_UNROLL
      for (int step = 0; step < kSteps; ++step) {
        const int r = step * 8 + p.place, c = unit * 8 + p.group;
        multiply_split(sum, small, w[kind][step],
                       SplitPair(rows[fragment_at(all, r, c)], rows[fragment_at(all, r + 4, c)]));
      }
    }
    VIDOPS_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int column = first + p.group + h * 8, c = unit * 8 + p.place * 2;
      if (column >= p.end) continue;
      store_pair(a.grad_tokens + ((i64)p.item * a.n + column) * a.channels + c, sum[h * 2] + small[h * 2],
                 sum[h * 2 + 1] + small[h * 2 + 1], a.channels - c, a.pairs, a.grads_add);
    }
  }
}

// The block's share. False, the same in all threads, if a forward's sums are not finite, unless `plain`.
template <class Storage, int kStrips, bool kBackward>
VIDOPS_DEVICE bool pass_share(const SlotPassArgs& a, const PassPlace& p, char* memory, bool plain) {
  constexpr int kKinds = kBackward ? 2 : 1, kUnits = kPassUnits<kStrips>;
  const int me = thread_x();
  const PassRows<kStrips> rows(a, p);
  float* own = reinterpret_cast<float*>(memory + a.at.weights) + p.warp * kKinds * kStrips * 16 * kPassTurned;
  float next_mean = 0, next_rstd = 0;
  const auto load = [&](int first, int stage) {
    if (first >= p.end) return;
    load_pass_tokens<Storage>(memory + a.at.stage + stage * a.at.stage_bytes, a, p, first);
    copy_commit();
    const bool there = me < kPassTokens && first + me < p.end;
    next_mean = there ? a.mean[(i64)p.item * a.n + first + me] : 0.0f;
    next_rstd = there ? a.rstd[(i64)p.item * a.n + first + me] : 0.0f;
  };
  load(p.begin, 0);

  float sum[kStrips][kUnits][4] = {}, total[kStrips][2] = {};
  int stage = 0;
  VIDOPS_NO_UNROLL
  for (int first = p.begin; first < p.end; first += kPassTokens) {
    float* mean = reinterpret_cast<float*>(memory + a.at.statistics) + stage * 2 * kPassTokens;
    float* rstd = mean + kPassTokens;
    if (me < kPassTokens) mean[me] = next_mean, rstd[me] = next_rstd;
    copy_wait<0>();
    block_sync();  // the tile is there, and the one before has been read
    load(first + kPassTokens, stage ^ 1);
    const char* tile = memory + a.at.stage + stage * a.at.stage_bytes;
    float dot[kKinds][kStrips][2][4] = {};
    multiply_split_dots<Storage>(dot, a, p, memory, tile, mean);
    add_dots(dot, a, p, memory);
    bool fine = true;
    VIDOPS_UNROLL
    for (int i = 0; i < kKinds * kStrips * 8; ++i)
      fine = fine && finite(dot[i / (kStrips * 8)][i / 8 % kStrips][i / 4 % 2][i % 4]);
    if (ballot(!fine)) {  // in all warps: they have the same sums
      VIDOPS_UNROLL
      for (int i = 0; i < kKinds * kStrips * 8; ++i) dot[i / (kStrips * 8)][i / 8 % kStrips][i / 4 % 2][i % 4] = 0;
      multiply_dots<Storage>(dot, a, p, memory, tile, mean);
      block_sync();
      add_dots(dot, a, p, memory);
    }
    weigh_pass(dot, total, a, p, rows, first, rstd, own);
    if (plain)
      accumulate_plain<Storage, kStrips>(sum, dot[0], a, p, tile, mean, own);
    else
      accumulate_pass<Storage, kStrips>(sum, dot[0], a, p, tile, mean);
    if (kBackward) {
      warp_sync();
      spread_pass<kStrips>(a, p, first, memory, own);
      warp_sync();
    }
    stage ^= 1;
  }

  if (!kBackward && !plain) {
    u32* infinite = reinterpret_cast<u32*>(memory + a.at.infinite);
    bool fine = true;
    VIDOPS_UNROLL
    for (int s = 0; s < kStrips; ++s)
      VIDOPS_UNROLL
      for (int u = 0; u < kUnits; ++u)
        VIDOPS_UNROLL
        for (int e = 0; e < 4; ++e) fine = fine && (u >= a.units || finite(sum[s][u][e]));
    if (!fine) *infinite = 1;
    block_sync();
    if (*infinite) return false;
  }
  VIDOPS_UNROLL
  for (int s = 0; s < kStrips; ++s)
    VIDOPS_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int r = s * 16 + p.group + h * 8;
      float all = total[s][h];
      all += shuffle_xor(all, 1);
      all += shuffle_xor(all, 2);
      if (!rows.there[s][h]) continue;
      const i64 slot = p.slot(a, r);
      if (p.warp == 0 && p.place == 0) a.den[p.split * a.den_split + slot] = all;
      VIDOPS_UNROLL
      for (int u = 0; u < kUnits; ++u) {
        if (u >= a.units) continue;
        const int c = (p.warp * a.units + u) * 8 + p.place * 2;
        store_pair(a.num + p.split * a.num_split + slot * a.channels + c, sum[s][u][h * 2], sum[s][u][h * 2 + 1],
                   a.channels - c, a.pairs, false);
      }
    }
  return true;
}

template <class Storage, int kStrips, bool kBackward>
VIDOPS_DEVICE void slot_pass(const SlotPassArgs& a) {
  using Element = typename Storage::Element;
  VIDOPS_SHARED(memory);
  const PassPlace p(a);
  u32* infinite = reinterpret_cast<u32*>(memory + a.at.infinite);
  if (thread_x() == 0) *infinite = 0;
  load_fragments(reinterpret_cast<float*>(memory + a.at.q), a, p, a.q, kStrips);
  if (kBackward) load_fragments(reinterpret_cast<float*>(memory + a.at.g), a, p, a.grad_num, kStrips);
  // Channels that do not exist stay zero in all stages.
  const int padded = a.warps * a.units * 8, missing = padded - a.channels;
  for (int i = thread_x(); i < kPassStages * kPassTokens * missing; i += block_threads()) {
    const int row = i / missing;
    char* stage = memory + a.at.stage + row / kPassTokens * a.at.stage_bytes;
    reinterpret_cast<Element*>(stage + row % kPassTokens * a.pitch)[a.channels + i % missing] = (Element)0;
  }
  if (pass_share<Storage, kStrips, kBackward>(a, p, memory, false) || kBackward) return;
  block_sync();
  pass_share<Storage, kStrips, false>(a, p, memory, true);
}

}  // namespace

VIDOPS_KERNEL(kPassThreads, 1) slot_pass_16_f32(SlotPassArgs a) { slot_pass<FloatStorage, 1, false>(a); }
VIDOPS_KERNEL(kPassThreads, 1) slot_pass_16_f16(SlotPassArgs a) { slot_pass<HalfStorage, 1, false>(a); }
VIDOPS_KERNEL(kPassThreads, 1) slot_pass_16_bf16(SlotPassArgs a) { slot_pass<BfloatStorage, 1, false>(a); }
VIDOPS_KERNEL(kPassThreads, 1) slot_pass_32_f32(SlotPassArgs a) { slot_pass<FloatStorage, 2, false>(a); }
VIDOPS_KERNEL(kPassThreads, 1) slot_pass_32_f16(SlotPassArgs a) { slot_pass<HalfStorage, 2, false>(a); }
VIDOPS_KERNEL(kPassThreads, 1) slot_pass_32_bf16(SlotPassArgs a) { slot_pass<BfloatStorage, 2, false>(a); }
VIDOPS_KERNEL(kPassThreads, 1) slot_pass_grad_16_f32(SlotPassArgs a) { slot_pass<FloatStorage, 1, true>(a); }
VIDOPS_KERNEL(kPassThreads, 1) slot_pass_grad_16_f16(SlotPassArgs a) { slot_pass<HalfStorage, 1, true>(a); }
VIDOPS_KERNEL(kPassThreads, 1) slot_pass_grad_16_bf16(SlotPassArgs a) { slot_pass<BfloatStorage, 1, true>(a); }
VIDOPS_KERNEL(kPassThreads, 1) slot_pass_grad_32_f32(SlotPassArgs a) { slot_pass<FloatStorage, 2, true>(a); }
VIDOPS_KERNEL(kPassThreads, 1) slot_pass_grad_32_f16(SlotPassArgs a) { slot_pass<HalfStorage, 2, true>(a); }
VIDOPS_KERNEL(kPassThreads, 1) slot_pass_grad_32_bf16(SlotPassArgs a) { slot_pass<BfloatStorage, 2, true>(a); }

}  // namespace vidops::cuda
