// Slot attention: one step, the products and norms around it, the iterations.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "cpu_testing.h"
#include "vidops/slot_attend.h"
#include "vidops/slot_iterations.h"
#include "vidops/slot_side.h"

namespace vidops::testing {

namespace {

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

// What sanitizers, guards and threads say; that results and gradients are right is tested against the reference in
// Python.
template <class T>
void iterations(const IterationsShape& s, bool recorded) {
  auto x = normal<T>({s.batch, s.tokens, s.channels}, 1, 3), slots = normal<T>({s.batch, s.slots, s.width}, 1, 0);
  std::vector<Array<T>> weights;
  std::vector<TensorView SlotWeights::*> names;
  auto add = [&](TensorView SlotWeights::*name, std::vector<int64_t> shape) {
    names.push_back(name);
    weights.push_back(normal<T>(shape, 1 / std::sqrt(double(shape.back())), 0));
  };
  add(&SlotWeights::k_weight, {s.hq, s.channels}), add(&SlotWeights::v_weight, {s.hv, s.channels});
  add(&SlotWeights::q_weight, {s.hq, s.width}), add(&SlotWeights::merge_weight, {s.width, s.hv});
  add(&SlotWeights::k_bias, {s.hq}), add(&SlotWeights::v_bias, {s.hv}), add(&SlotWeights::merge_bias, {s.width});
  add(&SlotWeights::norm_input_weight, {s.channels}), add(&SlotWeights::norm_slots_bias, {s.width});
  if (s.gru) add(&SlotWeights::gru_weight_ih, {3 * s.width, s.width});
  if (s.gru) add(&SlotWeights::gru_weight_hh, {3 * s.width, s.width});
  if (s.hidden) {
    add(&SlotWeights::mlp_weight1, {s.hidden, s.width}), add(&SlotWeights::mlp_weight2, {s.width, s.hidden});
    add(&SlotWeights::mlp_bias2, {s.width}), add(&SlotWeights::norm_mlp_weight, {s.width});
  }
  const auto grad_out = normal<T>({s.batch, s.slots, s.width}, 1, 0);
  auto grad_map = normal<T>({s.batch, s.slots, s.tokens}, 1, 0);
  std::vector<std::vector<Array<T>>> runs;
  for (int threads : {1, 3}) {
    std::vector<Array<T>> results{Array<T>({s.batch, s.slots, s.width}), Array<T>({3, s.batch, s.slots, s.width}),
                                  Array<T>({s.batch, s.slots, s.tokens}), Array<T>({s.batch, s.slots, s.tokens})};
    Array<T>&out = results[0], &states = results[1], &dots = results[2], &attn = results[3];
    SlotIterationsForwardParams p;
    p.inputs = x.view(), p.slots = slots.view(), p.eps = 1e-8, p.iters = 3;
    for (size_t i = 0; i < names.size(); ++i) p.weights.*names[i] = weights[i].view();
    p.out = out.view(), p.states = states.view(), p.dots = dots.view(), p.attn = attn.view();
    Array<T> record({recorded ? slot_record_size(p) : 0});
    if (recorded) p.record = record.view();
    slot_iterations_forward_cpu(p, threads);
    for (int64_t token = 0; token < s.tokens; ++token) {
      double sum = 0;
      for (int64_t slot = 0; slot < s.slots; ++slot) sum += double(attn.at(slot, token));
      expect(std::abs(sum - 1) < 1e-5, "iterations: a softmax over the slots");
    }
    for (int64_t i = 0; i < slots.rows * s.width; ++i)
      expect(states.data[i] == slots.data[i] && std::isfinite(double(out.data[i])), "iterations: the first state");

    SlotIterationsBackwardParams g;
    static_cast<SlotIterationsParams&>(g) = p;
    g.grad_dots = grad_map.view(), g.grad_attn = grad_map.view();
    results.push_back(grad_out), results.push_back(Array<T>({s.batch, s.tokens, s.channels}));
    for (const Array<T>& weight : weights) results.push_back(Array<T>(weight.shape));
    g.grad_slots = results[4].view(), g.grad_inputs = results[5].view();
    for (size_t i = 0; i < names.size(); ++i) g.grads.*names[i] = results[6 + i].view();
    const std::vector<T> before = record.data;
    slot_iterations_backward_cpu(g, threads);
    expect(record.data == before, "iterations: the backward leaves the record as it is");
    if (recorded) results.push_back(std::move(record));
    for (const Array<T>& result : results) {
      expect(result.guarded(), "iterations guard");
      for (int64_t i = 0; i < result.rows * result.width(); ++i)
        expect(std::isfinite(double(result.data[i])) && result.data[i] != Array<T>::sentinel(), "iterations: results");
    }
    runs.push_back(std::move(results));
  }
  for (size_t i = 0; i < runs[0].size(); ++i) expect(runs[0][i].same_bits(runs[1][i]), "iterations: threads");
  slot_iterations_release_cpu();
}

}  // namespace

template <class T>
void slot_tests() {
  for (bool recorded : {false, true}) {
    iterations<T>({2, 33, 17, 5, 9, 7, 9, 0, false}, recorded);
    iterations<T>({1, 1, 1, 1, 1, 1, 1, 3, true}, recorded);
    iterations<T>({5, 40, 83, 17, 98, 70, 98, 130, true}, recorded);  // weights that are laid out once
    iterations<T>({16, 20, 5, 17, 9, 7, 9, 3, true}, recorded);    // too many rows for one backward of all iterations
    iterations<T>({2, 4100, 64, 2, 5, 3, 5, 4, false}, recorded);  // item by item
  }
  slot_attend<T>({1, 1, 1, 1, 1, 1, false, false, false, 1});
  slot_attend<T>({2, 1, 7, 300, 64, 32, false, false, true, 1});
  slot_attend<T>({2, 3, 15, 65, 37, 33, true, false, true, 5});
  slot_attend<T>({1, 2, 4, 63, 5, 17, false, true, false, 2});
  for (const ProductShape& p :
       {ProductShape{1, 1, 1, 1}, ProductShape{2, 15, 33, 129}, ProductShape{1, 114, 130, 40},
        ProductShape{1, 5, 31, 1030}, ProductShape{2, 70, 67, 100}, ProductShape{1, 514, 66, 64},
        ProductShape{1, 3, 5, 0}, ProductShape{0, 3, 5, 2}})
    for (int form = 0; form < 8; ++form) slot_product<T>(p, form & 1, form & 2, form & 4);
  for (int64_t width : {1, 16, 37}) token_norm_grad<T>(2, 65, width);
}
template void slot_tests<float>();
template void slot_tests<double>();

}  // namespace vidops::testing
