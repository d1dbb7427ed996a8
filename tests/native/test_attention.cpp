// Attention: the mean over the heads and the video attention, forward and backward.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu_testing.h"
#include "vidops/attention_head_mean.h"
#include "vidops/video_attention.h"

namespace vidops::testing {

namespace {

// Independent statement of the generator of dropout: 10 rounds on four words.
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

// Logits 400 apart: P underflows, its log must not.
void logarithm_of_an_underflown_weight() {
  Array<float> q({1, 1, 1, 1}), k({1, 1, 2, 1}), p({1, 1, 2}), lp({1, 1, 2}), lse({1, 1, 1});
  q.at(0, 0) = 20, k.at(0, 0) = 20, k.at(1, 0) = 0;
  AttentionHeadMeanParams a;
  a.q = q.view(), a.k = k.view(), a.p = p.view(), a.log_p = lp.view(), a.lse = lse.view();
  attention_head_mean_forward_cpu(a, 1);
  expect(lp.at(0, 1) == -400.0f && p.at(0, 1) == 0.0f && p.at(0, 0) == 1.0f, "log of an underflown weight");
}

void no_logarithm_with_dropout() {
  auto q = normal<float>({1, 2, 3, 4}, 1, 0), k = normal<float>({1, 2, 5, 4}, 1, 0);
  Array<float> map({1, 3, 5}), log_map({1, 3, 5}), lse({1, 2, 3});
  AttentionHeadMeanParams hp;
  hp.q = q.view(), hp.k = k.view(), hp.p = map.view(), hp.log_p = log_map.view(), hp.lse = lse.view();
  hp.dropout_p = 0.5;
  expect_refused([&] { attention_head_mean_forward_cpu(hp, 1); }, "the logarithm of a map with dropout");
}

}  // namespace

template <class T>
void attention_tests() {
  for (const Shape& s :
       {Shape{1, 1, 1, 1, 1}, Shape{2, 3, 17, 33, 5}, Shape{1, 2, 65, 131, 48}, Shape{1, 2, 3, 7, 131}})
    for (double drop : {0.0, 0.3}) attention<T>(s, drop);
  attention<T>({0, 2, 3, 4, 5}, 0.0);
}
template void attention_tests<float>();
template void attention_tests<double>();

void attention_corner_cases() {
  logarithm_of_an_underflown_weight();
  no_logarithm_with_dropout();
}

}  // namespace vidops::testing
