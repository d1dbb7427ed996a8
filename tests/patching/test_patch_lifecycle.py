"""What holds for every kind of model: on, off, again, copied, compiled, exported, in threads, and refused."""

from __future__ import annotations

import copy
import inspect
import io
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import patch_models
import pytest
import torch
from patch_models import clips, images, swin, swin_clips, timm_vit, videomae
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import vidops
from vidops.models.sta import VideoViT
from vidops.models.video_swin import VideoSwin
from vidops.patching import report


class Kind(NamedTuple):
    make: Callable[[], Any]
    inputs: torch.Tensor
    r: int
    options: dict[str, Any]


def _kinds() -> dict[str, Kind]:
    found: dict[str, Kind] = {}
    for source in patch_models.VIDEOMAE_SOURCES:
        make = lambda source=source: videomae(source)  # noqa: E731
        found[f"videomae {source}, sta"] = Kind(make, clips(), 3, {"backend": "reference"})
        tome = {"method": "tome", "backend": "reference"}
        if source != "stand-in before 5":
            found[f"videomae {source}, tome"] = Kind(make, clips(), 5, tome)
        found[f"videomae {source}, proportional"] = Kind(make, clips(), 5, {"proportional": True, **tome})
    for source in patch_models.TIMM_SOURCES:
        make = lambda source=source: timm_vit(source)  # noqa: E731
        found[f"vit {source}, sta"] = Kind(make, images(), 9, {"num_frames": 2, "backend": "reference"})
        found[f"vit {source}, tome"] = Kind(make, images(), 5, {"method": "tome", "backend": "reference"})
    for source in patch_models.SWIN_SOURCES:
        make = lambda source=source: swin(source)  # noqa: E731
        options = {"clip_size": (4, 64, 64), "backend": "reference"}
        found[f"swin {source}"] = Kind(make, swin_clips(), 16, options)
    return found


KINDS = _kinds()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def run(model: Any, inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = model(inputs)
    return found if isinstance(found, torch.Tensor) else found.logits


def traces(model: nn.Module) -> list[Any]:
    """All that a patch could leave: classes, attributes, hooks."""
    return [
        (name, type(module), sorted(vars(module)), [id(hook) for hook in module._forward_hooks.values()])
        for name, module in model.named_modules()
    ]


def shapes(model: nn.Module) -> list[Any]:
    """The same for copies, whose hooks are others."""
    return [(name, cls, attributes, len(hooks)) for name, cls, attributes, hooks in traces(model)]


def test_on_and_off(kind: Kind) -> None:
    model = kind.make()
    before, state, want = traces(model), model.state_dict(), run(model, kind.inputs)
    cls = type(model)
    vidops.patch(model, r=kind.r, **kind.options)
    found = run(model, kind.inputs)
    assert not torch.equal(found, want)
    assert isinstance(model, cls) and type(model).__name__ == cls.__name__
    assert list(model.state_dict()) == list(state)
    assert all(value is state[name] or torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.load_state_dict(state)
    model.r = 0
    assert torch.equal(run(model, kind.inputs), want)
    model.r = kind.r
    assert torch.equal(run(model, kind.inputs), found)
    vidops.unpatch(model)
    assert torch.equal(run(model, kind.inputs), want)
    assert traces(model) == before
    assert not hasattr(model, "r")
    with pytest.raises(vidops.PatchError, match=f"{cls.__name__}: not patched"):
        vidops.unpatch(model)


def test_off_after_a_failed_forward(kind: Kind) -> None:
    model = kind.make()
    before, want = traces(model), run(model, kind.inputs)
    vidops.patch(model, r=kind.r, **kind.options)
    found = run(model, kind.inputs)
    failing = [m for m in model.modules() if isinstance(m, nn.Linear)][-2]
    handle = failing.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(model, kind.inputs)
    handle.remove()
    assert torch.equal(run(model, kind.inputs), found)
    vidops.unpatch(model)
    assert torch.equal(run(model, kind.inputs), want)
    assert traces(model) == before


@pytest.mark.parametrize("name", [name for name in KINDS if "swin" not in name])
def test_a_replaced_projection_is_noticed(name: str) -> None:
    kind = KINDS[name]
    model, spare = kind.make(), kind.make()
    vidops.patch(model, r=kind.r, **kind.options)
    part, key = ("attn", "k_norm") if name.startswith("vit") else ("attention.attention", "key")
    place = f"{report(model).layers[0]}.{part}"
    setattr(model.get_submodule(place), key, spare.get_submodule(f"{place}.{key}"))
    with pytest.raises(RuntimeError, match="its module was replaced; unpatch, then patch again"):
        run(model, kind.inputs)
    vidops.patch(model, r=kind.r, **kind.options)
    twin = kind.make()
    vidops.patch(twin, r=kind.r, **kind.options)
    assert torch.equal(run(model, kind.inputs), run(twin, kind.inputs))


def test_others_of_the_class_are_not_touched(kind: Kind) -> None:
    model, other = kind.make(), kind.make()
    before, want = traces(other), run(other, kind.inputs)
    vidops.patch(model, r=kind.r, **kind.options)
    assert traces(other) == before
    assert torch.equal(run(other, kind.inputs), want)


def test_patched_again(kind: Kind) -> None:
    model = kind.make()
    before = traces(model)
    vidops.patch(model, r=kind.r, **kind.options)
    found, layers = run(model, kind.inputs), report(model).layers
    vidops.patch(model, r=1, **kind.options)
    assert model.r == 1 and report(model).layers == layers
    # A refusal leaves the patch that was there.
    with pytest.raises(vidops.PatchError, match="^r: "):
        vidops.patch(model, r=10**6, **kind.options)
    assert model.r == 1
    vidops.patch(model, r=kind.r, **kind.options)
    assert torch.equal(run(model, kind.inputs), found)
    vidops.unpatch(model)
    assert traces(model) == before


def test_from_one_method_to_the_other() -> None:
    model, twin = videomae("stand-in"), videomae("stand-in")
    vidops.patch(model, r=3, backend="reference")
    vidops.patch(model, r=3, method="tome", backend="reference")
    vidops.patch(twin, r=3, method="tome", backend="reference")
    assert report(model) == report(twin) and report(model).method == "tome"
    assert torch.equal(run(model, clips()), run(twin, clips()))


def test_r_is_checked_whenever_it_is_set(kind: Kind) -> None:
    model = kind.make()
    vidops.patch(model, r=kind.r, **kind.options)
    for value, error in ((-1, ValueError), (10**6, ValueError), (1.5, TypeError), (True, TypeError), ("3", TypeError)):
        with pytest.raises(error, match="^r: "):
            model.r = value
        assert model.r == kind.r == report(model).r
        with pytest.raises(error, match="^r: "):
            vidops.patch(kind.make(), r=value, **kind.options)


def test_copies_and_pickles_are_patched_models_of_their_own(kind: Kind) -> None:
    model = kind.make()
    before, want = shapes(model), run(model, kind.inputs)
    vidops.patch(model, r=kind.r, **kind.options)
    found = run(model, kind.inputs)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)]
    for twin in twins:
        assert type(twin) is type(model)
        assert torch.equal(run(twin, kind.inputs), found)
        twin.r = 0
        assert model.r == kind.r
        assert torch.equal(run(twin, kind.inputs), want)
        vidops.unpatch(twin)
        assert shapes(twin) == before
        assert torch.equal(run(twin, kind.inputs), want)
    assert torch.equal(run(model, kind.inputs), found)


def test_a_pickle_opens_in_another_process() -> None:
    model = VideoViT("tiny").eval()
    vidops.patch(model, r=3)
    code = (
        "import pickle, sys; m = pickle.load(sys.stdin.buffer); print(m.r);"
        "import vidops; vidops.unpatch(m); print(m.r)"
    )
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(model), capture_output=True, check=False)
    assert done.stdout.split() == [b"3", b"0"], done.stderr.decode()


def test_threads_do_not_mix(kind: Kind) -> None:
    model = kind.make()
    vidops.patch(model, r=kind.r, **kind.options)
    inputs = [kind.inputs + number for number in range(4)]
    want = [run(model, x) for x in inputs]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(3):
            if not torch.equal(run(model, inputs[number]), want[number]):
                wrong.append(number)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_compiles_to_one_graph(kind: Kind) -> None:
    model = kind.make()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    unpatched = run(compiled, kind.inputs)
    vidops.patch(model, r=kind.r, **kind.options)
    # A graph for each r, kept for the next time.
    for r, graphs in ((kind.r, 2), (0, 3), (kind.r, 3)):
        model.r = r
        torch.testing.assert_close(run(compiled, kind.inputs), run(model, kind.inputs))
        assert counter.frame_count == graphs
    vidops.unpatch(model)
    assert torch.equal(run(compiled, kind.inputs), unpatched)
    torch._dynamo.reset()


@pytest.mark.parametrize("method", ["sta", "tome"])
def test_trains_compiled(method: str) -> None:
    model = videomae("stand-in")
    vidops.patch(model, r=3, method=method, backend="reference")
    grads = []
    for forward in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        forward(clips()).logits.square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 0
    for eager, compiled in zip(*grads, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_exports(kind: Kind) -> None:
    model = kind.make()
    vidops.patch(model, r=kind.r, **kind.options)
    want = run(model, kind.inputs)
    program = torch.export.export(model, (kind.inputs,))
    torch.testing.assert_close(run(program.module(), kind.inputs), want)
    assert torch.equal(run(model, kind.inputs), want)
    names = {str(node.target) for node in program.graph.nodes}
    assert any(name.startswith("vidops.") for name in names)


def test_exports_with_any_batch() -> None:
    model = videomae("stand-in")
    vidops.patch(model, r=3, backend="reference")
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (clips(3),), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(run(program.module(), clips(5)), run(model, clips(5)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_models(kind: Kind, dtype: torch.dtype) -> None:
    model = kind.make()
    vidops.patch(model, r=kind.r, **kind.options)
    with torch.autocast("cpu", dtype):
        found = run(model, kind.inputs)
    tokens = report(model).tokens
    assert found.isfinite().all() and tokens[-1] < tokens[0]
    torch.testing.assert_close(found.float(), run(model, kind.inputs), atol=0.2, rtol=0.2)
    half = run(model.to(dtype), kind.inputs.to(dtype))
    assert half.dtype == dtype and half.isfinite().all()


class Net(nn.Module):
    def __init__(self, *backbones: nn.Module) -> None:
        super().__init__()
        self.backbones = nn.ModuleList(backbones)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.backbones[0](x)
        return found if isinstance(found, torch.Tensor) else found.logits


def test_a_model_inside_another(kind: Kind) -> None:
    inner = kind.make()
    net = Net(inner)
    before, want = traces(net), run(net, kind.inputs)
    found = vidops.patch(net, r=kind.r, **kind.options)
    assert all(name.startswith("backbones.0.") for name in found.layers)
    assert all(net.get_submodule(name) is not None for name in found.layers)
    patched = run(net, kind.inputs)
    assert not torch.equal(patched, want)
    for part in (inner, *(net.get_submodule(name) for name in found.layers)):
        with pytest.raises(vidops.PatchError, match="not patched"):
            vidops.unpatch(part)
    with pytest.raises(vidops.PatchError, match="is part of another patch; unpatch that first"):
        vidops.patch(inner, r=1, **kind.options)
    net.r = 0
    assert torch.equal(run(net, kind.inputs), want)
    vidops.unpatch(net)
    assert traces(net) == before
    vidops.patch(inner, r=kind.r, **kind.options)
    assert torch.equal(run(net, kind.inputs), patched)
    with pytest.raises(vidops.PatchError, match=r"Net: not patched; its backbones\.0 is, so name that"):
        vidops.unpatch(net)
    with pytest.raises(vidops.PatchError, match="part of another patch"):
        vidops.patch(net, r=1, **kind.options)


def test_which_of_two(kind: Kind) -> None:
    net = Net(kind.make(), kind.make())
    with pytest.raises(vidops.PatchError, match=r"Net: 2 models that can be patched \(backbones\.0.*, backbones\.1"):
        vidops.patch(net, r=1, **kind.options)


def test_compiled_first_is_refused(kind: Kind) -> None:
    with pytest.raises(vidops.PatchError, match="patch it first, then compile"):
        vidops.patch(torch.compile(kind.make()), r=1, **kind.options)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), nn.TransformerEncoderLayer(8, 2)])
def test_nothing_to_patch(model: nn.Module) -> None:
    looked_for = ("VideoMAEModel", "VisionTransformer", "SwinTransformer3d", "VideoViT, VideoSwin")
    with pytest.raises(vidops.PatchError) as caught:
        vidops.patch(model, r=1)
    assert str(caught.value).startswith(f"{type(model).__name__}: no model that can be patched; looked for ")
    assert all(name in str(caught.value) for name in looked_for)


class TimesformerModel(nn.Linear):
    pass


def test_known_models_say_why_not() -> None:
    with pytest.raises(vidops.PatchError, match=r"TimesformerModel cannot be patched: its attention over time"):
        vidops.patch(TimesformerModel(2, 2), r=1)


class Rated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = videomae("stand-in")
        self.r = 0.5


def test_bad_arguments() -> None:
    model = videomae("stand-in")
    for wrong in (None, 3, "model", torch.zeros(1), VideoViT):
        with pytest.raises(TypeError, match="model: expected a torch.nn.Module"):
            vidops.patch(wrong, r=1)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="model: expected a torch.nn.Module"):
            vidops.unpatch(wrong)  # type: ignore[arg-type]
    for name, value, error in (
        ("method", "drop", ValueError),
        ("method", None, ValueError),
        ("backend", "gpu", ValueError),
        ("proportional", 1, TypeError),
        ("num_frames", 8, ValueError),
        ("clip_size", (8, 8, 8), ValueError),
        ("proportional", True, ValueError),
    ):
        with pytest.raises(error, match=f"^{name}: "):
            vidops.patch(model, **{"r": 1, "method": "sta", name: value})
    for value, message in (
        ([1, 2], "expected 6 integers"),
        ([1, 2, 3, 4, 5, 6.0], r"r\[5\]: expected an integer"),
        ([1, 2, 3, 4, 5, -6], r"r\[5\]: expected an integer >= 0"),
        ((1, 2, 3), "a pair"),
        ((3, 1.5), "inflect: expected a number from -1 to 1"),
        ((3, "a"), "inflect: expected a number"),
        ((-3, 0.5), "r: expected an integer >= 0"),
        (65, "block 0 merges at most half of 128 tokens, got 65"),
        ([0, 0, 70, 0, 0, 0], "block 2 merges at most half"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            vidops.patch(model, r=value, method="tome")  # type: ignore[arg-type]
    assert not hasattr(model, "r")
    with pytest.raises(vidops.PatchError, match="Rated: has an attribute r, whose name"):
        vidops.patch(Rated(), r=1)
    with pytest.raises(TypeError):
        vidops.patch(model)  # type: ignore[call-arg]


def test_limits_are_of_the_stage_that_is_named() -> None:
    model = videomae("stand-in")
    with pytest.raises(vidops.PatchError, match=r"stage 3 \(after block 4\) drops 10 .* fewer than the 4 that it has"):
        vidops.patch(model, r=10)
    with pytest.raises(vidops.PatchError, match=r"stage 1 \(after block 0\) drops 16"):
        vidops.patch(model, r=16)
    vidops.patch(model, r=9, backend="reference")
    assert run(model, clips()).shape == (2, 5)


@pytest.mark.parametrize("make", [lambda: VideoViT("tiny"), lambda: VideoSwin("tiny")])
def test_models_of_vidops(make: Callable[[], Any]) -> None:
    model = make().eval()
    before = traces(model)
    found = vidops.patch(model, r=8)
    assert model.r == 8 and 0 < found.gmacs < found.gmacs_unpatched and len(found.layers) == 3
    assert all(model.get_submodule(name) is not None for name in found.layers)
    twin = copy.deepcopy(model)
    twin.r = 1
    assert (model.r, report(twin).r) == (8, 1)
    vidops.patch(model, r=2)
    for name, value in (("r", 10**4), ("method", "tome"), ("num_frames", 8), ("backend", "reference")):
        with pytest.raises(vidops.PatchError):
            vidops.patch(model, **{"r": 1, name: value})
    assert model.r == 2
    vidops.unpatch(model)
    assert model.r == 0 and traces(model) == before
    model.r = 3
    vidops.patch(model, r=4)
    vidops.unpatch(model)
    assert model.r == 3
    net = Net(model)
    vidops.patch(net, r=5)
    assert model.r == net.r == 5
    net.r = 6
    assert model.r == 6
    vidops.unpatch(net)
    assert model.r == 3 and type(net) is Net and not hasattr(net, "r")


def test_models_of_vidops_compile_and_export() -> None:
    model, video = VideoViT("tiny").eval(), torch.randn(2, 3, 16, 32, 32)
    vidops.patch(model, r=3)
    with vidops.use_backend("reference"):
        want = run(model, video)
        torch.testing.assert_close(run(torch.compile(model, backend="aot_eager", fullgraph=True), video), want)


def test_report_reads_well() -> None:
    model = videomae("stand-in")
    text = str(vidops.patch(model, r=3, backend="reference"))
    assert text == (
        "VideoMAEModel (transformers VideoMAE): sta, r = 3, 3 layers; tokens per clip 128 -> 104 -> 92 -> 86; "
        "0.0107 of 0.0144 GMAC (26% less)"
    )
    model.r = 0
    now = report(model)
    assert (now.r, now.tokens, now.gmacs_saved) == (0, (128, 128, 128, 128), 0.0)
    vidops.patch(model, r=[1, 2, 3, 4, 5, 6], method="tome", backend="reference")
    found = report(model)
    assert isinstance(found.r, list)
    found.r.append(7)
    assert model.r == [1, 2, 3, 4, 5, 6]


def test_importing_vidops_loads_none_of_it() -> None:
    code = (
        "import sys, torch, vidops; names = {'transformers', 'timm', 'torchvision', 'vidops.models'};"
        "assert not (names | {'vidops.patching'}) & set(sys.modules); vidops.patching.report; vidops.patch;"
        "assert not names & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_names_of_the_package() -> None:
    for name in ("patch", "unpatch", "register_attention"):
        assert inspect.isfunction(getattr(vidops, name)) and getattr(vidops, name) is getattr(vidops.patching, name)
    assert issubclass(vidops.PatchError, ValueError)
    with pytest.raises(AttributeError, match="module 'vidops' has no attribute 'patches'"):
        vidops.patches  # noqa: B018
