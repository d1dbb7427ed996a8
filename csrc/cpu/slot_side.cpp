// Slot attention's matrix products, and the backward of its tokens' LayerNorm.
//
// A product packs its right operand once, unless it comes packed, and its left one block by block, slab by slab of K. A
// slab is summed in short slices, one after the other, which makes the results as exact as those of a BLAS; longer sums
// would not be. The order is that of K, whatever the blocks and the threads are. Workspace: one slab of the right
// operand, and per thread one of a block of the left operand and a tile of results.
//
// Where the CPU has tiles of bf16, operands are packed for them, in three parts per number: as exact as float32, and
// for a hundred rows or more up to twice as fast.
#include "common.h"
#include "kernels.h"
#include "panels.h"
#include "vidops/slot_side.h"

namespace vidops::cpu {
namespace {

constexpr int64_t kSlice = 128;
constexpr int64_t kSlab = 8 * kSlice;
constexpr int64_t kBlockPanels = 8;  // of the left operand: about 100 rows
constexpr int64_t kFewRows = 16;     // no more for which the right operand is not laid out
constexpr int64_t kTilePanels = 4;   // of the right operand: the tile stays near between product and store

// One item of an operand as rows of length K, or `turned`, K rows of them.
template <class T>
struct Operand {
  const T* base;
  int64_t pitch;
  bool turned;

  Operand(const TensorView& x, int64_t item, bool turned_)
      : base(x.as<const T>() + item * x.stride[0]), pitch(x.stride[1]), turned(turned_) {}
};

// Panels of rows [first, first + count), columns [k0, k0 + k).
template <class T>
void pack_rows(const Gemm<T>& g, bool a_side, const Operand<T>& x, int64_t first, int64_t count, int64_t k0, int64_t k,
               char* out) {
  if (x.turned) return pack_columns(g, a_side, x.base + k0 * x.pitch + first, x.pitch, count, k, out);
  auto row = [&](int64_t r) { return x.base + (first + r) * x.pitch + k0; };
  pack_panels(g, a_side, row, count, k, (const T*)nullptr, T(1), 0, round_up(k, g.k_align), out);
}

// body(first column, columns) for every slice of `k` columns; once for none, whose product is zero.
template <class F>
void for_slices(int64_t k, F&& body) {
  for (int64_t k0 = 0; k0 == 0 || k0 < k; k0 += kSlice) body(k0, std::min(kSlice, k - k0));
}

// Lays out columns [k0, k0 + k) of a right operand with n rows: slice by slice, panels one after the other.
template <class T>
void pack_right(const Gemm<T>& g, const Operand<T>& b, int64_t n, int64_t k0, int64_t k, T* out, int threads) {
  const int64_t nr = g.nr, panels = ceil_div(n, nr);
  parallel_for(panels, threads, [&](int64_t j, int) {
    for_slices(k, [&](int64_t s, int64_t depth) {
      pack_rows(g, false, b, j * nr, std::min(nr, n - j * nr), k0 + s, depth,
                reinterpret_cast<char*>(out + (s * panels + j * depth) * nr));
    });
  });
}

template <class T>
class Product {
 public:
  Product(const ProductParams& params, int threads)
      : p_(params),
        m_(params.out.shape[1]),
        n_(params.out.shape[2]),
        k_(params.a.shape[params.a_turned ? 1 : 2]),
        panels_(ceil_div(n_, nr_)),
        block_(mr_ * std::min(kBlockPanels, ceil_div(ceil_div(m_, mr_), std::max(threads, 1)))),
        team_(static_cast<int>(std::clamp<int64_t>(threads, 1, std::max<int64_t>(1, ceil_div(m_, block_))))),
        scratch_(team_) {
    const int64_t slab = std::min(k_, kSlab);
    if (!p_.packed.present()) right_.resize(panels_ * nr_ * slab);
    for (Own& s : scratch_) s.left.resize(block_ * slab), s.tile.resize(block_ * tile_pitch_);
  }

  void run() const {
    for (int64_t item = 0; item < p_.out.shape[0]; ++item)
      for (int64_t k0 = 0; k0 == 0 || k0 < k_; k0 += kSlab) slab(item, k0, std::min(kSlab, k_ - k0));
  }

 private:
  struct Own {
    Buffer<T> left, tile;
  };

  void slab(int64_t item, int64_t k0, int64_t k) const {
    const Operand<T> a(p_.a, item, p_.a_turned);
    const T* packed = right_.get();
    if (p_.packed.present())
      packed = p_.packed.as<const T>() + item * p_.packed.shape[1] + k0 * panels_ * nr_;
    else
      pack_right(kn_.gemm, Operand<T>(p_.b, item, !p_.b_turned), n_, k0, k, right_.get(), team_);
    // A panel of the slice that begins at column `first` of the slab.
    auto right = [&](int64_t first, int64_t depth, int64_t panel) {
      return packed + (first * panels_ + panel * depth) * nr_;
    };
    parallel_for(ceil_div(m_, block_), team_, [&](int64_t task, int thread) {
      T *left = scratch_[thread].left.get(), *tile = scratch_[thread].tile.get();
      const int64_t first = task * block_, rows = std::min(block_, m_ - first), padded = round_up(rows, mr_);
      for_slices(k, [&](int64_t s, int64_t depth) {
        pack_rows(kn_.gemm, true, a, first, rows, k0 + s, depth, reinterpret_cast<char*>(left + s * padded));
      });
      for (int64_t j = 0; j < panels_; j += kTilePanels) {
        const int64_t here = std::min(kTilePanels, panels_ - j), column = j * nr_, pitch = p_.out.stride[1];
        const int64_t columns = std::min(here * nr_, n_ - column);
        // What fills its panels goes where it belongs, the rest by way of a tile.
        const int64_t whole = columns == here * nr_ ? rows / mr_ : 0, done = whole * mr_;
        T* out = p_.out.as<T>() + item * p_.out.stride[0] + first * p_.out.stride[1] + column;
        for_slices(k, [&](int64_t s, int64_t depth) {
          const bool begins = k0 + s == 0, add = p_.add || !begins;
          const T *l = left + s * padded, *r = right(s, depth, j);
          const T* bias = begins && p_.bias.present() ? p_.bias.as<const T>() + column : nullptr;
          kn_.side.product(whole, here, depth, l, r, bias, add, out, pitch);
          if (done == rows) return;
          kn_.gemm.run(padded / mr_ - whole, here, depth, l + done * depth, r, tile, tile_pitch_);
          kn_.side.finish(tile, tile_pitch_, rows - done, columns, bias, add, out + done * pitch, pitch);
        });
      }
    });
  }

  const Kernels<T>& kn_ = kernels<T>();
  const ProductParams& p_;
  const int64_t mr_ = kn_.gemm.mr, nr_ = kn_.gemm.nr, tile_pitch_ = kTilePanels * nr_;
  const int64_t m_, n_, k_, panels_, block_;
  const int team_;
  Buffer<T> right_;
  std::vector<Own> scratch_;
};

// What multiplies instead of `Product`: tiles of three parts. Below 64 rows or columns the padding takes more than the
// tiles save.
template <class T>
const Gemm<T>* tiles_for(int64_t n, int64_t k) {
  if constexpr (sizeof(T) == 4)
    return n >= 64 && k >= 64 ? three_part_gemm(cpu_isa_level()) : nullptr;
  else
    return nullptr;
}

template <class T>
int64_t tiles_size(const Gemm<T>& g, int64_t n, int64_t k) {
  return round_up(n, g.nr) * round_up(k, g.k_align) * g.elem / int64_t(sizeof(T));
}

template <class T>
void pack_right_tiles(const Gemm<T>& g, const Operand<T>& b, int64_t n, int64_t k, char* out, int threads) {
  const int64_t bytes = g.nr * round_up(k, g.k_align) * g.elem;
  parallel_for(ceil_div(n, g.nr), threads, [&](int64_t j, int) {
    pack_rows(g, false, b, j * g.nr, std::min<int64_t>(g.nr, n - j * g.nr), 0, k, out + j * bytes);
  });
}

// Rows and, unless the right operand comes packed, columns of K in blocks: what is laid out of the left operand stays
// in L2 then, and small. A task is a few panels of the right operand.
template <class T>
void tile_product(const Gemm<T>& g, const ProductParams& p, int threads) {
  constexpr int64_t kRows = 512, kPanels = 4;  // of the left operand, those multiplied at once: their tile stays near
  const SideKernels<T>& side = kernels<T>().side;
  const int64_t m = p.out.shape[1], n = p.out.shape[2], whole = p.a.shape[p.a_turned ? 1 : 2];
  const bool packed = p.packed.present();
  const int64_t depth = packed ? whole : std::min(whole, kSlab), most = round_up(depth, g.k_align);
  const int64_t groups = ceil_div(n, kTilePanels * g.nr), pitch = kTilePanels * g.nr, step = kPanels * g.mr;
  const int team = static_cast<int>(std::clamp<int64_t>(threads, 1, groups));
  Buffer<char> left(round_up(std::min(m, kRows), g.mr) * most * g.elem);
  struct Own {
    Buffer<char> right;
    Buffer<T> tile;
  };
  std::vector<Own> scratch(team);
  for (Own& s : scratch) {
    s.tile.resize(step * pitch);
    if (!packed) s.right.resize(pitch * most * g.elem);
  }
  auto block = [&](int64_t item, int64_t from, int64_t rows, int64_t k0) {
    const int64_t k = std::min(depth, whole - k0), padded = round_up(k, g.k_align);
    const Operand<T> a(p.a, item, p.a_turned), b(p.b, item, !p.b_turned);
    parallel_for(ceil_div(rows, g.mr), threads, [&](int64_t i, int) {
      pack_rows(g, true, a, from + i * g.mr, std::min<int64_t>(g.mr, rows - i * g.mr), k0, k,
                left.get() + i * g.mr * padded * g.elem);
    });
    parallel_for(groups, team, [&](int64_t group, int thread) {
      Own& s = scratch[thread];
      const int64_t column = group * pitch, columns = std::min(pitch, n - column);
      const char* right = s.right.get();
      if (packed)
        right = reinterpret_cast<const char*>(p.packed.as<const T>() + item * p.packed.shape[1]) +
                column * padded * g.elem;
      else
        pack_rows(g, false, b, column, columns, k0, k, s.right.get());
      for (int64_t i = 0; i < rows; i += step) {
        const int64_t here = std::min(step, rows - i);
        g.run(ceil_div(here, g.mr), ceil_div(columns, g.nr), padded, left.get() + i * padded * g.elem, right,
              s.tile.get(), pitch);
        side.finish(s.tile.get(), pitch, here, columns,
                    k0 == 0 && p.bias.present() ? p.bias.as<const T>() + column : nullptr, p.add || k0 > 0,
                    p.out.as<T>() + item * p.out.stride[0] + (from + i) * p.out.stride[1] + column, p.out.stride[1]);
      }
    });
  };
  for (int64_t item = 0; item < p.out.shape[0]; ++item)
    for (int64_t from = 0; from < m; from += kRows)
      for (int64_t k0 = 0; k0 < whole; k0 += depth) block(item, from, std::min(kRows, m - from), k0);
}

// tile (m, columns) = a (m, k) b (columns, k)^T.
template <class T>
void few_dots(const Kernels<T>& kn, int64_t m, int64_t columns, int64_t k, const T* a, int64_t a_pitch, const T* b,
              int64_t b_pitch, T* tile, int64_t tile_pitch) {
  const T *left[kMaxDots], *right[kMaxDots];
  T found[kMaxDots * kMaxDots];
  for (int64_t j = 0; j < columns; j += kn.dot_columns) {
    for (int c = 0; c < kn.dot_columns; ++c) right[c] = b + std::min(j + c, columns - 1) * b_pitch;
    for (int64_t i = 0; i < m; i += kn.dot_rows) {
      for (int r = 0; r < kn.dot_rows; ++r) left[r] = a + std::min(i + r, m - 1) * a_pitch;
      kn.dots(left, right, k, found);
      for (int r = 0; r < std::min<int64_t>(kn.dot_rows, m - i); ++r)
        std::copy_n(found + r * kn.dot_columns, std::min<int64_t>(kn.dot_columns, columns - j),
                    tile + (i + r) * tile_pitch + j);
    }
  }
}

// A left operand of few rows, which do not pay for a layout of the right one: that is read as it is, once.
template <class T>
void few_rows(const ProductParams& p, int threads) {
  constexpr int64_t kColumns = 512;  // of a task: as many of kFewRows rows stay in L1
  const Kernels<T>& kn = kernels<T>();
  const int64_t m = p.out.shape[1], n = p.out.shape[2], k = p.a.shape[p.a_turned ? 1 : 2];
  Buffer<T> rows(p.a_turned ? m * k : 0);
  for (int64_t item = 0; item < p.out.shape[0]; ++item) {
    const Operand<T> a(p.a, item, p.a_turned), b(p.b, item, p.b_turned);
    for (int64_t r = 0; a.turned && r < m; ++r)
      for (int64_t i = 0; i < k; ++i) rows[r * k + i] = a.base[i * a.pitch + r];
    const T* left = a.turned ? rows.get() : a.base;
    const int64_t left_pitch = a.turned ? k : a.pitch;
    parallel_for(ceil_div(n, kColumns), threads, [&](int64_t task, int) {
      const int64_t first = task * kColumns, columns = std::min(kColumns, n - first);
      alignas(64) T tile[kFewRows * kColumns];
      auto finish = [&](int64_t k0) {
        kn.side.finish(tile, kColumns, m, columns, k0 == 0 && p.bias.present() ? p.bias.as<const T>() + first : nullptr,
                       p.add || k0 > 0, p.out.as<T>() + item * p.out.stride[0] + first, p.out.stride[1]);
      };
      if (b.turned) {  // a dot product has as many sums as a vector has lanes, which need no short slices
        for (int64_t k0 = 0; k0 == 0 || k0 < k; k0 += kSlab) {
          few_dots(kn, m, columns, std::min(kSlab, k - k0), left + k0, left_pitch, b.base + first * b.pitch + k0,
                   b.pitch, tile, kColumns);
          finish(k0);
        }
      } else {
        for_slices(k, [&](int64_t k0, int64_t depth) {
          kn.side.few_rows(m, columns, depth, left + k0, left_pitch, b.base + k0 * b.pitch + first, b.pitch, tile,
                           kColumns);
          finish(k0);
        });
      }
    });
  }
}

template <class T>
void token_norm_grad(const TokenNormGradParams& p, int threads) {
  const SideKernels<T>& kn = kernels<T>().side;
  const int64_t tokens = p.rows.shape[1], width = p.rows.shape[2];
  constexpr int64_t kRows = 64;  // of a task
  const int64_t blocks = ceil_div(tokens, kRows);
  parallel_for(p.rows.shape[0] * blocks, threads, [&](int64_t task, int) {
    const int64_t b = task / blocks, first = task % blocks * kRows;
    for (int64_t j = first; j < std::min(tokens, first + kRows); ++j)
      kn.norm_grad(p.rows.as<const T>() + b * p.rows.stride[0] + j * p.rows.stride[1], width,
                   p.mean.as<const T>()[b * tokens + j], p.rstd.as<const T>()[b * tokens + j], nullptr,
                   p.grad.as<T>() + b * p.grad.stride[0] + j * p.grad.stride[1]);
  });
}

template <class T>
void check_product(const ProductParams& p) {
  check(p.a, 3, dtype_of<T>(), "a");
  check(p.b, 3, dtype_of<T>(), "b");
  check(p.out, 3, dtype_of<T>(), "out");
  const int64_t batch = p.out.shape[0], m = p.out.shape[1], n = p.out.shape[2], k = p.a.shape[p.a_turned ? 1 : 2];
  check_shape(p.a, {batch, p.a_turned ? k : m, p.a_turned ? m : k}, "a");
  check_shape(p.b, {batch, p.b_turned ? n : k, p.b_turned ? k : n}, "b");
  if (p.packed.present()) {
    check(p.packed, 2, dtype_of<T>(), "packed");
    check_shape(p.packed, {batch, product_packed_size(dtype_of<T>(), n, k)}, "packed");
    require(p.packed.contiguous(), "packed: expected a contiguous tensor");
  }
  if (!p.bias.present()) return;
  check(p.bias, 1, dtype_of<T>(), "bias");
  check_shape(p.bias, {n}, "bias");
}

template <class T>
void check_norm_grad(const TokenNormGradParams& p) {
  check(p.rows, 3, dtype_of<T>(), "rows");
  const int64_t batch = p.rows.shape[0], tokens = p.rows.shape[1];
  check(p.grad, 3, dtype_of<T>(), "grad");
  check_shape(p.grad, {batch, tokens, p.rows.shape[2]}, "grad");
  for (const TensorView* v : {&p.mean, &p.rstd}) {
    check(*v, 2, dtype_of<T>(), "mean and rstd");
    check_shape(*v, {batch, tokens}, "mean and rstd");
    require(v->contiguous(), "mean and rstd: expected contiguous tensors");
  }
}

}  // namespace
}  // namespace vidops::cpu

namespace vidops {

int64_t product_packed_size(DType dtype, int64_t n, int64_t k) {
  int64_t size = 0;
  cpu::dispatch_float(dtype, [&](auto zero) {
    using T = decltype(zero);
    const cpu::Gemm<T>* tiles = cpu::tiles_for<T>(n, k);
    size = tiles ? cpu::tiles_size(*tiles, n, k) : cpu::round_up(n, cpu::kernels<T>().gemm.nr) * k;
  });
  return size;
}

void product_pack_cpu(const TensorView& b, bool b_turned, const TensorView& packed, int threads) {
  cpu::dispatch_float(packed.dtype, [&](auto zero) {
    using T = decltype(zero);
    cpu::check(b, 3, cpu::dtype_of<T>(), "b");
    cpu::check(packed, 2, cpu::dtype_of<T>(), "packed");
    const int64_t n = b.shape[b_turned ? 1 : 2], k = b.shape[b_turned ? 2 : 1];
    const int64_t size = product_packed_size(packed.dtype, n, k);
    cpu::check_shape(packed, {b.shape[0], size}, "packed");
    require(packed.contiguous(), "packed: expected a contiguous tensor");
    const cpu::Gemm<T>* tiles = cpu::tiles_for<T>(n, k);
    for (int64_t item = 0; k && item < b.shape[0]; ++item) {
      const cpu::Operand<T> rows(b, item, !b_turned);
      T* out = packed.as<T>() + item * size;
      if (tiles)
        cpu::pack_right_tiles(*tiles, rows, n, k, reinterpret_cast<char*>(out), threads);
      else
        cpu::pack_right(cpu::kernels<T>().gemm, rows, n, 0, k, out, threads);
    }
  });
}

void product_cpu(const ProductParams& params, int threads) {
  cpu::dispatch_float(params.out.dtype, [&](auto zero) {
    using T = decltype(zero);
    cpu::check_product<T>(params);
    if (params.out.numel() == 0) return;
    const int64_t m = params.out.shape[1], n = params.out.shape[2], k = params.a.shape[params.a_turned ? 1 : 2];
    const cpu::Gemm<T>* tiles = params.packed.present() || m >= 64 ? cpu::tiles_for<T>(n, k) : nullptr;
    if (tiles)
      cpu::tile_product(*tiles, params, threads);
    else if (m <= cpu::kFewRows && !params.packed.present())
      cpu::few_rows<T>(params, threads);
    else
      cpu::Product<T>(params, threads).run();
  });
}

void token_norm_grad_cpu(const TokenNormGradParams& params, int threads) {
  cpu::dispatch_float(params.rows.dtype, [&](auto zero) {
    using T = decltype(zero);
    cpu::check_norm_grad<T>(params);
    cpu::token_norm_grad<T>(params, threads);
  });
}

}  // namespace vidops
