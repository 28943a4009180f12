"""Tile sizes as a plain function of shapes, so that the choice never looks at device data."""

from __future__ import annotations

from typing import NamedTuple


class Tiles(NamedTuple):
    """Sizes of one program's tile (block_m routes, block_n output features) and its launch options."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# Ascending in block_m. Shared memory stays under the 99 KiB of sm_86 and sm_89, registers under 255 a thread.
TILES = (
    Tiles(block_m=16, block_n=64, block_k=128, num_warps=4, num_stages=3),
    Tiles(block_m=32, block_n=64, block_k=64, num_warps=4, num_stages=3),
    Tiles(block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=3),
    Tiles(block_m=128, block_n=64, block_k=64, num_warps=8, num_stages=3),
)


def choose_tiles(num_routes: int, num_experts: int) -> Tiles:
    """The smallest tile that holds the routes of an average expert, else the largest: narrow ones waste no work,
    wide ones dequantize each weight less often.

    >>> choose_tiles(num_routes=4, num_experts=60).block_m, choose_tiles(num_routes=8192, num_experts=8).block_m
    (16, 128)
    """
    fitting = (tiles for tiles in TILES if tiles.block_m * num_experts >= num_routes)
    return next(fitting, TILES[-1])
