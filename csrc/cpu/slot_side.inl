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
