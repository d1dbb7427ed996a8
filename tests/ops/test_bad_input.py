"""Wrong calls: each gets a typed error that names the argument, on every op, before any backend is chosen."""

import inspect
import itertools

import pytest
import torch

import vidops

NAN, INF = float("nan"), float("inf")
F = torch.ones


def _not_floats(shape):
    yield from (
        None,
        1.0,
        "x",
        [1.0],
        F(*shape).numpy(),
        F(*shape, dtype=torch.int64),
        F(*shape, dtype=torch.bool),
        F(*shape, dtype=torch.complex64),
        F(*shape, dtype=torch.float8_e4m3fn) if hasattr(torch, "float8_e4m3fn") else 1,
        F(*shape).to_sparse(),
    )


def _wrong_ranks(ranks):
    for rank in ranks:
        yield F(*([2] * rank)) if rank else torch.tensor(1.0)


def _numbers():
    yield from (None, "1", [1.0], True, NAN, INF, -INF, torch.tensor(1.0), 1j)


def _pair_cases(function, fine, extra=()):
    """Bad q and bad k, each beside a good partner of shape `fine`."""
    good = F(*fine)
    ranks = [r for r in range(0, 8) if r != len(fine) and not (function is vidops.attention_head_mean and 3 <= r <= 5)]
    for bad in itertools.chain(_not_floats(fine), _wrong_ranks(ranks)):
        yield (bad, good, *extra), {}, "q"
        yield (good, bad, *extra), {}, "k"
    yield (good, good.double(), *extra), {}, "k"
    yield (good, good.half(), *extra), {}, "k"
    yield (good, good[..., :0], *extra), {}, "k"
    yield (good, good[..., :0, :], *extra), {}, "k"
    yield (good, good[..., :1], *extra), {}, "k"
    yield (good[..., :0], good[..., :0], *extra), {}, "q"
    yield (good, F(*fine[:-3], fine[-3] + 1, *fine[-2:]), *extra), {}, "k"
    yield (good, good.to("meta"), *extra), {}, "k"
    for bad in (b for b in _numbers() if b is not None):
        yield (good, good, *extra), {"scale": bad}, "scale"


def _map_cases(function, *rest):
    good = torch.full((4, 3), 1 / 3)
    for bad in itertools.chain(_not_floats((4, 3)), _wrong_ranks((0, 1, 4, 5))):
        yield (bad, *rest), {}, "p"
    yield (good[:, :0], *rest), {}, "p"
    if function is not vidops.neighbour_mean:
        for bad in itertools.chain(_not_floats((4, 3)), [good.double(), good[:3], good[:, :2], good[None]]):
            if bad is not None:
                yield (good, *rest), {"log_p": bad}, "log_p"


def _bit_cases():
    good = F(4, 1, dtype=torch.int64)
    yield from (None, 1, "x", [[1]], good.numpy(), good.int(), good.float(), good.bool(), good.to(torch.uint8))
    yield from (good[0], good[None], good.to_sparse(), good.bfloat16())
    yield from (F(n, words, dtype=torch.int64) for n, words in ((4, 2), (65, 1), (4, 0), (0, 1), (64, 2), (129, 2)))


_PROPAGATION = (F(6, 4), F(3, 6, 4), F(3, 6, 2), (2, 3))


def _propagation_cases():
    query, context, labels, grid = _PROPAGATION
    for bad in (*_not_floats((6, 4)), *_wrong_ranks((0, 1, 3)), query[:0], query[:, :0]):
        yield (bad, context, labels, grid), {}, "query"
    halves = (context.double(), context.half(), context.to("meta"))
    shapes = (context[:0], context[:, :5], context[..., :3], context[0], context[None])
    for bad in (*_not_floats((3, 6, 4)), *halves, *shapes, context[:1].expand(2**29, 6, 4)):
        yield (query, bad, labels, grid), {}, "context"
    shapes = (labels[:2], labels[:, :5], labels[..., :0], labels[0], labels[None])
    for bad in (*_not_floats((3, 6, 2)), labels.double(), labels.to("meta"), *shapes):
        yield (query, context, bad, grid), {}, "labels"
    for bad in (None, 6, "23", (6,), (1, 2, 3), (2, 2), (2.0, 3), (-2, -3), (0, 6), ("2", "3"), (True, 6), {2, 3}):
        yield (query, context, labels, bad), {}, "grid"
    for name, values in (
        ("top_k", (0, -1, 129, 1.0, None, "1", True)),
        ("radius", (0, 0.0, -1.0, *_numbers())),
        ("temperature", (0, -0.2, 1e-300, *_numbers())),
        ("unrestricted", (-1, 4, 1.0, None, True)),
        ("repeats", (-1, 1.0, None, "1", True)),
    ):
        for bad in values:
            yield _PROPAGATION, {name: bad}, name


def _backends(*args):
    for bad in ("gpu", "CPU", "Reference", 1, "triton "):
        yield args, {"backend": bad}, "backend"


def _slot_cases():
    """Bad arguments of `slot_attention` beside good ones; `slot_step` takes all of them but `iters`."""
    x, slots = F(2, 5, 3), F(2, 4, 6)
    weights = {
        "norm_input_weight": F(3), "norm_input_bias": F(3), "norm_slots_weight": F(6), "norm_slots_bias": F(6),
        "q_weight": F(8, 6), "q_bias": F(8), "k_weight": F(8, 3), "k_bias": F(8), "v_weight": F(4, 3), "v_bias": F(4),
        "merge_weight": F(7, 4), "merge_bias": F(7), "gru_weight_ih": F(18, 7), "gru_weight_hh": F(18, 6),
        "gru_bias_ih": F(18), "gru_bias_hh": F(18), "norm_mlp_weight": F(6), "norm_mlp_bias": F(6),
        "mlp_weight1": F(9, 6), "mlp_bias1": F(9), "mlp_weight2": F(6, 9), "mlp_bias2": F(6),
    }  # fmt: skip

    def params(**changed):
        return vidops.SlotParams(**{**weights, **changed})

    good = params()
    for bad in itertools.chain(_not_floats((2, 5, 3)), _wrong_ranks((0, 1, 2, 4))):
        yield (bad, slots, good), {}, "inputs"
    for bad in itertools.chain(_not_floats((2, 4, 6)), _wrong_ranks((0, 1, 2, 4))):
        yield (x, bad, good), {}, "slots"
    yield from (((bad, slots, good), {}, "inputs") for bad in (x[:, :0], x[..., :0]))
    yield from (((x, bad, good), {}, "slots") for bad in (slots[:, :0], slots[..., :0], slots[:1], slots.to("meta")))
    yield from (((x, bad, good), {}, "slots") for bad in (slots.double(), slots.half(), slots.bfloat16()))
    yield (x.double(), slots, good), {}, "slots"
    yield (x, slots[..., :5], good), {}, "params."
    yield (x[..., :2], slots, good), {}, "params."
    yield from (((x, slots, bad), {}, "params") for bad in (None, 1, weights, tuple(weights.values()), F(8, 6)))
    for name, weight in weights.items():
        for bad in (1.0, "x", weight.numpy(), weight.to_sparse(), weight.int(), weight.double(), weight.to("meta")):
            yield (x, slots, params(**{name: bad})), {}, f"params.{name}"
        for bad in (weight[None], weight[0], F(*weight.shape[:-1], weight.shape[-1] + 1)):
            yield (x, slots, params(**{name: bad})), {}, "params."
    for name in ("q_weight", "k_weight", "v_weight"):
        yield (x, slots, params(**{name: None})), {}, f"params.{name}"
    for name in ("merge_weight", "gru_weight_ih", "gru_weight_hh", "mlp_weight1", "mlp_weight2"):
        yield (x, slots, params(**{name: None})), {}, "params."
    no_gru = dict.fromkeys(("gru_weight_ih", "gru_weight_hh", "gru_bias_ih", "gru_bias_hh"))
    yield (x, slots, params(**no_gru)), {}, "params.merge_weight"
    yield (x, slots, params(**no_gru, merge_weight=None, merge_bias=None)), {}, "params.v_weight"
    for bad in (0, -1, 1.5, None, "1", True, [1], torch.tensor(1)):
        yield (x, slots, good), {"heads": bad}, "heads"
        yield (x, slots, good), {"groups": bad}, "groups"
    yield (x, slots, good), {"heads": 3}, "params.q_weight"
    yield (x, slots, params(v_weight=F(6, 3), v_bias=F(6), merge_weight=F(7, 6))), {"heads": 4}, "params.v_weight"
    yield (x, slots, good), {"groups": 3}, "groups"
    yield (x, slots, good), {"groups": 2, "joint_heads": True}, "groups"
    for name in ("scale", "eps", "extra_denominator", "ln_eps"):
        for bad in (b for b in _numbers() if b is not None):
            yield (x, slots, good), {name: bad}, name
    for name in ("eps", "extra_denominator", "ln_eps"):
        yield (x, slots, good), {name: -1e-3}, name
    yield (x, slots, good), {"ln_eps": 0.0}, "ln_eps"
    yield (x, slots, good), {"eps_in_denominator": True, "extra_denominator": 1.0}, "extra_denominator"
    for name in ("joint_heads", "eps_in_denominator", "return_dots", "return_attn"):
        for bad in (None, 0, 1, "yes", torch.tensor(True)):
            yield (x, slots, good), {name: bad}, name
    for bad in ("tanh", "ReLU", None, 1, ""):
        yield (x, slots, good), {"activation": bad}, "activation"
        yield (x, slots, good), {"grad_mode": bad}, "grad_mode"
    mask = F(2, 1, 5)
    bad_masks = (1, "x", mask.numpy(), mask.to_sparse(), mask.int(), mask[0], mask[:, :, :4], F(2, 2, 5), mask[:1])
    for bad in (*bad_masks, mask.to("meta")):
        yield (x, slots, good), {"token_mask": bad}, "token_mask"
    kept = torch.zeros(2, 4, dtype=torch.bool)
    for bad in (1, "x", kept.numpy(), kept.float(), kept.int(), kept[0], kept[:, :3], kept[:1], kept.to("meta")):
        yield (x, slots, good), {"slot_mask": bad}, "slot_mask"
    for bad in ("gpu", "CPU", 1, "triton "):
        yield (x, slots, good), {"backend": bad}, "backend"


_CLIP = F(2, 12, 4), F(2, 12, 3)
_INDEX = torch.zeros(2, 5, dtype=torch.int64)


def _score_cases():
    """Three groups of four tokens."""
    x, keys = _CLIP
    for bad in itertools.chain(_not_floats((2, 12, 4)), _wrong_ranks((0, 1, 2, 4)), [x[:, :0], x[..., :0]]):
        yield (bad, keys, 3, 1), {}, "x"
    for bad in itertools.chain(_not_floats((2, 12, 3)), _wrong_ranks((0, 1, 2, 4)), [keys[:, :0], keys[..., :0]]):
        yield (x, bad, 3, 1), {}, "metric"
    for bad in (keys[:1], keys[:, :11], keys.double(), keys.half(), keys.to("meta")):
        yield (x, bad, 3, 1), {}, "metric"
    for bad in (0, -1, 5, 24, 1.0, None, "3", True, [3]):
        yield (x, keys, bad, 1), {}, "num_frames"
    for bad in (-1, 4, 5, 1000, 1.0, None, "1", True, [1]):
        yield (x, keys, 3, bad), {}, "r"
    for bad in (0, 1, None, "yes", torch.tensor(True)):
        yield (x, keys, 3, 1, bad), {}, "reverse"
        yield (x, keys, 3, 1), {"first_frame_pruned": bad}, "first_frame_pruned"


def _key_cases(*flags):
    keys = _CLIP[1]
    for bad in itertools.chain(_not_floats((2, 12, 3)), _wrong_ranks((0, 1, 2, 4, 5, 6, 7)), _wrong_ranks((8, 9))):
        yield (bad,), {}, "metric"
    for shape in ((2, 0, 3), (2, 12, 0), (0, 0, 3), (0, 2, 0), (1, 0, 1), (1, 1, 0), (5, 0, 0), (0, 0, 0)):
        yield (F(*shape),), {}, "metric"
        yield (F(*shape, dtype=torch.float64),), {}, "metric"
    for name in flags:
        for bad in (0, 1, None, "yes", torch.tensor(True)):
            yield (keys,), {name: bad}, name


def _index_cases(name, good):
    """`good` (2, 5) with values in [0, 12)."""
    yield from ((bad, name) for bad in (None, 1, [[0]], "x", good.numpy(), good.float(), good.int(), good.bool()))
    yield from ((bad, name) for bad in (good[0], good[None], good[:1], good - 1, good + 12, good.to("meta")))


def _token_cases():
    x = _CLIP[0]
    for bad in itertools.chain(_not_floats((2, 12, 4)), _wrong_ranks((0, 1, 9))):
        yield (bad, _INDEX), {}, "x"
    for bad, name in _index_cases("index", _INDEX):
        yield (x, bad), {}, name
    for far in (12, 13, 2**31, 2**40, -2, -(2**40)):
        yield (x, torch.tensor([[0, far], [0, 0]])), {}, "index"
    yield from (((x[:, :size], _INDEX + size), {}, "index") for size in range(8))


def _merge_cases():
    x, keys = _CLIP
    for bad in itertools.chain(_not_floats((2, 12, 4)), _wrong_ranks((0, 1, 2, 4))):
        yield (bad, keys, 1), {}, "x"
    for bad in itertools.chain(_not_floats((2, 12, 3)), _wrong_ranks((0, 1, 2, 4)), [keys[:1], keys[:, :3]]):
        yield (x, bad, 1), {}, "metric"
    yield from (((x, keys, bad), {}, "r") for bad in (-1, 1.0, None, "1", True))
    size = F(2, 12, 1)
    for bad in (1, "x", size.numpy(), size.int(), size.double(), size[0], size[:1], size[..., 0], size.to("meta")):
        yield (x, keys, 1, bad), {}, "size"
    for bad in (0, 1, None, "yes"):
        yield (x, keys, 1), {"class_token": bad, "distill_token": True}, "class_token"
        yield (x, keys, 1), {"distill_token": bad}, "distill_token"
    yield (x, keys, 1), {"distill_token": True}, "distill_token"


def _pruning():
    x, keys = _CLIP
    for name in ("sta_score", "sta_prune"):
        yield name, itertools.chain(_score_cases(), _backends(x, keys, 3, 1))
    yield "bipartite_match", itertools.chain(_key_cases("class_token", "distill_token"), _backends(keys))
    yield "first_frame_order", itertools.chain(_key_cases(), _backends(keys))
    yield "gather_tokens", itertools.chain(_token_cases(), _backends(x, _INDEX))
    rows = x[:, :5]
    yield "scatter_tokens", itertools.chain(
        (((b, _INDEX, 12), {}, "x") for b in itertools.chain(_not_floats((2, 5, 4)), _wrong_ranks((0, 1, 9)))),
        (((rows, b, 12), {}, n) for b, n in _index_cases("index", _INDEX)),
        (((rows[:, :size], _INDEX, 12), {}, "index") for size in range(5)),
        (((rows, _INDEX, b), {}, "num_tokens") for b in (-1, 1.0, None, "12", True)),
        (((rows, _INDEX + b, b), {}, "index") for b in range(8)),
        _backends(rows, _INDEX, 12),
    )
    yield "nearest_kept", itertools.chain(
        (((b, (3, 4)), {}, "keep") for b, _ in _index_cases("keep", _INDEX) if not _fits_a_grid(b)),
        (((_INDEX[:, :0], (3, 4)), {}, "keep"), ((_INDEX[0, 0], (3, 4)), {}, "keep")),
        (((_INDEX, b), {}, "grid") for b in (None, 12, "34", (12,), (3, 4, 1), (0, 4), (3, 0), (-3, -4), (3.0, 4))),
        (((_INDEX, b), {}, "grid") for b in ((1024, 1024), (2**20, 1), (True, 4), ("3", 4), {3, 4}, {3: 4, 4: 3}, ())),
        (((_INDEX + h * w, (h, w)), {}, "keep") for h in (1, 2, 3) for w in (1, 2, 3)),
        _backends(_INDEX, (3, 4)),
    )
    yield "nearest_fill", itertools.chain(
        (((b, _INDEX, (3, 4)), {}, "x") for b in itertools.chain(_not_floats((2, 5, 4)), _wrong_ranks((0, 1, 9)))),
        (((rows, b, (3, 4)), {}, "keep") for b, _ in _index_cases("keep", _INDEX)),
        (((rows[:, :size], _INDEX, (3, 4)), {}, "keep") for size in range(5)),
        (((rows, _INDEX, b), {}, "grid") for b in (None, 12, "34", (12,), (3, 4, 1), (0, 4), (3, 0), (3.0, 4))),
        _backends(rows, _INDEX, (3, 4)),
    )
    yield "token_merge", itertools.chain(_merge_cases(), _backends(x, keys, 1))
    q, size = F(1, 2, 3, 4), F(1, 3, 1)
    yield "proportional_attention", [
        *(((b, q, q, size), {}, "q") for b in itertools.chain(_not_floats((1, 2, 3, 4)), _wrong_ranks((0, 1, 2, 3)))),
        *(((q, b, q, size), {}, "k") for b in (*_not_floats((1, 2, 3, 4)), q.double(), q[0], q[:, :1], q[..., :2])),
        *(((q, q, b, size), {}, "v") for b in (*_not_floats((1, 2, 3, 4)), q.double(), q[0], q[:, :1], q[:, :, :2])),
        *(((q, q, q, b), {}, "size") for b in (None, 1, size.double(), size.int(), size[0], size[:, :2], F(1, 3, 2))),
        *(((q, q, q, size), {"scale": b}, "scale") for b in _numbers() if b is not None),
    ]


def _fits_a_grid(value):
    """`nearest_kept` takes any rank, and has no other tensor to be on the device of."""
    is_index = isinstance(value, torch.Tensor) and value.dtype == torch.int64
    return is_index and (value.is_meta or bool((value == 0).all()))


def _cases():
    yield from _pruning()
    slot_calls = list(_slot_cases())
    x, slots, params = F(2, 5, 3), F(2, 4, 3), vidops.SlotParams(q_weight=F(4, 3), k_weight=F(4, 3), v_weight=F(3, 3))
    yield "slot_attention", [
        *((args, {"iters": 2, **options}, argument) for args, options, argument in slot_calls),
        *(((x, slots, params), {"iters": b}, "iters") for b in (0, -1, 1.5, None, "3", True, [1], torch.tensor(1))),
    ]
    yield "slot_step", itertools.chain(slot_calls, [((x, slots, params), {"iters": 1}, "iters")])
    q3, q4 = F(2, 3, 4), F(1, 2, 3, 4)
    rows, bits = torch.full((4, 3), 1 / 3), F(4, 1, dtype=torch.int64)
    yield "attention_head_mean", itertools.chain(
        _pair_cases(vidops.attention_head_mean, (2, 3, 4)), _backends(q3, q3)
    )
    video = [
        *(((b, q4, q4), {}, "q") for b in _not_floats((1, 2, 3, 4))),
        *(((q4, b, q4), {}, "k") for b in _not_floats((1, 2, 3, 4))),
        *(((q4, q4, b), {}, "v") for b in itertools.chain(_not_floats((1, 2, 3, 4)), _wrong_ranks((0, 1, 2, 3, 5)))),
        *(((q4, q4, b), {}, "v") for b in (q4.double(), q4[:, :, :2], q4[..., :2], q4[:, :1], q4.to("meta"))),
        *(((q4, q4, q4), {"dropout_p": b, "seed": 1}, "dropout_p") for b in (-0.1, 1.0, 2, NAN, "0", None, True)),
        *(((q4, q4, q4), {"dropout_p": 0.5, "seed": b}, "seed") for b in (None, -1, 1.5, "1", True)),
        *(((q4, q4, q4), {"need": b}, "need") for b in ("maps", None, 1, "")),
        *(((q4, q4, q4), {"scale": b}, "scale") for b in _numbers() if b is not None),
    ]
    yield "video_attention", itertools.chain(video, _backends(q4, q4, q4))
    kl = [
        *_map_cases(vidops.symmetric_kl),
        *(((rows, b), {}, "q") for b in _not_floats((4, 3)) if b is not None),
        *(((rows, b), {}, "q") for b in (rows.double(), rows[0], rows[None], rows[:, :2], rows[:, :0])),
        ((rows, rows.to("meta")), {}, "q"),
        ((rows,), {"log_q": rows}, "log_q"),
        *(((rows, rows), {"log_q": b}, "log_q") for b in (rows.double(), rows[:2], 1, "x")),
    ]
    yield "symmetric_kl", itertools.chain(kl, _backends(rows))
    adjacency = [
        *_map_cases(vidops.symmetric_kl_adjacency, 1.0),
        *(((rows, b), {}, "tau") for b in _numbers()),
        *(((rows, 1.0), {"precision": b}, "precision") for b in ("fast", None, 1, "", "Exact")),
    ]
    yield "symmetric_kl_adjacency", itertools.chain(adjacency, _backends(rows, 1.0))
    mean = [
        *(((b, rows), {}, "adjacency") for b in _bit_cases()),
        *(((bits, b), {}, "p") for b in itertools.chain(_not_floats((4, 3)), _wrong_ranks((0, 1, 3, 4)))),
        *(((bits, b), {}, "p") for b in (rows[:3], F(5, 3), F(0, 3), rows.to("meta"))),
    ]
    yield "neighbour_mean", itertools.chain(mean, _backends(bits, rows))
    yield "greedy_absorb", itertools.chain(
        (((b,), {}, "adjacency") for b in _bit_cases()),
        (((F(n, n % 7 + 3, dtype=torch.int64),), {}, "adjacency") for n in range(1, 27)),
        _backends(bits),
    )
    yield "greedy_absorb_kl", itertools.chain(
        _map_cases(vidops.greedy_absorb_kl, 1.0), (((rows, b), {}, "tau") for b in _numbers()), _backends(rows, 1.0)
    )
    label = torch.zeros(4, dtype=torch.int64)
    segment = [
        *(((b, label, 1), {}, "x") for b in itertools.chain(_not_floats((4, 3)), _wrong_ranks((0, 1, 3, 4)))),
        *(((rows, b, 1), {}, "label") for b in (None, 1, [0] * 4, label.float(), label.int(), label[:3], label[None])),
        *(((rows, b, 1), {}, "label") for b in (label + 1, label - 1, label.to("meta"), label.numpy(), label.bool())),
        *(((rows, label, b), {}, "num_segments") for b in (None, -1, 1.0, "1", True, [1], torch.tensor(1))),
        *(((rows, label + b, b), {}, "label") for b in range(1, 8)),
    ]
    yield "segment_mean", itertools.chain(segment, _backends(rows, label, 1))
    x = torch.full((2, 3), 1 / 3)
    centroids = [x[:0], x[:, :2], x[0], x[None], x.double(), x.to("meta"), *_not_floats((2, 3))]
    yield "assign_clusters", itertools.chain(
        _pair_cases(vidops.assign_clusters, (2, 3, 4), (x,)),
        (((q3, q3, b), {}, "centroids") for b in centroids),
        (((q3, q3, x), {"lse": b}, "lse") for b in (1, "x", F(2, 4), F(3), F(2, 3).double(), F(2, 3).int())),
        _backends(q3, q3, x),
    )
    yield "assign_rows", itertools.chain(
        _map_cases(vidops.assign_rows, x), (((rows, b), {}, "centroids") for b in centroids), _backends(rows, x)
    )
    yield "label_propagation", itertools.chain(_propagation_cases(), _backends(*_PROPAGATION))
    clip, first = F(2, 2, 3, 4), F(2, 3, 2)
    propagate = [
        *(((b, first), {}, "features") for b in (*_not_floats((2, 2, 3, 4)), *_wrong_ranks((0, 1, 2, 3, 5)))),
        *(((b, first), {}, "features") for b in (clip[:0], clip[:, :0], clip[:, :, :0], clip[..., :0])),
        *(((clip, b), {}, "first_labels") for b in (*_not_floats((2, 3, 2)), *_wrong_ranks((0, 1, 2, 4)))),
        *(((clip, b), {}, "first_labels") for b in (first[:1], first[:, :2], first[..., :0], first.transpose(0, 1))),
        *(((clip, b), {}, "first_labels") for b in (first.double(), first.to("meta"))),
        *(((clip, first), {"n_context": b}, "n_context") for b in (-1, 1.0, None, "1", True)),
        *(((clip, first), {"top_k": b}, "top_k") for b in (0, 129, 1.0, None, True)),
        *(((clip[:1], first), {"radius": b}, "radius") for b in (0, -1.0, *_numbers())),
        *(((clip[:1], first), {"temperature": b}, "temperature") for b in (0, -0.2, 1e-300, *_numbers())),
    ]
    yield "propagate_labels", itertools.chain(propagate, _backends(clip, first))
    bad_q = [*_not_floats((1, 2, 3, 4)), *_wrong_ranks((0, 1, 2, 3, 5)), q4[:0], q4[:, :, :0], q4[..., :0]]
    cluster = [
        *(((b, q4), {}, "q") for b in (*bad_q, q4 * NAN, q4 * INF)),
        *(((q4, b), {}, "k") for b in (*bad_q, q4 * NAN, q4 * INF, q4[:, :1], q4[..., :2], q4.double())),
        *(((q4, q4, b), {}, "tau") for b in _numbers()),
        *(((q4, q4, 1.0, b), {}, "window") for b in (0, -1, 1.5, None, "3", True)),
        *(((q4, q4), {"precision": b}, "precision") for b in ("fast", None)),
        *(((q4, q4), {"max_rounds": b}, "max_rounds") for b in (0, -1, 1.0, None)),
        *(((q4, q4), {"scale": b}, "scale") for b in _numbers() if b is not None),
    ]
    yield "hierarchical_cluster", itertools.chain(cluster, _backends(q4, q4))
    p3 = rows[None]
    yield "hierarchical_cluster_map", itertools.chain(
        (((b,), {}, "p") for b in itertools.chain(_not_floats((1, 4, 3)), _wrong_ranks((0, 1, 2, 4)))),
        (((b,), {}, "p") for b in (p3[:0], p3[:, :0], p3[..., :0], -p3, p3 * NAN, p3 * INF)),
        (((p3, b), {}, "tau") for b in _numbers()),
        (((p3, 1.0, b), {}, "window") for b in (0, -1, 1.5, None, "3", True)),
        (((p3,), {"precision": b}, "precision") for b in ("fast", None)),
        (((p3,), {"max_rounds": b}, "max_rounds") for b in (0, -1, 1.0, None)),
        _backends(p3),
    )


    yield "unpack_adjacency", itertools.chain(
        (((b,), {}, "adjacency") for b in _bit_cases()),
        (((F(n, n % 7 + 3, dtype=torch.int64),), {}, "adjacency") for n in range(1, 27)),
    )
    relation = torch.ones(3, 3, dtype=torch.bool)
    yield "pack_adjacency", itertools.chain(
        (((b,), {}, "relation") for b in (None, 1, True, "x", [[True]], relation.numpy(), relation.to_sparse())),
        (((relation.to(dtype),), {}, "relation") for dtype in (torch.uint8, torch.int64, torch.float32, torch.half)),
        (((F(shape, dtype=torch.bool),), {}, "relation") for shape in ((), (3,), (1, 3, 3), (3, 3, 1), (0,))),
        (((F(n, n + d, dtype=torch.bool),), {}, "relation") for n in (0, 1, 63, 64, 65) for d in range(1, 6)),
    )


CASES = dict(_cases())
CASES = {name: list(cases) for name, cases in CASES.items()}


@pytest.mark.parametrize("name", CASES)
def test_every_bad_call_is_named(name):
    function = getattr(vidops, name)
    assert len(CASES[name]) >= 40
    wrong = []
    for args, options, argument in CASES[name]:
        described = [tuple(a.shape) if isinstance(a, torch.Tensor) else repr(a)[:20] for a in args]
        try:
            function(*args, **options)
        except (TypeError, ValueError) as error:
            if argument not in str(error):
                wrong.append((described, options, f"{type(error).__name__} does not name {argument}: {error}"))
        except Exception as error:  # noqa: BLE001 - any other type is what this test is after
            wrong.append((described, options, f"{type(error).__name__}: {error}"))
        else:
            wrong.append((described, options, f"accepted, bad {argument}"))
    assert not wrong, "\n".join(map(str, wrong))


def test_all_public_functions_are_covered():
    functions = {name for name in vidops.__all__ if inspect.isfunction(getattr(vidops, name))}
    assert functions - {"backends", "explain", "use_backend"} == set(CASES)


@pytest.mark.parametrize("function", ["nothing", "BACKENDS", 1, None, "__version__"])
def test_explain_of_what_is_no_function(function):
    with pytest.raises(ValueError, match="explain: "):
        vidops.explain(function)


def test_explain_of_a_wrong_call_is_the_call_s_own_error():
    with pytest.raises(TypeError, match="adjacency"):
        vidops.explain("greedy_absorb", torch.ones(2, 1))
    bits = torch.ones(1, 1, dtype=torch.int64)
    assert vidops.greedy_absorb(bits, backend="reference").owner.tolist() == [0]  # explaining is over


def test_explain_of_a_call_without_an_op():
    q = F(1, 1, 2, 3)
    with pytest.raises(ValueError, match="plain PyTorch"):
        vidops.explain("video_attention", q, q, q)


@pytest.mark.parametrize("name,op", [("gpu", None), ("cpu ", None), (None, None), (1, None), ("cpu", "greed")])
def test_use_backend_of_what_does_not_exist(name, op):
    with pytest.raises(ValueError, match="use_backend: unknown"):
        with vidops.use_backend(name, op=op):
            pass
