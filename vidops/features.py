"""MobileNetV2 (Sandler et al., CVPR 2018, arXiv 1801.04381): feature maps of a small ImageNet network.

Parameter names are those of the public bottleneck weights (`vidops.assets`, "mobilenet_v2"), so that the file
loads strictly. Only the convolutional part exists here; there is no classifier in the file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from vidops.checkpoints import CheckpointError, read_state_dict

# expansion, channels, repeats, stride of each group of inverted residual blocks (table 2 of the paper)
GROUPS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]


class InvertedResidual(nn.Module):
    """Expand by 1x1, filter depthwise by 3x3, project linearly by 1x1; residual where shapes allow."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        expand = [*_convolution(inputs, hidden, 1), nn.ReLU6()] if expansion != 1 else []
        self.conv = nn.Sequential(
            *expand,
            *_convolution(hidden, hidden, 3, stride, groups=hidden),
            nn.ReLU6(),
            *_convolution(hidden, outputs, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """The layers 0 to 18 of MobileNetV2, width 1.0; 2,223,872 parameters.

    >>> import torch
    >>> net = MobileNetV2().eval()
    >>> [tuple(m.shape) for m in net.maps(torch.zeros(1, 3, 64, 96), (3, 13))]
    [(1, 24, 16, 24), (1, 96, 4, 6)]
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Sequential(*_convolution(3, 32, 3, 2), nn.ReLU6())]
        channels = 32
        for expansion, outputs, repeats, stride in GROUPS:
            for i in range(repeats):
                layers.append(InvertedResidual(channels, outputs, stride if i == 0 else 1, expansion))
                channels = outputs
        layers.append(nn.Sequential(*_convolution(channels, 1280, 1), nn.ReLU6()))
        self.features = nn.Sequential(*layers)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> MobileNetV2:
        """A network in eval mode with the weights of a local file; CheckpointError when they do not fit."""
        net = cls()
        state = read_state_dict(path).state
        try:
            net.load_state_dict(state, strict=True)
        except RuntimeError as error:
            problem = " ".join(str(error).split())[:300]
            raise CheckpointError(path, f"no MobileNetV2 weights: {problem}") from error
        return net.eval()

    def maps(self, images: torch.Tensor, layers: Sequence[int]) -> list[torch.Tensor]:
        """Outputs of the named layers for normalised images (B, 3, H, W): a list of (B, C, h, w)."""
        count = len(self.features)
        if not layers or not all(0 <= layer < count for layer in layers):
            raise ValueError(f"layers: expected numbers from 0 to {count - 1}, got {tuple(layers)}")
        found = {}
        x = images
        for i in range(max(layers) + 1):
            x = self.features[i](x)
            if i in layers:
                found[i] = x
        return [found[layer] for layer in layers]


def normalised(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """uint8 frames (T, H, W, 3) -> float32 (T, 3, *size) with ImageNet's statistics, antialiased."""
    if frames.dim() != 4 or frames.shape[-1] != 3 or frames.dtype != torch.uint8:
        raise ValueError(f"frames: expected uint8 (T, H, W, 3), got {frames.dtype} {tuple(frames.shape)}")
    images = frames.permute(0, 3, 1, 2).float() / 255
    if images.shape[-2:] != size:
        images = F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
    mean, std = (torch.tensor(v, device=frames.device).view(3, 1, 1) for v in (MEAN, STD))
    return (images - mean) / std


@torch.no_grad()
def extract(
    net: MobileNetV2,
    frames: torch.Tensor,
    size: tuple[int, int],
    layers: Sequence[int],
    *,
    progress: Callable[[int], None] | None = None,
) -> list[torch.Tensor]:
    """Feature maps of a video, one frame at a time: for each layer (T, C, h, w) float32.

    Args:
        net: in eval mode.
        frames: uint8 (T, H, W, 3), may lie on another device than the network.
        size: (height, width) at which the network sees the frames.
        layers: numbers of the layers whose outputs are kept.
        progress: called with the number of frames done.
    """
    device = next(net.parameters()).device
    kept: list[list[torch.Tensor]] = [[] for _ in layers]
    for i in range(len(frames)):
        images = normalised(frames[i : i + 1].to(device), size)
        for store, found in zip(kept, net.maps(images, layers), strict=True):
            store.append(found)
        if progress is not None:
            progress(i + 1)
    return [torch.cat(store) for store in kept]
