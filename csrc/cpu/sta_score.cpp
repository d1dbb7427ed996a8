// Semantic-aware temporal accumulation (arXiv 2308.04549): the scan over the groups of a clip.
//
// What a token of the group before spreads over the tokens of this group is a row of the product of their keys, so the
// product is taken a panel of such tokens at a time: exponentials and their sum along the row, then the row is added
// to what has accumulated. A few rows add up in T, a run of panels in double, the runs in order: no result depends on
// the number of threads, and a score is rounded about once. Nothing of size N x K is kept. Every element is one sum over
// the channels in order, so equal tokens get equal scores wherever they are.
#include "vidops/sta_score.h"

#include <optional>

#include "row_copy.h"
#include "tokens.h"

namespace vidops::cpu {
namespace {

constexpr int64_t kMaxRuns = 64;
constexpr int64_t kShort = 16;  // rows that are added up in T

template <class T>
class Clip {
 public:
  Clip(const StaScoreParams& params, int64_t frames, const RowCopy* copy)
      : p_(params),
        copy_(copy),
        kn_(kernels<T>()),
        g_(unit_gemm<T>(params.metric.shape[2])),
        frames_(frames),
        tokens_(params.x.shape[1] / frames),
        kept_(params.keep.shape[2]),
        width_(params.metric.shape[2]),
        depth_(round_up(width_, g_.k_align)),
        columns_(computed_columns(g_, tokens_)),
        panels_(ceil_div(ceil_div(tokens_, g_.mr), kMaxRuns)),
        matcher_(tokens_, width_) {
    unit_.resize(frames_ * tokens_ * width_);
    finite_.resize(static_cast<size_t>(frames_ * tokens_));
    total_.resize(static_cast<size_t>(frames_ * tokens_));
    square_.resize(static_cast<size_t>(frames_ * tokens_));
    right_.resize(round_up(tokens_, g_.nr) * depth_ * g_.elem);
    partial_.resize(std::min(kMaxRuns, ceil_div(tokens_, g_.mr)) * columns_);
    order_.resize(static_cast<size_t>(tokens_));
    refer_.resize(static_cast<size_t>(tokens_));
    weight_.resize(static_cast<size_t>(tokens_));
  }

  // One thread takes the groups one by one, so that a group is gathered while the cache still holds it.
  void run(int64_t b, int threads) {
    const bool alone = threads == 1;
    const int64_t step = p_.reverse ? -1 : 1, start = p_.reverse ? frames_ - 1 : 0;
    if (!alone) parallel_for(frames_, threads, [&](int64_t t, int) { look(b, t); });
    for (int64_t t = start; t >= 0 && t < frames_; t += step) {
      if (alone) look(b, t);
      t == start ? first(b, t) : next(b, t - step, t, threads);
      if (alone) gather(b, t);
    }
    if (!alone) parallel_for(frames_, threads, [&](int64_t t, int) { gather(b, t); });
  }

 private:
  T* figures(const TensorView& v, int64_t b, int64_t t) const { return v.as<T>() + (b * frames_ + t) * tokens_; }
  int64_t* keep(int64_t b, int64_t t) const { return p_.keep.as<int64_t>() + (b * frames_ + t) * kept_; }
  const T* key(int64_t b, int64_t t) const {
    return p_.metric.as<T>() + b * p_.metric.stride[0] + t * tokens_ * p_.metric.stride[1];
  }
  void gather(int64_t b, int64_t t) const {
    if (copy_) copy_->run(b, t * tokens_, keep(b, t), kept_, t * kept_);
  }
  const T* unit(int64_t t, int64_t n) const { return unit_.get() + (t * tokens_ + n) * width_; }

  // Unit keys and activation of one group.
  void look(int64_t b, int64_t t) {
    const T* x = p_.x.as<T>() + b * p_.x.stride[0] + t * tokens_ * p_.x.stride[1];
    double* total = &total_[t * tokens_];
    for (int64_t n = 0; n < tokens_; ++n) {
      total[n] = kn_.magnitude_sum(x + n * p_.x.stride[1], p_.x.shape[2]);
      const int64_t at = t * tokens_ + n;
      finite_[at] = unit_row(kn_, key(b, t) + n * p_.metric.stride[1], width_, unit_.get() + at * width_, &square_[at]);
    }
    double low = total[0], high = total[0];
    for (int64_t n = 0; n < tokens_; ++n) {
      if (std::isnan(total[n])) low = high = total[n];  // and stays, since no comparison with it holds
      if (total[n] < low) low = total[n];
      if (total[n] > high) high = total[n];
    }
    T* activation = figures(p_.activation, b, t);
    const double spread = high - low;
    for (int64_t n = 0; n < tokens_; ++n) activation[n] = spread == 0 ? T(0) : T((total[n] - low) / spread);
  }

  void first(int64_t b, int64_t t) {
    std::fill_n(figures(p_.acc, b, t), tokens_, T(0));
    std::fill_n(figures(p_.score, b, t), tokens_, T(0));
    const int64_t even = (tokens_ + 1) / 2, odd = tokens_ / 2;
    int64_t* order = p_.first_order.as<int64_t>() + b * tokens_;
    matcher_.run(key(b, t), p_.metric.stride[1], unit(t, 0), &finite_[t * tokens_], &square_[t * tokens_], false,
                 false, order_.data(), p_.first_similarity.as<T>() + b * even, nullptr);
    for (int64_t j = 0; j < odd; ++j) order[j] = 2 * j + 1;
    for (int64_t i = 0; i < even; ++i) order[odd + i] = 2 * order_[i];
    std::copy_n(order, kept_, keep(b, t));
    referred_ = p_.first_frame_pruned ? kept_ : tokens_;
    std::copy_n(order, referred_, refer_.data());
    std::fill_n(weight_.data(), referred_, p_.first_frame_pruned ? 1.0 / double(kept_) : 1.0);
  }

  void next(int64_t b, int64_t before, int64_t t, int threads) {
    const Gemm<T>& g = g_;
    pack_panels(g, false, [&](int64_t n) { return unit(t, n); }, tokens_, width_, (const T*)nullptr, T(1), 0, depth_,
                right_.get());
    const int64_t panels = ceil_div(referred_, g.mr), runs = ceil_div(panels, panels_);
    parallel_for(runs, threads, [&](int64_t run, int) {
      double* total = partial_.get() + run * columns_;
      std::fill_n(total, columns_, 0.0);
      for (int64_t panel = run * panels_; panel < std::min(panels, (run + 1) * panels_); ++panel)
        spread(before, panel, total);
    });
    T* acc = figures(p_.acc, b, t);
    T* score = figures(p_.score, b, t);
    double* sum = partial_.get();
    for (int64_t run = 1; run < runs; ++run)
      for (int64_t n = 0; n < tokens_; ++n) sum[n] += partial_[run * columns_ + n];
    const T* activation = figures(p_.activation, b, t);
    for (int64_t n = 0; n < tokens_; ++n) {
      acc[n] = T(sum[n]);
      score[n] = acc[n] * (1 - activation[n]);
    }
    sort_.run(score, tokens_, order_.data());
    int64_t* kept = keep(b, t);
    double total = 0;
    for (int64_t k = 0; k < kept_; ++k) {
      kept[k] = refer_[k] = order_[k];
      total += sum[kept[k]];
    }
    for (int64_t k = 0; k < kept_; ++k) weight_[k] = sum[kept[k]] / total;
    referred_ = kept_;
  }

  // What a panel of tokens of the group before accumulates in every token of this one.
  void spread(int64_t before, int64_t panel, double* total) {
    const Gemm<T>& g = g_;
    const int64_t from = panel * g.mr, count = std::min<int64_t>(g.mr, referred_ - from);
    thread_local Buffer<char> left;
    thread_local Buffer<T> cosine, sum;
    thread_local int64_t room = 0;
    if (room < g.mr * (columns_ + depth_)) {
      room = g.mr * (columns_ + depth_);
      left.resize(room * g.elem);
      cosine.resize(room);
      sum.resize(room);
    }
    pack_panels(g, true, [&](int64_t k) { return unit(before, refer_[from + k]); }, count, width_, (const T*)nullptr,
                T(1), 0, depth_, left.get());
    run_columns<T>(g, 1, tokens_, depth_, left.get(), right_.get(), cosine.get(), columns_);
    for (int64_t k = 0; k < count; ++k) {
      T* row = cosine.get() + k * columns_;
      const T spread_over = kn_.exp_cosines(row, tokens_);  // no maximum need be taken off
      const T weight = T(weight_[from + k] / double(spread_over));
      // Whole vectors, padding included: a tail of scalars could round otherwise than the vectors before it.
      if (k % kShort == 0)
        kn_.scaled_copy(weight, row, sum.get(), columns_);
      else
        kn_.axpy(weight, row, sum.get(), columns_);
      if (k % kShort == kShort - 1 || k == count - 1) kn_.wide_axpy(sum.get(), total, columns_);
    }
  }

  const StaScoreParams& p_;
  const RowCopy* copy_;
  const Kernels<T>& kn_;
  const Gemm<T>& g_;
  int64_t frames_, tokens_, kept_, width_, depth_ /* channels with padding */, columns_, panels_ /* of a run */;
  int64_t referred_ = 0;
  Matcher<T> matcher_;
  Buffer<T> unit_;
  Buffer<char> right_;
  Buffer<double> partial_;
  std::vector<uint8_t> finite_;
  std::vector<double> total_, square_, weight_;
  std::vector<int64_t> order_, refer_;
  IndexSort sort_;
};

template <class T>
void sta_score(const StaScoreParams& params, int threads) {
  const int64_t batch = params.x.shape[0], frames = params.keep.shape[1];
  std::optional<RowCopy> copy;
  if (params.kept.present()) copy.emplace(params.source, params.kept);
  // Threads share out the clips, or the work of one clip where there are fewer.
  const bool within = batch < threads;
  parallel_for(batch, within ? 1 : threads, [&](int64_t b, int) {
    Clip<T> clip(params, frames, copy ? &*copy : nullptr);
    clip.run(b, within ? threads : 1);
  });
}

}  // namespace
}  // namespace vidops::cpu

namespace vidops {

void sta_score_forward_cpu(const StaScoreParams& params, int threads) {
  using namespace cpu;
  const DType dtype = params.x.dtype;
  check(params.x, 3, dtype, "x");
  check(params.metric, 3, dtype, "metric");
  check(params.keep, 3, DType::i64, "keep");
  const int64_t batch = params.x.shape[0], total = params.x.shape[1], frames = params.keep.shape[1];
  check_shape(params.metric, {batch, total, params.metric.shape[2]}, "metric");
  require(frames > 0 && total % frames == 0 && total > 0, "x: tokens must be a multiple of the groups");
  const int64_t tokens = total / frames;
  require(tokens < (int64_t{1} << 32), "x: too many tokens");
  check_shape(params.keep, {batch, frames, params.keep.shape[2]}, "keep");
  require(params.keep.shape[2] >= 1 && params.keep.shape[2] <= tokens, "keep: expected 1 to N tokens");
  for (const TensorView* v : {&params.activation, &params.acc, &params.score}) {
    check(*v, 3, dtype, "figures");
    check_shape(*v, {batch, frames, tokens}, "figures");
    require(v->contiguous(), "figures: must be contiguous");
  }
  check(params.first_order, 2, DType::i64, "first_order");
  check_shape(params.first_order, {batch, tokens}, "first_order");
  check(params.first_similarity, 2, dtype, "first_similarity");
  check_shape(params.first_similarity, {batch, (tokens + 1) / 2}, "first_similarity");
  require(params.keep.contiguous() && params.first_order.contiguous() && params.first_similarity.contiguous(),
          "results: must be contiguous");
  if (params.kept.present()) {
    const DType kind = params.source.dtype;
    float_bytes(kind);
    check(params.source, 3, kind, "source");
    check_shape(params.source, {batch, total, params.x.shape[2]}, "source");
    check(params.kept, 3, kind, "kept");
    check_shape(params.kept, {batch, frames * params.keep.shape[2], params.x.shape[2]}, "kept");
    require(params.kept.contiguous(), "kept: must be contiguous");
  }
  dispatch_float(dtype, [&](auto type) { sta_score<decltype(type)>(params, threads); });
}

}  // namespace vidops
