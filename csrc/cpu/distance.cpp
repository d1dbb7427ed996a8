// Pairwise distances, their thresholded bit rows, and greedy absorption without the distance matrix (Eq. E2,
// E5).
//
// Workspace: two packed operands of at most 128 MB together (64 rows of each, if that is more), one tile of
// scores per thread and 24 bytes per row. n = 7200, M = 21600, float32: blocks of 96 MB / (2M * 4 B) = 576
// and of 192 rows, 133 MB in all.
#include "distance.h"

#include <cstring>

#include "vidops/greedy_absorb_kl.h"
#include "vidops/symmetric_kl.h"
#include "vidops/symmetric_kl_adjacency.h"

namespace vidops::cpu {

int64_t& panel_budget() {
  static int64_t bytes = int64_t{128} << 20;
  return bytes;
}

namespace {

constexpr int64_t kTileColumns = 256;  // whole bit words
int64_t tile_rows(int mr) { return 256 / mr * mr; }

// Calls body(i0, rows, j0, columns, scores, pitch) for every tile; with `upper`, only for tiles that hold
// some j >= i.
template <class T, class F>
void for_tiles(const Distance<T>& d, bool upper, int threads, F&& body) {
  const int64_t n = d.p.count, other = d.q.count;
  const int64_t tall = tile_rows(d.gemm.mr);
  // Where the second operand fits, it is packed once, and a first one of a few tiles per thread saves memory
  // and stays in cache. Where not, it is packed again for every block of the first, therefore the larger.
  const bool resident = d.block(other, 0.75) >= other;
  const int64_t other_step = resident ? other : d.block(other, 0.25);
  const int64_t few = 2 * tall * std::max(threads, 1);
  const int64_t step = resident ? std::min(d.block(n, 0.25), few) : d.block(n, 0.75);
  Buffer<char> a(d.a_bytes(std::min(step, n))), b(d.b_bytes(std::min(other_step, other)));
  std::vector<Buffer<T>> scores(std::max(threads, 1));
  const int64_t tile = std::min(tall, round_up(n, d.gemm.mr)) * kTileColumns;
  for (auto& s : scores) s.resize(tile), std::fill_n(s.get(), tile, T(0));
  for (int64_t i0 = 0; i0 < n; i0 += step) {
    const int64_t rows = std::min(step, n - i0);
    d.pack_a([&](int64_t i) { return i0 + i; }, rows, a.get(), threads);
    for (int64_t j0 = upper && !resident ? i0 / other_step * other_step : 0; j0 < other; j0 += other_step) {
      const int64_t columns = std::min(other_step, other - j0);
      if (!resident || i0 == 0)
        d.pack_b([&](int64_t j) { return j0 + j; }, columns, b.get(), threads);
      const int64_t down = ceil_div(rows, tall), across = ceil_div(columns, kTileColumns);
      parallel_for(down * across, threads, [&](int64_t tile, int thread) {
        const int64_t i = tile / across * tall, j = tile % across * kTileColumns;
        const int64_t height = std::min(tall, rows - i), width = std::min(kTileColumns, columns - j);
        if (upper && j0 + j + width <= i0 + i) return;
        // A tile on the diagonal goes in strips that begin at their first needed panel.
        const bool diagonal = upper && j0 + j < i0 + i + height;
        const int64_t strip = diagonal ? round_up(32, d.gemm.mr) : tall;
        for (int64_t s = 0; s < height; s += strip) {
          const int64_t skip =
              diagonal ? std::max<int64_t>(0, i0 + i + s - j0 - j) / d.gemm.nr * d.gemm.nr : 0;
          if (skip >= width) break;
          d.gemm.run(ceil_div(std::min(strip, height - s), d.gemm.mr), ceil_div(width - skip, d.gemm.nr),
                     d.depth, a.get() + (i + s) * d.depth * d.gemm.elem,
                     b.get() + (j + skip) * d.depth * d.gemm.elem,
                     scores[thread].get() + s * kTileColumns + skip, kTileColumns);
        }
        body(i0 + i, height, j0 + j, width, scores[thread].get(), kTileColumns);
      });
    }
  }
}

template <class T>
Rows<T> rows_of(const TensorView& t, int64_t batch = -1) {
  if (batch < 0) return {t.as<const T>(), t.stride[0], t.shape[0]};
  return {t.as<const T>() + batch * t.stride[0], t.stride[1], t.shape[1]};
}

template <class T>
void symmetric_kl(const SymmetricKlParams& params, int threads) {
  const TensorView& q_view = params.same ? params.p : params.q;
  const TensorView& m_view = params.same ? params.log_p : params.log_q;
  const int64_t n = params.p.shape[1], other = q_view.shape[1], cols = params.p.shape[2];
  for (int64_t b = 0; b < params.p.shape[0]; ++b) {
    const Distance<T> d(rows_of<T>(params.p, b), rows_of<T>(params.log_p, b), rows_of<T>(q_view, b),
                        rows_of<T>(m_view, b), cols, nullptr);
    std::vector<double> s(n), t(other);
    parallel_for(n, threads, [&](int64_t i, int) { s[i] = d.stats(d.p[i], d.l[i]).self; });
    parallel_for(other, threads, [&](int64_t j, int) { t[j] = d.stats(d.q[j], d.m[j]).self; });
    T* out = params.distance.as<T>() + b * n * other;
    for_tiles(d, params.same, threads,
              [&](int64_t i0, int64_t rows, int64_t j0, int64_t columns, const T* c, int64_t pitch) {
                for (int64_t r = 0; r < rows; ++r) {
                  const int64_t i = i0 + r, from = params.same ? std::max<int64_t>(0, i - j0) : 0;
                  for (int64_t j = from; j < columns; ++j)
                    out[i * other + j0 + j] =
                        static_cast<T>(s[i] + t[j0 + j] - static_cast<double>(c[r * pitch + j]));
                }
              });
    if (!params.same) continue;
    constexpr int64_t kBlock = 64;
    parallel_for(ceil_div(n, kBlock), threads, [&](int64_t block, int) {
      for (int64_t j0 = 0; j0 <= block * kBlock; j0 += kBlock)
        for (int64_t i = block * kBlock; i < std::min(n, (block + 1) * kBlock); ++i)
          for (int64_t j = j0; j < std::min(i, j0 + kBlock); ++j) out[i * n + j] = out[j * n + i];
    });
  }
}

// The words of a tile row: sure decisions from the bounds, the others from the direct form.
struct Decisions {
  uint64_t near[kTileColumns / 64], open[kTileColumns / 64];

  template <class NearFn>
  void resolve(int64_t first_word, int64_t words, uint64_t* out, NearFn&& direct) const {
    for (int64_t w = first_word; w < words; ++w) {
      uint64_t word = near[w];
      for (uint64_t unsure = open[w]; unsure; unsure &= unsure - 1) {
        const int bit = __builtin_ctzll(unsure);
        if (direct(w * 64 + bit)) word |= uint64_t{1} << bit;
      }
      out[w] = word;
    }
  }
};

void transpose64(uint64_t x[64]) {
  uint64_t mask = 0x00000000ffffffffu;
  for (int step = 32; step; step >>= 1, mask ^= mask << step)
    for (int i = 0; i < 64; i = ((i | step) + 1) & ~step) {
      const uint64_t swap = ((x[i] >> step) ^ x[i | step]) & mask;
      x[i] ^= swap << step;
      x[i | step] ^= swap;
    }
}

// Bits above the diagonal are there; adds the diagonal and the mirror image.
void mirror(uint64_t* bits, int64_t n, int64_t words, int threads) {
  parallel_for(words, threads, [&](int64_t block, int) {
    for (int64_t other = block; other < words; ++other) {
      uint64_t x[64] = {};
      for (int64_t r = 0; r < std::min<int64_t>(64, n - block * 64); ++r)
        x[r] = bits[(block * 64 + r) * words + other];
      transpose64(x);
      for (int64_t r = 0; r < std::min<int64_t>(64, n - other * 64); ++r) {
        uint64_t& word = bits[(other * 64 + r) * words + block];
        word = other == block ? word | x[r] | uint64_t{1} << r : x[r];
      }
    }
  });
}

// The product that decides most pairs: fast and coarse, or of float32 accuracy.
template <class T>
const Gemm<T>* product(bool coarse) {
  if constexpr (sizeof(T) == 4) return coarse ? bf16_gemm(cpu_isa_level()) : split_gemm(cpu_isa_level());
  return nullptr;
}

template <class T>
void adjacency(const SymmetricKlAdjacencyParams& params, int threads) {
  const int64_t n = params.p.shape[0], words = ceil_div(n, 64);
  const Rows<T> p = rows_of<T>(params.p), l = rows_of<T>(params.log_p);
  const Distance<T> d(p, l, p, l, params.p.shape[1], product<T>(params.filtered));
  Bounds<T> bounds;
  bounds.resize(n);
  parallel_for(n, threads, [&](int64_t i, int) { bounds.set(i, d.stats(p[i], l[i]), d, params.tau); });
  uint64_t* bits = params.adjacency.as<uint64_t>();
  const auto out_row = [&](int64_t i, int64_t j) { return bits + i * words + j / 64; };
  for_tiles(d, true, threads,
            [&](int64_t i0, int64_t rows, int64_t j0, int64_t columns, const T* c, int64_t pitch) {
              Decisions found;
              for (int64_t r = 0; r < rows; ++r) {
                // Only j > i: the rest is mirrored.
                const int64_t i = i0 + r, skip = std::max<int64_t>(0, i - j0 + 1);
                const int64_t across = ceil_div(columns, 64), first = skip < columns ? skip / 64 : across;
                std::fill_n(out_row(i, j0), first, uint64_t{0});
                if (first == across) continue;
                d.kn.threshold(bounds.row(bounds, i, j0 + first * 64, params.tau), c + r * pitch + first * 64,
                               columns - first * 64, found.near + first, found.open + first);
                const uint64_t later = ~uint64_t{0} << (skip % 64);
                found.near[first] &= later, found.open[first] &= later;
                found.resolve(first, across, out_row(i, j0),
                              [&](int64_t j) { return d.near(i, j0 + j, params.tau); });
              }
            });
  mirror(bits, n, words, threads);
}

// Rounds: the next 32 rows that are alive against all that are alive, resolved in index order by bit
// operations. The packed alive rows are renewed when half of them have died; where they exceed the budget
// they are packed per block of columns in every round.
template <class T>
void greedy_kl(const GreedyAbsorbKlParams& params, int threads) {
  constexpr int64_t kCandidates = 32;
  const int64_t n = params.p.shape[0];
  const Rows<T> p = rows_of<T>(params.p), l = rows_of<T>(params.log_p);
  const Distance<T> d(p, l, p, l, params.p.shape[1], product<T>(true));
  int64_t* owner = params.owner.as<int64_t>();
  int64_t* label = params.label.as<int64_t>();
  std::fill(owner, owner + n, int64_t{-1});
  Bounds<T> all, packed;
  all.resize(n);
  parallel_for(n, threads, [&](int64_t i, int) { all.set(i, d.stats(p[i], l[i]), d, params.tau); });

  const int64_t block = d.block(n, 0.75);
  Buffer<char> a(d.a_bytes(kCandidates)), b(d.b_bytes(std::min(block, n)));
  std::vector<Buffer<T>> scores(std::max(threads, 1));
  for (auto& s : scores) s.resize(round_up(kCandidates, d.gemm.mr) * kTileColumns);
  std::vector<int64_t> columns;  // rows in the order of the packed columns
  std::vector<uint64_t> near;
  int64_t leaders = 0, first = 0, alive = n;
  bool resident = false;
  while (alive > 0) {
    while (owner[first] >= 0) ++first;
    if (columns.empty() || alive * 2 <= static_cast<int64_t>(columns.size())) {
      columns.clear();
      for (int64_t i = first; i < n; ++i)
        if (owner[i] < 0) columns.push_back(i);
      packed.resize(alive);
      for (int64_t c = 0; c < alive; ++c) {
        const int64_t i = columns[c];
        packed.self[c] = all.self[i], packed.p_norm[c] = all.p_norm[i], packed.l_total[c] = all.l_total[i];
        packed.p_error[c] = all.p_error[i], packed.l_weight[c] = all.l_weight[i],
        packed.base[c] = all.base[i];
      }
      resident = false;
    }
    const int64_t count = static_cast<int64_t>(columns.size()), words = ceil_div(count, 64);
    int64_t lead_row[kCandidates], candidates = 0;
    for (int64_t c = 0; c < count && candidates < kCandidates; ++c)
      if (owner[columns[c]] < 0) lead_row[candidates++] = columns[c];
    d.pack_a([&](int64_t i) { return lead_row[i]; }, candidates, a.get(), threads);
    near.assign(static_cast<size_t>(candidates * words), 0);
    for (int64_t j0 = 0; j0 < count; j0 += block) {
      const int64_t here = std::min(block, count - j0);
      if (!resident) d.pack_b([&](int64_t j) { return columns[j0 + j]; }, here, b.get(), threads);
      resident = count <= block;
      parallel_for(ceil_div(here, kTileColumns), threads, [&](int64_t tile, int thread) {
        const int64_t j = tile * kTileColumns, width = std::min(kTileColumns, here - j);
        T* c = scores[thread].get();
        d.gemm.run(ceil_div(candidates, d.gemm.mr), ceil_div(width, d.gemm.nr), d.depth, a.get(),
                   b.get() + j * d.depth * d.gemm.elem, c, kTileColumns);
        Decisions found;
        for (int64_t r = 0; r < candidates; ++r) {
          const int64_t i = lead_row[r];
          d.kn.threshold(packed.row(all, i, j0 + j, params.tau), c + r * kTileColumns, width, found.near,
                         found.open);
          found.resolve(0, ceil_div(width, 64), &near[r * words + (j0 + j) / 64], [&](int64_t x) {
            const int64_t row = columns[j0 + j + x];
            // The smaller index first, as everywhere: one pair has one decision.
            return row > i && owner[row] < 0 && d.near(i, row, params.tau);
          });
        }
      });
    }
    for (int64_t r = 0; r < candidates; ++r) {
      const int64_t lead = lead_row[r];
      if (owner[lead] >= 0) continue;
      owner[lead] = lead;
      label[lead] = leaders;
      --alive;
      for (int64_t w = 0; w < words; ++w)
        for (uint64_t open = near[r * words + w]; open; open &= open - 1) {
          const int64_t row = columns[w * 64 + __builtin_ctzll(open)];
          if (owner[row] >= 0) continue;
          owner[row] = lead;
          label[row] = leaders;
          --alive;
        }
      ++leaders;
    }
  }
  *params.count.as<int64_t>() = leaders;
}

template <class T>
void check_maps(const TensorView& p, const TensorView& log_p, int rank) {
  check(p, rank, dtype_of<T>(), "p");
  check(log_p, rank, dtype_of<T>(), "log_p");
  for (int axis = 0; axis < rank; ++axis)
    require(p.shape[axis] == log_p.shape[axis], "log_p: expected the shape of p");
}

}  // namespace
}  // namespace vidops::cpu

namespace vidops {

void symmetric_kl_forward_cpu(const SymmetricKlParams& params, int threads) {
  cpu::dispatch_float(params.p.dtype, [&](auto zero) {
    using T = decltype(zero);
    cpu::check_maps<T>(params.p, params.log_p, 3);
    if (!params.same) cpu::check_maps<T>(params.q, params.log_q, 3);
    const TensorView& q = params.same ? params.p : params.q;
    require(q.shape[0] == params.p.shape[0] && q.shape[2] == params.p.shape[2],
            "q: batch and columns must match p");
    cpu::check(params.distance, 3, cpu::dtype_of<T>(), "distance");
    cpu::check_shape(params.distance, {params.p.shape[0], params.p.shape[1], q.shape[1]}, "distance");
    cpu::symmetric_kl<T>(params, threads);
  });
}

void symmetric_kl_adjacency_forward_cpu(const SymmetricKlAdjacencyParams& params, int threads) {
  cpu::dispatch_float(params.p.dtype, [&](auto zero) {
    using T = decltype(zero);
    cpu::check_maps<T>(params.p, params.log_p, 2);
    cpu::check(params.adjacency, 2, DType::i64, "adjacency");
    cpu::check_shape(params.adjacency, {params.p.shape[0], cpu::ceil_div(params.p.shape[0], 64)},
                     "adjacency");
    cpu::adjacency<T>(params, threads);
  });
}

void greedy_absorb_kl_forward_cpu(const GreedyAbsorbKlParams& params, int threads) {
  cpu::dispatch_float(params.p.dtype, [&](auto zero) {
    using T = decltype(zero);
    cpu::check_maps<T>(params.p, params.log_p, 2);
    cpu::check(params.owner, 1, DType::i64, "owner");
    cpu::check(params.label, 1, DType::i64, "label");
    cpu::check_shape(params.owner, {params.p.shape[0]}, "owner");
    cpu::check_shape(params.label, {params.p.shape[0]}, "label");
    require(params.count.dtype == DType::i64 && params.count.data != nullptr, "count: expected one int64");
    cpu::greedy_kl<T>(params, threads);
  });
}

}  // namespace vidops
