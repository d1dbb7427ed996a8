#include <algorithm>

#include "assign_clusters.cu"
#include "attention_launch.cuh"
#include "launch.cuh"
#include "vidops/assign_clusters.h"
#include "vidops/assign_rows.h"

namespace vidops {
namespace {

constexpr const char* kOp = "assign_clusters";
constexpr int64_t kPassBytes = int64_t{128} << 20;  // of the rows of P that exist at a time

// How the queries are cut.
struct Pass {
  int64_t rows;  // of every pass but the last
  int64_t last;

  Pass(int64_t queries, int64_t keys, int64_t clusters, int64_t pass_rows) {
    // P and its logarithm in single precision, both packed by assign_rows, and the scores.
    const int64_t row_bytes = 2 * (sizeof(float) + sizeof(cuda::u16)) * keys + sizeof(float) * clusters;
    const int64_t tiles = std::max<int64_t>(kPassBytes / row_bytes / 128, 1);
    rows = std::min(queries, pass_rows > 0 ? pass_rows : tiles * 128);
    last = rows > 0 ? (queries - 1) % rows + 1 : 0;
  }
};

// Scratch memory, laid out once for all passes: packed keys and centroids stay where the first pass puts them.
struct Scratch {
  cuda::AttentionArgs attention;
  float *p, *log_p, *lse;
  int64_t assign_words;
  int64_t* assign;

  Scratch(cuda::Arena& arena, const Pass& pass, const cuda::AttentionSizes& sizes, int64_t clusters, bool f32) {
    assign_words = std::max(assign_rows_workspace_cuda(pass.rows, sizes.m, clusters, pass.rows),
                            assign_rows_workspace_cuda(pass.last, sizes.m, clusters, pass.last));
    assign = arena.take<int64_t>(assign_words);
    p = arena.take<float>(pass.rows * sizes.m);
    log_p = arena.take<float>(pass.rows * sizes.m);
    lse = arena.take<float>(sizes.heads * pass.rows);
    attention = cuda::attention_plan(kOp, arena, {1, sizes.heads, pass.rows, sizes.m, sizes.d}, {f32, false, false});
  }
};

TensorView matrix(const TensorView& like, void* data, DType dtype, int64_t rows, int64_t columns) {
  TensorView v = like;
  v.data = data, v.dtype = dtype, v.rank = 2;
  v.shape[0] = rows, v.shape[1] = columns;
  v.stride[0] = columns, v.stride[1] = 1;
  return v;
}

TensorView vector(const TensorView& like, void* data, DType dtype, int64_t count) {
  TensorView v = like;
  v.data = data, v.dtype = dtype, v.rank = 1;
  v.shape[0] = count, v.stride[0] = 1;
  return v;
}

// (H,rows,D) as (1,H,rows,D), from row `first` on.
TensorView batched(const TensorView& t, int64_t first, int64_t rows) {
  TensorView v = t;
  const int64_t bytes = t.dtype == DType::f32 ? 4 : 2;
  v.data = static_cast<char*>(t.data) + first * t.stride[1] * bytes;
  v.rank = 4;
  v.shape[0] = 1, v.shape[1] = t.shape[0], v.shape[2] = rows, v.shape[3] = t.shape[2];
  v.stride[0] = 0, v.stride[1] = t.stride[0], v.stride[2] = t.stride[1], v.stride[3] = t.stride[2];
  return v;
}

}  // namespace

int64_t assign_clusters_workspace_cuda(int64_t heads, int64_t queries, int64_t channels, int64_t keys,
                                       int64_t clusters, bool f32, int64_t pass_rows) {
  cuda::Arena arena;
  const Pass pass(queries, keys, clusters, pass_rows);
  const Scratch scratch(arena, pass, {1, heads, queries, keys, channels}, clusters, f32);
  return arena.words();
}

void assign_clusters_forward_cuda(const AssignClustersParams& params, int device, void* stream) {
  using namespace cuda;
  const DeviceGuard guard(kOp, device);
  const TensorView &q = params.q, &k = params.k;
  require_dtype(kOp, "centroids", params.centroids, DType::f32);
  require_dtype(kOp, "log_centroids", params.log_centroids, DType::f32);
  const int64_t heads = q.shape[0], queries = q.shape[1], channels = q.shape[2], keys = k.shape[1];
  const int64_t clusters = params.centroids.shape[0];
  if (queries == 0) return;
  const TensorView all_q = batched(q, 0, queries), all_k = batched(k, 0, keys);
  attention_check(kOp, all_q, all_q, queries, "q");
  attention_check(kOp, all_q, all_k, keys, "k");
  if (params.lse.present()) require_dtype(kOp, "lse", params.lse, DType::f32);

  const bool f32 = q.dtype == DType::f32;
  const Pass pass(queries, keys, clusters, params.pass_rows);
  Arena arena(kOp, params.workspace,
              assign_clusters_workspace_cuda(heads, queries, channels, keys, clusters, f32, params.pass_rows));
  const Scratch scratch(arena, pass, {1, heads, queries, keys, channels}, clusters, f32);
  AttentionArgs attention = scratch.attention;
  attention_set_scale(attention, params.scale);
  attention_set_dropout(kOp, attention, 0.0, 0);
  attention.lse = scratch.lse;
  attention.p = scratch.p;
  attention.log_p = scratch.log_p;

  for (int64_t first = 0; first < queries; first += pass.rows) {
    const int64_t rows = std::min(pass.rows, queries - first);
    attention.n = to_int(kOp, rows);
    attention.q.rows = to_int(kOp, round_up(rows, kRowTile));
    const AttentionInput inputs[] = {{batched(q, first, rows), attention.q, true}, {all_k, attention.k, true}};
    if (first == 0) {
      attention_launch_pack(kOp, attention, inputs, 2, stream);
    } else {
      // Ranges are cleared from that of q to that of g: only that of q, the keys keep theirs.
      AttentionArgs queries_only = attention;
      queries_only.g.range = queries_only.q.range;
      attention_launch_pack(kOp, queries_only, inputs, 1, stream);
    }
    if (params.lse.present()) {
      AssignClustersArgs args{};
      args.lse = params.lse.as<const float>() + first * params.lse.stride[1];
      args.head_stride = params.lse.stride[0], args.row_stride = params.lse.stride[1];
      args.rows = to_int(kOp, rows);
      args.lse2 = attention.lse2;
      VIDOPS_LAUNCH(kOp, assign_clusters_log_sums,
                    (Grid{grid_x(kOp, ceil_div(rows, kLogSumThreads)), grid_yz(kOp, heads)}), kLogSumThreads, 0,
                    stream, args);
    } else {
      attention_launch_lse(kOp, attention, q.dtype, stream);
    }
    attention_launch_map(kOp, attention, q.dtype, stream);

    AssignRowsParams assign{};
    assign.p = matrix(params.centroids, scratch.p, DType::f32, rows, keys);
    assign.log_p = matrix(params.centroids, scratch.log_p, DType::f32, rows, keys);
    assign.centroids = params.centroids, assign.log_centroids = params.log_centroids;
    assign.label = vector(params.label, params.label.as<int64_t>() + first, DType::i64, rows);
    assign.workspace = vector(params.workspace, scratch.assign, DType::i64, scratch.assign_words);
    assign.pass_rows = rows;
    assign.centroids_ready = first > 0;
    assign_rows_forward_cuda(assign, device, stream);
  }
}

}  // namespace vidops
