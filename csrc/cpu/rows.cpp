// Operators on bit rows and row segments (Eq. E3, E5).
#include <cstring>
#include <numeric>

#include "common.h"
#include "kernels.h"
#include "vidops/greedy_absorb.h"
#include "vidops/neighbour_mean.h"
#include "vidops/segment_mean.h"

namespace vidops::cpu {
namespace {

void check_bits(const TensorView& adjacency, int64_t rows) {
  check(adjacency, 2, DType::i64, "adjacency");
  check_shape(adjacency, {rows, ceil_div(rows, 64)}, "adjacency");
}

// first[i] = the smallest row with the same bits as row i. Rows are ordered by their words, so equal rows
// meet.
std::vector<int64_t> first_equal_row(const TensorView& adjacency, int64_t rows, int64_t words) {
  const uint64_t* bits = adjacency.as<uint64_t>();
  std::vector<uint64_t> hash(rows);
  for (int64_t i = 0; i < rows; ++i) {
    uint64_t h = 0x9E3779B97F4A7C15u;
    for (int64_t w = 0; w < words; ++w)
      h = (h ^ bits[i * adjacency.stride[0] + w]) * 0xD6E8FEB86659FD93u, h ^= h >> 32;
    hash[i] = h;
  }
  std::vector<int64_t> order(rows), first(rows);
  std::iota(order.begin(), order.end(), int64_t{0});
  std::sort(order.begin(), order.end(),
            [&](int64_t a, int64_t b) { return hash[a] != hash[b] ? hash[a] < hash[b] : a < b; });
  for (int64_t o = 0, lead = 0; o < rows; ++o) {
    const int64_t i = order[o];
    const bool equal =
        o > 0 && hash[i] == hash[lead] &&
        std::memcmp(bits + i * adjacency.stride[0], bits + lead * adjacency.stride[0], words * 8) == 0;
    if (!equal) lead = i;
    first[i] = lead;
  }
  return first;
}

// A block of columns at a time: the 16 partial sums of every 4 source rows fit L1 (16 tables of 16 sums for
// one 64-bit word), so a row costs 16 additions per word instead of one per set bit. Equal bit rows are
// summed once. Workspace: 8 n bytes for the duplicates, one column block of n sums per thread.
template <class T>
void neighbour_mean(const NeighbourMeanParams& params, int threads) {
  const Kernels<T>& kn = kernels<T>();
  const int64_t rows = params.p.shape[0], cols = params.p.shape[1], words = ceil_div(rows, 64);
  const int64_t width = kn.gather_width, blocks = ceil_div(cols, width);
  const uint64_t* bits = params.adjacency.as<uint64_t>();
  const int64_t pitch = params.adjacency.stride[0];
  T* mean = params.mean.as<T>();
  const std::vector<int64_t> first = first_equal_row(params.adjacency, rows, words);
  std::vector<int64_t> distinct;
  for (int64_t i = 0; i < rows; ++i)
    if (first[i] == i) distinct.push_back(i);
  const int64_t count = static_cast<int64_t>(distinct.size());
  struct Scratch {
    Buffer<T> table, sums, total;
  };
  std::vector<Scratch> scratch(std::max(threads, 1));
  for (Scratch& s : scratch) s.table.resize(256 * width), s.sums.resize(count * width), s.total.resize(width);
  parallel_for(blocks, threads, [&](int64_t block, int thread) {
    Scratch& s = scratch[thread];
    const int64_t column = block * width, here = std::min(width, cols - column);
    std::fill(s.sums.get(), s.sums.get() + count * width, T(0));
    for (int64_t w = 0; w < words; ++w) {
      const T* source[64];
      for (int64_t j = 0; j < 64; ++j)
        source[j] = w * 64 + j < rows ? params.p.as<const T>() + (w * 64 + j) * params.p.stride[0] : nullptr;
      kn.nibble_table(source, column, here, s.table.get());
      std::fill(s.total.get(), s.total.get() + width, T(0));
      kn.nibble_add(s.table.get(), ~uint64_t{0}, s.total.get());
      for (int64_t d = 0; d < count; ++d) {
        const uint64_t word = bits[distinct[d] * pitch + w];
        if (word == ~uint64_t{0})
          kn.wide_add(s.total.get(), &s.sums[d * width]);
        else if (word)
          kn.nibble_add(s.table.get(), word, &s.sums[d * width]);
      }
    }
    for (int64_t d = 0; d < count; ++d)
      std::copy_n(&s.sums[d * width], here, mean + distinct[d] * cols + column);
  });
  parallel_for(ceil_div(count, 64), threads, [&](int64_t block, int) {
    for (int64_t d = block * 64; d < std::min(count, block * 64 + 64); ++d) {
      T* row = mean + distinct[d] * cols;
      double part[8] = {};
      for (int64_t c = 0; c < cols; ++c) part[c & 7] += row[c];
      const double total =
          ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
      const T divisor = static_cast<T>(total);
      for (int64_t c = 0; c < cols; ++c) row[c] /= divisor;
    }
  });
  for (int64_t i = 0; i < rows; ++i)
    if (first[i] != i) std::copy_n(mean + first[i] * cols, cols, mean + i * cols);
}

template <class T>
void segment_mean(const SegmentMeanParams& params, int threads) {
  const Kernels<T>& kn = kernels<T>();
  const int64_t rows = params.x.shape[0], cols = params.x.shape[1], segments = params.mean.shape[0];
  const int64_t* label = params.label.as<int64_t>();
  T* mean = params.mean.as<T>();
  std::vector<int64_t> size(segments, 0);
  for (int64_t i = 0; i < rows; ++i) {
    if (label[i] < 0 || label[i] >= segments)
      throw ArgumentError("label: expected values in [0, " + std::to_string(segments) + "), got " +
                          std::to_string(label[i]) + " in row " + std::to_string(i));
    ++size[label[i]];
  }
  constexpr int64_t kColumns = 256;
  parallel_for(ceil_div(cols, kColumns), threads, [&](int64_t block, int) {
    const int64_t column = block * kColumns, here = std::min(kColumns, cols - column);
    for (int64_t k = 0; k < segments; ++k) std::fill_n(mean + k * cols + column, here, T(0));
    for (int64_t i = 0; i < rows; ++i)
      kn.axpy(T(1), params.x.as<const T>() + i * params.x.stride[0] + column, mean + label[i] * cols + column,
              here);
    for (int64_t k = 0; k < segments; ++k)
      if (size[k] > 1)
        for (int64_t c = 0; c < here; ++c) mean[k * cols + column + c] /= static_cast<T>(size[k]);
  });
}

// Only leaders' rows are read. The next two rows that may lead are fetched while the current one absorbs:
// with many leaders the walk is bound by the latency of its first touch of a row.
void greedy_absorb(const GreedyAbsorbParams& params) {
  const Kernels<float>& kn = kernels<float>();
  const int64_t rows = params.owner.shape[0], words = ceil_div(rows, 64), pitch = params.adjacency.stride[0];
  const uint64_t* bits = params.adjacency.as<uint64_t>();
  int64_t* owner = params.owner.as<int64_t>();
  int64_t* label = params.label.as<int64_t>();
  int64_t leaders = 0;
  std::vector<uint64_t> alive(words + 8, 0);
  std::fill_n(alive.begin(), words, ~uint64_t{0});
  if (rows % 64) alive[words - 1] = (uint64_t{1} << (rows % 64)) - 1;
  for (int64_t start = 0; start < words; ++start) {
    while (alive[start]) {
      const int64_t lead = start * 64 + __builtin_ctzll(alive[start]);
      alive[start] &= alive[start] - 1;
      owner[lead] = lead;
      label[lead] = leaders;
      uint64_t next = alive[start];
      for (int ahead = 0; next && ahead < 2; ++ahead, next &= next - 1) {
        const uint64_t* row = bits + (start * 64 + __builtin_ctzll(next)) * pitch;
        for (int64_t w = start; w < words; w += 8) __builtin_prefetch(row + w);
      }
      kn.absorb(bits + lead * pitch + start, &alive[start], words - start, lead, leaders, owner + start * 64,
                label + start * 64);
      ++leaders;
    }
  }
  *params.count.as<int64_t>() = leaders;
}

}  // namespace
}  // namespace vidops::cpu

namespace vidops {

void neighbour_mean_forward_cpu(const NeighbourMeanParams& params, int threads) {
  cpu::dispatch_float(params.p.dtype, [&](auto zero) {
    using T = decltype(zero);
    cpu::check(params.p, 2, cpu::dtype_of<T>(), "p");
    cpu::check_bits(params.adjacency, params.p.shape[0]);
    cpu::check(params.mean, 2, cpu::dtype_of<T>(), "mean");
    cpu::check_shape(params.mean, {params.p.shape[0], params.p.shape[1]}, "mean");
    cpu::neighbour_mean<T>(params, threads);
  });
}

void segment_mean_forward_cpu(const SegmentMeanParams& params, int threads) {
  cpu::dispatch_float(params.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    cpu::check(params.x, 2, cpu::dtype_of<T>(), "x");
    cpu::check(params.label, 1, DType::i64, "label");
    cpu::check_shape(params.label, {params.x.shape[0]}, "label");
    cpu::check(params.mean, 2, cpu::dtype_of<T>(), "mean");
    cpu::check_shape(params.mean, {params.mean.shape[0], params.x.shape[1]}, "mean");
    cpu::segment_mean<T>(params, threads);
  });
}

void greedy_absorb_forward_cpu(const GreedyAbsorbParams& params, int) {
  cpu::check(params.owner, 1, DType::i64, "owner");
  cpu::check_bits(params.adjacency, params.owner.shape[0]);
  cpu::check(params.label, 1, DType::i64, "label");
  cpu::check_shape(params.label, {params.owner.shape[0]}, "label");
  require(params.count.dtype == DType::i64 && params.count.data != nullptr, "count: expected one int64");
  cpu::greedy_absorb(params);
}

}  // namespace vidops
