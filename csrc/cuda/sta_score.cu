// Semantic-aware temporal accumulation (arXiv 2308.04549).
//
// The softmax runs over the tokens of a group, so its denominators do not depend on which tokens the group before has
// lost: exponentials of all cosines of all pairs of groups, and their sums, are made in parallel. What is serial is
// left to one block per clip: a product of that matrix with what has accumulated, and a sort, per group.
#include "tokens.cuh"

namespace vidops::cuda {

constexpr int kSpreadThreads = 256;
constexpr int kSpreadRows = 32;     // tokens of the group before
constexpr int kSpreadColumns = 64;  // tokens of this one
constexpr int kSpreadDepth = 32;
constexpr int kSpreadPad = 4;
constexpr int kScanThreads = 1024;
constexpr int kScanRun = 8;  // terms that are added in float before they join the sum in double

struct StaScoreArgs {
  TokenRows x, metric;
  int items, frames, tokens, kept, even;
  bool reverse, first_frame_pruned;
  int match_blocks;  // of an item
  int pitch;         // of a row of `spread`: tokens, rounded up to four
  int slots;         // a power of two that holds `tokens`
  int teams;         // of the scan's threads, each with a part of the rows
  int first_item;    // of a launch of the spread and the scan, which share out the items by what `spread` holds
  float* unit;       // (items, frames, tokens, width)
  double* total;     // (items, frames, tokens)
  float* spread;     // (items of a launch, frames - 1, tokens, pitch)
  double* mass;      // (items of a launch, frames - 1, tokens): sums of its rows
  i64* keep;
  float* activation;
  float* acc;
  float* score;
  i64* first_order;
  float* first_similarity;
};

namespace {

// The group that is processed `step` after the first.
VIDOPS_DEVICE int group_at(const StaScoreArgs& a, int step) { return a.reverse ? a.frames - 1 - step : step; }

// One warp per token: its unit key, and the sum of its magnitudes.
template <class Storage>
VIDOPS_DEVICE void sta_look(const StaScoreArgs& a) {
  using Element = typename Storage::Element;
  const i64 row = (i64)block_x() * (kTokenThreads / kWarp) + warp_id();
  const i64 per_item = (i64)a.frames * a.tokens;
  if (row >= a.items * per_item) return;
  const i64 item = row / per_item, n = row % per_item;
  const Element* key = static_cast<const Element*>(a.metric.data) + item * a.metric.item + n * a.metric.row;
  unit_row<Storage>(key, a.metric.width, a.metric.whole, a.unit + row * a.metric.width);
  const Element* x = static_cast<const Element*>(a.x.data) + item * a.x.item + n * a.x.row;
  const double total = row_sum<Storage>(x, a.x.width, a.x.whole, [](float v) { return (double)magnitude(v); });
  if (lane_id() == 0) a.total[row] = total;
}

template <class Storage>
VIDOPS_DEVICE void sta_match(const StaScoreArgs& a) {
  VIDOPS_SHARED(memory);
  MatchArgs m{};
  m.metric = a.metric;
  m.first_row = group_at(a, 0) * a.tokens;
  m.tokens = a.tokens, m.even = a.even;
  m.unit = a.unit, m.unit_item = (i64)a.frames * a.tokens * a.metric.width;
  m.similarity = a.first_similarity;
  const int first = (int)(block_x() % (u32)a.match_blocks) * (kTokenThreads / kWarp);
  match_tokens<Storage>(m, first, (int)(block_x() / (u32)a.match_blocks), memory);
}

}  // namespace

VIDOPS_KERNEL(kTokenThreads) sta_look_f32(StaScoreArgs a) { sta_look<FloatStorage>(a); }
VIDOPS_KERNEL(kTokenThreads) sta_look_f16(StaScoreArgs a) { sta_look<HalfStorage>(a); }
VIDOPS_KERNEL(kTokenThreads) sta_look_bf16(StaScoreArgs a) { sta_look<BfloatStorage>(a); }
VIDOPS_KERNEL(kTokenThreads) sta_match_f32(StaScoreArgs a) { sta_match<FloatStorage>(a); }
VIDOPS_KERNEL(kTokenThreads) sta_match_f16(StaScoreArgs a) { sta_match<HalfStorage>(a); }
VIDOPS_KERNEL(kTokenThreads) sta_match_bf16(StaScoreArgs a) { sta_match<BfloatStorage>(a); }

// A block takes kSpreadRows tokens of the group before and all tokens of this one. A thread holds two rows and four
// columns of a tile; every element is one sum over the channels in order.
VIDOPS_KERNEL(kSpreadThreads) sta_spread(StaScoreArgs a) {
  VIDOPS_SHARED(memory);
  float* left = reinterpret_cast<float*>(memory);                       // (depth, rows)
  float* right = left + kSpreadDepth * (kSpreadRows + kSpreadPad);      // (depth, columns)
  double* sums = reinterpret_cast<double*>(right + kSpreadDepth * (kSpreadColumns + kSpreadPad));
  const int width = a.metric.width, row0 = (int)block_x() * kSpreadRows;
  const int pair = (int)block_y() % (a.frames - 1), local = (int)block_y() / (a.frames - 1);
  const i64 item = a.first_item + local;
  const float* before = a.unit + (item * a.frames + group_at(a, pair)) * a.tokens * width;
  const float* here = a.unit + (item * a.frames + group_at(a, pair + 1)) * a.tokens * width;
  float* out = a.spread + ((i64)local * (a.frames - 1) + pair) * a.tokens * a.pitch;
  const int me = thread_x(), across = me % 16, down = me / 16;
  double sum[2] = {};
  for (int column0 = 0; column0 < a.tokens; column0 += kSpreadColumns) {
    float tile[2][4] = {};
    for (int k0 = 0; k0 < width; k0 += kSpreadDepth) {
      block_sync();
      for (int e = me; e < kSpreadRows * kSpreadDepth; e += kSpreadThreads) {
        const int r = e / kSpreadDepth, k = e % kSpreadDepth;
        const bool there = row0 + r < a.tokens && k0 + k < width;
        left[k * (kSpreadRows + kSpreadPad) + r] = there ? before[(i64)(row0 + r) * width + k0 + k] : 0.0f;
      }
      for (int e = me; e < kSpreadColumns * kSpreadDepth; e += kSpreadThreads) {
        const int c = e / kSpreadDepth, k = e % kSpreadDepth;
        const bool there = column0 + c < a.tokens && k0 + k < width;
        right[k * (kSpreadColumns + kSpreadPad) + c] = there ? here[(i64)(column0 + c) * width + k0 + k] : 0.0f;
      }
      block_sync();
      VIDOPS_UNROLL_BY(8)
      for (int k = 0; k < kSpreadDepth; ++k) {
        const float* l = left + k * (kSpreadRows + kSpreadPad) + 2 * down;
        const FloatQuad r = load_floats(right + k * (kSpreadColumns + kSpreadPad) + 4 * across);
        VIDOPS_UNROLL
        for (int i = 0; i < 2; ++i)
          VIDOPS_UNROLL
          for (int j = 0; j < 4; ++j) tile[i][j] = multiply_add(l[i], r.v[j], tile[i][j]);
      }
    }
    VIDOPS_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int row = row0 + 2 * down + i;
      VIDOPS_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int column = column0 + 4 * across + j;
        if (row >= a.tokens || column >= a.tokens) continue;
        const float mass = exponential(tile[i][j]);  // cosines: no maximum need be taken off
        out[(i64)row * a.pitch + column] = mass;
        sum[i] += mass;
      }
    }
  }
  sums[(2 * down) * 16 + across] = sum[0];
  sums[(2 * down + 1) * 16 + across] = sum[1];
  block_sync();
  if (me < kSpreadRows && row0 + me < a.tokens) {
    double total = 0;
    for (int part = 0; part < 16; ++part) total += sums[me * 16 + part];
    a.mass[((i64)local * (a.frames - 1) + pair) * a.tokens + row0 + me] = total;
  }
}

namespace {

// The block's sum in a fixed order, the same in every thread; `scratch` holds a number per warp.
VIDOPS_DEVICE double scan_sum(double v, double* scratch) {
  v = warp_sum(v);
  block_sync();
  if (lane_id() == 0) scratch[warp_id()] = v;
  block_sync();
  double total = 0;
  for (int w = 0; w < kScanThreads / kWarp; ++w) total += scratch[w];
  return total;
}

// Eq. 4 of one group: totals, from 0 to 1 over its tokens. NaN spreads, as in a minimum of torch.
VIDOPS_DEVICE void activate(const double* total, int tokens, double* scratch, float* activation) {
  const int me = thread_x();
  double low = total[0], high = total[0];
  for (int n = me; n < tokens; n += kScanThreads) {
    const double v = total[n];
    low = v < low || v != v ? v : low;
    high = v > high || v != v ? v : high;
  }
  VIDOPS_UNROLL
  for (int mask = kWarp / 2; mask; mask >>= 1) {
    const double l = shuffle_xor(low, mask), h = shuffle_xor(high, mask);
    low = l < low || l != l ? l : low;
    high = h > high || h != h ? h : high;
  }
  block_sync();
  if (lane_id() == 0) scratch[2 * warp_id()] = low, scratch[2 * warp_id() + 1] = high;
  block_sync();
  for (int w = 0; w < kScanThreads / kWarp; ++w) {
    const double l = scratch[2 * w], h = scratch[2 * w + 1];
    low = l < low || l != l ? l : low;
    high = h > high || h != h ? h : high;
  }
  const double spread = high - low;
  for (int n = me; n < tokens; n += kScanThreads)
    activation[n] = spread == 0 ? 0.0f : (float)((total[n] - low) / spread);
  block_sync();
}

}  // namespace

// One block per clip. Shared: keys (slots), the sums of all teams (tokens) in double, what each kept token of the group
// before has accumulated, and which it is.
VIDOPS_KERNEL(kScanThreads, 1) sta_scan(StaScoreArgs a) {
  VIDOPS_SHARED(memory);
  u64* key = reinterpret_cast<u64*>(memory);
  double* scratch = reinterpret_cast<double*>(key + a.slots);
  double* sum = scratch + 2 * (kScanThreads / kWarp);  // (teams, tokens)
  float* weight = reinterpret_cast<float*>(sum + (i64)a.teams * a.tokens);
  int* refer = reinterpret_cast<int*>(weight + a.tokens);
  const int me = thread_x(), local = (int)block_x(), odd = a.tokens / 2;
  const i64 item = a.first_item + local;
  const auto at = [&](int group) { return (item * a.frames + group) * a.tokens; };

  // The first group: even tokens that are most like an odd one go first.
  int group = group_at(a, 0);
  activate(a.total + at(group), a.tokens, scratch, a.activation + at(group));
  for (int n = me; n < a.tokens; n += kScanThreads) a.acc[at(group) + n] = 0, a.score[at(group) + n] = 0;
  const int even_slots = a.slots > 1 ? a.slots / 2 : 1;
  for (int i = me; i < even_slots; i += kScanThreads)
    key[i] = i < a.even ? sorting_key(a.first_similarity[item * a.even + i], i) : ~u64{0};
  block_sort(key, even_slots);
  int referred = a.first_frame_pruned ? a.kept : a.tokens;
  for (int n = me; n < a.tokens; n += kScanThreads) {
    const int token = n < odd ? 2 * n + 1 : 2 * (int)(u32)key[n - odd];
    a.first_order[item * a.tokens + n] = token;
    if (n < a.kept) a.keep[(item * a.frames + group) * a.kept + n] = token;
    refer[n] = token;
    weight[n] = a.first_frame_pruned ? 1.0f / (float)a.kept : 1.0f;
  }

  const int team_threads = kScanThreads / a.teams, team = me / team_threads, rank = me % team_threads;
  for (int step = 1; step < a.frames; ++step) {
    group = group_at(a, step);
    const i64 pair = (i64)local * (a.frames - 1) + step - 1;
    const float* spread = a.spread + pair * a.tokens * a.pitch;
    const double* mass = a.mass + pair * a.tokens;
    activate(a.total + at(group), a.tokens, scratch, a.activation + at(group));  // a barrier for what is above, too
    for (int k = me; k < referred; k += kScanThreads) weight[k] = (float)((double)weight[k] / mass[refer[k]]);
    block_sync();
    // Each team takes a run of the kept tokens, each of its threads some tokens of this group.
    const int run = (referred + a.teams - 1) / a.teams, limit = (team + 1) * run;
    const int end = limit < referred ? limit : referred;
    if (team < a.teams)
      for (int n = rank; n < a.tokens; n += team_threads) {
        double total = 0;
        for (int k = team * run; k < end; k += kScanRun) {
          float part = 0;
          VIDOPS_UNROLL
          for (int u = 0; u < kScanRun; ++u)
            if (k + u < end) part = multiply_add(weight[k + u], spread[(i64)refer[k + u] * a.pitch + n], part);
          total += part;
        }
        sum[team * a.tokens + n] = total;
      }
    block_sync();
    for (int n = me; n < a.slots; n += kScanThreads) {
      key[n] = ~u64{0};
      if (n >= a.tokens) continue;
      double total = sum[n];
      for (int t = 1; t < a.teams; ++t) total += sum[t * a.tokens + n];
      sum[n] = total;
      const float acc = (float)total, score = acc * (1 - a.activation[at(group) + n]);
      a.acc[at(group) + n] = acc;
      a.score[at(group) + n] = score;
      key[n] = sorting_key(score, n);
    }
    block_sort(key, a.slots);
    double carried = 0;
    for (int k = me; k < a.kept; k += kScanThreads) {
      const int token = (int)(u32)key[k];
      a.keep[(item * a.frames + group) * a.kept + k] = token;
      refer[k] = token;
      carried += sum[token];
    }
    carried = scan_sum(carried, scratch);
    for (int k = me; k < a.kept; k += kScanThreads) weight[k] = (float)(sum[(int)(u32)key[k]] / carried);
    referred = a.kept;
  }
}

}  // namespace vidops::cuda
