"""Bit rows: a boolean n x n relation packed into int64 words, 64 columns each."""

from __future__ import annotations

import torch


def words(n: int) -> int:
    """Number of int64 words that hold n bits."""
    return (n + 63) // 64


def pack_adjacency(relation: torch.Tensor) -> torch.Tensor:
    """Pack a boolean relation (n, n) into bit rows (n, ceil(n/64)) int64.

    Bit j % 64 of word j // 64 in row i is ``relation[i, j]``; bits at and beyond n are zero.

    >>> import torch
    >>> pack_adjacency(torch.eye(3, dtype=torch.bool)).tolist()
    [[1], [2], [4]]
    """
    if not isinstance(relation, torch.Tensor):
        raise TypeError(f"relation: expected a torch.Tensor, got {type(relation).__name__}")
    if relation.layout != torch.strided:
        raise TypeError(f"relation: expected a dense (strided) tensor, got layout {relation.layout}")
    if relation.dtype != torch.bool:
        raise TypeError(f"relation: expected torch.bool, got {relation.dtype}")
    if relation.dim() != 2 or relation.shape[0] != relation.shape[1]:
        raise ValueError(f"relation: expected shape (n, n), got {tuple(relation.shape)}")
    n = relation.shape[0]
    padded = torch.zeros(n, words(n) * 64, dtype=torch.int64, device=relation.device)
    padded[:, :n] = relation
    shifts = torch.arange(64, device=relation.device)
    # The bits of one word are disjoint, so their sum is their union (bit 63 wraps to the sign, as it should).
    return (padded.view(n, words(n), 64) << shifts).sum(-1)


def unpack_adjacency(adjacency: torch.Tensor) -> torch.Tensor:
    """The boolean relation (n, n) of bit rows (n, ceil(n/64)) int64; inverse of `pack_adjacency`."""
    check_adjacency("adjacency", adjacency)
    n = adjacency.shape[0]
    shifts = torch.arange(64, device=adjacency.device)
    return ((adjacency[:, :, None] >> shifts) & 1).bool().flatten(1)[:, :n]


def check_adjacency(name: str, adjacency: torch.Tensor) -> None:
    if not isinstance(adjacency, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(adjacency).__name__}")
    if adjacency.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {adjacency.layout}")
    if adjacency.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64 bit rows, got {adjacency.dtype} (see vidops.pack_adjacency)")
    if adjacency.dim() != 2 or adjacency.shape[1] != words(adjacency.shape[0]):
        raise ValueError(f"{name}: expected shape (n, ceil(n/64)), got {tuple(adjacency.shape)}")
