// Slot attention over the tokens (softmax over the slots, weighted sums of the values) and its backward.
//
// A block owns some rows (slots of one head, or of all heads where these read the same keys), and a share of the
// tokens, which passes through shared memory tile by tile, in its own dtype. Per tile: the dots, the softmax of every
// token, and products in which a warp owns 16 rows by 32 channels across all tiles of the block. Dots are sums over
// slices of the channels, added in a fixed order. Blocks that share rows leave partial sums; slot_attend_sum adds
// these in order.
//
// Tensor cores multiply, to float32 accuracy: every operand is split into two TF32 numbers. What that cannot give,
// infinities and overflow, shows as a sum that is not finite; then the ordinary units repeat the work (a forward's
// block, or the dots of a backward's tile).
//
// A softmax over more rows than a block takes (joint heads with keys of their own, or many slots) needs the dots of
// all before any weight: one launch writes them, the next reads them (SlotMode).
#include "split_products.cuh"

namespace vidops::cuda {

constexpr int kSlotThreads = 384;  // at most
constexpr int kSlotRows = 8;       // rows of a thread's tile on the ordinary units, and what rows are padded to
constexpr int kSlotTokens = 2;     // tokens of a thread's tile of dots
constexpr int kSlotLanes = 8;      // lanes of a warp side by side over the tokens; the others over the channels
constexpr int kSlotSlices = kWarp / kSlotLanes;
constexpr int kSlotTile = kSlotLanes * kSlotTokens;  // tokens that a warp multiplies at a time
constexpr int kSlotUnits = 4;      // 16 rows by 32 channels each, of a warp
constexpr int kSumThreads = 128;
constexpr int kStatisticsThreads = 128;
constexpr float kSlotLog2e = 1.44269504088896341f;

enum class SlotMode : int { all, dots, given };  // in one launch; the first of two; the second of two

// Keys or values; strides in elements.
struct SlotOperand {
  const void* data;
  i64 batch, head, row;
  int channels;
  int quads;  // of four channels
  int pairs;  // of quads: a thread's channels
  int row_pitch;  // floats of a row of q or a gradient in shared memory, an odd multiple of 4
  int row_bytes;
  int pitch;  // of a row in shared memory, in bytes, an odd multiple of 16: eight rows lie in different banks
  bool own;   // every head has its own
  bool whole;  // rows can be copied in aligned pieces of 16 bytes
  bool loaded;
};

// Offsets into shared memory, in bytes.
struct SlotLayout {
  int place;           // SlotPlace
  int infinite;        // whether tensor cores met what they cannot handle
  int q, g;            // rows of q and of the gradient of num, float32
  int constants;       // per row: c, gradient of den, whether the slot takes part
  int stage, stage_bytes, values;  // `values`: within a stage
  int planes, planes_g;            // per slice: [rows][tile + 4]
  int weights, weights_g;          // [tile][rows + 4]
  int statistics;                  // mean and rstd, two tiles
  int sums;                        // [rows][tile + 4]
  int bytes;
};

struct SlotAttendArgs {
  SlotOperand keys, values;
  const float* mean;
  const float* rstd;
  const float* q;
  const float* c;
  const float* token_mask;
  const float* slot_mask;
  float eps;
  int slots, n, rows;  // rows: slots of all heads of an item
  int groups;
  int set_rows;  // of one softmax
  SlotMode mode;
  int unit_rows, chunk_rows, chunks;  // a unit's rows see the same keys and lie in chunks, one for a block
  int first_chunk, launch_chunks;     // of all chunks of an item, those of this launch
  int splits, share;                  // blocks that share rows, and their tokens: a multiple of the tile
  int tile, row_groups, key_slices, parts, weigh_parts, stages;
  int units, teams, unit_parts;  // on tensor cores: units of a warp, warps that share all units, and the tokens' parts
  SlotLayout at;
  float* num;    // (rows, channels) of the output, here or in the backward that of q; or partial sums per split
  float* den;    // likewise
  // Whether q and the gradient of num, or num, or the gradients of tokens can be accessed four channels at a time.
  bool rows_whole, num_whole, grads_whole;
  i64 num_split, den_split;
  float* dots;  // where wanted, or scratch
  float* attn;
  // Backward.
  const float* grad_num;
  const float* grad_den;
  const float* grad_dots;
  const float* grad_attn;
  float* weight_grads;  // scratch, like dots: the gradient of a weight before the mask
  float* grad_keys;     // (B,Hk,N,Dk)
  float* grad_values;   // null where values are the keys
  bool grads_add;       // to what is there
};

namespace {

// --- the work of a block ----------------------------------------------------------------------------------------
struct SlotPlace {
  int item, split;
  int row;   // of the item, the block's first
  int rows;  // of the block
  int begin, end;  // tokens

  VIDOPS_DEVICE void find(const SlotAttendArgs& a) {
    u32 rest = block_x();
    split = (int)(rest % (u32)a.splits);
    rest /= (u32)a.splits;
    const int chunk = a.first_chunk + (int)(rest % (u32)a.launch_chunks);
    item = (int)(rest / (u32)a.launch_chunks);
    const int within = chunk % a.chunks * a.chunk_rows;
    row = chunk / a.chunks * a.unit_rows + within;
    rows = a.unit_rows - within < a.chunk_rows ? a.unit_rows - within : a.chunk_rows;
    begin = split * a.share;
    end = begin + a.share < a.n ? begin + a.share : a.n;
  }
  VIDOPS_DEVICE i64 global_row(const SlotAttendArgs& a, int r) const { return (i64)item * a.rows + row + r; }
  VIDOPS_DEVICE int head(const SlotAttendArgs& a) const { return row / a.slots; }
};

VIDOPS_DEVICE float* floats(char* memory, int at) { return reinterpret_cast<float*>(memory + at); }

// Rows of q or of a gradient; the padding of rows and channels is zero. `whole`: they can be copied in pieces of 16
// bytes, all of them on their way at once; they arrive with the first tile.
VIDOPS_DEVICE void load_rows(float* to, const float* from, int rows, int padded_rows, int channels, int pitch,
                             bool whole) {
  VIDOPS_NO_UNROLL
  for (int r = warp_id(); r < padded_rows; r += block_threads() / kWarp) {
    const float* row = from + (i64)r * channels;
    VIDOPS_NO_UNROLL
    for (int c = lane_id() * 4; c < pitch; c += kWarp * 4) {
      if (whole) {
        const bool there = r < rows && c < channels;
        copy_async(to + r * pitch + c, there ? row + c : from, there);
        continue;
      }
      VIDOPS_UNROLL
      for (int e = 0; e < 4; ++e)
        to[r * pitch + c + e] = r < rows && c + e < channels ? row[c + e] : 0.0f;
    }
  }
}

// Tokens from `first` on into one tile; those from `end` on become zeros.
template <class Storage>
VIDOPS_DEVICE void load_tokens(char* to, const SlotOperand& o, int item, int head, int first, int end, int tile) {
  using Element = typename Storage::Element;
  if (!o.loaded) return;
  const Element* from =
      static_cast<const Element*>(o.data) + item * o.batch + (o.own ? head * o.head : 0) + first * o.row;
  const int valid = end - first;
  if (o.whole) {
    // Threads run over the pieces of all rows; the next piece of a thread follows without a division.
    const int pieces = o.channels * (int)sizeof(Element) / 16, threads = block_threads();
    const int step_rows = threads / pieces, step = threads % pieces;
    int row = thread_x() / pieces, piece = thread_x() % pieces;
    VIDOPS_NO_UNROLL
    while (row < tile) {
      const bool there = row < valid;
      copy_async(to + row * o.pitch + piece * 16,
                 reinterpret_cast<const char*>(from + (there ? row : 0) * o.row) + piece * 16, there);
      row += step_rows;
      piece += step;
      if (piece >= pieces) piece -= pieces, ++row;
    }
    return;
  }
  VIDOPS_NO_UNROLL
  for (int row = warp_id(); row < tile; row += block_threads() / kWarp) {
    Element* line = reinterpret_cast<Element*>(to + row * o.pitch);
    for (int c = lane_id(); c < o.quads * 4; c += kWarp)
      line[c] = row < valid && c < o.channels ? from[row * o.row + c] : (Element)0;
  }
}

// Adds the slices of the channels that the lanes of a warp hold: afterwards a lane has two rows, 4 * (lane / 16) +
// 2 * (lane / 8 % 2) and the next, in sum[0] and sum[1].
VIDOPS_DEVICE void add_lane_slices(float (&sum)[kSlotRows][kSlotTokens]) {
  const bool upper = lane_id() & 16, odd = lane_id() & 8;
  VIDOPS_UNROLL
  for (int r = 0; r < 4; ++r)
    VIDOPS_UNROLL
    for (int k = 0; k < kSlotTokens; ++k) {
      const float kept = upper ? sum[r + 4][k] : sum[r][k], given = upper ? sum[r][k] : sum[r + 4][k];
      sum[r][k] = kept + shuffle_xor(given, 16);
    }
  VIDOPS_UNROLL
  for (int r = 0; r < 2; ++r)
    VIDOPS_UNROLL
    for (int k = 0; k < kSlotTokens; ++k) {
      const float kept = odd ? sum[r + 2][k] : sum[r][k], given = odd ? sum[r][k] : sum[r + 2][k];
      sum[r][k] = kept + shuffle_xor(given, 8);
    }
}

// planes[slice][row][token] = rows . (tokens - mean) over a slice of the channels.
template <class Storage>
VIDOPS_DEVICE void multiply_tokens(const SlotAttendArgs& a, const float* rows, const SlotOperand& o,
                                   const char* tile, const float* mean, float* planes) {
  const int lane = lane_id(), token_lane = lane % kSlotLanes, slice_lane = lane / kSlotLanes;
  const int pitch = o.row_pitch, plane_pitch = a.tile + 4, plane = a.row_groups * kSlotRows * plane_pitch;
  const int tasks = a.row_groups * (a.tile / kSlotTile) * a.key_slices;
  VIDOPS_NO_UNROLL
  for (int task = warp_id(); task < tasks; task += block_threads() / kWarp) {
    const int slice = task % a.key_slices, rest = task / a.key_slices;
    const int row = rest % a.row_groups * kSlotRows;
    const int token = rest / a.row_groups * kSlotTile + token_lane;
    const float* left = rows + row * pitch;
    const char* right = tile + token * o.pitch;
    float centre[kSlotTokens], sum[kSlotRows][kSlotTokens] = {};
    VIDOPS_UNROLL
    for (int k = 0; k < kSlotTokens; ++k) centre[k] = mean[token + k * kSlotLanes];
    VIDOPS_NO_UNROLL
    for (int quad = slice * kSlotSlices + slice_lane; quad < o.quads; quad += kSlotSlices * a.key_slices) {
      FloatQuad x[kSlotTokens];
      VIDOPS_UNROLL
      for (int k = 0; k < kSlotTokens; ++k) {
        x[k] = load_quad<Storage>(right + k * kSlotLanes * o.pitch, quad);
        VIDOPS_UNROLL
        for (int e = 0; e < 4; ++e) x[k].v[e] -= centre[k];
      }
      VIDOPS_UNROLL
      for (int r = 0; r < kSlotRows; ++r) {
        const FloatQuad y = load_floats(left + r * pitch + quad * 4);
        VIDOPS_UNROLL
        for (int k = 0; k < kSlotTokens; ++k)
          VIDOPS_UNROLL
          for (int e = 0; e < 4; ++e) sum[r][k] = multiply_add(y.v[e], x[k].v[e], sum[r][k]);
      }
    }
    add_lane_slices(sum);
    float* to = planes + slice * plane + (row + lane / 16 * 4 + lane / 8 % 2 * 2) * plane_pitch + token;
    VIDOPS_UNROLL
    for (int r = 0; r < 2; ++r)
      VIDOPS_UNROLL
      for (int k = 0; k < kSlotTokens; ++k) to[r * plane_pitch + k * kSlotLanes] = sum[r][k];
  }
}

// What the softmax of one token over one set of rows reads and writes. Members of the set are counted from 0; `local`
// is a member's row in the block, which for dots of an earlier launch may lie outside.
template <bool kBackward, bool kGiven>
struct SlotSet {
  const SlotAttendArgs& a;
  const SlotPlace& place;
  char* memory;
  int token;   // in the tile
  int column;  // of the maps
  bool valid;  // the token is one of the share
  int first;   // local row of the first member
  float rstd, mask;

  VIDOPS_DEVICE bool mine(int local) const {
    return !kGiven || (local >= 0 && local < place.rows);
  }
  VIDOPS_DEVICE i64 map_at(int local) const { return place.global_row(a, local) * a.n + column; }
  VIDOPS_DEVICE float* plane(int at, int local) const {
    return floats(memory, at) + local * (a.tile + 4) + token;
  }
  VIDOPS_DEVICE const float* constants(int kind) const {
    return floats(memory, a.at.constants) + kind * a.row_groups * kSlotRows;
  }
  VIDOPS_DEVICE bool open(int local) const {
    if (!a.slot_mask) return true;
    if (!kGiven) return constants(2)[local] != 0;
    return a.slot_mask[(i64)place.item * a.slots + (place.row + local) % a.slots] != 0;
  }
  // Adds up the slices and leaves the sum in the first.
  VIDOPS_DEVICE float product(int at, int local, float constant) const {
    float* to = plane(at, local);
    const int step = a.row_groups * kSlotRows * (a.tile + 4);
    float sum = to[0];
    VIDOPS_NO_UNROLL
    for (int slice = 1; slice < a.key_slices; ++slice) sum += to[slice * step];
    return *to = multiply_add(sum, rstd, constant);
  }
  // Forms a member's dot, or reads it.
  VIDOPS_DEVICE float form_dot(int local) const {
    if (kGiven) return dot(local);
    float v = product(a.at.planes, local, constants(0)[local]);
    if (!open(local)) *plane(a.at.planes, local) = v = -VIDOPS_INFINITY;
    if (a.dots && valid) a.dots[map_at(local)] = v;
    return v;
  }
  VIDOPS_DEVICE float dot(int local) const {
    if (!kGiven) return *plane(a.at.planes, local);
    return valid ? a.dots[map_at(local)] : 0.0f;
  }
  // Likewise the gradient of a softmax weight.
  VIDOPS_DEVICE float form_grad(int local) const {
    if (!kGiven) {
      const float v = product(a.at.planes_g, local, constants(1)[local]);
      if (a.mode == SlotMode::dots && valid) a.weight_grads[map_at(local)] = v;
    }
    return grad(local);
  }
  VIDOPS_DEVICE float grad(int local) const {
    if (!valid) return 0.0f;
    const float g = !kGiven ? *plane(a.at.planes_g, local) : a.weight_grads[map_at(local)];
    return multiply_add(mask, g, a.grad_attn ? a.grad_attn[map_at(local)] : 0.0f);
  }
};

// Turns the dots of a tile into weights (forward: times rstd, since they meet rows that are only centred) and, in the
// backward, into gradients of the dots. A few lanes share the members of a set.
template <bool kBackward, bool kGiven>
VIDOPS_DEVICE void weigh(const SlotAttendArgs& a, const SlotPlace& place, int first_token, const float* rstd,
                         char* memory) {
  const int parts = a.weigh_parts, part = thread_x() % parts, at_once = block_threads() / parts;
  // Before there is a softmax, the rows of the block are its set.
  const int set_rows = a.mode == SlotMode::dots ? place.rows : a.set_rows;
  const int pairs = (kGiven ? 1 : place.rows / set_rows) * a.tile;
  const int weight_pitch = a.row_groups * kSlotRows + 4;
  const auto across = [&](float v, auto combine) {
    for (int mask = 1; mask < parts; mask <<= 1) v = combine(v, shuffle_xor(v, mask));
    return v;
  };
  VIDOPS_NO_UNROLL
  for (int base = 0; base < pairs; base += at_once) {
    const int pair = base + thread_x() / parts, set = pair / a.tile;
    const bool there = pair < pairs;
    const int first_row = kGiven ? place.row / set_rows * set_rows : place.row + set * set_rows;
    const int token = there ? pair % a.tile : 0, column = first_token + token;
    const bool valid = there && column < place.end;
    float mask = valid ? 1.0f : 0.0f;
    if (valid && a.token_mask)
      mask = a.token_mask[((i64)place.item * a.groups + first_row / a.set_rows % a.groups) * a.n + column];
    const SlotSet<kBackward, kGiven> s{a, place, memory, token, column, valid, first_row - place.row,
                                       rstd[token], mask};
    const int members = there ? set_rows : 0;

    float most = -VIDOPS_INFINITY;
    VIDOPS_NO_UNROLL
    for (int m = part; m < members; m += parts) {
      most = larger(most, s.form_dot(s.first + m));
      if (kBackward) s.form_grad(s.first + m);
    }
    if (a.mode == SlotMode::dots) continue;
    most = across(most, [](float x, float y) { return larger(x, y); });
    float total = 0, weighted = 0;
    VIDOPS_NO_UNROLL
    for (int m = part; m < members; m += parts) {
      const float e = exp2_fast((s.dot(s.first + m) - most) * kSlotLog2e);
      total += e;
      if (kBackward) weighted = multiply_add(e, s.grad(s.first + m), weighted);
    }
    const auto add = [](float x, float y) { return x + y; };
    total = across(total, add);
    if (kBackward) weighted = across(weighted, add) / total;

    VIDOPS_NO_UNROLL
    for (int m = part; m < members; m += parts) {
      const int local = s.first + m;
      if (!s.mine(local)) continue;
      const float weight = exp2_fast((s.dot(local) - most) * kSlotLog2e) / total;
      const float kept = valid ? (weight + a.eps) * mask : 0.0f;
      float* to = floats(memory, a.at.weights) + token * weight_pitch + local;
      float* sum = floats(memory, a.at.sums) + local * (a.tile + 4) + token;
      if (!kBackward) {
        if (a.attn && valid) a.attn[s.map_at(local)] = weight;
        *to = kept * s.rstd;
        *sum += kept;
        continue;
      }
      float slope = weight * (s.grad(local) - weighted);
      if (valid && a.grad_dots) slope += a.grad_dots[s.map_at(local)];
      if (!valid || !s.open(local)) slope = 0;
      *to = slope;
      *sum += slope;
      floats(memory, a.at.weights_g)[token * weight_pitch + local] = kept;
    }
  }
}

struct SlotSums {
  float v[kSlotRows][2][4];
};

// Thread t has pair t % tasks of rows and channels, of the tokens t / tasks, t / tasks + parts, ...
template <class Storage>
VIDOPS_DEVICE void accumulate(const SlotAttendArgs& a, SlotSums& sums, const SlotOperand& o, const char* tile,
                              const float* mean, const float* weights) {
  const int tasks = a.row_groups * o.pairs, task = thread_x() % tasks, part = thread_x() / tasks;
  if (part >= a.parts) return;
  const int weight_pitch = a.row_groups * kSlotRows + 4, quad = task % o.pairs;
  const float* weight = weights + task / o.pairs * kSlotRows;
  VIDOPS_NO_UNROLL
  for (int token = part; token < a.tile; token += a.parts) {
    const char* row = tile + token * o.pitch;
    FloatQuad x[2];
    const float centre = mean[token];
    VIDOPS_UNROLL
    for (int u = 0; u < 2; ++u) {
      x[u] = load_quad<Storage>(row, quad + u * o.pairs);
      VIDOPS_UNROLL
      for (int e = 0; e < 4; ++e) x[u].v[e] -= centre;
    }
    VIDOPS_UNROLL
    for (int half = 0; half < 2; ++half) {
      const FloatQuad w = load_floats(weight + token * weight_pitch + half * 4);
      VIDOPS_UNROLL
      for (int r = 0; r < 4; ++r)
        VIDOPS_UNROLL
        for (int u = 0; u < 2; ++u)
          VIDOPS_UNROLL
          for (int e = 0; e < 4; ++e) {
            float& sum = sums.v[half * 4 + r][u][e];
            sum = multiply_add(w.v[r], x[u].v[e], sum);
          }
    }
  }
}

// Four channels of a row of the output.
VIDOPS_DEVICE void write_quad(const SlotAttendArgs& a, const SlotPlace& place, const SlotOperand& o, int row, int quad,
                              const FloatQuad& v) {
  float* to = a.num + place.split * a.num_split + place.global_row(a, row) * o.channels + quad * 4;
  if (a.num_whole) {
    *reinterpret_cast<FloatQuad*>(to) = v;
    return;
  }
  VIDOPS_UNROLL
  for (int e = 0; e < 4; ++e)
    if (quad * 4 + e < o.channels) to[e] = v.v[e];
}

// Adds the parts of the block in a fixed order, and writes rows of sums. `memory` is free: half the threads' sums.
VIDOPS_DEVICE void write_sums(const SlotAttendArgs& a, const SlotPlace& place, SlotSums& sums, const SlotOperand& o,
                              float* memory) {
  const int tasks = a.row_groups * o.pairs, task = thread_x() % tasks, part = thread_x() / tasks;
  for (int count = a.parts; count > 1;) {
    const int kept = (count + 1) / 2, moved = count - kept;
    const auto each = [&](int from, auto use) {
      float* slot = memory + from * tasks + task;
      VIDOPS_UNROLL
      for (int r = 0; r < kSlotRows; ++r)
        VIDOPS_UNROLL
        for (int u = 0; u < 2; ++u)
          VIDOPS_UNROLL
          for (int e = 0; e < 4; ++e) use(slot[((r * 2 + u) * 4 + e) * moved * tasks], sums.v[r][u][e]);
    };
    block_sync();
    if (part >= kept && part < count) each(part - kept, [](float& to, float v) { to = v; });
    block_sync();
    if (part < moved) each(part, [](float from, float& v) { v += from; });
    count = kept;
  }
  if (part != 0) return;
  const int row = task / o.pairs * kSlotRows;
  VIDOPS_UNROLL
  for (int r = 0; r < kSlotRows; ++r)
    VIDOPS_UNROLL
    for (int u = 0; u < 2; ++u) {
      const int quad = task % o.pairs + u * o.pairs;
      if (row + r >= place.rows || quad >= o.quads) continue;
      FloatQuad all;
      VIDOPS_UNROLL
      for (int e = 0; e < 4; ++e) all.v[e] = sums.v[r][u][e];
      write_quad(a, place, o, row + r, quad, all);
    }
}

// --- products on tensor cores --------------------------------------------------------------------------------------
// As multiply_tokens. Which channel is which of the product's is free as long as both operands agree, so lanes read
// four at a time; rows and tokens are permuted so that these reads meet no bank conflict. False if a result is not
// finite.
template <class Storage>
VIDOPS_DEVICE bool multiply_tokens_split(const SlotAttendArgs& a, const float* rows, const SlotOperand& o,
                                         const char* tile, const float* mean, float* planes) {
  const int lane = lane_id(), group = lane / 4, place = lane % 4, turned = group / 2 + group % 2 * 4;
  const int plane_pitch = a.tile + 4, plane = a.row_groups * kSlotRows * plane_pitch;
  const int strips = (a.row_groups + 1) / 2, tasks = strips * (a.tile / kSlotTile) * a.key_slices;
  bool fine = true;
  VIDOPS_NO_UNROLL
  for (int task = warp_id(); task < tasks; task += block_threads() / kWarp) {
    const int slice = task % a.key_slices, rest = task / a.key_slices;
    const int strip = rest % strips, token = rest / strips * kSlotTile;
    const bool full = strip * 2 + 1 < a.row_groups;
    // Without eight more rows the lower half repeats the upper and is dropped.
    const int lower = full ? 8 * o.row_pitch : 0;
    const float* left = rows + (strip * 16 + turned) * o.row_pitch;
    const char* right = tile + (token + turned) * o.pitch;
    const float centre[2] = {mean[token + turned], mean[token + turned + 8]};
    float sum[2][4] = {}, small[2][4] = {};
    VIDOPS_NO_UNROLL
    for (int base = slice * 4; base < o.quads; base += 4 * a.key_slices) {
      const int quad = base + place;
      FloatQuad y[2], x[2];
      y[0] = load_floats(left + quad * 4);
      y[1] = load_floats(left + lower + quad * 4);
      VIDOPS_UNROLL
      for (int j = 0; j < 2; ++j) {
        x[j] = load_quad<Storage>(right + j * 8 * o.pitch, quad);
        VIDOPS_UNROLL
        for (int e = 0; e < 4; ++e) x[j].v[e] -= centre[j];
      }
      VIDOPS_UNROLL
      for (int e = 0; e < 4; e += 2) {
        SplitFloats l;
        l.set(0, y[0].v[e]), l.set(1, y[1].v[e]), l.set(2, y[0].v[e + 1]), l.set(3, y[1].v[e + 1]);
        VIDOPS_UNROLL
        for (int j = 0; j < 2; ++j) multiply_split(sum[j], small[j], l, x[j].v[e], x[j].v[e + 1]);
      }
    }
    float* to = planes + slice * plane + (strip * 16 + turned) * plane_pitch + token + place;
    VIDOPS_UNROLL
    for (int j = 0; j < 2; ++j)
      VIDOPS_UNROLL
      for (int i = 0; i < 4; ++i) {
        sum[j][i] += small[j][i];
        fine = fine && finite(sum[j][i]);
        if (i < 2 || full) to[i / 2 * 8 * plane_pitch + j * 8 + i % 2 * 4] = sum[j][i];
      }
  }
  return fine;
}

// A warp's share of the output: units of 16 rows by 32 channels, [unit][channel % 4][element of the product].
struct SlotUnits {
  float v[kSlotUnits][4][4];

  template <class Use>
  VIDOPS_DEVICE void each(Use use) {
    VIDOPS_UNROLL
    for (int u = 0; u < kSlotUnits; ++u)
      VIDOPS_UNROLL
      for (int e = 0; e < 4; ++e)
        VIDOPS_UNROLL
        for (int i = 0; i < 4; ++i) use(v[u][e][i], u, e, i);
  }
};

struct UnitPlace {
  int first, part;  // unit of the warp, part of the tokens
  int strips, columns;
  VIDOPS_DEVICE UnitPlace(const SlotAttendArgs& a, const SlotOperand& o)
      : first(warp_id() % a.teams * a.units), part(warp_id() / a.teams), strips((a.row_groups + 1) / 2),
        columns((o.quads + 7) / 8) {}
  VIDOPS_DEVICE bool there(const SlotAttendArgs& a, int u) const { return u < a.units && first + u < strips * columns; }
  VIDOPS_DEVICE int row(int u) const { return (first + u) / columns * 16; }
  VIDOPS_DEVICE int quad(int u) const { return (first + u) % columns * 8; }
};

// As accumulate. Tensor cores round sums downwards, so that long sums would drift: each tile has its own.
template <class Storage, bool kScaled>
VIDOPS_DEVICE void accumulate_split(const SlotAttendArgs& a, SlotUnits& sums, const SlotOperand& o, const char* tile,
                                    const float* mean, const float* rstd, const float* weights) {
  const UnitPlace at(a, o);
  if (at.part >= a.unit_parts) return;
  const int group = lane_id() / 4, place = lane_id() % 4, weight_pitch = a.row_groups * kSlotRows + 4;
  VIDOPS_UNROLL
  for (int u = 0; u < kSlotUnits; ++u) {
    if (!at.there(a, u)) continue;
    const int quad = at.quad(u) + group;
    const int lower = at.row(u) + 8 < a.row_groups * kSlotRows ? 8 : 0;
    float fresh[4][4] = {}, small[4][4] = {};
    VIDOPS_NO_UNROLL
    for (int first = at.part * 8; first < a.tile; first += a.unit_parts * 8) {
      const int token = first + 2 * place;
      FloatQuad x[2];
      SplitFloats w;
      VIDOPS_UNROLL
      for (int t = 0; t < 2; ++t) {
        const float* weight = weights + (token + t) * weight_pitch + at.row(u) + group;
        w.set(2 * t, weight[0]);
        w.set(2 * t + 1, weight[lower]);
        x[t] = load_quad<Storage>(tile + (token + t) * o.pitch, quad);
        VIDOPS_UNROLL
        for (int e = 0; e < 4; ++e) {
          x[t].v[e] -= mean[token + t];
          if (kScaled) x[t].v[e] *= rstd[token + t];
        }
      }
      VIDOPS_UNROLL
      for (int e = 0; e < 4; ++e) multiply_split(fresh[e], small[e], w, x[0].v[e], x[1].v[e]);
    }
    VIDOPS_UNROLL
    for (int e = 0; e < 4; ++e)
      VIDOPS_UNROLL
      for (int i = 0; i < 4; ++i) sums.v[u][e][i] += fresh[e][i] + small[e][i];
  }
}

// As write_sums. With `infinite`: false, and nothing written, if that was set or a sum is not finite; the same in all
// threads.
VIDOPS_DEVICE bool write_units(const SlotAttendArgs& a, const SlotPlace& place, SlotUnits& sums, const SlotOperand& o,
                               float* memory, u32* infinite) {
  const UnitPlace at(a, o);
  const int lane = lane_id(), width = a.teams * kWarp, me = warp_id() % a.teams * kWarp + lane;
  for (int count = a.unit_parts; count > 1;) {
    const int kept = (count + 1) / 2, moved = count - kept;
    const auto slot = [&](int from, int u, int e, int i) -> float& {
      return memory[(((u * 4 + e) * 4 + i) * moved + from) * width + me];
    };
    block_sync();
    if (at.part >= kept && at.part < count)
      sums.each([&](float& v, int u, int e, int i) { if (u < a.units) slot(at.part - kept, u, e, i) = v; });
    block_sync();
    if (at.part < moved)
      sums.each([&](float& v, int u, int e, int i) { if (u < a.units) v += slot(at.part, u, e, i); });
    count = kept;
  }
  if (infinite) {
    bool fine = true;
    if (at.part == 0)
      sums.each([&](float& v, int u, int, int) { fine = fine && (!at.there(a, u) || finite(v)); });
    if (!fine) *infinite = 1;
    block_sync();
    if (*infinite) return false;
  }
  if (at.part != 0) return true;
  VIDOPS_UNROLL
  for (int u = 0; u < kSlotUnits; ++u) {
    if (!at.there(a, u)) continue;
    VIDOPS_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int row = at.row(u) + lane / 4 + i / 2 * 8, quad = at.quad(u) + lane % 4 * 2 + i % 2;
      if (row >= place.rows || quad >= o.quads) continue;
      const FloatQuad all = {{sums.v[u][0][i], sums.v[u][1][i], sums.v[u][2][i], sums.v[u][3][i]}};
      write_quad(a, place, o, row, quad, all);
    }
  }
  return true;
}

// grad[token] += sum over the rows of weight times row, for one or two sets of weights and rows.
VIDOPS_DEVICE void spread_split(const SlotAttendArgs& a, const SlotPlace& place, int first_token, const SlotOperand& o,
                                float* grad, const float* weights, const float* rows, const float* more_weights,
                                const float* more_rows) {
  const int group = lane_id() / 4, lane_place = lane_id() % 4;
  const int padded = a.row_groups * kSlotRows, weight_pitch = padded + 4;
  const int columns = (o.quads + 7) / 8, tasks = columns * (a.tile / kSlotTile);
  const i64 line = (i64)place.item * (o.own ? a.rows / a.slots : 1) + (o.own ? place.head(a) : 0);
  VIDOPS_NO_UNROLL
  for (int task = warp_id(); task < tasks; task += block_threads() / kWarp) {
    const int column = task % columns * 8, token = task / columns * kSlotTile;
    const auto at = [&](int i) {
      return grad + (line * a.n + first_token + token + group + i / 2 * 8) * o.channels +
             (column + lane_place * 2 + i % 2) * 4;
    };
    const auto there = [&](int i) {
      return first_token + token + group + i / 2 * 8 < place.end && column + lane_place * 2 + i % 2 < o.quads;
    };
    const auto channels = [&](int i) {  // of a quad, that exist
      const int left = o.channels - (column + lane_place * 2 + i % 2) * 4;
      return left < 4 ? left : 4;
    };
    FloatQuad before[4] = {};  // read while the products run
    VIDOPS_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (!a.grads_add || !there(i)) continue;
      if (a.grads_whole) {
        before[i] = load_floats(at(i));
        continue;
      }
      VIDOPS_UNROLL
      for (int e = 0; e < 4; ++e)
        if (e < channels(i)) before[i].v[e] = at(i)[e];
    }
    float sum[4][4] = {};
    const auto product = [&](const float* weight, const float* from) {
      VIDOPS_NO_UNROLL
      for (int row = 2 * lane_place; row < padded; row += 8) {
        SplitFloats w;
        FloatQuad x[2];
        VIDOPS_UNROLL
        for (int r = 0; r < 2; ++r) {
          w.set(2 * r, weight[(token + group) * weight_pitch + row + r]);
          w.set(2 * r + 1, weight[(token + group + 8) * weight_pitch + row + r]);
          x[r] = load_floats(from + (row + r) * o.row_pitch + (column + group) * 4);
        }
        VIDOPS_UNROLL
        for (int e = 0; e < 4; ++e) multiply_split(sum[e], sum[e], w, x[0].v[e], x[1].v[e]);
      }
    };
    product(weights, rows);
    if (more_weights) product(more_weights, more_rows);
    VIDOPS_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (!there(i)) continue;
      VIDOPS_UNROLL
      for (int e = 0; e < 4; ++e) before[i].v[e] += sum[e][i];
      if (a.grads_whole) {
        *reinterpret_cast<FloatQuad*>(at(i)) = before[i];
        continue;
      }
      VIDOPS_UNROLL
      for (int e = 0; e < 4; ++e)
        if (e < channels(i)) at(i)[e] = before[i].v[e];
    }
  }
}

// Tensor cores multiply 32 channels at a time: those that do not exist are zero in all stages.
VIDOPS_DEVICE void zero_padding(char* memory, const SlotLayout& at, int stages, int within, const SlotOperand& o,
                                int tile) {
  const int pad = (o.pitch - o.row_bytes) / 2;
  char* tiles = memory + at.stage + within;
  for (int stage = 0; stage < stages; ++stage)
    for (int row = warp_id(); row < tile; row += block_threads() / kWarp)
      for (int i = lane_id(); i < pad; i += kWarp)
        reinterpret_cast<u16*>(tiles + stage * at.stage_bytes + row * o.pitch + o.row_bytes)[i] = 0;
}

// What does not change from tile to tile.
template <bool kBackward>
VIDOPS_DEVICE void load_block(const SlotAttendArgs& a, const SlotPlace& place, char* memory) {
  const int padded = a.row_groups * kSlotRows, me = thread_x(), threads = block_threads();
  load_rows(floats(memory, a.at.q), a.q + place.global_row(a, 0) * a.keys.channels, place.rows, padded,
            a.keys.channels, a.keys.row_pitch, a.rows_whole);
  if (kBackward)
    load_rows(floats(memory, a.at.g), a.grad_num + place.global_row(a, 0) * a.values.channels, place.rows, padded,
              a.values.channels, a.values.row_pitch, a.rows_whole);
  float* constants = floats(memory, a.at.constants);
  for (int r = me; r < padded; r += threads) {
    const bool there = r < place.rows;
    constants[r] = there ? a.c[place.global_row(a, r)] : 0.0f;
    constants[padded + r] = kBackward && there ? a.grad_den[place.global_row(a, r)] : 0.0f;
    const bool open = !there || !a.slot_mask ||
                      a.slot_mask[(i64)place.item * a.slots + (place.row + r) % a.slots] != 0;
    constants[2 * padded + r] = open ? 1.0f : 0.0f;
  }
  for (int i = me; i < padded * (a.tile + 4); i += threads) floats(memory, a.at.sums)[i] = 0;
  zero_padding(memory, a.at, a.stages, 0, a.keys, a.tile);
  zero_padding(memory, a.at, a.stages, a.at.values, a.values, a.tile);
  // Weights of rows that do not exist stay zero.
  for (int i = me; i < a.tile * (padded + 4); i += threads) {
    floats(memory, a.at.weights)[i] = 0;
    if (kBackward) floats(memory, a.at.weights_g)[i] = 0;
  }
}

// The block's work, the forward's on tensor cores or not. False, the same in all threads, if a sum of a forward on
// tensor cores was not finite: then there is no output yet but for the maps, which the other way repeats. A backward
// has added to gradients by then: it repeats the dots of a tile that are not finite, before they are used.
template <class Storage, bool kBackward, bool kSplit>
VIDOPS_DEVICE bool attend_block(const SlotAttendArgs& a, const SlotPlace& place, char* memory) {
  const int me = thread_x();
  u32* infinite = reinterpret_cast<u32*>(memory + a.at.infinite);
  if (me == 0) *infinite = 0;
  load_block<kBackward>(a, place, memory);

  const auto load = [&](int first, int stage) {
    const int head = place.head(a);
    char* to = memory + a.at.stage + stage * a.at.stage_bytes;
    load_tokens<Storage>(to, a.keys, place.item, head, first, place.end, a.tile);
    load_tokens<Storage>(to + a.at.values, a.values, place.item, head, first, place.end, a.tile);
    copy_commit();
  };
  float next_mean = 0, next_rstd = 1;
  const auto load_statistics = [&](int first) {
    next_mean = 0, next_rstd = 1;
    if (!a.mean || me >= a.tile || first + me >= place.end) return;
    next_mean = a.mean[(i64)place.item * a.n + first + me];
    next_rstd = a.rstd[(i64)place.item * a.n + first + me];
  };
  load_statistics(place.begin);
  load(place.begin, 0);

  SlotUnits units = {};  // of the two, the one in use takes registers
  SlotSums sums = {};
  const SlotOperand& out_operand = kBackward ? a.keys : a.values;
  const float* q = floats(memory, a.at.q);
  const float* g = floats(memory, a.at.g);
  float* weights = floats(memory, a.at.weights);
  float* weights_g = floats(memory, a.at.weights_g);
  int stage = 0, parity = 0;
  VIDOPS_NO_UNROLL
  for (int first = place.begin; first < place.end; first += a.tile) {
    float* mean = floats(memory, a.at.statistics) + parity * 2 * a.tile;
    float* rstd = mean + a.tile;
    if (me < a.tile) mean[me] = next_mean, rstd[me] = next_rstd;
    copy_wait<0>();
    block_sync();
    const bool more = first + a.tile < place.end;
    if (more) load_statistics(first + a.tile);
    if (more && a.stages == 2) load(first + a.tile, stage ^ 1);
    const char* keys = memory + a.at.stage + stage * a.at.stage_bytes;
    const char* values = keys + a.at.values;
    if (a.mode != SlotMode::given) {
      float* planes = floats(memory, a.at.planes);
      float* planes_g = floats(memory, a.at.planes_g);
      bool fine = true;
      if (kSplit)
        fine = multiply_tokens_split<Storage>(a, q, a.keys, keys, mean, planes);
      else
        multiply_tokens<Storage>(a, q, a.keys, keys, mean, planes);
      if (kBackward) fine = multiply_tokens_split<Storage>(a, g, a.values, values, mean, planes_g) && fine;
      if (!fine) *infinite = 1;
      block_sync();
      if (kBackward && *infinite) {
        block_sync();
        if (me == 0) *infinite = 0;
        multiply_tokens<Storage>(a, q, a.keys, keys, mean, planes);
        multiply_tokens<Storage>(a, g, a.values, values, mean, planes_g);
        block_sync();
      }
    }
    if (a.mode == SlotMode::given)
      weigh<kBackward, true>(a, place, first, rstd, memory);
    else
      weigh<kBackward, false>(a, place, first, rstd, memory);
    block_sync();
    if (a.mode != SlotMode::dots) {
      const char* rows = kBackward ? keys : values;
      if (kSplit)
        accumulate_split<Storage, kBackward>(a, units, out_operand, rows, mean, rstd, weights);
      else
        accumulate<Storage>(a, sums, out_operand, rows, mean, weights);
      if (kBackward) {
        if (a.grad_values) {
          spread_split(a, place, first, a.keys, a.grad_keys, weights, q, nullptr, nullptr);
          spread_split(a, place, first, a.values, a.grad_values, weights_g, g, nullptr, nullptr);
        } else {
          spread_split(a, place, first, a.keys, a.grad_keys, weights, q, weights_g, g);
        }
      }
    }
    if (a.stages == 2) {
      stage ^= 1;
    } else if (more) {
      block_sync();
      load(first + a.tile, 0);
    }
    parity ^= 1;
  }
  copy_wait<0>();
  block_sync();
  if (a.mode == SlotMode::dots) return kBackward || !*infinite;
  float* scratch = floats(memory, a.at.stage);
  if (kSplit) {
    if (!write_units(a, place, units, out_operand, scratch, kBackward ? nullptr : infinite)) return false;
  } else {
    write_sums(a, place, sums, out_operand, scratch);
  }
  for (int r = warp_id(); r < place.rows; r += block_threads() / kWarp) {
    float sum = 0;
    for (int t = lane_id(); t < a.tile; t += kWarp) sum += floats(memory, a.at.sums)[r * (a.tile + 4) + t];
    sum = warp_sum(sum);
    if (lane_id() == 0) a.den[place.split * a.den_split + place.global_row(a, r)] = sum;
  }
  return true;
}

template <class Storage, bool kBackward>
VIDOPS_DEVICE void slot_attend(const SlotAttendArgs& a) {
  VIDOPS_SHARED(memory);
  // In shared memory, for the sake of the registers.
  SlotPlace& place = *reinterpret_cast<SlotPlace*>(memory + a.at.place);
  if (thread_x() == 0) place.find(a);
  block_sync();
  if (attend_block<Storage, kBackward, true>(a, place, memory) || kBackward) return;
  block_sync();
  attend_block<Storage, false, false>(a, place, memory);
}

}  // namespace

VIDOPS_KERNEL(kSlotThreads, 1) slot_attend_forward_f32(SlotAttendArgs a) { slot_attend<FloatStorage, false>(a); }
VIDOPS_KERNEL(kSlotThreads, 1) slot_attend_forward_f16(SlotAttendArgs a) { slot_attend<HalfStorage, false>(a); }
VIDOPS_KERNEL(kSlotThreads, 1) slot_attend_forward_bf16(SlotAttendArgs a) { slot_attend<BfloatStorage, false>(a); }
VIDOPS_KERNEL(kSlotThreads, 1) slot_attend_backward_f32(SlotAttendArgs a) { slot_attend<FloatStorage, true>(a); }
VIDOPS_KERNEL(kSlotThreads, 1) slot_attend_backward_f16(SlotAttendArgs a) { slot_attend<HalfStorage, true>(a); }
VIDOPS_KERNEL(kSlotThreads, 1) slot_attend_backward_bf16(SlotAttendArgs a) { slot_attend<BfloatStorage, true>(a); }

struct SlotSumArgs {
  const float* num;  // [splits][num_count]
  const float* den;  // [splits][den_count]
  i64 num_count, den_count;
  int splits;
  float* num_out;
  float* den_out;
};

// Sums of the splits, in their order; one thread per element.
VIDOPS_KERNEL(kSumThreads) slot_attend_sum(SlotSumArgs a) {
  const i64 at = (i64)block_x() * kSumThreads + thread_x();
  const bool is_num = at < a.num_count;
  const i64 count = is_num ? a.num_count : a.den_count, place = is_num ? at : at - a.num_count;
  if (place >= count) return;
  const float* from = (is_num ? a.num : a.den) + place;
  float sum = 0;
  VIDOPS_UNROLL_BY(4)
  for (int s = 0; s < a.splits; ++s) sum += from[s * count];
  (is_num ? a.num_out : a.den_out)[place] = sum;
}

struct TokenStatisticsArgs {
  const void* x;
  i64 batch, row;  // strides in elements
  int n, channels;
  i64 rows;
  bool whole;  // rows can be read four channels at a time
  int lanes;   // of a warp that share a row, a power of two
  float eps;
  float* mean;
  float* rstd;
};

namespace {

// Lanes share a token, a.lanes of a warp each. The second pass, over the differences from the mean, finds the row in
// the cache.
template <class Storage>
VIDOPS_DEVICE void token_statistics(const TokenStatisticsArgs& a) {
  using Element = typename Storage::Element;
  const i64 at = ((i64)block_x() * kStatisticsThreads + thread_x()) / a.lanes;
  const i64 token = at < a.rows ? at : a.rows - 1;  // all lanes take part in the sums
  const int lane = lane_id() % a.lanes;
  const Element* x = static_cast<const Element*>(a.x) + token / a.n * a.batch + token % a.n * a.row;
  const auto total = [&](auto use) {
    float part[4] = {};
    if (a.whole) {
      VIDOPS_UNROLL_BY(4)
      for (int quad = lane; quad < a.channels / 4; quad += a.lanes) {
        const FloatQuad v = load_quad<Storage>(reinterpret_cast<const char*>(x), quad);
        VIDOPS_UNROLL
        for (int e = 0; e < 4; ++e) part[e] += use(v.v[e]);
      }
    } else {
      for (int c = lane; c < a.channels; c += a.lanes) part[0] += use(Storage::value(x[c]));
    }
    float sum = (part[0] + part[1]) + (part[2] + part[3]);
    for (int mask = a.lanes / 2; mask; mask /= 2) sum += shuffle_xor(sum, mask);
    return sum;
  };
  const float count = (float)a.channels;
  const float mean = total([](float v) { return v; }) / count;
  const float variance = total([&](float v) { return (v - mean) * (v - mean); }) / count;
  if (lane != 0 || at != token) return;
  a.mean[token] = mean;
  a.rstd[token] = 1.0f / square_root(variance + a.eps);
}

}  // namespace

VIDOPS_KERNEL(kStatisticsThreads) token_statistics_f32(TokenStatisticsArgs a) { token_statistics<FloatStorage>(a); }
VIDOPS_KERNEL(kStatisticsThreads) token_statistics_f16(TokenStatisticsArgs a) { token_statistics<HalfStorage>(a); }
VIDOPS_KERNEL(kStatisticsThreads) token_statistics_bf16(TokenStatisticsArgs a) { token_statistics<BfloatStorage>(a); }

}  // namespace vidops::cuda
