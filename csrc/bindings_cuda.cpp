// The CUDA half of the module: one thin function per launcher. The tests bind the same file to the host shim.
#include <cstdint>

#include "bindings.h"
#include "vidops/assign_clusters.h"
#include "vidops/assign_rows.h"
#include "vidops/attention_head_mean.h"
#include "vidops/greedy_absorb.h"
#include "vidops/greedy_absorb_kl.h"
#include "vidops/label_propagation.h"
#include "vidops/neighbour_mean.h"
#include "vidops/segment_mean.h"
#include "vidops/slot_attend_cuda.h"
#include "vidops/slot_iterations_cuda.h"
#include "vidops/slot_steps_cuda.h"
#include "vidops/symmetric_kl.h"
#include "vidops/symmetric_kl_adjacency.h"
#include "vidops/token_cuda.h"
#include "vidops/video_attention.h"

namespace vidops::bindings {
namespace {

// Masks, mean and rstd may be empty.
SlotAttendCudaInputs slot_attend_inputs(const pybind11::capsule& keys, const pybind11::capsule& values,
                                        const pybind11::capsule& mean, const pybind11::capsule& rstd,
                                        const pybind11::capsule& q, const pybind11::capsule& c,
                                        const pybind11::capsule& token_mask, const pybind11::capsule& slot_mask) {
  SlotAttendCudaInputs in;
  in.keys = view(keys), in.values = view(values), in.mean = view(mean), in.rstd = view(rstd);
  in.q = view(q), in.c = view(c), in.token_mask = view(token_mask), in.slot_mask = view(slot_mask);
  return in;
}

// `weights` are those of vidops.SlotParams in its order; any but those of q, k and v may be empty.
void set_slot_weights(SlotIterationsCudaParams& a, const pybind11::list& weights) {
  TensorView* const named[] = {
      &a.norm_input_weight, &a.norm_input_bias, &a.norm_slots_weight, &a.norm_slots_bias, &a.q_weight,
      &a.q_bias,            &a.k_weight,        &a.k_bias,            &a.v_weight,        &a.v_bias,
      &a.merge_weight,      &a.merge_bias,      &a.gru_weight_ih,     &a.gru_weight_hh,   &a.gru_bias_ih,
      &a.gru_bias_hh,       &a.norm_mlp_weight, &a.norm_mlp_bias,     &a.mlp_weight1,     &a.mlp_bias1,
      &a.mlp_weight2,       &a.mlp_bias2};
  require(weights.size() == sizeof named / sizeof *named, "slot_iterations: one entry for every weight");
  for (size_t i = 0; i < weights.size(); ++i) *named[i] = view(weights[i].cast<pybind11::capsule>());
}

// `numbers`: groups, scale, eps, denominator, ln_eps, and whether the activation is GELU.
template <class Params>
void set_slot_steps(Params& a, const pybind11::capsule& inputs, const pybind11::list& weights,
                    const pybind11::capsule& token_mask, const pybind11::capsule& slot_mask,
                    const pybind11::capsule& states, const pybind11::tuple& numbers) {
  a.inputs = view(inputs), a.weights = slot_weights(weights), a.states = view(states);
  a.token_mask = view(token_mask), a.slot_mask = view(slot_mask);
  const auto number = [&](size_t i) { return numbers[i].cast<double>(); };
  a.groups = numbers[0].cast<int64_t>(), a.scale = number(1), a.eps = number(2), a.denominator = number(3);
  a.ln_eps = number(4), a.gelu = numbers[5].cast<bool>();
}

// Asks for scratch by its size in words, then runs.
template <class Params>
void run_slot_steps(Params& a, const pybind11::function& allocate, int device, uintptr_t stream,
                    int64_t (*words)(const Params&, int), void (*run)(const Params&, int, void*)) {
  const pybind11::object workspace = allocate(words(a, device));
  a.workspace = view(workspace.cast<pybind11::capsule>());
  pybind11::gil_scoped_release release;
  run(a, device, reinterpret_cast<void*>(stream));
}

}  // namespace

void bind_cuda(pybind11::module_& m) {
  namespace py = pybind11;
  using py::capsule;

  m.def("assign_clusters_workspace_cuda", &assign_clusters_workspace_cuda);
  m.def("assign_rows_workspace_cuda", &assign_rows_workspace_cuda);
  m.def("attention_head_mean_workspace_cuda", &attention_head_mean_workspace_cuda);
  m.def("bipartite_match_workspace_cuda", &bipartite_match_workspace_cuda);
  m.def("scatter_tokens_workspace_cuda", &scatter_tokens_workspace_cuda);
  m.def("sta_score_workspace_cuda", &sta_score_workspace_cuda);
  m.def("greedy_absorb_kl_workspace_cuda", &greedy_absorb_kl_workspace_cuda);
  m.def("greedy_absorb_workspace_cuda", &greedy_absorb_workspace_cuda);
  m.def("label_propagation_workspace_cuda",
        [](int64_t frames, int64_t tokens, int64_t width, int64_t k, int64_t element_bytes, int device) {
          return label_propagation_workspace_cuda({frames, tokens, width, k, element_bytes}, device);
        });
  m.def("neighbour_mean_workspace_cuda", &neighbour_mean_workspace_cuda);
  m.def("segment_mean_workspace_cuda", &segment_mean_workspace_cuda);
  m.def("slot_attend_workspace_cuda",
        [](int64_t batch, int64_t heads, int64_t slots, int64_t n, int64_t dk, int64_t dv, int64_t key_heads,
           int64_t value_heads, int64_t groups, int64_t width, bool joint, bool shared, bool backward, int device) {
          const SlotAttendCudaSizes sizes{batch,       heads,  slots, n,     dk,    dv,
                                          key_heads, value_heads, groups, width, joint, shared};
          return slot_attend_workspace_cuda(sizes, backward, device);
        });
  m.def("slot_iterations_workspace_cuda",
        [](int64_t batch, int64_t n, int64_t din, int64_t slots, int64_t d, int64_t hq, int64_t hv, int64_t du,
           int64_t hidden, int64_t width, bool gru, int64_t cluster, int device) {
          const SlotIterationsCudaSizes sizes{batch, n, din, slots, d, hq, hv, du, hidden, width, gru, cluster};
          return slot_iterations_workspace_cuda(sizes, device);
        });
  m.def("symmetric_kl_adjacency_workspace_cuda", &symmetric_kl_adjacency_workspace_cuda);
  m.def("symmetric_kl_workspace_cuda", &symmetric_kl_workspace_cuda);
  m.def("video_attention_workspace_cuda", &video_attention_workspace_cuda);
  m.def("assign_clusters_forward_cuda",
        [](capsule q, capsule k, capsule lse, capsule centroids, capsule log_centroids, capsule label,
           capsule workspace, double scale, int64_t pass_rows, int device, uintptr_t stream) {
          AssignClustersParams a;
          a.q = view(q), a.k = view(k), a.lse = view(lse);
          a.centroids = view(centroids), a.log_centroids = view(log_centroids);
          a.label = view(label), a.workspace = view(workspace);
          a.scale = scale, a.pass_rows = pass_rows;
          py::gil_scoped_release release;
          assign_clusters_forward_cuda(a, device, reinterpret_cast<void*>(stream));
        });
  m.def("assign_rows_forward_cuda",
        [](capsule p, capsule log_p, capsule centroids, capsule log_centroids, capsule label, capsule workspace,
           int64_t pass_rows, int device, uintptr_t stream) {
          AssignRowsParams a;
          a.p = view(p), a.log_p = view(log_p);
          a.centroids = view(centroids), a.log_centroids = view(log_centroids);
          a.label = view(label), a.workspace = view(workspace);
          a.pass_rows = pass_rows;
          py::gil_scoped_release release;
          assign_rows_forward_cuda(a, device, reinterpret_cast<void*>(stream));
        });
  m.def("attention_head_mean_forward_cuda",
        [](capsule q, capsule k, capsule p, capsule log_p, capsule lse, capsule workspace, double scale,
           double dropout_p, uint64_t seed, int device, uintptr_t stream) {
          AttentionHeadMeanParams a;
          a.q = view(q), a.k = view(k), a.p = view(p), a.log_p = view(log_p), a.lse = view(lse);
          a.workspace = view(workspace);
          a.scale = scale, a.dropout_p = dropout_p, a.seed = seed;
          py::gil_scoped_release release;
          attention_head_mean_forward_cuda(a, device, reinterpret_cast<void*>(stream));
        });
  m.def("attention_head_mean_backward_cuda",
        [](capsule grad_p, capsule q, capsule k, capsule lse, capsule grad_q, capsule grad_k, capsule workspace,
           double scale, double dropout_p, uint64_t seed, int device, uintptr_t stream) {
          AttentionHeadMeanBackwardParams a;
          a.grad_p = view(grad_p), a.q = view(q), a.k = view(k), a.lse = view(lse);
          a.grad_q = view(grad_q), a.grad_k = view(grad_k), a.workspace = view(workspace);
          a.scale = scale, a.dropout_p = dropout_p, a.seed = seed;
          py::gil_scoped_release release;
          attention_head_mean_backward_cuda(a, device, reinterpret_cast<void*>(stream));
        });
  m.def("greedy_absorb_forward_cuda", [](capsule adjacency, capsule owner, capsule label, capsule count,
                                         capsule workspace, int device, uintptr_t stream) {
    GreedyAbsorbParams a;
    a.adjacency = view(adjacency), a.owner = view(owner), a.label = view(label), a.count = view(count);
    a.workspace = view(workspace);
    py::gil_scoped_release release;
    greedy_absorb_forward_cuda(a, device, reinterpret_cast<void*>(stream));
  });
  m.def("greedy_absorb_kl_forward_cuda",
        [](capsule p, capsule log_p, capsule owner, capsule label, capsule count, capsule workspace,
           double tau, int device, uintptr_t stream) {
          GreedyAbsorbKlParams a;
          a.p = view(p), a.log_p = view(log_p);
          a.owner = view(owner), a.label = view(label), a.count = view(count);
          a.workspace = view(workspace), a.tau = tau;
          py::gil_scoped_release release;
          greedy_absorb_kl_forward_cuda(a, device, reinterpret_cast<void*>(stream));
        });
  m.def("label_propagation_forward_cuda",
        [](capsule query, capsule context, capsule labels, capsule out, capsule index, capsule weight,
           capsule workspace, int64_t width, int64_t limit, double temperature, int64_t unrestricted, int64_t repeats,
           int device, uintptr_t stream) {
          LabelPropagationParams a;
          a.query = view(query), a.context = view(context), a.labels = view(labels);
          a.out = view(out), a.index = view(index), a.weight = view(weight);
          a.workspace = view(workspace);
          a.width = width, a.limit = limit, a.temperature = temperature;
          a.unrestricted = unrestricted, a.repeats = repeats;
          py::gil_scoped_release release;
          label_propagation_forward_cuda(a, device, reinterpret_cast<void*>(stream));
        });
  m.def("neighbour_mean_forward_cuda", [](capsule adjacency, capsule p, capsule mean, capsule workspace, int device,
                                          uintptr_t stream) {
    NeighbourMeanParams a;
    a.adjacency = view(adjacency), a.p = view(p), a.mean = view(mean);
    a.workspace = view(workspace);
    py::gil_scoped_release release;
    neighbour_mean_forward_cuda(a, device, reinterpret_cast<void*>(stream));
  });
  m.def("bipartite_match_forward_cuda",
        [](capsule metric, capsule order, capsule similarity, capsule partner, capsule workspace, bool class_token,
           bool distill_token, int device, uintptr_t stream) {
          BipartiteMatchCudaParams a;
          a.metric = view(metric), a.order = view(order), a.similarity = view(similarity), a.partner = view(partner);
          a.workspace = view(workspace);
          a.class_token = class_token, a.distill_token = distill_token;
          py::gil_scoped_release release;
          bipartite_match_forward_cuda(a, device, reinterpret_cast<void*>(stream));
        });
  m.def("sta_score_forward_cuda",
        [](capsule x, capsule metric, capsule keep, capsule activation, capsule acc, capsule score,
           capsule first_order, capsule first_similarity, capsule workspace, bool reverse, bool first_frame_pruned,
           int device, uintptr_t stream) {
          StaScoreCudaParams a;
          a.x = view(x), a.metric = view(metric), a.keep = view(keep), a.activation = view(activation);
          a.acc = view(acc), a.score = view(score);
          a.first_order = view(first_order), a.first_similarity = view(first_similarity);
          a.workspace = view(workspace);
          a.reverse = reverse, a.first_frame_pruned = first_frame_pruned;
          py::gil_scoped_release release;
          sta_score_forward_cuda(a, device, reinterpret_cast<void*>(stream));
        });
  m.def("gather_tokens_forward_cuda", [](capsule x, capsule index, capsule out, int device, uintptr_t stream) {
    GatherTokensCudaParams a;
    a.x = view(x), a.index = view(index), a.out = view(out);
    py::gil_scoped_release release;
    gather_tokens_forward_cuda(a, device, reinterpret_cast<void*>(stream));
  });
  m.def("scatter_tokens_forward_cuda",
        [](capsule x, capsule index, capsule out, capsule workspace, int device, uintptr_t stream) {
          GatherTokensCudaParams a;
          a.x = view(x), a.index = view(index), a.out = view(out), a.workspace = view(workspace);
          py::gil_scoped_release release;
          scatter_tokens_forward_cuda(a, device, reinterpret_cast<void*>(stream));
        });
  m.def("nearest_kept_forward_cuda", [](capsule keep, capsule source, int64_t width, int device, uintptr_t stream) {
    NearestKeptCudaParams a;
    a.keep = view(keep), a.source = view(source), a.width = width;
    py::gil_scoped_release release;
    nearest_kept_forward_cuda(a, device, reinterpret_cast<void*>(stream));
  });
  m.def("segment_mean_forward_cuda",
        [](capsule x, capsule label, capsule mean, capsule workspace, int device, uintptr_t stream) {
          SegmentMeanParams a;
          a.x = view(x), a.label = view(label), a.mean = view(mean);
          a.workspace = view(workspace);
          py::gil_scoped_release release;
          segment_mean_forward_cuda(a, device, reinterpret_cast<void*>(stream));
        });
  m.def("slot_attend_forward_cuda",
        [](capsule keys, capsule values, capsule mean, capsule rstd, capsule q, capsule c, capsule token_mask,
           capsule slot_mask, capsule num, capsule den, capsule dots, capsule attn, capsule workspace, int64_t groups,
           bool joint, double eps, int device, uintptr_t stream) {
          SlotAttendCudaParams a;
          a.in = slot_attend_inputs(keys, values, mean, rstd, q, c, token_mask, slot_mask);
          a.in.workspace = view(workspace);
          a.in.groups = groups, a.in.joint = joint, a.in.eps = eps;
          a.num = view(num), a.den = view(den), a.dots = view(dots), a.attn = view(attn);
          py::gil_scoped_release release;
          slot_attend_forward_cuda(a, device, reinterpret_cast<void*>(stream));
        });
  m.def("slot_attend_backward_cuda",
        [](capsule grad_num, capsule grad_den, capsule grad_dots, capsule grad_attn, capsule keys, capsule values,
           capsule mean, capsule rstd, capsule q, capsule c, capsule token_mask, capsule slot_mask, capsule grad_keys,
           capsule grad_values, capsule grad_q, capsule grad_c, capsule workspace, int64_t groups, bool joint,
           double eps, bool add, int device, uintptr_t stream) {
          SlotAttendCudaBackwardParams a;
          a.in = slot_attend_inputs(keys, values, mean, rstd, q, c, token_mask, slot_mask);
          a.in.workspace = view(workspace);
          a.in.groups = groups, a.in.joint = joint, a.in.eps = eps, a.add = add;
          a.grad_num = view(grad_num), a.grad_den = view(grad_den);
          a.grad_dots = view(grad_dots), a.grad_attn = view(grad_attn);
          a.grad_keys = view(grad_keys), a.grad_values = view(grad_values);
          a.grad_q = view(grad_q), a.grad_c = view(grad_c);
          py::gil_scoped_release release;
          slot_attend_backward_cuda(a, device, reinterpret_cast<void*>(stream));
        });
  m.def("slot_iterations_forward_cuda",
        [](capsule inputs, capsule slots, py::list weights, capsule token_mask, capsule slot_mask, capsule out,
           capsule states, capsule dots, capsule attn, capsule workspace, int64_t iters, double scale, double eps,
           double denominator, double ln_eps, bool gelu, int64_t cluster, int device, uintptr_t stream) {
          SlotIterationsCudaParams a;
          a.inputs = view(inputs), a.slots = view(slots);
          set_slot_weights(a, weights);
          a.token_mask = view(token_mask), a.slot_mask = view(slot_mask);
          a.out = view(out), a.states = view(states), a.dots = view(dots), a.attn = view(attn);
          a.workspace = view(workspace);
          a.iters = iters, a.scale = scale, a.eps = eps, a.denominator = denominator, a.ln_eps = ln_eps;
          a.gelu = gelu, a.cluster = cluster;
          py::gil_scoped_release release;
          slot_iterations_forward_cuda(a, device, reinterpret_cast<void*>(stream));
        });
  m.def("slot_steps_forward_cuda",
        [](capsule inputs, py::list weights, capsule token_mask, capsule slot_mask, capsule states, capsule slots,
           capsule out, capsule dots, capsule attn, int64_t iters, py::tuple numbers, py::function allocate,
           int device, uintptr_t stream) {
          SlotStepsForwardCudaParams a;
          set_slot_steps(a, inputs, weights, token_mask, slot_mask, states, numbers);
          a.slots = view(slots), a.out = view(out), a.dots = view(dots), a.attn = view(attn), a.iters = iters;
          run_slot_steps(a, allocate, device, stream, slot_steps_forward_workspace_cuda, slot_steps_forward_cuda);
        });
  m.def("slot_steps_backward_cuda",
        [](capsule inputs, py::list weights, capsule token_mask, capsule slot_mask, capsule states, capsule grad_dots,
           capsule grad_attn, capsule grad_slots, capsule grad_inputs, py::list grads, py::tuple numbers,
           py::function allocate, int device, uintptr_t stream) {
          SlotStepsBackwardCudaParams a;
          set_slot_steps(a, inputs, weights, token_mask, slot_mask, states, numbers);
          a.grad_dots = view(grad_dots), a.grad_attn = view(grad_attn);
          a.grad_slots = view(grad_slots), a.grad_inputs = view(grad_inputs), a.grads = slot_weights(grads);
          run_slot_steps(a, allocate, device, stream, slot_steps_backward_workspace_cuda, slot_steps_backward_cuda);
        });
  m.def("symmetric_kl_forward_cuda",
        [](capsule p, capsule log_p, capsule q, capsule log_q, capsule distance, capsule workspace, bool same,
           int device, uintptr_t stream) {
          SymmetricKlParams a;
          a.p = view(p), a.log_p = view(log_p), a.q = view(q), a.log_q = view(log_q);
          a.distance = view(distance), a.workspace = view(workspace), a.same = same;
          py::gil_scoped_release release;
          symmetric_kl_forward_cuda(a, device, reinterpret_cast<void*>(stream));
        });
  m.def("symmetric_kl_adjacency_forward_cuda",
        [](capsule p, capsule log_p, capsule adjacency, capsule workspace, double tau, bool filtered,
           int device, uintptr_t stream) {
          SymmetricKlAdjacencyParams a;
          a.p = view(p), a.log_p = view(log_p), a.adjacency = view(adjacency);
          a.workspace = view(workspace), a.tau = tau, a.filtered = filtered;
          py::gil_scoped_release release;
          symmetric_kl_adjacency_forward_cuda(a, device, reinterpret_cast<void*>(stream));
        });
  m.def("token_statistics_cuda",
        [](capsule x, capsule mean, capsule rstd, double eps, int device, uintptr_t stream) {
          TokenStatisticsCudaParams a;
          a.x = view(x), a.mean = view(mean), a.rstd = view(rstd), a.eps = eps;
          py::gil_scoped_release release;
          token_statistics_cuda(a, device, reinterpret_cast<void*>(stream));
        });
  m.def("video_attention_forward_cuda",
        [](capsule q, capsule k, capsule v, capsule out, capsule map, capsule lse, capsule workspace, double scale,
           double dropout_p, uint64_t seed, int device, uintptr_t stream) {
          VideoAttentionParams a;
          a.q = view(q), a.k = view(k), a.v = view(v), a.out = view(out), a.map = view(map), a.lse = view(lse);
          a.workspace = view(workspace);
          a.scale = scale, a.dropout_p = dropout_p, a.seed = seed;
          py::gil_scoped_release release;
          video_attention_forward_cuda(a, device, reinterpret_cast<void*>(stream));
        });
  m.def("video_attention_backward_cuda",
        [](capsule grad_out, capsule grad_map, capsule q, capsule k, capsule v, capsule out, capsule lse,
           capsule grad_q, capsule grad_k, capsule grad_v, capsule workspace, double scale, double dropout_p,
           uint64_t seed, int device, uintptr_t stream) {
          VideoAttentionBackwardParams a;
          a.grad_out = view(grad_out), a.grad_map = view(grad_map), a.q = view(q), a.k = view(k), a.v = view(v);
          a.out = view(out), a.lse = view(lse);
          a.grad_q = view(grad_q), a.grad_k = view(grad_k), a.grad_v = view(grad_v), a.workspace = view(workspace);
          a.scale = scale, a.dropout_p = dropout_p, a.seed = seed;
          py::gil_scoped_release release;
          video_attention_backward_cuda(a, device, reinterpret_cast<void*>(stream));
        });
}

}  // namespace vidops::bindings
