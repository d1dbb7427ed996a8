// One frame of label propagation (sheet 5 of arXiv 2308.09951): the k best context positions of every query, their
// softmax, and the mean of their labels.
//
// A block owns a patch of queries and, in the order of their indices, a share of the tiles of context positions that
// these need: all positions of an unrestricted frame, and of another one the window around the patch. Per tile the
// affinities of all pairs go to shared memory, where a warp per query offers what beats its k-th best to a sorted
// list. The lists of the shares are merged by a second kernel, which also makes weights and labels. Indices come in
// ascending order, so an equal affinity is never better, and no result depends on how the work is cut.
//
// An affinity is added in an order that the number of channels alone decides. Tensor cores multiply; float32 values
// are split into two TF32 numbers, whose sum is not finite where they meet infinities or overflow: such affinities,
// and no others, come from the ordinary units. float64 is multiplied there as well.
#include "device.cuh"

namespace vidops::cuda {

constexpr int kScanThreads = 256;
constexpr int kScanWarps = kScanThreads / kWarp;
constexpr int kMergeThreads = 128;
constexpr int kPatchQueries = 64;  // at most
constexpr int kChunkBytes = 128;   // of a row of features in a stage
constexpr int kPieces = kChunkBytes / 16;
constexpr int kBlockBytes = 32;    // of a row, which one step of the tensor cores takes
constexpr int kScorePad = 8;       // eight rows of a tile of affinities begin in different banks
constexpr int kMaxMatches = 128;
constexpr int kListSlots = kMaxMatches / kWarp;

struct LabelPropagationArgs {
  const void* query;
  const void* context;
  const void* labels;
  i64 query_row, context_frame, context_row, labels_frame, labels_row;  // strides in elements
  int channels, frames, tokens, height, width, labels_count;
  int k;
  i64 limit;  // squared distances from here on are outside of the radius,
  int reach;  // and so is what is more rows or columns away than this
  int unrestricted;
  int repeats;  // at most k
  double temperature;
  bool whole;  // rows of features can be copied in aligned pieces of 16 bytes
  int patch_height, patch_width, patches_across, patches;
  int splits;
  int scores, tiles, lists;  // offsets into shared memory
  void* found_value;  // (splits,N,k): affinities, -infinity where there is none
  int* found_index;
  void* out;
  i64* index;
  void* weight;
};

namespace {

struct alignas(8) Words2 {
  u32 v[2];
};

// --- features -----------------------------------------------------------------------------------------------------
// kPositions: of a tile. An operand is what a lane holds of a matrix.
struct FloatFeatures {
  using Element = float;
  using Real = float;
  static constexpr int kPositions = 128, kStages = 2;
  static constexpr bool kTensor = true, kExactWhereInfinite = true;

  template <int kWords>
  struct Operand {
    u32 high[kWords], low[kWords];
    // To nearest: the product of two low parts, which is left out, is below 2^-22 of the whole.
    VIDOPS_DEVICE void set(int i, u32 word) {
      high[i] = (word + 0x1000u) & 0xffffe000u;
      low[i] = float_bits(bits_float(word) - bits_float(high[i]));
    }
  };
  static VIDOPS_DEVICE void multiply(float (&c)[4], const Operand<4>& a, const Operand<2>& b) {
    mma_tf32(c, a.low, b.high);
    mma_tf32(c, a.high, b.low);
    mma_tf32(c, a.high, b.high);
  }
};

template <class Format>
struct SixteenBitFeatures {
  using Element = u16;
  using Real = float;
  static constexpr int kPositions = 128, kStages = 3;
  static constexpr bool kTensor = true, kExactWhereInfinite = false;

  template <int kWords>
  struct Operand {
    u32 word[kWords];
    VIDOPS_DEVICE void set(int i, u32 value) { word[i] = value; }
  };
  static VIDOPS_DEVICE void multiply(float (&c)[4], const Operand<4>& a, const Operand<2>& b) {
    Format::multiply(c, a.word, b.word);
  }
};
struct HalfFormat {
  static VIDOPS_DEVICE void multiply(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) { mma_half(c, a, b); }
};
struct BfloatFormat {
  static VIDOPS_DEVICE void multiply(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) { mma_bfloat(c, a, b); }
};
using HalfFeatures = SixteenBitFeatures<HalfFormat>;
using BfloatFeatures = SixteenBitFeatures<BfloatFormat>;

struct DoubleFeatures {
  using Element = double;
  using Real = double;
  static constexpr int kPositions = 64, kStages = 2;
  static constexpr bool kTensor = false, kExactWhereInfinite = false;
};

// --- which queries and positions --------------------------------------------------------------------------------
VIDOPS_DEVICE bool within(const LabelPropagationArgs& a, int query, int position) {
  const i64 dy = query / a.width - position / a.width, dx = query % a.width - position % a.width;
  return dy * dy + dx * dx < a.limit;
}

// A rectangle of the grid, position by position in rows.
struct Window {
  int top, left, across, count;

  VIDOPS_DEVICE int position(const LabelPropagationArgs& a, int place) const {
    return (top + place / across) * a.width + left + place % across;
  }
};

struct ContextTile {
  int frame, first;  // place of the window from which on it goes
  bool restricted;
};

// What a block does: its patch, and the tiles that this needs of all frames. In shared memory, for want of registers.
struct ContextTiles {
  int query[kPatchQueries];  // in the patch's places, -1 beyond the grid
  Window near;
  int per_whole, per_near, whole_tiles, count;

  // By all threads, before a barrier.
  VIDOPS_DEVICE void find(const LabelPropagationArgs& a, int patch, int tile) {
    const int top = patch / a.patches_across * a.patch_height, left = patch % a.patches_across * a.patch_width;
    if (thread_x() < kPatchQueries) {
      const int y = top + thread_x() / a.patch_width, x = left + thread_x() % a.patch_width;
      const bool inside = thread_x() < a.patch_height * a.patch_width && y < a.height && x < a.width;
      query[thread_x()] = inside ? y * a.width + x : -1;
    }
    if (thread_x() != 0) return;
    near.top = top > a.reach ? top - a.reach : 0;
    near.left = left > a.reach ? left - a.reach : 0;
    const int bottom = top + a.patch_height + a.reach, right = left + a.patch_width + a.reach;
    near.across = (right < a.width ? right : a.width) - near.left;
    near.count = ((bottom < a.height ? bottom : a.height) - near.top) * near.across;
    per_whole = (a.tokens + tile - 1) / tile;
    per_near = (near.count + tile - 1) / tile;
    whole_tiles = a.unrestricted * per_whole;
    count = whole_tiles + (a.frames - a.unrestricted) * per_near;
  }
  VIDOPS_DEVICE ContextTile at(const LabelPropagationArgs& a, int number, int tile) const {
    if (number < whole_tiles) return {number / per_whole, number % per_whole * tile, false};
    number -= whole_tiles;
    return {a.unrestricted + number / per_near, number % per_near * tile, true};
  }
  VIDOPS_DEVICE Window window(const LabelPropagationArgs& a, const ContextTile& tile) const {
    return {tile.restricted ? near.top : 0, tile.restricted ? near.left : 0, tile.restricted ? near.across : a.width,
            tile.restricted ? near.count : a.tokens};
  }
};

// --- features on their way to shared memory -----------------------------------------------------------------------
// Copies a chunk of channels of the patch's queries and of a tile's positions per call, in the order of the products.
// Block b of row r lies at b ^ (r % 4): lanes that read 8 bytes of a block each, of four rows, meet no bank conflict.
template <class Features>
struct FeatureLoader {
  using Element = typename Features::Element;
  static constexpr int kRowsPerPass = kScanThreads / kPieces;
  static constexpr int kQueryPasses = kPatchQueries / kRowsPerPass;
  static constexpr int kPositionPasses = Features::kPositions / kRowsPerPass;
  static constexpr int kPieceChannels = 16 / (int)sizeof(Element);
  static constexpr int kStageBytes = (kPatchQueries + Features::kPositions) * kChunkBytes;

  const LabelPropagationArgs& a;
  const ContextTiles& tiles;
  char* const stages;
  const int chunks, end;
  int tile, chunk = 0;
  int stage = 0;  // filled by the next call, and until then the oldest
  int frame = 0;
  int position[kPositionPasses];  // -1 for none

  VIDOPS_DEVICE FeatureLoader(const LabelPropagationArgs& a_, const ContextTiles& tiles_, char* stages_, int chunks_,
                              int begin, int end_)
      : a(a_), tiles(tiles_), stages(stages_), chunks(chunks_), end(end_), tile(begin) {
    if (tile < end) find_positions();
  }
  VIDOPS_DEVICE int row(int pass) const { return thread_x() / kPieces + pass * kRowsPerPass; }

  VIDOPS_DEVICE void find_positions() {
    const ContextTile here = tiles.at(a, tile, Features::kPositions);
    const Window window = tiles.window(a, here);
    frame = here.frame;
    VIDOPS_UNROLL
    for (int u = 0; u < kPositionPasses; ++u) {
      const int place = here.first + row(u);
      position[u] = place < window.count ? window.position(a, place) : -1;
    }
  }

  // Calls copy(to, from, valid) for this thread's piece of every row it copies, of which so many channels exist.
  template <class Copy>
  VIDOPS_DEVICE void for_each_piece(Copy copy) const {
    const int piece = thread_x() % kPieces, channel = (chunk * kPieces + piece) * kPieceChannels;
    const int valid = a.channels - channel;
    const Element* from = static_cast<const Element*>(a.query) + channel;
    char* to = stages + stage * kStageBytes + row(0) * kChunkBytes + (piece ^ row(0) % 4 * (kBlockBytes / 16)) * 16;
    VIDOPS_UNROLL
    for (int u = 0; u < kQueryPasses; ++u, to += kRowsPerPass * kChunkBytes) {
      const int n = tiles.query[row(u)];
      copy(reinterpret_cast<Element*>(to), from + (n < 0 ? 0 : n) * a.query_row, n < 0 ? 0 : valid);
    }
    from = static_cast<const Element*>(a.context) + frame * a.context_frame + channel;
    VIDOPS_UNROLL
    for (int u = 0; u < kPositionPasses; ++u, to += kRowsPerPass * kChunkBytes) {
      const int m = position[u];
      copy(reinterpret_cast<Element*>(to), from + (m < 0 ? 0 : m) * a.context_row, m < 0 ? 0 : valid);
    }
  }

  VIDOPS_DEVICE void operator()() {
    if (tile < end) {
      if (a.whole) {
        for_each_piece([](Element* to, const Element* from, int valid) { copy_async(to, from, valid > 0); });
      } else {
        VIDOPS_NO_UNROLL
        for (int e = 0; e < kPieceChannels; ++e)
          for_each_piece([e](Element* to, const Element* from, int valid) {
            to[e] = e < valid ? from[e] : (Element)0;
          });
      }
      if (++chunk == chunks) {
        chunk = 0;
        if (++tile < end) find_positions();
      }
    }
    stage = stage + 1 == Features::kStages ? 0 : stage + 1;
    copy_commit();
  }
};

// --- affinities of a tile -----------------------------------------------------------------------------------------
// A warp owns 32 queries by 32 positions. Which channel is which of the product's is free as long as both operands
// agree, so lanes read two words at a time.
template <class Features>
struct TensorSums {
  static constexpr int kSlabs = 2, kStrips = 4;
  static constexpr int kAcross = Features::kPositions / (kStrips * 8);
  float sum[kSlabs][kStrips][4];

  static VIDOPS_DEVICE int first_query() { return warp_id() / kAcross * (kSlabs * 16); }
  static VIDOPS_DEVICE int first_position() { return warp_id() % kAcross * (kStrips * 8); }

  VIDOPS_DEVICE void clear() {
    VIDOPS_UNROLL
    for (int i = 0; i < kSlabs; ++i)
      VIDOPS_UNROLL
      for (int j = 0; j < kStrips; ++j)
        VIDOPS_UNROLL
        for (int e = 0; e < 4; ++e) sum[i][j][e] = 0;
  }

  // Tensor cores truncate where they add: a chunk of its own keeps that small, chunks are added to nearest.
  VIDOPS_DEVICE void add(const char* stage) {
    const int group = lane_id() / 4, place = lane_id() % 4;
    const char* queries = stage + (first_query() + group) * kChunkBytes;
    const char* positions = stage + (kPatchQueries + first_position() + group) * kChunkBytes;
    float part[kSlabs][kStrips][4] = {};
    VIDOPS_UNROLL
    for (int step = 0; step < kChunkBytes / kBlockBytes; ++step) {
      const int at = (step ^ group % 4) * kBlockBytes + place * (int)sizeof(Words2);
      typename Features::template Operand<4> a[kSlabs];
      VIDOPS_UNROLL
      for (int i = 0; i < kSlabs * 2; ++i) {
        const Words2 words = *reinterpret_cast<const Words2*>(queries + i * 8 * kChunkBytes + at);
        VIDOPS_UNROLL
        for (int e = 0; e < 2; ++e) a[i / 2].set(i % 2 + 2 * e, words.v[e]);
      }
      VIDOPS_UNROLL
      for (int j = 0; j < kStrips; ++j) {
        const Words2 words = *reinterpret_cast<const Words2*>(positions + j * 8 * kChunkBytes + at);
        typename Features::template Operand<2> b;
        VIDOPS_UNROLL
        for (int e = 0; e < 2; ++e) b.set(e, words.v[e]);
        VIDOPS_UNROLL
        for (int i = 0; i < kSlabs; ++i) Features::multiply(part[i][j], a[i], b);
      }
    }
    VIDOPS_UNROLL
    for (int i = 0; i < kSlabs; ++i)
      VIDOPS_UNROLL
      for (int j = 0; j < kStrips; ++j)
        VIDOPS_UNROLL
        for (int e = 0; e < 4; ++e) sum[i][j][e] += part[i][j][e];
  }

  VIDOPS_DEVICE void store(float* scores, int queries) const {
    VIDOPS_UNROLL
    for (int i = 0; i < kSlabs * 2; ++i) {
      const int query = first_query() + i * 8 + lane_id() / 4;
      float* row = scores + query * (Features::kPositions + kScorePad) + first_position() + lane_id() % 4 * 2;
      VIDOPS_UNROLL
      for (int j = 0; j < kStrips; ++j)
        VIDOPS_UNROLL
        for (int e = 0; e < 2; ++e)
          if (query < queries) row[j * 8 + e] = sum[i / 2][j][i % 2 * 2 + e];
    }
  }
};

// A thread owns 4 queries by 4 positions.
struct OrdinarySums {
  static constexpr int kSide = 4, kAcross = DoubleFeatures::kPositions / kSide;
  double sum[kSide][kSide];

  static VIDOPS_DEVICE int first_query() { return thread_x() / kAcross * kSide; }
  static VIDOPS_DEVICE int position(int j) { return thread_x() % kAcross + j * kAcross; }
  static VIDOPS_DEVICE double load(const char* stage, int row, int channel) {
    const int piece = channel / 2 ^ row % 4 * (kBlockBytes / 16);
    return reinterpret_cast<const double*>(stage + row * kChunkBytes)[piece * 2 + channel % 2];
  }

  VIDOPS_DEVICE void clear() {
    VIDOPS_UNROLL
    for (int i = 0; i < kSide; ++i)
      VIDOPS_UNROLL
      for (int j = 0; j < kSide; ++j) sum[i][j] = 0;
  }
  VIDOPS_DEVICE void add(const char* stage) {
    VIDOPS_NO_UNROLL
    for (int channel = 0; channel < kChunkBytes / (int)sizeof(double); ++channel) {
      double positions[kSide];
      VIDOPS_UNROLL
      for (int j = 0; j < kSide; ++j) positions[j] = load(stage, kPatchQueries + position(j), channel);
      VIDOPS_UNROLL
      for (int i = 0; i < kSide; ++i) {
        const double query = load(stage, first_query() + i, channel);
        VIDOPS_UNROLL
        for (int j = 0; j < kSide; ++j) sum[i][j] = multiply_add(query, positions[j], sum[i][j]);
      }
    }
  }
  VIDOPS_DEVICE void store(double* scores, int queries) const {
    VIDOPS_UNROLL
    for (int i = 0; i < kSide; ++i)
      VIDOPS_UNROLL
      for (int j = 0; j < kSide; ++j)
        if (first_query() + i < queries)
          scores[(first_query() + i) * (DoubleFeatures::kPositions + kScorePad) + position(j)] = sum[i][j];
  }
};

template <class Features, bool = Features::kTensor>
struct SumsOf {
  using Type = TensorSums<Features>;
};
template <class Features>
struct SumsOf<Features, false> {
  using Type = OrdinarySums;
};

// One affinity of float32 features, from the ordinary units.
VIDOPS_DEVICE float single_affinity(const LabelPropagationArgs& a, int query, int frame, int position) {
  const float* q = static_cast<const float*>(a.query) + query * a.query_row;
  const float* c = static_cast<const float*>(a.context) + frame * a.context_frame + position * a.context_row;
  float sum = 0;
  VIDOPS_NO_UNROLL
  for (int channel = 0; channel < a.channels; ++channel) sum = multiply_add(q[channel], c[channel], sum);
  return sum;
}

// --- the choice ---------------------------------------------------------------------------------------------------
// The best matches of one query, best first: number 32 s + lane in slot s of a lane, at least k of them. Kept by a
// whole warp; slots beyond k are not touched.
template <class Real>
struct MatchList {
  Real value[kListSlots];
  int index[kListSlots];
  const int k;

  explicit VIDOPS_DEVICE MatchList(int k_) : k(k_) {
    VIDOPS_UNROLL
    for (int s = 0; s < kListSlots; ++s) value[s] = -(Real)VIDOPS_INFINITY, index[s] = -1;
  }
  VIDOPS_DEVICE bool used(int slot) const { return slot * kWarp < k; }
  static VIDOPS_DEVICE int place(int slot) { return slot * kWarp + lane_id(); }

  VIDOPS_DEVICE void load(const Real* values, const int* indices) {
    VIDOPS_UNROLL
    for (int s = 0; s < kListSlots; ++s)
      if (place(s) < k) value[s] = values[place(s)], index[s] = indices[place(s)];
  }
  VIDOPS_DEVICE void store(Real* values, int* indices) const {
    VIDOPS_UNROLL
    for (int s = 0; s < kListSlots; ++s)
      if (place(s) < k) values[place(s)] = value[s], indices[place(s)] = index[s];
  }

  // What a candidate has to beat.
  VIDOPS_DEVICE Real floor() const {
    Real last = value[0];
    VIDOPS_UNROLL
    for (int s = 1; s < kListSlots; ++s) last = used(s) ? value[s] : last;
    return shuffle(last, (k - 1) % kWarp);
  }

  // Inserts the candidates of the lanes in `from`, lane by lane. Their indices are above all in the list.
  VIDOPS_DEVICE void insert(Real candidate, int at, u32 from) {
    for (; from; from &= from - 1) {
      const Real v = shuffle(candidate, lowest_bit(from));
      const int i = shuffle(at, lowest_bit(from));
      int better = 0;
      VIDOPS_UNROLL
      for (int s = 0; s < kListSlots; ++s)
        if (used(s)) better += popcount(ballot(value[s] >= v));
      if (better >= k) continue;
      VIDOPS_UNROLL
      for (int s = kListSlots - 1; s >= 0; --s) {
        if (!used(s)) continue;
        const int source = (lane_id() + kWarp - 1) % kWarp;
        // The last lane passes on to the first of the next slot.
        const bool last = lane_id() == kWarp - 1 && s > 0;
        const Real above = shuffle(last ? value[s > 0 ? s - 1 : 0] : value[s], source);
        const int above_index = shuffle(last ? index[s > 0 ? s - 1 : 0] : index[s], source);
        if (place(s) > better) value[s] = above, index[s] = above_index;
        if (place(s) == better) value[s] = v, index[s] = i;
      }
    }
  }
};

// The lists of a block in shared memory.
template <class Real>
struct SharedLists {
  Real* values;
  int* indices;

  VIDOPS_DEVICE SharedLists(const LabelPropagationArgs& a, char* memory)
      : values(reinterpret_cast<Real*>(memory + a.lists)),
        indices(reinterpret_cast<int*>(values + a.patch_height * a.patch_width * a.k)) {}
};

// Offers a tile to the lists. NaN and -infinity beat nothing.
template <class Features>
VIDOPS_DEVICE void choose(const LabelPropagationArgs& a, const ContextTiles& tiles, int number,
                          const typename Features::Real* scores,
                          const SharedLists<typename Features::Real>& lists) {
  using Real = typename Features::Real;
  constexpr int kGroups = Features::kPositions / kWarp;
  const ContextTile tile = tiles.at(a, number, Features::kPositions);
  const Window window = tiles.window(a, tile);
  int y[kGroups], x[kGroups];  // of this lane's positions
  VIDOPS_UNROLL
  for (int g = 0; g < kGroups; ++g) {
    const int place = tile.first + g * kWarp + lane_id();
    y[g] = place < window.count ? window.top + place / window.across : -1;
    x[g] = window.left + place % window.across;
  }
  VIDOPS_NO_UNROLL
  for (int q = warp_id(); q < a.patch_height * a.patch_width; q += kScanWarps) {
    const int n = tiles.query[q];
    if (n < 0) continue;
    const int query_y = n / a.width, query_x = n % a.width;
    MatchList<Real> list(a.k);
    list.load(lists.values + q * a.k, lists.indices + q * a.k);
    Real floor = list.floor();
    bool changed = false;
    VIDOPS_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      Real v = scores[q * (Features::kPositions + kScorePad) + g * kWarp + lane_id()];
      const i64 dy = query_y - y[g], dx = query_x - x[g];
      bool wanted = y[g] >= 0 && (!tile.restricted || dy * dy + dx * dx < a.limit);
      if constexpr (Features::kExactWhereInfinite)
        if (wanted && !finite(v)) v = single_affinity(a, n, tile.frame, y[g] * a.width + x[g]);
      wanted = wanted && v > floor;
      const u32 from = ballot(wanted);
      if (!from) continue;
      list.insert(v, tile.frame * a.tokens + y[g] * a.width + x[g], from);
      floor = list.floor();
      changed = true;
    }
    if (changed) list.store(lists.values + q * a.k, lists.indices + q * a.k);
  }
}

// --- kernels ------------------------------------------------------------------------------------------------------
template <class Features>
VIDOPS_DEVICE void scan(const LabelPropagationArgs& a) {
  using Real = typename Features::Real;
  VIDOPS_SHARED(memory);
  Real* scores = reinterpret_cast<Real*>(memory + a.scores);
  const SharedLists<Real> lists(a, memory);
  const int split = (int)block_x() / a.patches, queries = a.patch_height * a.patch_width;
  ContextTiles& tiles = *reinterpret_cast<ContextTiles*>(memory + a.tiles);
  tiles.find(a, (int)block_x() % a.patches, Features::kPositions);
  block_sync();
  const int begin = (int)((i64)tiles.count * split / a.splits), end = (int)((i64)tiles.count * (split + 1) / a.splits);

  const MatchList<Real> none(a.k);
  for (int q = warp_id(); q < queries; q += kScanWarps) none.store(lists.values + q * a.k, lists.indices + q * a.k);

  constexpr int kChunk = kChunkBytes / (int)sizeof(typename Features::Element);
  const int chunks = (a.channels + kChunk - 1) / kChunk;
  FeatureLoader<Features> load(a, tiles, memory, chunks, begin, end);
  for (int s = 0; s < Features::kStages - 1; ++s) load();
  typename SumsOf<Features>::Type sums;
  for (int t = begin; t < end; ++t) {
    sums.clear();
    VIDOPS_NO_UNROLL
    for (int chunk = 0; chunk < chunks; ++chunk) {
      copy_wait<Features::kStages - 2>();
      block_sync();  // the stage has arrived for all, and all are done with the one that is filled next
      load();
      if (sums.first_query() < queries) sums.add(memory + load.stage * FeatureLoader<Features>::kStageBytes);
    }
    sums.store(scores, queries);
    block_sync();
    choose<Features>(a, tiles, t, scores, lists);
  }
  copy_wait<0>();

  for (int q = warp_id(); q < queries; q += kScanWarps) {
    const int n = tiles.query[q];
    if (n < 0) continue;
    const i64 at = ((i64)split * a.tokens + n) * a.k;
    warp_sync();
    for (int i = lane_id(); i < a.k; i += kWarp) {
      static_cast<Real*>(a.found_value)[at + i] = lists.values[q * a.k + i];
      a.found_index[at + i] = lists.indices[q * a.k + i];
    }
  }
}

VIDOPS_DEVICE int warp_prefix(int v) {
  VIDOPS_UNROLL
  for (int step = 1; step < kWarp; step *= 2) {
    const int before = shuffle(v, lane_id() - step);
    v += lane_id() >= step ? before : 0;
  }
  return v;
}

// As how many candidates each match counts, at most k in all.
template <class Real>
VIDOPS_DEVICE void count_copies(const LabelPropagationArgs& a, const MatchList<Real>& list, int n,
                                int (&copies)[kListSlots]) {
  int before = 0;
  VIDOPS_UNROLL
  for (int s = 0; s < kListSlots; ++s) {
    copies[s] = 0;
    if (!list.used(s)) continue;
    const int index = list.index[s];
    if (index >= 0) copies[s] = 1 + (index < a.tokens && within(a, n, index) ? a.repeats : 0);
    const int sum = warp_prefix(copies[s]), rest = a.k - before - (sum - copies[s]);
    before += shuffle(sum, kWarp - 1);
    copies[s] = copies[s] < rest ? copies[s] : rest > 0 ? rest : 0;
  }
}

// One warp per query: the best of all shares, their softmax, their labels.
template <class Real>
VIDOPS_DEVICE void merge(const LabelPropagationArgs& a) {
  VIDOPS_SHARED(memory);
  const int n = (int)block_x() * (kMergeThreads / kWarp) + warp_id();
  if (n >= a.tokens) return;
  MatchList<Real> list(a.k);
  for (int split = 0; split < a.splits; ++split) {
    const i64 at = ((i64)split * a.tokens + n) * a.k;
    for (int base = 0; base < a.k; base += kWarp) {
      const int i = base + lane_id();
      const Real v = i < a.k ? static_cast<const Real*>(a.found_value)[at + i] : -(Real)VIDOPS_INFINITY;
      const int index = i < a.k ? a.found_index[at + i] : -1;
      list.insert(v, index, ballot(v > list.floor()));
    }
  }

  int copies[kListSlots], taken = 0;
  count_copies(a, list, n, copies);
  const double largest = (double)shuffle(list.value[0], 0);
  double total = 0;
  Real weight[kListSlots];
  VIDOPS_UNROLL
  for (int s = 0; s < kListSlots; ++s) {
    if (!list.used(s)) continue;
    weight[s] = 0;
    if (copies[s] > 0) weight[s] = (Real)(copies[s] * exponential(((double)list.value[s] - largest) / a.temperature));
    total += (double)weight[s];
    taken += popcount(ballot(copies[s] > 0));
  }
  VIDOPS_UNROLL
  for (int mask = kWarp / 2; mask; mask >>= 1) total += shuffle_xor(total, mask);

  // Of every match its weight and where its labels are, for all lanes.
  i64* rows = reinterpret_cast<i64*>(memory) + warp_id() * 2 * a.k;
  Real* weights = reinterpret_cast<Real*>(rows + a.k);
  VIDOPS_UNROLL
  for (int s = 0; s < kListSlots; ++s) {
    const int i = list.place(s);
    if (i >= a.k) continue;
    const int index = copies[s] > 0 ? list.index[s] : -1;
    weights[i] = (Real)((double)weight[s] / total);  // none found: 0 / 0
    rows[i] = index / a.tokens * a.labels_frame + index % a.tokens * a.labels_row;
    a.index[(i64)n * a.k + i] = index;
    static_cast<Real*>(a.weight)[(i64)n * a.k + i] = weights[i];
  }
  warp_sync();
  for (int label = lane_id(); label < a.labels_count; label += kWarp) {
    Real sum = taken > 0 ? (Real)0 : weights[0];
    for (int i = 0; i < taken; ++i)
      sum = multiply_add(weights[i], static_cast<const Real*>(a.labels)[rows[i] + label], sum);
    static_cast<Real*>(a.out)[(i64)n * a.labels_count + label] = sum;
  }
}

}  // namespace

VIDOPS_KERNEL(kScanThreads, 2) label_propagation_scan_f32(LabelPropagationArgs a) { scan<FloatFeatures>(a); }
VIDOPS_KERNEL(kScanThreads, 2) label_propagation_scan_f16(LabelPropagationArgs a) { scan<HalfFeatures>(a); }
VIDOPS_KERNEL(kScanThreads, 2) label_propagation_scan_bf16(LabelPropagationArgs a) { scan<BfloatFeatures>(a); }
VIDOPS_KERNEL(kScanThreads, 2) label_propagation_scan_f64(LabelPropagationArgs a) { scan<DoubleFeatures>(a); }

VIDOPS_KERNEL(kMergeThreads) label_propagation_merge_f32(LabelPropagationArgs a) { merge<float>(a); }
VIDOPS_KERNEL(kMergeThreads) label_propagation_merge_f64(LabelPropagationArgs a) { merge<double>(a); }

}  // namespace vidops::cuda
