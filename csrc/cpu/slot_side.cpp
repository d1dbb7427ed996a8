// Slot attention's matrix products, and the backward of its tokens' LayerNorm.
//
// A product packs its right operand once, unless it comes packed, and its left one block by block, slab by slab of K. A
// slab is summed in short slices, one after the other, which makes the results as exact as those of a BLAS; longer sums
// would not be. The order is that of K, whatever the blocks and the threads are. Workspace: one slab of the right
// operand, and per thread one of a block of the left operand and a tile of results.
//
// Where the CPU has tiles of bf16, a right operand is packed for them, in three parts per number: as exact as float32,
// and for a hundred rows or more up to twice as fast.
#include "common.h"
#include "kernels.h"
#include "panels.h"
#include "vidops/slot_side.h"

namespace vidops::cpu {
namespace {

constexpr int64_t kSlice = 128;
constexpr int64_t kSlab = 8 * kSlice;
constexpr int64_t kBlockPanels = 8;  // of the left operand: about 100 rows
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

// Packs `count` rows from `first` on, columns [k0, k0 + k), as panels of `step` rows. What a last panel lacks holds
// anything. Up to `lanes` elements behind the last panel are written.
template <class T>
void pack_rows(const Kernels<T>& kn, bool a_side, const Operand<T>& x, int64_t first, int64_t count, int64_t k0,
               int64_t k, T* out) {
  if (x.turned) return pack_columns(kn, a_side, x.base + k0 * x.pitch + first, x.pitch, count, k, out);
  const int64_t step = a_side ? kn.gemm.mr : kn.gemm.nr, lanes = kn.slots.lanes;
  for (int64_t i = 0; i < count; i += step, out += k * step) {
    const int64_t here = std::min(step, count - i);
    for (int64_t r = 0;; r = std::min(r + lanes, step - lanes)) {
      // The last strip ends with the panel; a panel narrower than a strip is overrun, by what comes next again.
      const int64_t row = std::min(r, here - 1);
      kn.slots.strip({x.base + (first + i + row) * x.pitch + k0, x.pitch, std::min(lanes, here - row), k, nullptr,
                      nullptr, out + r, step});
      if (r + lanes >= step) break;
    }
  }
}

// body(first column, columns) for every slice of `k` columns; once for none, whose product is zero.
template <class F>
void for_slices(int64_t k, F&& body) {
  for (int64_t k0 = 0; k0 == 0 || k0 < k; k0 += kSlice) body(k0, std::min(kSlice, k - k0));
}

// Lays out columns [k0, k0 + k) of a right operand with n rows: slice by slice, panels one after the other.
template <class T>
void pack_right(const Kernels<T>& kn, const Operand<T>& b, int64_t n, int64_t k0, int64_t k, T* out, int threads) {
  const int64_t nr = kn.gemm.nr, panels = ceil_div(n, nr);
  parallel_for(panels, threads, [&](int64_t j, int) {
    for_slices(k, [&](int64_t s, int64_t depth) {
      pack_rows(kn, false, b, j * nr, std::min(nr, n - j * nr), k0 + s, depth, out + (s * panels + j * depth) * nr);
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
    for (Own& s : scratch_) s.left.resize(block_ * slab + kn_.slots.lanes), s.tile.resize(block_ * tile_pitch_);
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
      pack_right(kn_, Operand<T>(p_.b, item, !p_.b_turned), n_, k0, k, right_.get(), team_);
    // A panel of the slice that begins at column `first` of the slab.
    auto right = [&](int64_t first, int64_t depth, int64_t panel) {
      return packed + (first * panels_ + panel * depth) * nr_;
    };
    parallel_for(ceil_div(m_, block_), team_, [&](int64_t task, int thread) {
      T *left = scratch_[thread].left.get(), *tile = scratch_[thread].tile.get();
      const int64_t first = task * block_, rows = std::min(block_, m_ - first), padded = round_up(rows, mr_);
      for_slices(k, [&](int64_t s, int64_t depth) {
        pack_rows(kn_, true, a, first, rows, k0 + s, depth, left + s * padded);
      });
      for (int64_t j = 0; j < panels_; j += kTilePanels) {
        const int64_t here = std::min(kTilePanels, panels_ - j), column = j * nr_;
        T* out = p_.out.as<T>() + item * p_.out.stride[0] + first * p_.out.stride[1] + column;
        for_slices(k, [&](int64_t s, int64_t depth) {
          const bool begins = k0 + s == 0;
          kn_.gemm.run(padded / mr_, here, depth, left + s * padded, right(s, depth, j), tile, tile_pitch_);
          kn_.side.finish(tile, tile_pitch_, rows, std::min(here * nr_, n_ - column),
                          begins && p_.bias.present() ? p_.bias.as<const T>() + column : nullptr, p_.add || !begins,
                          out, p_.out.stride[1]);
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

// What multiplies a right operand that comes packed, if not `Product`: tiles of three parts. Below 64 rows or columns
// the padding takes more than the tiles save.
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

// Panels of `count` rows from `first` on; a turned operand is brought to rows in `scratch` first.
template <class T>
void pack_tiles(const Gemm<T>& g, bool a_side, const Operand<T>& x, int64_t first, int64_t count, int64_t k,
                Buffer<T>& scratch, char* out) {
  if (x.turned) {
    scratch.resize(count * k);
    for (int64_t i = 0; i < k; ++i)
      for (int64_t r = 0; r < count; ++r) scratch[r * k + i] = x.base[i * x.pitch + first + r];
  }
  auto row = [&](int64_t r) { return x.turned ? scratch.get() + r * k : x.base + (first + r) * x.pitch; };
  pack_panels(g, a_side, row, count, k, (const T*)nullptr, T(1), 0, round_up(k, g.k_align), out);
}

template <class T>
void pack_right_tiles(const Gemm<T>& g, const Operand<T>& b, int64_t n, int64_t k, char* out, int threads) {
  const int64_t bytes = g.nr * round_up(k, g.k_align) * g.elem;
  parallel_for(ceil_div(n, g.nr), threads, [&](int64_t j, int) {
    Buffer<T> scratch;
    pack_tiles(g, false, b, j * g.nr, std::min<int64_t>(g.nr, n - j * g.nr), k, scratch, out + j * bytes);
  });
}

template <class T>
void tile_product(const Gemm<T>& g, const ProductParams& p, int threads) {
  constexpr int64_t kLeftPanels = 4;  // 128 rows, which stay in L2 beside a panel of the right operand
  const SideKernels<T>& side = kernels<T>().side;
  const int64_t m = p.out.shape[1], n = p.out.shape[2], k = p.a.shape[p.a_turned ? 1 : 2];
  const int64_t padded = round_up(k, g.k_align), panels = ceil_div(n, g.nr), pitch = kTilePanels * g.nr;
  const int64_t block = g.mr * std::min(kLeftPanels, ceil_div(ceil_div(m, g.mr), std::max(threads, 1)));
  const int64_t blocks = ceil_div(m, block);
  parallel_for(p.out.shape[0] * blocks, threads, [&](int64_t task, int) {
    const int64_t item = task / blocks, first = task % blocks * block, rows = std::min(block, m - first);
    Buffer<T> scratch, tile(block * pitch);
    Buffer<char> left(block * padded * g.elem);
    pack_tiles(g, true, Operand<T>(p.a, item, p.a_turned), first, rows, k, scratch, left.get());
    const char* right = reinterpret_cast<const char*>(p.packed.as<const T>() + item * p.packed.shape[1]);
    for (int64_t j = 0; j < panels; j += kTilePanels) {
      const int64_t here = std::min(kTilePanels, panels - j), column = j * g.nr;
      g.run(ceil_div(rows, g.mr), here, padded, left.get(), right + j * g.nr * padded * g.elem, tile.get(), pitch);
      side.finish(tile.get(), pitch, rows, std::min(here * g.nr, n - column),
                  p.bias.present() ? p.bias.as<const T>() + column : nullptr, p.add,
                  p.out.as<T>() + item * p.out.stride[0] + first * p.out.stride[1] + column, p.out.stride[1]);
    }
  });
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
                   p.mean.as<const T>()[b * tokens + j], p.rstd.as<const T>()[b * tokens + j],
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
        cpu::pack_right(cpu::kernels<T>(), rows, n, 0, k, out, threads);
    }
  });
}

void product_cpu(const ProductParams& params, int threads) {
  cpu::dispatch_float(params.out.dtype, [&](auto zero) {
    using T = decltype(zero);
    cpu::check_product<T>(params);
    if (params.out.numel() == 0) return;
    const cpu::Gemm<T>* tiles = nullptr;
    if (params.packed.present())
      tiles = cpu::tiles_for<T>(params.out.shape[2], params.a.shape[params.a_turned ? 1 : 2]);
    if (tiles)
      cpu::tile_product(*tiles, params, threads);
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
