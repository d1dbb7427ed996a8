// Symmetrised KL (Eq. E2) as a product on the tensor cores, with a bound on its error that holds for every
// pair.
//
// D_ij = sum_c (p_ic - p_jc)(log p_ic - log p_jc) does not change when a constant is taken from a column of
// all maps or of all logs. With x = p and y = log p, each minus its column mean,
//   D_ij = s_i + s_j - (x_i . y_j + y_i . x_j),  s_i = x_i . y_i,
// whose terms are far smaller than entropies. x and y are stored as float16 after one power-of-two scale per
// kind that brings the largest magnitude just below 2^15; a second, low half of each carries the next 11
// bits. One product of the high halves makes the filter, three (high high, high low, low high) the
// float32-class form.
//
// Error of the cross terms, for any weights w > 0 of the columns and the norms |x|/ = sqrt(sum x^2 / w),
// |y|* = sqrt(sum y^2 w): with stored x^, y^ Cauchy-Schwarz gives
//   |x_i . y_j - x^_i . y^_j| <= |x_i|/ |y_j - y^_j|* + |x_i - x^_i|/ |y^_j|*
// and the mirrored term; leaving out low times low adds the product of the norms of the low halves. Norms and
// residuals are those of the data. Rounding in sums is bounded by their number of steps times (|x_i| +
// |x_j|)/ (|y_i| + |y_j|)*, which also covers the direct form. A pair farther from tau than the bound is
// decided; others go to the direct form, which adds in one fixed order. So every way to the decision agrees.
#pragma once

#include "tiles.cuh"

namespace vidops::cuda {

constexpr int kColumnThreads = 128;
constexpr int kPackThreads = 256;
constexpr int kFilterFlush = 8;    // see multiply_tile; Threshold states what it costs
constexpr int kDistanceFlush = 2;  // with six terms a run is either high times high or of the small terms
constexpr float kUnit = 5.9604645e-8f;  // 2^-24, the rounding of float32

struct MapRows {
  const float* map;
  i64 map_stride;
  const float* log;
  i64 log_stride;
  int rows;
};

enum Plane { kMapHigh, kLogHigh, kMapLow, kLogLow };
// Of a row: s, |x|/, |y|*, and the same norms of the residuals x - x^, y - y^ and of the low halves.
enum Stat { kSelf, kMapNorm, kLogNorm, kMapError, kLogError, kMapRest, kLogRest, kStats };

struct DistanceArgs {
  MapRows p, q;  // q has no rows where a set meets itself; q's rows follow those of p in all scratch arrays
  int cols;
  int halves;  // 1: high only, 2: high and low
  int slices, slice_rows;
  int stride;      // of a stored row: cols, rounded up
  i64 plane;       // elements of one plane
  float* partial;  // [2][slices][cols]: sums of map and log over a slice of rows
  float* centre;   // [3][cols]: of maps, of logs, root of the weight
  u32* largest;    // [2], zero before: bits of the largest finite |map| and |log|
  u16* planes;     // [2 halves][rows][stride], see Plane
  float* stats;    // [kStats][rows], see Stat

  VIDOPS_DEVICE int rows() const { return p.rows + q.rows; }
};

// --- operands ----------------------------------------------------------------------------------------------

VIDOPS_DEVICE u32 warp_largest(u32 v) {
  VIDOPS_UNROLL
  for (int mask = 16; mask; mask >>= 1) {
    const u32 other = shuffle_xor(v, mask);
    v = other > v ? other : v;
  }
  return v;
}

// Column sums over one slice of the rows, a column per thread. NaN and infinity are left out: they must not
// spoil the centre for all other rows.
VIDOPS_DEVICE void sum_columns(const DistanceArgs& a) {
  const int column_blocks = (a.cols + kColumnThreads - 1) / kColumnThreads;
  const int slice = (int)block_x() / column_blocks;
  const int column = (int)block_x() % column_blocks * kColumnThreads + thread_x();
  const int begin = slice * a.slice_rows;
  const int end = begin + a.slice_rows < a.rows() ? begin + a.slice_rows : a.rows();
  float maps = 0, logs = 0;
  u32 largest_map = 0, largest_log = 0;
  if (column < a.cols) {
    VIDOPS_UNROLL_BY(4)
    for (int row = begin; row < end; ++row) {
      const MapRows& set = row < a.p.rows ? a.p : a.q;
      const i64 at = row < a.p.rows ? row : row - a.p.rows;
      float x = set.map[at * set.map_stride + column], y = set.log[at * set.log_stride + column];
      x = finite(x) ? x : 0;
      y = finite(y) ? y : 0;
      maps += x;
      logs += y;
      const u32 map_bits = float_bits(magnitude(x)), log_bits = float_bits(magnitude(y));
      largest_map = map_bits > largest_map ? map_bits : largest_map;
      largest_log = log_bits > largest_log ? log_bits : largest_log;
    }
    a.partial[(i64)slice * a.cols + column] = maps;
    a.partial[(i64)(a.slices + slice) * a.cols + column] = logs;
  }
  largest_map = warp_largest(largest_map);
  largest_log = warp_largest(largest_log);
  // The value read first may be old, which costs an atomic and nothing else.
  if (lane_id() == 0 && largest_map > a.largest[0]) atomic_max_global(a.largest, largest_map);
  if (lane_id() == 0 && largest_log > a.largest[1]) atomic_max_global(a.largest + 1, largest_log);
}

// Any finite centre and positive weight is valid; the means make the bound tight.
VIDOPS_DEVICE void centre_columns(const DistanceArgs& a) {
  const int column = (int)block_x() * kColumnThreads + thread_x();
  if (column >= a.cols) return;
  float maps = 0, logs = 0;
  for (int slice = 0; slice < a.slices; ++slice) {
    maps += a.partial[(i64)slice * a.cols + column];
    logs += a.partial[(i64)(a.slices + slice) * a.cols + column];
  }
  maps /= (float)a.rows();
  logs /= (float)a.rows();
  maps = finite(maps) ? maps : 0;
  logs = finite(logs) ? logs : 0;
  const float weight = magnitude(maps);
  a.centre[column] = maps;
  a.centre[a.cols + column] = logs;
  a.centre[2 * (i64)a.cols + column] = square_root(weight > 1e-30f ? weight : 1e-30f);
}

// log2 of the scale of a kind. A centred value is below twice the largest, 2^(e - 125) for its exponent field
// e. The clamp keeps scales and the product of their inverses normal; the bound notices what it costs.
VIDOPS_DEVICE int plane_exponent(u32 largest) {
  const int exponent = 140 - (int)(largest >> 23);
  return exponent < -60 ? -60 : exponent > 60 ? 60 : exponent;
}

// Takes the scales out of an entry of the product.
struct Unscale {
  float map, log;
  explicit VIDOPS_DEVICE Unscale(const DistanceArgs& a)
      : map(power_of_two(-plane_exponent(a.largest[0]))), log(power_of_two(-plane_exponent(a.largest[1]))) {}
  VIDOPS_DEVICE float operator()(float v) const { return v * map * log; }
};

// One block per row: its stored halves and its line of `stats`. `scratch` holds a float per warp.
template <bool kBounds>
VIDOPS_DEVICE void pack_row(const DistanceArgs& a, float* scratch) {
  const int row = (int)block_x();
  const MapRows& set = row < a.p.rows ? a.p : a.q;
  const i64 at = row < a.p.rows ? row : row - a.p.rows;
  const float* map = set.map + at * set.map_stride;
  const float* log = set.log + at * set.log_stride;
  const float scale[2] = {power_of_two(plane_exponent(a.largest[0])),
                          power_of_two(plane_exponent(a.largest[1]))};
  const float unscale[2] = {1 / scale[0], 1 / scale[1]};
  float sum[kStats] = {};
  float missing = 0;
  for (int base = 2 * thread_x(); base < a.stride; base += 2 * kPackThreads) {
    u32 high[2] = {}, low[2] = {};
    VIDOPS_UNROLL
    for (int e = 0; e < 2; ++e) {
      const int column = base + e;
      if (column >= a.cols) continue;
      const float value[2] = {map[column] - a.centre[column], log[column] - a.centre[a.cols + column]};
      sum[kSelf] = multiply_add(value[0], value[1], sum[kSelf]);
      const float root = kBounds ? a.centre[2 * (i64)a.cols + column] : 1;
      VIDOPS_UNROLL
      for (int kind = 0; kind < 2; ++kind) {
        const float scaled = value[kind] * scale[kind];
        const u16 first = float_to_half(scaled);
        float rest = scaled - half_to_float(first);  // exact, and so is the next difference
        high[kind] |= (u32)first << 16 * e;
        float low_value = 0;
        if (a.halves == 2) {
          const u16 second = float_to_half(rest);
          low_value = half_to_float(second);
          rest -= low_value;
          low[kind] |= (u32)second << 16 * e;
        }
        if constexpr (kBounds) {
          const float weighted = kind ? root : 1 / root;
          const float size = value[kind] * weighted;
          const float error = rest * unscale[kind] * weighted;
          const float omitted = low_value * unscale[kind] * weighted;
          sum[kMapNorm + kind] += size * size;
          sum[kMapError + kind] += error * error;
          sum[kMapRest + kind] += omitted * omitted;
        }
      }
      missing += value[0] != value[0] || value[1] != value[1] ? 1.0f : 0.0f;
    }
    u16* to = a.planes + (i64)row * a.stride + base;
    VIDOPS_UNROLL
    for (int kind = 0; kind < 2; ++kind) {
      *reinterpret_cast<u32*>(to + (kMapHigh + kind) * a.plane) = high[kind];
      if (a.halves == 2) *reinterpret_cast<u32*>(to + (kMapLow + kind) * a.plane) = low[kind];
    }
  }
  const float self = block_sum(sum[kSelf], scratch);
  if constexpr (!kBounds) {
    if (thread_x() == 0) a.stats[row] = self;
    return;
  }
  // Rounding of the sums here, of the norms and of the bound itself; what underflowed is below the constant.
  const float grow = 1.0001f + (float)(a.cols / kPackThreads + 32) * 2 * kUnit;
  float out[kStats];
  out[kSelf] = self;
  bool regular = finite(self);
  VIDOPS_UNROLL
  for (int s = kMapNorm; s < kStats; ++s) {
    out[s] = square_root(block_sum(sum[s], scratch)) * grow + 1e-15f;
    regular = regular && finite(out[s]);
  }
  // From here on the norm of the value as well as of what is stored.
  out[kMapNorm] += out[kMapError];
  out[kLogNorm] += out[kLogError];
  missing = block_sum(missing, scratch);
  if (thread_x() != 0) return;
  // NaN is near to nothing. With an infinity, or a norm that overflows, the direct form has to decide.
  if (missing > 0) {
    out[kSelf] = bits_float(0x7fc00000u);
  } else if (!regular) {
    out[kSelf] = 0;
    VIDOPS_UNROLL
    for (int s = kMapNorm; s < kStats; ++s) out[s] = s == kMapNorm ? VIDOPS_INFINITY : 1;
  }
  VIDOPS_UNROLL
  for (int s = 0; s < kStats; ++s) a.stats[(i64)s * a.rows() + row] = out[s];
}

// --- product -----------------------------------------------------------------------------------------------

// x y' + y x' over the stored halves, in units of the scales; rows of `right` begin at `first_right`.
VIDOPS_DEVICE Product cross_product(const DistanceArgs& a, int first_right) {
  Product product;
  product.left = a.planes;
  product.right = a.planes + (i64)first_right * a.stride;
  product.left_plane = product.right_plane = a.plane;
  product.stride = product.columns = a.stride;
  product.terms = a.halves == 2 ? 6 : 2;
  product.left_code = a.halves == 2 ? 0x321010 : 0x10;
  product.right_code = a.halves == 2 ? 0x012301 : 0x01;
  return product;
}

// --- decisions ---------------------------------------------------------------------------------------------

enum Decision { kFar, kNear, kOpen };

struct Threshold {
  float tau, cross_rounding, rounding, slack;
  Unscale unscale;

  // `more_sums`: additions that make a product entry of several tiles.
  VIDOPS_DEVICE Threshold(const DistanceArgs& a, float tau_, int more_sums) : tau(tau_), unscale(a) {
    const int chunks = (a.stride + kTileChunk - 1) / kTileChunk * (a.halves == 2 ? 6 : 2);
    const float sums = (float)(chunks / kFilterFlush + 4 + more_sums);
    cross_rounding = (tile_rounding(kFilterFlush) + sums * kUnit) * 1.01f;
    // Direct form and self terms; the rest covers the rounding of x and y and of the last few operations.
    rounding = (float)(a.cols / 128 + a.cols / kPackThreads + 64) * kUnit;
    slack = 4 * kUnit * magnitude(tau) + 1e-30f;
  }

  // i and j point to the first stat of a row, the others follow at `pitch`.
  VIDOPS_DEVICE Decision operator()(float product, const float* i, int i_pitch, const float* j,
                                    int j_pitch) const {
    const float self = i[0] + j[0];
    if (self != self) return kFar;
    const float map_i = i[kMapNorm * i_pitch], map_j = j[kMapNorm * j_pitch];
    const float log_i = i[kLogNorm * i_pitch], log_j = j[kLogNorm * j_pitch];
    float band = map_i * j[kLogError * j_pitch] + map_j * i[kLogError * i_pitch];
    band += i[kMapError * i_pitch] * log_j + j[kMapError * j_pitch] * log_i;
    band += i[kMapRest * i_pitch] * j[kLogRest * j_pitch] + j[kMapRest * j_pitch] * i[kLogRest * i_pitch];
    band += (map_i * log_j + map_j * log_i) * cross_rounding;
    band += (map_i + map_j) * (log_i + log_j) * rounding + slack;
    const float gap = self - unscale(product) - tau;
    if (!(magnitude(gap) > band)) return kOpen;  // so is everything that is not a number
    return gap < 0 ? kNear : kFar;
  }
};

// D of two rows by its definition, the same in all lanes of the warp that calls. Symmetric in the rows,
// without the cancellation of the product form, and added in an order that depends on the number of columns
// alone.
VIDOPS_DEVICE float direct_distance(const MapRows& a, i64 i, const MapRows& b, i64 j, int cols) {
  const float* map_i = a.map + i * a.map_stride;
  const float* log_i = a.log + i * a.log_stride;
  const float* map_j = b.map + j * b.map_stride;
  const float* log_j = b.log + j * b.log_stride;
  float sum[4] = {};
  int base = lane_id();
  for (; base + 3 * kWarp < cols; base += 4 * kWarp)
    VIDOPS_UNROLL
    for (int u = 0; u < 4; ++u) {
      const int c = base + u * kWarp;
      sum[u] = multiply_add(map_i[c] - map_j[c], log_i[c] - log_j[c], sum[u]);
    }
  for (int u = 0; u < 3; ++u) {
    const int c = base + u * kWarp;
    if (c < cols) sum[u] = multiply_add(map_i[c] - map_j[c], log_i[c] - log_j[c], sum[u]);
  }
  return warp_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

}  // namespace vidops::cuda
