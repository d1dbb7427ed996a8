// Rows of float32, float16 or bfloat16, four channels at a time, and products of float32 accuracy on tensor cores.
#pragma once

#include "device.cuh"

namespace vidops::cuda {

struct alignas(16) FloatQuad {
  float v[4];
};
struct alignas(8) WordQuad {
  u16 v[4];
};

// --- storage; kShort: tensor cores take the values whole ---------------------------------------------------------
struct FloatStorage {
  using Element = float;
  using Quad = FloatQuad;
  static constexpr bool kShort = false;
  static VIDOPS_DEVICE float value(float v) { return v; }
};
struct HalfStorage {
  using Element = u16;
  using Quad = WordQuad;
  static constexpr bool kShort = true;
  static VIDOPS_DEVICE float value(u16 v) { return half_to_float(v); }
};
// Never four channels at a time.
struct DoubleStorage {
  using Element = double;
  static VIDOPS_DEVICE double value(double v) { return v; }
};
struct BfloatStorage {
  using Element = u16;
  using Quad = WordQuad;
  static constexpr bool kShort = true;
  static VIDOPS_DEVICE float value(u16 v) { return bfloat_to_float(v); }
};

template <class Storage>
VIDOPS_DEVICE FloatQuad load_quad(const char* row, int quad) {
  const typename Storage::Quad raw = reinterpret_cast<const typename Storage::Quad*>(row)[quad];
  FloatQuad r;
  VIDOPS_UNROLL
  for (int e = 0; e < 4; ++e) r.v[e] = Storage::value(raw.v[e]);
  return r;
}

VIDOPS_DEVICE FloatQuad load_floats(const float* at) { return *reinterpret_cast<const FloatQuad*>(at); }

// A float32 is the sum of two numbers of 11 bits and of what three products may neglect. Infinities (and overflow)
// become NaN, which the caller must look for.
struct SplitFloats {
  u32 high[4], low[4];

  VIDOPS_DEVICE void set(int i, float v) {
    high[i] = (float_bits(v) + 0x1000u) & 0xffffe000u;
    low[i] = float_bits(v - bits_float(high[i]));
  }
  // Of a value that needs no second number.
  VIDOPS_DEVICE void set_short(int i, float v) { high[i] = float_bits(v); }
};

// The other operand.
struct SplitPair {
  u32 high[2], low[2];

  VIDOPS_DEVICE SplitPair(float b0, float b1) {
    SplitFloats b;
    b.set(0, b0);
    b.set(1, b1);
    VIDOPS_UNROLL
    for (int i = 0; i < 2; ++i) high[i] = b.high[i], low[i] = b.low[i];
  }
};

// c + small += a b. The small terms may have an accumulator of their own: products wait for one another less.
template <bool kShort = false>
VIDOPS_DEVICE void multiply_split(float (&c)[4], float (&small)[4], const SplitFloats& a, const SplitPair& b) {
  mma_tf32(c, a.high, b.high);
  if constexpr (!kShort) mma_tf32(small, a.low, b.high);
  mma_tf32(small, a.high, b.low);
}

VIDOPS_DEVICE void multiply_split(float (&c)[4], float (&small)[4], const SplitFloats& a, float b0, float b1) {
  multiply_split(c, small, a, SplitPair(b0, b1));
}

}  // namespace vidops::cuda
