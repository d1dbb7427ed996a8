#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cpu_testing.h"
#include "vidops/label_propagation.h"

namespace vidops::testing {

namespace {

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

}  // namespace

template <class T>
void label_propagation_tests() {
  propagation<T>(1, 1, 1, 1, 3, 1, 1, 0);
  propagation<T>(3, 131, 2, 21, 7, 50, 1, 2);  // several pieces of a row
  propagation<T>(40, 1, 3, 16, 5, 7, 0, 1);
  propagation<T>(6, 9, 3, 37, 128, 1000, 2, 0);
}
template void label_propagation_tests<float>();
template void label_propagation_tests<double>();

}  // namespace vidops::testing
