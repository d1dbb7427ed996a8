// Nearest centroid of attention rows (Eq. E4), for given maps and with the map rebuilt tile by tile.
//
// D(X_k, P_n) without the token's own entropy: sum X log X - X . log P - P . log X, one product of depth 2 *
// chunk per chunk of keys, its chunks added in double. Workspace: packed centroids, 2 K M elements, and per
// thread a block of rows times one chunk.
#include "panels.h"
#include "vidops/assign_clusters.h"
#include "vidops/assign_rows.h"

namespace vidops::cpu {
namespace {

constexpr int64_t kChunk = 512;

template <class T>
class Centroids {
 public:
  Centroids(const TensorView& x, const TensorView& log_x, int threads)
      : kn_(kernels<T>()), count_(x.shape[0]), cols_(x.shape[1]), panels_(ceil_div(count_, kn_.gemm.nr)) {
    const int64_t chunks = ceil_div(cols_, kChunk);
    packed_.resize(panels_ * kn_.gemm.nr * 2 * cols_);
    parallel_for(chunks, threads, [&](int64_t chunk, int) {
      const int64_t first = chunk * kChunk, width = std::min(kChunk, cols_ - first);
      char* to = reinterpret_cast<char*>(at(first));
      auto rows = [&](const TensorView& t) {
        return [&t, first](int64_t k) { return t.as<const T>() + k * t.stride[0] + first; };
      };
      pack_panels<T>(kn_.gemm, false, rows(log_x), count_, width, nullptr, T(1), 0, 2 * width, to);
      pack_panels<T>(kn_.gemm, false, rows(x), count_, width, nullptr, T(1), width, 2 * width, to);
    });
    for (int64_t k = 0; k < count_; ++k) {
      const T *a = x.as<const T>() + k * x.stride[0], *b = log_x.as<const T>() + k * log_x.stride[0];
      double sum = 0;
      for (int64_t c = 0; c < cols_; ++c) sum += static_cast<double>(a[c]) * static_cast<double>(b[c]);
      self_.push_back(sum);
    }
  }

  int64_t padded() const { return panels_ * kn_.gemm.nr; }

  void begin(int64_t rows, double* cost) const {
    for (int64_t r = 0; r < rows; ++r) std::copy(self_.begin(), self_.end(), cost + r * count_);
  }
  // Takes the columns [first, first+width) of `rows` map rows off the costs.
  template <class MapAt, class LogAt>
  void add(MapAt&& map, LogAt&& log, int64_t rows, int64_t first, int64_t width, T* left, T* scores,
           double* cost) const {
    char* to = reinterpret_cast<char*>(left);
    pack_panels<T>(kn_.gemm, true, map, rows, width, nullptr, T(1), 0, 2 * width, to);
    pack_panels<T>(kn_.gemm, true, log, rows, width, nullptr, T(1), width, 2 * width, to);
    kn_.gemm.run(ceil_div(rows, kn_.gemm.mr), panels_, 2 * width, left, at(first), scores, padded());
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < count_; ++k)
        cost[r * count_ + k] -= static_cast<double>(scores[r * padded() + k]);
  }
  int64_t nearest(const double* cost) const {
    // Starting from infinity, and not from the first cost, keeps a centroid with NaN from winning by being first.
    T least = std::numeric_limits<T>::infinity();
    int64_t best = 0;
    for (int64_t k = 0; k < count_; ++k)
      if (static_cast<T>(cost[k]) < least) {
        least = static_cast<T>(cost[k]);
        best = k;
      }
    return best;
  }

 private:
  T* at(int64_t first) const { return packed_.get() + panels_ * kn_.gemm.nr * 2 * first; }

  const Kernels<T>& kn_;
  int64_t count_, cols_, panels_;
  Buffer<T> packed_;
  std::vector<double> self_;
};

template <class T>
struct Scratch {
  Buffer<T> left, scores, tile, map, log, q;
  Buffer<double> cost;
};

template <class T>
void assign_rows(const AssignRowsParams& params, int threads) {
  const Kernels<T>& kn = kernels<T>();
  const int64_t n = params.p.shape[0], cols = params.p.shape[1], count = params.centroids.shape[0];
  const Centroids<T> centroids(params.centroids, params.log_centroids, threads);
  const int64_t rows = block_rows(n, 4 * kChunk * sizeof(T), kn.gemm.mr, int64_t{1} << 20);
  std::vector<Scratch<T>> scratch(std::max(threads, 1));
  for (auto& s : scratch)
    s.left.resize(rows * 2 * kChunk), s.scores.resize(rows * centroids.padded()), s.cost.resize(rows * count);
  parallel_for(ceil_div(n, rows), threads, [&](int64_t block, int thread) {
    Scratch<T>& s = scratch[thread];
    const int64_t first = block * rows, here = std::min(rows, n - first);
    centroids.begin(here, s.cost.get());
    for (int64_t c = 0; c < cols; c += kChunk)
      centroids.add(
          [&](int64_t r) { return params.p.as<const T>() + (first + r) * params.p.stride[0] + c; },
          [&](int64_t r) { return params.log_p.as<const T>() + (first + r) * params.log_p.stride[0] + c; },
          here, c, std::min(kChunk, cols - c), s.left.get(), s.scores.get(), s.cost.get());
    for (int64_t r = 0; r < here; ++r)
      params.label.as<int64_t>()[first + r] = centroids.nearest(&s.cost[r * count]);
  });
}

template <class T>
void assign_clusters(const AssignClustersParams& params, int threads) {
  const Kernels<T>& kn = kernels<T>();
  const Gemm<T>& gemm = kn.gemm;
  const TensorView &q = params.q, &k = params.k;
  const int64_t heads = q.shape[0], queries = q.shape[1], size = q.shape[2], keys = k.shape[1];
  const int64_t count = params.centroids.shape[0];
  const T scale = static_cast<T>(params.scale), share = T(1) / static_cast<T>(heads);
  const T tiny = sizeof(T) == 4 ? T(1e-30) : T(1e-290);
  const Centroids<T> centroids(params.centroids, params.log_centroids, threads);
  const int64_t rows = block_rows(queries, 4 * kChunk * sizeof(T), gemm.mr, int64_t{1} << 20);
  const int64_t pitch = round_up(kChunk, gemm.nr), panel_keys = round_up(keys, gemm.nr);
  // Keys as panels, per head and chunk; kChunk is a multiple of every nr, so chunks start on panels.
  Buffer<T> packed_k(heads * panel_keys * size);
  parallel_for(heads, threads, [&](int64_t h, int) {
    const T* source = k.as<const T>() + h * k.stride[0];
    pack_panels<T>(
        gemm, false, [&](int64_t j) { return source + j * k.stride[1]; }, keys, size, nullptr, T(1), 0, size,
        reinterpret_cast<char*>(&packed_k[h * panel_keys * size]));
  });
  std::vector<Scratch<T>> scratch(std::max(threads, 1));
  for (auto& s : scratch) {
    s.left.resize(rows * 2 * kChunk), s.scores.resize(rows * centroids.padded()), s.cost.resize(rows * count);
    s.tile.resize(rows * pitch), s.map.resize(rows * pitch), s.log.resize(rows * pitch),
        s.q.resize(heads * rows * size);
  }
  parallel_for(ceil_div(queries, rows), threads, [&](int64_t block, int thread) {
    Scratch<T>& s = scratch[thread];
    const int64_t first = block * rows, here = std::min(rows, queries - first),
                  panels = ceil_div(here, gemm.mr);
    std::vector<T> lse(static_cast<size_t>(heads * here));
    auto score = [&](int64_t h, int64_t c, int64_t width) {
      gemm.run(panels, ceil_div(width, gemm.nr), size, &s.q[h * rows * size],
               &packed_k[(h * panel_keys + c) * size], s.tile.get(), pitch);
    };
    for (int64_t h = 0; h < heads; ++h) {
      const T* source = q.as<const T>() + h * q.stride[0] + first * q.stride[1];
      pack_panels<T>(
          gemm, true, [&](int64_t r) { return source + r * q.stride[1]; }, here, size, nullptr, scale, 0,
          size, reinterpret_cast<char*>(&s.q[h * rows * size]));
      if (params.lse.present()) {
        std::copy_n(params.lse.as<const T>() + h * params.lse.stride[0] + first, here, &lse[h * here]);
        continue;
      }
      std::vector<T> top(here, -std::numeric_limits<T>::infinity());
      std::vector<double> sum(here, 0.0);
      for (int64_t c = 0; c < keys; c += kChunk) {
        const int64_t width = std::min(kChunk, keys - c);
        score(h, c, width);
        for (int64_t r = 0; r < here; ++r) {
          T* row = &s.tile[r * pitch];
          const T now = std::max(top[r], kn.row_max(row, width));
          sum[r] = sum[r] * std::exp(static_cast<double>(top[r]) - static_cast<double>(now)) +
                   kn.exp_sum(row, width, now);
          top[r] = now;
        }
      }
      for (int64_t r = 0; r < here; ++r) lse[h * here + r] = static_cast<T>(top[r] + std::log(sum[r]));
    }
    centroids.begin(here, s.cost.get());
    for (int64_t c = 0; c < keys; c += kChunk) {
      const int64_t width = std::min(kChunk, keys - c);
      std::fill(s.map.get(), s.map.get() + here * pitch, T(0));
      for (int64_t h = 0; h < heads; ++h) {
        score(h, c, width);
        for (int64_t r = 0; r < here; ++r) {
          kn.exp_sum(&s.tile[r * pitch], width, lse[h * here + r]);
          kn.axpy(share, &s.tile[r * pitch], &s.map[r * pitch], width);
        }
      }
      for (int64_t r = 0; r < here; ++r) {
        T *map = &s.map[r * pitch], *log = &s.log[r * pitch];
        kn.log_row(map, log, width, std::numeric_limits<T>::min());
        for (int64_t j = 0; j < width; ++j) {
          if (!(map[j] < tiny)) continue;
          // P too small for its log: logsumexp over the heads.
          double top = -std::numeric_limits<double>::infinity(), sum = 0;
          for (int64_t h = 0; h < heads; ++h) {
            const double x =
                static_cast<double>(scale *
                                    kn.dot(q.as<const T>() + h * q.stride[0] + (first + r) * q.stride[1],
                                           k.as<const T>() + h * k.stride[0] + (c + j) * k.stride[1], size)) -
                static_cast<double>(lse[h * here + r]);
            sum = x > top ? sum * std::exp(top - x) + 1.0 : sum + std::exp(x - top);
            top = std::max(top, x);
          }
          log[j] = static_cast<T>(top + std::log(sum / static_cast<double>(heads)));
        }
      }
      centroids.add([&](int64_t r) { return &s.map[r * pitch]; },
                    [&](int64_t r) { return &s.log[r * pitch]; }, here, c, width, s.left.get(),
                    s.scores.get(), s.cost.get());
    }
    for (int64_t r = 0; r < here; ++r)
      params.label.as<int64_t>()[first + r] = centroids.nearest(&s.cost[r * count]);
  });
}

template <class T>
void check_centroids(const TensorView& x, const TensorView& log_x, int64_t cols) {
  check(x, 2, dtype_of<T>(), "centroids");
  check(log_x, 2, dtype_of<T>(), "log_centroids");
  check_shape(x, {x.shape[0], cols}, "centroids");
  check_shape(log_x, {x.shape[0], cols}, "log_centroids");
  require(x.shape[0] > 0, "centroids: at least one expected");
}

}  // namespace
}  // namespace vidops::cpu

namespace vidops {

void assign_rows_forward_cpu(const AssignRowsParams& params, int threads) {
  cpu::dispatch_float(params.p.dtype, [&](auto zero) {
    using T = decltype(zero);
    cpu::check(params.p, 2, cpu::dtype_of<T>(), "p");
    cpu::check(params.log_p, 2, cpu::dtype_of<T>(), "log_p");
    cpu::check_shape(params.log_p, {params.p.shape[0], params.p.shape[1]}, "log_p");
    cpu::check_centroids<T>(params.centroids, params.log_centroids, params.p.shape[1]);
    cpu::check(params.label, 1, DType::i64, "label");
    cpu::check_shape(params.label, {params.p.shape[0]}, "label");
    cpu::assign_rows<T>(params, threads);
  });
}

void assign_clusters_forward_cpu(const AssignClustersParams& params, int threads) {
  cpu::dispatch_float(params.q.dtype, [&](auto zero) {
    using T = decltype(zero);
    cpu::check(params.q, 3, cpu::dtype_of<T>(), "q");
    cpu::check(params.k, 3, cpu::dtype_of<T>(), "k");
    cpu::check_shape(params.k, {params.q.shape[0], params.k.shape[1], params.q.shape[2]}, "k");
    if (params.lse.present()) {
      cpu::check(params.lse, 2, cpu::dtype_of<T>(), "lse");
      cpu::check_shape(params.lse, {params.q.shape[0], params.q.shape[1]}, "lse");
    }
    cpu::check_centroids<T>(params.centroids, params.log_centroids, params.k.shape[1]);
    cpu::check(params.label, 1, DType::i64, "label");
    cpu::check_shape(params.label, {params.q.shape[1]}, "label");
    cpu::assign_clusters<T>(params, threads);
  });
}

}  // namespace vidops
