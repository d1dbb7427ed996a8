"""Which architectures `vidops.patch` takes, as they are built by transformers, timm and torchvision, and what it saves.

``python bench/patch_architectures.py [--rounds 3] [--only NAME]``: a table in Markdown. Weights are random, so it says
nothing about accuracy: a patched model must give the unpatched bits at r = 0, and is timed at the r named against the
unpatched one, interleaved, CPU time of one thread, best of the rounds. Models of images get a clip of 8 frames as
their batch. A model that is refused shows why. Needs transformers, timm and torchvision.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torchvision_cpu import define_missing_ops

import vidops


class Architecture(NamedTuple):
    name: str
    make: Callable[[], nn.Module]
    inputs: tuple[int, ...] = ()  # shape; none where the model is refused
    sta: int = 0  # the r to be timed with each method
    tome: int = 0
    sta_options: dict[str, Any] = {}


def _transformers(kind: str, config: str, **sizes: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        return getattr(transformers, kind)(getattr(transformers, config)(**sizes))

    return make


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, **options)

    return make


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, weights=None, **options)

    return make


def _vidops(module: str, kind: str, config: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import importlib

        return getattr(importlib.import_module(f"vidops.models.{module}"), kind)(config)

    return make


SMALL = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "use_mean_pooling": True}
TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
HF_CLIP, IMAGES, CLIP = (1, 16, 3, 224, 224), (8, 3, 224, 224), (1, 3, 32, 224, 224)
FRAMES = {"num_frames": 8}

ARCHITECTURES = (
    Architecture(
        "transformers VideoMAEForVideoClassification, ViT-S",
        _transformers("VideoMAEForVideoClassification", "VideoMAEConfig", **SMALL),
        HF_CLIP,
        sta=64,
        tome=65,
    ),
    Architecture(
        "transformers VideoMAEForVideoClassification, ViT-B",
        _transformers("VideoMAEForVideoClassification", "VideoMAEConfig", use_mean_pooling=True),
        HF_CLIP,
        sta=64,
        tome=65,
    ),
    Architecture(
        "transformers VideoMAEModel, ViT-S",
        _transformers("VideoMAEModel", "VideoMAEConfig", **SMALL),
        HF_CLIP,
        sta=48,
        tome=65,
    ),
    Architecture("transformers VideoMAEForPreTraining", _transformers("VideoMAEForPreTraining", "VideoMAEConfig")),
    Architecture("timm vit_tiny_patch16_224", _timm("vit_tiny_patch16_224"), IMAGES, 64, 13, FRAMES),
    Architecture("timm vit_small_patch16_224", _timm("vit_small_patch16_224"), IMAGES, 64, 13, FRAMES),
    Architecture("timm vit_base_patch16_224", _timm("vit_base_patch16_224"), IMAGES, 64, 13, FRAMES),
    Architecture(
        "timm deit_small_distilled_patch16_224", _timm("deit_small_distilled_patch16_224"), IMAGES, 64, 13, FRAMES
    ),
    Architecture(
        "timm vit_small_patch14_reg4_dinov2, 224",
        _timm("vit_small_patch14_reg4_dinov2", img_size=224),
        IMAGES,
        64,
        16,
        FRAMES,
    ),
    Architecture("timm vit_base_patch16_siglip_224", _timm("vit_base_patch16_siglip_224"), IMAGES, 64, 13, FRAMES),
    Architecture("torchvision swin3d_t", _torchvision("swin3d_t"), CLIP, sta=256),
    Architecture("vidops VideoViT, ViT-S", _vidops("sta", "VideoViT", "vit_small"), (1, 3, 16, 224, 224), sta=64),
    Architecture("vidops VideoSwin-T", _vidops("video_swin", "VideoSwin", "swin_tiny"), CLIP, sta=256),
    Architecture(
        "transformers TimesformerForVideoClassification",
        _transformers("TimesformerForVideoClassification", "TimesformerConfig", **TINY),
    ),
    Architecture(
        "transformers VivitForVideoClassification",
        _transformers("VivitForVideoClassification", "VivitConfig", **TINY),
    ),
    Architecture(
        "transformers VJEPA2Model",
        _transformers("VJEPA2Model", "VJEPA2Config", hidden_size=48, num_attention_heads=2, num_hidden_layers=2),
    ),
    Architecture(
        "transformers CLIPVisionModel", _transformers("CLIPVisionModel", "CLIPVisionConfig", **TINY)
    ),
    Architecture("transformers Dinov2Model", _transformers("Dinov2Model", "Dinov2Config", hidden_size=384)),
    Architecture("torchvision vit_b_16", _torchvision("vit_b_16")),
    Architecture("torchvision mvit_v2_s", _torchvision("mvit_v2_s")),
    Architecture("timm eva02_tiny_patch14_224", _timm("eva02_tiny_patch14_224")),
    Architecture("timm swin_tiny_patch4_window7_224", _timm("swin_tiny_patch4_window7_224")),
    Architecture("timm vit_base_patch16_rpn_224", _timm("vit_base_patch16_rpn_224")),
)


def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    found = model(x)
    return found if isinstance(found, torch.Tensor) else found[0]


def seconds(model: nn.Module, x: torch.Tensor) -> float:
    start = time.thread_time()
    outputs(model, x)
    return time.thread_time() - start


def timed(model: Any, x: torch.Tensor, r: int, rounds: int) -> tuple[float, float]:
    """Best of each: unpatched (r = 0 runs its forward), and pruned."""
    best = [float("inf")] * 2
    for _ in range(rounds):
        for which, value in enumerate((0, r)):
            model.r = value
            best[which] = min(best[which], seconds(model, x))
    return best[0], best[1]


def refusal(error: vidops.PatchError) -> str:
    """Without what was looked for, which is the same for all that are not known."""
    text = str(error)
    if "no model that can be patched" not in text:
        return text
    return text.partition(" cannot be patched: ")[2] or "not one of the classes that are looked for"


def row(case: Architecture, model: Any, method: str, rounds: int) -> list[str]:
    """The cells after the model's name."""
    r = case.sta if method == "sta" else case.tome
    options = case.sta_options if method == "sta" else {}
    try:
        report = vidops.patch(model, r=r or 1, method=method, **options)
    except vidops.PatchError as error:
        return [method, f"refused: {refusal(error)}", "", "", ""]
    x = torch.randn(case.inputs, generator=torch.Generator().manual_seed(0))
    vidops.unpatch(model)
    want = outputs(model, x)
    vidops.patch(model, r=0, method=method, **options)
    equal = torch.equal(outputs(model, x), want)
    before, after = timed(model, x, r, rounds)
    vidops.unpatch(model)
    equal = equal and torch.equal(outputs(model, x), want)
    tokens = list(dict.fromkeys(report.tokens))
    # Token merging has a count for every block.
    shown = tokens if len(tokens) <= 4 else [*tokens[:2], "...", tokens[-1]]
    return [
        method,
        f"r = {r}: {' -> '.join(map(str, shown))} per {report.unit}",
        "yes" if equal else "NO",
        f"{report.gmacs_unpatched:.1f} -> {report.gmacs:.1f}",
        f"{before * 1e3:.0f} -> {after * 1e3:.0f} ms, {before / after:.2f}x",
    ]


HEAD = ("model", "method", "tokens", "r = 0 and unpatched: same bits", "GMAC", "one thread")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="models whose name has this in it")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    define_missing_ops()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    print("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|")
    for case in ARCHITECTURES:
        if arguments.only not in case.name:
            continue
        torch.manual_seed(0)
        model = case.make().eval()
        rows = [row(case, model, method, arguments.rounds) for method in ("sta", "tome")]
        if rows[0][1:] == rows[1][1:]:
            rows = [["both", *rows[0][1:]]]
        for cells in rows:
            print("| " + " | ".join([case.name, *cells]) + " |", flush=True)


if __name__ == "__main__":
    main()
