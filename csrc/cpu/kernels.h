// The inner loops, one table per element type and instruction set. Everything here works on plain pointers.
#pragma once

#include <cstdint>

#include "vidops/cpu_isa.h"

namespace vidops::cpu {

// What one row brings to the error bound of a distance; x' is x minus its column centre, |.| the Euclidean
// norm.
template <class T>
struct RowStats {
  double self;  // sum p' l'
  T p_norm, l_norm;
  T p_error, l_error;  // |bf16(x') - x'|, zero where it was not asked for
};

// The thresholding of one tile row. Arrays are indexed by column, the `row_` values belong to the row.
template <class T>
struct Threshold {
  const T *self, *p_norm, *l_total, *p_error, *l_weight, *base;
  T row_self, row_p_norm, row_l_total, row_p_error, row_l_weight, row_base;
  T tau;
};

// How far packed operands are from what was packed: not at all; by what row_stats measures; by at most 2^-17
// of every element (split into two bf16, which also covers the product of the two small parts, left out).
enum class OperandError { none, measured, split };

// A packed matrix product C = A B^T. A is cut into panels of mr rows, B into panels of nr rows; a panel holds
// all K columns (a multiple of k_align; the padding is zero), so a panel takes mr * K (nr * K) elements of
// `elem` bytes.
template <class T>
struct Gemm {
  int mr, nr, k_align, elem;
  // A sum over K columns is within (depth + K/depth + 32) eps of exact, relative to the sum of magnitudes.
  int depth;
  OperandError operand_error;
  // Writes columns [k0, k0+width) of a panel of `count` given rows minus `centre` (may be null); zero-fills
  // the rest of the rows and the columns up to round_up(width, k_align).
  void (*pack_a)(const T* const* rows, int count, int64_t width, const T* centre, T scale, int64_t k0,
                 void* panel);
  void (*pack_b)(const T* const* rows, int count, int64_t width, const T* centre, T scale, int64_t k0,
                 void* panel);
  // c: (a_panels*mr, b_panels*nr), row pitch ldc, overwritten.
  void (*run)(int64_t a_panels, int64_t b_panels, int64_t k, const void* a, const void* b, T* c, int64_t ldc);
  // The same for the first half of the columns of every panel of B, which is all that a last panel may hold; null where
  // that is not faster. Elements have the same bits.
  void (*run_half)(int64_t a_panels, int64_t b_panels, int64_t k, const void* a, const void* b, T* c, int64_t ldc);
  // The same panels from a k-major source: source row k holds column k of every packed row.
  void (*pack_a_kmajor)(const T* source, int64_t pitch, int count, int64_t k, void* panel);
  void (*pack_b_kmajor)(const T* source, int64_t pitch, int count, int64_t k, void* panel);
};

constexpr int kMaxDots = 4;  // no tile of dot products is higher or wider
// Slot attention works on tiles of up to kSlotTile tokens. A map is (rows, kSlotTile), a row being one slot of one
// head; columns beyond the tile's tokens, up to a multiple of `lanes`, hold copies of its last token.
constexpr int64_t kSlotTile = 64;

// `lanes` rows of x, of which `count` exist (the last stands for the rest), become columns of (x - mean) * rstd. mean
// and rstd are `lanes` long; null: 0 and 1.
template <class T>
struct SlotStrip {
  const T* x;
  int64_t pitch, count, width;
  const T *mean, *rstd;
  T* columns;
  int64_t column_pitch;
};

// One softmax over `rows` rows of a map of dots. The map becomes the weights (a + eps) * mask times rstd, `attn` gets a
// itself. `total` (rows, lanes) += the weights; the sum over its lanes is that over the tokens.
template <class T>
struct SlotSoftmax {
  T* map;
  int64_t rows, tokens;
  const T* const* mask;  // per row the tile's mask; null: all one
  const T* rstd;
  T eps;
  T *attn, *total;  // attn null: not wanted
};

// Its backward: `map` turns from dots to their gradient, `scaled` gets that times rstd, `grad` turns from the gradient
// of the weights to the weights. `total` is that of the gradients of the dots.
template <class T>
struct SlotSoftmaxGrad {
  T *map, *grad, *scaled;
  int64_t rows, tokens;
  const T* const* mask;
  const T* rstd;
  T eps;
  const T *grad_attn, *grad_dots;  // null: zero
  T* total;
};

template <class T>
struct SlotKernels {
  int lanes, panel, block;
  int64_t block_pitch;
  void (*strip)(const SlotStrip<T>& s);
  // The left operand of `dots`: per block of rows a panel (width, block_pitch).
  void (*pack_left)(const T* x, int64_t rows, int64_t width, T* packed);
  // map = left right + bias; right: panels (depth, panel) of transposed tokens. As many rows from `ahead` on are
  // fetched into the cache, whether they exist or not: the next tile, which would else be waited for.
  void (*dots)(int64_t rows, int64_t depth, const T* left, const T* bias, int64_t tokens, const T* right,
               const T* ahead, int64_t ahead_pitch, T* map);
  // out += map (x - centre), a centre per token; x and out reach up to a multiple of `panel` columns
  void (*sum)(int64_t rows, int64_t tokens, const T* map, const T* centre, const T* x, int64_t pitch, int64_t width,
              T* out, int64_t out_pitch);
  // grad = map^T left, or added to it; left reaches up to a multiple of `panel` columns
  void (*spread)(int64_t rows, int64_t tokens, const T* map, const T* left, int64_t left_pitch, int64_t width, T* grad,
                 int64_t pitch, bool add);
  void (*softmax)(const SlotSoftmax<T>& s);
  void (*softmax_grad)(const SlotSoftmaxGrad<T>& s);
  // Of up to `lanes` rows, as a LayerNorm takes them.
  void (*moments)(const T* x, int64_t pitch, int64_t count, int64_t width, T eps, T* mean, T* rstd);
  // `strip` of rows whose statistics it finds first, `lanes` of each; those that s has are not looked at.
  void (*strip_moments)(const SlotStrip<T>& s, T eps, T* mean, T* rstd);
};

// The rest of slot attention.
template <class T>
struct SideKernels {
  // out = a b + bias, and + out if `add`, of whole panels of a Gemm, at most as deep as its `depth`; bias may be null
  void (*product)(int64_t a_panels, int64_t b_panels, int64_t k, const T* a, const T* b, const T* bias, bool add,
                  T* out, int64_t pitch);
  // out = tile + bias, and + out if `add`; bias may be null
  void (*finish)(const T* tile, int64_t tile_pitch, int64_t rows, int64_t columns, const T* bias, bool add, T* out,
                 int64_t pitch);
  // tile = a b of a few rows a; b is read as it lies, row by row
  void (*few_rows)(int64_t rows, int64_t columns, int64_t k, const T* a, int64_t a_pitch, const T* b, int64_t b_pitch,
                   T* tile, int64_t tile_pitch);
  // One row of a LayerNorm's backward, in place; a weight may be null.
  void (*norm_grad)(const T* x, int64_t width, T mean, T rstd, const T* weight, T* grad);
  // What that row adds to the gradients of weight and bias; each may be null.
  void (*affine_grad)(const T* x, int64_t width, T mean, T rstd, const T* grad, T* weight_grad, T* bias_grad);
  // One row of a LayerNorm with its affine; weight and bias may be null.
  void (*normalise)(const T* x, int64_t width, T mean, T rstd, const T* weight, const T* bias, T* out);
  // One row of a GRU in place, from the (3, width) projections of its input and of itself, in the order r, z, n.
  void (*gru)(const T* from_update, const T* from_slots, int64_t width, T* slots);
  // Its backward: the projections become their gradients, `grad` that of the slots that entered but for from_slots.
  void (*gru_grad)(T* from_update, T* from_slots, const T* slots, int64_t width, T* grad);
  void (*relu)(T* x, int64_t n);                       // what is not a number stays
  void (*relu_grad)(const T* out, T* grad, int64_t n);  // grad = 0 where out, after ReLU, is 0
  void (*multiply)(const T* x, const T* y, T* out, int64_t n);     // out = x y
  void (*multiply_add)(const T* x, const T* y, T* out, int64_t n);  // out += x y
};

template <class T>
struct Kernels {
  Gemm<T> gemm;
  T (*row_max)(const T* x, int64_t n);
  int64_t (*next_not_below)(const T* x, int64_t from, int64_t n, T limit);  // first i >= from where not x < limit, or n
  T (*exp_sum)(T* x, int64_t n, T shift);  // x = exp(x - shift), returns the sum
  T (*exp_cosines)(T* x, int64_t n);       // the same of numbers from -2 to 2, not shifted
  // y = log(max(x, floor)), floor >= smallest normal; returns the smallest x
  T (*log_row)(const T* x, T* y, int64_t n, T floor);
  void (*scaled_copy)(T a, const T* x, T* y, int64_t n);  // y = a x
  void (*axpy)(T a, const T* x, T* y, int64_t n);         // y += a x
  T (*dot)(const T* x, const T* y, int64_t n);
  double (*magnitude_sum)(const T* x, int64_t n);  // sum |x|
  double (*wide_dot)(const T* x, const T* y, int64_t n);
  void (*divided_copy)(T a, const T* x, T* y, int64_t n);  // y = x / a
  void (*wide_axpy)(const T* x, double* y, int64_t n);     // y += x
  // y = x, n bytes, while `ahead`, what is copied next, is fetched. `stream`: past the caches, for results larger than
  // these; x and y then start at whole vectors.
  void (*copy_row)(const char* x, char* y, int64_t n, const char* ahead, bool stream);
  // The dot products of dot_rows rows a with dot_columns rows b, n elements each, row-major; the order of each sum
  // depends on n alone.
  int dot_rows, dot_columns;
  void (*dots)(const T* const* a, const T* const* b, int64_t n, T* out);
  // sum (p-q)(lp-lq), and the sum of the magnitudes of its terms: the scale of its rounding error
  T (*pair)(const T* p, const T* lp, const T* q, const T* lq, int64_t n, T* magnitude);
  double (*pair64)(const T* p, const T* lp, const T* q, const T* lq, int64_t n);
  RowStats<T> (*row_stats)(const T* p, const T* lp, const T* p_centre, const T* l_centre, int64_t n,
                           bool bf16);
  // Bits of n columns, in words of 64: surely near; within the error bound of tau (or NaN)
  void (*threshold)(const Threshold<T>& t, const T* cross, int64_t n, uint64_t* near, uint64_t* open);
  // Adds the rows picked by the bits of 64 source rows: see neighbour_mean. table: 16 nibbles x 16 sums x
  // width.
  int gather_width;
  void (*nibble_table)(const T* const* rows, int64_t column, int64_t width, T* table);
  void (*nibble_add)(const T* table, uint64_t bits, T* sum);
  void (*wide_add)(const T* x, T* sum);  // sum += x, gather_width elements
  // One leader of the greedy walk: rows in both `row` and `alive` (words of 64) leave `alive` and get their
  // owner and label. owner, label: 64 elements per word, written only where a bit is taken. alive: whole
  // groups of 8 words are read and written.
  void (*absorb)(const uint64_t* row, uint64_t* alive, int64_t words, int64_t lead, int64_t rank,
                 int64_t* owner, int64_t* label);
  SlotKernels<T> slots;
  SideKernels<T> side;
};

template <class T>
const Kernels<T>& kernels_for(CpuIsa isa);
template <class T>
const Kernels<T>& kernels() {
  return kernels_for<T>(cpu_isa_level());
}

// fp32 sums of bf16 operands, of operands split into two bf16, and into three (products of float32); null where the
// level has none, or none that is faster.
const Gemm<float>* bf16_gemm(CpuIsa isa);
const Gemm<float>* split_gemm(CpuIsa isa);
const Gemm<float>* three_part_gemm(CpuIsa isa);

}  // namespace vidops::cpu
