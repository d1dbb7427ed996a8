// Slot attention beside its passes over the tokens, forward and backward: products of rows of slots with weights,
// norms, gates, and what folds the affine of the inputs' norm into the projections of the tokens.
//
// Products are of float32 accuracy on tensor cores (split_products.cuh). These truncate when they add: so the small
// terms are added apart, and what a stage sums up moves on into a sum that is rounded. What splitting cannot give,
// infinities and overflow, shows as a result that is not finite; the thread that finds one computes its part again on
// the ordinary units.
#include "split_products.cuh"

namespace vidops::cuda {

constexpr int kStepTile = 64;      // rows of a block's part of a product; columns: as many, or half
constexpr int kStepDepth = 32;     // of the summed axis, at a stage
constexpr int kStepStages = 3;
constexpr int kStepThreads = 128;  // four warps, 32 rows by half of the columns each
// Pitch of an operand of so many lines in shared memory, with the summed axis inside or outside: fragments lie in
// different banks. Then its size; both in floats.
template <bool kIsInner, int kLines>
constexpr int kStepPitch = kIsInner ? kStepDepth + 4 : kLines + 8;
template <bool kIsInner, int kLines>
constexpr int kStepOperand = (kIsInner ? kLines : kStepDepth) * kStepPitch<kIsInner, kLines>;
template <bool kAInner, bool kBInner, int kColumns>
constexpr int kStepShared = 4 * kStepStages * (kStepOperand<kAInner, kStepTile> + kStepOperand<kBInner, kColumns>);
constexpr int kStepRowThreads = 256;  // of kernels that give a row to a warp, or an entry to a thread
constexpr int kStepColumns = 32;      // of a block that sums over rows
constexpr int kConvertJobs = 24;

enum class StepForm : int { none, relu, gelu, relu_grad, gelu_grad };

// out (m,n) = form(scale (a b + factor bias)) + add
struct SlotProductArgs {
  const float* a;
  const float* b;
  int m, n, k;
  bool a_whole, b_whole;  // lines can be copied in aligned pieces of 16 bytes
  int splits, share;      // parts of the summed axis, and their length: a multiple of kStepDepth, or all
  const float* bias;      // n, or null
  const float* factor;    // m: of the bias; null: 1
  float scale;
  StepForm form;
  const float* gate;  // (m,n): what an activation's gradient is taken at
  float* before;      // (m,n): what the activation is applied to, or null
  const float* add;   // (m,n), or null
  float* out;
  // slot_product_tn gives parts of a b and nothing else: out has [splits][part] ...
  i64 part;
  // ... and, after the product of a part, sums over a's rows, each by its weight (null: 1).
  bool sums;
  const float* row_weight;
};

struct SlotPartsArgs {
  const float* parts;  // [splits][stride], of which the first entries are summed
  int splits;
  i64 stride, count, more_count;
  float* out;   // count, or null
  float* more;  // the next more_count, or null
  bool add;     // to what is there
};

struct SlotNormArgs {
  const float* x;
  i64 rows;
  int width;
  const float* weight;
  const float* bias;
  float eps;
  float* out;
  float* mean;  // of the rows, or null
  float* rstd;
};

struct SlotNormGradArgs {
  const float* x;
  const float* mean;
  const float* rstd;
  const float* weight;
  const float* grad;  // of the norm's result
  i64 rows;
  int width, share;  // share: rows of a block
  float* into;       // the gradient of x is added to it
  float* parts;      // [blocks][2][width]: of weight and bias, or null
};

struct SlotDotsArgs {
  const float* x;
  const float* vector;
  i64 rows;
  int width;
  float* out;
};

// num and den become num / (den + constant), den / (den + constant).
struct SlotMeanArgs {
  float* num;
  float* den;
  float* total;  // den + constant
  i64 rows;
  int width;
  float constant;
};

struct SlotGatesArgs {
  float* from_update;  // (rows, 3 width); a gradient overwrites them
  float* from_slots;
  const float* slots;
  i64 rows;
  int width;
  float* out;  // the new slots, or the gradient, of which what reaches the slots directly remains
};

// Gradients of num and den from that of mean_row, which becomes that of num.
struct SlotGatherGradArgs {
  float* grad_row;
  const float* mean_row;
  const float* weight;
  const float* total;
  const float* grad_heads;
  const float* value_bias;  // or null
  i64 rows;
  int width, heads_width;
  float* grad_den;
};

// A projection (outs, width) of the tokens with the affine of their norm.
struct SlotFold {
  const float* weight;
  const float* bias;
  int outs;
  float* folded;       // null: without a scale it is the weight
  float* folded_bias;  // or null
};
struct SlotFoldArgs {
  SlotFold part[2];
  const float* scale;
  const float* shift;
  int width;
};

// Back from the gradients of what was folded, which are overwritten.
struct SlotUnfold {
  const float* weight;
  float* grad;
  const float* bias_grad;  // or null
  int outs;
};
struct SlotUnfoldArgs {
  SlotUnfold part[2];
  const float* scale;
  const float* shift;
  int width;
  float* scale_grad;
  float* shift_grad;
};

struct SlotTokenGradArgs {
  const void* x;
  i64 batch, row;  // strides in elements
  int n, channels;
  i64 rows;
  bool whole;  // rows can be accessed four channels at a time
  int lanes;   // of a warp that share a token, a power of two
  const float* mean;
  const float* rstd;
  const float* grad;  // of the normalised rows, contiguous
  void* out;          // in the dtype of x, contiguous; may be grad
};

enum class StepCast : int { none, from_half, from_bfloat, to_half, to_bfloat };
struct SlotConvert {
  const void* from;
  void* to;
  i64 count;
  StepCast cast;
};
struct SlotConvertArgs {
  SlotConvert job[kConvertJobs];
};

namespace {

// --- products ---------------------------------------------------------------------------------------------------
// One stage of an operand: lines of the result from `first` on, of `count`, and the summed axis from `from` on, up to
// `end`. What does not exist is zero. kIsInner: the summed axis is the contiguous one.
template <bool kIsInner, int kLines>
VIDOPS_DEVICE void load_operand(float* to, const float* data, bool whole, int first, int count, int from, int end,
                                int depth) {
  constexpr int kPieces = (kIsInner ? kStepDepth : kLines) / 4, kPitch = kStepPitch<kIsInner, kLines>;
  const int line = kIsInner ? first : from, line_end = kIsInner ? count : end;
  const int column = kIsInner ? from : first, column_end = kIsInner ? end : count;
  const int width = kIsInner ? depth : count;
  VIDOPS_UNROLL
  for (int i = 0; i < kLines * kStepDepth / 4 / kStepThreads; ++i) {
    const int place = thread_x() + i * kStepThreads, down = place / kPieces, across = place % kPieces * 4;
    const bool in_line = line + down < line_end;
    float* cell = to + down * kPitch + across;
    const float* source = data + (i64)(line + down) * width + column + across;
    if (whole) {
      const bool there = in_line && column + across < column_end;
      copy_async(cell, there ? source : data, there);
      continue;
    }
    VIDOPS_UNROLL
    for (int e = 0; e < 4; ++e) cell[e] = in_line && column + across + e < column_end ? source[e] : 0.0f;
  }
}

template <bool kIsInner, int kLines>
VIDOPS_DEVICE float operand(const float* tile, int line, int depth) {
  constexpr int kPitch = kStepPitch<kIsInner, kLines>;
  return kIsInner ? tile[line * kPitch + depth] : tile[depth * kPitch + line];
}

template <bool kIsInner>
VIDOPS_DEVICE float operand_in_memory(const float* data, int line, int depth, int count, int summed) {
  return kIsInner ? data[(i64)line * summed + depth] : data[(i64)depth * count + line];
}

VIDOPS_DEVICE float normal_share(float v) { return 0.5f * (1.0f + error_function(v * 0.70710678118654752f)); }

template <bool kParts>
VIDOPS_DEVICE void finish_product(const SlotProductArgs& a, int split, int row, int column, float v) {
  if (row >= a.m || column >= a.n) return;
  const i64 at = (i64)row * a.n + column;
  if (kParts) {
    a.out[split * a.part + at] = v;
    return;
  }
  if (a.bias) v += a.bias[column] * (a.factor ? a.factor[row] : 1.0f);
  v *= a.scale;
  if (a.before) a.before[at] = v;
  // NaN stays what it is.
  if (a.form == StepForm::relu) v = v < 0 ? 0.0f : v;
  if (a.form == StepForm::gelu) v *= normal_share(v);
  if (a.form == StepForm::relu_grad) v = a.gate[at] <= 0 ? 0.0f : v;
  if (a.form == StepForm::gelu_grad) {
    const float x = a.gate[at];
    v *= normal_share(x) + x * exponential(-0.5f * x * x) * 0.39894228040143268f;
  }
  if (a.add) v += a.add[at];
  a.out[at] = v;
}

// A warp's sums; a lane has rows lane / 4 + 16 i + e / 2 * 8 and columns lane % 4 * 2 + 8 j + e % 2.
template <bool kAInner, bool kBInner, int kColumns>
VIDOPS_DEVICE void slot_product(const SlotProductArgs& a) {
  constexpr bool kParts = !kAInner;  // weights' gradients
  constexpr int kStrips = kColumns / 16;  // of a warp, eight columns each
  constexpr int kLeft = kStepOperand<kAInner, kStepTile>, kStage = kLeft + kStepOperand<kBInner, kColumns>;
  VIDOPS_SHARED(memory);
  float* stages = reinterpret_cast<float*>(memory);
  const int columns = (a.n + kColumns - 1) / kColumns, split = (int)block_y();
  const int first_row = (int)(block_x() / (u32)columns) * kStepTile;
  const int first_column = (int)(block_x() % (u32)columns) * kColumns;
  const int begin = split * a.share, end = begin + a.share < a.k ? begin + a.share : a.k;
  const auto load = [&](int from, int stage) {
    if (from < end) {
      float* to = stages + stage * kStage;
      load_operand<kAInner, kStepTile>(to, a.a, a.a_whole, first_row, a.m, from, end, a.k);
      load_operand<kBInner, kColumns>(to + kLeft, a.b, a.b_whole, first_column, a.n, from, end, a.k);
    }
    copy_commit();
  };
  VIDOPS_UNROLL
  for (int s = 0; s < kStepStages - 1; ++s) load(begin + s * kStepDepth, s);

  const int group = lane_id() / 4, place = lane_id() % 4;
  const int row = warp_id() / 2 * 32 + group, column = warp_id() % 2 * (kColumns / 2) + group;
  float sum[2][kStrips][4] = {}, column_sum = 0;
  int stage = 0;
  VIDOPS_NO_UNROLL
  for (int from = begin; from < end; from += kStepDepth) {
    copy_wait<kStepStages - 2>();
    block_sync();
    load(from + (kStepStages - 1) * kStepDepth, (stage + kStepStages - 1) % kStepStages);
    const float* left = stages + stage * kStage;
    const float* right = left + kLeft;
    float run[2][kStrips][4] = {}, small[2][kStrips][4] = {};
    VIDOPS_UNROLL
    for (int eight = 0; eight < kStepDepth; eight += 8) {
      const int depth = eight + place;
      SplitFloats x[2];
      VIDOPS_UNROLL
      for (int i = 0; i < 2; ++i)
        VIDOPS_UNROLL
        for (int e = 0; e < 4; ++e)
          x[i].set(e, operand<kAInner, kStepTile>(left, row + i * 16 + e % 2 * 8, depth + e / 2 * 4));
      VIDOPS_UNROLL
      for (int j = 0; j < kStrips; ++j) {
        const SplitPair y(operand<kBInner, kColumns>(right, column + j * 8, depth),
                          operand<kBInner, kColumns>(right, column + j * 8, depth + 4));
        VIDOPS_UNROLL
        for (int i = 0; i < 2; ++i) multiply_split(run[i][j], small[i][j], x[i], y);
      }
    }
    VIDOPS_UNROLL
    for (int i = 0; i < 2; ++i)
      VIDOPS_UNROLL
      for (int j = 0; j < kStrips; ++j)
        VIDOPS_UNROLL
        for (int e = 0; e < 4; ++e) sum[i][j][e] += run[i][j][e] + small[i][j][e];
    if (kParts && a.sums && first_column == 0 && thread_x() < kStepTile) {
      const int count = end - from < kStepDepth ? end - from : kStepDepth;
      VIDOPS_UNROLL_BY(8)
      for (int depth = 0; depth < count; ++depth) {
        const float v = operand<kAInner, kStepTile>(left, thread_x(), depth);
        column_sum += a.row_weight ? v * a.row_weight[from + depth] : v;
      }
    }
    stage = (stage + 1) % kStepStages;
  }
  copy_wait<0>();

  const int out_row = first_row + row, out_column = first_column + column - group + place * 2;
  bool fine = true;
  VIDOPS_UNROLL
  for (int i = 0; i < 2; ++i)
    VIDOPS_UNROLL
    for (int j = 0; j < kStrips; ++j)
      VIDOPS_UNROLL
      for (int e = 0; e < 4; ++e) fine = fine && finite(sum[i][j][e]);
  if (fine) {
    VIDOPS_UNROLL
    for (int i = 0; i < 2; ++i)
      VIDOPS_UNROLL
      for (int j = 0; j < kStrips; ++j)
        VIDOPS_UNROLL
        for (int e = 0; e < 4; ++e)
          finish_product<kParts>(a, split, out_row + i * 16 + e / 2 * 8, out_column + j * 8 + e % 2, sum[i][j][e]);
  } else {
    VIDOPS_NO_UNROLL
    for (int at = 0; at < 8 * kStrips; ++at) {
      const int r = out_row + at / (4 * kStrips) * 16 + at / 2 % 2 * 8, c = out_column + at / 4 % kStrips * 8 + at % 2;
      float v = 0;
      VIDOPS_NO_UNROLL
      for (int k = begin; r < a.m && c < a.n && k < end; ++k)
        v = multiply_add(operand_in_memory<kAInner>(a.a, r, k, a.m, a.k),
                         operand_in_memory<kBInner>(a.b, c, k, a.n, a.k), v);
      finish_product<kParts>(a, split, r, c, v);
    }
  }
  if (kParts && a.sums && first_column == 0 && thread_x() < kStepTile && first_row + thread_x() < a.m)
    a.out[split * a.part + (i64)a.m * a.n + first_row + thread_x()] = column_sum;
}

// --- rows -------------------------------------------------------------------------------------------------------
VIDOPS_DEVICE i64 warp_row() { return (i64)block_x() * (kStepRowThreads / kWarp) + warp_id(); }
VIDOPS_DEVICE i64 thread_entry() { return (i64)block_x() * kStepRowThreads + thread_x(); }

// Sum over the channels of a row, the same in all lanes of its warp.
template <class F>
VIDOPS_DEVICE float row_sum(int width, F&& of) {
  float v = 0;
  VIDOPS_UNROLL_BY(4)
  for (int c = lane_id(); c < width; c += kWarp) v += of(c);
  return warp_sum(v);
}

struct StepGates {
  float reset, keep, recurrent, candidate;

  VIDOPS_DEVICE StepGates(const SlotGatesArgs& a, i64 row, int c) {
    const float* u = a.from_update + row * 3 * a.width + c;
    const float* s = a.from_slots + row * 3 * a.width + c;
    reset = logistic(u[0] + s[0]), keep = logistic(u[a.width] + s[a.width]);
    recurrent = s[2 * a.width];
    candidate = hyperbolic_tangent(u[2 * a.width] + reset * recurrent);
  }
  static VIDOPS_DEVICE float logistic(float v) { return 1.0f / (1.0f + exponential(-v)); }
};

template <class Storage>
VIDOPS_DEVICE void store(typename Storage::Element* to, float v);
template <>
VIDOPS_DEVICE void store<FloatStorage>(float* to, float v) { *to = v; }
template <>
VIDOPS_DEVICE void store<HalfStorage>(u16* to, float v) { *to = float_to_half(v); }
template <>
VIDOPS_DEVICE void store<BfloatStorage>(u16* to, float v) { *to = (u16)(pack_bfloat(v, 0) & 0xffffu); }

// The gradient of tokens before their norm, from that after it; lanes share a token.
template <class Storage>
VIDOPS_DEVICE void token_grad(const SlotTokenGradArgs& a) {
  using Element = typename Storage::Element;
  const i64 at = thread_entry() / a.lanes, token = at < a.rows ? at : a.rows - 1;  // all lanes take part in the sums
  const int lane = lane_id() % a.lanes;
  const Element* x = static_cast<const Element*>(a.x) + token / a.n * a.batch + token % a.n * a.row;
  const float* grad = a.grad + token * a.channels;
  Element* out = static_cast<Element*>(a.out) + token * a.channels;
  const float mean = a.mean[token], rstd = a.rstd[token], count = (float)a.channels;
  float plain = 0, along = 0;
  const auto add = [&](float g, float v) { plain += g, along += g * ((v - mean) * rstd); };
  const int quads = a.whole ? a.channels / 4 : 0;
  VIDOPS_UNROLL_BY(4)
  for (int quad = lane; quad < quads; quad += a.lanes) {
    const FloatQuad v = load_quad<Storage>(reinterpret_cast<const char*>(x), quad), g = load_floats(grad + quad * 4);
    VIDOPS_UNROLL
    for (int e = 0; e < 4; ++e) add(g.v[e], v.v[e]);
  }
  for (int c = quads * 4 + lane; c < a.channels; c += a.lanes) add(grad[c], Storage::value(x[c]));
  for (int mask = a.lanes / 2; mask; mask /= 2) plain += shuffle_xor(plain, mask), along += shuffle_xor(along, mask);
  if (at != token) return;
  plain /= count, along /= count;
  const auto result = [&](float g, float v) { return rstd * (g - plain - (v - mean) * rstd * along); };
  VIDOPS_UNROLL_BY(4)
  for (int quad = lane; quad < quads; quad += a.lanes) {
    const FloatQuad v = load_quad<Storage>(reinterpret_cast<const char*>(x), quad), g = load_floats(grad + quad * 4);
    typename Storage::Quad r;
    VIDOPS_UNROLL
    for (int e = 0; e < 4; ++e) store<Storage>(&r.v[e], result(g.v[e], v.v[e]));
    reinterpret_cast<typename Storage::Quad*>(out)[quad] = r;
  }
  for (int c = quads * 4 + lane; c < a.channels; c += a.lanes)
    store<Storage>(out + c, result(grad[c], Storage::value(x[c])));
}

}  // namespace

VIDOPS_KERNEL(kStepThreads, 3) slot_product_nt_32(SlotProductArgs a) { slot_product<true, true, 32>(a); }
VIDOPS_KERNEL(kStepThreads, 2) slot_product_nt_64(SlotProductArgs a) { slot_product<true, true, 64>(a); }
VIDOPS_KERNEL(kStepThreads, 3) slot_product_nn_32(SlotProductArgs a) { slot_product<true, false, 32>(a); }
VIDOPS_KERNEL(kStepThreads, 2) slot_product_nn_64(SlotProductArgs a) { slot_product<true, false, 64>(a); }
VIDOPS_KERNEL(kStepThreads, 3) slot_product_tn_32(SlotProductArgs a) { slot_product<false, false, 32>(a); }
VIDOPS_KERNEL(kStepThreads, 2) slot_product_tn_64(SlotProductArgs a) { slot_product<false, false, 64>(a); }

// Sums of parts, in their order.
VIDOPS_KERNEL(kStepRowThreads) slot_parts(SlotPartsArgs a) {
  const i64 at = thread_entry();
  if (at >= a.count + a.more_count) return;
  float* out = at < a.count ? a.out : a.more;
  if (!out) return;
  out += at < a.count ? at : at - a.count;
  float sum = 0;
  VIDOPS_UNROLL_BY(16)
  for (int s = 0; s < a.splits; ++s) sum += a.parts[s * a.stride + at];
  *out = a.add ? *out + sum : sum;
}

VIDOPS_KERNEL(kStepRowThreads) slot_norm(SlotNormArgs a) {
  const i64 row = warp_row();
  if (row >= a.rows) return;
  const float* x = a.x + row * a.width;
  const float count = (float)a.width;
  const float mean = row_sum(a.width, [&](int c) { return x[c]; }) / count;
  const float variance = row_sum(a.width, [&](int c) { return (x[c] - mean) * (x[c] - mean); }) / count;
  float rstd = 1.0f / square_root(variance + a.eps);
  // Slots whose variance overflows become NaN, as with PyTorch on other backends.
  if (rstd == 0) rstd = bits_float(0x7fc00000u);
  VIDOPS_UNROLL_BY(4)
  for (int c = lane_id(); c < a.width; c += kWarp)
    a.out[row * a.width + c] =
        (x[c] - mean) * rstd * (a.weight ? a.weight[c] : 1.0f) + (a.bias ? a.bias[c] : 0.0f);
  if (!a.mean || lane_id() != 0) return;
  a.mean[row] = mean, a.rstd[row] = rstd;
}

VIDOPS_KERNEL(kStepRowThreads) slot_norm_grad(SlotNormGradArgs a) {
  const i64 first = (i64)block_x() * a.share, end = first + a.share < a.rows ? first + a.share : a.rows;
  const float count = (float)a.width;
  for (i64 row = first + warp_id(); row < end; row += kStepRowThreads / kWarp) {
    const float* x = a.x + row * a.width;
    const float* grad = a.grad + row * a.width;
    const float mean = a.mean[row], rstd = a.rstd[row];
    const auto scaled = [&](int c) { return a.weight ? grad[c] * a.weight[c] : grad[c]; };
    const float plain = row_sum(a.width, scaled) / count;
    const float along = row_sum(a.width, [&](int c) { return scaled(c) * ((x[c] - mean) * rstd); }) / count;
    VIDOPS_UNROLL_BY(4)
    for (int c = lane_id(); c < a.width; c += kWarp)
      a.into[row * a.width + c] += rstd * (scaled(c) - plain - (x[c] - mean) * rstd * along);
  }
  if (!a.parts) return;
  for (int c = thread_x(); c < a.width; c += kStepRowThreads) {
    float weight = 0, bias = 0;
    VIDOPS_UNROLL_BY(8)
    for (i64 row = first; row < end; ++row) {
      const float g = a.grad[row * a.width + c];
      weight += g * ((a.x[row * a.width + c] - a.mean[row]) * a.rstd[row]), bias += g;
    }
    float* part = a.parts + (i64)block_x() * 2 * a.width + c;
    part[0] = weight, part[a.width] = bias;
  }
}

VIDOPS_KERNEL(kStepRowThreads) slot_dots(SlotDotsArgs a) {
  const i64 row = warp_row();
  if (row >= a.rows) return;
  const float dot = row_sum(a.width, [&](int c) { return a.x[row * a.width + c] * a.vector[c]; });
  if (lane_id() == 0) a.out[row] = dot;
}

VIDOPS_KERNEL(kStepRowThreads) slot_mean(SlotMeanArgs a) {
  const i64 row = warp_row();
  if (row >= a.rows) return;
  const float den = a.den[row], total = den + a.constant;
  warp_sync();  // all lanes have read it
  VIDOPS_UNROLL_BY(4)
  for (int c = lane_id(); c < a.width; c += kWarp) a.num[row * a.width + c] /= total;
  if (lane_id() != 0) return;
  a.den[row] = den / total, a.total[row] = total;
}

VIDOPS_KERNEL(kStepRowThreads) slot_gates(SlotGatesArgs a) {
  const i64 at = thread_entry(), row = at / a.width;
  if (row >= a.rows) return;
  const StepGates g(a, row, (int)(at % a.width));
  a.out[at] = (1.0f - g.keep) * g.candidate + g.keep * a.slots[at];
}

VIDOPS_KERNEL(kStepRowThreads) slot_gates_grad(SlotGatesArgs a) {
  const i64 at = thread_entry(), row = at / a.width;
  if (row >= a.rows) return;
  const int c = (int)(at % a.width);
  const StepGates g(a, row, c);
  const float grad = a.out[at];
  const float candidate = grad * (1.0f - g.keep) * (1.0f - g.candidate * g.candidate);
  const float keep = grad * (a.slots[at] - g.candidate) * (1.0f - g.keep) * g.keep;
  const float reset = candidate * g.recurrent * (1.0f - g.reset) * g.reset;
  float* u = a.from_update + row * 3 * a.width + c;
  float* s = a.from_slots + row * 3 * a.width + c;
  u[0] = s[0] = reset, u[a.width] = s[a.width] = keep;
  u[2 * a.width] = candidate, s[2 * a.width] = candidate * g.reset;
  a.out[at] = grad * g.keep;
}

VIDOPS_KERNEL(kStepRowThreads) slot_gather_grad(SlotGatherGradArgs a) {
  const i64 row = warp_row();
  if (row >= a.rows) return;
  float* grad = a.grad_row + row * a.width;
  const float total = a.total[row];
  float of_weight = 0;
  if (a.value_bias) {
    const float* heads = a.grad_heads + row * a.heads_width;
    of_weight = row_sum(a.heads_width, [&](int c) { return heads[c] * a.value_bias[c]; });
  }
  const float along = row_sum(a.width, [&](int c) { return grad[c] * a.mean_row[row * a.width + c]; });
  VIDOPS_UNROLL_BY(4)
  for (int c = lane_id(); c < a.width; c += kWarp) grad[c] /= total;
  if (lane_id() == 0) a.grad_den[row] = (of_weight - (along + of_weight * a.weight[row])) / total;
}

// One warp per row of a projection.
VIDOPS_KERNEL(kStepRowThreads) slot_fold(SlotFoldArgs a) {
  const SlotFold& p = a.part[block_y()];
  const i64 row = warp_row();
  if (row >= p.outs) return;
  const float* weight = p.weight + row * a.width;
  if (p.folded)
    for (int c = lane_id(); c < a.width; c += kWarp) p.folded[row * a.width + c] = weight[c] * a.scale[c];
  if (!p.folded_bias) return;
  const float shift = a.shift ? row_sum(a.width, [&](int c) { return weight[c] * a.shift[c]; }) : 0.0f;
  if (lane_id() == 0) p.folded_bias[row] = (p.bias ? p.bias[row] : 0.0f) + shift;
}

// Threads share columns; each has every eighth row of both projections.
VIDOPS_KERNEL(kStepRowThreads) slot_unfold(SlotUnfoldArgs a) {
  VIDOPS_SHARED(memory);
  float* sums = reinterpret_cast<float*>(memory);  // [2][warps][columns]
  constexpr int kWarps = kStepRowThreads / kWarp, kSums = kWarps * kStepColumns;
  const int c = (int)block_x() * kStepColumns + lane_id();
  float of_scale = 0, of_shift = 0;
  VIDOPS_UNROLL
  for (int p = 0; p < 2; ++p) {
    const SlotUnfold& part = a.part[p];
    if (c >= a.width) break;
    VIDOPS_UNROLL_BY(4)
    for (int o = warp_id(); o < part.outs; o += kWarps) {
      const i64 at = (i64)o * a.width + c;
      const float weight = part.weight[at], grad = part.grad[at];
      float through = grad;
      if (a.scale) of_scale += grad * weight, through *= a.scale[c];
      if (a.shift) of_shift += part.bias_grad[o] * weight, through += part.bias_grad[o] * a.shift[c];
      part.grad[at] = through;
    }
  }
  sums[warp_id() * kStepColumns + lane_id()] = of_scale;
  sums[kSums + warp_id() * kStepColumns + lane_id()] = of_shift;
  block_sync();
  if (warp_id() != 0 || c >= a.width) return;
  float scale = 0, shift = 0;
  for (int w = 0; w < kWarps; ++w)
    scale += sums[w * kStepColumns + lane_id()], shift += sums[kSums + w * kStepColumns + lane_id()];
  if (a.scale_grad) a.scale_grad[c] = scale;
  if (a.shift_grad) a.shift_grad[c] = shift;
}

VIDOPS_KERNEL(kStepRowThreads) slot_token_grad_f32(SlotTokenGradArgs a) { token_grad<FloatStorage>(a); }
VIDOPS_KERNEL(kStepRowThreads) slot_token_grad_f16(SlotTokenGradArgs a) { token_grad<HalfStorage>(a); }
VIDOPS_KERNEL(kStepRowThreads) slot_token_grad_bf16(SlotTokenGradArgs a) { token_grad<BfloatStorage>(a); }

// Tensors of one dtype from those of another, a row of blocks each.
VIDOPS_KERNEL(kStepRowThreads) slot_convert(SlotConvertArgs a) {
  const SlotConvert& job = a.job[block_y()];
  const i64 at = thread_entry();
  if (at >= job.count) return;
  const float* floats = static_cast<const float*>(job.from);
  const u16* words = static_cast<const u16*>(job.from);
  float* out = static_cast<float*>(job.to);
  u16* out_words = static_cast<u16*>(job.to);
  switch (job.cast) {
    case StepCast::none: out[at] = floats[at]; break;
    case StepCast::from_half: out[at] = half_to_float(words[at]); break;
    case StepCast::from_bfloat: out[at] = bfloat_to_float(words[at]); break;
    case StepCast::to_half: store<HalfStorage>(out_words + at, floats[at]); break;
    case StepCast::to_bfloat: store<BfloatStorage>(out_words + at, floats[at]); break;
  }
}

}  // namespace vidops::cuda
