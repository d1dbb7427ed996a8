// Columns of a few rows; a part of kernels.inl, in its namespaces.

template <int... I>
struct Sequence {};

// Shuffles within lanes of 128 bits, the cheap ones. An index counts through a and then b.
template <class T>
struct Shuffles {
  static constexpr int W = Lanes<T>::W;
  static constexpr int E = 16 / sizeof(T);  // elements of a lane
  using V = typename Lanes<T>::V;
  using Element = decltype(V{} < V{});

  static constexpr int low(int l) { return l / E * E + l % E / 2 + l % 2 * W; }
  static constexpr int high(int l) { return low(l) + E / 2; }
  static constexpr int low_pair(int l) { return l / E * E + l % 2 + l % E / 2 * W; }
  static constexpr int high_pair(int l) { return low_pair(l) + 2; }

  template <int (*Index)(int), int... I>
  static VIDOPS_INLINE V run(V a, V b, Sequence<I...>) {
    return __builtin_shuffle(a, b, Element{Index(I)...});
  }
  template <int (*Index)(int)>
  static VIDOPS_INLINE V of(V a, V b) {
    return run<Index>(a, b, Sequence<__integer_pack(W)...>{});
  }
};

// Every lane from a row of its own, E rows apart.
template <class T>
VIDOPS_INLINE typename Lanes<T>::V load_lanes(const T* const* rows, int64_t d) {
  constexpr int E = Shuffles<T>::E;
#if defined(VIDOPS_HAS_AVX512)
  auto lane = [&](int l) { return _mm_loadu_ps(reinterpret_cast<const float*>(rows[E * l] + d)); };
  __m512 v = _mm512_castps128_ps512(lane(0));
  v = _mm512_mask_broadcast_f32x4(v, 0x00f0, lane(1));
  v = _mm512_mask_broadcast_f32x4(v, 0x0f00, lane(2));
  v = _mm512_mask_broadcast_f32x4(v, 0xf000, lane(3));
  return reinterpret_cast<typename Lanes<T>::V>(v);
#elif VIDOPS_VECTOR_BYTES == 32
  auto lane = [&](int l) { return _mm_loadu_ps(reinterpret_cast<const float*>(rows[E * l] + d)); };
  return reinterpret_cast<typename Lanes<T>::V>(_mm256_insertf128_ps(_mm256_castps128_ps256(lane(0)), lane(1), 1));
#else
  static_assert(Lanes<T>::W == E);
  return load(rows[0] + d);
#endif
}

// columns[c][r] = rows[r][d + c] for the E columns of one lane.
template <class T>
VIDOPS_INLINE void transpose_lane(const T* const* rows, int64_t d, typename Lanes<T>::V* columns) {
  using S = Shuffles<T>;
  using V = typename Lanes<T>::V;
  const V a = load_lanes(rows, d), b = load_lanes(rows + 1, d);
  const V low = S::template of<S::low>(a, b), high = S::template of<S::high>(a, b);
  if constexpr (S::E == 2) {
    columns[0] = low, columns[1] = high;
  } else {
    const V c = load_lanes(rows + 2, d), e = load_lanes(rows + 3, d);
    const V low2 = S::template of<S::low>(c, e), high2 = S::template of<S::high>(c, e);
    columns[0] = S::template of<S::low_pair>(low, low2);
    columns[1] = S::template of<S::high_pair>(low, low2);
    columns[2] = S::template of<S::low_pair>(high, high2);
    columns[3] = S::template of<S::high_pair>(high, high2);
  }
}
