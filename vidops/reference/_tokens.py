"""What the references of token pruning share: unit keys, the order of scores, and the best partner of even tokens."""

from __future__ import annotations

import torch


def unit_rows(keys: torch.Tensor) -> torch.Tensor:
    """Rows over their Euclidean norm in float64; a row of zeros stays zero, and no square over- or underflows."""
    # In float64, because decisions are made on what is computed from these rows: see `products`.
    wide = keys.double()
    tiny = torch.finfo(torch.float64).tiny
    scaled = wide / wide.abs().amax(-1, keepdim=True).clamp_min(tiny)
    return scaled / scaled.norm(dim=-1, keepdim=True).clamp_min(tiny)


def products(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a (B, n, d), b (B, m, d) -> inner products (B, n, m), all float64; decisions are made on them in `dtype`."""
    # Equal tokens have to get equal scores, and a BLAS adds in an order that may depend on the place. Rounded to
    # float32 such sums agree again; for float64 there has to be one order.
    if dtype != torch.float64:
        return a @ b.mT
    return torch.stack([(row.unsqueeze(1) * b).sum(-1) for row in a.unbind(1)], 1)


def ascending(scores: torch.Tensor) -> torch.Tensor:
    """Positions (B, n) in ascending order of scores (B, n), equal ones by position, those of NaN last."""
    # A card may sort by bits, NaN of negative sign first; and its inf / inf has that sign.
    return torch.where(scores.isnan(), torch.nan, scores).sort(dim=1, stable=True).indices


def best_partners(
    unit: torch.Tensor, dtype: torch.dtype, *, class_token: bool = False, distill_token: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """unit (B, N, d) -> even tokens ascending by (similarity, position), similarity, partner; each (B, ceil(N/2))."""
    even, odd = unit[:, 0::2], unit[:, 1::2]
    if odd.shape[1] == 0:
        similarity = unit.new_full(even.shape[:2], -torch.inf, dtype=dtype)
        partner = torch.full(even.shape[:2], -1, dtype=torch.int64, device=unit.device)
    else:
        cosine = products(even, odd, dtype).to(dtype)
        if distill_token:
            cosine[:, :, 0] = -torch.inf
        similarity, partner = cosine.max(2)
    if class_token:
        similarity[:, 0] = -torch.inf
    return ascending(similarity), similarity, partner
