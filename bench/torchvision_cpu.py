"""Lets the torchvision of PyPI, which is built for CUDA, be imported beside a CPU build of torch."""

import importlib.util

import torch


def define_missing_ops() -> None:
    """Schemas of the two compiled ops that torchvision's import asks for; they stay without a kernel.

    Call it before anything imports torchvision: timm does, and transformers where it finds one.
    """
    if importlib.util.find_spec("torchvision") is None or torch.version.cuda is not None:
        return
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(
                f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
