// Attention of the spatio-temporal block (sheet 2.2, Ding et al., ECCV 2024) and both ops' gradients (sheet 8.4), from
// packed operands and every row's log-sum-exp:
//   out = (P m) v,  dP = (dO v^T + dMap / H) m,  dS = P (dP - delta) scale,  delta = rowsum(P dP),
//   dq = dS k,  dk = dS^T q,  dv = (P m)^T dO,
// P the softmax weights of a head, m the dropout factor. All are one loop: a score tile is rebuilt, turned into
// weights in its registers, and multiplied by a third operand. The transposed forms hold keys in rows and queries in
// columns, so that no sum crosses blocks and results repeat bit for bit.
#include "attention.cuh"

namespace vidops::cuda {

enum class WeightedSum { output, statistics, gradient };

// One block per kRowTile rows, head and (for wide heads) chunk of output channels; a warp holds 16 rows by kColumnTile
// columns of the scores.
template <class Kind, WeightedSum kSum, bool kTransposed>
VIDOPS_DEVICE void attention_weighted(const AttentionArgs& a) {
  VIDOPS_SHARED(memory);
  constexpr bool kOutput = kSum == WeightedSum::output;
  const PackedOperand& x_operand = kTransposed ? a.k : a.q;
  const PackedOperand& y_operand = kTransposed ? a.q : a.k;
  const PackedOperand& x_value = kTransposed ? a.v : a.g;
  const PackedOperand& y_value = kTransposed ? a.g : a.v;
  const PackedOperand& z_operand = kOutput ? y_value : y_operand;
  const int rows = kTransposed ? a.m : a.n, columns = kTransposed ? a.n : a.m;
  const bool with_values = !kOutput && a.v.data != nullptr;
  const bool own_z = kOutput || (kSum == WeightedSum::gradient && a.chunks > 1);

  const int tiles = x_operand.rows / kRowTile;
  const int head = (int)(block_x() / (u32)tiles);
  const int base = (int)(block_x() % (u32)tiles) * kRowTile;
  const int out_chunk = (int)block_y();

  const int x_size = tile_size<Kind>(kRowTile, a.width), y_size = tile_size<Kind>(kColumnTile, a.width);
  u16* const x = reinterpret_cast<u16*>(memory);
  u16* const x2 = x + x_size;
  u16* const staged = x2 + (with_values ? x_size : 0);
  const int y2 = y_size, z = with_values ? 2 * y_size : y_size, stage_size = z + (own_z ? y_size : 0);

  const int lane = lane_id(), row = warp_id() * 16, my_row = base + row + lane / 4;
  const bool active = base + row < rows;
  const float factor = a.factor * operand_factor(a.q, head) * operand_factor(a.k, head);
  const float value_factor = with_values ? operand_factor(a.g, head) * operand_factor(a.v, head) : 0.0f;
  const float share = 1.0f / (float)a.heads;
  const float* const grad_map = a.grad_map ? a.grad_map + head / a.heads * a.map_batch : nullptr;
  const i64 first_query = (i64)head * a.n;

  const auto lse_of = [&](int i) {
    return a.lse2 ? a.lse2[first_query + i] : a.lse[first_query + i] * kLog2e;
  };
  // Statistics of the rows, when rows are queries; dS is scaled by a power of two to fill the operand type's range.
  // Its bound must not be one of dP, which the logarithm of a small P makes huge where P dP is ordinary.
  float row_lse[2] = {0, 0}, row_delta[2] = {0, 0};
  int shift[2] = {0, 0};
  if (kTransposed && kSum == WeightedSum::gradient) {
    float* const scratch = reinterpret_cast<float*>(memory);
    float largest = 0;
    for (int i = thread_x(); i < a.n; i += kAttentionThreads) largest = larger(a.bound[first_query + i], largest);
    largest = warp_max(largest);
    if (lane == 0) scratch[warp_id()] = largest;
    block_sync();
    for (int w = 0; w < kAttentionWarps; ++w) largest = larger(scratch[w], largest);
    block_sync();
    shift[0] = shift[1] = range_shift(float_bits(largest));
  }
  VIDOPS_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int i = my_row + r * 8;
    if (kTransposed || i >= a.n) continue;
    row_lse[r] = lse_of(i);
    if (kSum != WeightedSum::gradient) continue;
    row_delta[r] = a.delta[first_query + i];
    shift[r] = range_shift(float_bits(a.bound[first_query + i]));
  }
  const float up[2] = {power_of_two(shift[0]), power_of_two(shift[1])};

  float s[1][kColumnTile / 8][4], t[1][kColumnTile / 8][4], o[1][kMaxWidth / 8][4];
  float delta[2] = {0, 0}, largest_weight[2] = {0, 0}, largest_product[2] = {0, 0};
  clear(o);
  pipeline(
      (columns + kColumnTile - 1) / kColumnTile, a.chunks, a.stages,
      [&](int tile, int chunk, int stage) {
        const int first = tile * kColumnTile;
        u16* const y = staged + stage * stage_size;
        if (tile == 0 || a.chunks > 1) {
          load_rows<Kind>(x, x_operand, a, head, chunk, base, kRowTile);
          if (with_values) load_rows<Kind>(x2, x_value, a, head, chunk, base, kRowTile);
        }
        load_rows<Kind>(y, y_operand, a, head, chunk, first, kColumnTile);
        if (with_values) load_rows<Kind>(y + y2, y_value, a, head, chunk, first, kColumnTile);
        if (own_z && chunk + 1 == a.chunks) load_rows<Kind>(y + z, z_operand, a, head, out_chunk, first, kColumnTile);
      },
      [&](int tile, int chunk, int stage) {
        if (!active) return;
        const int first = tile * kColumnTile + lane % 4 * 2;
        const u16* const y = staged + stage * stage_size;
        if (chunk == 0) {
          clear(s);
          clear(t);
        }
        multiply_rows<Kind>(s, x, row, y, 0, a.width);
        if (with_values) multiply_rows<Kind>(t, x2, row, y + y2, 0, a.width);
        if (chunk + 1 < a.chunks) return;

        VIDOPS_UNROLL
        for (int j = 0; j < kColumnTile / 8; ++j)
          VIDOPS_UNROLL
          for (int c = 0; c < 2; ++c) {
            const int column = first + j * 8 + c;
            const bool inside = column < columns;  // rows that do not exist are never stored
            float column_lse = 0, column_delta = 0;
            if (kTransposed && inside) {
              column_lse = lse_of(column);
              if (kSum == WeightedSum::gradient) column_delta = a.delta[first_query + column];
            }
            VIDOPS_UNROLL
            for (int r = 0; r < 2; ++r) {
              float& v = s[0][j][r * 2 + c];
              const int i = kTransposed ? column : my_row + r * 8, k = kTransposed ? my_row + r * 8 : column;
              const float weight = exp2_flush(v * factor - (kTransposed ? column_lse : row_lse[r]));
              const bool keep = !a.dropout || kept(a, head, i, k);
              if (kOutput) {
                v = inside && keep ? weight * kWeightScale : 0.0f;
                continue;
              }
              float gradient = t[0][j][r * 2 + c] * value_factor;
              if (grad_map && inside && my_row + r * 8 < rows) gradient += grad_map[i * a.map_row + k] * share;
              gradient = keep ? gradient * a.keep_scale : 0.0f;
              if (kSum == WeightedSum::statistics) {
                if (!inside) continue;
                const float product = weight * gradient, size = magnitude(product);
                delta[r] += product;
                if (size > largest_product[r]) largest_product[r] = size;
                if (weight > largest_weight[r]) largest_weight[r] = weight;
              } else {
                v = inside ? weight * (gradient - (kTransposed ? column_delta : row_delta[r])) * up[r] : 0.0f;
              }
            }
          }
        if (kSum == WeightedSum::statistics) return;
        multiply_weights<Kind>(o[0], s[0], own_z ? y + z : y, a.width);
      });

  if (kSum == WeightedSum::statistics) {
    VIDOPS_UNROLL
    for (int r = 0; r < 2; ++r) {
      VIDOPS_UNROLL
      for (int mask = 1; mask <= 2; mask <<= 1) {
        delta[r] += shuffle_xor(delta[r], mask);
        largest_weight[r] = larger(largest_weight[r], shuffle_xor(largest_weight[r], mask));
        largest_product[r] = larger(largest_product[r], shuffle_xor(largest_product[r], mask));
      }
      const int i = my_row + r * 8;
      if (lane % 4 || i >= a.n) continue;
      a.delta[first_query + i] = delta[r];
      a.bound[first_query + i] = largest_product[r] + largest_weight[r] * magnitude(delta[r]);
    }
    return;
  }
  const float unpack = operand_factor(z_operand, head);
  VIDOPS_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int i = my_row + r * 8;
    if (i >= rows) continue;
    const float back = kOutput ? a.keep_scale / kWeightScale : a.scale * power_of_two(-shift[r]);
    const i64 to = ((i64)head * rows + i) * a.d;
    VIDOPS_UNROLL
    for (int j = 0; j < kMaxWidth / 8; ++j)
      VIDOPS_UNROLL
      for (int c = 0; c < 2; ++c) {
        const int place = j * 8 + lane % 4 * 2 + c, channel = out_chunk * a.width + place;
        if (place < a.width && channel < a.d) Kind::store(a.out, to + channel, o[0][j][r * 2 + c] * unpack * back);
      }
  }
}

VIDOPS_KERNEL(kAttentionThreads, 1) attention_out_f32(AttentionArgs a) {
  attention_weighted<SplitKind, WeightedSum::output, false>(a);
}
VIDOPS_KERNEL(kAttentionThreads, 1) attention_out_f16(AttentionArgs a) {
  attention_weighted<HalfKind, WeightedSum::output, false>(a);
}
VIDOPS_KERNEL(kAttentionThreads, 1) attention_out_bf16(AttentionArgs a) {
  attention_weighted<BfloatKind, WeightedSum::output, false>(a);
}
VIDOPS_KERNEL(kAttentionThreads, 1) attention_dv_f32(AttentionArgs a) {
  attention_weighted<SplitKind, WeightedSum::output, true>(a);
}
VIDOPS_KERNEL(kAttentionThreads, 1) attention_dv_f16(AttentionArgs a) {
  attention_weighted<HalfKind, WeightedSum::output, true>(a);
}
VIDOPS_KERNEL(kAttentionThreads, 1) attention_dv_bf16(AttentionArgs a) {
  attention_weighted<BfloatKind, WeightedSum::output, true>(a);
}
VIDOPS_KERNEL(kAttentionThreads, 1) attention_delta_f32(AttentionArgs a) {
  attention_weighted<SplitKind, WeightedSum::statistics, false>(a);
}
VIDOPS_KERNEL(kAttentionThreads, 1) attention_delta_f16(AttentionArgs a) {
  attention_weighted<HalfKind, WeightedSum::statistics, false>(a);
}
VIDOPS_KERNEL(kAttentionThreads, 1) attention_delta_bf16(AttentionArgs a) {
  attention_weighted<BfloatKind, WeightedSum::statistics, false>(a);
}
VIDOPS_KERNEL(kAttentionThreads, 1) attention_dq_f32(AttentionArgs a) {
  attention_weighted<SplitKind, WeightedSum::gradient, false>(a);
}
VIDOPS_KERNEL(kAttentionThreads, 1) attention_dq_f16(AttentionArgs a) {
  attention_weighted<HalfKind, WeightedSum::gradient, false>(a);
}
VIDOPS_KERNEL(kAttentionThreads, 1) attention_dq_bf16(AttentionArgs a) {
  attention_weighted<BfloatKind, WeightedSum::gradient, false>(a);
}
VIDOPS_KERNEL(kAttentionThreads, 1) attention_dk_f32(AttentionArgs a) {
  attention_weighted<SplitKind, WeightedSum::gradient, true>(a);
}
VIDOPS_KERNEL(kAttentionThreads, 1) attention_dk_f16(AttentionArgs a) {
  attention_weighted<HalfKind, WeightedSum::gradient, true>(a);
}
VIDOPS_KERNEL(kAttentionThreads, 1) attention_dk_bf16(AttentionArgs a) {
  attention_weighted<BfloatKind, WeightedSum::gradient, true>(a);
}

}  // namespace vidops::cuda
