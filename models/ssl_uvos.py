"""Self-supervised video object segmentation from spatio-temporal attention maps.

Ding, Qian, Xu, Lin, Xiong, "Betrayed by Attention: A Simple yet Effective Approach for Self-supervised Video
Object Segmentation", ECCV 2024, arXiv 2311.17893. A frozen DINO ViT gives key features per frame, one block
over all tokens of a clip learns spatio-temporal attention, and the rows of its head-averaged map are
clustered under the symmetrised KL divergence into the objects of the whole video.

>>> import torch
>>> from vidops.models.ssl_uvos import SSLUVOS
>>> with torch.device("meta"):
...     model = SSLUVOS("vit_small_8")
>>> sum(p.numel() for p in model.parameters())
23443584
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn

import vidops
from vidops.checkpoints import LoadReport
from vidops.models import recipe
from vidops.models.recipe import parameter_groups as parameter_groups
from vidops.models.ssl_uvos_losses import LossSettings, motion_loss, sample_patches, semantic_loss
from vidops.models.vit import Block, DinoEncoder, load_with_encoder

# The authors train with ImageNet's statistics and test with others; numbers of the paper need both.
NORMALISATIONS = {
    "train": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "test": ((0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)),
}
TEST_SIZE = (320, 480)
TRAIN_SIZE = (192, 384)


@dataclass(frozen=True)
class SSLUVOSConfig:
    """Sizes and numbers of the model; the defaults are those of the paper."""

    dim: int = 384
    depth: int = 12
    encoder_heads: int = 6
    patch: int = 8
    img_size: int = 224
    hidden: int = 1536
    temporal_heads: int = 8
    temporal_blocks: int = 1
    temporal_hidden: int = 1536
    attention_dropout: float = 0.4
    dropout: float = 0.1
    losses: LossSettings = field(default_factory=LossSettings)

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, torch.Tensor], *, encoder_heads: int, temporal_heads: int = 8, **changes: Any
    ) -> SSLUVOSConfig:
        """The configuration of a full state dict. Head counts leave no trace in it: name them."""
        try:
            dim, _, patch, _ = state["encoder.patch_embed.proj.weight"].shape
            stored = state["encoder.pos_embed"].shape[1] - 1
            hidden = state["encoder.blocks.0.mlp.fc1.weight"].shape[0]
            temporal_hidden = state["temporal_transformer.0.mlp.fc1.weight"].shape[0]
        except KeyError as error:
            raise ValueError(f"state: not a full ssl_uvos state dict, {error.args[0]} is missing") from error
        return cls(
            dim=dim,
            depth=_count(state, "encoder.blocks."),
            encoder_heads=encoder_heads,
            patch=patch,
            img_size=math.isqrt(stored) * patch,
            hidden=hidden,
            temporal_heads=temporal_heads,
            temporal_blocks=_count(state, "temporal_transformer."),
            temporal_hidden=temporal_hidden,
            **changes,
        )


def _count(state: Mapping[str, torch.Tensor], prefix: str) -> int:
    numbers = {name[len(prefix) :].split(".", 1)[0] for name in state if name.startswith(prefix)}
    return len(numbers)


CONFIGS = {
    "vit_small_8": SSLUVOSConfig(),
    "vit_small_16": SSLUVOSConfig(patch=16),
    "vit_base_8": SSLUVOSConfig(dim=768, encoder_heads=12, hidden=3072, temporal_hidden=3072),
    # For examples and tests: runs in milliseconds, same structure.
    "tiny": SSLUVOSConfig(dim=48, depth=2, encoder_heads=3, img_size=32, hidden=192, temporal_hidden=192),
}


def resolve_config(config: str | SSLUVOSConfig) -> SSLUVOSConfig:
    if isinstance(config, SSLUVOSConfig):
        return config
    if config not in CONFIGS:
        raise ValueError(
            f"config: expected an SSLUVOSConfig or one of {', '.join(map(repr, CONFIGS))}, got {config!r}"
        )
    return CONFIGS[config]


class TrainingOutput(NamedTuple):
    """What the training forward returns, sheet 2.2; HW patches per frame, index t*HW + p."""

    dino_map: torch.Tensor  # head mean of the encoder's last weights, no CLS (B*T, HW, HW)
    x: torch.Tensor  # encoder patch tokens (B, T, HW, C)
    attention: torch.Tensor  # A: head mean of the block's weights, no CLS, not renormalised (B, T*HW, T*HW)
    slot: torch.Tensor  # block output tokens, no CLS (B, T, HW, C)


class Losses(NamedTuple):
    total: torch.Tensor
    semantic: torch.Tensor
    motion: torch.Tensor
    weight: torch.Tensor  # weights (B, T, n) of the sampled patches
    sample: torch.Tensor  # patch positions (n,)


class Segmentation(NamedTuple):
    """Clusters of a video: every cluster is a proposal, background included."""

    labels: torch.Tensor  # (T, h, w) int64, patch resolution
    centroids: torch.Tensor  # (K, M)

    @property
    def num_clusters(self) -> int:
        return len(self.centroids)

    def masks(self) -> torch.Tensor:
        """One-hot proposals (T, K, h, w) bool."""
        clusters = torch.arange(self.num_clusters, device=self.labels.device)
        return self.labels[:, None] == clusters[:, None, None]


class SSLUVOS(nn.Module):
    """The model of Ding et al.: frozen DINO encoder, spatio-temporal block, clustering of attention maps.

    Args:
        config: a name in `CONFIGS` or an `SSLUVOSConfig`.
        freeze_encoder: keep the encoder out of training (the paper's setting).

    The encoder of a model made here has random weights; `from_pretrained` loads them.
    """

    load_report: LoadReport | None = None

    def __init__(self, config: str | SSLUVOSConfig = "vit_small_8", *, freeze_encoder: bool = True) -> None:
        super().__init__()
        c = self.config = resolve_config(config)
        self.encoder = DinoEncoder(
            dim=c.dim,
            depth=c.depth,
            heads=c.encoder_heads,
            patch=c.patch,
            img_size=c.img_size,
            hidden=c.hidden,
        )
        if c.temporal_blocks < 1:
            raise ValueError(f"temporal_blocks: expected at least 1, got {c.temporal_blocks}")
        self.temporal_transformer = nn.ModuleList(
            Block(
                c.dim,
                c.temporal_heads,
                hidden=c.temporal_hidden,
                qkv_bias=False,
                eps=1e-5,
                attention_dropout=c.attention_dropout,
                dropout=c.dropout,
            )
            for _ in range(c.temporal_blocks)
        )
        self.encoder_frozen = freeze_encoder
        if freeze_encoder:
            self.encoder.requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        config: str | SSLUVOSConfig = "vit_small_8",
        *,
        strict: bool = True,
        freeze_encoder: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> SSLUVOS:
        """A model with the weights of a local checkpoint, in eval mode; see `load_checkpoint`."""
        model = cls(config, freeze_encoder=freeze_encoder).to(dtype)
        model.load_checkpoint(path, strict=strict)
        return model.eval()

    def load_checkpoint(self, path: str | Path, *, strict: bool = True) -> LoadReport:
        """Load the authors' checkpoint, or DINO weights for the encoder alone, from a local file.

        Accepted: `.safetensors`, or a `torch.save` file, with a plain state dict, ``{"model_state_dict":
        ...}``, the names of a bare DINO backbone, or DINO's full training checkpoint (its teacher's backbone
        is used).

        With `strict` every parameter must be in the file and nothing else. Without it the spatio-temporal
        block may be missing and further names are reported; the encoder must always be complete, because a
        random encoder runs without an error and finds nothing. The report returned is kept as `load_report`.

        Raises CheckpointError (a ValueError) for every file that cannot be read or does not fit.
        """
        self.load_report = load_with_encoder(self, path, strict=strict)
        return self.load_report

    def forward(
        self, clip: torch.Tensor, *, seed: int | None = None, backend: str | None = None
    ) -> TrainingOutput:
        """Training forward, sheet 2.2 items 1 to 5.

        Args:
            clip: normalised frames (B, T, 3, H, W).
            seed: of the attention dropout, default drawn from torch's generator; used in training mode only.
            backend: backend of every vidops op, default chosen per op.
        """
        batch, frames = self._clip_shape(clip)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.encoder_frozen):
            encoded = self.encoder(clip.flatten(0, 1), backend=backend)
        keys = encoded.k.flatten(2).transpose(1, 2)
        # The CLS slot holds an output token while the patches hold keys: so in the authors' model.
        tokens = torch.cat([encoded.cls[:, None], keys], dim=1)
        length = tokens.shape[1]
        tokens = tokens.unflatten(0, (batch, frames)).flatten(1, 2)
        blocks = list(self.temporal_transformer)
        for i, block in enumerate(blocks[:-1]):
            # One seed per block: with the same one, every block would drop the same weights.
            block_seed = None if seed is None else (seed + 1 + i) % 2**63
            tokens, _ = block(tokens, seed=block_seed, backend=backend)
        tokens, attention = blocks[-1](tokens, "map", seed=seed, backend=backend)
        attention = attention.unflatten(2, (frames, length)).unflatten(1, (frames, length))
        attention = attention[:, :, 1:, :, 1:].flatten(3, 4).flatten(1, 2)
        dino_map = encoded.attn.mean(1)[:, 1:, 1:]
        x = encoded.x.flatten(2).transpose(1, 2).unflatten(0, (batch, frames))
        slot = tokens.unflatten(1, (frames, length))[:, :, 1:]
        return TrainingOutput(dino_map, x, attention, slot)

    @staticmethod
    def _clip_shape(clip: torch.Tensor) -> tuple[int, int]:
        if clip.dim() != 5 or clip.shape[2] != 3 or 0 in clip.shape:
            raise ValueError(f"clip: expected shape (B, T, 3, H, W), got {tuple(clip.shape)}")
        return clip.shape[0], clip.shape[1]

    def losses(self, output: TrainingOutput, sample: torch.Tensor) -> Losses:
        """Eqs. E6 and E7 and their sum for the patch positions `sample` (n,) int64."""
        sample = sample.to(output.slot.device)
        semantic = semantic_loss(output.attention, output.slot, sample, self.config.losses)
        motion, weight = motion_loss(output.attention, output.slot.shape[1], sample, self.config.losses)
        return Losses(semantic + motion, semantic, motion, weight, sample)

    def training_step(
        self,
        clip: torch.Tensor,
        *,
        sample: torch.Tensor | None = None,
        seed: int | None = None,
        backend: str | None = None,
    ) -> Losses:
        """Forward and losses of one batch of clips; call `.total.backward()` on the result.

        `sample` and the dropout `seed` are drawn from torch's global generator when not given.
        """
        output = self(clip, seed=seed, backend=backend)
        if sample is None:
            sample = sample_patches(output.slot.shape[2], self.config.losses.samples)
        return self.losses(output, sample)

    def _only_block(self) -> Block:
        if len(self.temporal_transformer) != 1:
            raise ValueError("segmentation is defined for one spatio-temporal block (temporal_blocks = 1)")
        return cast(Block, self.temporal_transformer[0])

    @torch.no_grad()
    def queries_keys(
        self,
        video: torch.Tensor,
        *,
        ratio: int = 10,
        frames_per_batch: int = 1,
        progress: Callable[[int], None] | None = None,
        backend: str | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries of all frames and keys of the key frames, sheet 2.3.

        Args:
            video: normalised frames (T, 3, H, W); may lie on another device than the model.
            ratio: every `ratio`-th frame is a key frame, max(1, T // ratio) of them, the first included.
            frames_per_batch: frames encoded together.
            progress: called with the number of frames done.

        Returns:
            q (T, heads, HW, d) and k (Tk, heads, HW, d). Keys of other frames are never computed.
        """
        if video.dim() != 4 or 0 in video.shape:
            raise ValueError(f"video: expected shape (T, 3, H, W), got {tuple(video.shape)}")
        if ratio < 1 or frames_per_batch < 1:
            raise ValueError(f"ratio, frames_per_batch: expected at least 1, got {ratio}, {frames_per_batch}")
        block = self._only_block()
        frames = len(video)
        key_frames = max(1, frames // ratio)
        weight = block.attn.qkv.weight
        queries, keys = [], []
        for start in range(0, frames, frames_per_batch):
            batch = video[start : start + frames_per_batch].to(device=weight.device, dtype=weight.dtype)
            features = block.norm1(self.encoder.keys(batch, backend=backend))
            queries += block.attn.project(features, 0, 1)
            shown = range(start, start + len(batch))
            here = [t - start for t in shown if t % ratio == 0 and t // ratio < key_frames]
            if here:
                keys += block.attn.project(features[here], 1, 2)
            if progress is not None:
                progress(start + len(batch))
        return torch.cat(queries), torch.cat(keys)

    @torch.no_grad()
    def segment(
        self,
        video: torch.Tensor,
        *,
        tau: float = 1.0,
        ratio: int = 10,
        window: int = 3,
        precision: str = "filtered",
        frames_per_batch: int = 1,
        progress: Callable[[int], None] | None = None,
        backend: str | None = None,
    ) -> Segmentation:
        """Segment a whole video (T, 3, H, W) of normalised frames, sheet 2.3 to 2.5.

        `tau`, `window` and `precision` are those of `vidops.hierarchical_cluster`, the rest as for
        `queries_keys`. The map over all tokens is never held.
        """
        q, k = self.queries_keys(
            video, ratio=ratio, frames_per_batch=frames_per_batch, progress=progress, backend=backend
        )
        clusters = cast(
            vidops.Clusters,
            vidops.hierarchical_cluster(
                q,
                k,
                tau=tau,
                window=window,
                scale=self._only_block().attn.scale,
                precision=precision,
                backend=backend,
            ),
        )
        columns = video.shape[-1] // self.config.patch
        return Segmentation(clusters.labels.unflatten(1, (-1, columns)), clusters.centroids)


def preprocess(
    frames: torch.Tensor,
    *,
    size: tuple[int, int] | int = TEST_SIZE,
    patch: int = 8,
    normalisation: str = "test",
) -> torch.Tensor:
    """Frames as decoded -> input of the model: divide by 255, resize bilinearly, normalise.

    Args:
        frames: (T, H, W, 3) uint8.
        size: (height, width) in multiples of `patch`, or -1 for the frames' own size floored to them.
        normalisation: "test" (the authors' test statistics) or "train" (ImageNet's).

    Returns:
        (T, 3, height, width) float32.
    """
    if frames.dim() != 4 or frames.shape[-1] != 3 or frames.dtype != torch.uint8:
        raise ValueError(f"frames: expected uint8 (T, H, W, 3), got {frames.dtype} {tuple(frames.shape)}")
    if normalisation not in NORMALISATIONS:
        raise ValueError(
            f"normalisation: expected one of {', '.join(map(repr, NORMALISATIONS))}, got {normalisation!r}"
        )
    if size == -1:
        height, width = (n // patch * patch for n in frames.shape[1:3])
    elif isinstance(size, int):
        raise ValueError(f"size: expected (height, width) or -1, got {size}")
    else:
        height, width = size
    if min(height, width) < patch or height % patch or width % patch:
        raise ValueError(f"size: {height}x{width} are no multiples of the patch size {patch}")
    mean, std = (torch.tensor(v, device=frames.device).view(3, 1, 1) for v in NORMALISATIONS[normalisation])
    images = frames.permute(0, 3, 1, 2).float() / 255
    if images.shape[-2:] != (height, width):
        images = F.interpolate(images, size=(height, width), mode="bilinear", align_corners=False)
    return (images - mean) / std


def cosine_lr(iteration: int, *, total: int = 60_000, base: float = 1e-5, final: float = 1e-6) -> float:
    """Learning rate of the recipe: cosine from `base` to `final` over `total` iterations, no warm-up."""
    return recipe.cosine_lr(iteration, total=total, base=base, final=final)


def with_losses(config: str | SSLUVOSConfig, **changes: Any) -> SSLUVOSConfig:
    """A configuration whose loss settings have some fields replaced, for small frames."""
    config = resolve_config(config)
    return replace(config, losses=replace(config.losses, **changes))
