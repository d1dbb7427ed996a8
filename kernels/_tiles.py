"""Tile sizes of the attention kernels: a fixed table by head size and dtype, so that no launch is ever timed.

Chosen so that no kernel spills registers on sm_80 and sm_90 and all fit in the shared memory of sm_80 (163 KB), but
for those of sm_90 alone; `tests/aot` compiles every entry. float32 heads of more than 64 channels run without tensor
cores, whose operands in two parts would spill; their products hold one operand in registers, hence the small tiles.
"""

import torch

from vidops.kernels import _common

Tile = tuple[int, int, int, int]

# bytes per element -> largest padded head size -> (queries, keys, warps, stages)
_FORWARD: dict[int, dict[int, Tile]] = {
    2: {64: (128, 64, 8, 3), 128: (64, 64, 4, 3), 256: (64, 32, 8, 2), 512: (32, 32, 8, 2)},
    4: {128: (32, 32, 8, 1), 256: (16, 32, 4, 1), 512: (16, 16, 8, 1)},
    8: {64: (16, 16, 4, 1), 128: (16, 16, 4, 1), 256: (16, 16, 8, 1), 512: (8, 16, 8, 1)},
}
_BACKWARD_QUERIES: dict[int, dict[int, Tile]] = {
    2: {64: (128, 32, 8, 2), 128: (64, 32, 4, 2), 256: (32, 32, 8, 1), 512: (16, 16, 8, 1)},
    4: {128: (32, 16, 8, 1), 256: (16, 16, 8, 1), 512: (8, 16, 8, 1)},
    8: {64: (16, 16, 4, 1), 128: (16, 16, 4, 1), 256: (8, 16, 8, 1), 512: (16, 16, 8, 1)},
}
_BACKWARD_KEYS: dict[int, dict[int, Tile]] = {
    2: {64: (64, 32, 4, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 1), 512: (32, 16, 8, 1)},
    4: {128: (16, 32, 4, 1), 256: (16, 16, 16, 1), 512: (16, 16, 8, 1)},
    8: {64: (16, 16, 4, 1), 128: (16, 16, 4, 1), 256: (16, 8, 8, 1), 512: (16, 16, 8, 1)},
}
_MAP: dict[int, dict[int, Tile]] = {
    2: {64: (64, 128, 8, 3), 128: (64, 64, 4, 3), 256: (64, 64, 8, 2), 512: (32, 32, 4, 2)},
    4: {128: (32, 32, 4, 1), 256: (32, 32, 8, 1), 512: (16, 16, 4, 1)},
    8: {64: (16, 16, 4, 1), 128: (16, 16, 4, 1), 256: (16, 16, 4, 1), 512: (8, 16, 8, 1)},
}

# float32 heads of up to 64 channels on tensor cores (see `_common.split`), first for compute capability 9, where a
# warp group multiplies 64 rows at a time by an operand in shared memory; elsewhere every warp holds all of that
# operand in registers, in two parts. The counters of dropout need registers too.
_SPLIT_FORWARD: tuple[Tile, Tile] = ((128, 64, 8, 2), (32, 32, 4, 2))
_SPLIT_FORWARD_DROPOUT: tuple[Tile, Tile] = ((128, 32, 8, 2), (32, 32, 4, 2))
_SPLIT_BACKWARD_QUERIES: tuple[Tile, Tile] = ((128, 32, 8, 2), (32, 32, 4, 1))
_SPLIT_BACKWARD_KEYS: tuple[Tile, Tile] = ((32, 128, 8, 2), (16, 32, 4, 1))
_SPLIT_MAP: tuple[Tile, Tile] = ((128, 64, 8, 2), (64, 32, 8, 2))
_SPLIT_MAP_DROPOUT: tuple[Tile, Tile] = ((128, 32, 8, 2), (64, 32, 8, 2))


def _pick(table: dict[int, dict[int, Tile]], split: tuple[Tile, Tile], width: int, q: torch.Tensor) -> Tile:
    if _common.split(q.dtype, width):
        return split[0 if warp_groups(q) else 1]
    return next(tile for largest, tile in table[q.dtype.itemsize].items() if width <= largest)


def warp_groups(q: torch.Tensor) -> bool:
    """Whether products on the device of `q` are those of warp groups: of compute capability 9 alone."""
    return _common.capability(q)[0] == 9


def forward_tile(width: int, q: torch.Tensor, dropout: bool) -> Tile:
    """(queries, keys, warps, stages) of a kernel that holds queries and streams keys (and values)."""
    return _pick(_FORWARD, _SPLIT_FORWARD_DROPOUT if dropout else _SPLIT_FORWARD, width, q)


def backward_queries_tile(width: int, q: torch.Tensor) -> Tile:
    """The same for the backward kernel that holds queries and their gradient."""
    return _pick(_BACKWARD_QUERIES, _SPLIT_BACKWARD_QUERIES, width, q)


def backward_keys_tile(width: int, q: torch.Tensor) -> Tile:
    """The same for the backward kernel that holds keys and values and streams queries."""
    return _pick(_BACKWARD_KEYS, _SPLIT_BACKWARD_KEYS, width, q)


def map_tile(width: int, q: torch.Tensor, dropout: bool) -> Tile:
    """(queries, keys, warps, stages) of a kernel that walks over the heads of one tile of the map."""
    return _pick(_MAP, _SPLIT_MAP_DROPOUT if dropout else _SPLIT_MAP, width, q)
