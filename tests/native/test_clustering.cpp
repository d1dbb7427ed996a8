// Clustering: distances, adjacency, means, greedy absorption and the assignment of rows and tokens.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cpu_testing.h"
#include "vidops/assign_clusters.h"
#include "vidops/assign_rows.h"
#include "vidops/attention_head_mean.h"
#include "vidops/greedy_absorb.h"
#include "vidops/greedy_absorb_kl.h"
#include "vidops/neighbour_mean.h"
#include "vidops/segment_mean.h"
#include "vidops/symmetric_kl.h"
#include "vidops/symmetric_kl_adjacency.h"

namespace vidops::cpu {
int64_t& panel_budget();  // of csrc/cpu/distance.h, which the cores keep to themselves
}

namespace vidops::testing {

namespace {

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

int64_t words_of(int64_t n) { return (n + 63) / 64; }
bool bit(Array<int64_t>& a, int64_t i, int64_t j) { return (uint64_t(a.at(i, j / 64)) >> (j % 64)) & 1; }

// The sequential rule, which is the definition of the greedy walk.
struct GreedyRule {
  std::vector<int64_t> owner, label;
  int64_t leaders = 0;

  GreedyRule(Array<int64_t>& adjacency, int64_t n) : owner(n, -1), label(n, -1) {
    for (int64_t i = 0; i < n; ++i) {
      if (owner[i] >= 0) continue;
      for (int64_t j = 0; j < n; ++j)
        if (owner[j] < 0 && (j == i || bit(adjacency, i, j))) owner[j] = i, label[j] = leaders;
      ++leaders;
    }
  }
  bool gave(Array<int64_t>& o, Array<int64_t>& l, Array<int64_t>& count) const {
    bool equal = count.at(0, 0) == leaders && o.guarded() && l.guarded() && count.guarded();
    for (int64_t i = 0; i < o.width(); ++i) equal = equal && o.at(0, i) == owner[i] && l.at(0, i) == label[i];
    return equal;
  }
};

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

  const GreedyRule rule(a, n);
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
    expect(rule.gave(o, l, count), lazy ? "lazy greedy absorption" : "greedy absorption");
  }

  Array<int64_t> labels({n});
  for (int64_t i = 0; i < n; ++i) labels.at(0, i) = rule.label[i];
  Array<T> segments({rule.leaders + 1, m});
  std::vector<double> want((rule.leaders + 1) * m), size(rule.leaders + 1);
  for (int64_t i = 0; i < n; ++i) size[rule.label[i]] += 1;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t c = 0; c < m; ++c) want[rule.label[i] * m + c] += double(p.at(i, c)) / size[rule.label[i]];
  SegmentMeanParams gp;
  gp.x = p.view(), gp.label = labels.view(), gp.mean = segments.view();
  segment_mean_forward_cpu(gp, 2);
  close(segments, want, "segment mean");
  labels.at(0, n - 1) = rule.leaders + 1;
  expect_refused([&] { segment_mean_forward_cpu(gp, 2); }, "a label out of range");

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
void clusters(int64_t heads, int64_t n, int64_t m, int64_t d, bool with_lse) {
  auto q = normal<T>({1, heads, n, d}, 1, 2), k = normal<T>({1, heads, m, d}, 1, 1);
  Array<T> p({1, n, m}), lp({1, n, m}), lse({1, heads, n});
  AttentionHeadMeanParams a;
  a.q = q.view(), a.k = k.view(), a.p = p.view(), a.log_p = lp.view(), a.lse = lse.view(), a.scale = 0.3;
  attention_head_mean_forward_cpu(a, 1);
  const int64_t count = 5;
  Array<T> x({count, m}), lx({count, m});
  for (int64_t c = 0; c < count; ++c)
    for (int64_t j = 0; j < m; ++j)
      x.at(c, j) = p.at((c == 4 ? 1 : c * 3) % n, j), lx.at(c, j) = std::log(x.at(c, j));
  auto drop_first = [](TensorView v) {
    for (int i = 1; i < v.rank; ++i) v.shape[i - 1] = v.shape[i], v.stride[i - 1] = v.stride[i];
    --v.rank;
    return v;
  };
  Array<int64_t> label({n}), again({n});
  AssignClustersParams c;
  c.q = drop_first(q.view()), c.k = drop_first(k.view()), c.centroids = x.view(), c.log_centroids = lx.view();
  c.label = label.view(), c.scale = 0.3;
  if (with_lse) c.lse = drop_first(lse.view());
  assign_clusters_forward_cpu(c, 1);
  c.label = again.view();
  assign_clusters_forward_cpu(c, 2);
  expect(label.same_bits(again) && label.guarded(),
         "assignment depends on the number of threads, or overran");
  for (int64_t i = 0; i < n; ++i) {
    double best = std::numeric_limits<double>::infinity(), got = best;
    for (int64_t j = 0; j < count; ++j) {
      const double here = distance(x, lx, j, p, lp, i);
      if (label.at(0, i) == j) got = here;
      best = std::min(best, here);
    }
    expect(got <= best + tolerance<T>(), "assigned cluster");
  }
}

// The greedy walk on relations that are neither symmetric nor reflexive, sparse to full, with unused words
// between the rows.
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
  expect(GreedyRule(a, n).gave(o, l, count),
         "greedy walk, n " + std::to_string(n) + ", density " + std::to_string(density));
}

// A NaN row is near nothing but itself, and spoils no other row.
void nan_row() {
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
}

void no_rows() {
  Array<float> none({0, 7}), log_none({0, 7}), mean({0, 7});
  Array<int64_t> no_bits({0, 0}), owner({0}), label({0}), count({1});
  SymmetricKlAdjacencyParams ap;
  ap.p = none.view(), ap.log_p = log_none.view(), ap.tau = 1e6, ap.adjacency = no_bits.view();
  symmetric_kl_adjacency_forward_cpu(ap, 2);
  GreedyAbsorbKlParams gp;
  gp.p = none.view(), gp.log_p = log_none.view(), gp.owner = owner.view(), gp.label = label.view(),
  gp.count = count.view();
  greedy_absorb_kl_forward_cpu(gp, 2);
  expect(count.at(0, 0) == 0, "no rows, no leaders");
  NeighbourMeanParams np;
  np.adjacency = no_bits.view(), np.p = none.view(), np.mean = mean.view();
  neighbour_mean_forward_cpu(np, 2);
}

}  // namespace

template <class T>
void clustering_tests() {
  for (int64_t n : {1, 2, 15, 64, 131, 300}) clustering<T>(n, n == 1 ? 1 : n + 6);
  clustering<T>(520, 12);  // several blocks of the first operand against a resident second one
  // Several blocks of packed rows, which real sizes need and these would not.
  const int64_t budget = cpu::panel_budget();
  cpu::panel_budget() = 1;
  clustering<T>(300, 45);
  cpu::panel_budget() = budget;
  clusters<T>(2, 37, 530, 9, false);
  clusters<T>(3, 130, 70, 16, true);
}
template void clustering_tests<float>();
template void clustering_tests<double>();

void clustering_corner_cases() {
  for (int64_t n : {1, 63, 64, 65, 513, 1100})
    for (double density : {0.0, 0.004, 0.06, 0.5, 1.0}) walk(n, density);
  nan_row();
  no_rows();
}

}  // namespace vidops::testing
