"""Tile sizes of the attention kernels: a fixed table by head size and dtype, so that no launch is ever timed.

Chosen so that no kernel spills registers on sm_80 and sm_90 and all fit in the shared memory of sm_80 (163
KB); `tests/aot` compiles every entry. float16 and bfloat16 run on tensor cores; float32 must not (see
`_common.matmul`), and its products hold one operand in registers, hence the small tiles.
"""

import torch

Tile = tuple[int, int, int, int]

# bytes per element -> largest padded head size -> (queries, keys, warps, stages)
_FORWARD: dict[int, dict[int, Tile]] = {
    2: {64: (128, 64, 8, 3), 128: (64, 64, 4, 3), 256: (64, 32, 8, 2), 512: (32, 32, 8, 2)},
    4: {64: (32, 32, 4, 2), 128: (32, 32, 8, 1), 256: (16, 32, 4, 1), 512: (16, 16, 8, 1)},
    8: {64: (16, 16, 4, 1), 128: (16, 16, 4, 1), 256: (16, 16, 8, 1), 512: (8, 16, 8, 1)},
}
_BACKWARD_QUERIES: dict[int, dict[int, Tile]] = {
    2: {64: (128, 32, 8, 2), 128: (64, 32, 4, 2), 256: (32, 32, 8, 1), 512: (16, 16, 8, 1)},
    4: {64: (32, 32, 8, 1), 128: (32, 16, 8, 1), 256: (16, 16, 8, 1), 512: (16, 16, 8, 1)},
    8: {64: (16, 16, 4, 1), 128: (16, 16, 4, 1), 256: (8, 16, 8, 1), 512: (16, 16, 8, 1)},
}
_BACKWARD_KEYS: dict[int, dict[int, Tile]] = {
    2: {64: (64, 32, 4, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 1), 512: (32, 16, 8, 1)},
    4: {64: (32, 32, 8, 1), 128: (16, 32, 4, 1), 256: (16, 16, 16, 1), 512: (16, 16, 8, 1)},
    8: {64: (16, 16, 4, 1), 128: (16, 16, 4, 1), 256: (16, 8, 8, 1), 512: (16, 16, 8, 1)},
}
_MAP: dict[int, dict[int, Tile]] = {
    2: {64: (64, 128, 8, 3), 128: (64, 64, 4, 3), 256: (64, 64, 8, 2), 512: (32, 32, 4, 2)},
    4: {64: (32, 64, 8, 2), 128: (32, 32, 4, 1), 256: (32, 32, 8, 1), 512: (16, 16, 4, 1)},
    8: {64: (16, 16, 4, 1), 128: (16, 16, 4, 1), 256: (16, 16, 4, 1), 512: (8, 16, 8, 1)},
}


def _pick(table: dict[int, dict[int, Tile]], width: int, dtype: torch.dtype) -> Tile:
    return next(tile for largest, tile in table[dtype.itemsize].items() if width <= largest)


def forward_tile(width: int, dtype: torch.dtype) -> Tile:
    """(queries, keys, warps, stages) of a kernel that holds queries and streams keys (and values)."""
    return _pick(_FORWARD, width, dtype)


def backward_queries_tile(width: int, dtype: torch.dtype) -> Tile:
    """The same for the backward kernel that holds queries and their gradient."""
    return _pick(_BACKWARD_QUERIES, width, dtype)


def backward_keys_tile(width: int, dtype: torch.dtype) -> Tile:
    """The same for the backward kernel that holds keys and values and streams queries."""
    return _pick(_BACKWARD_KEYS, width, dtype)


def map_tile(width: int, dtype: torch.dtype) -> Tile:
    """(queries, keys, warps, stages) of a kernel that walks over the heads of one tile of the map."""
    return _pick(_MAP, width, dtype)
