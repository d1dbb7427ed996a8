// Normalised sum of neighbouring rows (Eq. E3): the adjacency bits, exact in bfloat16, times P in three bfloat16
// planes that together hold all 24 bits of a float. Rows with the same bits have the same sum, which is formed once.
#include "device.cuh"

namespace vidops::cuda {

constexpr int kListThreads = 512;
constexpr int kRowThreads = 128;
constexpr int kCompactThreads = 1024;
constexpr int kCopyThreads = 256;
constexpr int kProductThreads = 128;
constexpr int kProductRows = 128;
constexpr int kProductCols = 64;
constexpr int kChunk = 32;  // columns of the adjacency, one 32-bit word of every row
constexpr int kTotalThreads = kChunk * kWarp;
constexpr int kPlanes = 3;
constexpr int kSteps = kChunk / 16;
constexpr int kFragment = 64;  // 32-bit words of one 16 x 8 operand of the matrix unit
constexpr int kChunkWords = kPlanes * kSteps * (kProductCols / 8) * kFragment;

struct NeighbourMeanArgs {
  const u32* adjacency;
  i64 row_stride;  // in 32-bit words
  const float* p;
  i64 p_stride;
  int rows, cols;
  int words;  // 32-bit words of a row that hold columns
  int column_tiles;
  // Scratch.
  float* total;    // rows: sum_c p_jc, NaN if not finite
  u32* usable;     // words: the rows of P that may be multiplied
  float* norm;     // rows: sum_c of a row of S before it is divided
  u64* hash;       // rows
  int* first;      // rows: the first row with the same bits
  int* distinct;   // rows: the rows that are their own first, in order
  int* count;      // 1: how many
  u32* used;       // (row tiles, words, 2): the words with a bit in any row of the tile, in order, and their `usable`
  int* used_count; // row tiles
  float* mean;
};

// One block per word of rows, one warp per row. A row with a NaN or an infinity stays out of the products, where even
// zero bits would spread it; the rows of S that include it get theirs from the norm.
VIDOPS_KERNEL(kTotalThreads) neighbour_mean_totals(NeighbourMeanArgs a) {
  VIDOPS_SHARED(memory);
  u32* found = reinterpret_cast<u32*>(memory);
  const int word = (int)block_x(), row = word * kChunk + warp_id();
  if (thread_x() == 0) *found = 0;
  float sum = 0;
  if (row < a.rows) {
    const float* p = a.p + row * a.p_stride;
    float part[4] = {};
    int c = lane_id();
    for (; c + 3 * kWarp < a.cols; c += 4 * kWarp)
      VIDOPS_UNROLL
      for (int u = 0; u < 4; ++u) part[u] += p[c + u * kWarp];
    for (; c < a.cols; c += kWarp) part[0] += p[c];
    sum = warp_sum(part[0] + part[1] + part[2] + part[3]);
  }
  block_sync();
  if (lane_id() == 0 && row < a.rows) {
    a.total[row] = finite(sum) ? sum : sum - sum;
    if (finite(sum)) atomic_or_shared(found, 1u << warp_id());
  }
  block_sync();
  if (thread_x() == 0) a.usable[word] = *found;
}

// One block per tile of distinct rows finds the words worth multiplying.
VIDOPS_KERNEL(kListThreads) neighbour_mean_words(NeighbourMeanArgs a) {
  VIDOPS_SHARED(memory);
  u32* any = reinterpret_cast<u32*>(memory);  // one word per warp and lane
  constexpr int kWarps = kListThreads / kWarp;
  const int first = (int)block_x() * kProductRows, lane = lane_id(), warp = warp_id();
  const int rows = *a.count - first;
  if (rows <= 0) return;
  i64 from[kProductRows / kWarps];
  VIDOPS_UNROLL
  for (int r = 0; r < kProductRows / kWarps; ++r) {
    const int row = warp + r * kWarps;
    from[r] = row < rows ? a.distinct[first + row] * a.row_stride : -1;
  }
  u32* list = a.used + 2 * (i64)block_x() * a.words;
  int count = 0;
  for (int base = 0; base < a.words; base += kWarp) {
    const int word = base + lane;
    u32 bits = 0;
    VIDOPS_UNROLL
    for (int r = 0; r < kProductRows / kWarps; ++r)
      if (from[r] >= 0 && word < a.words) bits |= a.adjacency[from[r] + word];
    any[warp * kWarp + lane] = bits;
    block_sync();
    if (warp == 0) {
      bits = 0;
      for (int w = 0; w < kWarps; ++w) bits |= any[w * kWarp + lane];
      const u32 kept = ballot(bits != 0);
      if (bits) {
        u32* entry = list + 2 * (count + popcount(kept & ((1u << lane) - 1)));
        entry[0] = (u32)word;
        entry[1] = a.usable[word];
      }
      count += popcount(kept);
    }
    block_sync();
  }
  if (thread_x() == 0) a.used_count[block_x()] = count;
}

// sum_c S_ic = sum_j A_ij sum_c p_jc: the total of a row of S before the row itself is known. One warp per row, one
// lane per bit. The hash is of the row's bits.
VIDOPS_KERNEL(kRowThreads) neighbour_mean_norms(NeighbourMeanArgs a) {
  const int row = (int)block_x() * (kRowThreads / kWarp) + warp_id();
  if (row >= a.rows) return;
  const int lane = lane_id();
  float sum = 0;
  u64 hash = 0;
  for (int base = 0; base < a.words; base += kWarp) {
    const u32 mine = base + lane < a.words ? a.adjacency[row * a.row_stride + base + lane] : 0;
    if (mine) {
      u64 mixed = ((u64)(base + lane) << 32 | mine) * 0x9E3779B97F4A7C15u;
      mixed = (mixed ^ mixed >> 32) * 0xD6E8FEB86659FD93u;
      hash += mixed ^ mixed >> 32;
    }
    for (u32 rest = ballot(mine != 0); rest; rest &= rest - 1) {
      const int word = lowest_bit(rest);
      const int j = (base + word) * kChunk + lane;
      if (shuffle(mine, word) >> lane & 1 && j < a.rows) sum += a.total[j];
    }
  }
  sum = warp_sum(sum);
  VIDOPS_UNROLL
  for (int mask = kWarp / 2; mask; mask >>= 1) hash += shuffle_xor(hash, mask);
  if (lane == 0) {
    a.norm[row] = sum;
    a.hash[row] = hash;
  }
}

// One warp per row looks for an earlier one with the same bits; the hash only says where to compare.
VIDOPS_KERNEL(kRowThreads) neighbour_mean_first(NeighbourMeanArgs a) {
  const int row = (int)block_x() * (kRowThreads / kWarp) + warp_id();
  if (row >= a.rows) return;
  const int lane = lane_id();
  const u64 hash = a.hash[row];
  int first = row;
  for (int base = 0; base < row && first == row; base += kWarp) {
    u32 alike = ballot(base + lane < row && a.hash[base + lane] == hash);
    for (; alike && first == row; alike &= alike - 1) {
      const int other = base + lowest_bit(alike);
      bool differs = false;
      for (int w = lane; w < a.words; w += kWarp)
        differs |= a.adjacency[row * a.row_stride + w] != a.adjacency[other * a.row_stride + w];
      if (!ballot(differs)) first = other;
    }
  }
  if (lane == 0) a.first[row] = first;
}

VIDOPS_KERNEL(kCompactThreads) neighbour_mean_compact(NeighbourMeanArgs a) {
  VIDOPS_SHARED(memory);
  int* found = reinterpret_cast<int*>(memory);  // one per warp
  const int me = thread_x();
  int count = 0;
  for (int base = 0; base < a.rows; base += kCompactThreads) {
    const int row = base + me;
    const bool own = row < a.rows && a.first[row] == row;
    const u32 bits = ballot(own);
    if (lane_id() == 0) found[warp_id()] = popcount(bits);
    block_sync();
    int before = count + popcount(bits & ((1u << lane_id()) - 1));
    for (int w = 0; w < kCompactThreads / kWarp; ++w) {
      if (w < warp_id()) before += found[w];
      count += found[w];
    }
    if (own) a.distinct[before] = row;
    block_sync();
  }
  if (me == 0) *a.count = count;
}

namespace {

struct alignas(16) Words4 {
  u32 v[4];
};
struct alignas(8) Words2 {
  u32 v[2];
};

// What one thread contributes to a chunk: sixteen values of one column of P and one word of the adjacency.
struct Chunk {
  float low[8], high[8];
  u32 bits;
};

// The order of the 32 rows of P within a chunk is free as long as both operands agree. Bit j and bit j + 16 of a word
// make the two halves of a register, so that a shift and a mask turn them into a pair of bfloat16: bit 14 alone is
// 2.0. Step s of the matrix unit covers bits 8 s .. 8 s + 7 and those 16 further. The factor 2 leaves with the norm.
constexpr u32 kTwos = 0x40004000u;

VIDOPS_DEVICE void load_chunk(const NeighbourMeanArgs& a, Chunk& chunk, const u32* entry, i64 bits_from,
                              int column, int step) {
  const int word = (int)entry[0];
  const u32 valid = column < a.cols ? entry[1] >> step * 8 : 0;
  const float* low = a.p + (word * kChunk + step * 8) * a.p_stride + column;
  const float* high = low + 16 * a.p_stride;
  VIDOPS_UNROLL
  for (int i = 0; i < 8; ++i, low += a.p_stride, high += a.p_stride) {
    chunk.low[i] = valid >> i & 1 ? *low : 0.0f;
    chunk.high[i] = valid >> (i + 16) & 1 ? *high : 0.0f;
  }
  chunk.bits = bits_from >= 0 ? a.adjacency[bits_from + word] : 0;
}

// Takes the upper eight significant bits off both values, exactly, as a pair of bfloat16.
VIDOPS_DEVICE u32 take_plane(float& low, float& high) {
  const u32 l = float_bits(low) & 0xffff0000u, h = float_bits(high) & 0xffff0000u;
  low -= bits_float(l);
  high -= bits_float(h);
  return l >> 16 | h;
}

// Writes a column in the order in which the matrix unit takes it: 32 bytes per column and step, whose halves change
// places in every other group of four columns so that neither stores nor loads meet in a bank.
VIDOPS_DEVICE void store_chunk(Chunk chunk, u32* planes, int column, int step) {
  const int group = column % 8, flip = group / 4;
  VIDOPS_UNROLL
  for (int plane = 0; plane < kPlanes; ++plane) {
    u32* to = planes + ((plane * kSteps + step) * (kProductCols / 8) + column / 8) * kFragment + group * 8;
    VIDOPS_UNROLL
    for (int half = 0; half < 2; ++half) {
      Words4 words;
      VIDOPS_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int pair = i % 2 * 4 + half * 2 + i / 2;
        words.v[i] = take_plane(chunk.low[pair], chunk.high[pair]);
      }
      *reinterpret_cast<Words4*>(to + (half ^ flip) * 4) = words;
    }
  }
}

}  // namespace

// 128 distinct rows x 64 columns of S per block, four warps of 64 x 32. While one chunk is multiplied the next one
// waits in shared memory and the one after it is on its way to the registers.
VIDOPS_KERNEL(kProductThreads) neighbour_mean_tiles(NeighbourMeanArgs a) {
  VIDOPS_SHARED(memory);
  u32* planes = reinterpret_cast<u32*>(memory);  // two chunks
  u32* bits = planes + 2 * kChunkWords;          // two words per row
  const int distinct = *a.count, row_tiles = (distinct + kProductRows - 1) / kProductRows;
  const int tile = (int)(block_x() % (u32)row_tiles), column_tile = (int)(block_x() / (u32)row_tiles);
  if (column_tile >= a.column_tiles) return;
  const int first_row = tile * kProductRows, first_column = column_tile * kProductCols;
  const int me = thread_x(), lane = lane_id(), group = lane / 4, quad = lane % 4;
  const int warp_row = warp_id() / 2 * 64, warp_column = warp_id() % 2 * 32;
  const int column = warp_id() % 2 * kWarp + lane, step = warp_id() / 2;  // what this thread loads
  const u32* list = a.used + 2 * (i64)tile * a.words;
  const int count = a.used_count[tile];
  const i64 bits_from = first_row + me < distinct ? a.distinct[first_row + me] * a.row_stride : -1;

  float sum[4][4][4] = {};
  Chunk chunk;
  if (count > 0) {
    load_chunk(a, chunk, list, bits_from, first_column + column, step);
    bits[me] = chunk.bits;
    store_chunk(chunk, planes, column, step);
  }
  if (count > 1) load_chunk(a, chunk, list + 2, bits_from, first_column + column, step);
  block_sync();
  for (int t = 0; t < count; ++t) {
    const int now = t % 2, next = 1 - now;
    if (t + 1 < count) {
      bits[next * kProductRows + me] = chunk.bits;
      store_chunk(chunk, planes + next * kChunkWords, column, step);
    }
    if (t + 2 < count) load_chunk(a, chunk, list + 2 * (t + 2), bits_from, first_column + column, step);

    u32 left[4][kSteps][4], some = 0;
    VIDOPS_UNROLL
    for (int m = 0; m < 4; ++m) {
      const u32* word = bits + now * kProductRows + warp_row + m * 16 + group;
      const u32 upper = word[0], lower = word[8];
      some |= upper | lower;
      VIDOPS_UNROLL
      for (int s = 0; s < kSteps; ++s) {
        left[m][s][0] = upper >> quad << (14 - 8 * s) & kTwos;
        left[m][s][1] = lower >> quad << (14 - 8 * s) & kTwos;
        left[m][s][2] = upper >> quad << (10 - 8 * s) & kTwos;
        left[m][s][3] = lower >> quad << (10 - 8 * s) & kTwos;
      }
    }
    if (ballot(some != 0)) {
      const u32* right = planes + now * kChunkWords + group * 8 + (quad / 2 ^ group / 4) * 4 + quad % 2 * 2;
      VIDOPS_UNROLL
      for (int n = 0; n < 4; ++n) {
        // The matrix unit truncates where it adds. A chunk of its own keeps that to a few roundings, smallest
        // terms first; the chunks are added to nearest.
        float part[4][4] = {};
        VIDOPS_UNROLL
        for (int plane = kPlanes - 1; plane >= 0; --plane) {
          VIDOPS_UNROLL
          for (int s = 0; s < kSteps; ++s) {
            const int place = (plane * kSteps + s) * (kProductCols / 8) + warp_column / 8 + n;
            const Words2 b = *reinterpret_cast<const Words2*>(right + place * kFragment);
            VIDOPS_UNROLL
            for (int m = 0; m < 4; ++m) mma_bfloat(part[m], left[m][s], b.v);
          }
        }
        VIDOPS_UNROLL
        for (int m = 0; m < 4; ++m)
          VIDOPS_UNROLL
          for (int e = 0; e < 4; ++e) sum[m][n][e] += part[m][e];
      }
    }
    block_sync();
  }

  VIDOPS_UNROLL
  for (int m = 0; m < 4; ++m) {
    VIDOPS_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int place = first_row + warp_row + m * 16 + half * 8 + group;
      if (place >= distinct) continue;
      const int row = a.distinct[place];
      const float norm = 2.0f * a.norm[row];
      float* to = a.mean + (i64)row * a.cols;
      VIDOPS_UNROLL
      for (int n = 0; n < 4; ++n) {
        const int c = first_column + warp_column + n * 8 + quad * 2;
        if (c < a.cols) to[c] = sum[m][n][half * 2] / norm;
        if (c + 1 < a.cols) to[c + 1] = sum[m][n][half * 2 + 1] / norm;
      }
    }
  }
}

// One block per row that is not its own first.
VIDOPS_KERNEL(kCopyThreads) neighbour_mean_copy(NeighbourMeanArgs a) {
  const int row = (int)block_x(), first = a.first[row];
  if (first == row) return;
  const float* from = a.mean + (i64)first * a.cols;
  float* to = a.mean + (i64)row * a.cols;
  constexpr int kAhead = 4;
  for (int base = thread_x(); base < a.cols; base += kAhead * kCopyThreads) {
    float v[kAhead];
    VIDOPS_UNROLL
    for (int u = 0; u < kAhead; ++u) {
      const int c = base + u * kCopyThreads;
      v[u] = c < a.cols ? from[c] : 0.0f;
    }
    VIDOPS_UNROLL
    for (int u = 0; u < kAhead; ++u) {
      const int c = base + u * kCopyThreads;
      if (c < a.cols) to[c] = v[u];
    }
  }
}

}  // namespace vidops::cuda
