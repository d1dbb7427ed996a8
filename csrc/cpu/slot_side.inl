// Inner loops of slot attention's products and norms; a part of kernels.inl, in its namespaces. See SideKernels.

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
void side_norm_grad(const T* x, int64_t width, T mean, T rstd, T* grad) {
  constexpr int W = Lanes<T>::W;
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

template <class T>
void side_gru(const T* from_update, const T* from_slots, int64_t width, T* slots) {
  constexpr int W = Lanes<T>::W;
  for (int64_t c = 0; c < width; c += W) {
    const int64_t here = width - c < W ? width - c : W;
    typename Lanes<T>::V part[7] = {};  // r, z, n of both, and the slots
    for (int i = 0; i < 7; ++i) {
      const T* from = i == 6 ? slots + c : (i < 3 ? from_update : from_slots) + i % 3 * width + c;
      if (here == W)
        part[i] = load(from);
      else
        for (int64_t l = 0; l < here; ++l) part[i][l] = from[l];
    }
    const typename Lanes<T>::V reset = sigmoid_of(part[0] + part[3]), keep = sigmoid_of(part[1] + part[4]);
    const typename Lanes<T>::V candidate = tanh_of(part[2] + reset * part[5]);
    const typename Lanes<T>::V moved = (splat(T(1)) - keep) * candidate + keep * part[6];
    if (here == W)
      store(slots + c, moved);
    else
      for (int64_t l = 0; l < here; ++l) slots[c + l] = moved[l];
  }
}
