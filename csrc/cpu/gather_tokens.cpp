// Rows by index, and sums of rows by index.
#include "vidops/gather_tokens.h"

#include <cstring>

#include "row_copy.h"

namespace vidops::cpu {
namespace {

constexpr int64_t kRows = 64;  // rows of a task of gather
constexpr int64_t kColumns = 256;  // columns of a task of scatter, where there are fewer batch items than threads

// Before anything is written. The values of a row follow one another, rows have a pitch.
void check_index(const TensorView& index, int64_t bound) {
  for (int64_t b = 0; b < index.shape[0]; ++b) {
    const int64_t* row = index.as<int64_t>() + b * index.stride[0];
    for (int64_t k = 0; k < index.shape[1]; ++k)
      if (row[k] < 0 || row[k] >= bound)
        throw ArgumentError("index: expected values in [0, " + std::to_string(bound) + "), got " +
                            std::to_string(row[k]));
  }
}

void check_all(const GatherTokensParams& p, bool scatter) {
  check(p.x, 3, p.x.dtype, "x");
  check(p.out, 3, p.x.dtype, "out");
  check(p.index, 2, DType::i64, "index");
  const TensorView& taken = scatter ? p.x : p.out;
  require(p.out.contiguous(), "out: must be contiguous");
  check_shape(p.index, {p.x.shape[0], taken.shape[1]}, "index");
  check_shape(p.out, {p.x.shape[0], p.out.shape[1], p.x.shape[2]}, "out");
  check_index(p.index, scatter ? p.out.shape[1] : p.x.shape[1]);
}

void gather(const GatherTokensParams& p, int threads) {
  const int64_t kept = p.index.shape[1], blocks = ceil_div(kept, kRows);
  const RowCopy copy(p.x, p.out);
  parallel_for(p.x.shape[0] * blocks, threads, [&](int64_t task, int) {
    const int64_t b = task / blocks, from = task % blocks * kRows;
    copy.run(b, 0, p.index.as<int64_t>() + b * p.index.stride[0] + from, std::min(kRows, kept - from), from);
  });
}

template <class T>
void scatter(const GatherTokensParams& p, int threads) {
  const Kernels<T>& kn = kernels<T>();
  const int64_t batch = p.x.shape[0], taken = p.x.shape[1], width = p.x.shape[2], tokens = p.out.shape[1];
  const int64_t part = batch < threads ? std::min(width, kColumns) : width, parts = ceil_div(width, part);
  parallel_for(batch * parts, threads, [&](int64_t task, int) {
    const int64_t b = task / parts, from = task % parts * part, columns = std::min(part, width - from);
    const T* x = p.x.as<T>() + b * p.x.stride[0] + from;
    const int64_t* index = p.index.as<int64_t>() + b * p.index.stride[0];
    T* out = p.out.as<T>() + b * tokens * width + from;
    const size_t bytes = static_cast<size_t>(columns) * sizeof(T);
    // The first row of a place is copied: most have one, or none.
    std::vector<bool> used(static_cast<size_t>(tokens));
    for (int64_t k = 0; k < taken; ++k) {
      T* row = out + index[k] * width;
      if (used[index[k]])
        kn.axpy(T(1), x + k * p.x.stride[1], row, columns);
      else
        std::memcpy(row, x + k * p.x.stride[1], bytes);
      used[index[k]] = true;
    }
    for (int64_t n = 0; n < tokens; ++n)
      if (!used[n]) std::memset(out + n * width, 0, bytes);
  });
}

}  // namespace
}  // namespace vidops::cpu

namespace vidops {

void gather_tokens_forward_cpu(const GatherTokensParams& params, int threads) {
  cpu::check_all(params, false);
  if (params.out.numel()) cpu::gather(params, threads);
}

void scatter_tokens_forward_cpu(const GatherTokensParams& params, int threads) {
  cpu::check_all(params, true);
  if (!params.out.numel()) return;
  cpu::dispatch_float(params.x.dtype, [&](auto type) { cpu::scatter<decltype(type)>(params, threads); });
}

}  // namespace vidops
