"""Image-to-video adaptation through object tokens.

Qian, Ding, Lin, "Rethinking Image-to-Video Adaptation: An Object-centric Perspective", ECCV 2024, arXiv 2407.06871.
A frozen image encoder (DINO, DINOv2 or CLIP) gives features per frame, slot attention with learned queries turns each
frame into object tokens (a query is the same object in all frames), and their changes between frames give the class
of the video; the slots' masks segment it without labels.

>>> import torch
>>> from vidops.models.object_adapter import ObjectAdapter
>>> with torch.device("meta"):
...     model = ObjectAdapter("vit_small_16")
>>> sum(p.numel() for p in model.parameters() if p.requires_grad)
5151502
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from vidops.checkpoints import LoadReport
from vidops.models.clip_vit import ClipEncoder
from vidops.models.object_adapter_heads import EPS, Adapter3d, ObjectStateChange, SpaceTimeAttention, two_layers
from vidops.models.object_adapter_losses import (
    LossSettings,
    distillation_loss,
    mask_diversity_loss,
    slot_masks,
    state_change_loss,
)
from vidops.models.recipe import parameter_groups
from vidops.models.vit import Block, DinoEncoder, load_with_encoder
from vidops.nn import LearnedQuerySlotAttention

ENCODERS = ("dino", "dinov2", "clip")
INTERACTIONS = ("state_change", "space_time")


@dataclass(frozen=True)
class ObjectAdapterConfig:
    """Sizes and numbers of the model; the defaults are those of the authors' start script.

    `encoder` is ``"dino"`` or ``"dinov2"``, whose last keys the slots see, or ``"clip"``, of which they see the last
    tokens. `adapter` puts `Adapter3d` before the slots, `temporal_blocks` transformer blocks over all tokens of a clip
    (of `object_heads` heads). `interaction` is ``"state_change"``, or ``"space_time"``, which takes
    clips of exactly `frames` frames.
    """

    encoder: str = "dino"
    dim: int = 384
    depth: int = 12
    encoder_heads: int = 6
    patch: int = 16
    img_size: int = 224
    hidden: int = 1536
    encoder_eps: float = 1e-6
    adapter: bool = False
    temporal_blocks: int = 0
    slots: int = 8
    slot_hidden: int = 32
    slot_iters: int = 3
    slot_eps: float = 1e-8
    embed_dim: int = 512
    classes: int = 174
    interaction: str = "state_change"
    frames: int = 8
    object_heads: int = 8
    drop_path: float = 0.1
    losses: LossSettings = field(default_factory=LossSettings)

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, torch.Tensor], *, encoder_heads: int, **changes: Any
    ) -> ObjectAdapterConfig:
        """The configuration of a full state dict. Head counts leave no trace in it: name them."""
        clip = "encoder.conv1.weight" in state
        prefix = "encoder.transformer.resblocks." if clip else "encoder.blocks."
        try:
            dim, _, patch, _ = state["encoder.conv1.weight" if clip else "encoder.patch_embed.proj.weight"].shape
            stored = state["encoder.positional_embedding" if clip else "encoder.pos_embed"].shape[-2] - 1
            found: dict[str, Any] = {
                "hidden": len(state[prefix + ("0.mlp.c_fc.weight" if clip else "0.mlp.fc1.weight")]),
                "slots": len(state["slot_attention.slots_embedding.weight"]),
                "slot_hidden": len(state["slot_attention.project_q.weight"]),
                "embed_dim": len(state["mlp_slot.2.weight"]),
                "classes": len(state["st_block.cls_layer.weight"]),
            }
        except KeyError as error:
            raise ValueError(f"state: not a full object_adapter state dict, {error.args[0]} is missing") from error
        if "st_block.time_embed" in state:
            found |= {"interaction": "space_time", "frames": state["st_block.time_embed"].shape[1]}
        if clip:
            found |= {"encoder": "clip", "encoder_eps": 1e-5}
        elif "encoder.mask_token" in state:
            found["encoder"] = "dinov2"

        def count(prefix: str) -> int:
            return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})

        return cls(
            dim=dim,
            depth=count(prefix),
            temporal_blocks=count("temporal_transformer."),
            encoder_heads=encoder_heads,
            patch=patch,
            img_size=math.isqrt(stored) * patch,
            adapter="adapter.0.weight" in state,
            **(found | changes),
        )


# Widths of the joint space that the public CLIP encoders project to, by their own width.
CLIP_WIDTHS = {768: 512, 1024: 768}

CONFIGS = {
    "vit_small_16": ObjectAdapterConfig(),
    "vit_base_16": ObjectAdapterConfig(dim=768, encoder_heads=12, hidden=3072),
    "dinov2_small_14": ObjectAdapterConfig(encoder="dinov2", patch=14, img_size=518),
    "clip_base_16": ObjectAdapterConfig(encoder="clip", dim=768, encoder_heads=12, hidden=3072, encoder_eps=1e-5),
    "clip_large_14": ObjectAdapterConfig(
        encoder="clip", dim=1024, depth=24, encoder_heads=16, patch=14, hidden=4096, encoder_eps=1e-5
    ),
    # For examples and tests: runs in milliseconds, same structure.
    "tiny": ObjectAdapterConfig(
        dim=48, depth=2, encoder_heads=3, patch=8, img_size=32, hidden=192, slots=4, slot_hidden=8, embed_dim=24,
        classes=5, frames=3,
    ),
}  # fmt: skip


def resolve_config(config: str | ObjectAdapterConfig) -> ObjectAdapterConfig:
    if isinstance(config, ObjectAdapterConfig):
        return config
    if config not in CONFIGS:
        raise ValueError(
            f"config: expected an ObjectAdapterConfig or one of {', '.join(map(repr, CONFIGS))}, got {config!r}"
        )
    return CONFIGS[config]


class Objects(NamedTuple):
    """Object tokens of a clip; a slot index is one object in all frames."""

    slots: torch.Tensor  # (B, T, S, C)
    dots: torch.Tensor  # of the last iteration, before the softmax (B, T, S, N)

    def masks(self) -> torch.Tensor:
        """(B, T, S, N): softmax of the dots over the slots."""
        return slot_masks(self.dots)


class Output(NamedTuple):
    """What the forward returns; R pairs of frames in the order of `frame_pairs`."""

    objects: Objects
    embedding: torch.Tensor  # unit object embeddings (B, T, S, O)
    video: torch.Tensor  # feature of the video (B, O)
    logit: torch.Tensor  # (B, classes)
    state: torch.Tensor | None  # changes (B, R, S, O), None for space_time or when not asked for


class Losses(NamedTuple):
    total: torch.Tensor  # weighted sum of the others
    classification: torch.Tensor
    diversity: torch.Tensor
    state_change: torch.Tensor
    distillation: torch.Tensor


def make_encoder(config: ObjectAdapterConfig) -> DinoEncoder | ClipEncoder:
    """The encoder of a configuration, with random weights."""
    c = config
    sizes: dict[str, Any] = {
        "dim": c.dim,
        "depth": c.depth,
        "heads": c.encoder_heads,
        "patch": c.patch,
        "img_size": c.img_size,
        "hidden": c.hidden,
        "eps": c.encoder_eps,
    }
    if c.encoder == "dino":
        return DinoEncoder(**sizes)
    if c.encoder == "dinov2":
        return DinoEncoder(**sizes, layer_scale=1.0, mask_token=True)
    if c.encoder == "clip":
        return ClipEncoder(**sizes, out=CLIP_WIDTHS.get(c.dim, c.embed_dim))
    raise ValueError(f"encoder: expected one of {', '.join(ENCODERS)}, got {c.encoder!r}")


class ObjectAdapter(nn.Module):
    """The model of Qian et al.: frozen image encoder, object tokens, interaction, classifier.

    Args:
        config: a name in `CONFIGS` or an `ObjectAdapterConfig`.

    The encoder of a model made here has random weights; `from_pretrained` loads them. Only the interaction behaves
    differently in training mode. Input is normalised with ImageNet's statistics (`ssl_uvos.preprocess` with
    ``size=(224, 224), patch=16, normalisation="train"``).
    """

    load_report: LoadReport | None = None

    def __init__(self, config: str | ObjectAdapterConfig = "vit_small_16") -> None:
        super().__init__()
        c = self.config = resolve_config(config)
        self.encoder = make_encoder(c)
        self.encoder.requires_grad_(False)
        self.adapter = Adapter3d(c.dim) if c.adapter else None
        # Names and order of the authors'; absent with no blocks.
        if c.temporal_blocks:
            self.temporal_transformer = nn.ModuleList(
                Block(c.dim, c.object_heads, hidden=4 * c.dim, qkv_bias=False, eps=EPS)
                for _ in range(c.temporal_blocks)
            )
        self.slot_attention = LearnedQuerySlotAttention(c.slots, c.dim, c.slot_iters, c.slot_eps, c.slot_hidden)
        self.mlp_slot = two_layers(c.dim, 2 * c.dim, c.embed_dim)
        self.st_block: ObjectStateChange | SpaceTimeAttention
        if c.interaction == "state_change":
            self.st_block = ObjectStateChange(
                c.dim, c.embed_dim, c.classes, heads=c.object_heads, drop_path=c.drop_path
            )
        elif c.interaction == "space_time":
            self.st_block = SpaceTimeAttention(
                c.dim, c.embed_dim, c.classes, frames=c.frames, slots=c.slots, heads=c.object_heads
            )
        else:
            raise ValueError(f"interaction: expected one of {', '.join(INTERACTIONS)}, got {c.interaction!r}")

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        config: str | ObjectAdapterConfig = "vit_small_16",
        *,
        strict: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> ObjectAdapter:
        """A model with the weights of a local checkpoint, in eval mode; see `load_checkpoint`."""
        model = cls(config).to(dtype)
        model.load_checkpoint(path, strict=strict)
        return model.eval()

    def load_checkpoint(self, path: str | Path, *, strict: bool = True) -> LoadReport:
        """Load a checkpoint in the authors' layout, or weights of DINO or CLIP for the encoder alone.

        Files and layouts are those of `vidops.models.ssl_uvos.SSLUVOS.load_checkpoint`. With `strict` every parameter
        must be in the file and nothing else. Without it everything but the encoder may be missing and further names
        are reported. The report returned is kept as `load_report`.

        Raises CheckpointError (a ValueError) for every file that cannot be read or does not fit.
        """
        self.load_report = load_with_encoder(self, path, strict=strict)
        return self.load_report

    def find_objects(self, clip: torch.Tensor, *, backend: str | None = None) -> Objects:
        """Normalised frames (B, T, 3, H, W) -> object tokens; one frame is enough."""
        batch, frames = self._clip_shape(clip)
        images = clip.flatten(0, 1)
        with torch.no_grad():
            if isinstance(self.encoder, ClipEncoder):
                features = self.encoder.features(images, backend=backend)
            else:
                features = self.encoder.keys(images, backend=backend)
        if self.adapter is not None:
            grid = self.encoder.grid_of(images)
            volume = features.unflatten(0, (batch, frames)).unflatten(2, grid).permute(0, 4, 1, 2, 3)
            features = self.adapter(volume).permute(0, 2, 3, 4, 1).flatten(2, 3).flatten(0, 1)
        if self.config.temporal_blocks:
            tokens = features.unflatten(0, (batch, frames)).flatten(1, 2)
            for block in self.temporal_transformer:
                tokens, _ = block(tokens, backend=backend)
            features = tokens.unflatten(1, (frames, -1)).flatten(0, 1)
        slots, dots = self.slot_attention(features, backend=backend)
        return Objects(slots.unflatten(0, (batch, frames)), dots.unflatten(0, (batch, frames)))

    @staticmethod
    def _clip_shape(clip: torch.Tensor) -> tuple[int, int]:
        if clip.dim() != 5 or clip.shape[2] != 3 or 0 in clip.shape:
            raise ValueError(f"clip: expected shape (B, T, 3, H, W), got {tuple(clip.shape)}")
        return clip.shape[0], clip.shape[1]

    def embed(self, slots: torch.Tensor) -> torch.Tensor:
        """Slots (..., C) -> unit embeddings (..., O) in the teacher's space."""
        return F.normalize(self.mlp_slot(slots), dim=-1, eps=1e-12)

    def forward(self, clip: torch.Tensor, *, need_state: bool = True, backend: str | None = None) -> Output:
        """Classify clips and give all that the losses need, sheet 3.1 to 3.5.

        Args:
            clip: normalised frames (B, T, 3, H, W); T >= 2 for state changes, `config.frames` for space_time.
            need_state: compute the embeddings of the state changes, which only the losses use.
            backend: backend of every vidops op, default chosen per op.
        """
        self.st_block.check_frames(self._clip_shape(clip)[1])
        objects = self.find_objects(clip, backend=backend)
        state = None
        if isinstance(self.st_block, ObjectStateChange):
            found = self.st_block(objects.slots, need_state=need_state, backend=backend)
            state = found.state
        else:
            found = self.st_block(objects.slots, backend=backend)
        return Output(objects, self.embed(objects.slots), found.video, found.logit, state)

    def losses(
        self,
        output: Output,
        label: torch.Tensor,
        teacher: torch.Tensor,
        permutation: torch.Tensor | None = None,
        *,
        keys: torch.Tensor | None = None,
        key_label: torch.Tensor | None = None,
    ) -> Losses:
        """The four terms of sheet 3.6 and their weighted sum.

        Args:
            output: of this model with ``need_state=True`` and state changes.
            label: classes (B,) int64.
            teacher: unit image embeddings (B, T, O) of the frames.
            permutation: (R,) int64, default drawn from torch's global generator.
            keys, key_label: states and classes gathered over ranks, default those of `output`.
        """
        if output.state is None:
            raise ValueError("output: holds no states, which the state-change loss needs")
        if permutation is None:
            permutation = torch.randperm(output.state.shape[1])
        settings = self.config.losses
        classification = F.cross_entropy(output.logit, label)
        diversity = mask_diversity_loss(output.objects.dots)
        change = state_change_loss(
            output.state,
            label,
            permutation.to(label.device),
            keys=keys,
            key_label=key_label,
            settings=settings,
        )
        distillation = distillation_loss(output.embedding, teacher, settings)
        total = (
            settings.classification * classification
            + settings.diversity * diversity
            + settings.state_change * change
            + settings.distillation * distillation
        )
        return Losses(total, classification, diversity, change, distillation)

    def training_step(
        self, clip: torch.Tensor, label: torch.Tensor, teacher: torch.Tensor, *, backend: str | None = None
    ) -> Losses:
        """Forward and losses of one batch of clips, see `losses`; call `.total.backward()` on the result."""
        return self.losses(self(clip, backend=backend), label, teacher)

    def parameter_groups(self, weight_decay: float = 0.1) -> list[dict[str, Any]]:
        """What is trained, for AdamW: no decay on biases, norms and embeddings, sheet 3.7."""
        names = ("slots_embedding.weight", "st_token", "time_embed", "slots_embed")
        embeddings = [name for name, _ in self.named_parameters() if name.endswith(names)]
        return parameter_groups(self, weight_decay, undecayed=embeddings)

    @torch.no_grad()
    def segment(
        self, video: torch.Tensor, *, size: tuple[int, int] | None = None, backend: str | None = None
    ) -> torch.Tensor:
        """Slot of every pixel, (T, H, W) int64, for normalised frames (T, 3, H, W), sheet section 5.

        `size` is that of the result, default that of the frames. The masks are resized bilinearly before the choice.
        """
        if video.dim() != 4:
            raise ValueError(f"video: expected shape (T, 3, H, W), got {tuple(video.shape)}")
        masks = self.find_objects(video[None], backend=backend).masks()[0].unflatten(-1, self.encoder.grid_of(video))
        size = size or (video.shape[2], video.shape[3])
        return F.interpolate(masks, size=size, mode="bilinear", align_corners=False).argmax(1)
