// Slot attention's pass over the tokens, forward and backward.
//
// A task is a chunk of tokens of one batch item, walked in tiles of kSlotTile: a tile's rows are normalised and
// transposed once for the dots against all slots, which become weights in place; the second product finds the rows in
// the cache. The softmax of a token is complete within its tile, so nothing of size S x N exists unless asked for.
// Chunks depend on the shape alone and their sums are added in order: the number of threads changes nothing. Workspace:
// per thread a tile of the rows and one of the maps, and rows * Dv (backward: rows * Dk) sums per chunk.
#include "common.h"
#include "kernels.h"
#include "vidops/slot_attend.h"

namespace vidops::cpu {
namespace {

constexpr int64_t kChunk = 256;  // tokens: long enough that packing the slots again is 1 % of the work
static_assert(kChunk % kSlotTile == 0);

// Keys or values of all heads, or the buffer their gradient is added to.
template <class T>
struct Side {
  TensorView x;
  int64_t sets, width, padded;

  Side(const TensorView& view, int64_t panel)
      : x(view), sets(view.shape[1]), width(view.shape[3]), padded(round_up(view.shape[3], panel)) {}
  T* row(int64_t b, int64_t set, int64_t token) const {
    return x.as<T>() + b * x.stride[0] + set * x.stride[1] + token * x.stride[2];
  }
  int64_t pitch() const { return x.stride[2]; }
  // Rows that reach up to a multiple of a panel's columns: the tensor's own, or copied to `spare` (padded wide).
  bool whole_panels() const { return width == padded; }
  const T* wide_rows(int64_t b, int64_t set, int64_t first, int64_t count, T* spare) const {
    if (whole_panels()) return row(b, set, first);
    for (int64_t j = 0; j < count; ++j) std::copy_n(row(b, set, first + j), width, spare + j * padded);
    return spare;
  }
  int64_t wide_pitch() const { return whole_panels() ? pitch() : padded; }
};

bool same_tensor(const TensorView& a, const TensorView& b) {
  return a.data == b.data && std::equal(a.shape, a.shape + a.rank, b.shape) &&
         std::equal(a.stride, a.stride + a.rank, b.stride);
}

template <class T>
void zeroed(Buffer<T>& buffer, int64_t count) {
  buffer.resize(count);
  std::fill_n(buffer.get(), count, T(0));
}

template <class T>
struct Scratch;

template <class T>
struct Problem {
  const SlotKernels<T>& kn = kernels<T>().slots;
  const SlotAttendParams& p;
  Side<T> keys, values;
  int64_t batch, heads, slots, rows, tokens, groups, chunks, chunk;

  explicit Problem(const SlotAttendParams& params)
      : p(params),
        keys(params.keys, kn.panel),
        values(params.values, kn.panel),
        batch(params.q.shape[0]),
        heads(params.q.shape[1]),
        slots(params.q.shape[2]),
        rows(heads * slots),
        tokens(params.keys.shape[2]),
        groups(params.groups),
        chunks(std::max<int64_t>(1, ceil_div(tokens, kChunk))),
        chunk(round_up(ceil_div(tokens, chunks), kSlotTile)) {}

  const T* q(int64_t b) const { return p.q.as<const T>() + b * rows * keys.width; }
  const T* c(int64_t b) const { return p.c.as<const T>() + b * rows; }

  int64_t left_stride(const Side<T>& side) const {
    return ceil_div(rows / side.sets, kn.block) * side.width * kn.block_pitch;
  }
  int64_t left_size(const Side<T>& side) const { return side.sets * left_stride(side); }
  // One left operand per set.
  void pack_left(const Side<T>& side, const T* x, T* packed) const {
    const int64_t share = rows / side.sets;
    for (int64_t set = 0; set < side.sets; ++set)
      kn.pack_left(x + set * share * side.width, share, side.width, packed + set * left_stride(side));
  }

  // A tile of normalised tokens as panels of columns. `find`: their statistics are results, not given.
  void pack(const Side<T>& side, int64_t b, int64_t set, int64_t first, int64_t count, const Scratch<T>& s,
            bool find = false, T norm_eps = 0) const {
    for (int64_t j = 0; j < count; j += kn.lanes) {
      const SlotStrip<T> strip{side.row(b, set, first + j), side.pitch(), std::min<int64_t>(kn.lanes, count - j),
                               side.width, &s.mean[j], &s.rstd[j],
                               &s.columns[j / kn.panel * kn.panel * side.width + j % kn.panel], kn.panel};
      if (find)
        kn.strip_moments(strip, norm_eps, &s.mean[j], &s.rstd[j]);
      else
        kn.strip(strip);
    }
    // A panel of dots is computed whole, so that a last half of one must hold something.
    const int64_t filled = round_up(count, kn.lanes);
    if (filled % kn.panel == 0) return;
    T* half = &s.columns[filled / kn.panel * kn.panel * side.width];
    for (int64_t d = 0; d < side.width; ++d)
      std::copy_n(half + d * kn.panel, kn.lanes, half + d * kn.panel + kn.lanes);
  }

  void fill_masked_slots(int64_t b, int64_t count, T value, T* map) const {
    if (!p.slot_mask.present()) return;
    const int32_t* masked = p.slot_mask.as<const int32_t>() + b * p.slot_mask.stride[0];
    for (int64_t r = 0; r < rows; ++r)
      if (masked[r % slots]) std::fill_n(map + r * kSlotTile, count, value);
  }

  int team(int threads) const {
    return static_cast<int>(std::clamp<int64_t>(threads, 1, std::max<int64_t>(1, batch * chunks)));
  }
  // body(first row, rows) for every softmax.
  template <class F>
  void for_softmaxes(F&& body) const {
    const int64_t members = p.joint ? rows : slots / groups;
    for (int64_t r = 0; r < rows; r += members) body(r, members);
  }
};

// What a thread needs for one tile, and the slots' side of the current item.
template <class T>
struct Scratch {
  Buffer<T> columns, rows, q_left, map, total, mask, mean, rstd;
  std::vector<const T*> mask_of;

  // `wide`: the side whose rows are summed.
  void resize(const Problem<T>& f, int64_t maps, const Side<T>& wide) {
    columns.resize(kSlotTile * std::max(f.keys.width, f.values.width));
    map.resize(maps * f.rows * kSlotTile);
    total.resize(f.rows * f.kn.lanes);
    q_left.resize(f.left_size(f.keys));
    if (!wide.whole_panels()) zeroed(rows, kSlotTile * wide.padded);
    mean.resize(kSlotTile), rstd.resize(kSlotTile);
    std::fill_n(mean.get(), kSlotTile, T(0)), std::fill_n(rstd.get(), kSlotTile, T(1));
    if (!f.p.token_mask.present()) return;
    mask.resize(f.groups * kSlotTile);
    for (int64_t r = 0; r < f.rows; ++r)
      mask_of.push_back(&mask[r % f.slots / (f.slots / f.groups) * kSlotTile]);
  }
  void clear_total(const Problem<T>& f) { std::fill_n(total.get(), f.rows * f.kn.lanes, T(0)); }
  // What comes per token. `find`: but for the statistics, which are not known yet.
  void load_tile(const Problem<T>& f, int64_t b, int64_t first, int64_t count, bool find = false) {
    auto fill = [&](const T* from, T* to) {
      std::copy_n(from + first, count, to);
      std::fill(to + count, to + kSlotTile, to[count - 1]);
    };
    if (f.p.mean.present() && !find) {
      fill(f.p.mean.template as<const T>() + b * f.p.mean.stride[0], mean.get());
      fill(f.p.rstd.template as<const T>() + b * f.p.rstd.stride[0], rstd.get());
    }
    const TensorView& m = f.p.token_mask;
    for (int64_t g = 0; m.present() && g < f.groups; ++g)
      fill(m.as<const T>() + b * m.stride[0] + g * m.stride[1], &mask[g * kSlotTile]);
  }
  void store_statistics(const Problem<T>& f, int64_t b, int64_t first, int64_t count) {
    std::copy_n(mean.get(), count, f.p.mean.template as<T>() + b * f.tokens + first);
    std::copy_n(rstd.get(), count, f.p.rstd.template as<T>() + b * f.tokens + first);
  }
  const T* const* masks(int64_t row) const { return mask_of.empty() ? nullptr : &mask_of[row]; }
};

// Rows of a (B,H,S,N) map between the tensor and a tile.
template <class T>
void store_map(const TensorView& to, int64_t b, int64_t rows, int64_t first, int64_t count, const T* map) {
  for (int64_t r = 0; to.present() && r < rows; ++r)
    std::copy_n(map + r * kSlotTile, count, to.as<T>() + (b * rows + r) * to.shape[3] + first);
}
template <class T>
const T* load_map(const TensorView& from, int64_t b, int64_t rows, int64_t first, int64_t count, T* map) {
  if (!from.present()) return nullptr;
  for (int64_t r = 0; r < rows; ++r) {
    std::copy_n(from.as<const T>() + (b * rows + r) * from.shape[3] + first, count, map + r * kSlotTile);
    std::fill(map + r * kSlotTile + count, map + (r + 1) * kSlotTile, T(0));
  }
  return map;
}

// Runs body(b, chunk, thread, sums) for every chunk of every item; `sums` (rows, padded) and then (rows) start at zero.
// Adds those of an item up in order into a matrix (B, rows, width) and a vector (B, rows).
template <class T, class F>
void sum_over_chunks(const Problem<T>& f, const Side<T>& side, const TensorView& matrix, const TensorView& vector,
                     int threads, F&& body) {
  const int64_t width = side.width, padded = side.padded, size = f.rows * (padded + 1);
  const bool several = f.chunks > 1;
  Buffer<T> sums((several ? f.batch * f.chunks : threads) * size);
  auto finish = [&](int64_t b, const T* total) {
    for (int64_t r = 0; r < f.rows; ++r)
      std::copy_n(total + r * padded, width, matrix.as<T>() + (b * f.rows + r) * width);
    std::copy_n(total + f.rows * padded, f.rows, vector.as<T>() + b * f.rows);
  };
  parallel_for(f.batch * f.chunks, threads, [&](int64_t task, int thread) {
    T* own = &sums[(several ? task : thread) * size];
    std::fill_n(own, size, T(0));
    body(task / f.chunks, task % f.chunks, thread, own);
    if (!several) finish(task, own);
  });
  if (!several) return;
  parallel_for(f.batch, threads, [&](int64_t b, int) {
    T* total = &sums[b * f.chunks * size];
    for (int64_t chunk = 1; chunk < f.chunks; ++chunk)
      for (int64_t i = 0; i < size; ++i) total[i] += total[chunk * size + i];
    finish(b, total);
  });
}

// body(first token, tokens) for every tile of a chunk.
template <class T, class F>
void for_tiles(const Problem<T>& f, int64_t chunk, F&& body) {
  const int64_t end = std::min(f.tokens, (chunk + 1) * f.chunk);
  for (int64_t first = chunk * f.chunk; first < end; first += kSlotTile)
    body(first, std::min(kSlotTile, end - first));
}

template <class T>
void add_lanes(const SlotKernels<T>& kn, const T* total, int64_t rows, T* sums) {
  for (int64_t r = 0; r < rows; ++r)
    for (int l = 0; l < kn.lanes; ++l) sums[r] += total[r * kn.lanes + l];
}

template <class T>
void forward(const SlotAttendForwardParams& params, int threads) {
  const Problem<T> f(params);
  const SlotKernels<T>& kn = f.kn;
  threads = f.team(threads);
  const T eps = static_cast<T>(params.eps);
  struct Own : Scratch<T> {
    Buffer<T> attn;
  };
  std::vector<Own> scratch(threads);
  for (Own& s : scratch) {
    s.resize(f, 1, f.values);
    if (params.attn.present()) s.attn.resize(f.rows * kSlotTile);
  }
  const int64_t key_rows = f.rows / f.keys.sets, value_rows = f.rows / f.values.sets;
  const bool find = params.norm_eps >= 0;
  sum_over_chunks<T>(
      f, f.values, params.num, params.den, threads, [&](int64_t b, int64_t chunk, int thread, T* sums) {
        Own& s = scratch[thread];
        T *map = s.map.get(), *attn = params.attn.present() ? s.attn.get() : nullptr;
        s.clear_total(f);
        f.pack_left(f.keys, f.q(b), s.q_left.get());
        for_tiles(f, chunk, [&](int64_t first, int64_t count) {
          s.load_tile(f, b, first, count, find);
          for (int64_t set = 0; set < f.keys.sets; ++set) {
            f.pack(f.keys, b, set, first, count, s, find, T(params.norm_eps));
            if (find) s.store_statistics(f, b, first, count);
            kn.dots(key_rows, f.keys.width, &s.q_left[set * f.left_stride(f.keys)], f.c(b) + set * key_rows, count,
                    s.columns.get(), f.keys.row(b, set, first + count), f.keys.pitch(),
                    map + set * key_rows * kSlotTile);
          }
          f.fill_masked_slots(b, count, -std::numeric_limits<T>::infinity(), map);
          store_map(params.dots, b, f.rows, first, count, map);
          f.for_softmaxes([&](int64_t r, int64_t members) {
            kn.softmax({map + r * kSlotTile, members, count, s.masks(r), s.rstd.get(), eps,
                        attn ? attn + r * kSlotTile : nullptr, &s.total[r * kn.lanes]});
          });
          store_map(params.attn, b, f.rows, first, count, attn);
          for (int64_t set = 0; set < f.values.sets; ++set)
            kn.sum(value_rows, count, map + set * value_rows * kSlotTile, s.mean.get(),
                   f.values.wide_rows(b, set, first, count, s.rows.get()), f.values.wide_pitch(), f.values.width,
                   sums + set * value_rows * f.values.padded, f.values.padded);
        });
        add_lanes(kn, s.total.get(), f.rows, sums + f.rows * f.values.padded);
      });
}

template <class T>
void backward(const SlotAttendBackwardParams& params, int threads) {
  const Problem<T> f(params);
  const SlotKernels<T>& kn = f.kn;
  threads = f.team(threads);
  const T eps = static_cast<T>(params.eps);
  const Side<T> grad_keys(params.grad_keys, kn.panel), grad_values(params.grad_values, kn.panel);
  const bool one_side = f.keys.sets == 1 && same_tensor(params.keys, params.values);
  // Both gradients of the rows in one product, and one pass over what they are added to.
  const bool same_grad = same_tensor(params.grad_keys, params.grad_values), one_grad = one_side && same_grad;
  const bool add_values = params.add || same_grad;
  struct Own : Scratch<T> {
    Buffer<T> grad_left, left, grad_attn, grad_dots;  // left: the rows of q, then those of grad_num
  };
  const int64_t q_size = f.rows * f.keys.padded;
  std::vector<Own> scratch(threads);
  for (Own& s : scratch) {
    s.resize(f, 3, f.keys);
    s.grad_left.resize(f.left_size(f.values));
    zeroed(s.left, q_size + f.rows * f.values.padded);
    if (params.grad_attn.present()) s.grad_attn.resize(f.rows * kSlotTile);
    if (params.grad_dots.present()) s.grad_dots.resize(f.rows * kSlotTile);
  }
  const int64_t key_rows = f.rows / f.keys.sets, value_rows = f.rows / f.values.sets;
  sum_over_chunks<T>(
      f, f.keys, params.grad_q, params.grad_c, threads, [&](int64_t b, int64_t chunk, int thread, T* sums) {
        Own& s = scratch[thread];
        T *map = s.map.get(), *grad = map + f.rows * kSlotTile, *scaled = grad + f.rows * kSlotTile;
        T *q_rows = s.left.get(), *grad_rows = q_rows + q_size;
        const T* grad_num = params.grad_num.as<const T>() + b * f.rows * f.values.width;
        const T* grad_den = params.grad_den.as<const T>() + b * f.rows;
        s.clear_total(f);
        f.pack_left(f.keys, f.q(b), s.q_left.get());
        f.pack_left(f.values, grad_num, s.grad_left.get());
        for (int64_t r = 0; r < f.rows; ++r) {
          std::copy_n(f.q(b) + r * f.keys.width, f.keys.width, q_rows + r * f.keys.padded);
          std::copy_n(grad_num + r * f.values.width, f.values.width, grad_rows + r * f.values.padded);
        }
        for_tiles(f, chunk, [&](int64_t first, int64_t count) {
          s.load_tile(f, b, first, count);
          for (int64_t set = 0; set < f.keys.sets; ++set) {
            f.pack(f.keys, b, set, first, count, s);
            kn.dots(key_rows, f.keys.width, &s.q_left[set * f.left_stride(f.keys)], f.c(b) + set * key_rows, count,
                    s.columns.get(), f.keys.row(b, set, first + count), f.keys.pitch(),
                    map + set * key_rows * kSlotTile);
          }
          for (int64_t set = 0; set < f.values.sets; ++set) {
            if (!one_side) f.pack(f.values, b, set, first, count, s);
            kn.dots(value_rows, f.values.width, &s.grad_left[set * f.left_stride(f.values)],
                    grad_den + set * value_rows, count, s.columns.get(), grad_values.row(b, set, first),
                    grad_values.pitch(), grad + set * value_rows * kSlotTile);
          }
          f.fill_masked_slots(b, count, -std::numeric_limits<T>::infinity(), map);
          const T* grad_attn = load_map(params.grad_attn, b, f.rows, first, count, s.grad_attn.get());
          const T* grad_dots = load_map(params.grad_dots, b, f.rows, first, count, s.grad_dots.get());
          if (grad_dots) f.fill_masked_slots(b, count, T(0), s.grad_dots.get());
          f.for_softmaxes([&](int64_t r, int64_t members) {
            const int64_t at = r * kSlotTile;
            kn.softmax_grad({map + at, grad + at, scaled + at, members, count, s.masks(r), s.rstd.get(), eps,
                             grad_attn ? grad_attn + at : nullptr, grad_dots ? grad_dots + at : nullptr,
                             &s.total[r * kn.lanes]});
          });
          for (int64_t set = 0; set < f.keys.sets; ++set) {
            const int64_t row = set * key_rows;
            kn.sum(key_rows, count, scaled + row * kSlotTile, s.mean.get(),
                   f.keys.wide_rows(b, set, first, count, s.rows.get()), f.keys.wide_pitch(), f.keys.width,
                   sums + row * f.keys.padded, f.keys.padded);
            kn.spread(one_grad ? 2 * f.rows : key_rows, count, map + row * kSlotTile, q_rows + row * f.keys.padded,
                      f.keys.padded, f.keys.width, grad_keys.row(b, set, first), grad_keys.pitch(), params.add);
          }
          for (int64_t set = 0; !one_grad && set < f.values.sets; ++set) {
            const int64_t row = set * value_rows;
            kn.spread(value_rows, count, grad + row * kSlotTile, grad_rows + row * f.values.padded, f.values.padded,
                      f.values.width, grad_values.row(b, set, first), grad_values.pitch(), add_values);
          }
        });
        add_lanes(kn, s.total.get(), f.rows, sums + f.rows * f.keys.padded);
      });
}

template <class T>
void token_statistics(const TokenStatisticsParams& params, int threads) {
  const SlotKernels<T>& kn = kernels<T>().slots;
  const TensorView& x = params.rows;
  const int64_t tokens = x.shape[1], blocks = ceil_div(tokens, kChunk);
  parallel_for(x.shape[0] * blocks, threads, [&](int64_t task, int) {
    const int64_t first = task % blocks * kChunk, end = std::min(tokens, first + kChunk);
    const int64_t b = task / blocks, at = b * tokens + first;
    kn.moments(x.as<const T>() + b * x.stride[0] + first * x.stride[1], x.stride[1], end - first, x.shape[2],
               static_cast<T>(params.eps), params.mean.as<T>() + at, params.rstd.as<T>() + at);
  });
}

template <class T>
void check_side(const TensorView& x, const SlotAttendParams& p, int64_t tokens, int64_t width, const char* name) {
  check(x, 4, dtype_of<T>(), name);
  check_shape(x, {p.q.shape[0], x.shape[1], tokens, width}, name);
  require(x.shape[1] == 1 || x.shape[1] == p.q.shape[1],
          std::string(name) + ": expected one head or as many as q has");
}

template <class T>
void check_inputs(const SlotAttendParams& p, int64_t values_width) {
  check(p.q, 4, dtype_of<T>(), "q");
  const int64_t batch = p.q.shape[0], heads = p.q.shape[1], slots = p.q.shape[2], tokens = p.keys.shape[2];
  check_contiguous<T>(p.q, {batch, heads, slots, p.q.shape[3]}, "q");
  check_contiguous<T>(p.c, {batch, heads, slots}, "c");
  check_side<T>(p.keys, p, tokens, p.q.shape[3], "keys");
  check_side<T>(p.values, p, tokens, values_width, "values");
  require(heads > 0 && slots > 0, "q: expected at least one head and one slot");
  require(p.groups > 0 && slots % p.groups == 0, "groups: expected a divisor of the number of slots");
  require(p.mean.present() == p.rstd.present(), "mean and rstd: expected both or neither");
  for (const TensorView* v : {&p.mean, &p.rstd}) {
    if (!v->present()) continue;
    check(*v, 2, dtype_of<T>(), "mean and rstd");
    check_shape(*v, {batch, tokens}, "mean and rstd");
  }
  if (p.token_mask.present()) {
    check(p.token_mask, 3, dtype_of<T>(), "token_mask");
    check_shape(p.token_mask, {batch, p.groups, tokens}, "token_mask");
  }
  if (p.slot_mask.present()) {
    check(p.slot_mask, 2, DType::i32, "slot_mask");
    check_shape(p.slot_mask, {batch, slots}, "slot_mask");
  }
}

template <class T>
void check_map(const TensorView& map, const SlotAttendParams& p, const char* name) {
  if (map.present())
    check_contiguous<T>(map, {p.q.shape[0], p.q.shape[1], p.q.shape[2], p.keys.shape[2]}, name);
}

}  // namespace
}  // namespace vidops::cpu

namespace vidops {

void slot_attend_forward_cpu(const SlotAttendForwardParams& params, int threads) {
  cpu::dispatch_float(params.q.dtype, [&](auto zero) {
    using T = decltype(zero);
    const TensorView& q = params.q;
    cpu::check_inputs<T>(params, params.values.shape[3]);
    cpu::check_contiguous<T>(params.num, {q.shape[0], q.shape[1], q.shape[2], params.values.shape[3]}, "num");
    cpu::check_contiguous<T>(params.den, {q.shape[0], q.shape[1], q.shape[2]}, "den");
    cpu::check_map<T>(params.dots, params, "dots");
    cpu::check_map<T>(params.attn, params, "attn");
    if (params.norm_eps >= 0) {
      require(params.keys.shape[1] == 1 && params.values.shape[1] == 1, "keys and values: expected raw rows");
      cpu::check_contiguous<T>(params.mean, {q.shape[0], params.keys.shape[2]}, "mean");
      cpu::check_contiguous<T>(params.rstd, {q.shape[0], params.keys.shape[2]}, "rstd");
    }
    cpu::forward<T>(params, threads);
  });
}

void slot_attend_backward_cpu(const SlotAttendBackwardParams& params, int threads) {
  cpu::dispatch_float(params.q.dtype, [&](auto zero) {
    using T = decltype(zero);
    const TensorView& q = params.q;
    const int64_t width = params.values.shape[3];
    cpu::check_inputs<T>(params, width);
    cpu::check_contiguous<T>(params.grad_num, {q.shape[0], q.shape[1], q.shape[2], width}, "grad_num");
    cpu::check_contiguous<T>(params.grad_den, {q.shape[0], q.shape[1], q.shape[2]}, "grad_den");
    cpu::check_map<T>(params.grad_dots, params, "grad_dots");
    cpu::check_map<T>(params.grad_attn, params, "grad_attn");
    cpu::check(params.grad_keys, 4, cpu::dtype_of<T>(), "grad_keys");
    cpu::check_shape(params.grad_keys,
                     {q.shape[0], params.keys.shape[1], params.keys.shape[2], params.keys.shape[3]}, "grad_keys");
    cpu::check(params.grad_values, 4, cpu::dtype_of<T>(), "grad_values");
    cpu::check_shape(params.grad_values, {q.shape[0], params.values.shape[1], params.keys.shape[2], width},
                     "grad_values");
    cpu::check_contiguous<T>(params.grad_q, {q.shape[0], q.shape[1], q.shape[2], q.shape[3]}, "grad_q");
    cpu::check_contiguous<T>(params.grad_c, {q.shape[0], q.shape[1], q.shape[2]}, "grad_c");
    cpu::backward<T>(params, threads);
  });
}

void token_statistics_cpu(const TokenStatisticsParams& params, int threads) {
  cpu::dispatch_float(params.rows.dtype, [&](auto zero) {
    using T = decltype(zero);
    cpu::check(params.rows, 3, cpu::dtype_of<T>(), "rows");
    cpu::check_contiguous<T>(params.mean, {params.rows.shape[0], params.rows.shape[1]}, "mean");
    cpu::check_contiguous<T>(params.rstd, {params.rows.shape[0], params.rows.shape[1]}, "rstd");
    cpu::token_statistics<T>(params, threads);
  });
}

}  // namespace vidops
