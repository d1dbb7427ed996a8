// Generic inner loops over GCC vector types. Included once per instruction set with
//   VIDOPS_ISA (namespace), VIDOPS_VECTOR_BYTES and VIDOPS_MR set, inside `#pragma GCC target`.
// Nothing from the standard library is used: an inline function compiled for AVX-512 here could otherwise be
// the copy that the linker keeps for everybody.

namespace vidops::cpu::VIDOPS_ISA {
namespace {

#define VIDOPS_INLINE inline __attribute__((always_inline))

template <class T>
struct Lanes {
  static constexpr int W = VIDOPS_VECTOR_BYTES / sizeof(T);
  static constexpr int MR = VIDOPS_MR;
  static constexpr int NR = 2 * W;
  typedef T V __attribute__((vector_size(VIDOPS_VECTOR_BYTES)));
  typedef T U __attribute__((vector_size(VIDOPS_VECTOR_BYTES), aligned(sizeof(T)), may_alias));
};

typedef int32_t VI __attribute__((vector_size(VIDOPS_VECTOR_BYTES)));
using VF = Lanes<float>::V;

template <class T>
VIDOPS_INLINE typename Lanes<T>::V load(const T* p) {
  return *reinterpret_cast<const typename Lanes<T>::U*>(p);
}
template <class T>
VIDOPS_INLINE void store(T* p, typename Lanes<T>::V v) {
  *reinterpret_cast<typename Lanes<T>::U*>(p) = v;
}
template <class T>
VIDOPS_INLINE typename Lanes<T>::V splat(T x) {
  return x - typename Lanes<T>::V{};
}
template <class T>
VIDOPS_INLINE T lane_sum(typename Lanes<T>::V v) {
  T part[Lanes<T>::W];
  store<T>(part, v);
  for (int half = Lanes<T>::W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  return part[0];
}

#include "transpose.inl"

// Of a panel of B both vectors, or the first. bias may be null.
template <class T, int N = 2>
VIDOPS_INLINE void micro(int64_t k, const T* a, const T* b, T* c, int64_t ldc, bool add, const T* bias = nullptr) {
  using L = Lanes<T>;
  typename L::V acc[L::MR][N] = {};
  for (int64_t i = 0; i < k; ++i, a += L::MR, b += L::NR) {
    typename L::V y[N];
#pragma GCC unroll 2
    for (int h = 0; h < N; ++h) y[h] = load(b + h * L::W);
#pragma GCC unroll 16
    for (int r = 0; r < L::MR; ++r) {
      const typename L::V x = splat(a[r]);
#pragma GCC unroll 2
      for (int h = 0; h < N; ++h) acc[r][h] += x * y[h];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < L::MR; ++r)
#pragma GCC unroll 2
    for (int h = 0; h < N; ++h) {
      T* out = c + r * ldc + h * L::W;
      if (bias) acc[r][h] += load(bias + h * L::W);
      store(out, add ? load(out) + acc[r][h] : acc[r][h]);
    }
}

constexpr int64_t kDepth = 256;  // a B panel slice stays in L1 while the A block streams from L2

template <class T, int N = 2>
void gemm(int64_t a_panels, int64_t b_panels, int64_t k, const void* a_raw, const void* b_raw, T* c,
          int64_t ldc) {
  using L = Lanes<T>;
  const T* a = static_cast<const T*>(a_raw);
  const T* b = static_cast<const T*>(b_raw);
  if (k == 0) {
    for (int64_t i = 0; i < a_panels * L::MR; ++i)
      for (int64_t j = 0; j < b_panels * N * L::W; ++j) c[i * ldc + j] = 0;
    return;
  }
  for (int64_t k0 = 0; k0 < k; k0 += kDepth) {
    const int64_t depth = k - k0 < kDepth ? k - k0 : kDepth;
    for (int64_t jp = 0; jp < b_panels; ++jp)
      for (int64_t ip = 0; ip < a_panels; ++ip)
        micro<T, N>(depth, a + (ip * k + k0) * L::MR, b + (jp * k + k0) * L::NR,
                    c + ip * L::MR * ldc + jp * N * L::W, ldc, k0 > 0);
  }
}

// Rows [R0, R0 + N) of a panel of R, E columns of them. Where N is less than a vector, stores reach the next column,
// which is written in its turn: such rows go first, and `last` tells that nothing comes next.
template <class T, int R, int R0, int N>
VIDOPS_INLINE void pack_block(const T* const* rows, int64_t d, const T* centre, T scale, bool last, T* out) {
  using L = Lanes<T>;
  constexpr int E = Shuffles<T>::E;
  typename L::V v[E];
  transpose_lane(rows, d, v);
#pragma GCC unroll 4
  for (int c = 0; c < E; ++c) {
    if (centre) v[c] -= splat(centre[d + c]);
    v[c] *= splat(scale);
    T* column = out + c * R + R0;
    if (N == L::W || c < E - 1 || !last) {
      store(column, v[c]);
      continue;
    }
    T part[L::W];
    store(part, v[c]);
    for (int r = 0; r < N; ++r) column[r] = part[r];
  }
}

template <class T, int R>
void pack(const T* const* rows, int count, int64_t width, const T* centre, T scale, int64_t k0, void* panel) {
  constexpr int W = Lanes<T>::W, E = Shuffles<T>::E, kRest = R % W;
  static_assert(R <= 2 * W && W - kRest <= R);
  T* out = static_cast<T*>(panel) + k0 * R;
  const T* source[2 * W];
  for (int r = 0; r < 2 * W; ++r) source[r] = rows[r < count ? r : count - 1];
  int64_t d = 0;
  for (; d + E <= width; d += E) {
    const bool last = d + E == width;
    if constexpr (kRest > 0)
      pack_block<T, R, R - kRest, kRest>(source + R - kRest, d, centre, scale, last, out + d * R);
    if constexpr (R >= W) pack_block<T, R, 0, W>(source, d, centre, scale, last, out + d * R);
    if constexpr (R == 2 * W) pack_block<T, R, W, W>(source + W, d, centre, scale, last, out + d * R);
  }
  for (; d < width; ++d)
    for (int r = 0; r < R; ++r) out[d * R + r] = (source[r][d] - (centre ? centre[d] : T(0))) * scale;
  if (count == R) return;
  for (d = 0; d < width; ++d)
    for (int r = count; r < R; ++r) out[d * R + r] = 0;
}

template <class T, int R>
void pack_kmajor(const T* source, int64_t pitch, int count, int64_t k, void* panel) {
  T* out = static_cast<T*>(panel);
  for (int64_t i = 0; i < k; ++i, out += R) {
    const T* row = source + i * pitch;
    if (count == R) {  // a length the compiler knows
      for (int r = 0; r < R; ++r) out[r] = row[r];
      continue;
    }
    for (int r = 0; r < count; ++r) out[r] = row[r];
    for (int r = count; r < R; ++r) out[r] = 0;
  }
}

template <class T>
T row_max(const T* x, int64_t n) {
  using L = Lanes<T>;
  T best = -__builtin_huge_val();
  int64_t i = 0;
  if (n >= L::W) {
    typename L::V v = load(x);
    for (i = L::W; i + L::W <= n; i += L::W) {
      const typename L::V y = load(x + i);
      v = y > v ? y : v;
    }
    for (int l = 0; l < L::W; ++l) best = v[l] > best ? v[l] : best;
  }
  for (; i < n; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

// exp to about 1 ulp: x = n ln2 + r, degree-7 Taylor on |r| <= ln2/2, 2^n in two factors so that the result
// underflows gradually. NaN goes through the polynomial.
VIDOPS_INLINE VF exp_vector(VF x) {
#if defined(VIDOPS_HAS_AVX512)
  x = _mm512_max_ps(splat(-104.0f),
                    _mm512_min_ps(splat(88.72284f), x));  // a NaN in the second place is returned
#else
  x = x > splat(88.72284f) ? splat(88.72284f) : x;
  x = x < splat(-104.0f) ? splat(-104.0f) : x;
#endif
  const VF magic = splat(12582912.0f);
  const VF biased = x * splat(1.44269504088896341f) + magic;
  const VF n = biased - magic;
  const VF r = (x - n * splat(0.693359375f)) - n * splat(-2.12194440e-4f);
  VF p = splat(1.9841270e-4f);
  p = p * r + splat(1.3888889e-3f);
  p = p * r + splat(8.3333333e-3f);
  p = p * r + splat(4.1666667e-2f);
  p = p * r + splat(1.6666667e-1f);
  p = p * r + splat(0.5f);
  p = p * r * r + r + splat(1.0f);
#if defined(VIDOPS_HAS_AVX512)
  return _mm512_scalef_ps(p, n);
#else
  const VI ni = reinterpret_cast<VI>(biased) - reinterpret_cast<VI>(magic);
  const VI low = ni >> 1, high = ni - low;
  return p * reinterpret_cast<VF>((low + 127) << 23) * reinterpret_cast<VF>((high + 127) << 23);
#endif
}

// The same of numbers from -2 to 2: ln2 in one part, and a polynomial that is best on |r| <= ln2/2 (3e-9).
VIDOPS_INLINE VF exp_near_zero(VF x) {
  const VF magic = splat(12582912.0f);
  const VF biased = x * splat(1.44269504088896341f) + magic;
  const VF n = biased - magic;
  const VF r = x - n * splat(0.69314718056f);
  VF p = splat(1.38131401e-3f);
  p = p * r + splat(8.36941972e-3f);
  p = p * r + splat(4.16684560e-2f);
  p = p * r + splat(1.66665152e-1f);
  p = p * r + splat(4.99999940e-1f);
  p = p * r * r + r + splat(1.0f);
#if defined(VIDOPS_HAS_AVX512)
  return _mm512_scalef_ps(p, n);
#else
  const VI exponent = reinterpret_cast<VI>(biased) - reinterpret_cast<VI>(magic) + 127;
  return p * reinterpret_cast<VF>(exponent << 23);
#endif
}

VIDOPS_INLINE VF log_vector(VF x) {
  const VI bits = reinterpret_cast<VI>(x);
  const VI shifted = bits - 0x3f3504f3;  // sqrt(1/2): the mantissa lands in [sqrt(1/2), sqrt(2))
  const VI e = shifted >> 23;
  const VF m = reinterpret_cast<VF>(bits - (e << 23)) - splat(1.0f);
  const VF ef = __builtin_convertvector(e, VF);
  VF p = splat(7.0376836292e-2f);
  p = p * m + splat(-1.1514610310e-1f);
  p = p * m + splat(1.1676998740e-1f);
  p = p * m + splat(-1.2420140846e-1f);
  p = p * m + splat(1.4249322787e-1f);
  p = p * m + splat(-1.6668057665e-1f);
  p = p * m + splat(2.0000714765e-1f);
  p = p * m + splat(-2.4999993993e-1f);
  p = p * m + splat(3.3333331174e-1f);
  const VF z = m * m;
  VF y = p * m * z + ef * splat(-2.12194440e-4f);
  y = y - splat(0.5f) * z;
  const VF result = m + y + ef * splat(0.693359375f);
  return x == x ? result : x;
}

// x = exp(x) and the sum of it.
template <class Exp>
VIDOPS_INLINE float exponentials(float* x, int64_t n, Exp exp) {
  constexpr int W = Lanes<float>::W;
  VF sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) {
      const VF e = exp(load(x + i + u * W));
      store(x + i + u * W, e);
      sum[u] += e;
    }
  for (; i < n; i += W) {
    const int64_t left = n - i < W ? n - i : W;
#if defined(VIDOPS_HAS_AVX512)
    const __mmask16 lanes = static_cast<__mmask16>((1u << left) - 1);
    const __m512 e = exp(_mm512_maskz_loadu_ps(lanes, x + i));
    _mm512_mask_storeu_ps(x + i, lanes, e);
    sum[0] += _mm512_maskz_mov_ps(lanes, e);
#else
    float part[W] = {};
    for (int64_t l = 0; l < left; ++l) part[l] = x[i + l];
    store(part, exp(load(part)));
    for (int64_t l = 0; l < left; ++l) x[i + l] = part[l];
    for (int64_t l = left; l < W; ++l) part[l] = 0;
    sum[0] += load(part);
#endif
  }
  return lane_sum<float>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

float exp_sum(float* x, int64_t n, float shift) {
  const VF s = splat(shift);
  return exponentials(x, n, [s](VF v) __attribute__((always_inline)) { return exp_vector(v - s); });
}
float exp_cosines(float* x, int64_t n) {
  return exponentials(x, n, [](VF v) __attribute__((always_inline)) { return exp_near_zero(v); });
}

double exp_sum(double* x, int64_t n, double shift) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i] = __builtin_exp(x[i] - shift);
  return sum;
}

double exp_cosines(double* x, int64_t n) { return exp_sum(x, n, 0.0); }

float log_row(const float* x, float* y, int64_t n, float floor) {
  constexpr int W = Lanes<float>::W;
  const VF f = splat(floor);
  VF least = splat(__builtin_huge_valf());
  for (int64_t i = 0; i < n; i += W) {
    if (i + W <= n) {
      const VF v = load(x + i);
      least = v < least ? v : least;
      store(y + i, log_vector(v < f ? f : v));
      continue;
    }
    float part[W];
    for (int l = 0; l < W; ++l) part[l] = i + l < n ? x[i + l] : x[i];
    const VF v = load(part);
    least = v < least ? v : least;
    store(part, log_vector(v < f ? f : v));
    for (int l = 0; i + l < n; ++l) y[i + l] = part[l];
  }
  float best = __builtin_huge_valf();
  for (int l = 0; l < W; ++l) best = least[l] < best ? least[l] : best;
  return best;
}

double log_row(const double* x, double* y, int64_t n, double floor) {
  double least = __builtin_huge_val();
  for (int64_t i = 0; i < n; ++i) {
    least = x[i] < least ? x[i] : least;
    y[i] = __builtin_log(x[i] < floor ? floor : x[i]);
  }
  return least;
}

template <class T>
void scaled_copy(T a, const T* x, T* y, int64_t n) {
  constexpr int W = Lanes<T>::W;
  int64_t i = 0;
  for (; i + W <= n; i += W) store(y + i, splat(a) * load(x + i));
  for (; i < n; ++i) y[i] = a * x[i];
}

template <class T>
void axpy(T a, const T* x, T* y, int64_t n) {
  constexpr int W = Lanes<T>::W;
  int64_t i = 0;
  for (; i + W <= n; i += W) store(y + i, load(y + i) + splat(a) * load(x + i));
  for (; i < n; ++i) y[i] += a * x[i];
}

template <class T>
T dot(const T* x, const T* y, int64_t n) {
  constexpr int W = Lanes<T>::W;
  typename Lanes<T>::V s0 = {}, s1 = {};
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    s0 += load(x + i) * load(y + i);
    s1 += load(x + i + W) * load(y + i + W);
  }
  T sum = lane_sum<T>(s0 + s1);
  for (; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

// The lanes of v as doubles, in order, by halves.
typedef double VD __attribute__((vector_size(VIDOPS_VECTOR_BYTES)));
typedef float VH __attribute__((vector_size(VIDOPS_VECTOR_BYTES / 2)));
typedef float UH __attribute__((vector_size(VIDOPS_VECTOR_BYTES / 2), aligned(4), may_alias));
VIDOPS_INLINE VD wide(const float* x) {
  return __builtin_convertvector(VH(*reinterpret_cast<const UH*>(x)), VD);
}
VIDOPS_INLINE VD wide(const double* x) { return load(x); }
constexpr int kWide = VIDOPS_VECTOR_BYTES / 8;

template <class T>
double wide_dot(const T* x, const T* y, int64_t n) {
  VD s[2] = {};
  int64_t i = 0;
  for (; i + 2 * kWide <= n; i += 2 * kWide) {
    s[0] += wide(x + i) * wide(y + i);
    s[1] += wide(x + i + kWide) * wide(y + i + kWide);
  }
  double sum = lane_sum<double>(s[0] + s[1]);
  for (; i < n; ++i) sum += double(x[i]) * double(y[i]);
  return sum;
}

template <class T>
double magnitude_sum(const T* x, int64_t n) {
  using L = Lanes<T>;
  VD s = {};
  int64_t i = 0;
  // Eight at a time in T, as a tree of three additions, the total in double: what is left of a sum after its smallest
  // is taken off has to be precise.
  for (; i + 8 * L::W <= n; i += 8 * L::W) {
    typename L::V v[8];
#pragma GCC unroll 8
    for (int u = 0; u < 8; ++u) v[u] = load(x + i + u * L::W), v[u] = v[u] < splat(T(0)) ? -v[u] : v[u];
    T part[L::W];
    store(part, ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7])));
#pragma GCC unroll 2
    for (int h = 0; h < L::W; h += kWide) s += wide(part + h);
  }
  double sum = lane_sum<double>(s);
  for (; i < n; ++i) sum += double(x[i] < 0 ? -x[i] : x[i]);
  return sum;
}

template <class T>
void divided_copy(T a, const T* x, T* y, int64_t n) {
  constexpr int W = Lanes<T>::W;
  int64_t i = 0;
  for (; i + W <= n; i += W) store(y + i, load(x + i) / splat(a));
  for (; i < n; ++i) y[i] = x[i] / a;
}

template <class T>
void wide_axpy(const T* x, double* y, int64_t n) {
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) store(y + i, load(y + i) + wide(x + i));
  for (; i < n; ++i) y[i] += double(x[i]);
}

void copy_row(const char* x, char* y, int64_t n, const char* ahead, [[maybe_unused]] bool stream) {
  constexpr int64_t kLine = 64;
  typedef VI Unaligned __attribute__((may_alias, aligned(1)));
  int64_t i = 0;
  for (; i + kLine <= n; i += kLine) {
    __builtin_prefetch(ahead + i);
#pragma GCC unroll 4
    for (int64_t v = 0; v < kLine; v += VIDOPS_VECTOR_BYTES) {
      const VI moved = *reinterpret_cast<const Unaligned*>(x + i + v);
#if VIDOPS_VECTOR_BYTES == 64
      if (stream) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(y + i + v), reinterpret_cast<__m512i>(moved));
        continue;
      }
#elif VIDOPS_VECTOR_BYTES == 32
      if (stream) {
        _mm256_stream_si256(reinterpret_cast<__m256i*>(y + i + v), reinterpret_cast<__m256i>(moved));
        continue;
      }
#endif
      *reinterpret_cast<Unaligned*>(y + i + v) = moved;
    }
  }
  for (; i < n; ++i) y[i] = x[i];
}

// Of two vectors that hold sums with LEFT lanes each still to be added: the same with half as many, x before y.
template <class T, int LEFT>
VIDOPS_INLINE typename Lanes<T>::V fold(typename Lanes<T>::V x, typename Lanes<T>::V y) {
  decltype(x < y) low, high;
  for (int i = 0; i < Lanes<T>::W; ++i) {
    low[i] = i / (LEFT / 2) * LEFT + i % (LEFT / 2);
    high[i] = low[i] + LEFT / 2;
  }
  return __builtin_shuffle(x, y, low) + __builtin_shuffle(x, y, high);
}
// LEFT vectors with LEFT lanes per sum: at first each is one sum, at last one holds them all, in order.
template <class T, int LEFT>
VIDOPS_INLINE typename Lanes<T>::V lane_sums(const typename Lanes<T>::V* v) {
  if constexpr (LEFT == 1) {
    return v[0];
  } else {
    typename Lanes<T>::V half[LEFT / 2];
#pragma GCC unroll 8
    for (int i = 0; i < LEFT / 2; ++i) half[i] = fold<T, LEFT>(v[2 * i], v[2 * i + 1]);
    return lane_sums<T, LEFT / 2>(half);
  }
}

constexpr int kDotRows = VIDOPS_VECTOR_BYTES == 64 ? 4 : 2;  // as many sums as registers hold
constexpr int kDotColumns = 4;

template <class T>
void dots(const T* const* a, const T* const* b, int64_t n, T* out) {
  using L = Lanes<T>;
  typename L::V sum[kDotRows * kDotColumns] = {};
  auto add = [&](const T* const* rows, const T* const* columns, int64_t i) __attribute__((always_inline)) {
    typename L::V x[kDotRows];
#pragma GCC unroll 4
    for (int r = 0; r < kDotRows; ++r) x[r] = load(rows[r] + i);
#pragma GCC unroll 4
    for (int c = 0; c < kDotColumns; ++c) {
      const typename L::V y = load(columns[c] + i);
#pragma GCC unroll 4
      for (int r = 0; r < kDotRows; ++r) sum[r * kDotColumns + c] += x[r] * y;
    }
  };
  int64_t i = 0;
  for (; i + L::W <= n; i += L::W) add(a, b, i);
  if (i < n) {
    T part[kDotRows + kDotColumns][L::W] = {};
    const T* end[kDotRows + kDotColumns];
    for (int v = 0; v < kDotRows + kDotColumns; ++v) {
      const T* row = v < kDotRows ? a[v] : b[v - kDotRows];
      for (int64_t c = i; c < n; ++c) part[v][c - i] = row[c];
      end[v] = part[v];
    }
    add(end, end + kDotRows, 0);
  }
#pragma GCC unroll 8
  for (int v = 0; v < kDotRows * kDotColumns; v += L::W) store(out + v, lane_sums<T, L::W>(sum + v));
}

template <class T>
VIDOPS_INLINE typename Lanes<T>::V magnitude_of(typename Lanes<T>::V v) {
  return v < splat(T(0)) ? -v : v;
}

template <class T>
T pair(const T* p, const T* lp, const T* q, const T* lq, int64_t n, T* magnitude) {
  constexpr int W = Lanes<T>::W;
  typename Lanes<T>::V s0 = {}, s1 = {}, m0 = {}, m1 = {};
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    const typename Lanes<T>::V t0 = (load(p + i) - load(q + i)) * (load(lp + i) - load(lq + i));
    const typename Lanes<T>::V t1 =
        (load(p + i + W) - load(q + i + W)) * (load(lp + i + W) - load(lq + i + W));
    s0 += t0;
    s1 += t1;
    m0 += magnitude_of<T>(t0);
    m1 += magnitude_of<T>(t1);
  }
  T sum = lane_sum<T>(s0 + s1), size = lane_sum<T>(m0 + m1);
  for (; i < n; ++i) {
    const T t = (p[i] - q[i]) * (lp[i] - lq[i]);
    sum += t;
    size += t < 0 ? -t : t;
  }
  *magnitude = size;
  return sum;
}

VIDOPS_INLINE VF bf16_residual(VF x) {
  const VI bits = reinterpret_cast<VI>(x);
  const VI rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & ~0xffff;
  return reinterpret_cast<VF>(rounded) - x;
}
VIDOPS_INLINE Lanes<double>::V bf16_residual(Lanes<double>::V) { return Lanes<double>::V{}; }

template <class T>
RowStats<T> row_stats(const T* p, const T* lp, const T* p_centre, const T* l_centre, int64_t n, bool bf16) {
  constexpr int W = Lanes<T>::W;
  using V = typename Lanes<T>::V;
  double sums[5] = {};
  constexpr int64_t kRun = 16 * W;  // short runs in T, totals in double
  for (int64_t start = 0; start < n; start += kRun) {
    const int64_t end = start + kRun < n ? start + kRun : n;
    V s[5] = {};
    for (int64_t i = start; i < end; i += W) {
      V x, y;
      if (i + W <= end) {
        x = load(p + i) - load(p_centre + i);
        y = load(lp + i) - load(l_centre + i);
      } else {
        T a[W] = {}, b[W] = {};
        for (int64_t c = i; c < end; ++c) a[c - i] = p[c] - p_centre[c], b[c - i] = lp[c] - l_centre[c];
        x = load(a);
        y = load(b);
      }
      s[0] += x * y;
      s[1] += x * x;
      s[2] += y * y;
      if (!bf16) continue;
      const V ex = bf16_residual(x), ey = bf16_residual(y);
      s[3] += ex * ex;
      s[4] += ey * ey;
    }
    for (int q = 0; q < 5; ++q) sums[q] += double(lane_sum<T>(s[q]));
  }
  return {sums[0], T(__builtin_sqrt(sums[1])), T(__builtin_sqrt(sums[2])), T(__builtin_sqrt(sums[3])),
          T(__builtin_sqrt(sums[4]))};
}

// One bit per lane of a comparison.
template <class M>
VIDOPS_INLINE uint64_t lane_bits(M lanes) {
  constexpr int kLane = sizeof(lanes[0]);
#if defined(VIDOPS_HAS_AVX512)
  if constexpr (kLane == 4)
    return _mm512_movepi32_mask(reinterpret_cast<__m512i>(lanes));
  else
    return _mm512_movepi64_mask(reinterpret_cast<__m512i>(lanes));
#elif VIDOPS_VECTOR_BYTES == 32
  if constexpr (kLane == 4)
    return static_cast<unsigned>(__builtin_ia32_movmskps256(reinterpret_cast<VF>(lanes)));
  else
    return static_cast<unsigned>(__builtin_ia32_movmskpd256(reinterpret_cast<Lanes<double>::V>(lanes)));
#else
  uint64_t bits = 0;
  for (int l = 0; l < VIDOPS_VECTOR_BYTES / kLane; ++l) bits |= uint64_t(lanes[l] & 1) << l;
  return bits;
#endif
}

template <class T>
int64_t next_not_below(const T* x, int64_t from, int64_t n, T limit) {
  constexpr int W = Lanes<T>::W;
  int64_t i = from;
  for (; i + W <= n; i += W) {
    const uint64_t below = lane_bits(load(x + i) < splat(limit));
    if (below != (uint64_t{1} << W) - 1) return i + __builtin_ctzll(~below);
  }
  while (i < n && x[i] < limit) ++i;
  return i;
}

template <class T>
void threshold(const Threshold<T>& given, const T* cross, int64_t n, uint64_t* near, uint64_t* open) {
  constexpr int W = Lanes<T>::W;
  using V = typename Lanes<T>::V;
  const Threshold<T> t = given;  // a copy, which the words that are written cannot alias
  for (int64_t start = 0; start < n; start += 64) {
    const int64_t end = start + 64 < n ? start + 64 : n;
    uint64_t sure = 0, unsure = 0;
    int64_t j = start;
    for (; j + W <= end; j += W) {
      const V d = splat(t.row_self) + load(t.self + j) - load(cross + j);
      const V band = splat(t.row_p_error) * load(t.l_total + j) + splat(t.row_p_norm) * load(t.l_weight + j) +
                     splat(t.row_l_total) * load(t.p_error + j) + splat(t.row_l_weight) * load(t.p_norm + j) +
                     (splat(t.row_base) + load(t.base + j));
      const uint64_t is_near = lane_bits(d <= splat(t.tau) - band);
      const uint64_t is_far = lane_bits(d > splat(t.tau) + band);
      sure |= is_near << (j - start);
      unsure |= (((uint64_t{1} << W) - 1) & ~(is_near | is_far)) << (j - start);
    }
    for (; j < end; ++j) {
      const T d = t.row_self + t.self[j] - cross[j];
      const T band = t.row_p_error * t.l_total[j] + t.row_p_norm * t.l_weight[j] +
                     t.row_l_total * t.p_error[j] + t.row_l_weight * t.p_norm[j] + (t.row_base + t.base[j]);
      const bool is_near = d <= t.tau - band, is_far = d > t.tau + band;
      sure |= uint64_t{is_near} << (j - start);
      unsure |= uint64_t{!is_near && !is_far} << (j - start);
    }
    near[start / 64] = sure;
    open[start / 64] = unsure;
  }
}

template <class T>
double pair64(const T* p, const T* lp, const T* q, const T* lq, int64_t n) {
  double sum[4] = {};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    for (int u = 0; u < 4; ++u)
      sum[u] += (double(p[i + u]) - double(q[i + u])) * (double(lp[i + u]) - double(lq[i + u]));
  for (; i < n; ++i) sum[0] += (double(p[i]) - double(q[i])) * (double(lp[i]) - double(lq[i]));
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

template <class T>
void nibble_table(const T* const* rows, int64_t column, int64_t width, T* table) {
  using L = Lanes<T>;
  for (int g = 0; g < 16; ++g, table += 16 * L::NR) {
    for (int c = 0; c < L::NR; ++c) table[c] = 0;
    for (int bit = 0; bit < 4; ++bit) {
      const T* row = rows[4 * g + bit];
      const int base = 1 << bit;
      for (int c = 0; c < L::NR; ++c) table[base * L::NR + c] = row && c < width ? row[column + c] : T(0);
      for (int low = 1; low < base; ++low)
        for (int c = 0; c < L::NR; ++c)
          table[(base + low) * L::NR + c] = table[base * L::NR + c] + table[low * L::NR + c];
    }
  }
}

template <class T>
void nibble_add(const T* table, uint64_t bits, T* sum) {
  using L = Lanes<T>;
  typename L::V s[2][2] = {{load(sum), load(sum + L::W)}, {}};
#pragma GCC unroll 16
  for (int g = 0; g < 16; ++g) {
    const T* entry = table + (g * 16 + ((bits >> (4 * g)) & 15)) * L::NR;
    s[g & 1][0] += load(entry);
    s[g & 1][1] += load(entry + L::W);
  }
  store(sum, s[0][0] + s[1][0]);
  store(sum + L::W, s[0][1] + s[1][1]);
}

template <class T>
void wide_add(const T* x, T* sum) {
  constexpr int W = Lanes<T>::W;
  store(sum, load(sum) + load(x));
  store(sum + W, load(sum + W) + load(x + W));
}

// Gives the rows named by the bits of one word to a leader.
VIDOPS_INLINE void mark(uint64_t taken, int64_t lead, int64_t rank, int64_t* owner, int64_t* label) {
#if defined(VIDOPS_HAS_AVX512)
  if (__builtin_popcountll(taken) > 8) {
    const __m512i leads = _mm512_set1_epi64(lead), ranks = _mm512_set1_epi64(rank);
#pragma GCC unroll 8
    for (int eight = 0; eight < 8; ++eight) {
      const __mmask8 some = static_cast<__mmask8>(taken >> (8 * eight));
      _mm512_mask_storeu_epi64(owner + 8 * eight, some, leads);
      _mm512_mask_storeu_epi64(label + 8 * eight, some, ranks);
    }
    return;
  }
#endif
  for (; taken; taken &= taken - 1) {
    const int bit = __builtin_ctzll(taken);
    owner[bit] = lead;
    label[bit] = rank;
  }
}

// Most words of a row hold nobody who is still free, so eight are looked at together.
void absorb(const uint64_t* row, uint64_t* alive, int64_t words, int64_t lead, int64_t rank, int64_t* owner,
            int64_t* label) {
  for (int64_t w = 0; w < words; w += 8) {
    const int64_t here = words - w < 8 ? words - w : 8;
#if defined(VIDOPS_HAS_AVX512)
    const __mmask8 used = static_cast<__mmask8>((1u << here) - 1);
    const __m512i bits = _mm512_maskz_loadu_epi64(used, row + w);
    const __m512i free = _mm512_loadu_si512(alive + w);
    unsigned hit = _mm512_test_epi64_mask(bits, free);
    if (!hit) continue;
    uint64_t taken[8];
    _mm512_storeu_si512(taken, _mm512_and_si512(bits, free));
    _mm512_storeu_si512(alive + w, _mm512_andnot_si512(bits, free));
    for (; hit; hit &= hit - 1) {
      const int k = __builtin_ctz(hit);
      mark(taken[k], lead, rank, owner + (w + k) * 64, label + (w + k) * 64);
    }
#else
    uint64_t any = 0;
    for (int64_t k = 0; k < here; ++k) any |= row[w + k] & alive[w + k];
    if (!any) continue;
    for (int64_t k = 0; k < here; ++k) {
      const uint64_t taken = row[w + k] & alive[w + k];
      alive[w + k] ^= taken;
      mark(taken, lead, rank, owner + (w + k) * 64, label + (w + k) * 64);
    }
#endif
  }
}

#include "slot_attend.inl"
#include "slot_side.inl"

template <class T>
constexpr Kernels<T> make_table() {
  using L = Lanes<T>;
  return {{L::MR, L::NR, 1, int(sizeof(T)), int(kDepth), OperandError::none, pack<T, L::MR>, pack<T, L::NR>,
           gemm<T>, gemm<T, 1>, pack_kmajor<T, L::MR>, pack_kmajor<T, L::NR>},
          row_max<T>,
          next_not_below<T>,
          exp_sum,
          exp_cosines,
          log_row,
          scaled_copy<T>,
          axpy<T>,
          dot<T>,
          magnitude_sum<T>,
          wide_dot<T>,
          divided_copy<T>,
          wide_axpy<T>,
          copy_row,
          kDotRows,
          kDotColumns,
          dots<T>,
          pair<T>,
          pair64<T>,
          row_stats<T>,
          threshold<T>,
          L::NR,
          nibble_table<T>,
          nibble_add<T>,
          wide_add<T>,
          absorb,
          slot_table<T>(),
          {side_product<T>, side_finish<T>, side_few_rows<T>, side_norm_grad<T>, side_affine_grad<T>, side_normalise<T>,
           side_gru<T>, side_gru_grad<T>, side_relu<T>, side_relu_grad<T>, side_multiply<T>, side_multiply_add<T>}};
}

}  // namespace

extern const Kernels<float> table_f32;
extern const Kernels<double> table_f64;
const Kernels<float> table_f32 = make_table<float>();
const Kernels<double> table_f64 = make_table<double>();

#undef VIDOPS_INLINE

}  // namespace vidops::cpu::VIDOPS_ISA
