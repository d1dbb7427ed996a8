// Label propagation (sheet 5 of arXiv 2308.09951): per query the k best context positions, kept in a heap while the
// context streams by, then their softmax and the mean of their labels.
//
// A task is a piece of a few grid rows, so that a context row read from memory serves several rows of queries. Queries
// are handled in groups of `dot_rows` neighbours: within the radius of a group the positions of one context row are
// contiguous, so tiles of dot products need no packing, and between two groups most of them stay in cache. All
// affinities, of unrestricted frames too, come from the same loop: equal vectors tie exactly wherever they are.
#include "common.h"
#include "kernels.h"
#include "vidops/label_propagation.h"

namespace vidops::cpu {
namespace {

constexpr int64_t kPieceRows = 4, kPieceColumns = 64;  // queries of a task
constexpr int64_t kColumns = 16;  // context positions that stay in L1 while the groups of a task pass
constexpr int64_t kNarrow = 32;   // windows up to here stay there anyway, and cutting them would waste parts of tiles

template <class T>
struct Candidate {
  T value;
  int64_t index;
};

// As "less" of a heap it puts the worst on top, and sorts the best to the front.
template <class T>
bool better(const Candidate<T>& a, const Candidate<T>& b) {
  return a.value > b.value || (a.value == b.value && a.index < b.index);
}

// The k best candidates of each query of a task.
template <class T>
class Best {
 public:
  void resize(int64_t queries, int64_t k) {
    k_ = k;
    heap_.resize(static_cast<size_t>(queries * k));
    size_.resize(static_cast<size_t>(queries));
    floor_.resize(static_cast<size_t>(queries));
  }
  void clear() {
    std::fill(size_.begin(), size_.end(), 0);
    std::fill(floor_.begin(), floor_.end(), -std::numeric_limits<T>::infinity());
  }
  // Indices come in ascending order, so an equal value is never better; NaN and -infinity pass no floor.
  void offer(int64_t query, T value, int64_t index) {
    if (!(value > floor_[query])) return;
    Candidate<T>* heap = &heap_[query * k_];
    int64_t& size = size_[query];
    if (size == k_) std::pop_heap(heap, heap + size--, better<T>);
    heap[size++] = {value, index};
    std::push_heap(heap, heap + size, better<T>);
    if (size == k_) floor_[query] = heap[0].value;
  }
  // Best first; returns how many there are.
  int64_t sort(int64_t query, const Candidate<T>** sorted) {
    Candidate<T>* heap = &heap_[query * k_];
    std::sort_heap(heap, heap + size_[query], better<T>);
    *sorted = heap;
    return size_[query];
  }

 private:
  int64_t k_ = 0;
  std::vector<Candidate<T>> heap_;
  std::vector<int64_t> size_;
  std::vector<T> floor_;
};

// The largest x >= 0 with x * x < limit, which is positive.
int64_t reach_of(int64_t limit) {
  int64_t x = static_cast<int64_t>(std::sqrt(static_cast<double>(limit)));
  while (x * x >= limit) --x;
  while ((x + 1) * (x + 1) < limit) ++x;
  return x;
}

template <class T>
class Propagation {
 public:
  explicit Propagation(const LabelPropagationParams& params)
      : p_(params),
        kn_(kernels<T>()),
        k_(params.index.shape[1]),
        width_(params.width),
        height_(params.query.shape[0] / params.width) {}

  void run(int threads) {
    const int64_t across = ceil_div(width_, kPieceColumns);
    const int64_t columns = round_up(ceil_div(width_, across), kn_.dot_rows);
    // Fewer rows where threads would be left without work; no result depends on how the queries are cut.
    const int64_t share = height_ * across / (4 * std::max(threads, 1));
    const int64_t rows = std::clamp<int64_t>(share, 1, kPieceRows);
    std::vector<Best<T>> best(std::max(threads, 1));
    for (Best<T>& b : best) b.resize(rows * columns, k_);
    parallel_for(ceil_div(height_, rows) * across, threads, [&](int64_t task, int thread) {
      const int64_t y = task / across * rows, x = task % across * columns;
      if (x < width_) solve({y, std::min(rows, height_ - y), x, std::min(columns, width_ - x)}, best[thread]);
    });
  }

 private:
  struct Piece {
    int64_t y, rows, x, columns;
  };
  // One row of queries of a piece before one row of context: who is at most `reach` columns apart meets.
  struct Rows {
    int64_t frame, context_y, query_y, reach;
  };

  void solve(const Piece& piece, Best<T>& best) const {
    best.clear();
    for (int64_t f = 0; f < p_.context.shape[0]; ++f)
      for (int64_t y = 0; y < height_; ++y) scan(piece, f, y, best);
    for (int64_t r = 0; r < piece.rows; ++r)
      for (int64_t c = 0; c < piece.columns; ++c)
        finish((piece.y + r) * width_ + piece.x + c, r * piece.columns + c, best);
  }

  // Row y of frame f.
  void scan(const Piece& piece, int64_t f, int64_t y, Best<T>& best) const {
    Rows rows[kPieceRows];
    int64_t count = 0, reach = 0;
    for (int64_t query_y = piece.y; query_y < piece.y + piece.rows; ++query_y) {
      const int64_t room = p_.limit - (y - query_y) * (y - query_y);
      if (f >= p_.unrestricted && room <= 0) continue;
      rows[count] = {f, y, query_y, f < p_.unrestricted ? width_ : reach_of(room)};
      reach = std::max(reach, rows[count++].reach);
    }
    const int64_t begin = std::max<int64_t>(0, piece.x - reach);
    const int64_t end = std::min(width_, piece.x + piece.columns + reach);
    const int64_t step = 2 * reach + kn_.dot_rows <= kNarrow ? width_ : kColumns;
    for (int64_t c = begin; count > 0 && c < end; c += step)
      for (int64_t r = 0; r < count; ++r)
        for (int64_t q = 0; q < piece.columns; q += kn_.dot_rows) {
          const int64_t last = std::min<int64_t>(q + kn_.dot_rows, piece.columns) - 1;
          const int64_t from = std::max(c, piece.x + q - rows[r].reach);
          const int64_t to = std::min({c + step, end, piece.x + last + rows[r].reach + 1});
          for (int64_t x = from; x < to; x += kn_.dot_columns)
            tile(piece, rows[r], q, last, x, std::min<int64_t>(kn_.dot_columns, to - x), best);
        }
  }

  // Queries first .. last of a row, columns x .. x + count - 1.
  void tile(const Piece& piece, const Rows& rows, int64_t first, int64_t last, int64_t x, int64_t count,
            Best<T>& best) const {
    const T *queries[kMaxDots], *positions[kMaxDots];
    T dots[kMaxDots * kMaxDots];
    const T* query = p_.query.as<const T>() + (rows.query_y * width_ + piece.x) * p_.query.stride[0];
    const T* position = p_.context.as<const T>() + rows.frame * p_.context.stride[0] +
                        (rows.context_y * width_ + x) * p_.context.stride[1];
    // Beyond the last one it is repeated, and its products are not looked at.
    for (int64_t r = 0; r < kn_.dot_rows; ++r) queries[r] = query + std::min(first + r, last) * p_.query.stride[0];
    for (int64_t j = 0; j < kn_.dot_columns; ++j)
      positions[j] = position + std::min(j, count - 1) * p_.context.stride[1];
    kn_.dots(queries, positions, p_.query.shape[1], dots);
    const int64_t index = (rows.frame * height_ + rows.context_y) * width_ + x;
    const int64_t slot = (rows.query_y - piece.y) * piece.columns;
    for (int64_t q = first; q <= last; ++q) {
      const int64_t low = std::max<int64_t>(0, piece.x + q - rows.reach - x);
      const int64_t high = std::min(count, piece.x + q + rows.reach + 1 - x);
      for (int64_t j = low; j < high; ++j) best.offer(slot + q, dots[(q - first) * kn_.dot_columns + j], index + j);
    }
  }

  void finish(int64_t n, int64_t query, Best<T>& best) const {
    const int64_t tokens = height_ * width_, labels = p_.labels.shape[2];
    const Candidate<T>* chosen;
    const int64_t found = best.sort(query, &chosen);
    int64_t* index = p_.index.as<int64_t>() + n * k_;
    T *weight = p_.weight.as<T>() + n * k_, *out = p_.out.as<T>() + n * labels;
    double total = 0;
    int64_t places = k_;
    for (int64_t i = 0; i < k_; ++i) {
      const int64_t copies = i < found ? std::min(copies_of(chosen[i].index, n), places) : 0;
      places -= copies;
      index[i] = copies > 0 ? chosen[i].index : -1;
      weight[i] = T(0);
      if (copies == 0) continue;
      const double lead = static_cast<double>(chosen[i].value) - static_cast<double>(chosen[0].value);
      weight[i] = static_cast<T>(static_cast<double>(copies) * std::exp(lead / p_.temperature));
      total += static_cast<double>(weight[i]);
    }
    std::fill(out, out + labels, found > 0 ? T(0) : std::numeric_limits<T>::quiet_NaN());
    for (int64_t i = 0; i < k_; ++i) {
      weight[i] = static_cast<T>(static_cast<double>(weight[i]) / total);  // none found: 0 / 0
      if (index[i] < 0) continue;
      const int64_t f = index[i] / tokens, m = index[i] % tokens;
      kn_.axpy(weight[i], p_.labels.as<const T>() + f * p_.labels.stride[0] + m * p_.labels.stride[1], out, labels);
    }
  }

  // As how many candidates a context position counts.
  int64_t copies_of(int64_t index, int64_t n) const {
    if (index >= height_ * width_) return 1;
    const int64_t dy = index / width_ - n / width_, dx = index % width_ - n % width_;
    const bool near = dy * dy + dx * dx < p_.limit;
    return 1 + (near ? p_.repeats : 0);
  }

  const LabelPropagationParams& p_;
  const Kernels<T>& kn_;
  int64_t k_, width_, height_;
};

}  // namespace
}  // namespace vidops::cpu

namespace vidops {

void label_propagation_forward_cpu(const LabelPropagationParams& params, int threads) {
  cpu::dispatch_float(params.query.dtype, [&](auto zero) {
    using T = decltype(zero);
    const DType dtype = cpu::dtype_of<T>();
    cpu::check(params.query, 2, dtype, "query");
    cpu::check(params.context, 3, dtype, "context");
    cpu::check(params.labels, 3, dtype, "labels");
    const int64_t tokens = params.query.shape[0], frames = params.context.shape[0];
    cpu::check_shape(params.context, {frames, tokens, params.query.shape[1]}, "context");
    cpu::check_shape(params.labels, {frames, tokens, params.labels.shape[2]}, "labels");
    cpu::check(params.out, 2, dtype, "out");
    cpu::check_shape(params.out, {tokens, params.labels.shape[2]}, "out");
    cpu::check(params.index, 2, DType::i64, "index");
    cpu::check(params.weight, 2, dtype, "weight");
    cpu::check_shape(params.index, {tokens, params.index.shape[1]}, "index");
    cpu::check_shape(params.weight, {tokens, params.index.shape[1]}, "weight");
    require(params.out.contiguous() && params.index.contiguous() && params.weight.contiguous(),
            "out, index, weight: expected contiguous tensors");
    require(params.index.shape[1] > 0, "index: expected at least one column");
    require(params.width > 0 && tokens % params.width == 0, "width: expected a divisor of the positions");
    require(params.limit > 0, "limit: expected a positive number");
    require(params.unrestricted >= 0 && params.unrestricted <= frames, "unrestricted: expected 0 to frames");
    require(params.repeats >= 0, "repeats: expected no negative number");
    require(params.temperature > 0, "temperature: expected a positive number");
    cpu::Propagation<T>(params).run(threads);
  });
}

}  // namespace vidops
