// Products of bf16 operands with fp32 sums: AMX tiles, or dpbf16 on the same packed layout.
//
// Panels of 32 rows in blocks of 32 columns. A block: [32 rows][32 bf16], two AMX tiles. B block:
// [2][16 pairs][16 rows][2], the pairwise interleaving that both tdpbf16ps and dpbf16 read. One part per
// block holds x rounded to bf16; with two parts a second block follows with what the rounding left over,
// itself rounded, and x y = hi hi + hi lo + lo hi up to about 3 * 2^-18 |x||y|. Three parts hold all 24 bits of x, and
// the six products that are not below 2^-26 |x||y| make a product of float32. What is not finite becomes NaN in a part,
// and so does what bf16 rounds to infinity: finite numbers above 3.39e38.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")

namespace vidops::cpu {
namespace {

constexpr int kRows = 32, kBlock = 32;
constexpr int64_t kDepth = 512;  // what a block of A and a panel of B hold of it stays in L2
constexpr int64_t kBlockElements = kRows * kBlock;

// 32 columns of one row, centred, as the parts of a bf16 sum; columns beyond `left` are zero.
template <int kParts>
inline void convert(const float* row, const float* centre, int64_t left, __m512i* part) {
  const __mmask16 low = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
  const __mmask16 high = left >= 32  ? 0xffff
                         : left > 16 ? static_cast<__mmask16>((1u << (left - 16)) - 1)
                                     : 0;
  __m512 x = _mm512_maskz_loadu_ps(low, row), y = _mm512_maskz_loadu_ps(high, row + 16);
  if (centre) {
    x = _mm512_sub_ps(x, _mm512_maskz_loadu_ps(low, centre));
    y = _mm512_sub_ps(y, _mm512_maskz_loadu_ps(high, centre + 16));
  }
  part[0] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(y, x));
  for (int p = 1; p < kParts; ++p) {
    const __m512i xs = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(part[p - 1]));
    const __m512i ys = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(part[p - 1], 1));
    x = _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_slli_epi32(xs, 16)));
    y = _mm512_sub_ps(y, _mm512_castsi512_ps(_mm512_slli_epi32(ys, 16)));
    part[p] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(y, x));
  }
}

template <int kParts>
void pack_a(const float* const* rows, int count, int64_t width, const float* centre, float, int64_t k0,
            void* panel) {
  uint16_t* out = static_cast<uint16_t*>(panel) + k0 * kRows * kParts;
  for (int64_t k = 0; k < width; k += kBlock, out += kBlockElements * kParts)
    for (int r = 0; r < kRows; ++r) {
      __m512i part[kParts] = {};
      if (r < count) convert<kParts>(rows[r] + k, centre ? centre + k : nullptr, width - k, part);
      for (int p = 0; p < kParts; ++p) _mm512_storeu_si512(out + p * kBlockElements + r * kBlock, part[p]);
    }
}

// The transpose of 16 x 16 words.
inline void transpose(__m512i* x) {
  __m512i y[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512i a = _mm512_unpacklo_epi32(x[i], x[i + 1]), b = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    const __m512i c = _mm512_unpacklo_epi32(x[i + 2], x[i + 3]), d = _mm512_unpackhi_epi32(x[i + 2], x[i + 3]);
    y[i] = _mm512_unpacklo_epi64(a, c), y[i + 1] = _mm512_unpackhi_epi64(a, c);
    y[i + 2] = _mm512_unpacklo_epi64(b, d), y[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
  // Lane l of y[4 g + c] now holds column 4 l + c of rows 4 g to 4 g + 3.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i a = _mm512_shuffle_i32x4(y[c], y[4 + c], 0x88), b = _mm512_shuffle_i32x4(y[c], y[4 + c], 0xdd);
    const __m512i d = _mm512_shuffle_i32x4(y[8 + c], y[12 + c], 0x88);
    const __m512i e = _mm512_shuffle_i32x4(y[8 + c], y[12 + c], 0xdd);
    x[c] = _mm512_shuffle_i32x4(a, d, 0x88), x[8 + c] = _mm512_shuffle_i32x4(a, d, 0xdd);
    x[4 + c] = _mm512_shuffle_i32x4(b, e, 0x88), x[12 + c] = _mm512_shuffle_i32x4(b, e, 0xdd);
  }
}

template <int kParts>
void pack_b(const float* const* rows, int count, int64_t width, const float* centre, float, int64_t k0,
            void* panel) {
  uint16_t* out = static_cast<uint16_t*>(panel) + k0 * kRows * kParts;
  for (int64_t k = 0; k < width; k += kBlock, out += kBlockElements * kParts)
    for (int half = 0; half < 2; ++half) {
      __m512i pairs[kParts][16];
      for (int r = 0; r < 16; ++r) {
        const int row = half * 16 + r;
        __m512i part[kParts] = {};
        if (row < count) convert<kParts>(rows[row] + k, centre ? centre + k : nullptr, width - k, part);
        for (int p = 0; p < kParts; ++p) pairs[p][r] = part[p];
      }
      for (int p = 0; p < kParts; ++p) {
        transpose(pairs[p]);
        for (int pair = 0; pair < 16; ++pair)
          _mm512_storeu_si512(out + p * kBlockElements + half * (kBlockElements / 2) + pair * 32, pairs[p][pair]);
      }
    }
}

// 16 columns, those of `mask`, of rows k and k + 1 of `left`, as pairs of parts of a bf16 sum.
template <int kParts>
inline void convert_pair(const float* row, int64_t pitch, int64_t left, __mmask16 mask, __m512i* part) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i order = _mm512_load_si512(kOrder);
  __m512 x = _mm512_maskz_loadu_ps(left > 0 ? mask : 0, row);
  __m512 y = _mm512_maskz_loadu_ps(left > 1 ? mask : 0, row + pitch);
  for (int p = 0; p < kParts; ++p) {
    part[p] = _mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(y, x)));
    x = _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_slli_epi32(part[p], 16)));
    y = _mm512_sub_ps(y, _mm512_castsi512_ps(_mm512_and_si512(part[p], _mm512_set1_epi32(0xffff0000))));
  }
}

// A panel of either operand from a k-major source; for A the pairs of a row lie side by side.
template <int kParts, bool kA>
void pack_kmajor(const float* source, int64_t pitch, int count, int64_t k, void* panel) {
  uint16_t* out = static_cast<uint16_t*>(panel);
  for (int64_t k0 = 0; k0 < k; k0 += kBlock, out += kBlockElements * kParts)
    for (int half = 0; half < 2; ++half) {
      const int columns = count - half * 16;
      const __mmask16 mask = columns >= 16 ? 0xffff : columns > 0 ? static_cast<__mmask16>((1u << columns) - 1) : 0;
      const float* from = source + k0 * pitch + half * 16;
      __m512i pairs[kParts][16];
      for (int pair = 0; pair < 16; ++pair) {
        __m512i part[kParts];
        convert_pair<kParts>(from + 2 * pair * pitch, pitch, k - k0 - 2 * pair, mask, part);
        for (int p = 0; p < kParts; ++p) pairs[p][pair] = part[p];
      }
      for (int p = 0; p < kParts; ++p) {
        if (kA) transpose(pairs[p]);
        for (int i = 0; i < 16; ++i)
          _mm512_storeu_si512(out + p * kBlockElements + half * (kBlockElements / 2) + i * 32, pairs[p][i]);
      }
    }
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};
};

// Loads one part of 32 rows of an operand into its two tiles.
#define VIDOPS_LOAD_PART(tile, next, block, part)           \
  _tile_loadd(tile, (block) + (part) * kBlockElements, 64); \
  _tile_loadd(next, (block) + (part) * kBlockElements + kBlockElements / 2, 64)
#define VIDOPS_ADD_PRODUCT() \
  _tile_dpbf16ps(0, 4, 6);   \
  _tile_dpbf16ps(1, 4, 7);   \
  _tile_dpbf16ps(2, 5, 6);   \
  _tile_dpbf16ps(3, 5, 7)

// Of a block of each operand: all products of parts that are not too small to count, ordered so that a part stays in
// its tiles from one to the next.
template <int kParts>
inline void add_products(const uint16_t* x, const uint16_t* y) {
  VIDOPS_LOAD_PART(6, 7, y, 0);
  if constexpr (kParts == 3) {
    VIDOPS_LOAD_PART(4, 5, x, 2);
    VIDOPS_ADD_PRODUCT();
  }
  if constexpr (kParts >= 2) {
    VIDOPS_LOAD_PART(4, 5, x, 1);
    VIDOPS_ADD_PRODUCT();
  }
  VIDOPS_LOAD_PART(4, 5, x, 0);
  VIDOPS_ADD_PRODUCT();
  if constexpr (kParts == 3) {
    VIDOPS_LOAD_PART(6, 7, y, 2);
    VIDOPS_ADD_PRODUCT();
  }
  if constexpr (kParts >= 2) {
    VIDOPS_LOAD_PART(6, 7, y, 1);
    VIDOPS_ADD_PRODUCT();
  }
  if constexpr (kParts == 3) {
    VIDOPS_LOAD_PART(4, 5, x, 1);
    VIDOPS_ADD_PRODUCT();
  }
}

template <int kParts>
void run_amx(int64_t a_panels, int64_t b_panels, int64_t k, const void* a_raw, const void* b_raw, float* c,
             int64_t ldc) {
  constexpr int64_t kStep = kBlockElements * kParts;
  TileConfig config;
  for (int t = 0; t < 8; ++t) config.bytes_per_row[t] = 64, config.rows[t] = 16;
  _tile_loadconfig(&config);
  const uint16_t* a = static_cast<const uint16_t*>(a_raw);
  const uint16_t* b = static_cast<const uint16_t*>(b_raw);
  const int64_t pitch = ldc * 4;
  for (int64_t k0 = 0; k0 < k; k0 += kDepth) {
    const int64_t steps = (k - k0 < kDepth ? k - k0 : kDepth) / kBlock;
    for (int64_t jp = 0; jp < b_panels; ++jp)
      for (int64_t ip = 0; ip < a_panels; ++ip) {
        const uint16_t* x = a + (ip * k + k0) * kRows * kParts;
        const uint16_t* y = b + (jp * k + k0) * kRows * kParts;
        float* out = c + ip * kRows * ldc + jp * kRows;
        if (k0 == 0) {
          _tile_zero(0);
          _tile_zero(1);
          _tile_zero(2);
          _tile_zero(3);
        } else {
          _tile_loadd(0, out, pitch);
          _tile_loadd(1, out + 16, pitch);
          _tile_loadd(2, out + 16 * ldc, pitch);
          _tile_loadd(3, out + 16 * ldc + 16, pitch);
        }
        for (int64_t s = 0; s < steps; ++s, x += kStep, y += kStep) add_products<kParts>(x, y);
        _tile_stored(0, out, pitch);
        _tile_stored(1, out + 16, pitch);
        _tile_stored(2, out + 16 * ldc, pitch);
        _tile_stored(3, out + 16 * ldc + 16, pitch);
      }
  }
  _tile_release();
}

void run_dpbf16(int64_t a_panels, int64_t b_panels, int64_t k, const void* a_raw, const void* b_raw, float* c,
                int64_t ldc) {
  constexpr int kGroup = 8;
  const uint16_t* a = static_cast<const uint16_t*>(a_raw);
  const uint16_t* b = static_cast<const uint16_t*>(b_raw);
  for (int64_t k0 = 0; k0 < k; k0 += kDepth) {
    const int64_t steps = (k - k0 < kDepth ? k - k0 : kDepth) / kBlock;
    for (int64_t jp = 0; jp < b_panels; ++jp)
      for (int64_t group = 0; group < a_panels * kRows / kGroup; ++group) {
        const int64_t ip = group / (kRows / kGroup), row = group % (kRows / kGroup) * kGroup;
        const uint16_t* x = a + (ip * k + k0) * kRows + row * kBlock;
        const uint16_t* y = b + (jp * k + k0) * kRows;
        float* out = c + (ip * kRows + row) * ldc + jp * kRows;
        __m512 acc[kGroup][2];
        for (int r = 0; r < kGroup; ++r)
          for (int h = 0; h < 2; ++h)
            acc[r][h] = _mm512_setzero_ps();
        for (int64_t s = 0; s < steps; ++s, x += kBlockElements, y += kBlockElements)
          for (int pair = 0; pair < 16; ++pair) {
            const __m512bh y0 = (__m512bh)_mm512_loadu_si512(y + pair * 32);
            const __m512bh y1 = (__m512bh)_mm512_loadu_si512(y + kBlockElements / 2 + pair * 32);
#pragma GCC unroll 8
            for (int r = 0; r < kGroup; ++r) {
              int32_t two;
              __builtin_memcpy(&two, x + r * kBlock + pair * 2, 4);
              const __m512bh v = (__m512bh)_mm512_set1_epi32(two);
              acc[r][0] = _mm512_dpbf16_ps(acc[r][0], v, y0);
              acc[r][1] = _mm512_dpbf16_ps(acc[r][1], v, y1);
            }
          }
        for (int r = 0; r < kGroup; ++r)
          for (int h = 0; h < 2; ++h) {
            float* to = out + r * ldc + h * 16;
            _mm512_storeu_ps(to, k0 ? _mm512_add_ps(_mm512_loadu_ps(to), acc[r][h]) : acc[r][h]);
          }
      }
  }
}

// tdpbf16ps sums the even and the odd columns of a block apart, adds the two and adds that to the total.
constexpr Gemm<float> kAmx{kRows,     kRows,     kBlock,    2, kBlock, OperandError::measured,
                           pack_a<1>, pack_b<1>, run_amx<1>, nullptr, pack_kmajor<1, true>, pack_kmajor<1, false>};
// Three such sums per block of 32 columns, each one rounding of half an eps.
constexpr Gemm<float> kAmxSplit{kRows,     kRows,     kBlock,    4, 2 * kBlock / 3, OperandError::split,
                                pack_a<2>, pack_b<2>, run_amx<2>, nullptr, pack_kmajor<2, true>, pack_kmajor<2, false>};
constexpr Gemm<float> kAmxThree{kRows,     kRows,     kBlock,    6, 2 * kBlock / 6, OperandError::none,
                                pack_a<3>, pack_b<3>, run_amx<3>, nullptr, pack_kmajor<3, true>, pack_kmajor<3, false>};
constexpr Gemm<float> kDot{kRows, kRows, kBlock, 2, int(kDepth), OperandError::measured, pack_a<1>, pack_b<1>,
                           run_dpbf16, nullptr, pack_kmajor<1, true>, pack_kmajor<1, false>};

}  // namespace
}  // namespace vidops::cpu

#pragma GCC pop_options
#endif

namespace vidops::cpu {

const Gemm<float>* bf16_gemm(CpuIsa isa) {
#if defined(__x86_64__)
  if (isa == CpuIsa::amx) return &kAmx;
  if (isa == CpuIsa::avx512_bf16) return &kDot;
#endif
  (void)isa;
  return nullptr;
}

const Gemm<float>* split_gemm(CpuIsa isa) {
#if defined(__x86_64__)
  if (isa == CpuIsa::amx) return &kAmxSplit;
#endif
  (void)isa;
  return nullptr;
}

const Gemm<float>* three_part_gemm(CpuIsa isa) {
#if defined(__x86_64__)
  if (isa == CpuIsa::amx) return &kAmxThree;
#endif
  (void)isa;
  return nullptr;
}

}  // namespace vidops::cpu
