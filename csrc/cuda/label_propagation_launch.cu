#include <algorithm>
#include <cmath>

#include "label_propagation.cu"
#include "launch.cuh"
#include "vidops/label_propagation.h"

namespace vidops {
namespace {

constexpr const char* kOp = "label_propagation";
constexpr int64_t kBlocksPerProcessor = 4;  // two at a time; more of them share the work more evenly

int64_t element_bytes(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// Shared memory of a scan whose patches have so many queries; sets where its parts are.
template <class Features>
int64_t lay_out_shared(int64_t queries, int64_t k, cuda::LabelPropagationArgs& args) {
  constexpr int64_t kReal = sizeof(typename Features::Real);
  const int64_t scores = Features::kStages * cuda::FeatureLoader<Features>::kStageBytes;
  const int64_t tiles = scores + queries * (Features::kPositions + cuda::kScorePad) * kReal;
  const int64_t lists = tiles + cuda::round_up(sizeof(cuda::ContextTiles), 16);
  args.scores = static_cast<int>(scores), args.tiles = static_cast<int>(tiles), args.lists = static_cast<int>(lists);
  return lists + queries * k * (kReal + static_cast<int64_t>(sizeof(int)));
}

// How a call is cut, by its sizes and the device alone.
struct Plan {
  cuda::LabelPropagationArgs args{};
  int64_t shared_bytes = 0;

  Plan(const LabelPropagationCudaSizes& sizes, int64_t shared_limit, int64_t processors) {
    const int64_t width = sizes.width, height = sizes.tokens / width;
    args.frames = cuda::to_int(kOp, sizes.frames), args.tokens = cuda::to_int(kOp, sizes.tokens);
    args.height = static_cast<int>(height), args.width = static_cast<int>(width);
    args.k = cuda::to_int(kOp, sizes.k);
    // Squares have the smallest windows; grids of a few rows or columns have none.
    int64_t tall = 8, wide = 8;
    while (tall > 1 && tall / 2 >= height) tall /= 2, wide *= 2;
    while (wide > 1 && wide / 2 >= width && tall < height) wide /= 2, tall *= 2;
    while ((shared_bytes = lay_out(sizes, tall * wide)) > shared_limit && tall * wide > 1)
      (tall > 1 ? tall : wide) /= 2;
    args.patch_height = static_cast<int>(tall), args.patch_width = static_cast<int>(wide);
    args.patches_across = static_cast<int>(cuda::ceil_div(width, wide));
    args.patches = cuda::to_int(kOp, cuda::ceil_div(height, tall) * args.patches_across);
    // Not many more shares than there are tiles, whose number depends on the patch: an empty one does no harm.
    const int64_t most = sizes.frames * cuda::ceil_div(sizes.tokens, cuda::DoubleFeatures::kPositions);
    const int64_t wanted = kBlocksPerProcessor * processors / args.patches;
    args.splits = static_cast<int>(std::min(std::max<int64_t>(wanted, 1), most));
  }

  int64_t lay_out(const LabelPropagationCudaSizes& sizes, int64_t queries) {
    if (sizes.element_bytes == 8) return lay_out_shared<cuda::DoubleFeatures>(queries, sizes.k, args);
    if (sizes.element_bytes == 4) return lay_out_shared<cuda::FloatFeatures>(queries, sizes.k, args);
    return lay_out_shared<cuda::HalfFeatures>(queries, sizes.k, args);
  }
};

void lay_out_scratch(cuda::Arena& arena, bool f64, cuda::LabelPropagationArgs& args) {
  const int64_t count = int64_t{args.splits} * args.tokens * args.k;
  args.found_value = f64 ? static_cast<void*>(arena.take<double>(count)) : arena.take<float>(count);
  args.found_index = arena.take<int>(count);
}

// The largest x with x * x < limit.
int64_t reach_of(int64_t limit) {
  int64_t x = static_cast<int64_t>(std::sqrt(static_cast<double>(limit)));
  while (x * x >= limit) --x;
  while ((x + 1) * (x + 1) < limit) ++x;
  return x;
}

bool whole_rows(const TensorView& t) {
  const int64_t bytes = element_bytes(t.dtype), last = t.rank - 1;
  bool whole = reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.shape[last] * bytes % 16 == 0;
  for (int axis = 0; axis < last; ++axis) whole = whole && t.stride[axis] * bytes % 16 == 0;
  return whole;
}

void launch_scan(DType dtype, const Plan& plan, const cuda::LabelPropagationArgs& args, void* stream) {
  using namespace cuda;
  const auto kernel = dtype == DType::f64   ? label_propagation_scan_f64
                      : dtype == DType::f32 ? label_propagation_scan_f32
                      : dtype == DType::f16 ? label_propagation_scan_f16
                                            : label_propagation_scan_bf16;
  VIDOPS_LAUNCH(kOp, kernel, Grid{grid_x(kOp, int64_t{args.patches} * args.splits)}, kScanThreads,
                static_cast<size_t>(plan.shared_bytes), stream, args);
}

void launch_merge(bool f64, const cuda::LabelPropagationArgs& args, void* stream) {
  using namespace cuda;
  constexpr int kWarps = kMergeThreads / kWarp;
  // A weight and the place of its labels for every match.
  const size_t shared = static_cast<size_t>(2 * kWarps * args.k) * sizeof(i64);
  VIDOPS_LAUNCH(kOp, (f64 ? label_propagation_merge_f64 : label_propagation_merge_f32),
                Grid{grid_x(kOp, ceil_div(args.tokens, kWarps))}, kMergeThreads, shared, stream, args);
}

}  // namespace

int64_t label_propagation_workspace_cuda(const LabelPropagationCudaSizes& sizes, int device) {
  const cuda::DeviceGuard guard(kOp, device);
  Plan plan(sizes, static_cast<int64_t>(cuda::shared_limit(kOp)), cuda::multiprocessors(kOp));
  cuda::Arena arena;
  lay_out_scratch(arena, sizes.element_bytes == 8, plan.args);
  return arena.words();
}

void label_propagation_forward_cuda(const LabelPropagationParams& params, int device, void* stream) {
  using namespace cuda;
  const DeviceGuard guard(kOp, device);
  const TensorView &query = params.query, &context = params.context, &labels = params.labels;
  const DType dtype = query.dtype;
  const bool f64 = dtype == DType::f64;
  require(f64 || dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16,
          std::string(kOp) + ": query has an unsupported dtype");
  require_dtype(kOp, "context", context, dtype);
  const DType wide = f64 ? DType::f64 : DType::f32;
  require_dtype(kOp, "labels", labels, wide);
  require_dtype(kOp, "out", params.out, wide);
  require_dtype(kOp, "weight", params.weight, wide);
  require_dtype(kOp, "index", params.index, DType::i64);

  const LabelPropagationCudaSizes sizes{context.shape[0], query.shape[0], params.width, params.index.shape[1],
                                        element_bytes(dtype)};
  require(sizes.k > 0 && sizes.k <= kMaxMatches, std::string(kOp) + ": number of matches out of range");
  const Plan plan(sizes, static_cast<int64_t>(shared_limit(kOp)), multiprocessors(kOp));
  LabelPropagationArgs args = plan.args;
  Arena arena(kOp, params.workspace, label_propagation_workspace_cuda(sizes, device));
  lay_out_scratch(arena, f64, args);
  args.query = query.data, args.query_row = query.stride[0];
  args.context = context.data, args.context_frame = context.stride[0], args.context_row = context.stride[1];
  args.labels = labels.data, args.labels_frame = labels.stride[0], args.labels_row = labels.stride[1];
  args.channels = to_int(kOp, query.shape[1]);
  args.labels_count = to_int(kOp, labels.shape[2]);
  args.limit = params.limit;
  args.reach = static_cast<int>(std::min<int64_t>(reach_of(params.limit), std::max(args.height, args.width)));
  args.unrestricted = to_int(kOp, params.unrestricted);
  args.repeats = static_cast<int>(std::min(params.repeats, sizes.k));
  args.temperature = params.temperature;
  args.whole = whole_rows(query) && whole_rows(context);
  args.out = params.out.data, args.index = params.index.as<i64>(), args.weight = params.weight.data;
  launch_scan(dtype, plan, args, stream);
  launch_merge(f64, args, stream);
}

}  // namespace vidops
