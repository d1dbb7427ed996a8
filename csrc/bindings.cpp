// The module and its CPU half: one thin function per native entry point.
#include <pybind11/pybind11.h>

#include <iterator>
#include <string>

#include "bindings.h"
#include "vidops/assign_clusters.h"
#include "vidops/assign_rows.h"
#include "vidops/attention_head_mean.h"
#include "vidops/bipartite_match.h"
#include "vidops/cpu_isa.h"
#include "vidops/gather_tokens.h"
#include "vidops/greedy_absorb.h"
#include "vidops/greedy_absorb_kl.h"
#include "vidops/label_propagation.h"
#include "vidops/nearest_kept.h"
#include "vidops/neighbour_mean.h"
#include "vidops/segment_mean.h"
#include "vidops/slot_attend.h"
#include "vidops/slot_iterations.h"
#include "vidops/slot_side.h"
#include "vidops/sta_score.h"
#include "vidops/symmetric_kl.h"
#include "vidops/symmetric_kl_adjacency.h"
#include "vidops/video_attention.h"

namespace py = pybind11;

namespace {

using py::capsule;
using vidops::bindings::slot_weights;
using vidops::bindings::view;

void slot_iterations_inputs(vidops::SlotIterationsParams& a, capsule inputs, const py::list& weights,
                            capsule token_mask, capsule slot_mask, capsule states, capsule record, int64_t groups,
                            double scale, double eps, double denominator, double ln_eps) {
  a.inputs = view(inputs), a.weights = slot_weights(weights), a.states = view(states), a.record = view(record);
  a.token_mask = view(token_mask), a.slot_mask = view(slot_mask);
  a.groups = groups, a.scale = scale, a.eps = eps, a.denominator = denominator, a.ln_eps = ln_eps;
}

// What forward and backward of slot attention share.
void slot_attend_inputs(vidops::SlotAttendParams& a, capsule keys, capsule values, capsule mean, capsule rstd,
                        capsule q, capsule c, capsule token_mask, capsule slot_mask, int64_t groups, bool joint,
                        double eps) {
  a.keys = view(keys), a.values = view(values), a.mean = view(mean), a.rstd = view(rstd), a.q = view(q), a.c = view(c);
  a.token_mask = view(token_mask), a.slot_mask = view(slot_mask);
  a.groups = groups, a.joint = joint, a.eps = eps;
}

void sta_score_views(vidops::StaScoreParams& a, capsule x, capsule metric, capsule keep, capsule activation,
                     capsule acc, capsule score, capsule first_order, capsule first_similarity) {
  a.x = view(x), a.metric = view(metric), a.keep = view(keep), a.activation = view(activation);
  a.acc = view(acc), a.score = view(score);
  a.first_order = view(first_order), a.first_similarity = view(first_similarity);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  py::register_exception<vidops::ArgumentError>(m, "ArgumentError", PyExc_ValueError);
  m.attr("source_hash") = VIDOPS_SOURCE_HASH;
  m.attr("compiler") = VIDOPS_COMPILER;
  py::list architectures;
#ifdef VIDOPS_WITH_CUDA
  const std::string list = VIDOPS_CUDA_ARCHS;
  for (size_t from = 0; from < list.size();) {
    size_t to = list.find(',', from);
    if (to == std::string::npos) to = list.size();
    architectures.append("sm_" + list.substr(from, to - from));
    from = to + 1;
  }
#endif
  m.attr("cuda_architectures") = py::tuple(architectures);
  m.def("cpu_isa", &vidops::cpu_isa);
  m.def("cpu_isas", [] {
    py::list names;
    for (const auto& name : vidops::cpu_isas()) names.append(name);
    return names;
  });
  m.def("set_cpu_isa", [](const std::string& name) { vidops::set_cpu_isa(name.c_str()); });

  m.def("attention_head_mean_forward_cpu",
        [](capsule q, capsule k, capsule p, capsule log_p, capsule lse, double scale, double dropout_p, uint64_t seed,
           int threads) {
          vidops::AttentionHeadMeanParams a;
          a.q = view(q), a.k = view(k), a.p = view(p), a.log_p = view(log_p), a.lse = view(lse);
          a.scale = scale, a.dropout_p = dropout_p, a.seed = seed;
          py::gil_scoped_release release;
          vidops::attention_head_mean_forward_cpu(a, threads);
        });
  m.def("attention_head_mean_backward_cpu",
        [](capsule grad_p, capsule q, capsule k, capsule lse, capsule grad_q, capsule grad_k, double scale,
           double dropout_p, uint64_t seed, int threads) {
          vidops::AttentionHeadMeanBackwardParams a;
          a.grad_p = view(grad_p), a.q = view(q), a.k = view(k), a.lse = view(lse);
          a.grad_q = view(grad_q), a.grad_k = view(grad_k);
          a.scale = scale, a.dropout_p = dropout_p, a.seed = seed;
          py::gil_scoped_release release;
          vidops::attention_head_mean_backward_cpu(a, threads);
        });
  m.def("video_attention_forward_cpu",
        [](capsule q, capsule k, capsule v, capsule out, capsule map, capsule lse, double scale, double dropout_p,
           uint64_t seed, int threads) {
          vidops::VideoAttentionParams a;
          a.q = view(q), a.k = view(k), a.v = view(v), a.out = view(out), a.map = view(map), a.lse = view(lse);
          a.scale = scale, a.dropout_p = dropout_p, a.seed = seed;
          py::gil_scoped_release release;
          vidops::video_attention_forward_cpu(a, threads);
        });
  m.def("video_attention_backward_cpu",
        [](capsule grad_out, capsule grad_map, capsule q, capsule k, capsule v, capsule out, capsule lse,
           capsule grad_q, capsule grad_k, capsule grad_v, double scale, double dropout_p, uint64_t seed, int threads) {
          vidops::VideoAttentionBackwardParams a;
          a.grad_out = view(grad_out), a.grad_map = view(grad_map);
          a.q = view(q), a.k = view(k), a.v = view(v), a.out = view(out), a.lse = view(lse);
          a.grad_q = view(grad_q), a.grad_k = view(grad_k), a.grad_v = view(grad_v);
          a.scale = scale, a.dropout_p = dropout_p, a.seed = seed;
          py::gil_scoped_release release;
          vidops::video_attention_backward_cpu(a, threads);
        });
  m.def("symmetric_kl_forward_cpu",
        [](capsule p, capsule log_p, capsule q, capsule log_q, capsule distance, bool same, int threads) {
          vidops::SymmetricKlParams a;
          a.p = view(p), a.log_p = view(log_p), a.q = view(q), a.log_q = view(log_q), a.distance = view(distance);
          a.same = same;
          py::gil_scoped_release release;
          vidops::symmetric_kl_forward_cpu(a, threads);
        });
  m.def("symmetric_kl_adjacency_forward_cpu",
        [](capsule p, capsule log_p, capsule adjacency, double tau, bool filtered, int threads) {
          vidops::SymmetricKlAdjacencyParams a;
          a.p = view(p), a.log_p = view(log_p), a.adjacency = view(adjacency);
          a.tau = tau, a.filtered = filtered;
          py::gil_scoped_release release;
          vidops::symmetric_kl_adjacency_forward_cpu(a, threads);
        });
  m.def("neighbour_mean_forward_cpu", [](capsule adjacency, capsule p, capsule mean, int threads) {
    vidops::NeighbourMeanParams a;
    a.adjacency = view(adjacency), a.p = view(p), a.mean = view(mean);
    py::gil_scoped_release release;
    vidops::neighbour_mean_forward_cpu(a, threads);
  });
  m.def("greedy_absorb_forward_cpu",
        [](capsule adjacency, capsule owner, capsule label, capsule count, int threads) {
          vidops::GreedyAbsorbParams a;
          a.adjacency = view(adjacency), a.owner = view(owner), a.label = view(label), a.count = view(count);
          py::gil_scoped_release release;
          vidops::greedy_absorb_forward_cpu(a, threads);
        });
  m.def("greedy_absorb_kl_forward_cpu",
        [](capsule p, capsule log_p, capsule owner, capsule label, capsule count, double tau, int threads) {
          vidops::GreedyAbsorbKlParams a;
          a.p = view(p), a.log_p = view(log_p);
          a.owner = view(owner), a.label = view(label), a.count = view(count);
          a.tau = tau;
          py::gil_scoped_release release;
          vidops::greedy_absorb_kl_forward_cpu(a, threads);
        });
  m.def("bipartite_match_forward_cpu", [](capsule metric, capsule order, capsule similarity, capsule partner,
                                          bool class_token, bool distill_token, int threads) {
    vidops::BipartiteMatchParams a;
    a.metric = view(metric), a.order = view(order), a.similarity = view(similarity), a.partner = view(partner);
    a.class_token = class_token, a.distill_token = distill_token;
    py::gil_scoped_release release;
    vidops::bipartite_match_forward_cpu(a, threads);
  });
  m.def("sta_score_forward_cpu",
        [](capsule x, capsule metric, capsule keep, capsule activation, capsule acc, capsule score,
           capsule first_order, capsule first_similarity, bool reverse, bool first_frame_pruned, int threads) {
          vidops::StaScoreParams a;
          sta_score_views(a, x, metric, keep, activation, acc, score, first_order, first_similarity);
          a.reverse = reverse, a.first_frame_pruned = first_frame_pruned;
          py::gil_scoped_release release;
          vidops::sta_score_forward_cpu(a, threads);
        });
  m.def("sta_prune_forward_cpu",
        [](capsule source, capsule kept, capsule x, capsule metric, capsule keep, capsule activation, capsule acc,
           capsule score, capsule first_order, capsule first_similarity, bool reverse, bool first_frame_pruned,
           int threads) {
          vidops::StaScoreParams a;
          a.source = view(source), a.kept = view(kept);
          sta_score_views(a, x, metric, keep, activation, acc, score, first_order, first_similarity);
          a.reverse = reverse, a.first_frame_pruned = first_frame_pruned;
          py::gil_scoped_release release;
          vidops::sta_score_forward_cpu(a, threads);
        });
  m.def("gather_tokens_forward_cpu", [](capsule x, capsule index, capsule out, int threads) {
    vidops::GatherTokensParams a;
    a.x = view(x), a.index = view(index), a.out = view(out);
    py::gil_scoped_release release;
    vidops::gather_tokens_forward_cpu(a, threads);
  });
  m.def("scatter_tokens_forward_cpu", [](capsule x, capsule index, capsule out, int threads) {
    vidops::GatherTokensParams a;
    a.x = view(x), a.index = view(index), a.out = view(out);
    py::gil_scoped_release release;
    vidops::scatter_tokens_forward_cpu(a, threads);
  });
  m.def("nearest_kept_forward_cpu", [](capsule keep, capsule source, int64_t width, int threads) {
    vidops::NearestKeptParams a;
    a.keep = view(keep), a.source = view(source), a.width = width;
    py::gil_scoped_release release;
    vidops::nearest_kept_forward_cpu(a, threads);
  });
  m.def("segment_mean_forward_cpu", [](capsule x, capsule label, capsule mean, int threads) {
    vidops::SegmentMeanParams a;
    a.x = view(x), a.label = view(label), a.mean = view(mean);
    py::gil_scoped_release release;
    vidops::segment_mean_forward_cpu(a, threads);
  });
  m.def("assign_clusters_forward_cpu",
        [](capsule q, capsule k, capsule lse, capsule centroids, capsule log_centroids, capsule label, double scale,
           int threads) {
          vidops::AssignClustersParams a;
          a.q = view(q), a.k = view(k), a.lse = view(lse);
          a.centroids = view(centroids), a.log_centroids = view(log_centroids), a.label = view(label);
          a.scale = scale;
          py::gil_scoped_release release;
          vidops::assign_clusters_forward_cpu(a, threads);
        });
  m.def("assign_rows_forward_cpu",
        [](capsule p, capsule log_p, capsule centroids, capsule log_centroids, capsule label, int threads) {
          vidops::AssignRowsParams a;
          a.p = view(p), a.log_p = view(log_p);
          a.centroids = view(centroids), a.log_centroids = view(log_centroids), a.label = view(label);
          py::gil_scoped_release release;
          vidops::assign_rows_forward_cpu(a, threads);
        });
  m.def("slot_attend_forward_cpu",
        [](capsule keys, capsule values, capsule mean, capsule rstd, capsule q, capsule c, capsule token_mask,
           capsule slot_mask, int64_t groups, bool joint, double eps, capsule num, capsule den, capsule dots,
           capsule attn, double norm_eps, int threads) {
          vidops::SlotAttendForwardParams a;
          a.norm_eps = norm_eps;
          slot_attend_inputs(a, keys, values, mean, rstd, q, c, token_mask, slot_mask, groups, joint, eps);
          a.num = view(num), a.den = view(den), a.dots = view(dots), a.attn = view(attn);
          py::gil_scoped_release release;
          vidops::slot_attend_forward_cpu(a, threads);
        });
  m.def("slot_attend_backward_cpu",
        [](capsule grad_num, capsule grad_den, capsule grad_dots, capsule grad_attn, capsule keys, capsule values,
           capsule mean, capsule rstd, capsule q, capsule c, capsule token_mask, capsule slot_mask, int64_t groups,
           bool joint, double eps, capsule grad_keys, capsule grad_values, capsule grad_q, capsule grad_c, bool add,
           int threads) {
          vidops::SlotAttendBackwardParams a;
          a.add = add;
          slot_attend_inputs(a, keys, values, mean, rstd, q, c, token_mask, slot_mask, groups, joint, eps);
          a.grad_num = view(grad_num), a.grad_den = view(grad_den);
          a.grad_dots = view(grad_dots), a.grad_attn = view(grad_attn);
          a.grad_keys = view(grad_keys), a.grad_values = view(grad_values);
          a.grad_q = view(grad_q), a.grad_c = view(grad_c);
          py::gil_scoped_release release;
          vidops::slot_attend_backward_cpu(a, threads);
        });
  m.def("token_statistics_cpu", [](capsule rows, capsule mean, capsule rstd, double eps, int threads) {
    vidops::TokenStatisticsParams a;
    a.rows = view(rows), a.mean = view(mean), a.rstd = view(rstd);
    a.eps = eps;
    py::gil_scoped_release release;
    vidops::token_statistics_cpu(a, threads);
  });
  m.def("product_cpu", [](capsule a, bool a_turned, capsule b, bool b_turned, capsule bias, capsule out, bool add,
                          int threads) {
    vidops::ProductParams p;
    p.a = view(a), p.b = view(b), p.bias = view(bias), p.out = view(out);
    p.a_turned = a_turned, p.b_turned = b_turned, p.add = add;
    py::gil_scoped_release release;
    vidops::product_cpu(p, threads);
  });
  m.def("slot_iterations_forward_cpu",
        [](capsule inputs, capsule slots, py::list weights, capsule token_mask, capsule slot_mask, capsule out,
           capsule states, capsule record, capsule dots, capsule attn, int64_t iters, int64_t groups, double scale,
           double eps, double denominator, double ln_eps, int threads) {
          vidops::SlotIterationsForwardParams a;
          slot_iterations_inputs(a, inputs, weights, token_mask, slot_mask, states, record, groups, scale, eps,
                                 denominator, ln_eps);
          a.slots = view(slots), a.out = view(out), a.dots = view(dots), a.attn = view(attn), a.iters = iters;
          py::gil_scoped_release release;
          vidops::slot_iterations_forward_cpu(a, threads);
        });
  m.def("slot_iterations_backward_cpu",
        [](capsule inputs, py::list weights, capsule token_mask, capsule slot_mask, capsule states, capsule record,
           capsule grad_dots, capsule grad_attn, capsule grad_slots, capsule grad_inputs, py::list grads,
           int64_t groups, double scale, double eps, double denominator, double ln_eps, int threads) {
          vidops::SlotIterationsBackwardParams a;
          slot_iterations_inputs(a, inputs, weights, token_mask, slot_mask, states, record, groups, scale, eps,
                                 denominator, ln_eps);
          a.grad_dots = view(grad_dots), a.grad_attn = view(grad_attn);
          a.grad_slots = view(grad_slots), a.grad_inputs = view(grad_inputs), a.grads = slot_weights(grads);
          py::gil_scoped_release release;
          vidops::slot_iterations_backward_cpu(a, threads);
        });
  m.def("slot_iterations_release_cpu", vidops::slot_iterations_release_cpu);
  m.def("token_norm_grad_cpu", [](capsule rows, capsule mean, capsule rstd, capsule grad, int threads) {
    vidops::TokenNormGradParams p;
    p.rows = view(rows), p.mean = view(mean), p.rstd = view(rstd), p.grad = view(grad);
    py::gil_scoped_release release;
    vidops::token_norm_grad_cpu(p, threads);
  });
  m.def("label_propagation_forward_cpu",
        [](capsule query, capsule context, capsule labels, capsule out, capsule index, capsule weight, int64_t width,
           int64_t limit, double temperature, int64_t unrestricted, int64_t repeats, int threads) {
          vidops::LabelPropagationParams a;
          a.query = view(query), a.context = view(context), a.labels = view(labels);
          a.out = view(out), a.index = view(index), a.weight = view(weight);
          a.width = width, a.limit = limit, a.temperature = temperature;
          a.unrestricted = unrestricted, a.repeats = repeats;
          py::gil_scoped_release release;
          vidops::label_propagation_forward_cpu(a, threads);
        });

#ifdef VIDOPS_WITH_CUDA
  vidops::bindings::bind_cuda(m);
#endif
}
