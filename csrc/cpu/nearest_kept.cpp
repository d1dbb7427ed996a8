// The nearest kept token of every place: first within each row of the grid, then over the rows, so that a place looks
// at one token per row instead of at all.
#include "vidops/nearest_kept.h"

#include "common.h"

namespace vidops::cpu {
namespace {

constexpr int64_t kFar = int64_t{1} << 40;  // more than any squared distance

void nearest(const int64_t* keep, int64_t count, int64_t height, int64_t width, int64_t* source) {
  const int64_t places = height * width;
  std::vector<int64_t> slot(static_cast<size_t>(places), -1);
  for (int64_t k = count - 1; k >= 0; --k) slot[keep[k]] = k;  // of repeated indices the first
  // Column of the nearest kept token of the same row, -1 where the row has none.
  std::vector<int64_t> across(static_cast<size_t>(places), -1);
  for (int64_t y = 0; y < height; ++y) {
    const int64_t* here = &slot[y * width];
    int64_t* best = &across[y * width];
    for (int64_t x = 0, last = -1; x < width; ++x) {
      if (here[x] >= 0) last = x;
      best[x] = last;
    }
    for (int64_t x = width - 1, last = -1; x >= 0; --x) {
      if (here[x] >= 0) last = x;
      // Of two equally far, the left one.
      if (last >= 0 && (best[x] < 0 || last - x < x - best[x])) best[x] = last;
    }
  }
  std::vector<int64_t> least(static_cast<size_t>(width)), from(static_cast<size_t>(width));
  for (int64_t y = 0; y < height; ++y) {
    std::fill(least.begin(), least.end(), kFar);
    for (int64_t row = 0; row < height; ++row) {
      const int64_t down = (row - y) * (row - y);
      const int64_t* best = &across[row * width];
      if (best[0] < 0) continue;
      for (int64_t x = 0; x < width; ++x) {
        const int64_t distance = down + (best[x] - x) * (best[x] - x);
        // Rows come in raster order, so an equal one is never better.
        from[x] = distance < least[x] ? row * width + best[x] : from[x];
        least[x] = std::min(least[x], distance);
      }
    }
    for (int64_t x = 0; x < width; ++x) source[y * width + x] = slot[from[x]];
  }
}

}  // namespace
}  // namespace vidops::cpu

namespace vidops {

void nearest_kept_forward_cpu(const NearestKeptParams& params, int threads) {
  using namespace cpu;
  check(params.keep, 2, DType::i64, "keep");
  check(params.source, 2, DType::i64, "source");
  const int64_t batch = params.keep.shape[0], count = params.keep.shape[1], places = params.source.shape[1];
  check_shape(params.source, {batch, places}, "source");
  require(params.source.contiguous(), "source: must be contiguous");
  require(params.width > 0 && places > 0 && places % params.width == 0, "source: must be a grid of the given width");
  require(count > 0, "keep: expected at least one token");
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t k = 0; k < count; ++k) {
      const int64_t place = params.keep.as<int64_t>()[b * params.keep.stride[0] + k];
      if (place < 0 || place >= places)
        throw ArgumentError("keep: expected values in [0, " + std::to_string(places) + "), got " +
                            std::to_string(place));
    }
  parallel_for(batch, threads, [&](int64_t b, int) {
    nearest(params.keep.as<int64_t>() + b * params.keep.stride[0], count, places / params.width, params.width,
            params.source.as<int64_t>() + b * places);
  });
}

}  // namespace vidops
