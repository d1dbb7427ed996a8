// Inner loops of slot attention; a part of kernels.inl, in its namespaces. See SlotKernels for what each does.

constexpr int64_t kPitch = kSlotTile;

template <class T>
void slot_strip(const SlotStrip<T>& given) {
  using V = typename Lanes<T>::V;
  constexpr int W = Lanes<T>::W, E = Shuffles<T>::E;
  const SlotStrip<T> s = given;
  const V centre = s.mean ? load(s.mean) : V{}, scale = s.rstd ? load(s.rstd) : splat(T(1));
  const T* source[W];
  for (int r = 0; r < W; ++r) source[r] = s.x + (r < s.count ? r : s.count - 1) * s.pitch;
  T* out = s.columns;
  int64_t d = 0;
  V v[E];
  for (; d + E <= s.width; d += E) {
    transpose_lane(source, d, v);
#pragma GCC unroll 4
    for (int c = 0; c < E; ++c, out += s.column_pitch) store(out, (v[c] - centre) * scale);
  }
  if (d == s.width) return;
  T part[W][E] = {};
  const T* edge[W];
  for (int r = 0; r < W; ++r) {
    edge[r] = part[r];
    for (int64_t c = d; c < s.width; ++c) part[r][c - d] = source[r][c];
  }
  transpose_lane<T>(edge, 0, v);
  for (int c = 0; d < s.width; ++d, ++c, out += s.column_pitch) store(out, (v[c] - centre) * scale);
}

// Calls Op<T, rows>::run, 1 <= rows <= R.
template <template <class, int> class Op, class T, int R, class... A>
VIDOPS_INLINE void with_rows(int64_t rows, A... arguments) {
  if constexpr (R > 1) {
    if (rows < R) return with_rows<Op, T, R - 1>(rows, arguments...);
  }
  Op<T, R>::run(arguments...);
}

// Cuts `rows` into the fewest blocks of at most MR, of equal size up to one.
template <class T, class F>
VIDOPS_INLINE void for_blocks(int64_t rows, F&& body) {
  constexpr int MR = Lanes<T>::MR;
  const int64_t blocks = (rows + MR - 1) / MR;
  for (int64_t block = 0, first = 0; block < blocks; ++block) {
    const int64_t count = rows / blocks + (block < rows % blocks);
    body(block, first, count);
    first += count;
  }
}

template <class T>
constexpr int64_t block_pitch() {
  return (Lanes<T>::MR + Lanes<T>::W - 1) / Lanes<T>::W * Lanes<T>::W;
}

template <class T>
void slot_pack_left(const T* x, int64_t rows, int64_t width, T* packed) {
  constexpr int W = Lanes<T>::W;
  for_blocks<T>(rows, [&](int64_t block, int64_t first, int64_t count) {
    for (int64_t r = 0; r < count; r += W)
      slot_strip<T>({x + (first + r) * width, width, count - r, width, nullptr, nullptr,
                     packed + block * width * block_pitch<T>() + r, block_pitch<T>()});
  });
}

template <class T, int R>
struct DotsBlock {
  static void run(int64_t depth, const T* left, const T* bias, const T* right, const T* ahead, int64_t ahead_pitch,
                  T* map) {
    using L = Lanes<T>;
    typename L::V acc[R][2];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = splat(bias[r]);
    for (int64_t d = 0; d < depth; ++d, left += block_pitch<T>(), right += L::NR) {
      const T* next = ahead + d % L::NR * ahead_pitch + d / L::NR * L::NR;
      __builtin_prefetch(next);
      if constexpr (2 * VIDOPS_VECTOR_BYTES > 64) __builtin_prefetch(next + L::W);
      const typename L::V b0 = load(right), b1 = load(right + L::W);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const typename L::V a = splat(left[r]);
        acc[r][0] += a * b0;
        acc[r][1] += a * b1;
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      store(map + r * kPitch, acc[r][0]);
      store(map + r * kPitch + L::W, acc[r][1]);
    }
  }
};

template <class T>
void slot_dots(int64_t rows, int64_t depth, const T* left, const T* bias, int64_t tokens, const T* right,
               const T* ahead, int64_t ahead_pitch, T* map) {
  using L = Lanes<T>;
  for (int64_t j = 0; j < tokens; j += L::NR, right += depth * L::NR)
    for_blocks<T>(rows, [&](int64_t block, int64_t first, int64_t count) {
      const bool fetch = block == 0;  // the other blocks fetch what they have
      with_rows<DotsBlock, T, L::MR>(count, depth, left + block * depth * block_pitch<T>(), bias + first, right,
                                     fetch ? ahead + j * ahead_pitch : right, fetch ? ahead_pitch : 0,
                                     map + first * kPitch + j);
    });
}

template <class T, int R>
struct SumBlock {
  static void run(int64_t tokens, const T* map, const T* centre, const T* x, int64_t pitch, T* out, int64_t out_pitch) {
    using L = Lanes<T>;
    typename L::V acc[R][2];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
      acc[r][0] = load(out + r * out_pitch), acc[r][1] = load(out + r * out_pitch + L::W);
    for (int64_t j = 0; j < tokens; ++j, ++map, x += pitch) {
      const typename L::V b0 = load(x) - splat(centre[j]), b1 = load(x + L::W) - splat(centre[j]);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const typename L::V a = splat(map[r * kPitch]);
        acc[r][0] += a * b0;
        acc[r][1] += a * b1;
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      store(out + r * out_pitch, acc[r][0]);
      store(out + r * out_pitch + L::W, acc[r][1]);
    }
  }
};

template <class T>
void slot_sum(int64_t rows, int64_t tokens, const T* map, const T* centre, const T* x, int64_t pitch, int64_t width,
              T* out, int64_t out_pitch) {
  using L = Lanes<T>;
  for (int64_t c = 0; c < width; c += L::NR)
    for_blocks<T>(rows, [&](int64_t, int64_t first, int64_t count) {
      with_rows<SumBlock, T, L::MR>(count, tokens, map + first * kPitch, centre, x + c, pitch,
                                    out + first * out_pitch + c, out_pitch);
    });
}

template <class T, int R>
struct SpreadBlock {
  static void run(int64_t rows, const T* map, const T* left, int64_t left_pitch, T* grad, int64_t pitch,
                  int64_t width, bool add) {
    using L = Lanes<T>;
    typename L::V acc[R][2] = {};
    for (int64_t i = 0; i < rows; ++i, map += kPitch, left += left_pitch) {
      const typename L::V b0 = load(left), b1 = load(left + L::W);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const typename L::V a = splat(map[r]);
        acc[r][0] += a * b0;
        acc[r][1] += a * b1;
      }
    }
    if (width >= L::NR) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r, grad += pitch) {
        store(grad, add ? load(grad) + acc[r][0] : acc[r][0]);
        store(grad + L::W, add ? load(grad + L::W) + acc[r][1] : acc[r][1]);
      }
      return;
    }
    T part[R][L::NR];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) store(part[r], acc[r][0]), store(part[r] + L::W, acc[r][1]);
    for (int r = 0; r < R; ++r, grad += pitch)
      for (int64_t c = 0; c < width; ++c) grad[c] = add ? grad[c] + part[r][c] : part[r][c];
  }
};

template <class T>
void slot_spread(int64_t rows, int64_t tokens, const T* map, const T* left, int64_t left_pitch, int64_t width,
                 T* grad, int64_t pitch, bool add) {
  using L = Lanes<T>;
  for (int64_t c = 0; c < width; c += L::NR)
    for_blocks<T>(tokens, [&](int64_t, int64_t first, int64_t count) {
      with_rows<SpreadBlock, T, L::MR>(count, rows, map + first, left + c, left_pitch, grad + first * pitch + c, pitch,
                                       width - c, add);
    });
}

VIDOPS_INLINE Lanes<float>::V exponential(Lanes<float>::V x) { return exp_vector(x); }
VIDOPS_INLINE Lanes<double>::V exponential(Lanes<double>::V x) {
  for (int l = 0; l < Lanes<double>::W; ++l) x[l] = __builtin_exp(x[l]);
  return x;
}

// The lanes before `count`; the others zero, whatever they hold.
template <class T>
VIDOPS_INLINE typename Lanes<T>::V first_lanes(typename Lanes<T>::V v, int64_t count) {
  if (count >= Lanes<T>::W) return v;
  typename Lanes<T>::V lane;
  for (int l = 0; l < Lanes<T>::W; ++l) lane[l] = T(l);
  return lane < splat(T(count)) ? v : typename Lanes<T>::V{};
}

// Leaves the exponentials of one vector of tokens in place of its dots; returns what makes them a softmax.
template <class T>
VIDOPS_INLINE typename Lanes<T>::V exponentials(T* map, int64_t rows) {
  using V = typename Lanes<T>::V;
  V top = load(map), sum = {};
  for (int64_t r = 1; r < rows; ++r) {
    const V x = load(map + r * kPitch);
    top = x > top ? x : top;
  }
  for (int64_t r = 0; r < rows; ++r) {
    const V e = exponential(load(map + r * kPitch) - top);
    store(map + r * kPitch, e);
    sum += e;
  }
  return splat(T(1)) / sum;
}

template <class T>
void slot_softmax(const SlotSoftmax<T>& given) {
  using V = typename Lanes<T>::V;
  constexpr int W = Lanes<T>::W;
  const SlotSoftmax<T> s = given;
  for (int64_t j = 0; j < s.tokens; j += W) {
    const V inverse = exponentials<T>(s.map + j, s.rows), rstd = load(s.rstd + j);
    for (int64_t r = 0; r < s.rows; ++r) {
      const V a = load(s.map + r * kPitch + j) * inverse;
      if (s.attn) store(s.attn + r * kPitch + j, a);
      V w = a + splat(s.eps);
      if (s.mask) w *= load(s.mask[r] + j);
      w = first_lanes<T>(w, s.tokens - j);
      store(s.map + r * kPitch + j, w * rstd);
      store(s.total + r * W, load(s.total + r * W) + w);
    }
  }
}

template <class T>
void slot_softmax_grad(const SlotSoftmaxGrad<T>& given) {
  using V = typename Lanes<T>::V;
  constexpr int W = Lanes<T>::W;
  const SlotSoftmaxGrad<T> s = given;
  for (int64_t j = 0; j < s.tokens; j += W) {
    const V inverse = exponentials<T>(s.map + j, s.rows), rstd = load(s.rstd + j);
    V sum = {};
    for (int64_t r = 0; r < s.rows; ++r) {
      const int64_t at = r * kPitch + j;
      const V a = load(s.map + at) * inverse;
      V g = load(s.grad + at);
      if (s.mask) g *= load(s.mask[r] + j);
      if (s.grad_attn) g += load(s.grad_attn + at);
      store(s.map + at, a);
      store(s.grad + at, g);
      sum += a * g;
    }
    for (int64_t r = 0; r < s.rows; ++r) {
      const int64_t at = r * kPitch + j;
      const V a = load(s.map + at);
      V g = a * (load(s.grad + at) - sum);
      if (s.grad_dots) g += load(s.grad_dots + at);
      V w = a + splat(s.eps);
      if (s.mask) w *= load(s.mask[r] + j);
      store(s.map + at, g);
      store(s.scaled + at, g * rstd);
      store(s.grad + at, w);
      store(s.total + r * W, load(s.total + r * W) + first_lanes<T>(g, s.tokens - j));
    }
  }
}

// Sums of x - origin and of its square that lanes still hold, in double: an error of a row's statistics is one of all
// its dots, which iterations magnify. From an element of the row as origin both are as large as the row spreads, so
// that one pass is enough.
template <class T>
VIDOPS_INLINE void row_sums(const T* x, int64_t width, double origin, VD* sum, VD* square) {
  const VD away = splat(origin);
  VD s[4] = {}, q[4] = {};
  int64_t c = 0;
  for (; c + 4 * kWide <= width; c += 4 * kWide)
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) {
      const VD d = wide(x + c + u * kWide) - away;
      s[u] += d;
      q[u] += d * d;
    }
  for (; c + kWide <= width; c += kWide) {
    const VD d = wide(x + c) - away;
    s[0] += d;
    q[0] += d * d;
  }
  for (int l = 0; c < width; ++c, ++l) {
    const double d = double(x[c]) - origin;
    s[1][l] += d;
    q[1][l] += d * d;
  }
  *sum = (s[0] + s[1]) + (s[2] + s[3]);
  *square = (q[0] + q[1]) + (q[2] + q[3]);
}

// What a LayerNorm makes of a row whose variance is known, from its sum of squares about the mean. Of one that
// overflows in T the reciprocal is 0, on every backend.
template <class T>
VIDOPS_INLINE T reciprocal_deviation(double squares, double width, T eps) {
  const double least = squares < 0 ? 0 : squares;  // not a maximum, which would lose what is not a number
  const T total = T(least);
  return total > T(0) && total == 2 * total ? T(0) : T(1 / __builtin_sqrt(least / width + double(eps)));
}

// As many rows at a time as a vector has lanes.
template <class T>
void slot_moments(const T* x, int64_t pitch, int64_t count, int64_t width, T eps, T* mean, T* rstd) {
  const VD size = splat(double(width));
  for (int64_t first = 0; first < count; first += kWide) {
    const int rows = count - first < kWide ? count - first : kWide;
    VD sums[kWide] = {}, squares[kWide] = {}, origin = {};
    for (int r = 0; r < rows; ++r) {
      const T* row = x + (first + r) * pitch;
      origin[r] = width ? double(row[0]) : 0;
      row_sums(row, width, origin[r], &sums[r], &squares[r]);
    }
    const VD away = lane_sums<double, kWide>(sums) / size;
    const VD about = lane_sums<double, kWide>(squares) - away * away * size;
    for (int r = 0; r < rows; ++r) {
      mean[first + r] = T(origin[r] + away[r]);
      rstd[first + r] = reciprocal_deviation(about[r], double(width), eps);
    }
  }
}

// Vectors of T as sums in double: its halves.
template <class T>
struct WideSum {
  static constexpr int N = Lanes<T>::W / kWide;
  VD part[N] = {};
  VIDOPS_INLINE void add(typename Lanes<T>::V v) {
    T lanes[Lanes<T>::W];
    store(lanes, v);
#pragma GCC unroll 2
    for (int h = 0; h < N; ++h) part[h] += wide(lanes + h * kWide);
  }
};

// Sums over all columns, in double, of what `term` makes of each; eight of them are added up in T first.
template <class T, class F>
VIDOPS_INLINE WideSum<T> sum_of_columns(int64_t width, F&& term) {
  WideSum<T> sum;
  int64_t c = 0;
  for (; c + 8 <= width; c += 8) {
    typename Lanes<T>::V v[8];
#pragma GCC unroll 8
    for (int u = 0; u < 8; ++u) v[u] = term(c + u);
    sum.add(((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7])));
  }
  for (; c < width; ++c) sum.add(term(c));
  return sum;
}

// Rows side by side need no sums over lanes. Their elements are added up about the first, then their squares about the
// mean, so that a row's statistics keep all digits but the last.
template <class T>
void slot_strip_moments(const SlotStrip<T>& given, T eps, T* mean, T* rstd) {
  using V = typename Lanes<T>::V;
  constexpr int W = Lanes<T>::W;
  SlotStrip<T> s = given;
  s.mean = s.rstd = nullptr;
  slot_strip(s);
  T* const columns = s.columns;
  const int64_t pitch = s.column_pitch, width = s.width;
  const V origin = load(columns);
  const WideSum<T> sums = sum_of_columns<T>(width, [&](int64_t c) __attribute__((always_inline)) {
    return load(columns + c * pitch) - origin;
  });
  for (int r = 0; r < W; ++r) mean[r] = T(double(origin[r]) + sums.part[r / kWide][r % kWide] / double(width));
  const V centre = load(mean);
  const WideSum<T> squares = sum_of_columns<T>(width, [&](int64_t c) __attribute__((always_inline)) {
    const V v = load(columns + c * pitch) - centre;
    store(columns + c * pitch, v);
    return v * v;
  });
  for (int r = 0; r < W; ++r) rstd[r] = reciprocal_deviation(squares.part[r / kWide][r % kWide], double(width), eps);
  const V scale = load(rstd);
  for (int64_t c = 0; c < width; ++c) store(columns + c * pitch, load(columns + c * pitch) * scale);
}

template <class T>
constexpr SlotKernels<T> slot_table() {
  return {Lanes<T>::W,    Lanes<T>::NR, Lanes<T>::MR,    block_pitch<T>(),     slot_strip<T>,  slot_pack_left<T>,
          slot_dots<T>,   slot_sum<T>,  slot_spread<T>, slot_softmax<T>, slot_softmax_grad<T>, slot_moments<T>,
          slot_strip_moments<T>};
}
