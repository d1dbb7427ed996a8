// What bipartite_match and sta_score share: unit keys, sorting by (value, index), and the matching of one frame.
#pragma once

#include <cstring>
#include <utility>

#include "common.h"
#include "kernels.h"
#include "panels.h"

namespace vidops::cpu {

// Indices in ascending order of (value, index), NaN last, as torch's stable sort has them. Bits that order like the
// numbers make the comparison one of integers; float values share a word with their index, and go by their bytes, from
// the last, into as many buckets: stable, and without a branch that nobody can foresee.
class IndexSort {
 public:
  void run(const float* value, int64_t count, int64_t* order) {
    constexpr int kBytes = 4, kFirst = 32 /* bits of the index */;
    narrow_.resize(static_cast<size_t>(count));
    moved_.resize(static_cast<size_t>(count));
    uint32_t place[kBytes][256] = {};
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = bits_of(value[i]);
      narrow_[i] = uint64_t{bits} << kFirst | uint32_t(i);
      for (int b = 0; b < kBytes; ++b) ++place[b][bits >> 8 * b & 255];
    }
    for (int b = 0; b < kBytes; ++b) {
      uint32_t before = 0;
      for (uint32_t& p : place[b]) before += std::exchange(p, before);
      for (int64_t i = 0; i < count; ++i) moved_[place[b][narrow_[i] >> (kFirst + 8 * b) & 255]++] = narrow_[i];
      narrow_.swap(moved_);
    }
    for (int64_t i = 0; i < count; ++i) order[i] = static_cast<int64_t>(narrow_[i] & 0xffffffffu);
  }
  void run(const double* value, int64_t count, int64_t* order) {
    wide_.resize(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) wide_[i] = {bits_of(value[i]), i};
    std::sort(wide_.begin(), wide_.end());
    for (int64_t i = 0; i < count; ++i) order[i] = wide_[i].second;
  }

 private:
  static uint32_t bits_of(float x) {
    if (std::isnan(x)) return ~uint32_t{0};
    x += 0.0f;  // the negative zero is no other number
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits >> 31 ? ~bits : bits | uint32_t{1} << 31;
  }
  static uint64_t bits_of(double x) {
    if (std::isnan(x)) return ~uint64_t{0};
    x += 0.0;
    uint64_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits >> 63 ? ~bits : bits | uint64_t{1} << 63;
  }
  std::vector<uint64_t> narrow_, moved_;
  std::vector<std::pair<uint64_t, int64_t>> wide_;
};

// y = x / |x|, zeros for zeros; false, and NaN in y, if an element is not finite. |x| is rounded once: a row of one
// element becomes exactly 1 or -1, and equal rows have the same y. square: |x|^2 as it is, out of range or not.
template <class T>
bool unit_row(const Kernels<T>& kn, const T* x, int64_t width, T* y, double* square) {
  // Within these the norm is a normal number of T, and no square over- or underflows in double.
  constexpr double kLeast = sizeof(T) == 4 ? 1e-37 : 1e-150, kMost = sizeof(T) == 4 ? 1e37 : 1e150;
  *square = kn.wide_dot(x, x, width);
  const double norm = std::sqrt(*square);
  if (norm > kLeast && norm < kMost) {
    kn.divided_copy(T(norm), x, y, width);
    return true;
  }
  T largest = 0;
  bool finite = true;
  for (int64_t c = 0; c < width; ++c) {
    largest = std::max(largest, std::abs(x[c]));
    finite = finite && std::isfinite(x[c]);
  }
  if (!finite || largest == 0) {
    std::fill(y, y + width, finite ? T(0) : std::numeric_limits<T>::quiet_NaN());
    return finite;
  }
  double sum = 0;
  for (int64_t c = 0; c < width; ++c) {
    const double part = double(x[c]) / double(largest);
    sum += part * part;
  }
  for (int64_t c = 0; c < width; ++c) y[c] = T(double(x[c]) / double(largest) / std::sqrt(sum));
  return true;
}

// What multiplies unit keys: float32, or three bf16 parts of it. Each element is one sum over the channels in order.
template <class T>
const Gemm<T>& unit_gemm(int64_t width) {
  if constexpr (sizeof(T) == 4)
    if (const Gemm<T>* tiles = width >= 16 ? three_part_gemm(cpu_isa_level()) : nullptr) return *tiles;
  return kernels<T>().gemm;
}

// The cosine of two keys, given |x|^2 and |y|^2, rounded once.
template <class T>
T cosine(const Kernels<T>& kn, const T* x, const T* y, int64_t width, double xx, double yy) {
  double xy = kn.wide_dot(x, y, width);
  constexpr double kLeast = 1e-280, kMost = 1e280;  // between these no square was lost to under- or overflow
  if (std::min(xx, yy) > kLeast && std::max(xx, yy) < kMost) return T(xy / (std::sqrt(xx) * std::sqrt(yy)));
  xx = yy = xy = 0;
  double x_largest = 0, y_largest = 0;
  for (int64_t c = 0; c < width; ++c) {
    x_largest = std::max(x_largest, std::abs(double(x[c])));
    y_largest = std::max(y_largest, std::abs(double(y[c])));
  }
  if (x_largest == 0 || y_largest == 0) return T(0);
  for (int64_t c = 0; c < width; ++c) {
    const double a = double(x[c]) / x_largest, b = double(y[c]) / y_largest;
    xx += a * a, yy += b * b, xy += a * b;
  }
  return T(xy / (std::sqrt(xx) * std::sqrt(yy)));
}

// The matching of one set of tokens, given their keys and those as unit vectors.
template <class T>
class Matcher {
 public:
  explicit Matcher(int64_t tokens, int64_t width)
      : kn_(kernels<T>()), g_(unit_gemm<T>(width)), even_((tokens + 1) / 2), odd_(tokens / 2), width_(width),
        depth_(round_up(width, g_.k_align)), slack_(T(2 * (width + 4)) * std::numeric_limits<T>::epsilon() / 2) {
    columns_ = computed_columns(g_, odd_);
    left_.resize(g_.mr * depth_ * g_.elem);
    right_.resize(round_up(odd_, g_.nr) * depth_ * g_.elem);
    cosine_.resize(g_.mr * columns_);
  }

  // finite[n], square[n]: as unit_row finds them of key n. partner may be null.
  void run(const T* key, int64_t pitch, const T* unit, const uint8_t* finite, const double* square, bool class_token,
           bool distill_token, int64_t* order, T* similarity, int64_t* partner) {
    const Gemm<T>& g = g_;
    const T none = -std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
    pack_panels(g, false, [&](int64_t j) { return unit + (2 * j + 1) * width_; }, odd_, width_, (const T*)nullptr,
                T(1), 0, depth_, right_.get());
    int64_t broken = distill_token ? 1 : 0;  // the first odd token that is not finite, and takes part
    while (broken < odd_ && finite[2 * broken + 1]) ++broken;
    const int64_t first = distill_token ? 1 : 0;
    for (int64_t i0 = 0; i0 < even_; i0 += g.mr) {
      const int64_t count = std::min<int64_t>(g.mr, even_ - i0);
      pack_panels(g, true, [&](int64_t i) { return unit + 2 * (i0 + i) * width_; }, count, width_, (const T*)nullptr,
                  T(1), 0, depth_, left_.get());
      if (odd_) run_columns<T>(g, 1, odd_, depth_, left_.get(), right_.get(), cosine_.get(), columns_);
      for (int64_t r = 0; r < count; ++r) {
        const int64_t i = i0 + r;
        const T* row = cosine_.get() + r * columns_;
        T best = none;
        int64_t at = odd_ ? 0 : -1;
        if (first < odd_ && !finite[2 * i]) {
          best = nan, at = first;
        } else if (broken < odd_) {
          best = nan, at = broken;
        } else if (first < odd_) {
          // Whatever rounding may have kept from being the maximum is looked at again, rounded once: tokens which have
          // an equal one among the odd ones tie, and the first of the best is taken. None is better than 1.
          const T limit = kn_.row_max(row + first, odd_ - first) - slack_;
          best = none;
          int64_t j = kn_.next_not_below(row, first, odd_, limit);
          for (; j < odd_ && best < 1; j = kn_.next_not_below(row, j + 1, odd_, limit)) {
            const int64_t even = 2 * i, odd = 2 * j + 1;
            const T exact = cosine(kn_, key + even * pitch, key + odd * pitch, width_, square[even], square[odd]);
            if (exact > best) best = exact, at = j;
          }
        }
        similarity[i] = class_token && i == 0 ? none : best;
        if (partner) partner[i] = at;
      }
    }
    sort_.run(similarity, even_, order);
  }

 private:
  const Kernels<T>& kn_;
  const Gemm<T>& g_;
  int64_t even_, odd_, width_, columns_ = 0;
  int64_t depth_;  // channels with padding
  T slack_;  // by which the product of two unit keys may miss another that is as large
  Buffer<char> left_, right_;
  Buffer<T> cosine_;
  IndexSort sort_;
};

}  // namespace vidops::cpu
