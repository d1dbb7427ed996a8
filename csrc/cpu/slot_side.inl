// Inner loops of slot attention's products and norms; a part of kernels.inl, in its namespaces. See SideKernels.

template <class T>
void side_product(int64_t a_panels, int64_t b_panels, int64_t k, const T* a, const T* b, const T* bias, bool add,
                  T* out, int64_t pitch) {
  using L = Lanes<T>;
  for (int64_t jp = 0; jp < b_panels; ++jp)
    for (int64_t ip = 0; ip < a_panels; ++ip)
      micro<T>(k, a + ip * k * L::MR, b + jp * k * L::NR, out + ip * L::MR * pitch + jp * L::NR, pitch, add,
               bias ? bias + jp * L::NR : nullptr);
}

template <class T>
void side_finish(const T* tile, int64_t tile_pitch, int64_t rows, int64_t columns, const T* bias, bool add, T* out,
                 int64_t pitch) {
  constexpr int W = Lanes<T>::W;
  for (int64_t r = 0; r < rows; ++r, tile += tile_pitch, out += pitch) {
    int64_t c = 0;
    for (; c + W <= columns; c += W) {
      typename Lanes<T>::V v = load(tile + c);
      if (bias) v += load(bias + c);
      if (add) v += load(out + c);
      store(out + c, v);
    }
    for (; c < columns; ++c) out[c] = tile[c] + (bias ? bias[c] : T(0)) + (add ? out[c] : T(0));
  }
}

template <class T>
void side_few_rows(int64_t rows, int64_t columns, int64_t k, const T* a, int64_t a_pitch, const T* b, int64_t b_pitch,
                   T* tile, int64_t tile_pitch) {
  constexpr int W = Lanes<T>::W, kStep = 4;  // rows of b that meet the tile at once
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) tile[r * tile_pitch + c] = 0;
  for (int64_t i = 0; i < k; i += kStep, a += kStep, b += kStep * b_pitch) {
    const int64_t here = k - i < kStep ? k - i : kStep;
    int64_t c = 0;
    for (; here == kStep && c + W <= columns; c += W) {
      const typename Lanes<T>::V b0 = load(b + c), b1 = load(b + b_pitch + c), b2 = load(b + 2 * b_pitch + c),
                                 b3 = load(b + 3 * b_pitch + c);
      for (int64_t r = 0; r < rows; ++r) {
        const T* x = a + r * a_pitch;
        T* y = tile + r * tile_pitch + c;
        store(y, (load(y) + splat(x[0]) * b0 + splat(x[1]) * b1) + (splat(x[2]) * b2 + splat(x[3]) * b3));
      }
    }
    for (; c < columns; ++c)
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t s = 0; s < here; ++s) tile[r * tile_pitch + c] += a[r * a_pitch + s] * b[s * b_pitch + c];
  }
}

template <class T>
void side_relu(T* x, int64_t n) {
  constexpr int W = Lanes<T>::W;
  const typename Lanes<T>::V zero = {};
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const typename Lanes<T>::V v = load(x + i);
    store(x + i, v < zero ? zero : v);
  }
  for (; i < n; ++i) x[i] = x[i] < T(0) ? T(0) : x[i];
}

template <class T>
void side_relu_grad(const T* out, T* grad, int64_t n) {
  constexpr int W = Lanes<T>::W;
  const typename Lanes<T>::V zero = {};
  int64_t i = 0;
  for (; i + W <= n; i += W) store(grad + i, load(out + i) <= zero ? zero : load(grad + i));
  for (; i < n; ++i) grad[i] = out[i] <= T(0) ? T(0) : grad[i];
}

template <class T>
void side_multiply(const T* x, const T* y, T* out, int64_t n) {
  constexpr int W = Lanes<T>::W;
  int64_t i = 0;
  for (; i + W <= n; i += W) store(out + i, load(x + i) * load(y + i));
  for (; i < n; ++i) out[i] = x[i] * y[i];
}

template <class T>
void side_multiply_add(const T* x, const T* y, T* out, int64_t n) {
  constexpr int W = Lanes<T>::W;
  int64_t i = 0;
  for (; i + W <= n; i += W) store(out + i, load(out + i) + load(x + i) * load(y + i));
  for (; i < n; ++i) out[i] += x[i] * y[i];
}

template <class T>
void side_norm_grad(const T* x, int64_t width, T mean, T rstd, const T* weight, T* grad) {
  constexpr int W = Lanes<T>::W;
  if (weight) side_multiply(grad, weight, grad, width);
  typename Lanes<T>::V sums = {}, projections = {};
  int64_t c = 0;
  for (; c + W <= width; c += W) {
    const typename Lanes<T>::V g = load(grad + c);
    sums += g;
    projections += g * ((load(x + c) - splat(mean)) * splat(rstd));
  }
  T sum = lane_sum<T>(sums), projection = lane_sum<T>(projections);
  for (; c < width; ++c) {
    sum += grad[c];
    projection += grad[c] * ((x[c] - mean) * rstd);
  }
  sum /= T(width), projection /= T(width);
  for (c = 0; c + W <= width; c += W)
    store(grad + c, splat(rstd) * (load(grad + c) - splat(sum) -
                                   (load(x + c) - splat(mean)) * splat(rstd) * splat(projection)));
  for (; c < width; ++c) grad[c] = rstd * (grad[c] - sum - (x[c] - mean) * rstd * projection);
}

template <class T>
void side_affine_grad(const T* x, int64_t width, T mean, T rstd, const T* grad, T* weight_grad, T* bias_grad) {
  constexpr int W = Lanes<T>::W;
  int64_t c = 0;
  for (; c + W <= width; c += W) {
    const typename Lanes<T>::V g = load(grad + c), out = (load(x + c) - splat(mean)) * splat(rstd);
    if (weight_grad) store(weight_grad + c, load(weight_grad + c) + g * out);
    if (bias_grad) store(bias_grad + c, load(bias_grad + c) + g);
  }
  for (; c < width; ++c) {
    if (weight_grad) weight_grad[c] += grad[c] * ((x[c] - mean) * rstd);
    if (bias_grad) bias_grad[c] += grad[c];
  }
}

template <class T>
void side_normalise(const T* x, int64_t width, T mean, T rstd, const T* weight, const T* bias, T* out) {
  constexpr int W = Lanes<T>::W;
  int64_t c = 0;
  for (; c + W <= width; c += W) {
    typename Lanes<T>::V v = (load(x + c) - splat(mean)) * splat(rstd);
    if (weight) v *= load(weight + c);
    if (bias) v += load(bias + c);
    store(out + c, v);
  }
  for (; c < width; ++c) out[c] = (x[c] - mean) * rstd * (weight ? weight[c] : T(1)) + (bias ? bias[c] : T(0));
}

VIDOPS_INLINE VF sigmoid_of(VF x) { return splat(1.0f) / (splat(1.0f) + exp_vector(-x)); }
VIDOPS_INLINE VF tanh_of(VF x) {
  const VF size = x < splat(0.0f) ? -x : x;
  const VF e = exp_vector(splat(-2.0f) * size), far = (splat(1.0f) - e) / (splat(1.0f) + e);
  // Near zero that difference would lose its digits: the series, whose next term is below 1e-8 of x.
  const VF s = x * x;
  VF p = splat(62.0f / 2835);
  p = p * s - splat(17.0f / 315);
  p = p * s + splat(2.0f / 15);
  p = p * s - splat(1.0f / 3);
  return size < splat(0.25f) ? x + x * s * p : x < splat(0.0f) ? -far : far;
}
VIDOPS_INLINE VD sigmoid_of(VD x) {
  for (int l = 0; l < kWide; ++l) x[l] = 1 / (1 + __builtin_exp(-x[l]));
  return x;
}
VIDOPS_INLINE VD tanh_of(VD x) {
  for (int l = 0; l < kWide; ++l) x[l] = __builtin_tanh(x[l]);
  return x;
}

// Vectors of a row's parts, `here` elements of each, and back.
template <class T, int N>
VIDOPS_INLINE void load_parts(const T* const (&from)[N], int64_t here, typename Lanes<T>::V* part) {
  for (int i = 0; i < N; ++i)
    if (here == Lanes<T>::W)
      part[i] = load(from[i]);
    else
      for (int64_t l = 0; l < here; ++l) part[i][l] = from[i][l];
}
template <class T>
VIDOPS_INLINE void store_part(typename Lanes<T>::V v, int64_t here, T* to) {
  if (here == Lanes<T>::W)
    store(to, v);
  else
    for (int64_t l = 0; l < here; ++l) to[l] = v[l];
}

template <class T>
void side_gru(const T* from_update, const T* from_slots, int64_t width, T* slots) {
  using V = typename Lanes<T>::V;
  constexpr int W = Lanes<T>::W;
  for (int64_t c = 0; c < width; c += W) {
    const int64_t here = width - c < W ? width - c : W;
    const T *u = from_update + c, *s = from_slots + c;
    V part[7] = {};  // r, z, n of both, and the slots
    load_parts<T, 7>({u, u + width, u + 2 * width, s, s + width, s + 2 * width, slots + c}, here, part);
    const V reset = sigmoid_of(part[0] + part[3]), keep = sigmoid_of(part[1] + part[4]);
    const V candidate = tanh_of(part[2] + reset * part[5]);
    store_part((splat(T(1)) - keep) * candidate + keep * part[6], here, slots + c);
  }
}

template <class T>
void side_gru_grad(T* from_update, T* from_slots, const T* slots, int64_t width, T* grad) {
  using V = typename Lanes<T>::V;
  constexpr int W = Lanes<T>::W;
  const V one = splat(T(1));
  for (int64_t c = 0; c < width; c += W) {
    const int64_t here = width - c < W ? width - c : W;
    T *u = from_update + c, *s = from_slots + c;
    V part[8] = {};
    load_parts<T, 8>({u, u + width, u + 2 * width, s, s + width, s + 2 * width, slots + c, grad + c}, here, part);
    const V reset = sigmoid_of(part[0] + part[3]), keep = sigmoid_of(part[1] + part[4]), recurrent = part[5];
    const V candidate = tanh_of(part[2] + reset * recurrent), g = part[7];
    const V grad_candidate = g * (one - keep) * (one - candidate * candidate);
    const V grad_keep = g * (part[6] - candidate) * keep * (one - keep);
    const V grad_reset = grad_candidate * recurrent * reset * (one - reset);
    store_part(grad_reset, here, u), store_part(grad_reset, here, s);
    store_part(grad_keep, here, u + width), store_part(grad_keep, here, s + width);
    store_part(grad_candidate, here, u + 2 * width), store_part(grad_candidate * reset, here, s + 2 * width);
    store_part(g * keep, here, grad + c);
  }
}
