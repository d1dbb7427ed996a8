// What the tests of the CPU cores share: checks and their count, arrays with guard bands, random data. At the end
// the tests themselves, a family of operators each.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "vidops/tensor_view.h"

namespace vidops::testing {

inline int failures = 0, checks = 0;
inline std::string where;

inline void expect(bool ok, const std::string& what) {
  ++checks;
  if (ok) return;
  ++failures;
  if (failures < 40) std::printf("FAILED %s: %s\n", where.c_str(), what.c_str());
}

template <class Call>
void expect_refused(Call call, const std::string& what) {
  bool refused = false;
  try {
    call();
  } catch (const ArgumentError&) {
    refused = true;
  }
  expect(refused, what + " is refused");
}

template <class T>
DType dtype_of();
template <>
inline DType dtype_of<float>() {
  return DType::f32;
}
template <>
inline DType dtype_of<double>() {
  return DType::f64;
}
template <>
inline DType dtype_of<int64_t>() {
  return DType::i64;
}

// A tensor with `pad` unused elements after every row and a guard band behind all; unused elements hold a
// sentinel.
template <class T>
struct Array {
  std::vector<int64_t> shape;
  int64_t pitch, rows;
  std::vector<T> data;
  static constexpr int64_t kGuard = 32;

  explicit Array(std::vector<int64_t> s, int64_t pad = 0) : shape(std::move(s)) {
    pitch = shape.back() + pad;
    rows = 1;
    for (size_t i = 0; i + 1 < shape.size(); ++i) rows *= shape[i];
    data.assign(static_cast<size_t>(rows * pitch + kGuard), sentinel());
  }
  static T sentinel() { return static_cast<T>(-12345); }
  TensorView view() {
    TensorView v;
    v.data = data.data();
    v.dtype = dtype_of<T>();
    v.rank = static_cast<int32_t>(shape.size());
    int64_t step = 1;
    for (int i = v.rank - 1; i >= 0; --i) {
      v.shape[i] = shape[i];
      v.stride[i] = step;
      step *= i == v.rank - 1 ? pitch : shape[i];
    }
    return v;
  }
  T& at(int64_t row, int64_t c) { return data[static_cast<size_t>(row * pitch + c)]; }
  int64_t width() const { return shape.back(); }
  bool guarded() const {
    for (int64_t i = rows * pitch; i < rows * pitch + kGuard; ++i)
      if (data[static_cast<size_t>(i)] != sentinel()) return false;
    return true;
  }
  bool same_bits(const Array& other) const {
    return std::memcmp(data.data(), other.data.data(), data.size() * sizeof(T)) == 0;
  }
};

inline std::mt19937_64 generator(7);

template <class T>
Array<T> normal(std::vector<int64_t> shape, double spread, int64_t pad) {
  Array<T> a(std::move(shape), pad);
  std::normal_distribution<double> draw(0.0, spread);
  for (int64_t r = 0; r < a.rows; ++r)
    for (int64_t c = 0; c < a.width(); ++c) a.at(r, c) = static_cast<T>(draw(generator));
  return a;
}

template <class T>
double tolerance() {
  return sizeof(T) == 4 ? 2e-5 : 1e-11;
}

template <class T>
void close(Array<T>& got, const std::vector<double>& want, const std::string& what,
           double tol = tolerance<T>()) {
  double worst = 0, scale = 1e-30;
  for (double w : want) scale = std::max(scale, std::abs(w));
  for (int64_t r = 0; r < got.rows; ++r)
    for (int64_t c = 0; c < got.width(); ++c) {
      const double error = std::abs(double(got.at(r, c)) - want[size_t(r * got.width() + c)]);
      worst = error <= worst ? worst : error;
      if (std::isnan(error)) worst = std::numeric_limits<double>::infinity();
    }
  expect(worst <= tol * scale,
         what + ": error " + std::to_string(worst) + " at scale " + std::to_string(scale));
  expect(got.guarded(), what + ": wrote past its end");
}

template <class T>
void attention_tests();
template <class T>
void clustering_tests();
template <class T>
void label_propagation_tests();
template <class T>
void slot_tests();
template <class T>
void token_tests();

// The cases that need one dtype only.
void attention_corner_cases();
void clustering_corner_cases();

}  // namespace vidops::testing
