"""One line makes a video transformer drop or merge tokens, and one line gives it back as it was.

`patch` finds a model that it knows in what it is given and changes the classes of a few of its modules, in place;
weights and their names stay. `unpatch` undoes all of it. `register_attention` is apart from that: `video_attention` as
an attention of transformers.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from vidops._registry import BACKENDS
from vidops.ops import _checks
from vidops.patching._patch import METHODS, Options, Patch, PatchReport, mro_names
from vidops.patching._schedule import PatchError
from vidops.patching._swap import PATCH, SITE
from vidops.patching.attention import AttentionCalls, attention_calls, register_attention
from vidops.patching.sta_model import STA_MODEL
from vidops.patching.timm_vit import TIMM_VIT
from vidops.patching.video_swin import VIDEO_SWIN
from vidops.patching.videomae import VIDEOMAE

__all__ = [
    "AttentionCalls",
    "PatchError",
    "PatchReport",
    "attention_calls",
    "patch",
    "register_attention",
    "report",
    "unpatch",
]

FAMILIES = (VIDEOMAE, TIMM_VIT, VIDEO_SWIN, STA_MODEL)

# Models that are asked for and cannot be patched, by class.
_WHY_NOT = {
    "TimesformerModel": "its attention over time needs every place of the grid in every frame",
    "VivitModel": "its class token stands before all frames, and its layers are not known",
    "VJEPA2Model": "its rotary positions are counted from the places in the full sequence",
}


def patch(
    model: nn.Module,
    *,
    r: int | list[int] | tuple[int, float],
    method: str = "sta",
    proportional: bool | None = None,
    num_frames: int | None = None,
    clip_size: tuple[int, int, int] | None = None,
    backend: str | None = None,
) -> PatchReport:
    """Makes a video transformer drop ("sta") or merge ("tome") tokens on its way, without training.

    Works in place, on this model only. Afterwards ``model.r`` reads and sets `r` at any time; 0 runs the unpatched
    forward, to the bit. Parameters, buffers and their names stay as they are. A model that is patched already is
    unpatched first, unless the new patch is refused.

    Args:
        model: VideoMAEModel or VideoMAEForVideoClassification of transformers, VisionTransformer of timm,
            SwinTransformer3d of torchvision, VideoViT or VideoSwin of `vidops.models`; or a module that has exactly one
            of these somewhere inside.
        r: tokens that go. "sta": an integer, of every group in each of three calls (VideoSwin: of every frame in the
            second stage, 1.5 / 4 and 2 / 16 of that in the later ones; timm: r, r / 2 and r / 4 of every frame).
            "tome": an integer, of every block; a list of one per block; or a pair (r, inflect), from r (1 - inflect)
            in the first block to r (1 + inflect) in the last.
        method: ``"sta"``, semantic-aware temporal accumulation (Ding et al., ICCV 2023, arXiv 2308.04549):
            `vidops.sta_prune` after blocks 0, L // 3 and 2 L // 3. ``"tome"``, token merging (Bolya et al., ICLR 2023,
            arXiv 2210.09461): `vidops.token_merge` between attention and MLP of every block.
        proportional: for "tome", whether merged tokens count as often in attention as tokens they stand for; default
            True for timm's models, which are trained with labels, and False for VideoMAE, as the paper found best.
        num_frames: for "sta" with a model of images: how many make a clip. A batch is then (clips frames, 3, H, W).
        clip_size: for SwinTransformer3d, (frames, height, width) that the report and the limit of `r` are about;
            default (32, 224, 224). Other sizes still run.
        backend: forced on every vidops op of the patch; default: chosen per op.

    Returns:
        `PatchReport`: which layers run differently, tokens left after each, multiply-adds saved.

    Raises:
        PatchError (a ValueError): no model of a known kind found, one that lacks something, an option that it does not
            have, an `r` that a stage has not the tokens for (here or when ``model.r`` is set).
        TypeError: wrong type.

    >>> import vidops
    >>> from vidops.models.sta import VideoViT
    >>> model = VideoViT("tiny")
    >>> report = vidops.patch(model, r=4)
    >>> report.layers, report.tokens
    (('blocks.0', 'blocks.2', 'blocks.4'), (128, 96, 80, 72))
    >>> model.r = 2
    >>> vidops.unpatch(model)
    >>> model.r
    0
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    _checks.choice("method", method, METHODS)
    if proportional is not None and not isinstance(proportional, bool):
        raise TypeError(f"proportional: expected a bool or None, got {type(proportional).__name__}")
    if backend is not None:
        _checks.choice("backend", backend, BACKENDS)
    options = Options(method, proportional, num_frames, clip_size, backend)
    old = vars(model).get(PATCH)
    target, family = _find(model)
    if old is None:
        _refuse_parts(model, target)
    new = family.build(model, target, r, options)
    if old is not None:
        unpatch(model)
    new.apply(model)
    return new.report()


def unpatch(model: nn.Module) -> None:
    """Gives a model back as it was before `patch`: classes, attributes and hooks; its outputs are the same bits again.

    Raises PatchError for a model that was not given to `patch`; TypeError for what is no module.

    >>> import vidops
    >>> from vidops.models.sta import VideoViT
    >>> vidops.unpatch(VideoViT("tiny"))
    Traceback (most recent call last):
    ...
    vidops.patching._schedule.PatchError: VideoViT: not patched
    """
    _patch_of(model).remove(model)


def report(model: nn.Module) -> PatchReport:
    """The report of a patched model as it is now, with the `r` that it has now; PatchError where it has no patch."""
    return _patch_of(model).report()


def _patch_of(model: nn.Module) -> Patch:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    found = vars(model).get(PATCH)
    if found is None:
        inner = [name for name, module in model.named_modules() if name and PATCH in vars(module)]
        hint = f"; its {inner[0]} is, so name that" if inner else ""
        raise PatchError(f"{type(model).__name__}: not patched{hint}")
    return found


def _find(model: nn.Module) -> tuple[nn.Module, Any]:
    """The one module that a family knows."""
    if hasattr(model, "_orig_mod"):
        raise PatchError("the model is compiled: patch it first, then compile it")
    found = [
        (name, module, family)
        for name, module in model.named_modules()
        for family in FAMILIES
        if family.matches(module)
    ]
    if len(found) == 1:
        return found[0][1:]
    if found:
        names = ", ".join(f"{name or 'itself'} ({type(module).__name__})" for name, module, _ in found)
        raise PatchError(f"{type(model).__name__}: {len(found)} models that can be patched ({names}); name one of them")
    looked_for = "; ".join(family.looked_for for family in FAMILIES)
    known = {name for module in model.modules() for name in mro_names(module)} & _WHY_NOT.keys()
    reasons = "".join(f". {name} cannot be patched: {_WHY_NOT[name]}" for name in sorted(known))
    raise PatchError(f"{type(model).__name__}: no model that can be patched; looked for {looked_for}{reasons}")


def _refuse_parts(model: nn.Module, target: nn.Module) -> None:
    """A first patch needs modules that no other holds, and the name `r` free unless it is the model's own."""
    for name, module in model.named_modules():
        if PATCH in vars(module) or SITE in vars(module):
            raise PatchError(f"{type(model).__name__}: {name or 'it'} is part of another patch; unpatch that first")
    if hasattr(model, "r") and not (model is target and STA_MODEL.matches(target)):
        raise PatchError(f"{type(model).__name__}: has an attribute r, whose name the patch needs; name a part of it")
