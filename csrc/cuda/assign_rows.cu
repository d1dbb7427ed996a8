// Nearest centroid of map rows (Eq. E4) in two stages: float16 scores with a bound on their error, then the exact
// distance to every centroid that the bound leaves in play.
//
// The score is D without the row's own entropy, sum_c X log X - sum_c P log X - sum_c X log P. Subtracting one vector
// from log X and log P alike adds the same to the scores of all centroids and keeps the logarithms small. With x^ for
// what is stored of x, the error of a product is at most |p| |y - y^| + |p - p^| |y^| by Cauchy-Schwarz, where norms
// and residuals are those of the data; rounding in the sums is bounded relative to |p| |y|.
#include "device.cuh"
#include "tiles.cuh"

namespace vidops::cuda {

constexpr int kCentreThreads = 128;
constexpr int kCentreRows = 128;  // enough for a centre: any vector is right
constexpr int kPackThreads = 256;
constexpr int kDecideThreads = 128;
constexpr int kScoreRows = 128;
constexpr int kScoreFlush = 4;  // see multiply_tile

enum AssignStat { kValueNorm, kLogNorm, kValueError, kLogError, kAssignStats };

// Two float16 planes of `rows` x `pitch`: the scaled values, and their logarithms less the centre.
struct AssignPackArgs {
  const float* value;
  const float* log;
  i64 value_stride, log_stride;
  const float* centre;
  const u32* largest;
  int rows, columns, pitch;
  u16* planes;
  i64 plane;       // elements from the values to the logarithms
  float* stats;    // kAssignStats x rows
  float* entropy;  // null when not wanted
};

struct AssignRowsArgs {
  const float* p;
  const float* log_p;
  const float* x;
  const float* log_x;
  i64 p_stride, log_p_stride, x_stride, log_x_stride;
  int rows, columns, clusters, pitch;
  int row_tiles, cluster_tiles, slices, slice_columns;
  float sum_rounding;      // of a score beyond its tiles' own, relative to the products of the norms
  float entropy_rounding;  // likewise
  // Scratch.
  float* centre;     // columns
  u32* largest;      // 1, zero before: bits of the largest magnitude in X
  u16* row_planes;   // 2 x rows x pitch
  u16* x_planes;     // 2 x clusters x pitch
  i64 row_plane;     // elements from plane to plane
  float* row_stats;  // kAssignStats x rows
  float* x_stats;    // kAssignStats x clusters
  float* entropy;    // clusters
  float* scores;     // slices x rows x clusters
  i64* label;
};

// Column means of log X over the first centroids, where it is finite, and the largest of their values.
VIDOPS_KERNEL(kCentreThreads) assign_rows_centre(AssignRowsArgs a) {
  const int column = (int)block_x() * kCentreThreads + thread_x();
  const int count = a.clusters < kCentreRows ? a.clusters : kCentreRows;
  float sum = 0, largest = 0;
  if (column < a.columns) {
    for (int k = 0; k < count; ++k) {
      const float log = a.log_x[k * a.log_x_stride + column];
      const float value = magnitude(a.x[k * a.x_stride + column]);
      if (finite(log)) sum += log;
      if (finite(value) && value > largest) largest = value;
    }
    sum /= (float)count;
    a.centre[column] = finite(sum) ? sum : 0.0f;
  }
  largest = warp_max(largest);
  if (lane_id() == 0) atomic_max_global(a.largest, float_bits(largest));
}

namespace {

// log2 of the factor that brings X just below 2^8. Rows of P are means' members and may be larger, up to the 2^16 where
// float16 ends; the factor is one for all, so that both products of a score have the same unit.
VIDOPS_DEVICE int assign_exponent(u32 largest) {
  const int exponent = 134 - (int)(largest >> 23);
  return exponent < -60 ? -60 : exponent > 60 ? 60 : exponent;
}

// Stores a value and returns what that loses. Beyond the range of float16 much is lost, which the bound knows; NaN
// and infinity make both NaN.
VIDOPS_DEVICE float assign_store(float v, u32& half) {
  const float limit = 65504.0f;
  const float kept = !finite(v) ? v - v : v > limit ? limit : v < -limit ? -limit : v;
  half = float_to_half(kept);
  return v - half_to_float((u16)half);
}

}  // namespace

// One block per row.
VIDOPS_KERNEL(kPackThreads) assign_rows_pack(AssignPackArgs a) {
  VIDOPS_SHARED(memory);
  float* scratch = reinterpret_cast<float*>(memory);
  const int row = (int)block_x();
  const float* value = a.value + row * a.value_stride;
  const float* log = a.log + row * a.log_stride;
  u32* value_to = reinterpret_cast<u32*>(a.planes + (i64)row * a.pitch);
  u32* log_to = reinterpret_cast<u32*>(a.planes + a.plane + (i64)row * a.pitch);
  const int exponent = assign_exponent(*a.largest);
  const float up = power_of_two(exponent), down = power_of_two(-exponent);
  float stat[kAssignStats] = {}, entropy = 0;
  VIDOPS_UNROLL_BY(4)
  for (int c = 2 * thread_x(); c < a.pitch; c += 2 * kPackThreads) {
    float v[2] = {}, l[2] = {};
    VIDOPS_UNROLL
    for (int u = 0; u < 2; ++u)
      if (c + u < a.columns) v[u] = value[c + u], l[u] = log[c + u] - a.centre[c + u];
    u32 value_half[2], log_half[2];
    VIDOPS_UNROLL
    for (int u = 0; u < 2; ++u) {
      const float value_error = assign_store(v[u] * up, value_half[u]) * down;
      const float log_error = assign_store(l[u], log_half[u]);
      stat[kValueNorm] += v[u] * v[u];
      stat[kLogNorm] += l[u] * l[u];
      stat[kValueError] += value_error * value_error;
      stat[kLogError] += log_error * log_error;
      entropy += v[u] * l[u];
    }
    value_to[c / 2] = value_half[0] | value_half[1] << 16;
    log_to[c / 2] = log_half[0] | log_half[1] << 16;
  }
  // The constant is above whatever underflowed in a square.
  VIDOPS_UNROLL
  for (int s = 0; s < kAssignStats; ++s) stat[s] = square_root(block_sum(stat[s], scratch)) + 1e-15f;
  stat[kValueNorm] += stat[kValueError];  // from here on of what is stored, too
  stat[kLogNorm] += stat[kLogError];
  if (a.entropy) entropy = block_sum(entropy, scratch);
  if (thread_x() == 0) {
    VIDOPS_UNROLL
    for (int s = 0; s < kAssignStats; ++s) a.stats[s * (i64)a.rows + row] = stat[s];
    if (a.entropy) a.entropy[row] = entropy;
  }
}

namespace {

// One tile of rows and centroids and one slice of the columns.
template <int kN>
VIDOPS_DEVICE void assign_rows_product(const AssignRowsArgs& a, char* shared) {
  const int cluster_tile = (int)(block_x() % (u32)a.cluster_tiles);
  const int rest = (int)(block_x() / (u32)a.cluster_tiles);
  const int first_row = rest % a.row_tiles * kScoreRows, slice = rest / a.row_tiles;
  const int first_cluster = cluster_tile * kN, first_column = slice * a.slice_columns;
  const int left = a.pitch - first_column;

  Product product;
  product.left = a.row_planes + first_column;
  product.right = a.x_planes + first_column;
  product.left_plane = a.row_plane;
  product.right_plane = (i64)a.clusters * a.pitch;
  product.stride = a.pitch;
  product.columns = left < a.slice_columns ? left : a.slice_columns;
  product.terms = 2;  // P log X and log P X
  product.left_code = 0x10;
  product.right_code = 0x01;

  Tile<kScoreRows, kN> tile;
  multiply_tile<Half, kScoreFlush>(
      tile, product, shared, [&](int r) { return first_row + r < a.rows ? (i64)first_row + r : -1; },
      [&](int c) { return first_cluster + c < a.clusters ? (i64)first_cluster + c : -1; });

  tile.for_each([&](float value, int slab, int strip, int e) {
    const int row = first_row + tile.row(slab, e), cluster = first_cluster + tile.column(strip, e);
    if (row < a.rows && cluster < a.clusters)
      a.scores[((i64)slice * a.rows + row) * a.clusters + cluster] = value;
  });
}

}  // namespace

VIDOPS_KERNEL(kTileThreads) assign_rows_scores(AssignRowsArgs a) {
  VIDOPS_SHARED(memory);
  assign_rows_product<128>(a, memory);
}

VIDOPS_KERNEL(kTileThreads) assign_rows_scores_narrow(AssignRowsArgs a) {
  VIDOPS_SHARED(memory);
  assign_rows_product<64>(a, memory);
}

// One block per row. A centroid whose score less its error exceeds another's score plus its error cannot be the
// nearest. If more than one is left, the direct form of Eq. E2 decides, which loses nothing to cancellation. Whatever
// is not a number passes no test and is decided there too.
VIDOPS_KERNEL(kDecideThreads) assign_rows_decide(AssignRowsArgs a) {
  VIDOPS_SHARED(memory);
  float* scratch = reinterpret_cast<float*>(memory);  // one per warp
  u32* open = reinterpret_cast<u32*>(scratch + kDecideThreads / kWarp);
  const int row = (int)block_x(), me = thread_x();
  float own[kAssignStats];
  VIDOPS_UNROLL
  for (int s = 0; s < kAssignStats; ++s) own[s] = a.row_stats[s * (i64)a.rows + row];
  if (own[kValueNorm] != own[kValueNorm]) {  // no distance of this row is a number
    if (me == 0) a.label[row] = 0;
    return;
  }
  const float down = power_of_two(-assign_exponent(*a.largest));
  const float rounding = tile_rounding(kScoreFlush) + a.sum_rounding;

  auto judge = [&](int k, float& error) {
    float x[kAssignStats];
    VIDOPS_UNROLL
    for (int s = 0; s < kAssignStats; ++s) x[s] = a.x_stats[s * (i64)a.clusters + k];
    error = own[kValueNorm] * x[kLogError] + own[kValueError] * x[kLogNorm];
    error += own[kLogNorm] * x[kValueError] + own[kLogError] * x[kValueNorm];
    error += (own[kValueNorm] * x[kLogNorm] + own[kLogNorm] * x[kValueNorm]) * rounding;
    error = (error + x[kValueNorm] * x[kLogNorm] * a.entropy_rounding) * 1.01f;  // and of the norms themselves
    float product = 0;
    for (int s = 0; s < a.slices; ++s) product += a.scores[((i64)s * a.rows + row) * a.clusters + k];
    return a.entropy[k] - product * down;
  };

  float least = VIDOPS_INFINITY;
  for (int k = me; k < a.clusters; k += kDecideThreads) {
    float error;
    const float score = judge(k, error);
    if (score + error < least) least = score + error;
  }
  least = -warp_max(-least);
  if (lane_id() == 0) scratch[warp_id()] = least;
  block_sync();
  for (int w = 0; w < kDecideThreads / kWarp; ++w) least = scratch[w] < least ? scratch[w] : least;

  const int words = (a.clusters + kWarp - 1) / kWarp;
  for (int word = warp_id(); word < words; word += kDecideThreads / kWarp) {
    const int k = word * kWarp + lane_id();
    bool in_play = false;
    if (k < a.clusters) {
      float error;
      const float score = judge(k, error);
      in_play = !(score - error > least) && a.entropy[k] == a.entropy[k];
    }
    const u32 bits = ballot(in_play);
    if (lane_id() == 0) open[word] = bits;
  }
  block_sync();

  int count = 0, nearest = 0;
  for (int word = words - 1; word >= 0; --word) {
    count += popcount(open[word]);
    if (open[word]) nearest = word * kWarp + lowest_bit(open[word]);
  }
  if (count > 1) {
    const float* p = a.p + row * a.p_stride;
    const float* log_p = a.log_p + row * a.log_p_stride;
    float best = VIDOPS_INFINITY;
    nearest = 0;
    for (int word = 0; word < words; ++word)
      for (u32 rest = open[word]; rest; rest &= rest - 1) {
        const int k = word * kWarp + lowest_bit(rest);
        const float* x = a.x + k * a.x_stride;
        const float* log_x = a.log_x + k * a.log_x_stride;
        float sum = 0;
        for (int c = me; c < a.columns; c += kDecideThreads) sum += (p[c] - x[c]) * (log_p[c] - log_x[c]);
        sum = block_sum(sum, scratch);
        if (sum < best) best = sum, nearest = k;
      }
  }
  if (me == 0) a.label[row] = nearest;
}

}  // namespace vidops::cuda
