"""Video transformers that drop redundant tokens on the way: VideoMAE's ViT with semantic-aware temporal accumulation.

Ding, Zhao, Zhang, Qian, Xiong, Tian, "Prune Spatio-temporal Tokens by Semantic-aware Temporal Accumulation", ICCV 2023,
arXiv 2308.04549. After three blocks every frame, then every two and four frames, lose the `r` tokens that the frames
before make redundant. Nothing is trained for it: fine-tuned VideoMAE weights are used as they are, and `r` may change
at any time. `vidops.models.video_swin` is the paper's other model.

>>> import torch
>>> from vidops.models.sta import CONFIGS, VideoViT, gflops
>>> with torch.device("meta"):
...     model = VideoViT("vit_large")
>>> sum(p.numel() for p in model.parameters())
304270736
>>> [round(gflops(CONFIGS["vit_large"], r)) for r in (0, 32, 48, 64)]
[597, 447, 376, 309]
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import vidops
from vidops import checkpoints
from vidops.checkpoints import CheckpointError, LoadReport
from vidops.models.sta_checkpoints import convert as convert
from vidops.models.sta_checkpoints import from_hf_state as from_hf_state
from vidops.models.sta_checkpoints import layout_of, split_hf_state
from vidops.models.sta_checkpoints import to_hf_state as to_hf_state
from vidops.models.views import classify_views as classify_views
from vidops.models.views import views as views
from vidops.models.vit import Block
from vidops.ops import _checks

# The calls of a forward: groups of 1, 2 and 4 token-frames, every second one from the last group to the first.
CALLS = 3


@dataclass(frozen=True)
class VideoViTConfig:
    """Sizes and numbers of the model; the defaults are those of ViT-B.

    `frames` of `img_size` squared pixels are cut into patches of `tubelet` frames and `patch` squared pixels; there are
    ``frames / tubelet`` token-frames, a multiple of 4. `eps` is that of the blocks, `head_eps` that of the last
    LayerNorm. `drop_path` is the stochastic depth of the last block in training mode, `init_scale` the factor on the
    random head. `r` is what `VideoViT.r` starts with; `first_frame_pruned` is that of `vidops.sta_prune`.

    Raises ValueError for sizes that do not fit, and an `r` that leaves a group without tokens.
    """

    frames: int = 16
    tubelet: int = 2
    img_size: int = 224
    patch: int = 16
    classes: int = 400
    dim: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    eps: float = 1e-6
    head_eps: float = 1e-6
    drop_path: float = 0.0
    init_scale: float = 0.001
    r: int = 0
    first_frame_pruned: bool = False

    def __post_init__(self) -> None:
        for name in ("frames", "tubelet", "img_size", "patch", "classes", "dim", "depth", "heads", "hidden"):
            _checks.integer(name, getattr(self, name), 1)
        if self.frames % (4 * self.tubelet):
            raise ValueError(
                f"frames: expected a multiple of {4 * self.tubelet}, so that the token-frames of {self.tubelet} frames "
                f"form groups of 1, 2 and 4; got {self.frames}"
            )
        if self.img_size % self.patch:
            raise ValueError(f"img_size: expected a multiple of the patch size {self.patch}, got {self.img_size}")
        if self.depth < CALLS:
            raise ValueError(f"depth: expected at least {CALLS} blocks, after which tokens go; got {self.depth}")
        if self.dim % self.heads:
            raise ValueError(f"heads: {self.dim} channels do not split into {self.heads} heads")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path: expected 0 <= p < 1, got {self.drop_path}")
        tokens_after(self)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Token-frames, rows and columns of tokens."""
        side = self.img_size // self.patch
        return self.frames // self.tubelet, side, side

    @property
    def tokens(self) -> int:
        groups, rows, columns = self.grid
        return groups * rows * columns

    @property
    def prune_blocks(self) -> tuple[int, ...]:
        """After which blocks tokens are dropped, counted from 0."""
        return tuple(call * self.depth // CALLS for call in range(CALLS))

    @classmethod
    def from_state_dict(cls, state: Mapping[str, torch.Tensor], *, heads: int, **changes: Any) -> VideoViTConfig:
        """The configuration of a full state dict under the model's own names.

        Head count, frames and image size leave no trace in it: name them. Heads cannot be guessed from the width, any
        divisor of it loads.
        """
        try:
            dim, _, tubelet, patch, _ = state["patch_embed.proj.weight"].shape
            hidden = len(state["blocks.0.mlp.fc1.weight"])
            classes = len(state["head.weight"])
        except KeyError as error:
            raise ValueError(f"state: not a full VideoMAE state dict, {error.args[0]} is missing") from error
        depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
        found: dict[str, Any] = {
            "tubelet": tubelet,
            "patch": patch,
            "classes": classes,
            "dim": dim,
            "depth": depth,
            "heads": heads,
            "hidden": hidden,
        }
        return cls(**found | changes)

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any], **changes: Any) -> VideoViTConfig:
        """The configuration that a ``config.json`` of Hugging Face's VideoMAE means, its epsilons included.

        Raises ValueError for a key that is missing, and for an option that fine-tuned VideoMAE models do not have.
        """
        names = {
            "frames": "num_frames",
            "tubelet": "tubelet_size",
            "img_size": "image_size",
            "patch": "patch_size",
            "dim": "hidden_size",
            "depth": "num_hidden_layers",
            "heads": "num_attention_heads",
            "hidden": "intermediate_size",
            "eps": "layer_norm_eps",
        }
        lacking = [theirs for theirs in names.values() if theirs not in config]
        if lacking:
            raise ValueError(f"config: not of a VideoMAE model, {', '.join(lacking)} missing")
        fixed = {"qkv_bias": True, "use_mean_pooling": True, "hidden_act": "gelu", "num_channels": 3}
        for name, value in fixed.items():
            if config.get(name, value) != value:
                raise ValueError(f"config: {name} is {config[name]!r}; expected {value!r}")
        labels = config.get("id2label")
        # Two is what a configuration without labels means there.
        classes = len(labels) if isinstance(labels, Mapping) else config.get("num_labels", 2)
        found = {ours: config[theirs] for ours, theirs in names.items()} | {"classes": classes, "head_eps": 1e-5}
        return cls(**found | changes)


def resolve_config(config: str | VideoViTConfig) -> VideoViTConfig:
    if isinstance(config, VideoViTConfig):
        return config
    if config not in CONFIGS:
        raise ValueError(
            f"config: expected a VideoViTConfig or one of {', '.join(map(repr, CONFIGS))}, got {config!r}"
        )
    return CONFIGS[config]


def with_hf_eps(config: str | VideoViTConfig) -> VideoViTConfig:
    """The configuration with Hugging Face's epsilons: 1e-12 in the blocks, 1e-5 before the head."""
    return replace(resolve_config(config), eps=1e-12, head_eps=1e-5)


def tokens_after(config: str | VideoViTConfig, r: int | None = None) -> tuple[int, ...]:
    """Tokens of a clip that are left after each of the three calls, when every group loses `r` (default: the
    configuration's); ValueError where a group has no more than `r`.
    """
    config = resolve_config(config)
    r = _checks.integer("r", config.r if r is None else r, 0)
    tokens, found = config.tokens, []
    for call in range(CALLS):
        groups = config.grid[0] >> call
        if r >= tokens // groups:
            raise ValueError(
                f"r: expected fewer than the {tokens // groups} tokens of a group in call {call + 1}, got {r}"
            )
        tokens -= groups * r
        found.append(tokens)
    return tuple(found)


CONFIGS = {
    "vit_small": VideoViTConfig(dim=384, heads=6, hidden=1536),
    "vit_base": VideoViTConfig(),
    "vit_large": VideoViTConfig(dim=1024, depth=24, heads=16, hidden=4096),
    "vit_huge": VideoViTConfig(dim=1280, depth=32, heads=16, hidden=5120),
    # For examples and tests: runs in milliseconds, same structure.
    "tiny": VideoViTConfig(img_size=32, patch=8, classes=10, dim=32, depth=6, heads=4, hidden=128),
}


def gflops(config: str | VideoViTConfig, r: int | None = None) -> float:
    """Multiply-adds of one clip in units of 10^9, as Table 2 counts: patches, projections, attention, MLPs and norms,
    neither the head nor the calls of pruning (0.1 % and less).
    """
    c = resolve_config(config)
    left = dict(zip(c.prune_blocks, tokens_after(c, r), strict=True))
    n = c.tokens
    total = n * 3 * c.tubelet * c.patch**2 * c.dim
    for number in range(c.depth):
        total += n * (4 * c.dim**2 + 2 * c.dim * c.hidden) + 2 * n**2 * c.dim + 10 * n * c.dim
        n = left.get(number, n)
    return total / 1e9


def sinusoid_table(positions: int, dim: int) -> torch.Tensor:
    """VideoMAE's position table (1, positions, dim) float32: of position p, channel j is the sine (even j) or cosine
    (odd j) of ``p / 10000^(2 floor(j / 2) / dim)``.
    """
    channel = torch.arange(dim, dtype=torch.float64)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] / 10000 ** (2 * (channel // 2) / dim)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()[None]


class TubeletEmbed(nn.Module):
    def __init__(self, dim: int, tubelet: int, patch: int) -> None:
        super().__init__()
        size = (tubelet, patch, patch)
        self.proj = nn.Conv3d(3, dim, kernel_size=size, stride=size)

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        """(B, 3, T, H, W) -> tokens (B, t h w, C)."""
        return self.proj(video).flatten(2).transpose(1, 2)


class Stage(NamedTuple):
    """One call of pruning: after `block`, groups of T tokens lost all but K each."""

    block: int
    pruned: vidops.Pruned  # `keep` (B, T, K) counts inside the groups of tokens that had been left; `scores` tell why
    position: torch.Tensor  # (B, T K) int64: of every token left, in its order, the place among the clip's t h w

    def mask(self, grid: tuple[int, int, int]) -> torch.Tensor:
        """(B, t, h, w) bool: which of the clip's tokens are left."""
        batch, places = len(self.position), grid[0] * grid[1] * grid[2]
        left = self.position.new_zeros(batch, places).scatter_(1, self.position, 1)
        return left.bool().unflatten(1, grid)


class Trace(NamedTuple):
    """All that one forward decided."""

    logits: torch.Tensor  # (B, classes)
    feature: torch.Tensor  # (B, C)
    tokens: torch.Tensor  # those left (B, N, C)
    stages: tuple[Stage, ...]  # none for r = 0


class VideoViT(nn.Module):
    """VideoMAE's fine-tuned ViT, with pruning by semantic-aware temporal accumulation.

    Args:
        config: a name in `CONFIGS` or a `VideoViTConfig`.

    `r`, the tokens that every group loses in each of the three calls, may be set at any time; 0 is the model without
    pruning. A model made here has random weights; `from_pretrained` loads them. The position table is a buffer that no
    state dict holds: a model made on the meta device lacks its numbers.

    >>> import torch
    >>> from vidops.models.sta import VideoViT
    >>> model = VideoViT("tiny").eval()
    >>> model.r = 3
    >>> trace = model.trace(torch.zeros(1, 3, 16, 32, 32))
    >>> [stage.position.shape[1] for stage in trace.stages]
    [104, 92, 86]
    """

    load_report: LoadReport | None = None

    def __init__(self, config: str | VideoViTConfig = "vit_base") -> None:
        super().__init__()
        c = self.config = resolve_config(config)
        self._r = c.r
        self.patch_embed = TubeletEmbed(c.dim, c.tubelet, c.patch)
        self.register_buffer("pos_embed", sinusoid_table(c.tokens, c.dim), persistent=False)
        self.blocks = nn.ModuleList(
            Block(
                c.dim,
                c.heads,
                hidden=c.hidden,
                qkv_bias=True,
                key_bias=False,
                eps=c.eps,
                drop_path=c.drop_path * i / (c.depth - 1),
            )
            for i in range(c.depth)
        )
        self.fc_norm = nn.LayerNorm(c.dim, eps=c.head_eps)
        self.head = nn.Linear(c.dim, c.classes)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.head.weight *= self.config.init_scale

    @property
    def r(self) -> int:
        return self._r

    @r.setter
    def r(self, value: int) -> None:
        tokens_after(self.config, value)
        self._r = value

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        config: str | VideoViTConfig | None = None,
        *,
        strict: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> VideoViT:
        """A model with the weights of a local checkpoint, in eval mode; see `load_checkpoint`.

        Without `config`, `path` must be a folder of Hugging Face's, whose ``config.json`` says it, its epsilons
        included. With one it decides: see `with_hf_eps` for a file of theirs that is to give their numbers exactly.
        """
        if config is None:
            config = _hf_config(Path(path))
        model = cls(config).to(dtype)
        model.load_checkpoint(path, strict=strict)
        return model.eval()

    def load_checkpoint(self, path: str | Path, *, strict: bool = True) -> LoadReport:
        """Load a fine-tuned VideoMAE from a local file, or the folder of one.

        Takes the authors' layout (plain, or under "module" or "model") and Hugging Face's
        `VideoMAEForVideoClassification`; a folder holds ``model.safetensors`` or ``pytorch_model.bin``. With `strict`
        every parameter must be in the file and nothing else. Without it the norm and the classifier at the end may be
        missing and further names are reported. The report returned is kept as `load_report`.

        Raises CheckpointError (a ValueError) for every file that cannot be read or does not fit.
        """
        path = _weights_file(Path(path))
        found = checkpoints.read_state_dict(path)
        state = checkpoints.without_prefix(found.state, "module.")
        try:
            layout = layout_of(state)
        except ValueError as error:
            raise CheckpointError(path, str(error)) from error
        if layout == "hugging_face":
            known, rest = split_hf_state(state)
            state = known | rest
        self.load_report = checkpoints.load_into(
            self,
            state,
            path=path,
            layout=f"{'Hugging Face' if layout == 'hugging_face' else 'VideoMAE'}, {found.layout}",
            strict=strict,
            required=("patch_embed.", "blocks."),
        )
        return self.load_report

    def _check_video(self, video: torch.Tensor) -> None:
        c = self.config
        expected = (3, c.frames, c.img_size, c.img_size)
        if video.dim() != 5 or tuple(video.shape[1:]) != expected:
            swapped = video.dim() == 5 and tuple(video.transpose(1, 2).shape[1:]) == expected
            hint = "; Hugging Face's order needs video.transpose(1, 2)" if swapped else ""
            raise ValueError(f"video: expected shape (B, {str(expected)[1:]}, got {tuple(video.shape)}{hint}")

    def _tokens(self, video: torch.Tensor, backend: str | None, stages: list[Stage] | None) -> torch.Tensor:
        """Tokens (B, N, C) that are left after the last block; the calls of pruning go to `stages`."""
        self._check_video(video)
        c = self.config
        x = self.patch_embed(video)
        x = x + self.pos_embed.to(x.dtype)
        calls = {block: call for call, block in enumerate(c.prune_blocks)} if self._r else {}
        position = None
        for number, block in enumerate(self.blocks):
            call = calls.get(number)
            x, keys = block(x, "none" if call is None else "keys", backend=backend)
            if call is None:
                continue
            groups = c.grid[0] >> call
            # Under autocast the keys are halves and the tokens are not.
            pruned = vidops.sta_prune(
                x,
                keys.to(x.dtype),
                groups,
                self._r,
                call % 2 == 1,
                first_frame_pruned=c.first_frame_pruned,
                backend=backend,
            )
            x = pruned.x
            if stages is not None:
                if position is None:
                    position = torch.arange(c.tokens, device=x.device).expand(len(x), -1)
                position = position.unflatten(1, (groups, -1)).gather(2, pruned.keep).flatten(1)
                stages.append(Stage(number, pruned, position))
        return x

    def features(self, video: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
        """Normalised clips (B, 3, T, H, W) -> features (B, C): the norm of the mean over all tokens left."""
        return self.fc_norm(self._tokens(video, backend, None).mean(1))

    def forward(self, video: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
        """Logits (B, classes).

        Args:
            video: clips (B, 3, T, H, W) of the configuration's sizes, normalised with ImageNet's statistics (`views`
                makes them from a decoded video).
            backend: backend of every vidops op, default chosen per op.
        """
        return self.head(self.features(video, backend=backend))

    def trace(self, video: torch.Tensor, *, backend: str | None = None) -> Trace:
        """As the forward, with all that it dropped and why; for pictures, `Stage.mask` of the last stage."""
        stages: list[Stage] = []
        tokens = self._tokens(video, backend, stages)
        feature = self.fc_norm(tokens.mean(1))
        return Trace(self.head(feature), feature, tokens, tuple(stages))


def _weights_file(path: Path) -> Path:
    """The file with the weights, for a folder of Hugging Face's."""
    if not path.is_dir():
        return path
    names = ("model.safetensors", "pytorch_model.bin")
    for name in names:
        if (path / name).is_file():
            return path / name
    raise CheckpointError(path, f"a folder with none of {', '.join(names)}")


def _hf_config(path: Path) -> VideoViTConfig:
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(
            path, "config: needed where no folder with a config.json is given; head counts leave no trace in weights"
        )
    try:
        found = json.loads(file.read_text())
        if not isinstance(found, dict):
            raise ValueError(f"holds a {type(found).__name__}; expected an object")
        return VideoViTConfig.from_hf_config(found)
    except (ValueError, TypeError) as error:
        raise CheckpointError(file, str(error)) from error
