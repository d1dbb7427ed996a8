#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu_testing.h"
#include "vidops/sta_score.h"

namespace vidops::testing {

namespace {

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

}  // namespace

template <class T>
void token_tests() {
  pruning<T>(2, 3, 21, 37, 9, 5, false);
  pruning<T>(1, 2, 131, 16, 64, 40, true);
  pruning<T>(1, 1, 1, 3, 1, 0, false);
}
template void token_tests<float>();
template void token_tests<double>();

}  // namespace vidops::testing
