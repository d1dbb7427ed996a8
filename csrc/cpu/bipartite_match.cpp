// Bipartite matching of even with odd tokens (arXiv 2210.09461): tiles of cosines, of which only the maxima are kept.
#include "vidops/bipartite_match.h"

#include "tokens.h"

namespace vidops::cpu {
namespace {

template <class T>
void bipartite_match(const BipartiteMatchParams& params, int threads) {
  const int64_t batch = params.metric.shape[0], tokens = params.metric.shape[1], width = params.metric.shape[2];
  const int64_t even = (tokens + 1) / 2;
  const Kernels<T>& kn = kernels<T>();
  parallel_for(batch, threads, [&](int64_t b, int) {
    Buffer<T> unit(tokens * width);
    std::vector<uint8_t> finite(static_cast<size_t>(tokens));
    std::vector<double> square(static_cast<size_t>(tokens));
    const T* key = params.metric.as<T>() + b * params.metric.stride[0];
    for (int64_t n = 0; n < tokens; ++n)
      finite[n] = unit_row(kn, key + n * params.metric.stride[1], width, unit.get() + n * width, &square[n]);
    Matcher<T> matcher(tokens, width);
    matcher.run(key, params.metric.stride[1], unit.get(), finite.data(), square.data(), params.class_token,
                params.distill_token, params.order.as<int64_t>() + b * even, params.similarity.as<T>() + b * even,
                params.partner.as<int64_t>() + b * even);
  });
}

}  // namespace
}  // namespace vidops::cpu

namespace vidops {

void bipartite_match_forward_cpu(const BipartiteMatchParams& params, int threads) {
  using namespace cpu;
  const DType dtype = params.metric.dtype;
  check(params.metric, 3, dtype, "metric");
  const int64_t batch = params.metric.shape[0], even = (params.metric.shape[1] + 1) / 2;
  require(params.metric.shape[1] < (int64_t{1} << 32), "metric: too many tokens");
  check(params.order, 2, DType::i64, "order");
  check(params.similarity, 2, dtype, "similarity");
  check(params.partner, 2, DType::i64, "partner");
  for (const TensorView* v : {&params.order, &params.similarity, &params.partner}) {
    check_shape(*v, {batch, even}, "result");
    require(v->contiguous(), "result: must be contiguous");
  }
  dispatch_float(dtype, [&](auto type) { bipartite_match<decltype(type)>(params, threads); });
}

}  // namespace vidops
