// Symmetrised KL (Eq. E2) as one matrix product, with a rigorous bound on its error.
//
// D_ij = sum_c (p_ic - q_jc)(log p_ic - log q_jc) does not change when a constant is taken from a column of
// the maps or of the logs of both sets. With x' = x minus a column centre,
//   D_ij = s_i + t_j - [p'_i | l'_i] . [m'_j | q'_j],   s_i = sum p'_i l'_i,  t_j = sum q'_j m'_j,
// one product of depth 2M with far smaller operands, hence smaller rounding errors, than the raw form.
//
// Error of one pair: with stored operands x' + e, Cauchy-Schwarz bounds the operand part by
// |e_p||l + e_l| + |p||e_l| (and the mirrored term), the summation part by g (|p||l| + |l||p|),
// g = (depth + K/depth + 32) eps for sums made in runs of `depth`. The norms of the actual residuals are
// used, not their worst case. A pair farther from tau than its bound is decided; all others go to the direct
// form.
#pragma once

#include "panels.h"

namespace vidops::cpu {

// Bytes of both packed operands together (64 rows of each always fit). Results do not depend on it; tests
// lower it to walk the path of several blocks on small inputs.
int64_t& panel_budget();

template <class T>
class Distance {
 public:
  Rows<T> p, l, q, m;  // maps and logs of both sides
  int64_t cols;
  const Kernels<T>& kn;
  const Gemm<T>& gemm;
  int64_t half, depth;  // padded columns of one half, of the product

  // `product` replaces the level's own matrix product.
  Distance(Rows<T> p_, Rows<T> l_, Rows<T> q_, Rows<T> m_, int64_t cols_, const Gemm<T>* product)
      : p(p_),
        l(l_),
        q(q_),
        m(m_),
        cols(cols_),
        kn(kernels<T>()),
        gemm(product ? *product : kn.gemm),
        half(round_up(cols, gemm.k_align)),
        depth(2 * half),
        p_centre_(cols),
        l_centre_(cols) {
    centre(p, p_centre_);
    centre(l, l_centre_);
  }

  int64_t a_bytes(int64_t rows) const { return round_up(rows, gemm.mr) * depth * gemm.elem; }
  int64_t b_bytes(int64_t rows) const { return round_up(rows, gemm.nr) * depth * gemm.elem; }
  // Rows whose panels fit a part of the budget, a multiple of 64 so that bit words do not straddle blocks.
  int64_t block(int64_t rows, double part) const {
    const double bytes = part * static_cast<double>(panel_budget());
    const int64_t fit = static_cast<int64_t>(bytes) / std::max<int64_t>(1, depth * gemm.elem) / 64 * 64;
    return std::max<int64_t>(64, std::min(fit, round_up(rows, 64)));
  }

  template <class RowAt>
  void pack_a(RowAt&& at, int64_t count, char* out, int threads) const {
    parallel_for(ceil_div(count, gemm.mr), threads, [&](int64_t panel, int) {
      const int64_t first = panel * gemm.mr, here = std::min<int64_t>(gemm.mr, count - first);
      char* to = out + panel * gemm.mr * depth * gemm.elem;
      pack_panels<T>(
          gemm, true, [&](int64_t i) { return p[at(first + i)]; }, here, cols, p_centre_.get(), T(1), 0,
          depth, to);
      pack_panels<T>(
          gemm, true, [&](int64_t i) { return l[at(first + i)]; }, here, cols, l_centre_.get(), T(1), half,
          depth, to);
    });
  }
  template <class RowAt>
  void pack_b(RowAt&& at, int64_t count, char* out, int threads) const {
    parallel_for(ceil_div(count, gemm.nr), threads, [&](int64_t panel, int) {
      const int64_t first = panel * gemm.nr, here = std::min<int64_t>(gemm.nr, count - first);
      char* to = out + panel * gemm.nr * depth * gemm.elem;
      pack_panels<T>(
          gemm, false, [&](int64_t i) { return m[at(first + i)]; }, here, cols, l_centre_.get(), T(1), 0,
          depth, to);
      pack_panels<T>(
          gemm, false, [&](int64_t i) { return q[at(first + i)]; }, here, cols, p_centre_.get(), T(1), half,
          depth, to);
    });
  }

  RowStats<T> stats(const T* map, const T* log) const {
    return kn.row_stats(map, log, p_centre_.get(), l_centre_.get(), cols,
                        gemm.operand_error == OperandError::measured);
  }

  // The decision of a pair near tau: direct form, in double when rounding of T could matter.
  bool near(int64_t i, int64_t j, double tau) const {
    T magnitude;
    const double d = kn.pair(p[i], l[i], q[j], m[j], cols, &magnitude);
    const double eps = std::numeric_limits<T>::epsilon();
    const double slack = (static_cast<double>(cols) / 8 + 48) * eps * static_cast<double>(magnitude);
    if (sizeof(T) == 4 && !(std::abs(d - tau) > slack)) return kn.pair64(p[i], l[i], q[j], m[j], cols) <= tau;
    return d <= tau;
  }

 private:
  // Any centre is valid; a sample of the rows is enough to remove the bulk. Infinite or NaN columns are left
  // alone.
  void centre(const Rows<T>& rows, Buffer<T>& out) const {
    std::vector<double> sum(static_cast<size_t>(cols), 0.0);
    const int64_t step = std::max<int64_t>(1, rows.count / 64);
    int64_t used = 0;
    for (int64_t i = 0; i < rows.count; i += step, ++used)
      for (int64_t c = 0; c < cols; ++c) sum[c] += rows[i][c];
    for (int64_t c = 0; c < cols; ++c) {
      const T mean = static_cast<T>(used ? sum[c] / static_cast<double>(used) : 0.0);
      out[c] = std::isfinite(mean) ? mean : T(0);
    }
  }

  Buffer<T> p_centre_, l_centre_;
};

// The arrays Threshold reads, for the rows of one set.
template <class T>
struct Bounds {
  std::vector<T> self, p_norm, l_total, p_error, l_weight, base;

  void resize(int64_t n) {
    for (auto* v : {&self, &p_norm, &l_total, &p_error, &l_weight, &base}) v->resize(static_cast<size_t>(n));
  }
  void set(int64_t i, const RowStats<T>& s, const Distance<T>& d, double tau) {
    const double eps = std::numeric_limits<T>::epsilon();
    const double g = (d.gemm.depth + static_cast<double>(d.depth) / d.gemm.depth + 32) * eps;
    const double grow = 1.0 + 1e-3;  // the norms are rounded too
    const double pn = s.p_norm * grow, ln = s.l_norm * grow;
    const double element = d.gemm.operand_error == OperandError::split ? 1.0 / (1 << 17) : eps;
    const double pe = s.p_error * grow + element * pn, le = s.l_error * grow + element * ln;
    self[i] = static_cast<T>(s.self);
    p_norm[i] = static_cast<T>(pn);
    l_total[i] = static_cast<T>(ln + le);
    p_error[i] = static_cast<T>(pe);
    l_weight[i] = static_cast<T>(le + g * ln);
    base[i] = static_cast<T>(g * pn * ln + 4 * eps * std::abs(tau) + (sizeof(T) == 4 ? 1e-30 : 1e-290));
  }
  Threshold<T> row(const Bounds& row_set, int64_t i, int64_t first_column, double tau) const {
    const int64_t c = first_column;
    return {&self[c],           &p_norm[c],         &l_total[c],         &p_error[c],
            &l_weight[c],       &base[c],           row_set.self[i],     row_set.p_norm[i],
            row_set.l_total[i], row_set.p_error[i], row_set.l_weight[i], row_set.base[i],
            static_cast<T>(tau)};
  }
};

}  // namespace vidops::cpu
