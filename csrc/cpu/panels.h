// Packing whole sets of rows into the panels of a Gemm.
#pragma once

#include "common.h"
#include "kernels.h"

namespace vidops::cpu {

// Rows of a strided matrix; the last axis is contiguous.
template <class T>
struct Rows {
  const T* base = nullptr;
  int64_t pitch = 0;
  int64_t count = 0;
  const T* operator[](int64_t i) const { return base + i * pitch; }
};

constexpr int kMaxPanel = 64;  // no panel is wider

template <class T, class RowAt>
void pack_panels(const Gemm<T>& gemm, bool a_side, RowAt&& row_at, int64_t count, int64_t width,
                 const T* centre, T scale, int64_t k0, int64_t panel_k, char* out) {
  const int step = a_side ? gemm.mr : gemm.nr;
  const T* rows[kMaxPanel];
  for (int64_t i = 0; i < count; i += step, out += panel_k * step * gemm.elem) {
    const int in_panel = static_cast<int>(std::min<int64_t>(step, count - i));
    for (int r = 0; r < in_panel; ++r) rows[r] = row_at(i + r);
    (a_side ? gemm.pack_a : gemm.pack_b)(rows, in_panel, width, centre, scale, k0, out);
  }
}

// All columns that `run` computes of `columns`, at the same pitch.
template <class T>
int64_t computed_columns(const Gemm<T>& gemm, int64_t columns) {
  return round_up(columns, gemm.run_half ? gemm.nr / 2 : gemm.nr);
}
// Of the product with one block of A panels those columns, and no others.
template <class T>
void run_columns(const Gemm<T>& gemm, int64_t a_panels, int64_t columns, int64_t k, const char* a, const char* b, T* c,
                 int64_t ldc) {
  const int64_t whole = computed_columns(gemm, columns) / gemm.nr;
  gemm.run(a_panels, whole, k, a, b, c, ldc);
  const int64_t done = whole * gemm.nr;
  if (done < columns) gemm.run_half(a_panels, 1, k, a, b + done * k * gemm.elem, c + done, ldc);
}

// Columns [0, count) of a k-major matrix (k rows, given pitch) as panels.
template <class T>
void pack_columns(const Gemm<T>& gemm, bool a_side, const T* source, int64_t pitch, int64_t count, int64_t k,
                  void* out) {
  const int64_t step = a_side ? gemm.mr : gemm.nr, bytes = step * round_up(k, gemm.k_align) * gemm.elem;
  char* panel = static_cast<char*>(out);
  for (int64_t i = 0; i < count; i += step, panel += bytes)
    (a_side ? gemm.pack_a_kmajor : gemm.pack_b_kmajor)(
        source + i, pitch, static_cast<int>(std::min<int64_t>(step, count - i)), k, panel);
}

// Rows per block so that `bytes_per_row * rows` stays near `budget`, in whole A panels, at most 8 of them.
inline int64_t block_rows(int64_t rows, int64_t bytes_per_row, int mr, int64_t budget) {
  const int64_t panels = std::max<int64_t>(1, budget / std::max<int64_t>(1, bytes_per_row * mr));
  return mr * std::min<int64_t>({panels, 8, std::max<int64_t>(1, ceil_div(rows, mr))});
}

}  // namespace vidops::cpu
