// Head-averaged softmax maps and attention with an optional map (Eq. E1), forward.
//
// A task is a block of query rows: per head, the scores of the block against all keys live in one L2-sized
// tile, become weights in place and are added to the map, so per-head maps never exist. Workspace: packed
// keys (and values) of one batch item, H * M * D elements each, plus per thread one tile of about 1 MB (never
// less than mr rows of M).
#include "panels.h"
#include "vidops/attention_head_mean.h"
#include "vidops/video_attention.h"

namespace vidops::cpu {
namespace {

constexpr int64_t kTileBytes = 1 << 20;

template <class T>
struct Forward {
  TensorView q, k, v, out, map, log_map, lse;
  T scale;
  Dropout dropout;
};

// log P where P itself is too small to carry its relative accuracy: logsumexp over the heads.
template <class T>
T log_mean(const Forward<T>& f, const Kernels<T>& kn, int64_t b, int64_t i, int64_t j) {
  const int64_t heads = f.q.shape[1], size = f.q.shape[3], queries = f.q.shape[2];
  T best = -std::numeric_limits<T>::infinity();
  double sum = 0;
  for (int64_t h = 0; h < heads; ++h) {
    const T* q = f.q.template as<T>() + b * f.q.stride[0] + h * f.q.stride[1] + i * f.q.stride[2];
    const T* k = f.k.template as<T>() + b * f.k.stride[0] + h * f.k.stride[1] + j * f.k.stride[2];
    const T x = f.scale * kn.dot(q, k, size) - f.lse.template as<T>()[(b * heads + h) * queries + i];
    if (x > best) {
      sum = sum * std::exp(static_cast<double>(best) - static_cast<double>(x)) + 1.0;
      best = x;
    } else {
      sum += std::exp(static_cast<double>(x) - static_cast<double>(best));
    }
  }
  return static_cast<T>(best + std::log(sum) - std::log(static_cast<double>(heads)));
}

template <class T>
void forward(const Forward<T>& f, int threads) {
  const Kernels<T>& kn = kernels<T>();
  const Gemm<T>& gemm = kn.gemm;
  const int64_t batch = f.q.shape[0], heads = f.q.shape[1], queries = f.q.shape[2], size = f.q.shape[3];
  const int64_t keys = f.k.shape[2], key_panels = ceil_div(keys, gemm.nr), padded_keys = key_panels * gemm.nr;
  const int64_t out_size = f.v.present() ? f.v.shape[3] : 0;
  const int64_t value_panels = ceil_div(out_size, gemm.nr), padded_size = value_panels * gemm.nr;
  const bool with_v = f.v.rank > 0, with_map = f.map.present(), with_log = f.log_map.present();
  const int64_t rows = block_rows(queries, padded_keys * sizeof(T), gemm.mr, kTileBytes);
  const int64_t blocks = ceil_div(queries, rows);
  // Below this a sum of heads may have lost flushed terms.
  const T tiny = sizeof(T) == 4 ? T(1e-30) : T(1e-290);

  Buffer<T> packed_k(heads * padded_keys * size), packed_v(with_v ? heads * padded_size * keys : 1);
  struct Scratch {
    Buffer<T> tile, q, weights, out;
  };
  std::vector<Scratch> scratch(std::max(threads, 1));
  for (Scratch& s : scratch) {
    s.tile.resize(rows * padded_keys);
    s.q.resize(rows * size);
    if (with_v) s.weights.resize(rows * keys), s.out.resize(rows * padded_size);
  }

  std::vector<T> key_norm(static_cast<size_t>(heads));
  for (int64_t b = 0; b < batch; ++b) {
    parallel_for(heads, threads, [&](int64_t h, int) {
      const T* k = f.k.template as<T>() + b * f.k.stride[0] + h * f.k.stride[1];
      T longest = 0;
      for (int64_t j = 0; j < keys; ++j)
        longest = std::max(longest, kn.dot(k + j * f.k.stride[2], k + j * f.k.stride[2], size));
      key_norm[h] = std::sqrt(longest);
      pack_panels<T>(
          gemm, false, [&](int64_t j) { return k + j * f.k.stride[2]; }, keys, size, nullptr, T(1), 0, size,
          reinterpret_cast<char*>(&packed_k[h * padded_keys * size]));
      if (with_v)
        pack_columns<T>(gemm, false, f.v.template as<T>() + b * f.v.stride[0] + h * f.v.stride[1],
                        f.v.stride[2], out_size, keys, &packed_v[h * padded_size * keys]);
    });
    parallel_for(blocks, threads, [&](int64_t block, int thread) {
      const int64_t first = block * rows, count = std::min(rows, queries - first);
      const int64_t panels = ceil_div(count, gemm.mr);
      Scratch& s = scratch[thread];
      T* tile = s.tile.get();
      T* map = with_map ? f.map.template as<T>() + (b * queries + first) * keys : nullptr;
      for (int64_t h = 0; h < heads; ++h) {
        const T* q = f.q.template as<T>() + b * f.q.stride[0] + h * f.q.stride[1] + first * f.q.stride[2];
        pack_panels<T>(
            gemm, true, [&](int64_t i) { return q + i * f.q.stride[2]; }, count, size, nullptr, f.scale, 0,
            size, reinterpret_cast<char*>(s.q.get()));
        gemm.run(panels, key_panels, size, s.q.get(), &packed_k[h * padded_keys * size], tile, padded_keys);
        for (int64_t r = 0; r < count; ++r) {
          T* row = tile + r * padded_keys;
          // |q||k| bounds every score: where that is small no maximum is needed to keep exp in range
          // (a few keys keep it: a lone key then has the weight 1 exactly).
          const T* query = q + r * f.q.stride[2];
          const T bound = std::abs(f.scale) * std::sqrt(kn.dot(query, query, size)) * key_norm[h];
          const T top = keys > 16 && bound <= T(30) ? T(0) : kn.row_max(row, keys);
          const T sum = kn.exp_sum(row, keys, top);
          const int64_t index = (b * heads + h) * queries + first + r;
          f.lse.template as<T>()[index] = keys ? top + std::log(sum) : -std::numeric_limits<T>::infinity();
          if (f.dropout.active)
            for (int64_t j = 0; j < keys; ++j)
              row[j] *= static_cast<T>(f.dropout.factor(static_cast<uint64_t>(index * keys + j)));
          if (map)
            (h ? kn.axpy : kn.scaled_copy)(T(1) / (sum * static_cast<T>(heads)), row, map + r * keys, keys);
          if (with_v)
            for (int64_t j = 0; j < keys; ++j) row[j] /= sum;
        }
        if (!with_v) continue;
        pack_panels<T>(
            gemm, true, [&](int64_t i) { return tile + i * padded_keys; }, count, keys, nullptr, T(1), 0,
            keys, reinterpret_cast<char*>(s.weights.get()));
        gemm.run(panels, value_panels, keys, s.weights.get(), &packed_v[h * padded_size * keys], s.out.get(),
                 padded_size);
        T* out = f.out.template as<T>() + ((b * heads + h) * queries + first) * out_size;
        for (int64_t r = 0; r < count; ++r)
          std::copy_n(s.out.get() + r * padded_size, out_size, out + r * out_size);
      }
      if (!with_log) return;
      T* log_map = f.log_map.template as<T>() + (b * queries + first) * keys;
      for (int64_t r = 0; r < count; ++r) {
        T* row = map + r * keys;
        if (!(kn.log_row(row, log_map + r * keys, keys, std::numeric_limits<T>::min()) < tiny)) continue;
        for (int64_t j = 0; j < keys; ++j) {
          if (!(row[j] < tiny)) continue;
          const T value = log_mean(f, kn, b, first + r, j);
          log_map[r * keys + j] = value;
          row[j] = std::exp(value);
        }
      }
    });
  }
}

template <class T>
void check_qk(const TensorView& q, const TensorView& k) {
  check(q, 4, dtype_of<T>(), "q");
  check(k, 4, dtype_of<T>(), "k");
  check_shape(k, {q.shape[0], q.shape[1], k.shape[2], q.shape[3]}, "k");
}

template <class T>
void check_map(const TensorView& map, const TensorView& q, const TensorView& k, const char* name) {
  check(map, 3, dtype_of<T>(), name);
  check_shape(map, {q.shape[0], q.shape[2], k.shape[2]}, name);
}

template <class T>
void check_lse(const TensorView& lse, const TensorView& q) {
  check(lse, 3, dtype_of<T>(), "lse");
  check_shape(lse, {q.shape[0], q.shape[1], q.shape[2]}, "lse");
}

template <class T>
struct Backward {
  TensorView q, k, v, lse, grad_out, grad_map, grad_q, grad_k, grad_v;
  T scale;
  Dropout dropout;
};

template <class T>
const T* slice(const TensorView& t, int64_t b, int64_t h) {
  return t.as<const T>() + b * t.stride[0] + h * t.stride[1];
}

// One task per (b, h): weights are rebuilt from lse for a block of rows, then
// dP = (dO v^T + dMap/H) m, dS = P (dP - rowsum(P dP)) scale, dq = dS k, dk = dS^T q, dv = (P m)^T dO.
template <class T>
void backward(const Backward<T>& f, int threads) {
  const Kernels<T>& kn = kernels<T>();
  const Gemm<T>& gemm = kn.gemm;
  const int64_t batch = f.q.shape[0], heads = f.q.shape[1], queries = f.q.shape[2], size = f.q.shape[3];
  const int64_t keys = f.k.shape[2], key_panels = ceil_div(keys, gemm.nr), padded_keys = key_panels * gemm.nr;
  const int64_t size_panels = ceil_div(size, gemm.nr), padded_size = size_panels * gemm.nr;
  const int64_t key_a_panels = ceil_div(keys, gemm.mr);
  const bool with_v = f.v.rank > 0, with_map = f.grad_map.present();
  const int64_t rows = block_rows(queries, padded_keys * sizeof(T), gemm.mr, kTileBytes);

  parallel_for(batch * heads, threads, [&](int64_t task, int) {
    const int64_t b = task / heads, h = task % heads;
    const T *q = slice<T>(f.q, b, h), *k = slice<T>(f.k, b, h);
    const T* v = with_v ? slice<T>(f.v, b, h) : nullptr;
    const T* grad_out = with_v ? slice<T>(f.grad_out, b, h) : nullptr;
    const T* lse = slice<T>(f.lse, b, h);
    T* grad_q = f.grad_q.template as<T>() + task * queries * size;
    T* grad_k = f.grad_k.template as<T>() + task * keys * size;
    T* grad_v = with_v ? f.grad_v.template as<T>() + task * keys * size : nullptr;
    std::fill(grad_k, grad_k + keys * size, T(0));
    if (with_v) std::fill(grad_v, grad_v + keys * size, T(0));

    Buffer<T> k_rows(padded_keys * size), k_columns(padded_size * keys),
        v_rows(with_v ? padded_keys * size : 1);
    Buffer<T> p(rows * padded_keys), g(rows * padded_keys), left(rows * std::max(size, keys));
    Buffer<T> transposed(key_a_panels * gemm.mr * rows), right(padded_size * rows);
    Buffer<T> small(rows * padded_size), wide(key_a_panels * gemm.mr * padded_size);
    auto as_bytes = [](Buffer<T>& x) { return reinterpret_cast<char*>(x.get()); };
    pack_panels<T>(
        gemm, false, [&](int64_t j) { return k + j * f.k.stride[2]; }, keys, size, nullptr, T(1), 0, size,
        as_bytes(k_rows));
    pack_columns<T>(gemm, false, k, f.k.stride[2], size, keys, k_columns.get());
    if (with_v)
      pack_panels<T>(
          gemm, false, [&](int64_t j) { return v + j * f.v.stride[2]; }, keys, size, nullptr, T(1), 0, size,
          as_bytes(v_rows));

    // target (keys, size) += x^T y for the current block of `count` rows
    auto add_transposed = [&](const T* x, const T* y, int64_t y_pitch, int64_t count, T* target) {
      pack_columns<T>(gemm, true, x, padded_keys, keys, count, transposed.get());
      pack_columns<T>(gemm, false, y, y_pitch, size, count, right.get());
      gemm.run(key_a_panels, size_panels, count, transposed.get(), right.get(), wide.get(), padded_size);
      for (int64_t j = 0; j < keys; ++j) kn.axpy(T(1), &wide[j * padded_size], target + j * size, size);
    };

    for (int64_t first = 0; first < queries; first += rows) {
      const int64_t count = std::min(rows, queries - first), panels = ceil_div(count, gemm.mr);
      const T* q_block = q + first * f.q.stride[2];
      pack_panels<T>(
          gemm, true, [&](int64_t i) { return q_block + i * f.q.stride[2]; }, count, size, nullptr, f.scale,
          0, size, as_bytes(left));
      gemm.run(panels, key_panels, size, left.get(), k_rows.get(), p.get(), padded_keys);
      const T* go = nullptr;
      if (with_v) {
        go = grad_out + first * f.grad_out.stride[2];
        pack_panels<T>(
            gemm, true, [&](int64_t i) { return go + i * f.grad_out.stride[2]; }, count, size, nullptr, T(1),
            0, size, as_bytes(left));
        gemm.run(panels, key_panels, size, left.get(), v_rows.get(), g.get(), padded_keys);
      } else {
        std::fill(g.get(), g.get() + rows * padded_keys, T(0));
      }
      const T head_share = T(1) / static_cast<T>(heads);
      for (int64_t r = 0; r < count; ++r) {
        T *pr = &p[r * padded_keys], *gr = &g[r * padded_keys];
        kn.exp_sum(pr, keys, lse[first + r]);
        if (with_map)
          kn.axpy(head_share,
                  f.grad_map.template as<T>() + b * f.grad_map.stride[0] + (first + r) * f.grad_map.stride[1],
                  gr, keys);
        const uint64_t element = static_cast<uint64_t>((task * queries + first + r) * keys);
        if (f.dropout.active)
          for (int64_t j = 0; j < keys; ++j) gr[j] *= static_cast<T>(f.dropout.factor(element + j));
        const T delta = kn.dot(pr, gr, keys);
        for (int64_t j = 0; j < keys; ++j) gr[j] = pr[j] * (gr[j] - delta) * f.scale;
        if (with_v && f.dropout.active)
          for (int64_t j = 0; j < keys; ++j) pr[j] *= static_cast<T>(f.dropout.factor(element + j));
      }
      pack_panels<T>(
          gemm, true, [&](int64_t i) { return &g[i * padded_keys]; }, count, keys, nullptr, T(1), 0, keys,
          as_bytes(left));
      gemm.run(panels, size_panels, keys, left.get(), k_columns.get(), small.get(), padded_size);
      for (int64_t r = 0; r < count; ++r)
        std::copy_n(&small[r * padded_size], size, grad_q + (first + r) * size);
      add_transposed(g.get(), q_block, f.q.stride[2], count, grad_k);
      if (with_v) add_transposed(p.get(), go, f.grad_out.stride[2], count, grad_v);
    }
  });
}

}  // namespace
}  // namespace vidops::cpu

namespace vidops {

void attention_head_mean_forward_cpu(const AttentionHeadMeanParams& params, int threads) {
  cpu::dispatch_float(params.q.dtype, [&](auto zero) {
    using T = decltype(zero);
    cpu::check_qk<T>(params.q, params.k);
    cpu::check_map<T>(params.p, params.q, params.k, "p");
    cpu::check_lse<T>(params.lse, params.q);
    if (params.log_p.present()) cpu::check_map<T>(params.log_p, params.q, params.k, "log_p");
    // An entry that every head drops is an exact zero.
    require(!params.log_p.present() || params.dropout_p == 0.0,
            "log_p: a map with dropout has no logarithm; ask for one or the other");
    cpu::Forward<T> f{params.q,
                      params.k,
                      {},
                      {},
                      params.p,
                      params.log_p,
                      params.lse,
                      static_cast<T>(params.scale),
                      cpu::Dropout(params.dropout_p, params.seed)};
    cpu::forward(f, threads);
  });
}

void attention_head_mean_backward_cpu(const AttentionHeadMeanBackwardParams& params, int threads) {
  cpu::dispatch_float(params.q.dtype, [&](auto zero) {
    using T = decltype(zero);
    cpu::check_qk<T>(params.q, params.k);
    cpu::check_map<T>(params.grad_p, params.q, params.k, "grad_p");
    cpu::check_lse<T>(params.lse, params.q);
    cpu::check_qk<T>(params.grad_q, params.grad_k);
    cpu::Backward<T> f{params.q,
                       params.k,
                       {},
                       params.lse,
                       {},
                       params.grad_p,
                       params.grad_q,
                       params.grad_k,
                       {},
                       static_cast<T>(params.scale),
                       cpu::Dropout(params.dropout_p, params.seed)};
    cpu::backward(f, threads);
  });
}

void video_attention_forward_cpu(const VideoAttentionParams& params, int threads) {
  cpu::dispatch_float(params.q.dtype, [&](auto zero) {
    using T = decltype(zero);
    cpu::check_qk<T>(params.q, params.k);
    cpu::check_qk<T>(params.q, params.v);
    require(params.v.shape[2] == params.k.shape[2], "v: as many keys as k expected");
    cpu::check_qk<T>(params.q, params.out);
    cpu::check_lse<T>(params.lse, params.q);
    if (params.map.present()) cpu::check_map<T>(params.map, params.q, params.k, "map");
    cpu::Forward<T> f{params.q,
                      params.k,
                      params.v,
                      params.out,
                      params.map,
                      {},
                      params.lse,
                      static_cast<T>(params.scale),
                      cpu::Dropout(params.dropout_p, params.seed)};
    cpu::forward(f, threads);
  });
}

void video_attention_backward_cpu(const VideoAttentionBackwardParams& params, int threads) {
  cpu::dispatch_float(params.q.dtype, [&](auto zero) {
    using T = decltype(zero);
    cpu::check_qk<T>(params.q, params.k);
    cpu::check_qk<T>(params.q, params.v);
    cpu::check_qk<T>(params.q, params.grad_out);
    require(params.v.shape[2] == params.k.shape[2], "v: as many keys as k expected");
    require(params.grad_out.shape[2] == params.q.shape[2], "grad_out: as many queries as q expected");
    cpu::check_lse<T>(params.lse, params.q);
    if (params.grad_map.present()) cpu::check_map<T>(params.grad_map, params.q, params.k, "grad_map");
    cpu::Backward<T> f{params.q,
                       params.k,
                       params.v,
                       params.lse,
                       params.grad_out,
                       params.grad_map,
                       params.grad_q,
                       params.grad_k,
                       params.grad_v,
                       static_cast<T>(params.scale),
                       cpu::Dropout(params.dropout_p, params.seed)};
    cpu::backward(f, threads);
  });
}

}  // namespace vidops
