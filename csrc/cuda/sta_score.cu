// Semantic-aware temporal accumulation (arXiv 2308.04549).
//
// The softmax runs over the tokens of a group, so its denominators do not depend on which tokens the group before has
// lost: exponentials of all cosines of all pairs of groups, and their sums, are made in parallel, tile by tile, in one
// launch with the matching of the first group and with the activations. What is serial is left to a cluster per clip:
// a product of that matrix with what has accumulated, and an order, per group. Each of its blocks takes some tokens of
// the group, and reads from the others what theirs have accumulated.
#include "tokens.cuh"

namespace vidops::cuda {

constexpr int kTileThreads = 128;
constexpr int kTileRows = 32;
constexpr int kTileColumns = 64;
constexpr int kTilePieces = 16;              // of 16 bytes, that are held of a row at a time
constexpr int kTilePitch = kTilePieces + 1;  // so that neighbouring rows lie in different banks
constexpr int kScanThreads = 512;
constexpr int kScanRun = 8;  // terms that are added in T before they join the sum in double

// T is the type of the figures: double for double tokens, else float.
template <class T>
struct StaScoreArgs {
  TokenRows x, metric;
  int items, frames, tokens, kept, even;
  bool reverse, first_frame_pruned;
  int first_item, here;           // of a launch: items are shared out by what `spread` holds
  int depth;                      // of a unit key: its channels and zeros, in whole pieces of 16 bytes
  int pitch;                      // of a row of `spread`: tokens, rounded up to eight
  int row_tiles, column_tiles;    // of a pair of groups
  int match_rows, match_columns;  // tiles of the matching
  int ranks;                      // blocks of a cluster
  int share;                      // of each, in pieces of 16 bytes of a row of `spread`
  int teams;                      // parts of the rows that are added up alone
  int held;                       // copies of its share of `spread` that a block keeps, of a pair each; 0: it reads
  T* unit;                        // (items, frames, tokens, depth)
  double* exact;                  // (items, tokens, depth): unit keys of the first group
  i64 exact_item;
  double* total;  // (items, frames, tokens)
  T* spread;      // (items of a launch, frames - 1, tokens, pitch)
  double* part;   // (items of a launch, frames - 1, column tiles, tokens): sums of its rows over a tile
  double* mass;   // (items of a launch, frames - 1, tokens): and over all of them
  T* best;        // (items of a launch, column tiles of the matching, even)
  i64* keep;
  T* activation;
  T* acc;
  T* score;
  i64* first_order;
  T* first_similarity;
};

namespace {

// The group that is processed `step` after the first.
template <class T>
VIDOPS_DEVICE int group_at(const StaScoreArgs<T>& a, int step) {
  return a.reverse ? a.frames - 1 - step : step;
}

// One warp: x / |x| in double, zeros for zeros, NaN where an element is not finite. Equal rows stay equal.
template <class Storage>
VIDOPS_DEVICE void exact_unit_row(const typename Storage::Element* x, int width, int depth, double* unit) {
  double most = 0;
  for (int c = lane_id(); c < width; c += kWarp) {
    most = larger((double)magnitude(Storage::value(x[c])), most);
  }
  VIDOPS_UNROLL
  for (int mask = kWarp / 2; mask; mask >>= 1) most = larger(most, shuffle_xor(most, mask));
  double squares = 0;
  for (int c = lane_id(); c < width; c += kWarp) {
    const double v = Storage::value(x[c]) / most;  // no square over- or underflows
    squares += v * v;
  }
  const double norm = square_root(warp_sum(squares));
  for (int c = lane_id(); c < depth; c += kWarp) {
    const double v = c < width ? (double)Storage::value(x[c]) / most / norm : 0.0;
    unit[c] = c >= width || most == 0 ? 0.0 : most - most == 0 ? v : (double)bits_float(0x7fc00000u);
  }
}

// One warp per token: its unit key, and the sum of its magnitudes.
template <class Storage, class T>
VIDOPS_DEVICE void sta_look(const StaScoreArgs<T>& a) {
  using Element = typename Storage::Element;
  const int row = (int)block_x() * (kTokenThreads / kWarp) + warp_id(), per_item = a.frames * a.tokens;
  if (row >= a.items * per_item) return;
  const int item = row / per_item, n = row % per_item;
  const Element* x = static_cast<const Element*>(a.x.data) + item * a.x.item + n * a.x.row;
  const double total = row_sum<Storage>(x, a.x.width, a.x.whole, [](auto v) { return (double)magnitude(v); });
  if (lane_id() == 0) a.total[row] = total;
  const Element* key = static_cast<const Element*>(a.metric.data) + item * a.metric.item + n * a.metric.row;
  T* unit = a.unit + (i64)row * a.depth;
  if constexpr (sizeof(T) == sizeof(double)) {
    exact_unit_row<Storage>(key, a.metric.width, a.depth, unit);
  } else {
    unit_row<Storage>(key, a.metric.width, a.metric.whole, unit);
    for (int c = a.metric.width + lane_id(); c < a.depth; c += kWarp) unit[c] = 0;
    const int first = n - group_at(a, 0) * a.tokens;
    if (first >= 0 && first < a.tokens)
      exact_unit_row<Storage>(key, a.metric.width, a.depth, a.exact + item * a.exact_item + (i64)first * a.depth);
  }
}

}  // namespace

VIDOPS_KERNEL(kTokenThreads) sta_look_f32(StaScoreArgs<float> a) { sta_look<FloatStorage>(a); }
VIDOPS_KERNEL(kTokenThreads) sta_look_f16(StaScoreArgs<float> a) { sta_look<HalfStorage>(a); }
VIDOPS_KERNEL(kTokenThreads) sta_look_bf16(StaScoreArgs<float> a) { sta_look<BfloatStorage>(a); }
VIDOPS_KERNEL(kTokenThreads) sta_look_f64(StaScoreArgs<double> a) { sta_look<DoubleStorage>(a); }

namespace {

template <class T>
struct alignas(16) Piece {
  T v[16 / sizeof(T)];
};

// Products of a tile of rows, of which there are `rows` and `columns`, `left_row` and `right_row` apart. A thread has
// rows me / 16 + 8 i and columns me % 16 + 16 j; every element is one sum over the channels in order.
template <class T>
VIDOPS_DEVICE void tile_products(const T* left, int rows, i64 left_row, const T* right, int columns, i64 right_row,
                                 int depth, char* memory, T (&tile)[4][4]) {
  constexpr int kPer = 16 / sizeof(T), kStep = kTileThreads / kTilePieces;
  Piece<T>* held = reinterpret_cast<Piece<T>*>(memory);
  const int me = thread_x(), across = me % 16, down = me / 16, pieces = depth / kPer;
  VIDOPS_UNROLL
  for (int i = 0; i < 4; ++i)
    VIDOPS_UNROLL
    for (int j = 0; j < 4; ++j) tile[i][j] = 0;
  for (int first = 0; first < pieces; first += kTilePieces) {
    block_sync();
    const int piece = first + me % kTilePieces;
    VIDOPS_UNROLL
    for (int u = 0; u < (kTileRows + kTileColumns) / kStep; ++u) {
      const bool of_left = u < kTileRows / kStep;
      const int at = me / kTilePieces + u * kStep, row = of_left ? at : at - kTileRows;
      const bool there = piece < pieces && row < (of_left ? rows : columns);
      const T* from = of_left ? left + row * left_row : right + row * right_row;
      copy_async(held + at * kTilePitch + me % kTilePieces, there ? from + piece * kPer : left, there);
    }
    copy_commit();
    copy_wait<0>();
    block_sync();
    const int count = pieces - first < kTilePieces ? pieces - first : kTilePieces;
    VIDOPS_NO_UNROLL
    for (int p = 0; p < count; ++p) {
      Piece<T> l[4], r[4];
      VIDOPS_UNROLL
      for (int i = 0; i < 4; ++i) {
        l[i] = held[(down + 8 * i) * kTilePitch + p];
        r[i] = held[(kTileRows + across + 16 * i) * kTilePitch + p];
      }
      VIDOPS_UNROLL
      for (int k = 0; k < kPer; ++k)
        VIDOPS_UNROLL
        for (int i = 0; i < 4; ++i)
          VIDOPS_UNROLL
          for (int j = 0; j < 4; ++j) tile[i][j] = multiply_add(l[i].v[k], r[j].v[k], tile[i][j]);
    }
  }
}

// Exponentials of the cosines of some tokens of a group with some of the next, and their sums.
template <class T>
VIDOPS_DEVICE void spread_tile(const StaScoreArgs<T>& a, int block, char* memory) {
  const int tiles = a.row_tiles * a.column_tiles, pairs = a.frames - 1, pair = block / tiles;
  const int row0 = block % tiles / a.column_tiles * kTileRows, tile_column = block % a.column_tiles;
  const int column0 = tile_column * kTileColumns, across = thread_x() % 16, down = thread_x() / 16;
  const i64 groups = (i64)(a.first_item + pair / pairs) * a.frames;
  const T* before = a.unit + ((groups + group_at(a, pair % pairs)) * a.tokens + row0) * a.depth;
  const T* here = a.unit + ((groups + group_at(a, pair % pairs + 1)) * a.tokens + column0) * a.depth;
  T tile[4][4];
  tile_products(before, a.tokens - row0, a.depth, here, a.tokens - column0, a.depth, a.depth, memory, tile);
  VIDOPS_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int row = row0 + down + 8 * i;
    T* out = a.spread + ((i64)pair * a.tokens + row) * a.pitch;
    double sum = 0;
    VIDOPS_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int column = column0 + across + 16 * j;
      const T mass = column < a.tokens ? exponential(tile[i][j]) : 0;  // cosines: no maximum need be taken off
      if (row < a.tokens && column < a.pitch) out[column] = mass;
      sum += mass;
    }
    VIDOPS_UNROLL
    for (int mask = 8; mask; mask >>= 1) sum += shuffle_xor(sum, mask);
    if (across == 0 && row < a.tokens) a.part[((i64)pair * a.column_tiles + tile_column) * a.tokens + row] = sum;
  }
}

// The best of some odd tokens for some even ones, from unit keys in double: cosines are rounded once, so that tokens
// which have an equal one among the odd ones tie.
template <class T>
VIDOPS_DEVICE void match_tile(const StaScoreArgs<T>& a, int block, char* memory) {
  const int tiles = a.match_rows * a.match_columns, local = block / tiles, odd = a.tokens / 2;
  const int row0 = block % tiles / a.match_columns * kTileRows, tile_column = block % a.match_columns;
  const int column0 = tile_column * kTileColumns, across = thread_x() % 16, down = thread_x() / 16;
  const double* exact = a.exact + (a.first_item + local) * a.exact_item;
  double tile[4][4];
  tile_products(exact + (i64)2 * row0 * a.depth, a.even - row0, (i64)2 * a.depth,
                exact + (i64)(2 * column0 + 1) * a.depth, odd - column0, (i64)2 * a.depth, a.depth, memory, tile);
  VIDOPS_UNROLL
  for (int i = 0; i < 4; ++i) {
    T best = -VIDOPS_INFINITY;
    VIDOPS_UNROLL
    for (int j = 0; j < 4; ++j)
      if (column0 + across + 16 * j < odd) best = larger(best, (T)tile[i][j]);
    VIDOPS_UNROLL
    for (int mask = 8; mask; mask >>= 1) best = larger(best, shuffle_xor(best, mask));
    const int row = row0 + down + 8 * i;
    if (across == 0 && row < a.even) a.best[((i64)local * a.match_columns + tile_column) * a.even + row] = best;
  }
}

// Eq. 4 of one group: totals, from 0 to 1 over its tokens. NaN spreads, as in a minimum of torch.
template <class T>
VIDOPS_DEVICE void activate(const StaScoreArgs<T>& a, int block, char* memory) {
  double* scratch = reinterpret_cast<double*>(memory);
  const i64 base = ((i64)a.first_item * a.frames + block) * a.tokens;
  const double* total = a.total + base;
  const int me = thread_x();
  double low = -total[0], high = total[0];  // the smallest, negated
  for (int n = me; n < a.tokens; n += kTileThreads) {
    const double v = total[n];
    low = larger(-v, low), high = larger(v, high);
  }
  VIDOPS_UNROLL
  for (int mask = kWarp / 2; mask; mask >>= 1) {
    low = larger(shuffle_xor(low, mask), low);
    high = larger(shuffle_xor(high, mask), high);
  }
  if (lane_id() == 0) scratch[2 * warp_id()] = low, scratch[2 * warp_id() + 1] = high;
  block_sync();
  for (int w = 0; w < kTileThreads / kWarp; ++w) {
    low = larger(scratch[2 * w], low);
    high = larger(scratch[2 * w + 1], high);
  }
  const double spread = high + low;
  for (int n = me; n < a.tokens; n += kTileThreads)
    a.activation[base + n] = spread == 0 ? T(0) : (T)((total[n] + low) / spread);
}

template <class T>
VIDOPS_DEVICE void sta_spread(const StaScoreArgs<T>& a) {
  VIDOPS_SHARED(memory);
  const int matches = a.here * a.match_rows * a.match_columns;
  const int spreads = a.here * (a.frames - 1) * a.row_tiles * a.column_tiles;
  const int block = (int)block_x();
  if (block < matches)
    match_tile(a, block, memory);
  else if (block < matches + spreads)
    spread_tile(a, block - matches, memory);
  else
    activate(a, block - matches - spreads, memory);
}

}  // namespace

VIDOPS_KERNEL(kTileThreads, 5) sta_spread_f32(StaScoreArgs<float> a) { sta_spread(a); }
VIDOPS_KERNEL(kTileThreads, 3) sta_spread_f64(StaScoreArgs<double> a) { sta_spread(a); }

namespace {

template <class T>
struct SortingBits {
  using Type = decltype(sorting_bits(T(0)));
};

// The places of numbers in ascending order, equal ones by index; NaN last. All in shared memory.
template <class T>
struct Ranking {
  using Bits = typename SortingBits<T>::Type;
  static constexpr int kPer = 16 / sizeof(T);
  // So many numbers find their places by counting, more by a sort, whose keys have no room for the bits of a double.
  // A constant, since the launcher needs it as well and may call nothing that runs on the device.
  static constexpr int kMostCounted = sizeof(T) == sizeof(float) ? 320 : 0x7fffffff;
  char* numbers;
  u32* place;

  VIDOPS_DEVICE void offer(int n, T v, int count) const {
    place[n] = 0;
    const Bits bits = sorting_bits(v), most = ~Bits{0} - 1;  // one more must not overflow
    if (count > kMostCounted)
      reinterpret_cast<u64*>(numbers)[n] = (u64)bits << 32 | (u32)n;
    else
      reinterpret_cast<Bits*>(numbers)[n] = bits < most ? bits : most;
  }

  // All threads, after all numbers were offered.
  VIDOPS_DEVICE void settle(int count) const { count > kMostCounted ? sort(count) : rank(count); }

  VIDOPS_DEVICE void sort(int count) const {
    u64* key = reinterpret_cast<u64*>(numbers);
    int slots = 1;
    while (slots < count) slots *= 2;
    for (int n = count + thread_x(); n < slots; n += kScanThreads) key[n] = ~u64{0};
    block_sort(key, slots);
    for (int k = thread_x(); k < count; k += kScanThreads) place[(u32)key[k]] = (u32)k;
    block_sync();
  }

  // As many threads as there are for a number count the numbers before it, each in a part of them.
  VIDOPS_DEVICE void rank(int count) const {
    const Bits* bits = reinterpret_cast<const Bits*>(numbers);
    const Piece<Bits>* piece = reinterpret_cast<const Piece<Bits>*>(numbers);
    const int pieces = (count + kPer - 1) / kPer, parts = count < kScanThreads ? kScanThreads / count : 1;
    const int run = (pieces + parts - 1) / parts;
    if (const int n = count + thread_x(); n < pieces * kPer) reinterpret_cast<Bits*>(numbers)[n] = ~Bits{0};
    block_sync();
    const int part = parts > 1 ? thread_x() / count : 0, apart = parts > 1 ? count : kScanThreads;
    const int limit = (part + 1) * run, end = limit < pieces ? limit : pieces;
    VIDOPS_NO_UNROLL
    for (int i = thread_x() - part * count; i < count && part < parts; i += apart) {
      const int own = i / kPer;
      const Bits mine = bits[i];
      u32 found[2] = {};
      VIDOPS_UNROLL_BY(4)
      for (int p = part * run; p < end; ++p) {
        const Piece<Bits> others = piece[p];
        const Bits least = p < own ? mine + 1 : mine;  // of equal ones, those that come first
        VIDOPS_UNROLL
        for (int u = 0; u < kPer; ++u) found[u % 2] = count_if_less(found[u % 2], others.v[u], least);
      }
      u32 before = found[0] + found[1];
      if (part == 0) {
        const Piece<Bits> near = piece[own];
        VIDOPS_UNROLL
        for (int u = 0; u < kPer; ++u) before += own * kPer + u < i && near.v[u] == mine;
      }
      atomic_add_shared(place + i, before);
    }
    block_sync();
  }
};

// A cluster per clip. Shared: the block's columns of `spread` of this pair and of the next, which arrive while an order
// is found, if they fit; sums of all teams in double; what each token has accumulated (twice in a cluster, so that a
// block may go on while others read); places; and what tokens of the group before weigh, and which they are. Before
// these two are known, their memory serves the ranking.
template <class T>
VIDOPS_DEVICE void sta_scan(const StaScoreArgs<T>& a) {
  constexpr int kPer = 16 / sizeof(T), kWarps = kScanThreads / kWarp;
  VIDOPS_SHARED(memory);
  const int width = a.share * kPer, me = thread_x(), rank = cluster_rank(), pairs = a.frames - 1;
  double* scratch = reinterpret_cast<double*>(memory);
  Piece<T>* held = reinterpret_cast<Piece<T>*>(scratch + kWarps);                    // (copies, tokens, share)
  double* sum = reinterpret_cast<double*>(held + (i64)a.held * a.tokens * a.share);  // (teams, width)
  T* accumulated = reinterpret_cast<T*>(sum + a.teams * width);
  u32* place = reinterpret_cast<u32*>(accumulated + (a.ranks > 1 ? 2 : 1) * a.pitch);
  T* weight = reinterpret_cast<T*>(place + a.pitch);
  int* refer = reinterpret_cast<int*>(weight + a.pitch);
  const Ranking<T> ranking{reinterpret_cast<char*>(weight), place};
  const int local = (int)block_x() / a.ranks, odd = a.tokens / 2;
  const i64 item = a.first_item + local;
  const auto at = [&](int group) { return (item * a.frames + group) * a.tokens; };
  const auto sync = [&] { a.ranks > 1 ? cluster_sync() : block_sync(); };

  const auto rows_of = [&](int pair) { return a.spread + ((i64)local * pairs + pair) * a.tokens * a.pitch; };
  // What is held is narrower than the block is wide. Pieces beyond the row are zeros.
  const auto fetch = [&](int pair) {
    const int piece = rank * a.share + me % a.share, apart = kScanThreads / a.share;
    const Piece<T>* from = reinterpret_cast<const Piece<T>*>(rows_of(pair)) + piece;
    Piece<T>* to = held + pair % 2 * a.tokens * a.share + me % a.share;
    for (int n = me / a.share; n < a.tokens && me < apart * a.share; n += apart)
      copy_async(to + n * a.share, from + (i64)n * (a.pitch / kPer), piece * kPer < a.pitch);
    copy_commit();
  };
  if (a.held) fetch(0);

  double* mass = a.mass + (i64)local * pairs * a.tokens;
  for (int e = rank * kScanThreads + me; e < pairs * a.tokens; e += a.ranks * kScanThreads) {
    const double* part = a.part + ((i64)local * pairs + e / a.tokens) * a.column_tiles * a.tokens + e % a.tokens;
    double total = 0;
    VIDOPS_UNROLL_BY(4)
    for (int t = 0; t < a.column_tiles; ++t) total += part[(i64)t * a.tokens];
    mass[e] = total;
  }
  sync();

  // The first group: even tokens that are most like an odd one go first.
  int group = group_at(a, 0);
  if (rank == 0 || a.first_frame_pruned) {
    const T* best = a.best + (i64)local * a.match_columns * a.even;
    VIDOPS_NO_UNROLL
    for (int i = me; i < a.even; i += kScanThreads) {
      T similarity = -VIDOPS_INFINITY;
      VIDOPS_UNROLL_BY(4)
      for (int t = 0; t < a.match_columns; ++t) similarity = larger(similarity, best[(i64)t * a.even + i]);
      if (rank == 0) a.first_similarity[item * a.even + i] = similarity;
      ranking.offer(i, similarity, a.even);
    }
    ranking.settle(a.even);
  }
  VIDOPS_NO_UNROLL
  for (int n = me; n < a.tokens; n += kScanThreads) {
    if (rank == 0) a.acc[at(group) + n] = 0, a.score[at(group) + n] = 0;
    int position = n;  // those that are all referred to are so in any order
    if (rank == 0 || a.first_frame_pruned) position = n % 2 ? n / 2 : odd + (int)place[n / 2];
    if (rank == 0) {
      a.first_order[item * a.tokens + position] = n;
      if (position < a.kept) a.keep[(item * a.frames + group) * a.kept + position] = n;
    }
    if (!a.first_frame_pruned) position = n;
    if (pairs && (!a.first_frame_pruned || position < a.kept))
      refer[position] = n, weight[position] = (T)(1 / mass[n]);
  }
  copy_wait<0>();
  block_sync();

  int referred = a.first_frame_pruned ? a.kept : a.tokens;
  for (int step = 1; step < a.frames; ++step) {
    group = group_at(a, step);
    const bool last = step == pairs;
    const Piece<T>* rows = a.held ? held + (step - 1) % 2 * a.tokens * a.share
                                  : reinterpret_cast<const Piece<T>*>(rows_of(step - 1)) + rank * a.share;
    const int row_pieces = a.held ? a.share : a.pitch / kPer;
    const double* next_mass = mass + (i64)step * a.tokens;
    // What a thread needs for its first token is on its way while rows are added up.
    const T early = me < a.tokens ? a.activation[at(group) + me] : T(0);
    const double early_mass = me < a.tokens && !last ? next_mass[me] : 1.0;
    VIDOPS_NO_UNROLL
    for (int e = me; e < a.teams * a.share; e += kScanThreads) {
      const int team = e / a.share, own = e % a.share;
      double total[kPer] = {};
      if ((rank * a.share + own) * kPer < a.pitch)
        for (int k = team; k < referred; k += kScanRun * a.teams) {
          Piece<T> row[kScanRun];
          T by[kScanRun];
          VIDOPS_UNROLL
          for (int u = 0; u < kScanRun; ++u) {
            const bool there = k + u * a.teams < referred;
            const int from = there ? k + u * a.teams : k;
            by[u] = there ? weight[from] : T(0);
            row[u] = rows[(i64)refer[from] * row_pieces + own];
          }
          VIDOPS_UNROLL
          for (int c = 0; c < kPer; ++c) {
            T part = 0;
            VIDOPS_UNROLL
            for (int u = 0; u < kScanRun; ++u) part = multiply_add(by[u], row[u].v[c], part);
            total[c] += part;
          }
        }
      VIDOPS_UNROLL
      for (int c = 0; c < kPer; ++c) sum[team * width + own * kPer + c] = total[c];
    }
    block_sync();

    double carried = a.first_frame_pruned ? a.kept : 1;
    if (step > 1) {
      carried = 0;
      VIDOPS_UNROLL
      for (int w = 0; w < kWarps; ++w) carried += scratch[w];
    }
    const double scale = 1 / carried;
    T* acc = accumulated + (a.ranks > 1 ? step % 2 * a.pitch : 0);
    VIDOPS_NO_UNROLL
    for (int c = me; c < width && rank * width + c < a.tokens; c += kScanThreads) {
      double part[4] = {};
      for (int t = 0; t < a.teams; t += 4)
        VIDOPS_UNROLL
        for (int u = 0; u < 4; ++u)
          if (t + u < a.teams) part[u] += sum[(t + u) * width + c];
      acc[rank * width + c] = (T)((part[0] + part[1] + (part[2] + part[3])) * scale);
    }
    sync();
    VIDOPS_NO_UNROLL
    for (int n = me; n < a.tokens; n += kScanThreads) {
      const int owner = n / width;
      const T value = owner == rank ? acc[n] : *cluster_peer(acc + n, owner);
      const T score = value * (1 - (n == me ? early : a.activation[at(group) + n]));
      // To global memory only here: a cluster's barrier waits for what was written before it.
      if (owner == rank)
        a.acc[at(group) + n] = value, a.score[at(group) + n] = score;
      else
        acc[n] = value;
      ranking.offer(n, score, a.tokens);
    }
    if (a.held && !last) fetch(step);
    ranking.settle(a.tokens);

    double stays = 0;
    VIDOPS_NO_UNROLL
    for (int n = me; n < a.tokens; n += kScanThreads) {
      const int k = (int)place[n];
      if (k >= a.kept) continue;
      if (rank == 0) a.keep[(item * a.frames + group) * a.kept + k] = n;
      if (last) continue;
      stays += acc[n];
      refer[k] = n, weight[k] = (T)(acc[n] / (n == me ? early_mass : next_mass[n]));
    }
    stays = warp_sum(stays);
    if (lane_id() == 0) scratch[warp_id()] = stays;
    copy_wait<0>();
    block_sync();
    referred = a.kept;
  }
  sync();  // others may still read what this block has
}

}  // namespace

VIDOPS_KERNEL(kScanThreads, 1) sta_scan_f32(StaScoreArgs<float> a) { sta_scan(a); }
VIDOPS_KERNEL(kScanThreads, 1) sta_scan_f64(StaScoreArgs<double> a) { sta_scan(a); }

}  // namespace vidops::cuda
