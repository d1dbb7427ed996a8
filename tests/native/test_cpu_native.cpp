// Every CPU operator at every instruction-set level against naive double loops: odd sizes, strided inputs,
// guard bands behind the outputs, one and two threads bit for bit. Built with the address and
// undefined-behaviour sanitizers.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <vector>

#include "vidops/assign_clusters.h"
#include "vidops/assign_rows.h"
#include "vidops/attention_head_mean.h"
#include "vidops/cpu_isa.h"
#include "vidops/greedy_absorb.h"
#include "vidops/greedy_absorb_kl.h"
#include "vidops/label_propagation.h"
#include "vidops/neighbour_mean.h"
#include "vidops/segment_mean.h"
#include "vidops/slot_attend.h"
#include "vidops/slot_iterations.h"
#include "vidops/slot_side.h"
#include "vidops/sta_score.h"
#include "vidops/symmetric_kl.h"
#include "vidops/symmetric_kl_adjacency.h"
#include "vidops/video_attention.h"

namespace vidops::cpu {
int64_t& panel_budget();
}

using namespace vidops;

namespace {

int failures = 0, checks = 0;
std::string where;

void expect(bool ok, const std::string& what) {
  ++checks;
  if (ok) return;
  ++failures;
  if (failures < 40) std::printf("FAILED %s: %s\n", where.c_str(), what.c_str());
}

template <class T>
DType dtype_of();
template <>
DType dtype_of<float>() {
  return DType::f32;
}
template <>
DType dtype_of<double>() {
  return DType::f64;
}
template <>
DType dtype_of<int64_t>() {
  return DType::i64;
}

// A tensor with `pad` unused elements after every row and a guard band behind all; unused elements hold a
// sentinel.
template <class T>
struct Array {
  std::vector<int64_t> shape;
  int64_t pitch, rows;
  std::vector<T> data;
  static constexpr int64_t kGuard = 32;

  explicit Array(std::vector<int64_t> s, int64_t pad = 0) : shape(std::move(s)) {
    pitch = shape.back() + pad;
    rows = 1;
    for (size_t i = 0; i + 1 < shape.size(); ++i) rows *= shape[i];
    data.assign(static_cast<size_t>(rows * pitch + kGuard), sentinel());
  }
  static T sentinel() { return static_cast<T>(-12345); }
  TensorView view() {
    TensorView v;
    v.data = data.data();
    v.dtype = dtype_of<T>();
    v.rank = static_cast<int32_t>(shape.size());
    int64_t step = 1;
    for (int i = v.rank - 1; i >= 0; --i) {
      v.shape[i] = shape[i];
      v.stride[i] = step;
      step *= i == v.rank - 1 ? pitch : shape[i];
    }
    return v;
  }
  T& at(int64_t row, int64_t c) { return data[static_cast<size_t>(row * pitch + c)]; }
  int64_t width() const { return shape.back(); }
  bool guarded() const {
    for (int64_t i = rows * pitch; i < rows * pitch + kGuard; ++i)
      if (data[static_cast<size_t>(i)] != sentinel()) return false;
    return true;
  }
  bool same_bits(const Array& other) const {
    return std::memcmp(data.data(), other.data.data(), data.size() * sizeof(T)) == 0;
  }
};

std::mt19937_64 generator(7);

template <class T>
Array<T> normal(std::vector<int64_t> shape, double spread, int64_t pad) {
  Array<T> a(std::move(shape), pad);
  std::normal_distribution<double> draw(0.0, spread);
  for (int64_t r = 0; r < a.rows; ++r)
    for (int64_t c = 0; c < a.width(); ++c) a.at(r, c) = static_cast<T>(draw(generator));
  return a;
}

// Rows of clustered distributions and their logs.
template <class T>
void maps(int64_t n, int64_t m, int64_t pad, Array<T>& p, Array<T>& log_p) {
  p = normal<T>({n, m}, 0.6, pad);
  log_p = Array<T>({n, m}, pad + 1);
  Array<T> base = normal<T>({3, m}, 1.5, 0);
  for (int64_t i = 0; i < n; ++i) {
    double sum = 0;
    for (int64_t c = 0; c < m; ++c) sum += std::exp(double(p.at(i, c) += base.at(i % 3, c)));
    for (int64_t c = 0; c < m; ++c) {
      p.at(i, c) = static_cast<T>(std::exp(double(p.at(i, c))) / sum);
      log_p.at(i, c) = std::log(p.at(i, c));
    }
  }
}

template <class T>
double distance(Array<T>& p, Array<T>& lp, int64_t i, Array<T>& q, Array<T>& lq, int64_t j) {
  double d = 0;
  for (int64_t c = 0; c < p.width(); ++c)
    d += (double(p.at(i, c)) - double(q.at(j, c))) * (double(lp.at(i, c)) - double(lq.at(j, c)));
  return d;
}

// Independent statement of the generator: 10 rounds on four words.
bool kept(uint64_t seed, uint64_t element, double p) {
  uint32_t x[4] = {uint32_t(element), uint32_t(element >> 32), 0, 0},
           key[2] = {uint32_t(seed), uint32_t(seed >> 32)};
  for (int r = 0; r < 10; ++r) {
    const uint64_t a = 0xD2511F53ull * x[0], b = 0xCD9E8D57ull * x[2];
    const uint32_t y[4] = {uint32_t(b >> 32) ^ x[1] ^ key[0], uint32_t(b), uint32_t(a >> 32) ^ x[3] ^ key[1],
                           uint32_t(a)};
    std::memcpy(x, y, sizeof(y));
    key[0] += 0x9E3779B9u, key[1] += 0xBB67AE85u;
  }
  return x[0] >= uint64_t(std::floor(p * 4294967296.0));
}

template <class T>
double tolerance() {
  return sizeof(T) == 4 ? 2e-5 : 1e-11;
}

template <class T>
void close(Array<T>& got, const std::vector<double>& want, const std::string& what,
           double tol = tolerance<T>()) {
  double worst = 0, scale = 1e-30;
  for (double w : want) scale = std::max(scale, std::abs(w));
  for (int64_t r = 0; r < got.rows; ++r)
    for (int64_t c = 0; c < got.width(); ++c) {
      const double error = std::abs(double(got.at(r, c)) - want[size_t(r * got.width() + c)]);
      worst = error <= worst ? worst : error;
      if (std::isnan(error)) worst = std::numeric_limits<double>::infinity();
    }
  expect(worst <= tol * scale,
         what + ": error " + std::to_string(worst) + " at scale " + std::to_string(scale));
  expect(got.guarded(), what + ": wrote past its end");
}

struct Shape {
  int64_t b, h, n, m, d;
};

template <class T>
void attention(const Shape& s, double drop) {
  const int64_t pad = 3;
  auto q = normal<T>({s.b, s.h, s.n, s.d}, 1, pad), k = normal<T>({s.b, s.h, s.m, s.d}, 1, pad + 2);
  auto v = normal<T>({s.b, s.h, s.m, s.d}, 1, 1), go = normal<T>({s.b, s.h, s.n, s.d}, 1, 2);
  auto gm = normal<T>({s.b, s.n, s.m}, 1, 1);
  const double scale = 0.7 / std::sqrt(double(s.d));
  const uint64_t seed = 0x123456789abcdefull;
  std::vector<double> P(s.b * s.n * s.m), out(s.b * s.h * s.n * s.d), lse(s.b * s.h * s.n), dq(out.size()),
      dk(s.b * s.h * s.m * s.d), dv(dk.size()), dq_map(dq.size()), dk_map(dk.size());
  for (int64_t b = 0; b < s.b; ++b)
    for (int64_t h = 0; h < s.h; ++h)
      for (int64_t i = 0; i < s.n; ++i) {
        const int64_t bh = b * s.h + h, row = bh * s.n + i;
        std::vector<double> w(s.m), keep(s.m), g(s.m), g_map(s.m);
        double sum = 0, delta = 0, delta_map = 0;
        for (int64_t j = 0; j < s.m; ++j) {
          double x = 0;
          for (int64_t c = 0; c < s.d; ++c) x += double(q.at(row, c)) * double(k.at(bh * s.m + j, c));
          sum += w[j] = std::exp(x * scale);
        }
        lse[row] = std::log(sum);
        for (int64_t j = 0; j < s.m; ++j) {
          w[j] /= sum;
          keep[j] = drop == 0 ? 1 : kept(seed, uint64_t(row * s.m + j), drop) ? 1 / (1 - drop) : 0;
          P[(b * s.n + i) * s.m + j] += w[j] * keep[j] / double(s.h);
          g_map[j] = double(gm.at(b * s.n + i, j)) / double(s.h) * keep[j];
          for (int64_t c = 0; c < s.d; ++c) {
            out[row * s.d + c] += w[j] * keep[j] * double(v.at(bh * s.m + j, c));
            g[j] += double(go.at(row, c)) * double(v.at(bh * s.m + j, c)) * keep[j];
            dv[(bh * s.m + j) * s.d + c] += w[j] * keep[j] * double(go.at(row, c));
          }
          g[j] += g_map[j];
          delta += w[j] * g[j], delta_map += w[j] * g_map[j];
        }
        for (int64_t j = 0; j < s.m; ++j)
          for (int64_t c = 0; c < s.d; ++c) {
            const double ds = w[j] * (g[j] - delta) * scale, ds_map = w[j] * (g_map[j] - delta_map) * scale;
            dq[row * s.d + c] += ds * double(k.at(bh * s.m + j, c));
            dk[(bh * s.m + j) * s.d + c] += ds * double(q.at(row, c));
            dq_map[row * s.d + c] += ds_map * double(k.at(bh * s.m + j, c));
            dk_map[(bh * s.m + j) * s.d + c] += ds_map * double(q.at(row, c));
          }
      }
  Array<T> p({s.b, s.n, s.m}), lp({s.b, s.n, s.m}), l({s.b, s.h, s.n});
  auto head_mean = [&](int threads, Array<T>& map) {
    AttentionHeadMeanParams a;
    a.q = q.view(), a.k = k.view(), a.p = map.view(), a.lse = l.view(), a.scale = scale, a.dropout_p = drop,
    a.seed = seed;
    if (drop == 0) a.log_p = lp.view();
    attention_head_mean_forward_cpu(a, threads);
  };
  head_mean(1, p);
  close(p, P, "map");
  close(l, lse, "lse");
  if (drop == 0) {
    std::vector<double> logs(P);
    for (double& x : logs) x = std::log(x);
    close(lp, logs, "log map");
  }
  Array<T> p2({s.b, s.n, s.m});
  head_mean(2, p2);
  expect(p.same_bits(p2), "map depends on the number of threads");

  Array<T> gq({s.b, s.h, s.n, s.d}), gk({s.b, s.h, s.m, s.d}), gv({s.b, s.h, s.m, s.d}),
      o({s.b, s.h, s.n, s.d});
  AttentionHeadMeanBackwardParams ab;
  ab.grad_p = gm.view(), ab.q = q.view(), ab.k = k.view(), ab.lse = l.view(), ab.grad_q = gq.view(),
  ab.grad_k = gk.view();
  ab.scale = scale, ab.dropout_p = drop, ab.seed = seed;
  attention_head_mean_backward_cpu(ab, 2);
  close(gq, dq_map, "map grad q");
  close(gk, dk_map, "map grad k");

  VideoAttentionParams va;
  va.q = q.view(), va.k = k.view(), va.v = v.view(), va.out = o.view(), va.map = p2.view(), va.lse = l.view();
  va.scale = scale, va.dropout_p = drop, va.seed = seed;
  video_attention_forward_cpu(va, 2);
  close(o, out, "attention out");
  close(p2, P, "attention map");
  VideoAttentionBackwardParams vb;
  vb.grad_out = go.view(), vb.grad_map = gm.view(), vb.q = q.view(), vb.k = k.view(), vb.v = v.view(),
  vb.out = o.view();
  vb.lse = l.view(), vb.grad_q = gq.view(), vb.grad_k = gk.view(), vb.grad_v = gv.view();
  vb.scale = scale, vb.dropout_p = drop, vb.seed = seed;
  video_attention_backward_cpu(vb, 2);
  close(gq, dq, "grad q");
  close(gk, dk, "grad k");
  close(gv, dv, "grad v");
}

int64_t words_of(int64_t n) { return (n + 63) / 64; }
bool bit(Array<int64_t>& a, int64_t i, int64_t j) { return (uint64_t(a.at(i, j / 64)) >> (j % 64)) & 1; }

template <class T>
void clustering(int64_t n, int64_t m) {
  Array<T> p({1, 1}), lp({1, 1}), q({1, 1}), lq({1, 1});
  maps<T>(n, m, 2, p, lp);
  maps<T>(n / 2 + 1, m, 1, q, lq);
  const int64_t other = n / 2 + 1;
  auto batched = [](TensorView v) {
    TensorView b = v;
    b.rank = 3, b.shape[0] = 1, b.stride[0] = 1;
    for (int i = 0; i < 2; ++i) b.shape[i + 1] = v.shape[i], b.stride[i + 1] = v.stride[i];
    return b;
  };
  std::vector<double> cross, self;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < other; ++j) cross.push_back(distance(p, lp, i, q, lq, j));
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) self.push_back(distance(p, lp, i, p, lp, j));
  for (bool same : {false, true}) {
    Array<T> d({1, n, same ? n : other}), d2 = d;
    SymmetricKlParams sp;
    sp.p = batched(p.view()), sp.log_p = batched(lp.view()), sp.q = batched(q.view()),
    sp.log_q = batched(lq.view());
    sp.same = same, sp.distance = d.view();
    symmetric_kl_forward_cpu(sp, 1);
    close(d, same ? self : cross, "distance");
    sp.distance = d2.view();
    symmetric_kl_forward_cpu(sp, 2);
    expect(d.same_bits(d2), "distance depends on the number of threads");
    for (int64_t i = 0; same && i < n; ++i)
      for (int64_t j = 0; j < i; ++j) expect(d.at(i, j) == d.at(j, i), "distance is not symmetric");
  }

  // tau on a value that occurs: the hardest decision there is.
  std::vector<double> sorted(self);
  std::sort(sorted.begin(), sorted.end());
  const double tau = sorted[sorted.size() / 3];
  Array<int64_t> a({n, words_of(n)}), a2 = a;
  for (bool filtered : {false, true}) {
    SymmetricKlAdjacencyParams ap;
    ap.p = p.view(), ap.log_p = lp.view(), ap.tau = tau, ap.filtered = filtered, ap.adjacency = a.view();
    symmetric_kl_adjacency_forward_cpu(ap, 1);
    ap.adjacency = a2.view();
    symmetric_kl_adjacency_forward_cpu(ap, 2);
    expect(a.same_bits(a2), "adjacency depends on the number of threads");
    expect(a.guarded(), "adjacency: wrote past its end");
    int64_t wrong = 0;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < words_of(n) * 64; ++j) {
        const bool want = j < n && (i == j || self[i * n + j] <= tau);
        const bool close_call = j < n && std::abs(self[i * n + j] - tau) < 1e-12;
        wrong += bit(a, i, j) != want && !close_call;
      }
    expect(wrong == 0, "adjacency: " + std::to_string(wrong) + " wrong bits");
  }

  std::vector<double> means(n * m);
  for (int64_t i = 0; i < n; ++i) {
    double total = 0;
    for (int64_t j = 0; j < n; ++j)
      for (int64_t c = 0; bit(a, i, j) && c < m; ++c)
        means[i * m + c] += double(p.at(j, c)), total += double(p.at(j, c));
    for (int64_t c = 0; c < m; ++c) means[i * m + c] /= total;
  }
  Array<T> s({n, m}), s2 = s;
  NeighbourMeanParams np;
  np.adjacency = a.view(), np.p = p.view(), np.mean = s.view();
  neighbour_mean_forward_cpu(np, 1);
  close(s, means, "neighbour mean", tolerance<T>() / 10);
  np.mean = s2.view();
  neighbour_mean_forward_cpu(np, 2);
  expect(s.same_bits(s2), "neighbour mean depends on the number of threads");

  std::vector<int64_t> owner(n, -1), label(n, -1);
  int64_t leaders = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (owner[i] >= 0) continue;
    for (int64_t j = 0; j < n; ++j)
      if (owner[j] < 0 && (j == i || bit(a, i, j))) owner[j] = i, label[j] = leaders;
    ++leaders;
  }
  for (bool lazy : {false, true}) {
    Array<int64_t> o({n}), l({n}), count({1});
    if (lazy) {
      GreedyAbsorbKlParams gp;
      gp.p = p.view(), gp.log_p = lp.view(), gp.tau = tau, gp.owner = o.view(), gp.label = l.view(),
      gp.count = count.view();
      greedy_absorb_kl_forward_cpu(gp, 2);
    } else {
      GreedyAbsorbParams gp;
      gp.adjacency = a.view(), gp.owner = o.view(), gp.label = l.view(), gp.count = count.view();
      greedy_absorb_forward_cpu(gp, 2);
    }
    bool equal = count.at(0, 0) == leaders && o.guarded() && l.guarded() && count.guarded();
    for (int64_t i = 0; i < n; ++i) equal = equal && o.at(0, i) == owner[i] && l.at(0, i) == label[i];
    expect(equal, lazy ? "lazy greedy absorption" : "greedy absorption");
  }

  Array<int64_t> labels({n});
  for (int64_t i = 0; i < n; ++i) labels.at(0, i) = label[i];
  Array<T> segments({leaders + 1, m});
  std::vector<double> want((leaders + 1) * m), size(leaders + 1);
  for (int64_t i = 0; i < n; ++i) size[label[i]] += 1;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t c = 0; c < m; ++c) want[label[i] * m + c] += double(p.at(i, c)) / size[label[i]];
  SegmentMeanParams gp;
  gp.x = p.view(), gp.label = labels.view(), gp.mean = segments.view();
  segment_mean_forward_cpu(gp, 2);
  close(segments, want, "segment mean");
  labels.at(0, n - 1) = leaders + 1;
  bool refused = false;
  try {
    segment_mean_forward_cpu(gp, 2);
  } catch (const ArgumentError&) {
    refused = true;
  }
  expect(refused, "a label out of range is refused");

  Array<int64_t> nearest({n});
  AssignRowsParams rp;
  rp.p = p.view(), rp.log_p = lp.view(), rp.centroids = q.view(), rp.log_centroids = lq.view(),
  rp.label = nearest.view();
  assign_rows_forward_cpu(rp, 2);
  for (int64_t i = 0; i < n; ++i) {
    double best = cross[i * other];
    for (int64_t k = 1; k < other; ++k) best = std::min(best, cross[i * other + k]);
    const int64_t got = nearest.at(0, i);
    expect(got >= 0 && got < other && cross[i * other + got] <= best + tolerance<T>(), "assigned row");
  }
  expect(nearest.guarded(), "assign rows: wrote past its end");
}

template <class T>
void clusters(const Shape& s, bool with_lse) {
  auto q = normal<T>({1, s.h, s.n, s.d}, 1, 2), k = normal<T>({1, s.h, s.m, s.d}, 1, 1);
  Array<T> p({1, s.n, s.m}), lp({1, s.n, s.m}), lse({1, s.h, s.n});
  AttentionHeadMeanParams a;
  a.q = q.view(), a.k = k.view(), a.p = p.view(), a.log_p = lp.view(), a.lse = lse.view(), a.scale = 0.3;
  attention_head_mean_forward_cpu(a, 1);
  const int64_t count = 5;
  Array<T> x({count, s.m}), lx({count, s.m});
  for (int64_t c = 0; c < count; ++c)
    for (int64_t j = 0; j < s.m; ++j)
      x.at(c, j) = p.at((c == 4 ? 1 : c * 3) % s.n, j), lx.at(c, j) = std::log(x.at(c, j));
  auto drop_first = [](TensorView v) {
    for (int i = 1; i < v.rank; ++i) v.shape[i - 1] = v.shape[i], v.stride[i - 1] = v.stride[i];
    --v.rank;
    return v;
  };
  Array<int64_t> label({s.n}), again({s.n});
  AssignClustersParams c;
  c.q = drop_first(q.view()), c.k = drop_first(k.view()), c.centroids = x.view(), c.log_centroids = lx.view();
  c.label = label.view(), c.scale = 0.3;
  if (with_lse) c.lse = drop_first(lse.view());
  assign_clusters_forward_cpu(c, 1);
  c.label = again.view();
  assign_clusters_forward_cpu(c, 2);
  expect(label.same_bits(again) && label.guarded(),
         "assignment depends on the number of threads, or overran");
  for (int64_t i = 0; i < s.n; ++i) {
    double best = std::numeric_limits<double>::infinity(), got = best;
    for (int64_t j = 0; j < count; ++j) {
      const double d = distance(x, lx, j, p, lp, i);
      if (label.at(0, i) == j) got = d;
      best = std::min(best, d);
    }
    expect(got <= best + tolerance<T>(), "assigned cluster");
  }
}

// The greedy walk on relations that are neither symmetric nor reflexive, sparse to full, with unused words
// between the rows: the sequential rule is the definition.
void walk(int64_t n, double density) {
  Array<int64_t> a({n, words_of(n)}, 3);
  std::bernoulli_distribution draw(density);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t w = 0; w < words_of(n); ++w) {
      uint64_t word = 0;
      for (int64_t j = w * 64; j < std::min(n, w * 64 + 64); ++j)
        word |= uint64_t{draw(generator)} << (j % 64);
      a.at(i, w) = static_cast<int64_t>(word);
    }
  Array<int64_t> o({n}), l({n}), count({1});
  GreedyAbsorbParams gp;
  gp.adjacency = a.view(), gp.owner = o.view(), gp.label = l.view(), gp.count = count.view();
  greedy_absorb_forward_cpu(gp, 1);
  std::vector<int64_t> owner(n, -1), label(n, -1);
  int64_t leaders = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (owner[i] >= 0) continue;
    for (int64_t j = 0; j < n; ++j)
      if (owner[j] < 0 && (j == i || bit(a, i, j))) owner[j] = i, label[j] = leaders;
    ++leaders;
  }
  bool equal = count.at(0, 0) == leaders && o.guarded() && l.guarded();
  for (int64_t i = 0; i < n; ++i) equal = equal && o.at(0, i) == owner[i] && l.at(0, i) == label[i];
  expect(equal, "greedy walk, n " + std::to_string(n) + ", density " + std::to_string(density));
}

// Label propagation against sorting all candidates; features of few values, so that ties abound and sums are exact.
template <class T>
void propagation(int64_t height, int64_t width, int64_t frames, int64_t channels, int64_t k, int64_t limit,
                 int64_t unrestricted, int64_t repeats) {
  const int64_t n = height * width, labels = 3;
  Array<T> query({n, channels}, 2), context({frames, n, channels}, 5);
  std::uniform_int_distribution<int> draw(-2, 2);
  for (Array<T>* a : {&query, &context})
    for (int64_t r = 0; r < a->rows; ++r)
      for (int64_t c = 0; c < channels; ++c) a->at(r, c) = static_cast<T>(draw(generator));
  auto soft = normal<T>({frames, n, labels}, 1, 1);
  Array<T> out({n, labels}), weight({n, k}), out2 = out, weight2 = weight;
  Array<int64_t> index({n, k}), index2 = index;
  LabelPropagationParams p;
  p.query = query.view(), p.context = context.view(), p.labels = soft.view();
  p.out = out.view(), p.index = index.view(), p.weight = weight.view();
  p.width = width, p.limit = limit, p.unrestricted = unrestricted, p.repeats = repeats, p.temperature = 3.0;
  label_propagation_forward_cpu(p, 1);
  p.out = out2.view(), p.index = index2.view(), p.weight = weight2.view();
  label_propagation_forward_cpu(p, 2);
  expect(out.same_bits(out2) && index.same_bits(index2) && weight.same_bits(weight2),
         "propagation depends on the number of threads");
  expect(index.guarded() && weight.guarded(), "propagation: wrote past its end");

  std::vector<double> want(n * labels);
  int64_t wrong = 0;
  for (int64_t q = 0; q < n; ++q) {
    std::vector<std::pair<double, int64_t>> all;
    for (int64_t i = 0; i < frames * n; ++i) {
      const int64_t dy = i % n / width - q / width, dx = i % n % width - q % width;
      const bool near = dy * dy + dx * dx < limit;
      double affinity = 0;
      for (int64_t c = 0; c < channels; ++c) affinity += double(query.at(q, c)) * double(context.at(i, c));
      const int64_t copies = (near || i / n < unrestricted ? 1 : 0) + (near && i < n ? repeats : 0);
      for (int64_t c = 0; c < copies; ++c) all.emplace_back(-affinity, i);
    }
    std::sort(all.begin(), all.end());
    all.resize(std::min<size_t>(all.size(), size_t(k)));
    double total = 0;
    for (const auto& one : all) total += std::exp((all[0].first - one.first) / 3.0);
    int64_t place = 0;
    for (size_t i = 0; i < all.size(); ++i) {
      const double w = std::exp((all[0].first - all[i].first) / 3.0) / total;
      for (int64_t c = 0; c < labels; ++c) want[q * labels + c] += w * double(soft.at(all[i].second, c));
      if (i == 0 || all[i].second != all[i - 1].second) wrong += index.at(q, place++) != all[i].second;
    }
    for (; place < k; ++place) wrong += index.at(q, place) != -1;
  }
  expect(wrong == 0, "propagation: " + std::to_string(wrong) + " wrong matches");
  close(out, want, "propagated labels");
}

void corner_cases() {
  // Logits 400 apart: P underflows, its log must not.
  Array<float> q({1, 1, 1, 1}), k({1, 1, 2, 1}), p({1, 1, 2}), lp({1, 1, 2}), lse({1, 1, 1});
  q.at(0, 0) = 20, k.at(0, 0) = 20, k.at(1, 0) = 0;
  AttentionHeadMeanParams a;
  a.q = q.view(), a.k = k.view(), a.p = p.view(), a.log_p = lp.view(), a.lse = lse.view();
  attention_head_mean_forward_cpu(a, 1);
  expect(lp.at(0, 1) == -400.0f && p.at(0, 1) == 0.0f && p.at(0, 0) == 1.0f, "log of an underflown weight");

  // A NaN row is near nothing but itself, and spoils no other row.
  Array<float> x({1, 1}), lx({1, 1});
  maps<float>(70, 40, 0, x, lx);
  x.at(5, 3) = std::numeric_limits<float>::quiet_NaN();
  Array<int64_t> bits({70, 2});
  SymmetricKlAdjacencyParams ap;
  ap.p = x.view(), ap.log_p = lx.view(), ap.tau = 1e6, ap.adjacency = bits.view();
  symmetric_kl_adjacency_forward_cpu(ap, 1);
  bool right = true;
  for (int64_t i = 0; i < 70; ++i)
    for (int64_t j = 0; j < 70; ++j) right = right && bit(bits, i, j) == (i == j || (i != 5 && j != 5));
  expect(right, "NaN rule");

  Array<float> none({0, 7}), log_none({0, 7}), mean({0, 7});
  Array<int64_t> no_bits({0, 0}), owner({0}), label({0}), count({1});
  ap.p = none.view(), ap.log_p = log_none.view(), ap.adjacency = no_bits.view();
  symmetric_kl_adjacency_forward_cpu(ap, 2);
  GreedyAbsorbKlParams gp;
  gp.p = none.view(), gp.log_p = log_none.view(), gp.owner = owner.view(), gp.label = label.view(),
  gp.count = count.view();
  greedy_absorb_kl_forward_cpu(gp, 2);
  expect(count.at(0, 0) == 0, "no rows, no leaders");
  NeighbourMeanParams np;
  np.adjacency = no_bits.view(), np.p = none.view(), np.mean = mean.view();
  neighbour_mean_forward_cpu(np, 2);

  bool refused = false;
  try {
    set_cpu_isa("z80");
  } catch (const ArgumentError&) {
    refused = true;
  }
  expect(refused, "an unknown level is refused");
}

void no_logarithm_with_dropout() {
  auto q = normal<float>({1, 2, 3, 4}, 1, 0), k = normal<float>({1, 2, 5, 4}, 1, 0);
  Array<float> map({1, 3, 5}), log_map({1, 3, 5}), lse({1, 2, 3});
  AttentionHeadMeanParams hp;
  hp.q = q.view(), hp.k = k.view(), hp.p = map.view(), hp.log_p = log_map.view(), hp.lse = lse.view();
  hp.dropout_p = 0.5;
  bool refused = false;
  try {
    attention_head_mean_forward_cpu(hp, 1);
  } catch (const ArgumentError&) {
    refused = true;
  }
  expect(refused, "the logarithm of a map with dropout is refused");
}

// Ends with its last row: what is read behind it is the sanitizer's.
template <class T>
Array<T> rows_alone(std::vector<int64_t> shape, int64_t pad) {
  Array<T> a = normal<T>(std::move(shape), 1, pad);
  a.data.resize(static_cast<size_t>(std::max<int64_t>(0, a.rows * a.pitch - pad)));
  a.data.shrink_to_fit();
  return a;
}

struct SlotShape {
  int64_t b, h, s, n, dk, dv;
  bool own_keys, own_values, raw;
  int64_t groups;
};

template <class T>
void slot_attend(const SlotShape& s) {
  const int64_t hk = s.own_keys ? s.h : 1, hv = s.own_values ? s.h : 1, rows = s.h * s.s, members = s.s / s.groups;
  auto k = rows_alone<T>({s.b, hk, s.n, s.dk}, 3), v = rows_alone<T>({s.b, hv, s.n, s.dv}, 1);
  auto q = normal<T>({s.b, s.h, s.s, s.dk}, 1 / std::sqrt(double(s.dk)), 0), c = normal<T>({s.b, s.h, s.s}, 1, 0);
  auto go = normal<T>({s.b, s.h, s.s, s.dv}, 1, 0), gd = normal<T>({s.b, s.h, s.s}, 1, 0);
  auto mean = rows_alone<T>({s.b, s.n}, 1), rstd = rows_alone<T>({s.b, s.n}, 2);
  auto mask = rows_alone<T>({s.b, s.groups, s.n}, 1);
  const double eps = 0.01;
  auto x = [&](Array<T>& side, int64_t heads, int64_t b, int64_t h, int64_t j, int64_t d) {
    const double raw = side.at((b * heads + (heads > 1 ? h : 0)) * s.n + j, d);
    return s.raw ? (raw - double(mean.at(b, j))) * double(rstd.at(b, j)) : raw;
  };
  std::vector<double> num(s.b * rows * s.dv), den(s.b * rows), gq(s.b * rows * s.dk), gc(s.b * rows),
      gk(s.b * hk * s.n * s.dk), gv(s.b * hv * s.n * s.dv);
  for (int64_t b = 0; b < s.b; ++b)
    for (int64_t first = 0; first < rows; first += members)
      for (int64_t j = 0; j < s.n; ++j) {
        const int64_t h = first / s.s, group = first % s.s / members;
        const double m = double(mask.at(b * s.groups + group, j));
        std::vector<double> a(members), g(members);
        double sum = 0, moved = 0;
        for (int64_t i = 0; i < members; ++i) {
          const int64_t row = b * rows + first + i;
          double dot = double(c.data[row]);
          g[i] = double(gd.data[row]);
          for (int64_t d = 0; d < s.dk; ++d) dot += double(q.at(row, d)) * x(k, hk, b, h, j, d);
          for (int64_t d = 0; d < s.dv; ++d) g[i] += double(go.at(row, d)) * x(v, hv, b, h, j, d);
          sum += a[i] = std::exp(dot);
        }
        for (int64_t i = 0; i < members; ++i) a[i] /= sum, g[i] *= m, moved += a[i] * g[i];
        for (int64_t i = 0; i < members; ++i) {
          const int64_t row = b * rows + first + i;
          const double w = (a[i] + eps) * m, dd = a[i] * (g[i] - moved);
          den[row] += w, gc[row] += dd;
          for (int64_t d = 0; d < s.dv; ++d) {
            num[row * s.dv + d] += w * x(v, hv, b, h, j, d);
            gv[((b * hv + (hv > 1 ? h : 0)) * s.n + j) * s.dv + d] += w * double(go.at(row, d));
          }
          for (int64_t d = 0; d < s.dk; ++d) {
            gq[row * s.dk + d] += dd * x(k, hk, b, h, j, d);
            gk[((b * hk + (hk > 1 ? h : 0)) * s.n + j) * s.dk + d] += dd * double(q.at(row, d));
          }
        }
      }
  auto inputs = [&](SlotAttendParams& a) {
    a.keys = k.view(), a.values = v.view(), a.q = q.view(), a.c = c.view(), a.token_mask = mask.view();
    if (s.raw) a.mean = mean.view(), a.rstd = rstd.view();
    a.groups = s.groups, a.eps = eps;
  };
  for (int threads : {1, 2}) {
    Array<T> n({s.b, s.h, s.s, s.dv}), d({s.b, s.h, s.s});
    SlotAttendForwardParams f;
    inputs(f);
    f.num = n.view(), f.den = d.view();
    slot_attend_forward_cpu(f, threads);
    close(n, num, "slot sums");
    close(d, den, "slot weights");
    Array<T> q2({s.b, s.h, s.s, s.dk}), c2({s.b, s.h, s.s}), k2({s.b, hk, s.n, s.dk}), v2({s.b, hv, s.n, s.dv});
    std::fill_n(k2.data.begin(), gk.size(), T(0)), std::fill_n(v2.data.begin(), gv.size(), T(0));
    SlotAttendBackwardParams r;
    inputs(r);
    r.grad_num = go.view(), r.grad_den = gd.view();
    r.grad_keys = k2.view(), r.grad_values = v2.view(), r.grad_q = q2.view(), r.grad_c = c2.view();
    slot_attend_backward_cpu(r, threads);
    close(q2, gq, "slot grad q");
    close(c2, gc, "slot grad c");
    close(k2, gk, "slot grad keys");
    close(v2, gv, "slot grad values");
  }
  Array<T> got_mean({s.b, s.n}), got_rstd({s.b, s.n});
  auto alone = rows_alone<T>({s.b, s.n, s.dk}, 2);
  std::vector<double> means, rstds;
  for (int64_t row = 0; row < s.b * s.n; ++row) {
    double sum = 0, square = 0;
    for (int64_t d = 0; d < s.dk; ++d) sum += double(alone.at(row, d)) / double(s.dk);
    for (int64_t d = 0; d < s.dk; ++d) square += std::pow(double(alone.at(row, d)) - sum, 2) / double(s.dk);
    means.push_back(sum), rstds.push_back(1 / std::sqrt(square + 0.1));
  }
  TokenStatisticsParams t;
  t.rows = alone.view(), t.mean = got_mean.view(), t.rstd = got_rstd.view(), t.eps = 0.1;
  token_statistics_cpu(t, 2);
  close(got_mean, means, "token mean");
  close(got_rstd, rstds, "token rstd");
}

struct ProductShape {
  int64_t batch, m, n, k;
};

template <class T>
void slot_product(const ProductShape& s, bool a_turned, bool b_turned, bool add) {
  auto a = a_turned ? rows_alone<T>({s.batch, s.k, s.m}, 3) : rows_alone<T>({s.batch, s.m, s.k}, 3);
  auto b = b_turned ? rows_alone<T>({s.batch, s.n, s.k}, 1) : rows_alone<T>({s.batch, s.k, s.n}, 1);
  auto bias = normal<T>({s.n}, 1, 0);
  std::vector<double> want;
  for (int64_t item = 0; item < s.batch; ++item)
    for (int64_t i = 0; i < s.m; ++i)
      for (int64_t j = 0; j < s.n; ++j) {
        double sum = double(bias.data[j]) + (add ? 0.5 : 0.0);
        for (int64_t d = 0; d < s.k; ++d)
          sum += double(a_turned ? a.at(item * s.k + d, i) : a.at(item * s.m + i, d)) *
                 double(b_turned ? b.at(item * s.n + j, d) : b.at(item * s.k + d, j));
        want.push_back(sum);
      }
  Array<T> packed({s.batch, product_packed_size(dtype_of<T>(), s.n, s.k)});
  product_pack_cpu(b.view(), b_turned, packed.view(), 2);
  expect(packed.guarded(), "packed guard");
  for (int turn = 0; turn < 4; ++turn) {
    const int threads = turn % 2 ? 3 : 1;
    Array<T> out({s.batch, s.m, s.n}, 2);
    if (add)
      for (int64_t row = 0; row < s.batch * s.m; ++row) std::fill_n(&out.at(row, 0), s.n, T(0.5));
    ProductParams p;
    p.a = a.view(), p.a_turned = a_turned, p.b = b.view(), p.b_turned = b_turned;
    if (turn > 1 && packed.width()) p.packed = packed.view();
    p.bias = bias.view(), p.out = out.view(), p.add = add;
    product_cpu(p, threads);
    close(out, want, "slot product");
  }
}

template <class T>
void token_norm_grad(int64_t batch, int64_t tokens, int64_t width) {
  auto x = rows_alone<T>({batch, tokens, width}, 3), grad = normal<T>({batch, tokens, width}, 1, 2);
  auto mean = normal<T>({batch, tokens}, 1, 0), rstd = normal<T>({batch, tokens}, 1, 0);
  std::vector<double> want;
  for (int64_t row = 0; row < batch * tokens; ++row) {
    const double m = double(mean.data[row]), r = double(rstd.data[row]);
    double sum = 0, projection = 0;
    for (int64_t d = 0; d < width; ++d) {
      sum += double(grad.at(row, d)) / double(width);
      projection += double(grad.at(row, d)) * (double(x.at(row, d)) - m) * r / double(width);
    }
    for (int64_t d = 0; d < width; ++d)
      want.push_back(r * (double(grad.at(row, d)) - sum - (double(x.at(row, d)) - m) * r * projection));
  }
  TokenNormGradParams p;
  p.rows = x.view(), p.mean = mean.view(), p.rstd = rstd.view(), p.grad = grad.view();
  token_norm_grad_cpu(p, 2);
  close(grad, want, "token norm grad");
}

struct IterationsShape {
  int64_t batch, tokens, channels, slots, width, hq, hv, hidden;
  bool gru;
};

// Against the operators it is made of where those are plain: here what sanitizers, guards and threads say.
template <class T>
void iterations(const IterationsShape& s) {
  auto x = normal<T>({s.batch, s.tokens, s.channels}, 1, 3), slots = normal<T>({s.batch, s.slots, s.width}, 1, 0);
  auto weight = [](int64_t outs, int64_t ins) { return normal<T>({outs, ins}, 1 / std::sqrt(double(ins)), 0); };
  auto key = weight(s.hq, s.channels), value = weight(s.hv, s.channels), q = weight(s.hq, s.width);
  auto merge = weight(s.width, s.hv), ih = weight(3 * s.width, s.width), hh = weight(3 * s.width, s.width);
  auto first = weight(s.hidden, s.width), second = weight(s.width, s.hidden);
  auto key_bias = normal<T>({s.hq}, 1, 0), value_bias = normal<T>({s.hv}, 1, 0), shift = normal<T>({s.width}, 1, 0);
  std::vector<Array<T>> outs;
  for (int threads : {1, 3}) {
    Array<T> out({s.batch, s.slots, s.width}), states({3, s.batch, s.slots, s.width});
    Array<T> dots({s.batch, s.slots, s.tokens}), attn({s.batch, s.slots, s.tokens});
    SlotIterationsParams p;
    p.inputs = x.view(), p.slots = slots.view(), p.key = key.view(), p.value = value.view(), p.q_weight = q.view();
    p.key_bias = key_bias.view(), p.value_bias = value_bias.view(), p.norm_slots_bias = shift.view();
    p.merge_weight = merge.view(), p.merge_bias = shift.view();
    if (s.gru) p.gru_weight_ih = ih.view(), p.gru_weight_hh = hh.view();
    if (s.hidden) p.mlp_weight1 = first.view(), p.mlp_weight2 = second.view(), p.mlp_bias2 = shift.view();
    p.out = out.view(), p.states = states.view(), p.dots = dots.view(), p.attn = attn.view();
    p.iters = 3, p.eps = 1e-8;
    slot_iterations_forward_cpu(p, threads);
    expect(out.guarded() && states.guarded() && dots.guarded() && attn.guarded(), "iterations guard");
    for (int64_t token = 0; token < s.tokens; ++token) {
      double sum = 0;
      for (int64_t slot = 0; slot < s.slots; ++slot) sum += double(attn.at(slot, token));
      expect(std::abs(sum - 1) < 1e-5, "iterations: a softmax over the slots");
    }
    for (int64_t i = 0; i < slots.rows * s.width; ++i)
      expect(states.data[i] == slots.data[i] && std::isfinite(double(out.data[i])), "iterations: the first state");
    outs.push_back(out), outs.push_back(dots);
  }
  expect(outs[0].same_bits(outs[2]) && outs[1].same_bits(outs[3]), "iterations: threads");
}

// Pruned tokens are the rows that `keep` names, whatever the threads and the dtype they are moved in.
template <class T>
void pruning(int64_t batch, int64_t frames, int64_t tokens, int64_t width, int64_t keys, int64_t dropped,
             bool reverse) {
  auto x = normal<T>({batch, frames * tokens, width}, 1, 3), metric = normal<T>({batch, frames * tokens, keys}, 1, 1);
  const int64_t kept_tokens = tokens - dropped, even = (tokens + 1) / 2;
  std::vector<Array<T>> runs;
  for (int threads : {1, 3}) {
    Array<T> kept({batch, frames * kept_tokens, width}), similarity({batch, even});
    Array<T> activation({batch, frames, tokens}), acc({batch, frames, tokens}), score({batch, frames, tokens});
    Array<int64_t> keep({batch, frames, kept_tokens}), order({batch, tokens});
    StaScoreParams p;
    p.x = p.source = x.view(), p.metric = metric.view(), p.kept = kept.view(), p.keep = keep.view();
    p.activation = activation.view(), p.acc = acc.view(), p.score = score.view();
    p.first_order = order.view(), p.first_similarity = similarity.view(), p.reverse = reverse;
    sta_score_forward_cpu(p, threads);
    expect(kept.guarded() && keep.guarded() && order.guarded() && similarity.guarded(), "pruning guard");
    expect(activation.guarded() && acc.guarded() && score.guarded(), "pruning guard of figures");
    for (int64_t group = 0; group < batch * frames; ++group)
      for (int64_t k = 0; k < kept_tokens; ++k) {
        const int64_t row = group * kept_tokens + k, from = group * tokens + keep.at(group, k);
        expect(!std::memcmp(&kept.at(row, 0), &x.at(from, 0), sizeof(T) * width), "pruning: a kept row");
      }
    runs.push_back(kept), runs.push_back(score);
  }
  expect(runs[0].same_bits(runs[2]) && runs[1].same_bits(runs[3]), "pruning: threads");
}

template <class T>
void everything() {
  iterations<T>({2, 33, 17, 5, 9, 7, 9, 0, false});
  iterations<T>({1, 1, 1, 1, 1, 1, 1, 3, true});
  iterations<T>({5, 40, 83, 17, 98, 70, 98, 130, true});  // weights that are laid out once
  pruning<T>(2, 3, 21, 37, 9, 5, false);
  pruning<T>(1, 2, 131, 16, 64, 40, true);
  pruning<T>(1, 1, 1, 3, 1, 0, false);
  for (const Shape& s :
       {Shape{1, 1, 1, 1, 1}, Shape{2, 3, 17, 33, 5}, Shape{1, 2, 65, 131, 48}, Shape{1, 2, 3, 7, 131}})
    for (double drop : {0.0, 0.3}) attention<T>(s, drop);
  attention<T>({0, 2, 3, 4, 5}, 0.0);
  for (int64_t n : {1, 2, 15, 64, 131, 300}) clustering<T>(n, n == 1 ? 1 : n + 6);
  clustering<T>(520, 12);  // several blocks of the first operand against a resident second one
  // Several blocks of packed rows, which real sizes need and these would not.
  const int64_t budget = vidops::cpu::panel_budget();
  vidops::cpu::panel_budget() = 1;
  clustering<T>(300, 45);
  vidops::cpu::panel_budget() = budget;
  clusters<T>({1, 2, 37, 530, 9}, false);
  clusters<T>({1, 3, 130, 70, 16}, true);
  slot_attend<T>({1, 1, 1, 1, 1, 1, false, false, false, 1});
  slot_attend<T>({2, 1, 7, 300, 64, 32, false, false, true, 1});
  slot_attend<T>({2, 3, 15, 65, 37, 33, true, false, true, 5});
  slot_attend<T>({1, 2, 4, 63, 5, 17, false, true, false, 2});
  for (const ProductShape& p : {ProductShape{1, 1, 1, 1}, ProductShape{2, 15, 33, 129}, ProductShape{1, 114, 130, 40},
                                ProductShape{1, 5, 31, 1030}, ProductShape{2, 70, 67, 100}, ProductShape{1, 514, 66, 64},
                                ProductShape{1, 3, 5, 0}, ProductShape{0, 3, 5, 2}})
    for (int form = 0; form < 8; ++form) slot_product<T>(p, form & 1, form & 2, form & 4);
  for (int64_t width : {1, 16, 37}) token_norm_grad<T>(2, 65, width);
  propagation<T>(1, 1, 1, 1, 3, 1, 1, 0);
  propagation<T>(3, 131, 2, 21, 7, 50, 1, 2);  // several pieces of a row
  propagation<T>(40, 1, 3, 16, 5, 7, 0, 1);
  propagation<T>(6, 9, 3, 37, 128, 1000, 2, 0);
}

}  // namespace

int main() {
  for (const std::string& isa : cpu_isas()) {
    set_cpu_isa(isa.c_str());
    where = isa + " float32";
    everything<float>();
    for (int64_t n : {1, 63, 64, 65, 513, 1100})
      for (double density : {0.0, 0.004, 0.06, 0.5, 1.0}) walk(n, density);
    corner_cases();
    no_logarithm_with_dropout();
    where = isa + " float64";
    everything<double>();
  }
  std::printf("%d checks on %zu levels, %d failures\n", checks, cpu_isas().size(), failures);
  return failures ? 1 : 0;
}
