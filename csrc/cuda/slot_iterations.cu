// All iterations of slot attention in one launch, where rows are narrow and slots few: a softmax over the slots, one
// head, and rows that serve as keys and as values after a LayerNorm (projections absorbed into the slot side).
//
// A cluster of blocks owns an item, each block a share of its tokens. Those stay in shared memory through all
// iterations as far as they fit (`pinned` tiles of every warp); the others pass through a ring of tiles that each warp
// fills for itself, ahead across the end of an iteration, so that what has one row per slot hides their latency.
//
// A warp multiplies 16 tokens at a time with all slots, on tensor cores to float32 accuracy (split_products.cuh): dots,
// the softmax in registers, and the weighted sums, which it keeps through an iteration. These are added over the warps
// of a block, then over the blocks of the cluster, in a fixed order; every block then computes the next slots itself,
// from the same numbers in the same order. Dots that are not finite are repeated on the ordinary units.
//
// Float32 tokens are centred before they are multiplied. Tokens of 16 bits are not, for then they are one operand of a
// tensor core instead of two: a q whose channels have a mean of zero does not see a token's mean, and what the means
// add to a weighted sum is the mean of its own channels. So both are subtracted there.
#include "split_products.cuh"

namespace vidops::cuda {

constexpr int kIterateThreads = 384;      // at most
constexpr int kIterateWideThreads = 256;  // at most, for more than 16 slots, and for more than 8 beside float32 tokens
constexpr int kIterateTokens = 16;        // of a tile: what a warp multiplies at a time
constexpr int kIterateStages = 3;         // tiles of a ring
constexpr int kIterateUnits = 4;          // of 32 channels, at most
constexpr int kIterateRows = 8;           // slots that the slot side handles at a time
constexpr int kIterateOutputs = 8;        // of a linear map, that a warp computes at a time
constexpr int kStatisticsFloats = 2 * kIterateTokens;  // mean and rstd of a tile's tokens
constexpr float kIterateLog2e = 1.44269504088896341f;

struct SlotNorm {
  const float* weight;  // null: none
  const float* bias;
};

struct SlotLinear {
  const float* weight;  // (out, in); null: no such map
  const float* bias;    // null: none
  int in, out;
};

// Offsets into shared memory, in bytes.
struct SlotIterationsLayout {
  int slots;            // [padded slots][width]
  int high, low;        // of q, in parts for tensor cores: [padded slots][row_pitch]; later all blocks' sums
  int constants, open;  // per padded slot: c, later the sum of weights; whether the slot takes part
  int dens;             // per warp and padded slot
  int partial;          // two of [slots][row_pitch] and [slots]: this block's sums, read by the cluster
  int slabs;            // [padded slots][row_pitch] each; or the four that follow, [kIterateRows][pitch] each
  int normed, hidden, of_update, of_slots;
  int weights;          // per warp: [tile][padded slots + 4]
  int ring;             // per warp
  int bytes;
};

struct SlotIterationsArgs {
  const void* inputs;
  i64 batch, row;  // strides in elements
  bool whole;      // rows can be copied in aligned pieces of 16 bytes
  int piece_shift;  // lanes for a row of pieces: a power of two, at most a warp
  int n, channels, units, row_pitch;
  int pitch, row_bytes, tile_bytes;  // of tokens in shared memory
  int tiles, share_tiles;            // of an item, of a block
  int cluster, pinned, warp_tiles, slabs;
  float* statistics;  // (batch, tiles, kStatisticsFloats) of tokens that do not stay; null if all do
  const float* start;  // (batch, slots, width)
  int slots, width, iters;
  SlotNorm norm_input, norm_slots, norm_mlp;
  SlotLinear query, key, value, merge, gru_update, gru_slots, mlp_in, mlp_out;
  const float* key_bias;
  const float* value_bias;
  const float* token_mask;  // (batch, n)
  const float* slot_mask;   // (batch, slots), 0: shut out
  float scale, eps, denominator, ln_eps;
  bool gelu;
  int normed_pitch, hidden_pitch;
  SlotIterationsLayout at;
  float* out;     // (batch, slots, width)
  float* states;  // (iterations kept, batch, slots, width)
  int first_state;
  int items;
  float* dots;  // (batch, slots, n), of the last iteration; null where not wanted
  float* attn;
};

namespace {

VIDOPS_DEVICE float* floats(char* memory, int at) { return reinterpret_cast<float*>(memory + at); }
VIDOPS_DEVICE int block_warps() { return block_threads() / kWarp; }

// Rows and tokens are multiplied in an order in which reads of four channels meet no bank conflict.
VIDOPS_DEVICE int turned(int group) { return group / 2 + group % 2 * 4; }

// --- tokens ---------------------------------------------------------------------------------------------------------
// The tiles of a warp: warp, warp + warps, ... of the block's share, in every iteration. What changes is recomputed,
// for the sake of the registers.
template <class Storage>
struct TileQueue {
  using Element = typename Storage::Element;
  const SlotIterationsArgs& a;
  char* const memory;
  int first, count;

  VIDOPS_DEVICE TileQueue(const SlotIterationsArgs& args, char* shared) : a(args), memory(shared) {
    const int begin = cluster_rank() * a.share_tiles;
    const int end = begin + a.share_tiles < a.tiles ? begin + a.share_tiles : a.tiles;
    first = begin + warp_id();
    count = first < end ? (end - first + block_warps() - 1) / block_warps() : 0;
  }

  VIDOPS_DEVICE int item() const { return (int)block_x() / a.cluster; }
  VIDOPS_DEVICE bool stays(int k) const { return k < a.pinned; }
  VIDOPS_DEVICE int place(int k) const { return first + k * block_warps(); }  // of the item's tiles
  VIDOPS_DEVICE float* kept_statistics(int k) const {
    return a.statistics + ((i64)item() * a.tiles + place(k)) * kStatisticsFloats;
  }
  // Where a tile lies: for good, or at its turn in the ring.
  VIDOPS_DEVICE char* at(int iteration, int k) const {
    const int passing = iteration * (count - a.pinned) + k - a.pinned;
    const int slot = stays(k) ? k : a.pinned + passing % kIterateStages;
    return memory + a.at.ring + (warp_id() * a.warp_tiles + slot) * a.tile_bytes;
  }
  VIDOPS_DEVICE float* statistics_of(char* to) const {
    return reinterpret_cast<float*>(to + kIterateTokens * a.pitch);
  }

  // Tokens that do not exist become zeros.
  VIDOPS_DEVICE void copy_rows(char* to, int k) const {
    const int begin = place(k) * kIterateTokens, valid = a.n - begin;
    const Element* from = static_cast<const Element*>(a.inputs) + item() * a.batch + begin * a.row;
    if (!a.whole) {
      for (int row = 0; row < kIterateTokens; ++row)
        for (int c = lane_id(); c < a.channels; c += kWarp)
          reinterpret_cast<Element*>(to + row * a.pitch)[c] = row < valid ? from[row * a.row + c] : (Element)0;
      return;
    }
    // Lanes side by side copy pieces of one row, or of a few.
    const int shift = a.piece_shift, row = lane_id() >> shift, step = kWarp >> shift;
    const i64 line_step = step * a.row * (i64)sizeof(Element);
    const int at = (lane_id() & ((1 << shift) - 1)) * 16;
    const char* line = reinterpret_cast<const char*>(from + row * a.row) + at;
    char* place = to + row * a.pitch + at;
    VIDOPS_UNROLL_BY(4)
    for (int r = row; r < kIterateTokens; r += step, line += line_step, place += step * a.pitch)
      if (at < a.row_bytes) copy_async(place, line, r < valid);
  }

  // Tile k of an iteration, where k may run on into later ones.
  VIDOPS_DEVICE void load(int iteration, int k) const {
    for (; count > 0 && k >= count; k -= count) ++iteration;
    if (k < count && iteration < a.iters && (iteration == 0 || !stays(k))) {
      char* const to = at(iteration, k);
      copy_rows(to, k);
      if (iteration > 0 && lane_id() < kStatisticsFloats / 4)
        copy_async(statistics_of(to) + lane_id() * 4, kept_statistics(k) + lane_id() * 4, true);
    }
    copy_commit();
  }

  // A tile after it has arrived; what the warp used before is filled again.
  VIDOPS_DEVICE char* take(int iteration, int k) const {
    copy_wait<kIterateStages - 2>();
    warp_sync();
    load(iteration, k + kIterateStages - 1);
    return at(iteration, k);
  }

  // Mean and reciprocal deviation of every token of a tile, when it is met for the first time.
  VIDOPS_DEVICE void find_statistics(int k, char* at) const {
    const int lane = lane_id(), row = turned(lane / 4);
    const auto total = [&](int half, auto use) {
      const char* x = at + (row + half * 8) * a.pitch;
      float sum = 0;
      for (int quad = lane % 4; quad * 4 < a.channels; quad += 4) {
        const FloatQuad v = load_quad<Storage>(x, quad);
        VIDOPS_UNROLL
        for (int e = 0; e < 4; ++e)
          if (quad * 4 + e < a.channels) sum += use(v.v[e]);
      }
      sum += shuffle_xor(sum, 1);
      return sum + shuffle_xor(sum, 2);
    };
    float* const statistics = statistics_of(at);
    VIDOPS_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float mean = total(half, [](float v) { return v; }) / (float)a.channels;
      const float variance = total(half, [&](float v) { return (v - mean) * (v - mean); }) / (float)a.channels;
      if (lane % 4 != 0) continue;
      const float rstd = 1.0f / square_root(variance + a.ln_eps);
      const int token = 2 * (row + half * 8);
      statistics[token] = mean, statistics[token + 1] = rstd;
      if (!stays(k)) kept_statistics(k)[token] = mean, kept_statistics(k)[token + 1] = rstd;
    }
    warp_sync();
  }
};

// Centres a token: x * keep + offset, without rounding the product. A token whose variance overflows is zeros, which
// its rstd of 0 could not make of an infinite product.
struct Centre {
  float keep, offset;
  VIDOPS_DEVICE explicit Centre(const float* statistics)
      : keep(statistics[1] == 0 ? 0.0f : 1.0f), offset(-statistics[0] * keep) {}
  VIDOPS_DEVICE void apply(FloatQuad& x) const {
    VIDOPS_UNROLL
    for (int e = 0; e < 4; ++e) x.v[e] = multiply_add(x.v[e], keep, offset);
  }
};

// A warp's sums over the tokens of its tiles.
template <int kStrips>
struct IterationSums {
  // [unit][channel % 4 / 2][8 slots][element of the product: row channel % 2, column slot]
  float v[kIterateUnits][2][kStrips][4];
  float den[kStrips][2];  // of a lane's tokens, per slot
};

// A lane's dots, and what it makes of them: tokens turned(lane / 4) and 8 more, slots lane % 4 and 4 more of every
// eight.
template <class Storage, int kStrips>
struct TokenTile {
  const SlotIterationsArgs& a;
  char* const memory;
  const char* const tile;
  const float* const statistics;
  const int item, begin;  // token
  float dots[kStrips][4];

  static VIDOPS_DEVICE int token(int i) { return turned(lane_id() / 4) + i / 2 * 8; }
  static VIDOPS_DEVICE int slot(int strip, int i) { return strip * 8 + lane_id() % 4 + i % 2 * 4; }

  static VIDOPS_DEVICE void split(SplitFloats& to, int i, float v) {
    if (Storage::kShort)
      to.set_short(i, v);
    else
      to.set(i, v);
  }

  VIDOPS_DEVICE void multiply() {
    const int group = turned(lane_id() / 4), place = lane_id() % 4;
    const float* const high = floats(memory, a.at.high) + group * a.row_pitch;
    const float* const low = floats(memory, a.at.low) + group * a.row_pitch;
    const Centre upper(statistics + 2 * token(0)), lower(statistics + 2 * token(2));
    // Few products wait for one another less where their small terms have sums of their own.
    constexpr bool kApart = kStrips < 4;
    float small[kApart ? kStrips : 1][2][4] = {};
    VIDOPS_NO_UNROLL
    for (int quad = place; quad < a.units * 8; quad += 4) {
      FloatQuad x[2] = {load_quad<Storage>(tile + token(0) * a.pitch, quad),
                        load_quad<Storage>(tile + token(2) * a.pitch, quad)};
      if (!Storage::kShort) {
        upper.apply(x[0]);
        lower.apply(x[1]);
      }
      SplitFloats left[2];
      VIDOPS_UNROLL
      for (int e = 0; e < 4; ++e)
        VIDOPS_UNROLL
        for (int half = 0; half < 2; ++half) split(left[e / 2], e % 2 * 2 + half, x[half].v[e]);
      VIDOPS_UNROLL
      for (int s = 0; s < kStrips; ++s) {
        const FloatQuad h = load_floats(high + s * 8 * a.row_pitch + quad * 4);
        const FloatQuad l = load_floats(low + s * 8 * a.row_pitch + quad * 4);
        VIDOPS_UNROLL
        for (int pair = 0; pair < 2; ++pair) {
          const u32 right[2] = {float_bits(h.v[pair * 2]), float_bits(h.v[pair * 2 + 1])};
          const u32 rest[2] = {float_bits(l.v[pair * 2]), float_bits(l.v[pair * 2 + 1])};
          if (!Storage::kShort) mma_tf32(kApart ? small[s * kApart][0] : dots[s], left[pair].low, right);
          mma_tf32(kApart ? small[s * kApart][1] : dots[s], left[pair].high, rest);
          mma_tf32(dots[s], left[pair].high, right);
        }
      }
    }
    bool fine = true;
    VIDOPS_UNROLL
    for (int s = 0; s < kStrips; ++s)
      VIDOPS_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (kApart) dots[s][i] += small[s * kApart][0][i] + small[s * kApart][1][i];
        fine = fine && finite(dots[s][i]);
        dots[s][i] *= statistics[2 * token(i) + 1];
      }
    if (ballot(!fine)) multiply_again();
    VIDOPS_UNROLL
    for (int s = 0; s < kStrips; ++s)
      VIDOPS_UNROLL
      for (int j = 0; j < 2; ++j) {
        const float constant = floats(memory, a.at.constants)[slot(s, j)];
        const bool open = floats(memory, a.at.open)[slot(s, j)] != 0;
        VIDOPS_UNROLL
        for (int i = j; i < 4; i += 2) dots[s][i] = open ? dots[s][i] + constant : -VIDOPS_INFINITY;
      }
  }

  // One of the maps.
  VIDOPS_DEVICE void write(float* map) const {
    VIDOPS_UNROLL
    for (int s = 0; s < kStrips; ++s)
      VIDOPS_UNROLL
      for (int i = 0; i < 4; ++i)
        if (begin + token(i) < a.n && slot(s, i) < a.slots)
          map[((i64)item * a.slots + slot(s, i)) * a.n + begin + token(i)] = dots[s][i];
  }

  // Infinities and overflow are what the ordinary units make of them.
  VIDOPS_DEVICE void multiply_again() {
    VIDOPS_UNROLL
    for (int s = 0; s < kStrips; ++s)
      VIDOPS_UNROLL
      for (int i = 0; i < 4; ++i) {
        const Centre centre(statistics + 2 * token(i));
        const float rstd = statistics[2 * token(i) + 1];
        const int at = slot(s, i) * a.row_pitch;
        float sum = 0;
        VIDOPS_NO_UNROLL
        for (int quad = 0; quad < a.units * 8; ++quad) {
          FloatQuad x = load_quad<Storage>(tile + token(i) * a.pitch, quad);
          centre.apply(x);
          VIDOPS_UNROLL
          for (int e = 0; e < 4; ++e) x.v[e] *= rstd;
          const FloatQuad h = load_floats(floats(memory, a.at.high) + at + quad * 4);
          const FloatQuad l = load_floats(floats(memory, a.at.low) + at + quad * 4);
          VIDOPS_UNROLL
          for (int e = 0; e < 4; ++e) sum = multiply_add(h.v[e] + l.v[e], x.v[e], sum);
        }
        dots[s][i] = sum;
      }
  }

  // Softmax over the slots.
  VIDOPS_DEVICE void weigh() {
    VIDOPS_UNROLL
    for (int half = 0; half < 4; half += 2) {
      const auto each = [&](auto use) {
        VIDOPS_UNROLL
        for (int s = 0; s < kStrips; ++s)
          VIDOPS_UNROLL
          for (int j = 0; j < 2; ++j) use(dots[s][half + j]);
      };
      float most = -VIDOPS_INFINITY, total = 0;
      each([&](float& v) { most = larger(most, v); });
      most = larger(most, shuffle_xor(most, 1));
      most = larger(most, shuffle_xor(most, 2));
      each([&](float& v) {
        v = exp2_flush((v - most) * kIterateLog2e);
        total += v;
      });
      total += shuffle_xor(total, 1);
      total += shuffle_xor(total, 2);
      const float inverse = 1.0f / total;
      each([&](float& v) { v *= inverse; });
    }
  }

  // `weights` gets [token][slot], times rstd, since they meet rows that are only centred.
  VIDOPS_DEVICE void hand_over(IterationSums<kStrips>& sums, float* weights) const {
    VIDOPS_UNROLL
    for (int half = 0; half < 4; half += 2) {
      const int within = token(half), at = begin + within;
      const bool valid = at < a.n;
      const float rstd = statistics[2 * within + 1];
      const float mask = valid && a.token_mask ? a.token_mask[(i64)item * a.n + at] : 1.0f;
      VIDOPS_UNROLL
      for (int s = 0; s < kStrips; ++s)
        VIDOPS_UNROLL
        for (int j = 0; j < 2; ++j) {
          const float kept = valid ? (dots[s][half + j] + a.eps) * mask : 0.0f;
          sums.den[s][j] += kept;
          weights[within * (kStrips * 8 + 4) + slot(s, j)] = kept * rstd;
        }
    }
  }

  // Tensor cores round sums downwards, so that long sums would drift: each tile has its own.
  VIDOPS_DEVICE void accumulate(IterationSums<kStrips>& sums, const float* weights) const {
    // What registers take at a time.
    constexpr int kS = kStrips < 2 ? kStrips : 2, kU = kStrips < 4 ? kIterateUnits / kStrips : 1;
    VIDOPS_UNROLL
    for (int unit = 0; unit < kIterateUnits; unit += kU) {
      if (unit >= a.units) continue;
      VIDOPS_UNROLL
      for (int strip = 0; strip < kStrips; strip += kS) accumulate_part<kU, kS>(sums, weights, unit, strip);
    }
  }

  template <int kU, int kS>
  VIDOPS_DEVICE void accumulate_part(IterationSums<kStrips>& sums, const float* weights, int unit, int strip) const {
    constexpr int kPitch = kStrips * 8 + 4;
    const int group = lane_id() / 4, pair = lane_id() % 4 * 2;
    float fresh[kU][2][kS][4] = {};
    VIDOPS_NO_UNROLL
    for (int token = pair; token < kIterateTokens; token += 8) {
      const Centre centre[2] = {Centre(statistics + 2 * token), Centre(statistics + 2 * token + 2)};
      const float* const w = weights + token * kPitch + strip * 8 + group;
      VIDOPS_UNROLL
      for (int u = 0; u < kU; ++u) {
        if (unit + u >= a.units) continue;
        SplitFloats left[2];
        VIDOPS_UNROLL
        for (int t = 0; t < 2; ++t) {
          FloatQuad x = load_quad<Storage>(tile + (token + t) * a.pitch, (unit + u) * 8 + group);
          if (!Storage::kShort) centre[t].apply(x);
          VIDOPS_UNROLL
          for (int e = 0; e < 4; ++e) split(left[e / 2], e % 2 + t * 2, x.v[e]);
        }
        VIDOPS_UNROLL
        for (int s = 0; s < kS; ++s) {
          const SplitPair right(w[s * 8], w[kPitch + s * 8]);
          VIDOPS_UNROLL
          for (int p = 0; p < 2; ++p)
            multiply_split<Storage::kShort>(fresh[u][p][s], fresh[u][p][s], left[p], right);
        }
      }
    }
    VIDOPS_UNROLL
    for (int u = 0; u < kU; ++u)
      VIDOPS_UNROLL
      for (int p = 0; p < 2; ++p)
        VIDOPS_UNROLL
        for (int s = 0; s < kS; ++s)
          VIDOPS_UNROLL
          for (int i = 0; i < 4; ++i) sums.v[unit + u][p][strip + s][i] += fresh[u][p][s][i];
  }
};

template <class Storage, int kStrips>
VIDOPS_DEVICE void attend_share(const SlotIterationsArgs& a, char* memory, const TileQueue<Storage>& queue, int iteration,
                                IterationSums<kStrips>& sums) {
  float* const weights = floats(memory, a.at.weights) + warp_id() * kIterateTokens * (kStrips * 8 + 4);
  VIDOPS_NO_UNROLL
  for (int k = 0; k < queue.count; ++k) {
    char* const at = queue.take(iteration, k);
    if (iteration == 0) queue.find_statistics(k, at);
    TokenTile<Storage, kStrips> tile{
        a, memory, at, queue.statistics_of(at), queue.item(), queue.place(k) * kIterateTokens, {}};
    const bool last = iteration + 1 == a.iters;
    tile.multiply();
    if (last && a.dots) tile.write(a.dots);
    tile.weigh();
    if (last && a.attn) tile.write(a.attn);
    tile.hand_over(sums, weights);
    warp_sync();
    tile.accumulate(sums, weights);
  }
}

// Of a row whose channels a warp shares; `sum` is that of the lane's.
VIDOPS_DEVICE void subtract_mean(float* row, float sum, int channels) {
  const float mean = warp_sum(sum) / (float)channels;
  for (int c = lane_id(); c < channels; c += kWarp) row[c] -= mean;
}

// Adds the sums of all warps and all blocks of the cluster, each in their order: afterwards `high` has those of the
// rows, which are centred, and `constants` those of the weights.
template <bool kCentre, int kStrips>
VIDOPS_DEVICE void add_up(const SlotIterationsArgs& a, char* memory, const IterationSums<kStrips>& sums, int parity) {
  const int me = thread_x(), threads = block_threads(), warp = warp_id(), warps = block_warps();
  const int group = lane_id() / 4, place = lane_id() % 4, slab = kStrips * 8 * a.row_pitch;
  float* const slabs = floats(memory, a.at.slabs);
  float* const dens = floats(memory, a.at.dens);
  VIDOPS_UNROLL
  for (int s = 0; s < kStrips; ++s)
    VIDOPS_UNROLL
    for (int j = 0; j < 2; ++j) {
      float v = sums.den[s][j];
      VIDOPS_UNROLL
      for (int mask = 4; mask < kWarp; mask <<= 1) v += shuffle_xor(v, mask);
      if (group == 0) dens[(warp * kStrips + s) * 8 + place + j * 4] = v;
    }
  for (int first = 0; first < warps; first += a.slabs) {
    if (warp >= first && warp < first + a.slabs) {
      VIDOPS_UNROLL
      for (int unit = 0; unit < kIterateUnits; ++unit) {
        if (unit >= a.units) continue;
        VIDOPS_UNROLL
        for (int s = 0; s < kStrips; ++s)
          VIDOPS_UNROLL
          for (int j = 0; j < 2; ++j) {
            float* const to = slabs + (warp - first) * slab + (s * 8 + place * 2 + j) * a.row_pitch +
                              (unit * 8 + group) * 4;
            FloatQuad v = {};
            if (first > 0) v = load_floats(to);
            VIDOPS_UNROLL
            for (int e = 0; e < 4; ++e) v.v[e] += sums.v[unit][e / 2][s][e % 2 * 2 + j];
            *reinterpret_cast<FloatQuad*>(to) = v;
          }
      }
    }
    block_sync();
  }

  float* const rows = floats(memory, a.at.partial) + parity * a.slots * (a.row_pitch + 1);
  float* const totals = rows + a.slots * a.row_pitch;
  for (int i = me; i < a.slots * a.row_pitch; i += threads) {
    float sum = 0;
    for (int k = 0; k < a.slabs; ++k) sum += slabs[k * slab + i];
    rows[i] = sum;
  }
  for (int i = me; i < a.slots; i += threads) {
    float sum = 0;
    for (int w = 0; w < warps; ++w) sum += dens[w * kStrips * 8 + i];
    totals[i] = sum;
  }
  if (a.cluster > 1)
    cluster_sync();
  else
    block_sync();
  const auto over_blocks = [&](const float* own) {
    float sum = 0;
    VIDOPS_UNROLL_BY(4)
    for (int rank = 0; rank < a.cluster; ++rank) sum += *cluster_peer(own, rank);
    return sum;
  };
  for (int r = warp; r < a.slots; r += warps) {
    float* const to = floats(memory, a.at.high) + r * a.row_pitch;
    float sum = 0;
    for (int c = lane_id(); c < a.channels; c += kWarp) sum += to[c] = over_blocks(rows + r * a.row_pitch + c);
    if (kCentre) subtract_mean(to, sum, a.channels);
  }
  for (int i = me; i < a.slots; i += threads) floats(memory, a.at.constants)[i] = over_blocks(totals + i);
  block_sync();
}

// --- slots ----------------------------------------------------------------------------------------------------------
// Lane l returns the sum over all lanes of v[l].
VIDOPS_DEVICE float lane_sums(float (&v)[kWarp]) {
  VIDOPS_UNROLL
  for (int step = 0; step < 5; ++step) {
    const int half = kWarp / 2 >> step;
    const bool upper = lane_id() & half;
    VIDOPS_UNROLL
    for (int i = 0; i < kWarp / 2; ++i) {
      if (i >= half) continue;
      const float kept = upper ? v[i + half] : v[i], given = upper ? v[i] : v[i + half];
      v[i] = kept + shuffle_xor(given, half);
    }
  }
  return v[0];
}

// store(row, output, value) for kIterateRows rows; a warp has some outputs at a time, its lanes share the inputs.
template <class Store>
VIDOPS_DEVICE void apply_linear(const SlotLinear& map, const float* rows, int pitch, Store store) {
  const int lane = lane_id();
  VIDOPS_NO_UNROLL
  for (int first = warp_id() * kIterateOutputs; first < map.out; first += block_warps() * kIterateOutputs) {
    float sum[kIterateOutputs / 4][kWarp] = {};  // [four outputs][output][row]
    VIDOPS_NO_UNROLL
    for (int k = lane; k < map.in; k += kWarp) {
      float w[kIterateOutputs];
      VIDOPS_UNROLL
      for (int o = 0; o < kIterateOutputs; ++o)
        w[o] = first + o < map.out ? map.weight[(i64)(first + o) * map.in + k] : 0.0f;
      VIDOPS_UNROLL
      for (int r = 0; r < kIterateRows; ++r) {
        const float x = rows[r * pitch + k];
        VIDOPS_UNROLL
        for (int o = 0; o < kIterateOutputs; ++o) {
          float& to = sum[o / 4][o % 4 * kIterateRows + r];
          to = multiply_add(w[o], x, to);
        }
      }
    }
    VIDOPS_UNROLL
    for (int part = 0; part < kIterateOutputs / 4; ++part) {
      const float total = lane_sums(sum[part]);
      const int output = first + part * 4 + lane / kIterateRows;
      if (output < map.out) store(lane % kIterateRows, output, total + (map.bias ? map.bias[output] : 0.0f));
    }
  }
}

// LayerNorm of slots; one warp per row.
VIDOPS_DEVICE void normalise(const SlotIterationsArgs& a, const SlotNorm& norm, const float* from, int rows,
                             float* to) {
  for (int r = warp_id(); r < rows; r += block_warps()) {
    const float* x = from + r * a.width;
    float sum = 0;
    for (int c = lane_id(); c < a.width; c += kWarp) sum += x[c];
    const float mean = warp_sum(sum) / (float)a.width;
    sum = 0;
    for (int c = lane_id(); c < a.width; c += kWarp) sum += (x[c] - mean) * (x[c] - mean);
    const float variance = warp_sum(sum) / (float)a.width;
    // NaN where the variance overflows, as PyTorch's own LayerNorm has it for most widths.
    const float rstd = 1.0f / square_root(variance + a.ln_eps) + (variance - variance);
    for (int c = lane_id(); c < a.width; c += kWarp) {
      const float v = (x[c] - mean) * rstd * (norm.weight ? norm.weight[c] : 1.0f);
      to[r * a.normed_pitch + c] = v + (norm.bias ? norm.bias[c] : 0.0f);
    }
  }
}

// What every token's row is multiplied with, and the constant term, from the slots.
template <bool kCentre>
VIDOPS_DEVICE void find_queries(const SlotIterationsArgs& a, char* memory) {
  float* const normed = floats(memory, a.at.normed);
  float* const hidden = floats(memory, a.at.hidden);
  for (int first = 0; first < a.slots; first += kIterateRows) {
    const int rows = a.slots - first < kIterateRows ? a.slots - first : kIterateRows;
    normalise(a, a.norm_slots, floats(memory, a.at.slots) + first * a.width, rows, normed);
    block_sync();
    apply_linear(a.query, normed, a.normed_pitch,
                 [&](int r, int o, float v) { hidden[r * a.hidden_pitch + o] = v * a.scale; });
    block_sync();
    apply_linear(a.key, hidden, a.hidden_pitch, [&](int r, int o, float v) { normed[r * a.normed_pitch + o] = v; });
    block_sync();
    for (int r = warp_id(); r < rows; r += block_warps()) {
      float* const row = normed + r * a.normed_pitch;
      float constant = 0, sum = 0;
      for (int c = lane_id(); c < a.channels; c += kWarp) {
        if (a.norm_input.bias) constant = multiply_add(row[c], a.norm_input.bias[c], constant);
        if (a.norm_input.weight) row[c] *= a.norm_input.weight[c];
        sum += row[c];
      }
      if (kCentre) subtract_mean(row, sum, a.channels);
      for (int c = lane_id(); c < a.channels; c += kWarp) {
        const float v = row[c], high = finite(v) ? bits_float((float_bits(v) + 0x1000u) & 0xffffe000u) : v;
        floats(memory, a.at.high)[(first + r) * a.row_pitch + c] = high;
        floats(memory, a.at.low)[(first + r) * a.row_pitch + c] = finite(v) ? v - high : 0.0f;
      }
      if (a.key_bias)
        for (int c = lane_id(); c < a.query.out; c += kWarp)
          constant = multiply_add(hidden[r * a.hidden_pitch + c], a.key_bias[c], constant);
      constant = warp_sum(constant);
      if (lane_id() == 0) floats(memory, a.at.constants)[first + r] = constant;
    }
    block_sync();
  }
}

VIDOPS_DEVICE float sigmoid(float v) { return 1.0f / (1.0f + exponential(-v)); }

VIDOPS_DEVICE float activate(const SlotIterationsArgs& a, float v) {
  if (a.gelu) return 0.5f * v * (1.0f + error_function(v * 0.70710678118654752f));
  return v > 0 || v != v ? v : 0.0f;
}

// The next slots, from the sums over the tokens.
VIDOPS_DEVICE void update_slots(const SlotIterationsArgs& a, char* memory) {
  const int me = thread_x(), threads = block_threads();
  float* const normed = floats(memory, a.at.normed);
  float* const hidden = floats(memory, a.at.hidden);
  float* const of_update = floats(memory, a.at.of_update);
  float* const of_slots = floats(memory, a.at.of_slots);
  for (int first = 0; first < a.slots; first += kIterateRows) {
    const int rows = a.slots - first < kIterateRows ? a.slots - first : kIterateRows;
    float* const slots = floats(memory, a.at.slots) + first * a.width;
    const float* const sums = floats(memory, a.at.high) + first * a.row_pitch;
    const float* const dens = floats(memory, a.at.constants) + first;
    const auto share = [&](int r) { return dens[r] / (dens[r] + a.denominator); };
    for (int i = me; i < rows * a.channels; i += threads) {
      const int r = i / a.channels, c = i % a.channels;
      float v = sums[r * a.row_pitch + c] / (dens[r] + a.denominator);
      if (a.norm_input.weight) v *= a.norm_input.weight[c];
      if (a.norm_input.bias) v = multiply_add(share(r), a.norm_input.bias[c], v);
      normed[r * a.normed_pitch + c] = v;
    }
    block_sync();
    apply_linear(a.value, normed, a.normed_pitch, [&](int r, int o, float v) {
      if (r < rows && a.value_bias) v = multiply_add(share(r), a.value_bias[o], v);
      hidden[r * a.hidden_pitch + o] = v;
    });
    block_sync();
    const float* update = hidden;
    int pitch = a.hidden_pitch;
    if (a.merge.weight) {
      apply_linear(a.merge, hidden, pitch, [&](int r, int o, float v) { normed[r * a.normed_pitch + o] = v; });
      block_sync();
      update = normed, pitch = a.normed_pitch;
    }
    if (a.gru_update.weight) {
      const int gates = 3 * a.width;
      apply_linear(a.gru_update, update, pitch, [&](int r, int o, float v) { of_update[r * gates + o] = v; });
      apply_linear(a.gru_slots, slots, a.width, [&](int r, int o, float v) { of_slots[r * gates + o] = v; });
      block_sync();
      for (int i = me; i < rows * a.width; i += threads) {
        const float* const u = of_update + i / a.width * gates + i % a.width;
        const float* const s = of_slots + i / a.width * gates + i % a.width;
        const float reset = sigmoid(u[0] + s[0]), keep = sigmoid(u[a.width] + s[a.width]);
        const float candidate = hyperbolic_tangent(multiply_add(reset, s[2 * a.width], u[2 * a.width]));
        slots[i] = (1 - keep) * candidate + keep * slots[i];
      }
    } else {
      for (int i = me; i < rows * a.width; i += threads) slots[i] += update[i / a.width * pitch + i % a.width];
    }
    block_sync();
    if (a.mlp_in.weight) {
      normalise(a, a.norm_mlp, slots, rows, normed);
      block_sync();
      apply_linear(a.mlp_in, normed, a.normed_pitch,
                   [&](int r, int o, float v) { hidden[r * a.hidden_pitch + o] = activate(a, v); });
      block_sync();
      apply_linear(a.mlp_out, hidden, a.hidden_pitch, [&](int r, int o, float v) {
        if (r < rows) slots[r * a.width + o] += v;
      });
      block_sync();
    }
  }
}

// What does not change, and what stays zero: rows of slots and channels that do not exist.
template <class Storage>
VIDOPS_DEVICE void prepare_block(const SlotIterationsArgs& a, char* memory, int item, int padded) {
  const int me = thread_x(), threads = block_threads();
  const i64 first = (i64)item * a.slots;
  for (int i = me; i < a.slots * a.width; i += threads)
    floats(memory, a.at.slots)[i] = a.start[first * a.width + i];
  for (int i = me; i < padded * a.row_pitch; i += threads)
    floats(memory, a.at.high)[i] = floats(memory, a.at.low)[i] = 0;
  for (int i = me; i < padded; i += threads) {
    const bool open = i < a.slots && (!a.slot_mask || a.slot_mask[first + i] != 0);
    floats(memory, a.at.open)[i] = open ? 1.0f : 0.0f;
    floats(memory, a.at.constants)[i] = 0;
  }
  const int pad = a.units * 32 - a.channels;
  for (int tile = warp_id(); pad > 0 && tile < a.warp_tiles * block_warps(); tile += block_warps())
    for (int i = lane_id(); i < kIterateTokens * pad; i += kWarp) {
      char* const row = memory + a.at.ring + tile * a.tile_bytes + i / pad * a.pitch;
      reinterpret_cast<typename Storage::Element*>(row)[a.channels + i % pad] = 0;
    }
}

VIDOPS_DEVICE void write_slots(const SlotIterationsArgs& a, char* memory, int item, float* to) {
  const int count = a.slots * a.width;
  for (int i = thread_x(); i < count; i += block_threads())
    to[(i64)item * count + i] = floats(memory, a.at.slots)[i];
}

template <class Storage, int kStrips>
VIDOPS_DEVICE void slot_iterations(const SlotIterationsArgs& a) {
  VIDOPS_SHARED(memory);
  const TileQueue<Storage> queue(a, memory);
  for (int k = 0; k < kIterateStages - 1; ++k) queue.load(0, k);
  prepare_block<Storage>(a, memory, queue.item(), kStrips * 8);
  block_sync();
  const bool writes = cluster_rank() == 0;
  VIDOPS_NO_UNROLL
  for (int iteration = 0; iteration < a.iters; ++iteration) {
    if (writes && iteration >= a.first_state) {
      const i64 each = (i64)a.items * a.slots * a.width;
      write_slots(a, memory, queue.item(), a.states + (iteration - a.first_state) * each);
    }
    find_queries<Storage::kShort>(a, memory);
    IterationSums<kStrips> sums = {};
    attend_share(a, memory, queue, iteration, sums);
    add_up<Storage::kShort>(a, memory, sums, iteration % 2);
    update_slots(a, memory);
  }
  copy_wait<0>();
  if (writes) write_slots(a, memory, queue.item(), a.out);
  if (a.cluster > 1) cluster_sync();
}

}  // namespace

// Up to 8, 16 and 32 slots.
VIDOPS_KERNEL(kIterateThreads, 1) slot_iterations_8_f32(SlotIterationsArgs a) {
  slot_iterations<FloatStorage, 1>(a);
}
VIDOPS_KERNEL(kIterateThreads, 1) slot_iterations_8_f16(SlotIterationsArgs a) {
  slot_iterations<HalfStorage, 1>(a);
}
VIDOPS_KERNEL(kIterateThreads, 1) slot_iterations_8_bf16(SlotIterationsArgs a) {
  slot_iterations<BfloatStorage, 1>(a);
}
VIDOPS_KERNEL(kIterateWideThreads, 1) slot_iterations_16_f32(SlotIterationsArgs a) {
  slot_iterations<FloatStorage, 2>(a);
}
VIDOPS_KERNEL(kIterateThreads, 1) slot_iterations_16_f16(SlotIterationsArgs a) {
  slot_iterations<HalfStorage, 2>(a);
}
VIDOPS_KERNEL(kIterateThreads, 1) slot_iterations_16_bf16(SlotIterationsArgs a) {
  slot_iterations<BfloatStorage, 2>(a);
}
VIDOPS_KERNEL(kIterateWideThreads, 1) slot_iterations_32_f32(SlotIterationsArgs a) {
  slot_iterations<FloatStorage, 4>(a);
}
VIDOPS_KERNEL(kIterateWideThreads, 1) slot_iterations_32_f16(SlotIterationsArgs a) {
  slot_iterations<HalfStorage, 4>(a);
}
VIDOPS_KERNEL(kIterateWideThreads, 1) slot_iterations_32_bf16(SlotIterationsArgs a) {
  slot_iterations<BfloatStorage, 4>(a);
}

}  // namespace vidops::cuda
