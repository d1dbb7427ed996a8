"""Slot attention whose initial slots are learned, one set for all inputs."""

from __future__ import annotations

import torch
from torch import nn

import vidops
from vidops.nn._params import mlp, params_of
from vidops.ops import _checks


class LearnedQuerySlotAttention(nn.Module):
    """Object tokens of Qian, Ding, Lin, ECCV 2024 (arXiv 2407.06871), with the names of the authors' checkpoints.

    Queries and keys are `hidden_dim` wide, and so is the MLP; the scale stays ``dim ** -0.5``. Only the last iteration
    is differentiated, and its gradient passes on to the learned queries.
    """

    def __init__(self, num_slots: int, dim: int, iters: int = 3, eps: float = 1e-8, hidden_dim: int = 32) -> None:
        super().__init__()
        self.dim = dim
        self.num_slots = num_slots
        self.iters = iters
        self.eps = eps
        self.scale = dim**-0.5
        self.norm_input = nn.LayerNorm(dim)
        self.norm_slots = nn.LayerNorm(dim)
        self.norm_pre_ff = nn.LayerNorm(dim)
        self.slots_embedding = nn.Embedding(num_slots, dim)
        self.project_q = nn.Linear(dim, hidden_dim)
        self.project_k = nn.Linear(dim, hidden_dim)
        self.project_v = nn.Linear(dim, dim)
        self.gru = nn.GRUCell(dim, dim)
        self.mlp = mlp(dim, hidden_dim)

    def forward(
        self, inputs: torch.Tensor, init: torch.Tensor | None = None, *, backend: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """inputs (B, N, dim) -> slots (B, S, dim), dots of the last iteration (B, S, N).

        `init` (B, S, dim) replaces the learned queries.
        """
        if init is None:
            init = self.slots_embedding.weight.expand(inputs.shape[0], -1, -1)
        params = params_of(
            norm_input=self.norm_input,
            norm_slots=self.norm_slots,
            q=self.project_q,
            k=self.project_k,
            v=self.project_v,
            gru=self.gru,
            mlp=(self.norm_pre_ff, self.mlp[0], self.mlp[2]),  # type: ignore[arg-type]
        )
        return vidops.slot_attention(
            inputs,
            init,
            params,
            iters=self.iters,
            scale=self.scale,
            eps=self.eps,
            ln_eps=self.norm_input.eps,
            grad_mode="bilevel",
            return_dots=True,
            backend=backend,
        )


class QueryOptimizedSlotAttention(nn.Module):
    """BO-QSA: Jia, Liu, Huang, ICLR 2023 (arXiv 2210.08990), with the names of the authors' checkpoints.

    `eps` stands in the denominator: a slot whose weights sum to much less than it moves little. `truncate` is
    ``"bilevel"`` (the last iteration's gradient passes on to the queries), ``"fixed_point"`` (it does not) or
    ``"none"`` (through all iterations).
    """

    def __init__(
        self,
        num_slots: int,
        dim: int,
        iters: int = 3,
        eps: float = 1.0,
        hidden_dim: int = 128,
        *,
        input_dim: int | None = None,
        truncate: str = "bilevel",
    ) -> None:
        super().__init__()
        self.grad_mode = "full" if truncate == "none" else truncate
        _checks.choice("truncate", truncate, ("bilevel", "fixed_point", "none"))
        input_dim = dim if input_dim is None else input_dim
        self.dim = dim
        self.num_slots = num_slots
        self.iters = iters
        self.eps = eps
        self.scale = dim**-0.5
        self.slots_init = nn.Embedding(num_slots, dim)
        nn.init.xavier_uniform_(self.slots_init.weight)
        self.norm_feature = nn.LayerNorm(input_dim)
        self.norm_mlp = nn.LayerNorm(dim)
        self.norm_slots = nn.LayerNorm(dim)
        self.project_k = nn.Linear(input_dim, dim, bias=False)
        self.project_v = nn.Linear(input_dim, dim, bias=False)
        self.project_q = nn.Linear(dim, dim, bias=False)
        self.gru = nn.GRUCell(dim, dim)
        self.mlp = mlp(dim, hidden_dim)

    def forward(
        self,
        inputs: torch.Tensor,
        sigma: float = 0.0,
        *,
        noise: torch.Tensor | None = None,
        backend: str | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """inputs (B, N, input_dim) -> slots (B, S, dim), softmax of the last iteration (B, S, N).

        Queries are spread by `sigma` times their own size; `noise` (B, S, dim), standard normal, stands in for the
        draw from torch's generator.
        """
        queries = self.slots_init.weight.expand(inputs.shape[0], -1, -1)
        if sigma:
            noise = torch.randn_like(queries) if noise is None else noise
            queries = queries + noise * sigma * queries.detach()
        params = params_of(
            norm_input=self.norm_feature,
            norm_slots=self.norm_slots,
            q=self.project_q,
            k=self.project_k,
            v=self.project_v,
            gru=self.gru,
            mlp=(self.norm_mlp, self.mlp[0], self.mlp[2]),  # type: ignore[arg-type]
        )
        return vidops.slot_attention(
            inputs,
            queries,
            params,
            iters=self.iters,
            scale=self.scale,
            eps=self.eps,
            eps_in_denominator=True,
            ln_eps=self.norm_feature.eps,
            grad_mode=self.grad_mode,
            return_attn=True,
            backend=backend,
        )


class TwoStageSlotAttention(nn.Module):
    """SMTC: Qian, Ding, Liu, Lin, ICCV 2023 (arXiv 2308.09951), with the names of the authors' checkpoints.

    The first stage splits the tokens into semantics, from learned means. The second splits each semantic into
    instances, from samples around its mean, over the tokens whose semantic dots exceed `threshold`; with `soft_mask`
    (the authors' first release) over all tokens, weighted by the softmax of those dots, which then get a gradient.
    Weights are shared. Only the last iteration of each stage is differentiated, and its gradient passes on to the
    stage's initial slots. None reaches the means and deviations through a sample, unless it is `reparameterised`,
    which the authors' is not.
    """

    def __init__(
        self,
        num_slots: int = 16,
        num_instances: int = 4,
        dim: int = 384,
        iters: int = 3,
        eps: float = 1e-8,
        hidden_dim: int = 128,
        *,
        threshold: float = 0.3,
        soft_mask: bool = False,
        reparameterised: bool = False,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.num_slots = num_slots
        self.num_instances = num_instances
        self.iters = iters
        self.eps = eps
        self.scale = dim**-0.5
        self.threshold = threshold
        self.soft_mask = soft_mask
        self.reparameterised = reparameterised
        self.slots_mu = nn.Parameter(torch.randn(1, num_slots, 1, dim))
        self.slots_sigma = nn.Parameter(torch.zeros(1, num_slots, 1, dim))
        nn.init.xavier_uniform_(self.slots_sigma)
        self.norm_input = nn.LayerNorm(dim)
        self.norm_slots = nn.LayerNorm(dim)
        self.norm_pre_ff = nn.LayerNorm(dim)
        self.project_q = nn.Linear(dim, dim)
        self.project_k = nn.Linear(dim, dim)
        self.project_v = nn.Linear(dim, dim)
        self.mlp = mlp(dim, max(dim, hidden_dim))

    def sample_instances(self, batch: int) -> torch.Tensor:
        """Initial instances (batch, S, P, dim): draws from N(mu, exp(sigma)), with zero gradients by default."""
        size = (batch, self.num_slots, self.num_instances, self.dim)
        if self.reparameterised:
            return self.slots_mu + self.slots_sigma.exp() * torch.randn_like(self.slots_mu.expand(size))
        # A zero gradient is not an absent one: weight decay still acts on the deviations, as the authors' does.
        return torch.normal(self.slots_mu.expand(size), self.slots_sigma.exp().expand(size))

    def forward(
        self,
        inputs: torch.Tensor,
        instance_init: torch.Tensor | None = None,
        *,
        iters: int | None = None,
        backend: str | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """inputs (B, N, dim) -> semantic slots (B, S, dim), their dots (B, S, N), instance slots (B, S, P, dim) and
        their dots (B, S, P, N), unmasked. `instance_init` (B, S, P, dim) stands in for the sample, `iters` for the
        number of iterations that the module was made with.
        """
        batch = inputs.shape[0]
        if instance_init is None:
            instance_init = self.sample_instances(batch)
        params = params_of(
            norm_input=self.norm_input,
            norm_slots=self.norm_slots,
            q=self.project_q,
            k=self.project_k,
            v=self.project_v,
            mlp=(self.norm_pre_ff, self.mlp[0], self.mlp[2]),  # type: ignore[arg-type]
        )

        def stage(slots: torch.Tensor, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
            return vidops.slot_attention(
                inputs,
                slots,
                params,
                iters=self.iters if iters is None else iters,
                scale=self.scale,
                eps=self.eps,
                ln_eps=self.norm_input.eps,
                grad_mode="bilevel",
                return_dots=True,
                backend=backend,
                **options,  # type: ignore[arg-type]
            )

        semantics, dots = stage(self.slots_mu.squeeze(2).expand(batch, -1, -1))
        area = dots.softmax(1) if self.soft_mask else dots.detach() > self.threshold
        # A hard mask can be empty, and a mean over nothing needs a denominator.
        extra = 0.0 if self.soft_mask else 1e-8
        instances, instance_dots = stage(
            instance_init.flatten(1, 2), groups=self.num_slots, token_mask=area, extra_denominator=extra
        )
        split = (self.num_slots, self.num_instances)
        return semantics, dots, instances.unflatten(1, split), instance_dots.unflatten(1, split)
