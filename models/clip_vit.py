"""The image encoder of CLIP as a student's backbone, with the parameter names of the public files (without "visual.").

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021, arXiv 2103.00020.
Attention runs through `vidops.video_attention`; everything else is plain `torch.nn`.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

import vidops
from vidops.models.vit import patch_grid


class QuickGELU(nn.Module):
    """The activation that CLIP was trained with, ``x * sigmoid(1.702 x)``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


class PackedAttention(nn.Module):
    """Self-attention with the parameter names of `torch.nn.MultiheadAttention`."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"heads: {dim} channels do not split into {heads} heads")
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
        packed = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in packed)
        out = cast(torch.Tensor, vidops.video_attention(q, k, v, backend=backend))
        return self.out_proj(out.transpose(1, 2).flatten(2))


class ResidualBlock(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim, eps=eps)
        self.attn = PackedAttention(dim, heads)
        self.ln_2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(dim, hidden), gelu=QuickGELU(), c_proj=nn.Linear(hidden, dim))
        )

    def forward(self, x: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), backend=backend)
        return x + self.mlp(self.ln_2(x))


class _Transformer(nn.Module):
    """Holds the blocks under the name that the public files give them."""

    def __init__(self, dim: int, depth: int, heads: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualBlock(dim, heads, hidden, eps) for _ in range(depth))


class ClipEncoder(nn.Module):
    """CLIP's ViT up to its last block.

    Args:
        dim, depth, heads, patch: size of the net; `img_size`: side in pixels of the stored position grid.
        hidden: width of the MLPs (default 4 * dim).
        out: width of the joint space; its projection is part of every checkpoint and never applied here.
        eps: epsilon of every LayerNorm.
    """

    def __init__(
        self,
        *,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        patch: int = 16,
        img_size: int = 224,
        hidden: int | None = None,
        out: int = 512,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth: expected at least one block, got {depth}")
        if patch < 1 or img_size < patch:
            raise ValueError(f"img_size: {img_size} pixels hold no patch of {patch}")
        self.patch = patch
        self.grid = img_size // patch
        std = dim**-0.5
        self.class_embedding = nn.Parameter(std * torch.randn(dim))
        self.positional_embedding = nn.Parameter(std * torch.randn(1 + self.grid**2, dim))
        self.proj = nn.Parameter(std * torch.randn(dim, out))
        self.conv1 = nn.Conv2d(3, dim, kernel_size=patch, stride=patch, bias=False)
        self.ln_pre = nn.LayerNorm(dim, eps=eps)
        self.transformer = _Transformer(dim, depth, heads, hidden or 4 * dim, eps)
        # Like `proj`, stored and not applied: features are taken before it.
        self.ln_post = nn.LayerNorm(dim, eps=eps)

    def grid_of(self, images: torch.Tensor) -> tuple[int, int]:
        """Patch rows and columns of images (B, 3, H, W); ValueError when they do not split into patches."""
        return patch_grid(images, self.patch)

    def position_embedding(self, rows: int, columns: int) -> torch.Tensor:
        """Position embedding (1 + rows*columns, C); the stored grid is resized bicubically where it differs."""
        if rows == columns == self.grid:
            return self.positional_embedding
        cls, patches = self.positional_embedding[:1], self.positional_embedding[1:]
        stored = patches.unflatten(0, (self.grid, self.grid)).permute(2, 0, 1)[None]
        resized = F.interpolate(stored, size=(rows, columns), mode="bicubic", align_corners=False)
        return torch.cat([cls, resized[0].flatten(1).T])

    def features(self, images: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
        """Normalised images (B, 3, H, W) -> patch tokens (B, h*w, C) of the last block, not normalised."""
        rows, columns = self.grid_of(images)
        tokens = self.conv1(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.expand(len(tokens), 1, -1), tokens], dim=1)
        tokens = self.ln_pre(tokens + self.position_embedding(rows, columns))
        for block in self.transformer.resblocks:
            tokens = block(tokens, backend=backend)
        return tokens[:, 1:]
